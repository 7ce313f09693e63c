"""`vlopd vision`: what training did to the tower, for every arm that sees."""

import pytest

from evals.harness import evaluate_arm
from evals.report.build import build_report
from evals.vision.stage import vision_report
from vlopd.errors import ConfigError
from vlopd.files import read_json
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm


def test_towers_are_probed_and_reported(make_config, tmp_path):
    """A frozen tower is the base's (CKA and cosine 1, no difference), a trained one is not; the report has both, and
    nothing is done twice."""
    config = make_config(
        "vlm",
        arms={
            "base": {"type": "base"},
            "full": {"type": "distill", "role": "full", "optim": {"learning_rate": 0.03}},
            "frozen": {"type": "distill", "seed": 1, "train": {"freeze": ["vision"]}},
        },
        eval={"tasks": ["shapes"], "limit": 2},
    )
    run = RunFolder.create(tmp_path / "run", config)
    for arm in config.arms:
        make_arm(run, config, arm)
    path = vision_report(run, config, list(config.arms), None, 40)
    written = path.stat().st_mtime_ns
    assert vision_report(run, config, list(config.arms), None, 40).stat().st_mtime_ns == written
    found = read_json(path)
    assert set(found["towers"]) == {"full", "frozen"} and found["alignment"] == {}
    frozen, full = found["towers"]["frozen"], found["towers"]["full"]
    assert frozen["drift"]["linear_cka"] == pytest.approx(1)
    assert frozen["drift"]["cosine"] == pytest.approx(1)
    assert all(its["difference"]["mean"] == 0 for its in frozen["probes"].values())
    assert full["drift"]["cosine"] < 0.9999
    evaluate_arm(run, config, "base")
    assert "Linear probes" in build_report(run, config).read_text()


def test_a_blind_student_has_no_tower(make_config, tmp_path):
    """Asked for a language model, it says so in one line."""
    config = make_config("llm", arms={"base": {"type": "base"}})
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "base")
    with pytest.raises(ConfigError, match="is text-only"):
        vision_report(run, config, ["base"], None, 10)
