"""What the verbs share: the console, arguments, and lines that name what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vlopd.files import is_first_process, read_json

console = Console()

AllowOtherBase = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="use masks and checkpoints of another base (recorded in every later artifact)",
    ),
]
Target = Annotated[Path, typer.Argument(help="experiment file (TOML), or the folder of a run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="TOML lines over it, e.g. optim.learning_rate=2e-4")
]
Out = Annotated[Path | None, typer.Option(help="run folder of a file; default runs/<name>")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="only this arm; repeatable")]


def say(what: str, where: Path, made: bool) -> None:
    """Names an artifact and its place, and whether it was there already."""
    if is_first_process():
        done = "" if made else " (was done)"
        console.print(f"[bold]{what}[/]: {where}{done}", soft_wrap=True)
        if made and where.name == "geometry.csv":
            say_left_out(where.parent)


def say_left_out(folder: Path) -> None:
    """Names what the two checkpoints of a geometry have that is not compared."""
    left_out = read_json(folder / "summary.json")["left_out"]
    if left_out["summary"]:
        console.print(f"[yellow]left out[/]: {escape(left_out['summary'])}", soft_wrap=True)
