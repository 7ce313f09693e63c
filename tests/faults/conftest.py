"""The seed of all workspaces, and the count of refused inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import make_seed


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seed(tmp_path_factory.mktemp("seed"))
