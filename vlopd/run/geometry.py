"""The geometry of arms, beside nulls, and the overlap of their updates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlopd.config.arms import TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.geometry.checkpoint import PARTIAL, measure_checkpoint
from vlopd.geometry.overlap import write_overlap
from vlopd.geometry.trajectory import write_trajectory
from vlopd.run.folder import RunFolder, up_to_date
from vlopd.run.inputs import geometry_inputs, kept_steps, overlap_inputs
from vlopd.run.resolve import arm_folder, base_arm
from vlopd.run.stage import Stage, stage


def make_geometry(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The geometry of an arm's delta, each number beside its nulls; and of its checkpoints, if it kept any."""
    with stage(run, f"geometry/{name}") as its:
        if its.is_due(lambda _: geometry_inputs(run, config, name)):
            if its.before:  # of another update or settings: nothing of it is kept
                shutil.rmtree(run.geometry(name), ignore_errors=True)
            write_geometry(its, config, name)
        else:
            # of a process that was killed at its end
            shutil.rmtree(run.geometry(name) / PARTIAL, ignore_errors=True)
    return its.made


def write_geometry(its: Stage, config: ExperimentConfig, name: str) -> None:
    run, base = its.run, base_arm(config)
    before, out, steps = run.checkpoint(base), run.geometry(name), kept_steps(run, name)
    check_arms(run, config, [base, name])
    tables = {}
    for step, folder in steps.items():
        tables[step] = out / "steps" / str(step)
        own = {**its.inputs, "step": step}
        if not up_to_date(tables[step] / "summary.json", own):
            measure_checkpoint(before, folder, tables[step], config.geometry, own)
    if len(steps) > 1:
        write_trajectory(before, steps, out, config.geometry, tables=tables)

    def finish(_: Path, content: Any) -> None:
        tables = [p for p in out.rglob("*") if p.is_file() and p.parent.name != PARTIAL]
        its.finish(content, tables)

    folder = arm_folder(run, config, name)
    measure_checkpoint(before, folder, out, config.geometry, its.inputs, write_record=finish)


def check_arms(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    """Raises RunError where an arm of this run is not as it was written."""
    for name in names:
        if not isinstance(config.arms.get(name), TeacherArm):
            run.checksums.check(f"arms/{name}")


def make_overlap(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """The overlap of the visible updates of several arms: RUN/geometry/overlap.csv and its record."""
    with stage(run, "geometry/overlap") as its:
        if its.is_due(lambda _: overlap_inputs(run, config, names)):
            base, out = base_arm(config), run.root / "geometry"
            check_arms(run, config, [base, *names])
            arms = {name: arm_folder(run, config, name) for name in names}
            write_overlap(run.checkpoint(base), arms, out, config.geometry)
            its.finish({}, [out / "overlap.csv", out / "overlap.parquet"])
    return its.made
