"""Lists the files that determine a task's questions and scoring: its YAML, modules and local data."""

from __future__ import annotations

import ast
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from lm_eval.tasks._yaml_loader import load_yaml

from evals.tasks.benchmarks import documents
from vlopd.data import emoji

FUNCTION = re.compile(r"!function\s+['\"]?([\w.]+)\.\w+")
PICTURE = re.compile(
    rb"(?<![^\"',;\n\r])[^\"',;\n\r]+\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?=[\"',;\n\r])",
    re.IGNORECASE,
)
ROOT = Path(__file__).parents[1]
OURS = ("evals.tasks", "vlopd.data", "vlopd.grading")
"""Packages whose modules determine our tasks' questions and scoring."""


def files_of_task(index: Mapping[str, Any], task: str) -> set[Path]:
    """All files of a task, or of all members of a group or tag. `index`: lm-eval's task index, by name.

    The YAML and its includes; the modules whose functions it names, with their imports from the same folder or from
    our tasks; local data files and folders that it names.
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
        queue += _member_names(settings.get("task"))
        if entry.yaml_path is None:
            queue += sorted(entry.tags)  # the members of a tag
            continue
        path = Path(entry.yaml_path)
        _add_definition(path, path.parent, files)
        files.update(_local_data(settings, files))
    return files


def members_of(index: Mapping[str, Any], task: str) -> dict[str, tuple[str, ...]]:
    """{name: the groups and tags that it is in, the outermost first} of a task and all members of a group or tag."""
    found: dict[str, tuple[str, ...]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in found:
            return
        found[name] = path
        entry = index.get(name)
        if entry is None:
            return
        names = _member_names((entry.cfg or {}).get("task"))
        for member in [*names, *(sorted(entry.tags) if entry.yaml_path is None else ())]:
            visit(member, (*path, name))

    visit(task, ())
    return found


def _member_names(task: Any) -> list[str]:
    """The names in a group's `task` (a list of names and tables), or a task's own name."""
    named = [task] if isinstance(task, (str, Mapping)) else task or ()
    found = []
    for each in named:
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, Mapping):
            found += _member_names(each.get("task")) + _member_names(each.get("group"))
    return found


def _add_definition(path: Path, beside: Path, files: set[Path]) -> None:
    """Adds a YAML or module and its dependencies to `files`; `beside`: the folder of the task's YAML."""
    if path in files or not path.is_file():
        return
    files.add(path)
    if path.suffix == ".py":
        for module in _imported_modules(path, beside):
            _add_definition(module, beside, files)
        return
    included = load_yaml(path, resolve_func=False, recursive=False).get("include") or ()
    for name in [included] if isinstance(included, str) else included:
        _add_definition(path.parent / name, beside, files)
    for name in FUNCTION.findall(path.read_text()):
        for module in _module_files(path.parent, name):
            _add_definition(module, beside, files)


def _imported_modules(path: Path, beside: Path) -> Iterator[Path]:
    """Files of the modules that a module imports from its folder, the task's folder, or our tasks and data."""
    for name in _imported_names(path.read_bytes()):
        for folder in {ROOT} if name.startswith(OURS) else {path.parent, beside}:
            yield from _module_files(folder, name)


@lru_cache(maxsize=256)
def _imported_names(source: bytes) -> tuple[str, ...]:
    """The dotted names that a module imports; none where it does not parse, since importing it raises."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            names = [node.module or "", *(base + alias.name for alias in node.names)]
            found |= dict.fromkeys(filter(None, names))
    return tuple(found)


def _module_files(folder: Path, name: str) -> Iterator[Path]:
    """Files that `import name` may read in a folder: a module, or a package with its parents."""
    for part in name.split("."):
        yield folder / f"{part}.py"
        folder = folder / part
        if not folder.is_dir():
            return
        yield folder / "__init__.py"


def _local_data(settings: Mapping[str, Any], files: Iterable[Path]) -> Iterator[Path]:
    """Local data files of a task, and the images that they name. `files`: its modules."""
    named = [settings.get("dataset_path"), settings.get("dataset_kwargs")]
    root = os.environ.get(documents.FOLDER)
    benchmark = (settings.get("metadata") or {}).get("benchmark")
    if root and benchmark:
        named.append(str(Path(root) / benchmark))
    if Path(emoji.__file__) in files:
        named.append(os.environ.get(emoji.FOLDER, emoji.DEFAULT))
    for text in _all_strings(named):
        # for a hub data set, the cached commit
        yield from _hub_cache(text).glob("refs/*")
        for path in map(Path, glob.glob(text, recursive=True) if glob.has_magic(text) else [text]):
            if path.is_dir():
                yield from (each for each in path.rglob("*") if each.is_file())
            elif path.is_file():
                yield path
                yield from _named_pictures(path)


def _named_pictures(path: Path) -> Iterator[Path]:
    """Local images named in a text data file, relative to its folder or to the working directory."""
    if path.suffix.lower() not in (".json", ".jsonl", ".csv"):
        return
    names = {name.decode("utf-8", "ignore") for name in PICTURE.findall(path.read_bytes())}
    for name in sorted(names):
        for place in (path.parent / name, Path(name)):
            if place.is_file():
                yield place
                break


def _hub_cache(data_set: str) -> Path:
    """The hub's cache folder of a data set."""
    return Path(HF_HUB_CACHE) / f"datasets--{data_set.replace('/', '--')}"


def _all_strings(value: Any) -> Iterator[str]:
    """All strings in nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _all_strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _all_strings(each)
