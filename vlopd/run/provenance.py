"""Provenance of a run: versions, git state, machine and time."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = [
    "vlopd",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "lm_eval",
    "open_clip_torch",
    "numpy",
    "pillow",
]


def provenance() -> dict[str, Any]:
    """Package versions, git state of the source tree if there is one, kind of machine and time."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git": git_state(),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def git_state() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
