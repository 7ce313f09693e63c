"""Verifies a run: hashes all its files, and the inputs it was made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of
from vlopd.errors import RunError, UserError
from vlopd.progress import progress
from vlopd.run.checksums import Problem, differences
from vlopd.run.dependencies import arm_inputs, mask_inputs
from vlopd.run.folder import LOCK, NO_RESULTS, RunFolder
from vlopd.run.links import MEASUREMENTS, wrong_links
from vlopd.run.schemas.read import read_record


class Verified(NamedTuple):
    """The result of `verify_run`."""

    problems: list[Problem]  # changed, missing or unreadable files
    unknown: list[Path]  # files not written by a finished stage
    inputs: list[str]  # changed inputs of artifacts
    files: int
    n_bytes: int


def verify_run(run: RunFolder) -> Verified:
    """Compares every file of a run with its checksums, and the inputs of its arms and masks with the present files.

    Read-only. Raises RunError where the folder is not a run.
    """
    written = run.root / "run.json"
    if not written.exists():
        raise RunError(f"{run.root} is not a run folder (no run.json)")
    problems: list[Problem] = []
    known: set[str] = set()
    artifacts = run.checksums.artifacts()
    for artifact in progress(artifacts, title="verify: artifacts", unit="artifact"):
        if run.checksums.is_recorded(artifact) and not run.checksums.record(artifact).exists():
            continue  # the stage was killed before writing its record: not done, will be remade
        found = list(run.checksums.problems(artifact))
        problems += found
        known.add(run.checksums.name(run.checksums.path(artifact)))
        if not any(problem.file == run.checksums.path(artifact) for problem in found):
            known |= run.checksums.read(artifact).keys()
    present = [
        path for path in run.root.rglob("*") if path.is_file() and not _is_working_file(run, path)
    ]
    unknown = [path for path in present if run.checksums.name(path) not in known]
    n_bytes = sum(path.stat().st_size for path in present)
    problems += records_without_checksums(run)
    what, remedy = "is a link out of the run folder, or no plain file", "put a file there"
    problems += [Problem(path, what, remedy) for path in run.foreign_files()]
    problems = list(dict.fromkeys(problems))
    inputs: list[str] = []
    if not any(problem.file in (written, run.checksums.path("run")) for problem in problems):
        config = config_of(run.read()["config"], written).with_candidates()
        inputs = _changed_inputs(run, config)
        if not problems:
            linked = wrong_links(run, config, *MEASUREMENTS, "compare")
            inputs += [f"{run.checksums.name(its.file)} {its.what}" for its in linked]
    return Verified(problems, sorted(unknown), inputs, len(present), n_bytes)


def records_without_checksums(run: RunFolder) -> list[Problem]:
    """Records of finished artifacts without checksums."""
    sums = run.checksums
    return [
        Problem(sums.record(artifact), "has no checksums", sums.remedy(artifact))
        for artifact in sums.records()
        if not sums.path(artifact).exists()
    ]


def _is_working_file(run: RunFolder, path: Path) -> bool:
    """Whether a file is a lock, or in an arm's saved state or trackers: not a result."""
    parts = path.relative_to(run.root).parts
    return parts[0] in (LOCK, ".locks") or (
        parts[0] == "arms" and not set(parts[2:3]).isdisjoint(NO_RESULTS)
    )


def _changed_inputs(run: RunFolder, config: ExperimentConfig) -> list[str]:
    """One line per input file of an arm or mask that has changed since."""
    lines = []
    arms = {name: run.arm_record(name) for name in (config.base_arm, *config.arms)}
    made: dict[Path, Callable[[], dict[str, Any]]] = {
        record: partial(arm_inputs, run, config, name, True) for name, record in arms.items()
    }
    made |= {
        run.mask_record(name): partial(mask_inputs, run, config, name) for name in config.masks
    }
    for record, inputs in made.items():
        if not record.exists():
            continue
        name = run.checksums.name(record)
        try:
            before = read_record(record)["inputs"]
            lines += [f"{name}: {line.split(': ')[0]}" for line in differences(before, inputs())]
        except (UserError, OSError) as error:
            lines.append(f"{name}: {error}")
    return lines
