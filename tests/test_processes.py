"""Several processes under a launcher train the arm that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import together
from tests.test_pipeline import MINIATURE
from vlopd.data import pick

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_two_processes_make_the_step_of_one(kind, folders, tmp_path):
    """Loss, tokens and gradient norm of the first step agree to 1e-5, for an arm under a mask and its `full`."""
    config = tmp_path / "mini.toml"
    config.write_text(
        MINIATURE.format(
            student=folders[kind, "student"],
            teacher=folders[kind, "teacher"],
            modality="image",
            task="shapes",
        )
    )
    # fp32, to compare closely
    words = ["-m", "vlopd.cli", "run", str(config), "precision.compute=fp32", "--arm", "subnetwork"]
    words += ["eval.limit=1", "eval.keep_images=0", "geometry.arms=[]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = {}
    for name, start in (("one", []), ("two", LAUNCHER)):
        out = tmp_path / name
        command = [sys.executable, *start, *words, "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        for arm in ("full", "subnetwork"):
            lines = (out / "arms" / arm / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == 3
            first[name, arm] = json.loads(lines[0])
        record = json.loads((out / "arms" / "subnetwork" / "record.json").read_text())
        assert record["off_mask_unmoved"] is True
    for arm in ("full", "subnetwork"):
        one, two = first["one", arm], first["two", arm]
        assert one["completion_tokens"] == two["completion_tokens"]
        for key in ("loss", "grad_norm", "student_entropy", "kl_quarter_2", "top_overlap_fraction"):
            # full's weights differ in their last bits, so that its mask may take another of two equals
            near = 1e-3 if (arm, key) == ("subnetwork", "grad_norm") else 1e-5
            assert two[key] == pytest.approx(one[key], rel=near), (arm, key)


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    """What two processes made of tests/together.py: what each raised, by case, and the folder of the rest."""
    out = tmp_path_factory.mktemp("both")
    models = folders["llm", "student"].parent
    words = ["-m", "tests.together", str(models), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHER, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    raised = [json.loads((out / f"process-{k}.json").read_text()) for k in (0, 1)]
    return {case: (raised[0][case], raised[1][case]) for case in raised[0]}, out, models


@pytest.mark.parametrize("which", ["both", "eyes"])
def test_rows_without_pictures_on_one_process_change_nothing(which, both, tmp_path):
    """Where both processes' rows, one's or neither's have pictures, in 6 steps with weight decay, the weights are
    those that one process trains, and the same bits on both; also where the tower alone trains."""
    _, out, models = both
    rows = together.every_other_with_picture()
    steps = [pick(rows, 2 * step, 2, together.ARM.seed) for step in range(6)]
    assert {sum(bool(e.images) for e in step) for step in steps} == {0, 1, 2}
    expected = together.train_with_few_pictures(models, tmp_path, which)
    first, second = (torch.load(out / f"{which}-{k}.pt") for k in (0, 1))
    for name, one in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one, rtol=1e-3, atol=1e-4)  # decay alone is 1e-3
    lines = [
        (folder / "metrics.jsonl").read_text().splitlines() for folder in (out / which, tmp_path)
    ]
    norms = [[json.loads(line)["grad_norm"] for line in each] for each in lines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    if which == "eyes":
        assert norms[0].count(0.0) == sum(not any(e.images for e in step) for step in steps)


def test_a_failure_on_one_process_stops_all(both):
    """A row without an answer, tokens or a sampler that are not finite, a full disk, held-out scores that fail:
    each process raises one error, which names the process and, of rows, the example."""
    raised, out, _ = both
    for kind in ("llm", "vlm"):
        rows = pick(together.examples(kind, 2), 0, 2, together.ARM.seed)
        broken = next(k for k, e in enumerate(rows) if e.id.endswith("-0"))
        mine, other = raised[f"row {kind}"][broken], raised[f"row {kind}"][1 - broken]
        assert mine.startswith(f"DataError: example {rows[broken].id!r} has no answer")
        assert other.startswith(
            f"StoppedElsewhere: process {broken} stopped: example {rows[broken].id!r}"
        )
        told = raised[f"loss {kind}"]
        assert told[0] == told[1]
        assert f"not finite are the tokens of {rows[1].id} (process 1); the batch" in told[0]
        for k in (0, 1):
            saved = out / f"loss-{kind}" / "not-finite" / f"process-{k}" / "examples.json"
            assert json.loads(saved.read_text())["not_finite"] == [rows[1].id] * k
    told = raised["sampler llm"]
    assert told[0] == told[1]
    assert "(process 1); the batch" in told[0]
    assert "loss is nan" not in told[0]
    assert raised["disk llm"][0].startswith(("FileExistsError", "NotADirectoryError"))
    assert raised["disk llm"][1].startswith("StoppedElsewhere: process 0 stopped: ")
    assert raised["held-out llm"][0] == "ZeroDivisionError: division by zero"
    assert raised["held-out llm"][1] == (
        "StoppedElsewhere: process 0 stopped: ZeroDivisionError: division by zero"
    )
