"""The files that decide what a task asks and how it is scored: its YAML, its modules, its local data."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from evals.tasks.benchmarks import source
from vlopd.data import emoji

INCLUDE = re.compile(r"^include:\s*(\S+)", re.MULTILINE)
FUNCTION = re.compile(r"!function\s+([\w.]+)\.\w+")
ROOT = Path(__file__).parents[1]
OURS = ("evals.tasks", "vlopd.data")
"""Packages whose modules decide what our tasks ask and how they are scored; the rest of the library is machinery."""


def files_of_task(index: Mapping[str, Any], task: str) -> set[Path]:
    """All files of a task, or of all members of a group or tag. `index` is lm-eval's, of tasks by name.

    The YAML, what it includes, the modules whose functions it names and what these import from beside them or
    from our tasks; data files and folders that it names and that are on this disk.
    """
    files: set[Path] = set()
    seen: set[str] = set()
    queue = [task]
    while queue:
        name = queue.pop()
        if name in seen or name not in index:
            continue
        seen.add(name)
        entry = index[name]
        settings = entry.cfg or {}
        queue += members(settings.get("task"))
        if entry.yaml_path is None:
            queue += sorted(entry.tags)  # of a tag, its members
            continue
        definition(Path(entry.yaml_path), files)
        files.update(local_data(settings, files))
    return files


def members(task: Any) -> list[str]:
    """The names in a group's `task`, a list of names and of tables that have one; of a task, its own."""
    named = [task] if isinstance(task, (str, Mapping)) else task or ()
    found = []
    for each in named:
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, Mapping):
            found += members(each.get("task")) + members(each.get("group"))
    return found


def definition(path: Path, files: set[Path]) -> None:
    """Adds a YAML or module, and what it is made of, to `files`."""
    if path in files or not path.is_file():
        return
    files.add(path)
    if path.suffix == ".py":
        for module in imported(path):
            definition(module, files)
        return
    text = path.read_text()
    for name in INCLUDE.findall(text):
        definition(path.parent / name, files)
    for name in FUNCTION.findall(text):
        definition(path.parent / f"{name.replace('.', '/')}.py", files)


def imported(path: Path) -> Iterator[Path]:
    """The files of modules that a module imports from beside it, or from our tasks and data."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            names = [node.module or "", *(base + alias.name for alias in node.names)]
        else:
            continue
        for name in filter(None, names):
            folder = ROOT if name.startswith(OURS) else path.parent
            yield folder / f"{name.replace('.', '/')}.py"


def local_data(settings: Mapping[str, Any], modules: Iterable[Path]) -> Iterator[Path]:
    """The data files of a task that are on this disk."""
    named = [settings.get("dataset_path"), settings.get("dataset_kwargs")]
    root = os.environ.get(source.FOLDER)
    benchmark = (settings.get("metadata") or {}).get("benchmark")
    if root and benchmark:
        named.append(str(Path(root) / benchmark))
    if Path(emoji.__file__) in modules:
        named.append(os.environ.get(emoji.FOLDER, emoji.DEFAULT))
    for text in strings(named):
        # of a hub data set, which commit the cache holds
        yield from hub_cache(text).glob("refs/*")
        path = Path(text)
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from (each for each in path.rglob("*") if each.is_file())


def hub_cache(data_set: str) -> Path:
    """Where the hub's cache keeps a data set, if it does."""
    return Path(HF_HUB_CACHE) / f"datasets--{data_set.replace('/', '--')}"


def strings(value: Any) -> Iterator[str]:
    """All strings in nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from strings(each)
