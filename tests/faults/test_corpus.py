"""The inputs that fuzzing found to reach new code, replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz_targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    """Every kept input returns, or is refused as the target documents."""
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[target](path.read_bytes())
