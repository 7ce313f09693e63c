"""sha256 digests of files, cached by inode, size and times.

Digests are cached in a small database in the user's cache folder, keyed by inode, size and change time (which
programs cannot set back), so that checking for changes reads no weights. Before a stage uses files, it hashes them in
full (`whole`).
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
"""A file that changed less than this before hashing may change again within the same time stamp; it is not cached."""

LARGE = 2**30
"""Files from this many bytes on are hashed with a progress bar."""

Stamp = tuple[int, int, int, int]
"""Inode, size, modification and change time in ns."""

_hashed: dict[Path, tuple[Stamp, str]] = {}
"""Digests computed by this process."""
_recalled: dict[Path, tuple[Stamp, str]] = {}
"""Digests read from the cache."""


def cache() -> Path:
    """The cache folder: $VLOPD_CACHE, else $XDG_CACHE_HOME/vlopd, else ~/.cache/vlopd."""
    if own := os.environ.get("VLOPD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlopd"


def file_digest(path: Path, whole: bool = False) -> str:
    """The sha256 of a file's content, in hex.

    With `whole`, the file is read unless this process has hashed it before. Raises OSError where it cannot be read.
    """
    path = path.resolve()
    stamp = _file_stamp(path)
    known = _hashed.get(path)
    if known is None and not whole:
        known = _recalled.get(path) or _read_cached(path)
    if known is not None and known[0] == stamp:
        return known[1]
    started = time.time_ns()
    digest = _sha256(path, stamp[1])
    if _file_stamp(path) == stamp and started - stamp[3] > RACY_NS:
        _hashed[path] = (stamp, digest)
        _write_cached(path, stamp, digest)
    return digest


def _sha256(path: Path, size: int) -> str:
    with path.open("rb") as file:
        if size < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        from vlopd.progress import progress

        found = hashlib.sha256()
        title = f"{path.parent.name}/{path.name}: digest"
        with progress(title=title, total=size, unit="B", unit_scale=True, leave=False) as bar:
            while chunk := file.read(2**24):
                found.update(chunk)
                bar.update(len(chunk))
        return found.hexdigest()


def _file_stamp(path: Path) -> Stamp:
    its = path.stat()
    return its.st_ino, its.st_size, its.st_mtime_ns, its.st_ctime_ns


def _read_cached(path: Path) -> tuple[Stamp, str] | None:
    """Reads a digest of an earlier process; None without one."""
    with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(_open_database()) as known:
        row = known.execute(
            "SELECT inode, size, modified, changed, digest FROM files WHERE path = ?", (str(path),)
        ).fetchone()
        if row is not None:
            _recalled[path] = ((row[0], row[1], row[2], row[3]), row[4])
    return _recalled.get(path)


def _write_cached(path: Path, stamp: Stamp, digest: str) -> None:
    """Writes a digest for later processes; a read-only cache is ignored."""
    with (
        contextlib.suppress(OSError, sqlite3.Error),
        contextlib.closing(_open_database()) as known,
        known,
    ):
        known.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
            (str(path), *stamp, digest),
        )


def _open_database() -> sqlite3.Connection:
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    known = sqlite3.connect(folder / "digests.sqlite", timeout=5)
    known.execute("PRAGMA synchronous = OFF")  # entries lost in a crash are hashed again
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
    """One sha256 over names and contents; `whole` as in `file_digest`."""
    return _digest_content({path.name: file_digest(path, whole) for path in paths})


def digest_scores(folder: Path) -> str:
    """One sha256 of a finished evaluation: its results and rows."""
    return digest_files([folder / "results.json", *folder.glob("samples_*.jsonl")])


def _digest_content(content: Mapping[str, str]) -> str:
    """One sha256 over {file: sha256}."""
    return digest_text("".join(f"{name} {content[name]}\n" for name in sorted(content)))


def digest_weights(content: Mapping[str, str]) -> str:
    """`digest_checkpoint` from the {file: sha256} of a folder."""
    return _digest_content({n: its for n, its in content.items() if _is_weights(n)})


def _is_weights(name: str) -> bool:
    """Whether a file of a checkpoint folder determines its weights: safetensors or an adapter's config."""
    return "/" not in name and (name.endswith(".safetensors") or name == "adapter_config.json")


def digest_checkpoint(folder: Path, whole: bool = False) -> str:
    """Digest of a checkpoint's weights (its safetensors files and adapter_config.json).

    Raises RunError where there are none, or only pickles, which are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        held = (
            f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        )
        raise RunError(f"{folder} holds {held}; a checkpoint needs *.safetensors")
    return digest_files([*files, *folder.glob("adapter_config.json")], whole)
