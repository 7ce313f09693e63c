"""What training did to a run's sight: `vlopd vision RUN` -> evals/vision.json, and rows beside each arm's answers.

Linear probes and drift of every arm's vision tower against the base's and, with a scorer, the alignment of what the
arms say of the visual world's test pictures.
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
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import arm_content, base_arm
from vlopd.run.stage import Stage, stage


def look(
    run: RunFolder, config: ExperimentConfig, arms: Sequence[str], scorer: str | None, pictures: int
) -> Path:
    """Probes every arm's tower against the base's; with a `scorer` (open_clip's name or `local-dir:FOLDER`), scores
    their descriptions too, each compared with the base's.

    Raises ConfigError where the student sees no pictures, and as `alignment.load_scorer` does.
    """
    base, out = base_arm(config), run.root / "evals" / "vision.json"
    seeing = [arm for arm in arms if not isinstance(config.arms[arm], ImportedArm)]

    def made_from(whole: bool) -> dict[str, Any]:
        arms = {arm: arm_content(run, config, arm, whole) for arm in (base, *seeing)}
        return {"checkpoints": arms, "scorer": scorer, "pictures": pictures}

    with stage(run, "evals/vision") as its:
        if its.is_due(made_from):
            probe_arms(its, config, base, seeing, scorer, pictures)
    return out


def probe_arms(
    its: Stage,
    config: ExperimentConfig,
    base: str,
    seeing: Sequence[str],
    scorer: str | None,
    pictures: int,
) -> None:
    """Writes evals/vision.json: each arm's probes and drift against the base's, and alignment with a scorer."""
    run = its.run
    untrained = open_arm(run, config, base)
    if not untrained.sees_images:
        raise ConfigError(
            f"{config.student.model} sees no pictures: there is no vision tower to probe"
        )
    judge = None if scorer is None else alignment.load_scorer(scorer, device=untrained.device)
    train, test = (probes.shapes_pictures(split, pictures) for split in ("train", "test"))
    before = probes.both_features(untrained, train, test)
    towers: dict[str, Any] = {}
    aligned: dict[str, Any] = {}
    told = None
    if judge is not None:
        aligned[base], told = alignment.score_shapes(untrained, judge, pictures)
        write_jsonl(run.eval(base) / "alignment.jsonl", told)
    for arm in seeing:
        if arm == base:
            continue
        loaded = open_arm(run, config, arm)
        if not loaded.sees_images:
            continue
        if not isinstance(config.arms[arm], TeacherArm):  # a tower of its own is no drift
            towers[arm], _ = probes.probe_towers(untrained, loaded, train, test, before)
        if judge is not None and told is not None:
            aligned[arm], rows = alignment.score_shapes(loaded, judge, pictures, bases=[untrained])
            aligned[arm]["difference"] = alignment.difference(rows, told)
            write_jsonl(run.eval(arm) / "alignment.jsonl", rows)
    record = {"base": base, "towers": towers, "alignment": aligned}
    its.finish(record, sorted((run.root / "evals").glob("*/alignment.jsonl")))
