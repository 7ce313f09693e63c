"""Is a run as it was written, and what it was made from still there? Every file is hashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vlopd.checkpoint import LOCK, Problem, RunFolder, UserError, differences, read_json
from vlopd.config import DistillArm, ExperimentConfig, ImportedArm, SourceArm, TeacherArm
from vlopd.stages.places import (
    arm_content,
    data_content,
    model_content,
    teacher_content,
)


class Verified(NamedTuple):
    """What `verify_run` found."""

    problems: list[Problem]  # files that are not as they were written
    unknown: list[Path]  # files that no finished stage wrote
    inputs: list[str]  # what arms were made from and is no longer so
    files: int
    n_bytes: int


def verify_run(run: RunFolder, config: ExperimentConfig) -> Verified:
    """Compares every file of a run with its checksums, and what arms were made from with what is there now."""
    problems: list[Problem] = []
    known: set[str] = set()
    artifacts = run.checksums.artifacts()
    for artifact in tqdm(artifacts, desc="verify", unit="artifact"):
        found = list(run.checksums.problems(artifact))
        problems += found
        known.add(run.checksums.name(run.checksums.path(artifact)))
        if not any(problem.file == run.checksums.path(artifact) for problem in found):
            known |= run.checksums.read(artifact).keys()
    present = [path for path in run.root.rglob("*") if path.is_file() and not is_working(run, path)]
    unknown = [path for path in present if run.checksums.name(path) not in known]
    n_bytes = sum(path.stat().st_size for path in present)
    problems = list(dict.fromkeys(problems))
    return Verified(problems, sorted(unknown), changed_inputs(run, config), len(present), n_bytes)


def is_working(run: RunFolder, path: Path) -> bool:
    """Whether a file is of processes at work rather than of the result: locks, and the state of an arm that trains."""
    parts = path.relative_to(run.root).parts
    return parts[0] in (LOCK, ".locks") or (parts[0] == "arms" and "state" in parts[2:3])


def changed_inputs(run: RunFolder, config: ExperimentConfig) -> list[str]:
    """A line an arm that was made from other data or models than are there now."""
    lines = []
    for name, arm in config.arms.items():
        if not run.arm_record(name).exists():
            continue
        try:
            before: Mapping[str, Any] = read_json(run.arm_record(name))["inputs"]
            now: dict[str, Any] = {}
            if isinstance(arm, SourceArm):
                now["files"] = model_content(config.student, whole=True)
            elif isinstance(arm, DistillArm):
                its = config.of_arm(arm)
                teachers = its.teachers.items()
                now["teachers"] = {n: teacher_content(run, its, t, True) for n, t in teachers}
                now["data"] = data_content(its, whole=True)
            elif isinstance(arm, (TeacherArm, ImportedArm)):
                now["files"] = arm_content(run, config, name, whole=True)
            old = {key: before.get(key) for key in now}
            lines += [f"{name}: {line.split(': ')[0]}" for line in differences(old, now)]
        except (UserError, OSError) as error:
            lines.append(f"{name}: {error}")
    return lines
