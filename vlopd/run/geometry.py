"""Geometry of the arms' updates against nulls, their overlap, and groups of arms against each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlopd import distributed
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
from vlopd.run.resolve import arm_folder
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

    workers, device: as in `measure_checkpoint`. Of several processes each measures a share of the tensors.
    """
    state = distributed.accelerator()
    with distributed.in_step(state), stage(run, f"geometry/{name}") as its:
        if its.is_due_in_all(state, lambda _: geometry_inputs(run, config, name)):
            if (
                state.is_main_process and its.before
            ):  # of another update or settings: nothing is reused
                shutil.rmtree(run.geometry(name), ignore_errors=True)
            _write_geometry(its, config, name, workers, device, state)
        elif state.is_main_process:
            _remove_partial(run.geometry(name))
    return its.made


def _remove_partial(folder: Path) -> None:
    """Removes the partial results of tables that are written, which a kill after the record leaves."""
    for left in (folder / PARTIAL, *folder.glob(f"steps/*/{PARTIAL}")):
        shutil.rmtree(left, ignore_errors=True)


def _write_geometry(
    its: Stage,
    config: ExperimentConfig,
    name: str,
    workers: int | None,
    device: str,
    state: Accelerator,
) -> None:
    run, base = its.run, config.base_arm
    before, out, steps = run.checkpoint(base), run.geometry(name), saved_steps(run, name)
    if state.is_main_process:
        _check_arms(run, config, [base, name])
    tables = {step: out / "steps" / str(step) for step in steps}
    inputs = {step: {**its.inputs, "step": step} for step in steps}
    due = [s for s in steps if not up_to_date(tables[s] / "summary.json", inputs[s])]
    for step in distributed.exchanged(state, due)[0]:
        measure_checkpoint(
            before,
            steps[step],
            tables[step],
            config.geometry,
            inputs[step],
            title=f"geometry of {name}@{step}",
            workers=workers,
            device=device,
            processes=state,
        )
    if len(steps) > 1:
        write_trajectory(before, steps, out, config.geometry, tables=tables, processes=state)

    def finish(_: Path, content: Any) -> None:
        for written in tables.values():
            _remove_partial(written)
        files = [p for p in out.rglob("*") if p.is_file() and p.parent.name != PARTIAL]
        its.finish(content, files)

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
        processes=state,
    )


def _check_arms(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    """Raises RunError where a file of these arms was changed."""
    for name in names:
        if not isinstance(config.arms.get(name), TeacherArm):
            run.checksums.check(f"arms/{name}")


def make_overlap(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """Measures the overlap of several arms' updates: RUN/geometry/overlap.csv; returns whether it was made."""
    state = distributed.accelerator()
    with distributed.in_step(state), stage(run, "geometry/overlap") as its:
        if its.is_due_in_all(state, lambda _: overlap_inputs(run, config, names)):
            base, out = config.base_arm, run.root / "geometry"
            if state.is_main_process:
                _check_arms(run, config, [base, *names])
            arms = {name: arm_folder(run, config, name) for name in names}
            settings = (config.geometry, its.inputs)
            write_overlap(run.checkpoint(base), arms, out, *settings, processes=state)
            if state.is_main_process:
                its.finish({}, [out / "overlap.csv", out / "overlap.parquet"])
        elif state.is_main_process:  # left by a process that was killed after writing the tables
            shutil.rmtree(run.root / "geometry" / OVERLAP, ignore_errors=True)
    return its.made


def make_groups(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """Compares the seeds of measured arms with those of their signal nulls and with drawn nulls; returns whether made.

    Writes group_values and groups (.csv, .parquet) in RUN/geometry. names: the measured arms, as of `make_overlap`.
    """
    state, made = distributed.accelerator(), False
    with distributed.in_step(state):
        if state.is_main_process:
            with stage(run, "geometry/groups", derived=True) as its:
                if its.is_due(lambda _: groups_inputs(run, config, names)):
                    out, groups = run.root / "geometry", null_groups(config, names)
                    level = config.eval.confidence
                    its.finish({}, write_groups(out, groups, config.geometry, level))
            made = its.made
    return made
