"""The command line: one command per stage, and `run` for all of them.

Heavy imports are inside the commands, so that `--help`, an invalid config and a finished run return at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from vlopd import pipeline
from vlopd.cli import checkpoints, init, masks, push, tasks
from vlopd.cli.common import (
    AllowOtherBase,
    Arms,
    Out,
    Overrides,
    Target,
    console,
    print_artifact,
    print_versions,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of, load_config
from vlopd.errors import ConfigError, UserError
from vlopd.files import is_first_process, read_json
from vlopd.run.folder import RunFolder

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
    "DISABLE_MULTIPROC": "1",  # lm-eval would start a process pool for closed-form errors
    "LOGLEVEL": "WARNING",
}
"""Environment defaults that limit libraries to warnings; variables already set are kept."""

INTERRUPTED = 130
"""Typer's exit code after Ctrl-C."""

Run = Annotated[Path, typer.Argument(help="run folder")]
Stages = Literal["arms", "geometry", "evals", "report"]


def _select_arms(config: ExperimentConfig, arms: list[str] | None, names: list[str]) -> list[str]:
    """The arms of `names` selected by --arm, or all. Raises ConfigError for an unknown arm."""
    for arm in arms or ():
        if arm not in config.arms:
            raise ConfigError(f"--arm {arm}: not in the config, which has {', '.join(config.arms)}")
    return [name for name in names if not arms or name in arms]


def _print_plan(run: RunFolder, config: ExperimentConfig, planned: pipeline.Plan) -> None:
    """Prints settings without effect and, for a run that exists, how the config changed, what is kept and made."""
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
        console.print(f"[bold]config[/]: {escape(line)}", soft_wrap=True)
    due = {artifact: why for artifact, why in planned.items() if why is not None}
    run.planned |= due.keys()
    kept = [artifact for artifact in planned if artifact not in due]
    if kept:
        console.print(f"[bold]kept[/]: {escape(', '.join(kept))}", soft_wrap=True)
    by_reason: dict[str, list[str]] = {}
    for artifact, why in due.items():
        by_reason.setdefault(why, []).append(artifact)
    for why, artifacts in by_reason.items():
        line = f"{', '.join(artifacts)} ({why})"
        console.print(f"[bold]to be made[/]: {escape(line)}", soft_wrap=True)
    for line in pipeline.without_effect(run, config, planned):
        console.print(f"[yellow]no effect[/]: {escape(line)}", soft_wrap=True)


def _print_notes(notes: list[str]) -> None:
    for line in notes:
        console.print(f"[yellow]note[/]: {escape(line)}", soft_wrap=True)


def _begin(
    run: RunFolder, config: ExperimentConfig, planned: pipeline.Plan, reads: tuple[str, ...] = ()
) -> None:
    """Prints the plan, refuses known problems and outdated artifacts that a stage `reads` (kinds), saves the config."""
    _print_plan(run, config, planned)
    pipeline.refuse_outdated(run, planned, reads)
    pipeline.refuse_unready(config, planned)
    run.save_config(config)


def _refuse_outdated_results(run: RunFolder, config: ExperimentConfig, geometry: bool) -> None:
    """Raises ConfigError for results that do not match the config.

    A run that had one config only is not checked: its results are that config's, and its models may be gone.
    """
    if run.changes or run.read()["history"]:
        planned = pipeline.plan(run, config, list(config.arms), "evals", geometry)
        if run.changes:
            _print_plan(run, config, planned)
        kinds = ["arms", "masks", "evals", "tokens"]
        pipeline.refuse_outdated(run, planned, [*kinds, "geometry"] if geometry else kinds)


def _print_verdict(run: RunFolder) -> None:
    from evals.report.verdict import verdict

    console.print()
    for sentence in verdict(read_json(run.compare)):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    page = escape(str(run.report / "report.html"))
    console.print(f"\n[bold]report[/]: {page}", soft_wrap=True)


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
    folder, config = pipeline.prepare(target, overrides or (), out)
    names = _select_arms(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, until)
    _begin(folder, config, planned)
    pipeline.run_all(folder, config, names, until, print_artifact, allow_other_base)
    if until == "report" and not arm and is_first_process():
        _print_verdict(folder)


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
                console.print(f"[red]not ready[/]: {escape(line)}", soft_wrap=True)
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
        console.print(f"[red]not ready[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    columns = ["student", *config.teachers]
    each = Table("", *columns, "ok", title=config.name)
    all_together = Table("", "", "ok")
    for row in rows:
        mark = {None: "", True: "yes", False: "[red]NO[/]"}[row.ok]
        table = each if len(row.values) == len(columns) else all_together
        table.add_row(row.what, *map(escape, row.values), mark)
    console.print(each)
    console.print(all_together)
    _print_notes(config.all_notes)
    failed = [row for row in rows if row.ok is False]
    for row in failed:
        console.print(f"[red]not ready[/]: {escape(f'{row.what}: {row.remedy}')}", soft_wrap=True)
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
    names = _select_arms(config, arm, [n for n in config.arms if config.is_derived(n)])
    planned = pipeline.plan(folder, config, names, "arms")
    _begin(folder, config, planned)
    pipeline.make_arms(folder, config, names, print_artifact, allow_other_base)


@app.command()
def geometry(
    base: Annotated[Path, typer.Argument(help="run folder, or the base checkpoint")],
    trained: Annotated[
        list[str] | None,
        typer.Argument(
            help="trained checkpoints or LoRA adapters (several: also their overlap); for a run, TOML overrides"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder, for checkpoints")] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="the trained checkpoints are steps of one run")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="`paper`: print a row of the paper's table")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="TOML override of the defaults, e.g. null_draws=5"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="threads; default one per core")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Measures the geometry of the updates of a run's arms, or of any checkpoints, against null models."""
    if not trained or _is_run(base):
        folder, config = pipeline.prepare(base, trained or ())
        names = list(config.geometry.arms)
        planned = pipeline.plan(folder, config, names, "geometry")
        _begin(folder, config, planned, reads=("arms", "masks"))
        pipeline.make_geometry(folder, config, names, print_artifact)
        return
    if out is None:
        raise ConfigError("geometry of checkpoints needs --out DIR")
    folders = [Path(each) for each in trained]
    checkpoints.compare_folders(
        base, folders, out, trajectory, preset, settings or [], workers, device
    )


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


@app.command("eval")
def evaluate(target: Target, overrides: Overrides = None, arm: Arms = None) -> None:
    """Evaluates arms with lm-eval."""
    folder, config = pipeline.prepare(target, overrides or ())
    names = _select_arms(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, "evals", geometry=False)
    _begin(folder, config, planned, reads=("arms", "masks"))
    pipeline.make_evals(folder, config, names, print_artifact)


@app.command()
def vision(
    run: Run,
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
    names = _select_arms(config, arm, list(config.arms))
    pipeline.make_vision(folder, config, names, scorer, pictures, print_artifact)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="a run folder and TOML overrides; or models (folders, hub ids, lm-eval output folders), "
            "each compared with the first"
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="for models: lm-eval task names, comma-separated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="for models: output folder")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="for models: TOML override of section eval, e.g. limit=200"),
    ] = None,
    compute: Annotated[str, typer.Option(help="for models: fp32 or bf16")] = "fp32",
) -> None:
    """Compares a run's arms (with recovery), or any models: paired differences with intervals."""
    first, *others = what
    if not others or _is_run(Path(first)):
        folder, config = pipeline.prepare(Path(first), others)
        _refuse_outdated_results(folder, config, geometry=False)
        folder.save_config(config)
        pipeline.make_comparison(folder, config, print_artifact)
    else:
        checkpoints.compare_models(what, tasks, out, settings or [], compute)


@app.command()
def report(target: Target, overrides: Overrides = None) -> None:
    """Writes the report (report.html, report.md, figures, tables), after the comparison if all arms are evaluated."""
    folder, config = pipeline.prepare(target, overrides or ())
    _refuse_outdated_results(folder, config, geometry=True)
    folder.save_config(config)
    if all((folder.eval(name) / "results.json").exists() for name in config.arms):
        pipeline.make_comparison(folder, config, print_artifact)
    pipeline.make_report(folder, config, print_artifact)
    _print_verdict(folder)


@app.command()
def show(run: Run) -> None:
    """Lists a run's arms, altered files, and its verdict if there is one. Read-only: works during training."""
    folder = RunFolder(run)
    config = config_of(folder.read(altered=True)["config"], run / "run.json")
    table = Table("arm", "type", "mask", "density", "steps", "evaluated", title=config.name)
    for name in config.arms:
        path = folder.arm_record(name)
        about = read_json(path) if path.exists() else {"type": "not made yet"}
        density = about.get("density")
        results = folder.eval(name) / "results.json"
        scored = "no"
        if results.exists():
            same = read_json(results)["checkpoint_digest"] == about.get("checkpoint_digest")
            scored = "yes" if same else "as it was before"
        table.add_row(
            name,
            about["type"],
            about.get("mask") or "",
            "" if density is None else f"{density:.2%}",
            str(about.get("steps", "")),
            scored,
        )
    console.print(table)
    for artifact in folder.checksums.artifacts():
        for problem in folder.checksums.problems(artifact, whole=False):
            console.print(f"[red]altered[/]: {escape(str(problem))}", soft_wrap=True)
    if folder.compare.exists():
        _print_verdict(folder)


@app.command()
def verify(run: Run) -> None:
    """Verifies a run: hashes every file, and the inputs it was made from."""
    from vlopd.run.verify import verify_run

    found = verify_run(RunFolder(run))
    for problem in found.problems:
        console.print(f"[red]altered[/]: {escape(str(problem))}", soft_wrap=True)
    for path in found.unknown:
        console.print(
            f"[yellow]not written by a finished stage[/]: {escape(str(path))}", soft_wrap=True
        )
    for line in found.inputs:
        console.print(f"[yellow]input changed[/]: {escape(line)}", soft_wrap=True)
    console.print(
        f"[bold]verified[/]: {found.files:,} files ({decimal(found.n_bytes)}) of {escape(str(run))}, "
        f"{len(found.problems)} altered",
        soft_wrap=True,
    )
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a UserError is one line on stderr and exit code 2; an interrupt exits with 130."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(standalone_mode=True)
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
