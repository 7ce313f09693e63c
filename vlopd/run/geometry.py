"""The geometry of arms, beside nulls, and the overlap of their updates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlopd.config.arms import TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.digests import digest_checkpoint, file_digest
from vlopd.files import read_json
from vlopd.geometry.checkpoint import PARTIAL, measure_checkpoint
from vlopd.geometry.overlap import write_overlap
from vlopd.geometry.trajectory import step_of, write_trajectory
from vlopd.run.folder import RunFolder, up_to_date
from vlopd.run.resolve import arm_digest, arm_folder, base_arm


def make_geometry(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The geometry of an arm's delta, each number beside its nulls; and of its checkpoints, if it kept any."""
    base = base_arm(config)
    before, out = run.checkpoint(base), run.geometry(name)
    kept = sorted(run.arm(name).glob("checkpoints/step-*"))
    steps = {step_of(folder, i): folder for i, folder in enumerate(kept)}
    inputs: dict[str, Any] = {
        "base": arm_digest(run, base),
        "trained": digest_checkpoint(arm_folder(run, config, name)),
        "config": file_digest(before / "config.json"),  # says how fused tensors are split
        "settings": config.geometry.model_dump(mode="json"),
    }
    if foreign := read_json(run.arm_record(name)).get("other_base"):
        inputs["other_base"] = foreign
    if steps:
        inputs["steps"] = {str(step): digest_checkpoint(steps[step]) for step in sorted(steps)}
    artifact, record = f"geometry/{name}", out / "summary.json"
    if run.checksums.is_done(artifact, record, inputs):
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # of a process that was killed at its end
        return False
    check_arms(run, config, [base, name])
    run.checksums.start(artifact, record)
    tables = {}
    for step, folder in steps.items():
        tables[step] = out / "steps" / str(step)
        own = {**inputs, "step": step}
        if not up_to_date(tables[step] / "summary.json", own):
            measure_checkpoint(before, folder, tables[step], config.geometry, own)
    if len(steps) > 1:
        write_trajectory(before, steps, out, config.geometry, tables=tables)

    def finish(summary: Path, content: Any) -> None:
        tables = [p for p in out.rglob("*") if p.is_file() and p.parent.name != PARTIAL]
        run.checksums.finish(artifact, summary, content, tables)

    folder = arm_folder(run, config, name)
    measure_checkpoint(before, folder, out, config.geometry, inputs, write_record=finish)
    return True


def check_arms(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    """Raises RunError where an arm of this run is not as it was written."""
    for name in names:
        if not isinstance(config.arms.get(name), TeacherArm):
            run.checksums.check(f"arms/{name}")


def make_overlap(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """The overlap of the visible updates of several arms: RUN/geometry/overlap.csv and its record."""
    base, record = base_arm(config), run.root / "geometry" / "overlap.json"
    tables = [record.with_suffix(f".{ending}") for ending in ("csv", "parquet")]
    inputs: dict[str, Any] = {
        "base": arm_digest(run, base),
        "arms": {name: digest_checkpoint(arm_folder(run, config, name)) for name in names},
        "settings": config.geometry.model_dump(mode="json"),
    }
    if run.checksums.is_done("geometry/overlap", record, inputs):
        return False
    check_arms(run, config, [base, *names])
    run.checksums.start("geometry/overlap", record)
    runs = {name: arm_folder(run, config, name) for name in names}
    write_overlap(run.checkpoint(base), runs, record.parent, config.geometry)
    run.checksums.finish("geometry/overlap", record, {"inputs": inputs}, tables)
    return True
