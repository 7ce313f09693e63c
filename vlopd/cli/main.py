"""The command line: one verb a stage, and `run` for all of them. The only module that imports `evals`.

Heavy imports sit inside the verbs, so that `--help`, a wrong key and a finished run answer at once.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from vlopd.cli import masks
from vlopd.cli.masks import AllowOtherBase, say
from vlopd.config.arms import CheckpointArm, ImportedArm, checkpoints_of, mask_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of, load_config
from vlopd.errors import ConfigError, UserError
from vlopd.files import read_json, shortest_distinct_names
from vlopd.run.folder import RunFolder

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(masks.app, name="mask")
console = Console()

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

ConfigFile = Annotated[Path, typer.Argument(help="experiment file (TOML)")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="TOML lines over the file, e.g. optim.learning_rate=2e-4")
]
Out = Annotated[Path | None, typer.Option(help="run folder; runs/<name> unless told")]
RunPath = Annotated[Path, typer.Argument(help="run folder")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="only this arm; may be given again")]


def open_new(config_file: Path, overrides: list[str] | None, out: Path | None):
    config = load_config(config_file, overrides or ())
    return RunFolder.create(out or Path("runs") / config.name, config), config


def chosen(config: ExperimentConfig, arms: list[str] | None, names: list[str]) -> list[str]:
    """The arms asked for, or all of `names`. Raises ConfigError for an arm that there is not."""
    for arm in arms or ():
        if arm not in config.arms:
            raise ConfigError(f"no arm {arm!r} in the config; there are {', '.join(config.arms)}")
    return [name for name in names if not arms or name in arms]


def is_made_from_others(config: ExperimentConfig, name: str) -> bool:
    """Whether an arm is made from others: from a mask, a transplant, an early checkpoint."""
    arm = config.arms[name]
    return mask_of(arm) is not None or bool(checkpoints_of(arm))


def is_main_process() -> bool:
    from vlopd.distributed import accelerator

    return accelerator().is_main_process


# --------------------------------------------------------------------------------------------- stages


def make_arms(
    run: RunFolder,
    config: ExperimentConfig,
    names: list[str],
    allow_other_base: bool = False,
    evaluated: bool = False,
) -> None:
    """Makes arms; what is known to fail, then or when they are `evaluated`, is refused before anything is made."""
    from vlopd.run.arms import Making
    from vlopd.run.make import make_arm

    @cache
    def refuse_unready() -> None:
        if lines := unready(config, names, evaluated):
            raise ConfigError("; ".join(lines))

    if not all(run.arm_record(name).exists() for name in names):
        refuse_unready()
    how = Making(allow_other_base, held_out(config), refuse_unready)
    # arms that are only noted first: what is wrong with their models is said before anything is trained
    for name in sorted(names, key=lambda n: not isinstance(config.arms.get(n), CheckpointArm)):
        made = make_arm(run, config, name, how)
        say(f"arm {name}", run.arm_record(name), made)


def unready(config: ExperimentConfig, names: list[str], evaluated: bool) -> list[str]:
    """What would stop these arms, a line each; with `evaluated`, also what would stop their evaluation."""
    from vlopd.preflight import inputs

    lines = inputs.findings(config, names)
    if evaluated:
        lines += unready_tasks(config, names)
    elif (during := config.eval.during) is not None:
        only = {"tasks": during.tasks, "limit": during.limit, "during": None}
        asked = config.eval.model_copy(update=only)
        lines += unready_tasks(config.model_copy(update={"eval": asked}), names[:1])
    return list(dict.fromkeys(lines))


def unready_tasks(config: ExperimentConfig, names: list[str]) -> list[str]:
    """What would stop these arms' evaluation, a line each."""
    from evals import preflight as tasks
    from evals.compare import lost_contrasts
    from vlopd.preflight import inputs

    try:
        lines = lost_contrasts(config)
        lines += tasks.find_problems(config.eval, inputs.evaluated(config, names))
    except UserError as error:
        return [str(error)]
    for name in names:
        if isinstance(arm := config.arms[name], ImportedArm):
            its = tasks.find_import_problems(config.eval.tasks, Path(arm.results))
            lines += [f"arms.{name}: {line}" for line in its]
    return lines


def held_out(config: ExperimentConfig):
    """What scores a student while it trains, if eval.during asks for it."""
    if config.eval.during is None:
        return None
    from evals.harness import held_out_scores

    return held_out_scores(config)


def make_geometry(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    from vlopd.run import geometry as stage

    for name in names:
        with run.making(run.geometry(name)):
            made = stage.make_geometry(run, config, name)
        say(f"geometry of {name}", run.geometry(name) / "geometry.csv", made)
        say_left_out(run.geometry(name))
    if len(names) > 1:
        made = stage.make_overlap(run, config, names)
        say("overlap of the arms' updates", run.root / "geometry" / "overlap.csv", made)


def say_left_out(folder: Path) -> None:
    """What the two checkpoints of a geometry have that is not compared."""
    left_out = read_json(folder / "summary.json")["left_out"]
    if left_out["summary"]:
        console.print(f"[yellow]left out[/]: {escape(left_out['summary'])}", soft_wrap=True)


def make_evals(run: RunFolder, config: ExperimentConfig, names: list[str]) -> None:
    from evals.harness import evaluate_arm
    from evals.token_kl import write_token_kl

    for name in names:
        with run.making(run.eval(name)):
            made = evaluate_arm(run, config, name)
            made |= write_token_kl(run, config, name)
        say(f"evaluation of {name}", run.eval(name) / "results.json", made)


def make_comparison(run: RunFolder, config: ExperimentConfig) -> None:
    from evals.compare import compare

    with run.making(run.compare):
        say("comparison", compare(run, config), True)


def make_report(run: RunFolder, config: ExperimentConfig) -> None:
    from evals.report.build import build_report

    with run.making(run.report):
        say("report", build_report(run, config), True)


def say_verdict(run: RunFolder) -> None:
    console.print()
    for sentence in read_json(run.compare)["verdict"]:
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(f"\n[bold]report[/]: {run.report / 'report.html'}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------- verbs


@app.command()
def run(
    config_file: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    arm: Arms = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """The whole experiment, stage by stage, skipping what is done; with --arm, that arm alone."""
    folder, config = open_new(config_file, overrides, out)
    names = chosen(config, arm, list(config.arms))
    make_arms(folder, config, names, allow_other_base, evaluated=True)
    if not is_main_process():
        return  # only training is spread over processes
    make_geometry(folder, config, [name for name in config.geometry.arms if name in names])
    make_evals(folder, config, names)
    if not arm:
        make_comparison(folder, config)
        make_report(folder, config)
        say_verdict(folder)


@app.command()
def check(
    config_file: ConfigFile,
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

    config = load_config(config_file, overrides or ())
    device = accelerator().device
    try:
        if meta:
            rows = preflight_meta(config, device, config_file.parent / "architectures")
        else:
            # a config that names no tasks may be meant for `distill` alone; `run` asks the default one
            lines = unready(config, list(config.arms), "tasks" in config.eval.model_fields_set)
            for line in lines:
                console.print(f"[red]not ready[/]: {escape(line)}", soft_wrap=True)
            if lines:
                raise typer.Exit(1)
            examples = first_examples(config)
            rows = preflight(load_pair(config, device), config, examples)
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
def distill(
    config_file: ConfigFile, overrides: Overrides = None, out: Out = None, arm: Arms = None
) -> None:
    """Trains the arms that need no mask (and writes the base they start from)."""
    folder, config = open_new(config_file, overrides, out)
    make_arms(
        folder,
        config,
        chosen(config, arm, [n for n in config.arms if not is_made_from_others(config, n)]),
    )


@app.command()
def retrain(run: RunPath, arm: Arms = None, allow_other_base: AllowOtherBase = False) -> None:
    """Makes the arms that are made from others: retrained under a mask, projected, transplanted, extrapolated."""
    folder, config = RunFolder.open(run)
    names = [name for name in config.arms if is_made_from_others(config, name)]
    make_arms(folder, config, chosen(config, arm, names), allow_other_base)


@app.command()
def geometry(
    base: Annotated[Path, typer.Argument(help="run folder, or the base checkpoint")],
    trained: Annotated[
        list[Path] | None,
        typer.Argument(help="trained checkpoint or LoRA adapter; of several, their overlap too"),
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
    workers: Annotated[int | None, typer.Option(help="threads; one a core unless told")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """The geometry of a run's arms, or of any checkpoint folders, each number beside its nulls."""
    if not trained:
        folder, config = RunFolder.open(base)
        make_geometry(folder, config, list(config.geometry.arms))
        return
    if out is None:
        raise ConfigError("checkpoints need --out DIR for the tables")
    compare_folders(base, trained, out, trajectory, preset, settings or [], workers, device)


def compare_folders(
    base: Path,
    trained: list[Path],
    out: Path,
    as_trajectory: bool,
    preset: str | None,
    settings: list[str],
    workers: int | None,
    device: str,
) -> None:
    from evals.report.geometry import write_figures
    from vlopd.config.analysis import GeometryConfig
    from vlopd.config.input import section_of
    from vlopd.digests import digest_checkpoint, digest_json, file_digest
    from vlopd.geometry import paper
    from vlopd.geometry.checkpoint import measure_checkpoint, read_rows
    from vlopd.geometry.overlap import write_overlap
    from vlopd.geometry.trajectory import step_of
    from vlopd.geometry.trajectory import write_trajectory as over_steps
    from vlopd.weights.checks import refuse_unlike_config

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: cpu or cuda")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    if preset not in (None, "paper"):
        raise ConfigError(f"no preset {preset!r}; there is paper")
    tree = paper.preset().model_dump() if preset else {"arms": ()}
    config = section_of(GeometryConfig, tree, settings)
    labels = shortest_distinct_names([path.resolve().parts for path in trained])
    folders = {label: out if len(trained) == 1 else out / label for label in labels}
    steps = [step_of(path, i) for i, path in enumerate(trained)]
    if as_trajectory and len(set(steps)) < len(steps):
        raise ConfigError(f"the checkpoints' names end in the steps {steps}; they must differ")
    for path in (base, *trained):
        refuse_unlike_config(path)
    every = {path: digest_checkpoint(path, whole=True) for path in (base, *trained)}
    for path, (label, folder) in zip(trained, folders.items(), strict=True):
        layouts = [its / "config.json" for its in (base, path) if (its / "config.json").is_file()]
        digests = {"base": every[base], "trained": every[path]}
        digests["configs"] = digest_json([file_digest(each) for each in layouts])
        inputs = {**digests, "settings": config.model_dump(mode="json")}
        measure_checkpoint(base, path, folder, config, inputs, workers=workers, device=device)
        say(f"geometry of {label}", folder / "geometry.csv", True)
        about = read_json(folder / "summary.json")
        if narrowed := about["tensors_narrowed"]:
            console.print(
                f"{narrowed} of {about['tensors']} tensors are stored in less precision in {path} than in {base}: "
                "their delta is that rounding too, and most of it where the update is small; round the base alike"
            )
        say_left_out(folder)
        if preset:
            show_paper(
                label, paper.paper_table(read_rows(folder)), [c.title for c in paper.COLUMNS]
            )
    if as_trajectory:
        tables = dict(zip(steps, folders.values(), strict=True))
        by_step = dict(zip(steps, trained, strict=True))
        say("trajectory", over_steps(base, by_step, out, config, tables=tables), True)
    elif len(trained) > 1:
        say(
            "overlap",
            write_overlap(base, dict(zip(labels, trained, strict=True)), out, config),
            True,
        )
    say("figures", write_figures(out, list(folders.values())), True)


def show_paper(label: str, lines: list, titles: list[str]) -> None:
    table = Table(label, *titles)
    for name, cells in lines:
        table.add_row(name, *cells)
    console.print(table)


@app.command("eval")
def evaluate(run: RunPath, arm: Arms = None) -> None:
    """Scores arms through lm-eval."""
    folder, config = RunFolder.open(run)
    names = chosen(config, arm, list(config.arms))
    scored = all((folder.eval(name) / "results.json").exists() for name in names)
    if not scored and (lines := unready_tasks(config, names)):
        raise ConfigError("; ".join(lines))
    make_evals(folder, config, names)


@app.command()
def vision(
    run: RunPath,
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
    from evals.vision.stage import vision_report

    folder, config = RunFolder.open(run)
    names = chosen(config, arm, list(config.arms))
    with folder.making(folder.root / "evals" / "vision.json"):
        say("vision", vision_report(folder, config, names, scorer, pictures), True)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            help="a run folder; or models (folders, hub ids, lm-eval's output folders), the first "
            "being what the others are compared with"
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
    if len(what) == 1:
        make_comparison(*RunFolder.open(what[0]))
        return
    if tasks is None or out is None:
        raise ConfigError("models are compared on --tasks a,b and need --out DIR for the results")
    from evals.compare_models import compare_models
    from vlopd.config.analysis import EvalConfig
    from vlopd.config.input import section_of
    from vlopd.distributed import accelerator

    config = section_of(EvalConfig, {"tasks": tasks.split(",")}, settings or [])
    if compute not in ("fp32", "bf16"):
        raise ConfigError(f"--compute {compute}: fp32 or bf16")
    path = compare_models(what, config, out, compute, accelerator().device)
    show_comparison(read_json(path))
    say("comparison", path, True)


def show_comparison(compared: dict) -> None:
    from evals.report.verdict import p_value, percent, points

    for task, entry in compared["tasks"].items():
        table = Table(
            task, entry["metric"], "standard error", "difference to the first", "p (Holm)"
        )
        differences = {contrast["a"]: contrast for contrast in entry["contrasts"]}
        for name, its in entry["arms"].items():
            versus = differences.get(name)
            error = its["standard_error"]
            cells = ("", "") if versus is None else (points(versus), p_value(versus["p_holm"]))
            table.add_row(
                name, percent(its["mean"]), "-" if error is None else percent(error), *cells
            )
        console.print(table)
    for sentence in compared["verdict"]:
        console.print(sentence, soft_wrap=True, highlight=False)


@app.command()
def report(run: RunPath) -> None:
    """The report: report.html, report.md, figures and tables."""
    folder, config = RunFolder.open(run)
    make_report(folder, config)
    say_verdict(folder)


@app.command()
def show(run: RunPath) -> None:
    """What a run holds, and its verdict if there is one. Reads only: works while the run is in use."""
    folder = RunFolder(run)
    config = config_of(read_json(run / "run.json").get("config"), run / "run.json")
    table = Table("arm", "type", "mask", "density", "steps", "evaluated", title=config.name)
    for name in config.arms:
        path = folder.arm_record(name)
        about = read_json(path) if path.exists() else {"type": "not made yet"}
        density = about.get("density")
        scored = (folder.eval(name) / "results.json").exists()
        table.add_row(
            name,
            about["type"],
            about.get("mask") or "",
            "" if density is None else f"{density:.2%}",
            str(about.get("steps", "")),
            "yes" if scored else "no",
        )
    console.print(table)
    for artifact in folder.checksums.artifacts():
        for problem in folder.checksums.problems(artifact, whole=False):
            console.print(f"[red]altered[/]: {escape(str(problem))}", soft_wrap=True)
    if folder.compare.exists():
        say_verdict(folder)


@app.command()
def verify(run: RunPath) -> None:
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
            print("vlopd: interrupted; the same command goes on from there", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
