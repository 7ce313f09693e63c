"""Every malformed input is refused in one line with exit code 2, and leaves no file; its valid twin passes.

All of them are slow; `test_a_sample` and the table's own checks are not. `scripts/test --faults` runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import (
    inputs_config,
    inputs_data,
    inputs_masks,
    inputs_models,
    inputs_runs,
    inputs_tasks,
    inputs_words,
)
from tests.faults.harness import Case, Edit, copy_seed, faults_of, files_of, timed

KINDS = {
    "config": inputs_config.cases(),
    "command line": inputs_words.cases(),
    "model": inputs_models.cases(),
    "data": inputs_data.cases(),
    "mask": inputs_masks.cases(),
    "run": inputs_runs.cases(),
    "task": inputs_tasks.cases(),
}
CASES = [case for cases in KINDS.values() for case in cases]
SAMPLE = [
    case
    for cases in (KINDS["config"], KINDS["model"], KINDS["data"])
    for case in cases[3::40]
    if case.parts == Case((), "").parts and not case.late
]
"""Cases that need no finished run."""
BEGUN = {"run.json", "run.sha256"}
"""Files of a run whose config was accepted."""
WITHDRAWN = {"run/compare.json", "run/checksums/compare.sha256", "run/report/record.json"}
WITHDRAWN |= {"run/checksums/report.sha256"}
"""Made in seconds from results alone, and so withdrawn where these have changed."""

Call = Callable[[Path, Case, tuple[str, ...], Edit | None], tuple[int, str, float, list[str]]]
"""(exit code, stderr, seconds, files that the call changed) of a command in a workspace that was edited."""


@pytest.fixture
def call_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Call:
    def run(
        seed: Path, case: Case, words: tuple[str, ...], edit: Edit | None
    ) -> tuple[int, str, float, list[str]]:
        copy_seed(seed, tmp_path, case.parts)
        monkeypatch.chdir(tmp_path)
        if edit is not None:
            edit(tmp_path)
        before = set(files_of(tmp_path))
        capfd.readouterr()
        code, seconds = timed(words)
        changed = {path for path, *_ in set(files_of(tmp_path)) ^ before}
        return code, capfd.readouterr().err, seconds, sorted(changed)

    return run


@pytest.fixture(scope="session")
def passed() -> set[Any]:
    """The valid twins that passed; several malformed inputs may share one."""
    return set()


def refused(case: Case, seed: Path, call_in: Call, folder: Path) -> None:
    code, said, seconds, changed = call_in(seed, case, case.words, case.spoil)
    faults = faults_of(case, code, said, seconds)
    for path in changed:
        begun = case.late and Path(path).name in BEGUN
        if not begun and (path not in WITHDRAWN or (folder / path).exists()):
            faults.append(f"wrote {path}")
    assert not faults, f"{case}: {', '.join(faults[:6])}: {said[-900:]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case: Case, seed: Path, call_in: Call, tmp_path: Path) -> None:
    """A malformed input: exit code 2, one line that names it, within seconds, and no file written."""
    refused(case, seed, call_in, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin(case: Case, seed: Path, call_in: Call, passed: set[Any]) -> None:
    """The valid twin of a malformed input passes."""
    words = case.twin or case.words
    if (words, case.mend) not in passed:
        code, said, *_ = call_in(seed, case, words, case.mend)
        assert code == 0, f"{case}: {said[-900:]}"
        passed.add((words, case.mend))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_sample(case: Case, small_seed: Path, call_in: Call, tmp_path: Path) -> None:
    """As `test_refused`, of a few inputs of some kinds."""
    refused(case, small_seed, call_in, tmp_path)


def test_the_table_is_large() -> None:
    """Several hundred malformed inputs, each once, of all kinds."""
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names)) > 400 and all(len(cases) > 50 for cases in KINDS.values())
