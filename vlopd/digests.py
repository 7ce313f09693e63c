"""What a file holds, known by its content: sha256 digests, remembered by size and times.

A digest is remembered with the file's inode, size and change time, which no program can set back, in one small
database of the user's cache, so that a look at whether anything changed reads no weights. Before a stage works
from files it has them hashed in full (`whole`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlopd.errors import RunError

RACY_NS = 50_000_000
"""A file that changed within this time before it was hashed may change again without its change time telling."""

Stamp = tuple[int, int, int, int]
"""Inode, size, modification and change time in ns."""

_hashed: dict[Path, tuple[Stamp, str]] = {}
"""What this process hashed itself."""
_recalled: dict[Path, tuple[Stamp, str]] = {}
"""What it found in the cache."""


def cache() -> Path:
    """Where what can be made again is kept: $VLOPD_CACHE, else $XDG_CACHE_HOME/vlopd, else ~/.cache/vlopd."""
    if own := os.environ.get("VLOPD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlopd"


def file_digest(path: Path, whole: bool = False) -> str:
    """The sha256 of a file's content, in hex.

    With `whole`, the file is read unless this very process read it before. Raises OSError where it cannot be.
    """
    path = path.resolve()
    stamp = stamp_of(path)
    known = _hashed.get(path)
    if known is None and not whole:
        known = _recalled.get(path) or recall(path)
    if known is not None and known[0] == stamp:
        return known[1]
    started = time.time_ns()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stamp_of(path) == stamp and started - stamp[3] > RACY_NS:
        _hashed[path] = (stamp, digest)
        remember(path, stamp, digest)
    return digest


def stamp_of(path: Path) -> Stamp:
    its = path.stat()
    return its.st_ino, its.st_size, its.st_mtime_ns, its.st_ctime_ns


def recall(path: Path) -> tuple[Stamp, str] | None:
    """What an earlier process hashed, None where nothing is known."""
    with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(database()) as known:
        row = known.execute(
            "SELECT inode, size, modified, changed, digest FROM files WHERE path = ?", (str(path),)
        ).fetchone()
        if row is not None:
            _recalled[path] = ((row[0], row[1], row[2], row[3]), row[4])
    return _recalled.get(path)


def remember(path: Path, stamp: Stamp, digest: str) -> None:
    """For later processes; without a cache that can be written, they hash again."""
    with (
        contextlib.suppress(OSError, sqlite3.Error),
        contextlib.closing(database()) as known,
        known,
    ):
        known.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
            (str(path), *stamp, digest),
        )


def database() -> sqlite3.Connection:
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    known = sqlite3.connect(folder / "digests.sqlite", timeout=5)
    known.execute("PRAGMA synchronous = OFF")  # what a crash loses is hashed again
    known.execute(
        "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, inode INTEGER, size INTEGER, "
        "modified INTEGER, changed INTEGER, digest TEXT)"
    )
    return known


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_json(value: Any) -> str:
    return digest_text(json.dumps(value, sort_keys=True))


def digest_files(paths: list[Path], whole: bool = False) -> str:
    """One sha256 over names and contents; `whole` as in digests.file_digest."""
    return digest_content({path.name: file_digest(path, whole) for path in paths})


def digest_content(content: Mapping[str, str]) -> str:
    """One sha256 over {file: sha256}."""
    return digest_text("".join(f"{name} {content[name]}\n" for name in sorted(content)))


def digest_weights(content: Mapping[str, str]) -> str:
    """`digest_checkpoint` of a folder whose {file: sha256} are known."""
    return digest_content({n: its for n, its in content.items() if is_weights(n)})


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint folder holds weights, or says how an adapter's are merged."""
    return "/" not in name and (name.endswith(".safetensors") or name == "adapter_config.json")


def digest_checkpoint(folder: Path, whole: bool = False) -> str:
    """Digest of a checkpoint's weights (its safetensors files, and what says how an adapter's are merged).

    Raises RunError where there are none, or only pickles, which are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        raise RunError(f"{folder} holds {why}; a checkpoint needs *.safetensors")
    return digest_files([*files, *folder.glob("adapter_config.json")], whole)
