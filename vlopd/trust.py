"""Whose code may run: that which the user's own configs and command lines name, not that which a run folder names.

A run folder may come from somebody else, and the config in it names code: plug-ins, folders of task files, a model's
remote code, an engine's program; addresses and folders of engines, which get weights; accounts of trackers, which get
logs. Opening the folder as a run
withholds these names, unless it is trusted; whatever is about to use one of them asks here first. A name that a config
file of the user or the command line gives is the user's own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PLUGIN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^:]+")
"""The form of a plug-in's name, "module:function"."""

_own: set[str] = set()
_received: dict[str, Path] = {}
"""Withheld names, with the file that gives them."""


def plugin(name: str) -> str:
    return f"plug-in {name}"


def task_files(folder: str | Path) -> str:
    return f"task files of {Path(folder).resolve()}"


def remote_code(model: str | Path) -> str:
    return f"remote code of {model}"


def engine(url: str) -> str:
    return f"engine at {url}"


def program(python: str, arguments: Sequence[str]) -> str:
    return f"engine's program {shlex.join([python, *arguments])}"


def exchange(folder: str) -> str:
    return f"engine's folder {folder}"


def account(entity: str | None, mode: str | None) -> str | None:
    """Where wandb sends logs by the config; None where that is left to the user's own settings."""
    if entity is None and mode != "online":
        return None
    return f"account {entity or 'of the user'} of wandb{', online' if mode == 'online' else ''}"


def names_in(tables: Any) -> Iterator[str]:
    """The names of code in the tables of a config; more may be found than are code (`builtin:NAME`)."""
    if isinstance(tables, str) and PLUGIN.fullmatch(tables):
        yield plugin(tables)
    elif isinstance(tables, Mapping):
        if isinstance(folder := tables.get("include"), str):
            yield task_files(folder)
        if isinstance(model := tables.get("model"), str):
            yield remote_code(model)
        if isinstance(url := tables.get("url"), str):
            yield engine(url.rstrip("/"))
        if isinstance(python := tables.get("python"), str):
            yield program(python, [str(each) for each in tables.get("arguments") or ()])
        if isinstance(folder := tables.get("folder"), str):
            yield exchange(folder)
        if "trackers" in tables and (where := account(tables.get("entity"), tables.get("mode"))):
            yield where
        for each in tables.values():
            yield from names_in(each)
    elif isinstance(tables, list | tuple):
        for each in tables:
            yield from names_in(each)


def grant(tables: Any, source: Path | None = None) -> None:
    """Makes the names in the tables of a config the user's own; a model's remote code only where they allow any.

    source: the run.json that has them, if it does, whose folder is trusted too.
    """
    names = {*names_in(tables), *([remote_code(source.parent.resolve())] if source else [])}
    if not _allows_remote_code(tables):
        names = {name for name in names if not name.startswith(remote_code(""))}
    _own.update(names)


def _allows_remote_code(tables: Any) -> bool:
    if isinstance(tables, Mapping):
        return tables.get("trust_remote_code") is True or any(
            map(_allows_remote_code, tables.values())
        )
    return False


def withhold(tables: Any, source: Path) -> None:
    """Withholds the names in the tables of run.json, `source`, except the user's own; and all code in its folder."""
    names = [*names_in(tables), remote_code(source.parent.resolve())]
    _received.update(dict.fromkeys(names, source))


def why_withheld(name: str) -> str | None:
    """Why code of this name may not run, with the remedy, in one line; None where it may."""
    if name in _own or name not in _received:
        return None
    return (
        f"{name}: named by {_received[name]}, not by you, and so not run; read it, then pass --trust "
        "(in Python trust=True), or give your own config file"
    )


def why_remote_code_withheld(model: str) -> str | None:
    """As `why_withheld`, for a model's remote code: by its name or, of a checkpoint, by the folders above it."""
    above = map(str, Path(model).resolve().parents)
    reasons = (why_withheld(remote_code(each)) for each in (model, *above))
    return next(filter(None, reasons), None)
