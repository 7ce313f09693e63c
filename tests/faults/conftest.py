"""The seeds of all workspaces, and the count of refused inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import make_models, make_seed


@pytest.fixture(scope="session")
def small_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and configs alone."""
    return make_models(tmp_path_factory.mktemp("small-seed"))


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is made from them, too."""
    return make_seed(tmp_path_factory.mktemp("seed"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints how many malformed inputs were refused and valid twins passed, and the figures that tests record."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, text in report.user_properties:
                    if name == "figures":
                        terminalreporter.write_line(str(text))
    for test, words in (("test_refused", "malformed inputs refused"), ("test_twin", "twins pass")):
        found = {
            kind: sum(f"{test}[" in report.nodeid for report in its if report.when == "call")
            for kind, its in terminalreporter.stats.items()
            if kind in ("passed", "failed")
        }
        if total := sum(found.values()):
            terminalreporter.write_line(f"{found.get('passed', 0)} of {total} {words}")
