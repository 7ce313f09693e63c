"""The vision stage, `vlopd vision RUN`: evals/vision.json, and alignment.jsonl of each arm.

Linear probes and drift of every arm's vision tower against the base's and, with a scorer, the image-text alignment of
the arms' captions of the shapes test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.harness import open_arm
from evals.vision import alignment, probes
from vlopd.config.arms import ImportedArm, TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.errors import ConfigError
from vlopd.files import write_jsonl
from vlopd.progress import progress
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import arm_content
from vlopd.run.stage import Stage, stage


def vision_report(
    run: RunFolder, config: ExperimentConfig, arms: Sequence[str], scorer: str | None, pictures: int
) -> Path:
    """Probes every arm's tower against the base's; with a `scorer` (open_clip's name or `local-dir:FOLDER`), also
    scores their captions against the base's.

    Raises ConfigError for a text-only student, and as `alignment.load_scorer` does.
    """
    base, out = config.base_arm, run.root / "evals" / "vision.json"
    models = [arm for arm in arms if not isinstance(config.arms[arm], ImportedArm)]

    def made_from(whole: bool) -> dict[str, Any]:
        arms = {arm: arm_content(run, config, arm, whole) for arm in (base, *models)}
        return {"checkpoints": arms, "scorer": scorer, "pictures": pictures}

    with stage(run, "evals/vision") as its:
        if its.is_due(made_from):
            probe_arms(its, config, base, models, scorer, pictures)
    return out


def probe_arms(
    its: Stage,
    config: ExperimentConfig,
    base: str,
    models: Sequence[str],
    scorer: str | None,
    pictures: int,
) -> None:
    """Writes evals/vision.json: each arm's probes and drift against the base's, and alignment with a scorer."""
    run = its.run
    untrained = open_arm(run, config, base)
    if not untrained.sees_images:
        raise ConfigError(f"{config.student.model} is text-only: there is no vision tower to probe")
    clip = None if scorer is None else alignment.load_scorer(scorer, device=untrained.device)
    train, test = (probes.shapes_pictures(split, pictures) for split in ("train", "test"))
    before = probes.train_test_features(untrained, train, test)
    towers: dict[str, Any] = {}
    aligned: dict[str, Any] = {}
    base_rows = None
    if clip is not None:
        aligned[base], base_rows = alignment.score_shapes(untrained, clip, pictures)
        write_jsonl(run.eval(base) / "alignment.jsonl", base_rows)
    for arm in progress(models, title="vision: arms", unit="arm"):
        if arm == base:
            continue
        loaded = open_arm(run, config, arm)
        if not loaded.sees_images:
            continue
        if not isinstance(config.arms[arm], TeacherArm):  # another model's tower has not drifted
            towers[arm], _ = probes.probe_towers(untrained, loaded, train, test, before)
        if clip is not None and base_rows is not None:
            aligned[arm], rows = alignment.score_shapes(loaded, clip, pictures, bases=[untrained])
            aligned[arm]["difference"] = alignment.difference(rows, base_rows)
            write_jsonl(run.eval(arm) / "alignment.jsonl", rows)
    record = {"base": base, "towers": towers, "alignment": aligned}
    its.finish(record, sorted((run.root / "evals").glob("*/alignment.jsonl")))
