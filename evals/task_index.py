"""lm-eval's index of its own tasks, from fourteen thousand YAML files, kept in the cache folder between processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from vlopd.digests import cache, digest_json
from vlopd.files import whole_file

STOCK = Path(lm_eval.__file__).parent / "tasks"


def index_of(folder: Path) -> dict[str, Entry]:
    """{name: entry} of the tasks, groups and tags in a folder, whose YAML files include none outside it.

    Read from the cache folder where names, sizes and times of the files are those of before.
    """
    stamp = digest_json([lm_eval.__version__, str(folder), sorted(_stamps(folder))])
    path = cache() / "tasks.json"
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        kept = json.loads(path.read_bytes())
        if kept["stamp"] == stamp:
            return {name: _entry(name, *values) for name, values in kept["tasks"].items()}
    index = TaskIndex.build([folder])
    values = {
        name: (its.kind.name, its.yaml_path and str(its.yaml_path), its.cfg, sorted(its.tags))
        for name, its in index.items()
    }
    with contextlib.suppress(OSError):  # without a cache, the next process reads the files again
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"stamp": stamp, "tasks": values}))
    return index


def _entry(name: str, kind: str, path: str | None, settings: Any, tags: Sequence[str]) -> Entry:
    return Entry(name, Kind[kind], path and Path(path), settings, set(tags))


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size and modification time of every file in a folder that is no bytecode."""
    for root, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(".pyc"):
                path = os.path.join(root, name)
                its = os.stat(path)
                yield path, its.st_size, its.st_mtime_ns
