"""What a task's templates read of its rows: columns that are not there, empty cells, values that a reader guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from jinja2 import TemplateError, meta, nodes
from lm_eval import utils

from vlopd.data.images import shorten
from vlopd.data.tables import Table, open_files
from vlopd.errors import UserError

DECIDES = (nodes.If, nodes.CondExpr, nodes.Or, nodes.Test)
"""What a template that expects an empty cell has."""


def unknown_column(task: Any, setting: str) -> str | None:
    """A column that a setting names and the rows lack: lm-eval would take the name for the text itself."""
    named = task.config[setting]
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str) and name.isidentifier() and name not in task.features:
            return name
    return None


def empty_cell(task: Any, template: Any, doc: Mapping[str, Any]) -> str | None:
    """The column of a null or NaN that a template (or a column's name) reads, which it would print as a word."""
    if not isinstance(template, str):
        return None
    if template in task.features:
        return template if is_null(doc[template]) else None
    try:
        tree = utils.env.parse(template)
    except TemplateError:
        return None  # said where it is rendered
    names = sorted(meta.find_undeclared_variables(tree) & set(doc))
    found = next((name for name in names if is_null(doc[name])), None)
    if found is not None and next(tree.find_all(DECIDES), None) is None:
        return found
    printed: list[Any] = []

    def keep(value: Any) -> Any:
        printed.append(value)
        return value

    utils.env.overlay(finalize=keep).from_string(template).render(**doc)
    return found or ", ".join(names) if any(map(is_null, printed)) else None


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class Written:
    """The rows of a task as their JSON or CSV files have them, where the task's rows are those of local files."""

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
            return  # a file that only `datasets` reads

    def row(self, index: int, doc: Mapping[str, Any]) -> Mapping[str, Any]:
        """The question with its cells that are no text, unless process_docs changed them, as the file has them."""
        if self.table is None:
            return doc
        own, read = self.table[index], self.read[index]
        kept = {
            k for k, v in doc.items() if not isinstance(v, str) and k in own and read.get(k) == v
        }
        return {k: natural(own[k]) if k in kept else v for k, v in doc.items()}


def natural(word: Any) -> Any:
    """A CSV cell as a number or a truth where it prints again as it was written."""
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


def changed(make: Any, doc: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str] | None:
    """(what a task's function makes of a question, what it makes of the file's own row) where they differ."""
    read = make(doc)
    try:
        written = make(own)
    except Exception:  # made for what `datasets` gives, an empty cell of a record for one
        return None
    pair = shorten(str(read), 60), shorten(str(written), 60)
    return pair if str(read) != str(written) else None
