"""The command line: one command per stage, and `run` for all of them.

Heavy imports are inside the commands, so that `--help`, an invalid config and a finished run return at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from vlopd import pipeline
from vlopd.cli import init, masks, push, tasks
from vlopd.cli.common import (
    AllowOtherBase,
    Arms,
    Out,
    Overrides,
    Target,
    console,
    print_artifact,
    print_plugin,
    print_versions,
    refuse,
    say,
    settings_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import load_config
from vlopd.errors import ConfigError, UserError
from vlopd.files import is_first_process, read_json
from vlopd.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(masks.app, name="mask")
app.command()(init.init)
app.command()(tasks.tasks)
app.command()(push.push)
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LOGLEVEL": "WARNING",
}
"""Environment defaults that limit libraries to warnings; variables already set are kept."""

INTERRUPTED = 130
"""Typer's exit code after Ctrl-C."""

Folder = Annotated[Path, typer.Argument(help="run folder")]
Stages = Literal["arms", "geometry", "evals", "report"]


def _print_plan(run: RunFolder, config: ExperimentConfig, planned: pipeline.Plan) -> None:
    """Prints plug-ins, settings without effect and, for a run that exists, how the config changed, what is kept and
    made."""
    _print_plugins(config, list(config.arms))
    if not is_first_process():
        return
    if any(why is not None for why in planned.values()):
        _print_notes(config.notes)
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


def _print_notes(notes: list[str]) -> None:
    for line in notes:
        say("note", line, "yellow")


def _print_plugins(config: ExperimentConfig, names: list[str]) -> None:
    """Prints the plug-ins of these arms that have a file; the others are left to the checks."""
    for use in pipeline.plugins_of(config, names):
        with suppress(UserError, OSError):
            print_plugin(use)


def _print_verdict(run: RunFolder) -> None:
    from evals.report.verdict import verdict

    console.print()
    for sentence in verdict(read_json(run.compare)):
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print()
    say("report", run.report / "report.html")


# ------------------------------------------------------------------------------------------- commands


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=print_versions, help="Show versions."),
    ] = False,
) -> None:
    """On-policy distillation of language and vision-language models, and what it does to the weights."""


@app.command()
def run(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    arm: Arms = None,
    until: Annotated[Stages, typer.Option(help="the last stage to make")] = "report",
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Runs the whole experiment, stage by stage; with --arm, only that arm and its dependencies.

    Artifacts that are up to date are kept. With a changed config in the same folder, the artifacts that it adds or
    invalidates are listed, then made.
    """
    from vlopd.api.run import Run

    made = Run(target, *(overrides or ()), out=out).run(
        until=until,
        arms=arm,
        allow_other_base=allow_other_base,
        on_plan=_print_plan,
        on_artifact=print_artifact,
    )
    if until == "report" and not arm and is_first_process():
        _print_verdict(made.folder)


@app.command()
def check(
    target: Annotated[Path, typer.Argument(help="config file (TOML)")],
    overrides: Overrides = None,
    meta: Annotated[
        bool, typer.Option("--meta", help="without weights, from the models' config.json alone")
    ] = False,
) -> None:
    """Checks a config before a run: inputs, shared vocabulary, image use, agreement of the models, memory and time."""
    from vlopd.distributed import accelerator, resolve_compute
    from vlopd.preflight.pair import first_examples, preflight, preflight_meta
    from vlopd.train.pair import load_pair

    config = load_config(target, overrides or ())
    device = accelerator().device
    _print_plugins(config, list(config.arms))
    compute = resolve_compute(config.precision.compute, device)
    try:
        if meta:
            rows = preflight_meta(config, device, target.parent / "architectures")
        else:
            # a config without eval.tasks may be for `run --until arms` only, so the default task is not checked
            lines = pipeline.find_problems(
                config.with_compute(compute),
                list(config.arms),
                "tasks" in config.eval.model_fields_set,
            )
            for line in lines:
                say("not ready", line, "red")
            if lines:
                raise typer.Exit(1)
            examples = first_examples(config.data, config.teachers)
            pair = load_pair(
                config.student,
                config.teacher,
                compute=compute,
                device=device,
                images=config.data.has_images,
            )
            rows = preflight(pair, config, examples)
    except UserError as error:
        say("not ready", error, "red")
        raise typer.Exit(1) from None
    columns = ["student", *config.teachers]
    each = Table("", *columns, "ok", title=config.name)
    all_together = Table("", "", "ok")
    for row in rows:
        mark = Text("NO", "red") if row.ok is False else "yes" if row.ok else ""
        table = each if len(row.values) == len(columns) else all_together
        table.add_row(row.what, *row.values, mark)
    console.print(each)
    console.print(all_together)
    _print_notes(config.all_notes)
    failed = [row for row in rows if row.ok is False]
    for row in failed:
        say("not ready", f"{row.what}: {row.remedy}", "red")
    if failed:
        raise typer.Exit(1)


@app.command()
def retrain(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    arm: Arms = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Makes the arms derived from others: retrained under a mask, projected, transplanted, extrapolated."""
    folder, config = pipeline.prepare(target, overrides or (), out)
    derived = [n for n in config.arms if config.is_derived(n)]
    if not derived:
        raise ConfigError(f"{target}: no arm is derived from others; use `vlopd run {target}`")
    names = pipeline.select_arms(config, arm, derived)
    planned = pipeline.plan(folder, config, names, "arms")
    pipeline.begin(folder, config, planned, on_plan=_print_plan)
    pipeline.make_arms(folder, config, names, print_artifact, allow_other_base)


@app.command()
def geometry(
    base: Annotated[
        str,
        typer.Argument(
            help="run folder, or the base checkpoint (folder, hub id, builtin:NAME, .gguf)"
        ),
    ],
    trained: Annotated[
        list[str] | None,
        typer.Argument(
            help="trained checkpoints or LoRA adapters (several: also their overlap); for a run, TOML overrides"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="for checkpoints: output folder; default geometry-<trained name>"),
    ] = None,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="for checkpoints: they are steps of one training run"),
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="`paper`: print the paper's summary table")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="TOML override of section geometry, e.g. null_draws=5"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="threads; default one per core")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Measures the geometry of the updates of a run's arms, or of any checkpoints, against null models."""
    if _is_run(base):
        overrides = [*_overrides(base, trained), *(f"geometry.{line}" for line in settings or ())]
        refuse({"--out": out}, f"the geometry of a run is in {base}/geometry; leave it out")
        refuse(
            {"--trajectory": trajectory},
            "a run's trajectories are measured wherever train.keep_steps keeps checkpoints; leave it out",
        )
        _geometry_of_run(Path(base), overrides, preset, workers, device)
        return
    from vlopd.api.checkpoints import names_of
    from vlopd.api.geometry import geometry as measure

    if not trained:
        raise ConfigError(
            f"{base} is not a run folder (no run.json); for checkpoints give both, BASE and TRAINED"
        )
    names = names_of(trained)
    more = f"-and-{len(names) - 1}-more" if len(names) > 1 else ""
    found = measure(
        base,
        *trained,
        out=out or Path(f"geometry-{names[0]}{more}"),
        trajectory=trajectory,
        preset=preset,
        workers=workers,
        device=device,
        **settings_of(settings, ("base", "out", "trajectory", "preset", "workers", "device")),
    )
    for name, folder in found.folders.items():
        _print_headline(name, found.headline[found.headline.trained == name])
        if preset:
            _print_paper_table(name, folder)
        print_artifact(f"geometry of {name}", folder / "geometry.csv", True)
    for note in found.notes:
        console.print(note, soft_wrap=True, highlight=False)
    for table in ("overlap", "trajectory"):
        if (found.out / f"{table}.csv").exists():
            print_artifact(table, found.out / f"{table}.csv", True)
    print_artifact("page", found.page, True)


def _is_run(target: str | Path) -> bool:
    """Whether this is a run folder or a config file, rather than a checkpoint."""
    return (Path(target) / "run.json").is_file() or str(target).endswith(".toml")


def _overrides(run: str, words: list[str] | None) -> list[str]:
    """The TOML overrides of a run. Raises ConfigError for a path or model among them."""
    is_config = run.endswith(".toml")
    instead = f"{run} is a config; use `vlopd run {run}`" if is_config else f"use {run}/arms/NAME"
    for word in words or ():
        if "=" not in word:
            raise ConfigError(
                f"{word} is no override (key=value) of {run}; for checkpoints {instead}"
            )
    return words or []


def _geometry_of_run(
    target: Path, overrides: list[str], preset: str | None, workers: int | None, device: str
) -> None:
    from vlopd.api.geometry import check_options
    from vlopd.update_geometry import paper

    check_options(preset, workers, device)
    folder, config = pipeline.prepare(target, overrides)
    if preset and (lacking := paper.lacking(config.geometry)):
        raise ConfigError(f"--preset paper: {lacking} (--set on the command line)")
    names = list(config.geometry.arms)
    if not names:
        raise ConfigError(
            f"{target}: geometry.arms is empty; name arms to measure, as in geometry.arms='[\"full\"]'"
        )
    planned = pipeline.plan(folder, config, names, "geometry")
    pipeline.begin(folder, config, planned, ("arms", "masks"), _print_plan)
    pipeline.make_geometry(folder, config, names, print_artifact, workers, device)
    for name in names if preset and is_first_process() else ():
        _print_paper_table(name, folder.geometry(name))


def _print_headline(name: str, rows: pd.DataFrame) -> None:
    """Prints the main measures of an update beside each null."""
    import pandas as pd

    table = Table("measure", "update", "null: mean ± sd", "p", title=f"update of {name}")
    before = ""
    for row in rows.to_dict("records"):
        numbers = (row["value"], row["null_mean"], row["p"])
        value, mean, p = ("-" if pd.isna(x) else f"{x:.4g}" for x in numbers)
        spread = "" if pd.isna(row["null_sd"]) else f" ± {row['null_sd']:.2g}"
        null = f"{row['null'].replace('_', ' ')}: {mean}{spread}" if row["null"] else "-"
        again = row["label"] == before
        table.add_row("" if again else row["label"], "" if again else value, null, p)
        before = row["label"]
    console.print(table)
    console.print(
        "p: whether the update is one more draw of the null, noise of the same norm. A small p does not show that "
        "training on a signal made the difference: training on nothing has a similar spectrum (docs/geometry.md).",
        soft_wrap=True,
        highlight=False,
    )


def _print_paper_table(name: str, folder: Path) -> None:
    from vlopd.update_geometry import paper
    from vlopd.update_geometry.checkpoint import read_rows

    table = Table(name, *(column.title for column in paper.COLUMNS))
    for label, cells in paper.paper_table(read_rows(folder)):
        table.add_row(label, *cells)
    console.print(table)


@app.command("eval")
def evaluate(target: Target, overrides: Overrides = None, arm: Arms = None) -> None:
    """Evaluates arms with lm-eval."""
    folder, config = pipeline.prepare(target, overrides or ())
    names = pipeline.select_arms(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, "evals", geometry=False)
    pipeline.begin(folder, config, planned, ("arms", "masks"), _print_plan)
    pipeline.make_evals(folder, config, names, print_artifact)


@app.command()
def vision(
    run: Folder,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="open_clip model (local-dir:FOLDER) for the CLIPScore of the arms' captions"
        ),
    ] = None,
    arm: Arms = None,
    pictures: Annotated[int, typer.Option(help="images of the visual world's test split")] = 500,
) -> None:
    """Measures training's effect on the vision tower: linear probes, drift, CLIPScore of captions."""
    if pictures < 1:
        raise ConfigError(f"--pictures {pictures}: must be at least 1")
    if scorer and scorer.startswith("local-dir:") and not Path(scorer[10:]).is_dir():
        raise ConfigError(f"--scorer {scorer}: no such folder")
    folder, config = RunFolder.open(run)
    names = pipeline.select_arms(config, arm, list(config.arms))
    pipeline.make_vision(folder, config, names, scorer, pictures, print_artifact)


@app.command()
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
) -> None:
    """Compares a run's arms (with recovery), or any models: paired differences with intervals."""
    first, *others = what
    if _is_run(first):
        overrides = [*_overrides(first, others), *(f"eval.{line}" for line in settings or ())]
        refuse(
            {"--tasks": tasks, "--compute": compute},
            f"a run has its own; override eval.tasks or precision.compute in `vlopd eval {first}`",
        )
        refuse({"--out": out}, f"the comparison of a run is {first}/compare.json; leave it out")
        folder, config = pipeline.prepare(Path(first), overrides)
        pipeline.begin_results(folder, config, False, _print_plan)
        pipeline.make_comparison(folder, config, print_artifact)
        return
    from vlopd.api.checkpoints import names_of
    from vlopd.api.compare import compare as compare_models

    found = compare_models(
        dict(zip(names_of(what), what, strict=True)),
        None if tasks is None else tasks.split(","),
        out=out or Path("compared"),
        compute=compute or "auto",
        **settings_of(settings, ("models", "tasks", "out", "compute")),
    )
    if tasks is None:
        say("tasks", f"{', '.join(found.tasks)} (those that all evaluations have)")
    _print_comparison(found.record)
    for sentence in found.verdict:
        console.print(sentence, soft_wrap=True, highlight=False)
    print_artifact("comparison", found.out / "compare.json", True)
    print_artifact("page", found.page, True)


def _print_comparison(compared: Mapping[str, Any]) -> None:
    from evals.report.verdict import p_value, percent, points

    for task, entry in compared["tasks"].items():
        columns = (entry["metric"], "standard error", "difference to the first", "p (Holm)")
        table = Table(task, *columns)
        first = next(iter(entry["arms"]))
        differences = {its["a"]: its for its in entry["contrasts"] if its["b"] == first}
        for name, its in entry["arms"].items():
            versus = differences.get(name)
            cells = ("", "") if versus is None else (points(versus), p_value(versus["p_holm"]))
            table.add_row(name, percent(its["mean"]), percent(its["standard_error"]), *cells)
        console.print(table)


@app.command()
def report(target: Target, overrides: Overrides = None) -> None:
    """Writes the report (report.html, report.md, figures, tables), after the comparison if all arms are evaluated."""
    folder, config = pipeline.prepare(target, overrides or ())
    pipeline.begin_results(folder, config, True, _print_plan)
    if all((folder.eval(name) / "results.json").exists() for name in config.arms):
        pipeline.make_comparison(folder, config, print_artifact)
    pipeline.make_report(folder, config, print_artifact)
    _print_verdict(folder)


@app.command()
def show(run: Folder) -> None:
    """Lists a run's arms, altered files, and its verdict if there is one. Read-only: works during training."""
    from vlopd.api.run import Run

    its = Run(run, altered=True)
    table = Table("arm", "type", "mask", "density", "steps", "evaluated", title=its.config.name)
    for arm in its.arms.astype(object).where(its.arms.notna(), None).to_dict("records"):
        table.add_row(
            arm["arm"],
            arm["type"] if arm["made"] else "not made yet",
            arm["mask"] or "",
            "" if arm["density"] is None else f"{arm['density']:.2%}",
            "" if arm["steps"] is None else str(arm["steps"]),
            arm["evaluated"],
        )
    console.print(table)
    for problem in its.problems:
        say("altered", problem, "red")
    if its.folder.compare.exists():
        _print_verdict(its.folder)


@app.command()
def verify(run: Folder) -> None:
    """Verifies a run: hashes every file, and the inputs it was made from."""
    from vlopd.run.verify import verify_run

    found = verify_run(RunFolder(run))
    for problem in found.problems:
        say("altered", problem, "red")
    for path in found.unknown:
        say("not written by a finished stage", path, "yellow")
    for line in found.inputs:
        say("input changed", line, "yellow")
    size, altered = decimal(found.n_bytes), len(found.problems)
    say("verified", f"{found.files:,} files ({size}) of {run}, {altered} altered")
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a UserError is one line on stderr and exit code 2; an interrupt exits with 130."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(prog_name="vlopd", standalone_mode=True)
    except UserError as error:
        print(f"vlopd: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        # e.g. a full disk, for which safetensors has a separate class
        line = " ".join(str(error).split())
        print(f"vlopd: {line}; files written before are intact", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("vlopd: interrupted; rerun the same command to resume", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
