"""Every malformed input is refused in one line with exit code 2, and leaves no file; its valid twin passes."""

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
}
CASES = [case for cases in KINDS.values() for case in cases]

BEGUN = {"run.json", "run.sha256"}
"""Files of a run whose config was accepted."""
WITHDRAWN = {"run/compare.json", "run/checksums/compare.sha256", "run/report/record.json"}
WITHDRAWN |= {"run/checksums/report.sha256"}
"""Made in seconds from results alone, and so withdrawn where these have changed."""

Call = Callable[[Case, tuple[str, ...], Edit | None], tuple[int, str, float, list[Any]]]
"""(exit code, stderr, seconds, files that the call changed) of a command in a workspace that was edited."""


@pytest.fixture
def call_in(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Call:
    def run(
        case: Case, words: tuple[str, ...], edit: Edit | None
    ) -> tuple[int, str, float, list[Any]]:
        copy_seed(seed, tmp_path, case.parts)
        monkeypatch.chdir(tmp_path)
        if edit is not None:
            edit(tmp_path)
        before = set(files_of(tmp_path))
        capfd.readouterr()
        code, seconds = timed(words)
        return code, capfd.readouterr().err, seconds, sorted(set(files_of(tmp_path)) ^ before)

    return run


@pytest.fixture(scope="session")
def passed() -> dict[Any, bool]:
    """The valid twins that passed; several malformed inputs may share one."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case: Case, call_in: Call, tmp_path: Path) -> None:
    """A malformed input: exit code 2, one line that names it, within seconds, and no file written."""
    code, said, seconds, changed = call_in(case, case.words, case.spoil)
    faults = faults_of(case, code, said, seconds)
    if case.late:
        changed = [each for each in changed if Path(each[0]).name not in BEGUN]
    changed = [
        each for each in changed if each[0] not in WITHDRAWN or (tmp_path / each[0]).exists()
    ]
    assert not faults and not changed, (
        f"{case}: {', '.join(faults)}; wrote {[c[0] for c in changed][:5]}: {said[-900:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin(case: Case, call_in: Call, passed: dict[Any, bool]) -> None:
    """The valid twin of a malformed input passes."""
    words = case.twin or case.words
    if passed.get((words, case.mend)):
        return
    code, said, *_ = call_in(case, words, case.mend)
    assert code == 0, f"{case}: {said[-900:]}"
    passed[words, case.mend] = True
