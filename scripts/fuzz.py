#!/usr/bin/env python
"""Fuzzes one of tests/faults/fuzz_targets.py with atheris: scripts/fuzz TARGET [options of libFuzzer].

An input that reaches new code joins tests/faults/corpus/TARGET; one that fails is written as crash-*.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[1]
NAME = "VLOPD_FUZZ_TARGET"
"""Environment variable with the target, for the processes that libFuzzer starts to reduce a corpus."""


def main() -> None:
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(
        include=["vlopd.masks", "vlopd.weights", "vlopd.data", "vlopd.grading"]
    ):
        from tests.faults.fuzz_targets import TARGETS
    if len(sys.argv) > 1 and sys.argv[1] in TARGETS:
        os.environ[NAME] = sys.argv.pop(1)
    if os.environ.get(NAME) not in TARGETS:
        raise SystemExit(f"scripts/fuzz: name one of {', '.join(TARGETS)}")
    target = TARGETS[os.environ[NAME]]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
