"""Shared parts of the commands: console, arguments, and what is printed of a plan and of each artifact."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from vlopd import pipeline
from vlopd.config.arms import expand_seeds
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import merged, read_tables
from vlopd.config.sweeps import words_of
from vlopd.errors import ConfigError, UserError, printable, without_controls
from vlopd.files import is_first_process, read_json
from vlopd.plugins import Use
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record


class PlainConsole(Console):
    """Prints every text as it is, since names, paths and errors may hold `[brackets]`; styles are given by Text.
    Characters that control a terminal are escaped, since a run may be somebody else's."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for each in super().render(renderable, options):
            yield each if each.control else Segment(without_controls(each.text), each.style)


console = PlainConsole(markup=False, emoji=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 200  # in files and pipes, tables are not cut at 80 columns

AllowOtherBase = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="use masks and checkpoints of another base (recorded in every later artifact)",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run the code that a run folder's config names (plug-ins, task files, remote code), and follow its links",
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
            arms = expand_seeds(read_tables(target))["arms"]
    except (OSError, ValueError, LookupError, TypeError, UserError):  # nothing to complete from
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


def say(label: str, text: object, style: str = "bold") -> None:
    """Prints `label: text`, with the label in a style; characters that control a terminal are escaped."""
    shown = Text.assemble((printable(label), style), f": {printable(str(text))}")
    console.print(shown, soft_wrap=True)


def print_artifact(what: str, where: Path, made: bool) -> None:
    """Prints an artifact's description and path, and whether it was already up to date."""
    if is_first_process():
        say(what, f"{where}{'' if made else ' (up to date)'}")
        if made and where.name == "geometry.csv":
            print_left_out(where.parent)
        if made and where.name in ("compare.json", "results.json"):
            print_results(read_record(where))
        if made and where.name == "record.json" and (about := read_record(where).get("sweep")):
            say("chosen", choice_in_words(about))


def choice_in_words(sweep: Mapping[str, Any]) -> str:
    """What was chosen for a tuned arm, of how many settings, and whether at the edge of their grid."""
    edge = ", ".join(sweep["at_edge"])
    text = f"{words_of(sweep['chosen'])}, of {len(sweep['curve'])} settings"
    return f"{text}; at the edge of {edge}, so the best may lie outside" if edge else text


def print_plugin(use: Use) -> None:
    """Prints a plug-in that will run, with its file and digest."""
    if is_first_process():
        say("plug-in", use.line)


def print_left_out(folder: Path) -> None:
    """Prints the tensors that a geometry leaves out of the comparison, if any."""
    left_out = read_record(folder / "summary.json")["left_out"]
    if left_out["summary"]:
        say("left out", left_out["summary"], "yellow")


def print_results(results: Mapping[str, Any]) -> None:
    """Prints, of results or a comparison, tasks that are not compared and thinking models' answers that were cut off.

    Each line once per process.
    """
    lines = [("not compared", f"{t}: {why}") for t, why in results.get("not_compared", {}).items()]
    if "thinking" in results:
        from evals.harness import cut_answers

        lines += [("cut off", line) for line in cut_answers(results)]
    for line in lines:
        if line not in _printed:
            _printed.add(line)
            say(*line, "yellow")


_printed: set[tuple[str, str]] = set()
"""Lines of `print_results` so far."""


def refuse(options: dict[str, Any], remedy: str) -> None:
    """Raises ConfigError for the first option that was given ({option: value}) where it has no effect."""
    for option, value in options.items():
        if value is not None and value is not False and value != []:
            raise ConfigError(f"{option}: {remedy}")


def settings_of(lines: list[str] | None, options: Collection[str]) -> dict[str, Any]:
    """The table of `--set` lines. Raises ConfigError for a key that is one of the command's options or arguments."""
    tree = merged({}, lines or ())
    for key in tree:
        if key in options:
            raise ConfigError(f"--set {key}: is no setting; give it as an argument or as --{key}")
    return tree


def is_run(target: str | Path) -> bool:
    """Whether this is a run folder or a config file, rather than a checkpoint."""
    return (Path(target) / "run.json").is_file() or str(target).endswith(".toml")


def overrides_of(run: str, words: list[str] | None) -> list[str]:
    """The TOML overrides of a run. Raises ConfigError for a path or model among them."""
    is_config = run.endswith(".toml")
    instead = f"{run} is a config; use `vlopd run {run}`" if is_config else f"use {run}/arms/NAME"
    for word in words or ():
        if "=" not in word:
            raise ConfigError(
                f"{word} is no override (key=value) of {run}; for checkpoints {instead}"
            )
    return words or []


# ---------------------------------------------------------------------------------- before a run


def print_plan(run: RunFolder, config: ExperimentConfig, planned: pipeline.Plan) -> None:
    """Prints plug-ins, settings without effect and, for a run that exists, how the config changed, what is kept and
    made."""
    print_plugins(config, list(config.arms))
    if not is_first_process():
        return
    if any(why is not None for why in planned.values()):
        print_notes(config.notes)
    if not (run.root / "run.json").exists():
        return
    for line in run.changes:
        key, _, values = line.partition(": ")
        added, removed = values.startswith("null -> {"), values.startswith("{")
        line = f"{key}: new" if added else f"{key}: removed" if removed else line
        say("config", line)
    due = {artifact: why for artifact, why in planned.items() if why is not None}
    run.planned |= due.keys()
    kept = [artifact for artifact in planned if artifact not in due]
    if kept:
        say("kept", ", ".join(kept))
    by_reason: dict[str, list[str]] = {}
    for artifact, why in due.items():
        by_reason.setdefault(why, []).append(artifact)
    for why, artifacts in by_reason.items():
        say("to be made", f"{', '.join(artifacts)} ({why})")
    for line in pipeline.without_effect(run, config, planned):
        say("no effect", line, "yellow")


def print_notes(notes: list[str]) -> None:
    for line in notes:
        say("note", line, "yellow")


def print_plugins(config: ExperimentConfig, names: list[str]) -> None:
    """Prints the plug-ins of these arms that have a file; the others are left to the checks."""
    for use in pipeline.plugins_of(config, names):
        with suppress(UserError, OSError):
            print_plugin(use)
