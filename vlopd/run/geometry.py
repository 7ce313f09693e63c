"""Geometry of the arms' updates against nulls, their overlap, and groups of arms against each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlopd.config.arms import TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.run.dependencies import (
    geometry_inputs,
    groups_inputs,
    null_groups,
    overlap_inputs,
    saved_steps,
)
from vlopd.run.folder import RunFolder, up_to_date
from vlopd.run.resolve import arm_folder, base_arm
from vlopd.run.stage import Stage, stage
from vlopd.update_geometry.checkpoint import measure_checkpoint
from vlopd.update_geometry.groups import write_groups
from vlopd.update_geometry.overlap import write_overlap
from vlopd.update_geometry.partial import OVERLAP, PARTIAL
from vlopd.update_geometry.trajectory import write_trajectory


def make_geometry(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    workers: int | None = None,
    device: str = "cpu",
) -> bool:
    """Measures an arm's delta against nulls, also at its saved steps; returns whether it was made.

    workers, device: as in `measure_checkpoint`.
    """
    with stage(run, f"geometry/{name}") as its:
        if its.is_due(lambda _: geometry_inputs(run, config, name)):
            if its.before:  # of another update or settings: nothing is reused
                shutil.rmtree(run.geometry(name), ignore_errors=True)
            _write_geometry(its, config, name, workers, device)
        else:
            # left by a process that was killed after finishing
            shutil.rmtree(run.geometry(name) / PARTIAL, ignore_errors=True)
    return its.made


def _write_geometry(
    its: Stage, config: ExperimentConfig, name: str, workers: int | None, device: str
) -> None:
    run, base = its.run, base_arm(config)
    before, out, steps = run.checkpoint(base), run.geometry(name), saved_steps(run, name)
    _check_arms(run, config, [base, name])
    tables = {}
    for step, folder in steps.items():
        tables[step] = out / "steps" / str(step)
        own = {**its.inputs, "step": step}
        if not up_to_date(tables[step] / "summary.json", own):
            title = f"geometry of {name}@{step}"
            measure_checkpoint(
                before,
                folder,
                tables[step],
                config.geometry,
                own,
                title=title,
                workers=workers,
                device=device,
            )
    if len(steps) > 1:
        write_trajectory(before, steps, out, config.geometry, tables=tables)

    def finish(_: Path, content: Any) -> None:
        tables = [p for p in out.rglob("*") if p.is_file() and p.parent.name != PARTIAL]
        its.finish(content, tables)

    folder = arm_folder(run, config, name)
    title = f"geometry of {name}"
    measure_checkpoint(
        before,
        folder,
        out,
        config.geometry,
        its.inputs,
        workers=workers,
        device=device,
        title=title,
        write_record=finish,
    )


def _check_arms(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    """Raises RunError where a file of these arms was changed."""
    for name in names:
        if not isinstance(config.arms.get(name), TeacherArm):
            run.checksums.check(f"arms/{name}")


def make_overlap(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """Measures the overlap of several arms' updates: RUN/geometry/overlap.csv; returns whether it was made."""
    with stage(run, "geometry/overlap") as its:
        if its.is_due(lambda _: overlap_inputs(run, config, names)):
            base, out = base_arm(config), run.root / "geometry"
            _check_arms(run, config, [base, *names])
            arms = {name: arm_folder(run, config, name) for name in names}
            write_overlap(run.checkpoint(base), arms, out, config.geometry, its.inputs)
            its.finish({}, [out / "overlap.csv", out / "overlap.parquet"])
        else:  # left by a process that was killed after writing the tables
            shutil.rmtree(run.root / "geometry" / OVERLAP, ignore_errors=True)
    return its.made


def make_groups(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """Compares the seeds of measured arms with those of their signal nulls and with drawn nulls; returns whether made.

    Writes group_values and groups (.csv, .parquet) in RUN/geometry. names: the measured arms, as of `make_overlap`.
    """
    with stage(run, "geometry/groups", derived=True) as its:
        if its.is_due(lambda _: groups_inputs(run, config, names)):
            out, groups = run.root / "geometry", null_groups(config, names)
            level = config.eval.confidence
            its.finish({}, write_groups(out, groups, config.geometry, level))
    return its.made
