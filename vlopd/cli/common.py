"""Shared parts of the commands: console, arguments, and the line printed for each artifact."""

from __future__ import annotations

import os
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vlopd.config.arms import expand_seeds
from vlopd.files import is_first_process, read_json

console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 200  # in files and pipes, tables are not cut at 80 columns

AllowOtherBase = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="use masks and checkpoints of another base (recorded in every later artifact)",
    ),
]


def complete_arms(context: typer.Context, incomplete: str) -> list[str]:
    """The arms of the config file or run folder of the command line, for the shell's completion."""
    named = [context.params.get("target"), context.params.get("run"), *context.args]
    target = next((Path(word) for word in named if word and Path(word).exists()), Path())
    try:
        if target.is_dir():
            arms = read_json(target / "run.json")["config"]["arms"]
        else:
            arms = expand_seeds(tomllib.loads(target.read_text()))["arms"]
    except (OSError, ValueError, KeyError):  # nothing to complete from
        return []
    return [name for name in arms if name.startswith(incomplete)]


Target = Annotated[Path, typer.Argument(help="config file (TOML) or run folder")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="TOML overrides of the config, e.g. optim.learning_rate=2e-4"),
]
Out = Annotated[Path | None, typer.Option(help="run folder for a config file; default runs/<name>")]
Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", help="only this arm; repeatable", autocompletion=complete_arms),
]


def print_versions(wanted: bool) -> None:
    """Prints the versions of vlopd and of what its results depend on most, and exits."""
    if wanted:
        for package in ("vlopd", "torch", "transformers"):
            print(package, version(package))
        print("python", platform.python_version())
        raise typer.Exit


def print_artifact(what: str, where: Path, made: bool) -> None:
    """Prints an artifact's description and path, and whether it was already up to date."""
    if is_first_process():
        done = "" if made else " (up to date)"
        console.print(f"[bold]{escape(what)}[/]: {escape(str(where))}{done}", soft_wrap=True)
        if made and where.name == "geometry.csv":
            print_left_out(where.parent)


def print_left_out(folder: Path) -> None:
    """Prints the tensors that a geometry leaves out of the comparison, if any."""
    left_out = read_json(folder / "summary.json")["left_out"]
    if left_out["summary"]:
        console.print(f"[yellow]left out[/]: {escape(left_out['summary'])}", soft_wrap=True)
