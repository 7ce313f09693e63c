"""Checks of the columns that a task's templates read: missing columns, empty cells, inferred types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from jinja2 import Template, TemplateError, meta, nodes
from lm_eval import utils

from evals.task_code import FAILURES
from vlopd.data.images import shorten
from vlopd.data.tables import Table, open_files
from vlopd.errors import UserError

DECIDES = (nodes.If, nodes.CondExpr, nodes.Or, nodes.Test)
"""Nodes of a template that handles empty cells."""


def unknown_column(task: Any, setting: str) -> str | None:
    """The column that a setting names and the rows lack; lm-eval would use the name as the text. None if present."""
    named = task.config[setting]
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str) and name.isidentifier() and name not in task.features:
            return name
    return None


def empty_cell(task: Any, template: Any, doc: Mapping[str, Any]) -> str | None:
    """The column with a null or NaN that a template (or column name) would print as a word; None without one."""
    if not isinstance(template, str):
        return None
    if template in task.features:
        return template if _is_null(doc[template]) else None
    try:
        read, decides, written, printed = _compiled(template)
    except TemplateError:
        return None  # rendering raises it
    names = sorted(read & set(doc))
    found = next((name for name in names if _is_null(doc[name])), None)
    if found is not None and not decides:
        return found
    constants = len(printed)  # which compiling printed
    try:
        written.render(**doc)
        return found or ", ".join(names) if any(map(_is_null, printed)) else None
    finally:
        del printed[constants:]


@lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[set[str], bool, Template, list[Any]]:
    """The names that a template reads, whether it decides by them, the template, and a list of what it prints."""
    tree = utils.env.parse(template)
    printed: list[Any] = []

    def keep(value: Any) -> Any:
        printed.append(value)
        return value

    written = utils.env.overlay(finalize=keep).from_string(template)
    decides = next(tree.find_all(DECIDES), None) is not None
    return meta.find_undeclared_variables(tree), decides, written, printed


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class VerbatimRows:
    """The verbatim rows of a task whose data are local JSON or CSV files."""

    def __init__(self, task: Any, split: str):
        self.table: Table | None = None
        config = task.config
        guessed = config.dataset_path in ("json", "csv") or Path(config.dataset_path or "").is_dir()
        if config.custom_dataset or not guessed:
            return
        kwargs = {k: v for k, v in (config.dataset_kwargs or {}).items() if k.startswith("data_")}
        try:
            builder = load_dataset_builder(config.dataset_path, config.dataset_name, **kwargs)
            paths = [Path(name) for name in (builder.config.data_files or {}).get(split, ())]
            if paths and all(path.is_file() for path in paths):
                table = open_files(paths)
                self.read = task.dataset[split]
                self.table = table if len(table) == len(task.eval_docs) else None
        except (UserError, ValueError, OSError):
            return  # a file that only `datasets` can read

    def row(self, index: int, doc: Mapping[str, Any]) -> Mapping[str, Any]:
        """The question with verbatim values for its cells that are not text and that process_docs did not change."""
        if self.table is None:
            return doc
        own, read = self.table[index], self.read[index]
        kept = {
            k for k, v in doc.items() if not isinstance(v, str) and k in own and read.get(k) == v
        }
        return {k: _parse_cell(own[k]) if k in kept else v for k, v in doc.items()}


def _parse_cell(word: Any) -> Any:
    """Converts a CSV cell to a number or bool where that prints unchanged."""
    if not isinstance(word, str):
        return word
    if word in ("True", "False"):
        return word == "True"
    for kind in (int, float):
        try:
            if str(kind(word)) == word:
                return kind(word)
        except ValueError:
            continue
    return word


def differs_from_file(
    make: Any, doc: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[str, str] | None:
    """(a task function's result on a question, its result on the file's verbatim row) where they differ, else None."""
    read = make(doc)
    try:
        written = make(own)
    except FAILURES:  # the function may need the types that `datasets` infers
        return None
    pair = shorten(str(read), 60), shorten(str(written), 60)
    return pair if str(read) != str(written) else None
