"""`vlopd compare`: compares a run's arms, or any models and finished evaluations.

Heavy imports are inside the command, so that `--help` returns at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from vlopd import pipeline
from vlopd.cli.common import (
    Trust,
    console,
    is_run,
    overrides_of,
    print_artifact,
    print_plan,
    refuse,
    say,
    settings_of,
)
from vlopd.errors import ConfigError


def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="a run folder and TOML overrides; or models and finished evaluations, each compared with the first "
            "(folders, hub ids, builtin:NAME, arms/NAME or evals/NAME of a run, lm-eval's output folders and files)"
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="for models: lm-eval task names, comma-separated; default, where all are evaluations, what they share"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="for models: output folder; default compared")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="TOML override of section eval, e.g. limit=200"),
    ] = None,
    compute: Annotated[
        Literal["auto", "fp32", "bf16"] | None,
        typer.Option(
            help="for models: precision; auto, the default, is bf16 where the device has it"
        ),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--chat-template",
            help="for models: .jinja file or `plain`, for those without a chat template; NAME=FILE for one",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Compares a run's arms (with recovery), or any models: paired differences with intervals."""
    first, *others = what
    if is_run(first):
        overrides = [*overrides_of(first, others), *(f"eval.{line}" for line in settings or ())]
        refuse(
            {"--tasks": tasks, "--compute": compute, "--chat-template": templates},
            "a run has its own; override eval.tasks, precision.compute or student.template in "
            f"`vlopd eval {first}`",
        )
        refuse({"--out": out}, f"the comparison of a run is {first}/compare.json; leave it out")
        folder, config = pipeline.prepare(Path(first), overrides, trust=trust)
        pipeline.begin_results(folder, config, False, print_plan)
        pipeline.make_comparison(folder, config, print_artifact)
        return
    from vlopd.api.compare import compare as compare_models

    found = compare_models(
        what,
        None if tasks is None else tasks.split(","),
        out=out or Path("compared"),
        compute=compute or "auto",
        template=_template_of(templates or []),
        **settings_of(settings, ("models", "tasks", "out", "compute", "template")),
    )
    if tasks is None:
        say("tasks", f"{', '.join(found.tasks)} (those that all evaluations have)")
    _print_comparison(found.record)
    for sentence in found.verdict:
        console.print(sentence, soft_wrap=True, highlight=False)
    print_artifact("comparison", found.out / "compare.json", True)
    print_artifact("page", found.page, True)


def _template_of(words: list[str]) -> str | dict[str, str] | None:
    """The words of --chat-template: one FILE, or any number of NAME=FILE."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if len(named) == len(words):
        return named or None
    if len(words) > 1:
        raise ConfigError(
            f"--chat-template {words[0]}: with several, each needs its model's name, NAME=FILE"
        )
    return words[0]


def _print_comparison(compared: Mapping[str, Any]) -> None:
    from evals.report.verdict import p_value, percent, points

    folded: dict[str, int] = {}
    for task, entry in compared["tasks"].items():
        if entry["group"] is not None:
            folded[entry["group"]] = folded.get(entry["group"], 0) + 1
            continue
        better = "" if entry["higher_is_better"] else " (lower is better)"
        columns = (
            f"{entry['metric']}{better}",
            "standard error",
            "difference to the first",
            "p (Holm)",
        )
        scale = entry["scale"]
        table = Table(task, *columns)
        first = next(iter(entry["arms"]))
        differences = {its["a"]: its for its in entry["contrasts"] if its["b"] == first}
        for name, its in entry["arms"].items():
            versus = differences.get(name)
            cells = ("", "")
            if versus is not None:
                cells = (points(versus, scale), p_value(versus["p_holm"]))
            scores = (percent(its[key], scale) for key in ("mean", "standard_error"))
            table.add_row(name, *scores, *cells)
        console.print(table)
    for group, count in folded.items():
        say("not shown", f"the {count} tasks of {group}, which are in compare.json")
