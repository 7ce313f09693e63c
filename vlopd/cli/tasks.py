"""`vlopd tasks`: a table of the tasks that `eval.tasks` may name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vlopd.cli.common import console
from vlopd.errors import ConfigError


def tasks(
    pattern: Annotated[
        str,
        typer.Argument(
            help="part of a name, or a shell pattern such as 'shapes*'; with @, as in 'shapes@*', the variants of "
            "image tasks without their pictures"
        ),
    ] = "*",
    include: Annotated[
        Path | None, typer.Option(help="a folder with more task files (eval.include)")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="also lm-eval's own tasks")] = False,
    load: Annotated[
        bool,
        typer.Option(
            "--load", help="read the questions that are on disk: exact number and chance level"
        ),
    ] = False,
) -> None:
    """Lists tasks: source of the data, modality, primary metric, chance level, size, and whether the data are here."""
    from evals.task_list import TaskRow, list_tasks

    rows = list_tasks(pattern, None if include is None else str(include), every, load)
    if not rows:
        hint = "" if every else "; --all lists lm-eval's too"
        raise ConfigError(f"no task matches {pattern!r}{hint}")
    table = Table(box=box.SIMPLE_HEAD)
    for name in TaskRow._fields:
        table.add_column(name, no_wrap=name not in ("source", "reachable"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
