"""`vlopd paper`: the tables of arXiv 2606.13657 of one or more runs.

Heavy imports are inside the command, so that `--help` returns at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vlopd.cli.common import console, print_artifact


def paper(
    runs: Annotated[
        list[str],
        typer.Argument(help="run folders, one pair of models each (docs/how-to/paper.md)"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="folder for the tables as Markdown, CSV (all numbers) and LaTeX"),
    ] = None,
) -> None:
    """Prints the tables of arXiv 2606.13657: each number with its interval, drawn null and signal null."""
    from evals.report.paper.pages import HOW, lay_out, remarks
    from vlopd.api.paper import paper as make

    made = make(*runs)
    for name, its in made.tables.items():
        laid = lay_out(its)
        if laid.lines:
            shown = Table(name, *laid.columns, title=its.title)
            before = ""
            for pair, row, cells in laid.lines:
                if pair != before and len(runs) > 1:
                    shown.add_section()
                    shown.add_row(Text(pair, style="bold"))
                before = pair
                wrapped = (cell.replace(" [", "\n[").replace(", p", "\np") for cell in cells)
                shown.add_row(*map(Text, (row, *wrapped)))
            console.print(shown)
        else:
            console.print(f"{its.title}: not made")
        for line in remarks(its):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print()
    console.print(HOW, soft_wrap=True, highlight=False, markup=False)
    if out is not None:
        made.write(out)
        print_artifact("tables", out, True)
