"""The files that decide what a task asks and how it is scored: its YAML, its modules, its local data."""

from __future__ import annotations

import ast
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from lm_eval.tasks._yaml_loader import load_yaml

from evals.tasks.benchmarks import documents
from vlopd.data import emoji

FUNCTION = re.compile(r"!function\s+['\"]?([\w.]+)\.\w+")
PICTURE = re.compile(
    rb"[^\"',;\n\r]+\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?=[\"',;\n\r])", re.IGNORECASE
)
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
        path = Path(entry.yaml_path)
        definition(path, path.parent, files)
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


def definition(path: Path, beside: Path, files: set[Path]) -> None:
    """Adds a YAML or module, and what it is made of, to `files`; `beside` is the folder of the task's YAML."""
    if path in files or not path.is_file():
        return
    files.add(path)
    if path.suffix == ".py":
        for module in imported(path, beside):
            definition(module, beside, files)
        return
    included = load_yaml(path, resolve_func=False, recursive=False).get("include") or ()
    for name in [included] if isinstance(included, str) else included:
        definition(path.parent / name, beside, files)
    for name in FUNCTION.findall(path.read_text()):
        for module in modules(path.parent, name):
            definition(module, beside, files)


def imported(path: Path, beside: Path) -> Iterator[Path]:
    """The files of modules that a module imports from its folder or the task's, or from our tasks and data."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # whoever imports it says so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            names = [node.module or "", *(base + alias.name for alias in node.names)]
        else:
            continue
        for name in filter(None, names):
            for folder in {ROOT} if name.startswith(OURS) else {path.parent, beside}:
                yield from modules(folder, name)


def modules(folder: Path, name: str) -> Iterator[Path]:
    """The files that `import name` may read in a folder: a module, or a package and what leads to it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:depth])
        yield path / "__init__.py"
        yield path.parent / f"{path.name}.py"


def local_data(settings: Mapping[str, Any], files: Iterable[Path]) -> Iterator[Path]:
    """The data files of a task that are on this disk, and the pictures that they name. `files` are its modules."""
    named = [settings.get("dataset_path"), settings.get("dataset_kwargs")]
    root = os.environ.get(documents.FOLDER)
    benchmark = (settings.get("metadata") or {}).get("benchmark")
    if root and benchmark:
        named.append(str(Path(root) / benchmark))
    if Path(emoji.__file__) in files:
        named.append(os.environ.get(emoji.FOLDER, emoji.DEFAULT))
    for text in strings(named):
        # of a hub data set, which commit the cache holds
        yield from hub_cache(text).glob("refs/*")
        for path in map(Path, glob.glob(text, recursive=True) if glob.has_magic(text) else [text]):
            if path.is_dir():
                yield from (each for each in path.rglob("*") if each.is_file())
            elif path.is_file():
                yield path
                yield from named_pictures(path)


def named_pictures(path: Path) -> Iterator[Path]:
    """Pictures on this disk that a data file of text names, relative to its folder or to where we are."""
    if path.suffix.lower() not in (".json", ".jsonl", ".csv"):
        return
    names = {name.decode("utf-8", "ignore") for name in PICTURE.findall(path.read_bytes())}
    for name in sorted(names):
        for place in (path.parent / name, Path(name)):
            if place.is_file():
                yield place
                break


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
