"""Shared parts of the commands: console, arguments, and the line printed for each artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vlopd.files import is_first_process, read_json
from vlopd.plugins import Use

console = Console()

AllowOtherBase = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="use masks and checkpoints of another base (recorded in every later artifact)",
    ),
]
Target = Annotated[Path, typer.Argument(help="config file (TOML) or run folder")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="TOML overrides of the config, e.g. optim.learning_rate=2e-4"),
]
Out = Annotated[Path | None, typer.Option(help="run folder for a config file; default runs/<name>")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="only this arm; repeatable")]


def print_artifact(what: str, where: Path, made: bool) -> None:
    """Prints an artifact's description and path, and whether it was already up to date."""
    if is_first_process():
        done = "" if made else " (up to date)"
        console.print(f"[bold]{what}[/]: {where}{done}", soft_wrap=True)
        if made and where.name == "geometry.csv":
            print_left_out(where.parent)


def print_plugin(use: Use) -> None:
    """Prints a function of the user's own that will run, with its file and digest."""
    if is_first_process():
        console.print(f"[bold]plug-in[/]: {escape(use.line)}", soft_wrap=True)


def print_left_out(folder: Path) -> None:
    """Prints the tensors that a geometry leaves out of the comparison, if any."""
    left_out = read_json(folder / "summary.json")["left_out"]
    if left_out["summary"]:
        console.print(f"[yellow]left out[/]: {escape(left_out['summary'])}", soft_wrap=True)
