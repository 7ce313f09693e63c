"""The command line: one verb a stage, and `run` for all of them.

Heavy imports sit inside the verbs, so that `--help`, a wrong key and a finished run answer at once.
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
from vlopd.cli import checkpoints, masks
from vlopd.cli.common import AllowOtherBase, Arms, Out, Overrides, Target, console, say
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of, load_config
from vlopd.errors import ConfigError, UserError
from vlopd.files import is_first_process, read_json
from vlopd.run.folder import RunFolder

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(masks.app, name="mask")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",  # lm-eval would start a process pool for closed-form errors
    "LOGLEVEL": "WARNING",
}
"""Libraries speak up on warnings only; anything that is set already stays."""

INTERRUPTED = 130
"""What typer exits with after Ctrl-C."""

Run = Annotated[Path, typer.Argument(help="run folder")]
Stages = Literal["arms", "geometry", "evals", "report"]


def chosen(config: ExperimentConfig, arms: list[str] | None, names: list[str]) -> list[str]:
    """The arms asked for, or all of `names`. Raises ConfigError for an arm that there is not."""
    for arm in arms or ():
        if arm not in config.arms:
            raise ConfigError(f"no arm {arm!r} in the config; there are {', '.join(config.arms)}")
    return [name for name in names if not arms or name in arms]


def say_plan(run: RunFolder, planned: pipeline.Plan) -> None:
    """Says how the config changed, what is kept and what will be made; nothing of a run that is new."""
    if not is_first_process() or not (run.root / "run.json").exists():
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
        derived = ", unless it comes out as it was" if why.startswith("from ") else ""
        line = f"{', '.join(artifacts)} ({why}{derived})"
        console.print(f"[bold]to be made[/]: {escape(line)}", soft_wrap=True)


def check_results(run: RunFolder, config: ExperimentConfig, geometry: bool) -> None:
    """Refuses to compare or report results that the config no longer describes.

    A run that had one config only is not asked: nothing of it is of another, and its models may be gone by now.
    """
    if run.changes or run.read()["history"]:
        planned = pipeline.plan(run, config, list(config.arms), "evals", geometry)
        if run.changes:
            say_plan(run, planned)
        kinds = ["arms", "masks", "evals", "tokens"]
        pipeline.refuse_outdated(run, planned, [*kinds, "geometry"] if geometry else kinds)


def say_verdict(run: RunFolder) -> None:
    from evals.report.verdict import verdict

    console.print()
    for sentence in verdict(read_json(run.compare)):
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(f"\n[bold]report[/]: {run.report / 'report.html'}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------- verbs


@app.command()
def run(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    arm: Arms = None,
    until: Annotated[Stages, typer.Option(help="the last stage that is made")] = "report",
    allow_other_base: AllowOtherBase = False,
) -> None:
    """The whole experiment, stage by stage; with --arm, that arm alone.

    What is up to date is kept, also from a run of the same folder with another config: what the config adds or
    invalidates is named, and then made.
    """
    folder, config = pipeline.prepare(target, overrides or (), out)
    names = chosen(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, until)
    say_plan(folder, planned)
    pipeline.refuse_unready(config, planned)
    folder.adopt(config)
    pipeline.run_all(folder, config, names, until, say, allow_other_base)
    if until == "report" and not arm and is_first_process():
        say_verdict(folder)


@app.command()
def check(
    target: Annotated[Path, typer.Argument(help="experiment file (TOML)")],
    overrides: Overrides = None,
    meta: Annotated[
        bool, typer.Option("--meta", help="no weights: from the models' config.json alone")
    ] = False,
) -> None:
    """The pre-flight: is everything there that a run needs, do the models share a vocabulary, does the teacher see, do
    they agree, does it fit?"""
    from vlopd.distributed import accelerator
    from vlopd.preflight.pair import first_examples, preflight, preflight_meta
    from vlopd.train.pair import load_pair

    config = load_config(target, overrides or ())
    device = accelerator().device
    try:
        if meta:
            rows = preflight_meta(config, device, target.parent / "architectures")
        else:
            # a config that names no tasks may be meant for `run --until arms` alone; `run` asks the default one
            lines = pipeline.unready(
                config, list(config.arms), "tasks" in config.eval.model_fields_set
            )
            for line in lines:
                console.print(f"[red]not ready[/]: {escape(line)}", soft_wrap=True)
            if lines:
                raise typer.Exit(1)
            examples = first_examples(config.data, config.teachers)
            pair = load_pair(
                config.student,
                config.teacher,
                compute=config.precision.compute,
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
    """Makes the arms that are made from others: retrained under a mask, projected, transplanted, extrapolated."""
    folder, config = pipeline.prepare(target, overrides or (), out)
    names = chosen(config, arm, [n for n in config.arms if config.is_derived(n)])
    planned = pipeline.plan(folder, config, names, "arms")
    say_plan(folder, planned)
    pipeline.refuse_unready(config, planned)
    folder.adopt(config)
    pipeline.make_arms(folder, config, names, say, allow_other_base)


@app.command()
def geometry(
    base: Annotated[Path, typer.Argument(help="run folder, or the base checkpoint")],
    trained: Annotated[
        list[str] | None,
        typer.Argument(
            help="trained checkpoints or LoRA adapters (of several, their overlap too); for a run, TOML lines"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where the tables go, for checkpoints")] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="the trained checkpoints are steps of one run")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="`paper` prints the paper's table row")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="a TOML line over the defaults, e.g. null_draws=5"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="threads; default one a core")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """The geometry of a run's arms, or of any checkpoint folders, each number beside its nulls."""
    if not trained or is_run(base):
        folder, config = pipeline.prepare(base, trained or ())
        names = list(config.geometry.arms)
        planned = pipeline.plan(folder, config, names, "geometry")
        say_plan(folder, planned)
        pipeline.refuse_outdated(folder, planned, ["arms", "masks"])
        pipeline.refuse_unready(config, planned)
        folder.adopt(config)
        pipeline.make_geometry(folder, config, names, say)
        return
    if out is None:
        raise ConfigError("checkpoints need --out DIR for the tables")
    folders = [Path(each) for each in trained]
    checkpoints.compare_folders(
        base, folders, out, trajectory, preset, settings or [], workers, device
    )


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


@app.command("eval")
def evaluate(target: Target, overrides: Overrides = None, arm: Arms = None) -> None:
    """Scores arms through lm-eval."""
    folder, config = pipeline.prepare(target, overrides or ())
    names = chosen(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, "evals", geometry=False)
    say_plan(folder, planned)
    pipeline.refuse_outdated(folder, planned, ["arms", "masks"])
    pipeline.refuse_unready(config, planned)
    folder.adopt(config)
    pipeline.make_evals(folder, config, names, say)


@app.command()
def vision(
    run: Run,
    scorer: Annotated[
        str | None,
        typer.Option(help="open_clip's, local-dir:FOLDER, to score what arms say of pictures"),
    ] = None,
    arm: Arms = None,
    pictures: Annotated[int, typer.Option(help="of the visual world's test split")] = 500,
) -> None:
    """What training did to the vision tower: linear probes, drift, alignment of descriptions."""
    if pictures < 1:
        raise ConfigError(f"--pictures {pictures}: at least 1")
    if scorer and scorer.startswith("local-dir:") and not Path(scorer[10:]).is_dir():
        raise ConfigError(f"--scorer {scorer}: no such folder")
    folder, config = RunFolder.open(run)
    names = chosen(config, arm, list(config.arms))
    pipeline.make_vision(folder, config, names, scorer, pictures, say)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="a run folder and TOML lines over its config; or models (folders, hub ids, lm-eval's output folders), "
            "the first being what the others are compared with"
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="of models: lm-eval task names, with commas between")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="of models: where the results go")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="of models: a TOML line over [eval], e.g. limit=200"),
    ] = None,
    compute: Annotated[str, typer.Option(help="of models: fp32 or bf16")] = "fp32",
) -> None:
    """Paired differences and their intervals: of a run's arms (with recovery), or of any models."""
    first, *others = what
    if not others or is_run(Path(first)):
        folder, config = pipeline.prepare(Path(first), others)
        check_results(folder, config, geometry=False)
        folder.adopt(config)
        pipeline.make_comparison(folder, config, say)
    else:
        checkpoints.compare_models(what, tasks, out, settings or [], compute)


@app.command()
def report(target: Target, overrides: Overrides = None) -> None:
    """The report: report.html, report.md, figures and tables; and first the comparison, where all is evaluated."""
    folder, config = pipeline.prepare(target, overrides or ())
    check_results(folder, config, geometry=True)
    folder.adopt(config)
    if all((folder.eval(name) / "results.json").exists() for name in config.arms):
        pipeline.make_comparison(folder, config, say)
    pipeline.make_report(folder, config, say)
    say_verdict(folder)


@app.command()
def show(run: Run) -> None:
    """What a run holds, and its verdict if there is one. Reads only: works while the run is in use."""
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
        say_verdict(folder)


@app.command()
def verify(run: Run) -> None:
    """Hashes every file of a run, and what it was made from: is everything as it was written?"""
    from vlopd.run.verify import verify_run

    found = verify_run(RunFolder(run))
    for problem in found.problems:
        console.print(f"[red]altered[/]: {escape(str(problem))}", soft_wrap=True)
    for path in found.unknown:
        console.print(f"[yellow]not written by a finished stage[/]: {path}", soft_wrap=True)
    for line in found.inputs:
        console.print(
            f"[yellow]made from what is no longer there[/]: {escape(line)}", soft_wrap=True
        )
    console.print(
        f"[bold]verified[/]: {found.files:,} files ({decimal(found.n_bytes)}) of {run}, "
        f"{len(found.problems)} altered",
        soft_wrap=True,
    )
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a mistake of the user's is one line on stderr and exit code 2; an interrupt is 130."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"vlopd: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        # a full disk, say; safetensors has a class of its own for it
        what = " ".join(str(error).split())
        print(f"vlopd: {what}; what was written before is intact", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("vlopd: interrupted; rerun the same command to resume", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
