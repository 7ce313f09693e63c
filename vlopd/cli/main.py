"""The command line: one command per stage, and `run` for all of them.

Heavy imports are inside the commands, so that `--help`, an invalid config and a finished run return at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from vlopd import interrupts, pipeline
from vlopd.cli import compare, geometry, init, masks, paper, push, serve, tasks
from vlopd.cli.common import (
    AllowOtherBase,
    Arms,
    Out,
    Overrides,
    Target,
    Trust,
    choice_in_words,
    console,
    print_artifact,
    print_notes,
    print_plan,
    print_plugins,
    print_versions,
    refuse,
    say,
)
from vlopd.config.input import load_config
from vlopd.errors import (
    ConfigError,
    Interrupted,
    UserError,
    one_line,
    one_line_out_of_memory,
    remedy_of,
    system_code,
)
from vlopd.files import is_first_process
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(masks.app, name="mask")
app.command()(init.init)
app.command()(tasks.tasks)
app.command()(push.push)
app.command()(serve.serve)
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LOGLEVEL": "WARNING",
}
"""Environment defaults that limit libraries to warnings; variables already set are kept."""

DEEPEST_PATH = 500
THREADS = {"OMP_WAIT_POLICY": "passive"}
"""OpenMP, read when torch loads: idle threads sleep instead of spinning, which on shared cores takes the time of those
that work."""

INTERRUPTED = 130
"""Typer's exit code after Ctrl-C."""

Folder = Annotated[Path, typer.Argument(help="run folder")]
Stages = Literal["arms", "geometry", "evals", "report"]


def _print_verdict(run: RunFolder) -> None:
    from evals.report.verdict import verdict

    console.print()
    for sentence in verdict(read_record(run.compare)):
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
    trust: Trust = False,
) -> None:
    """Runs the whole experiment, stage by stage; with --arm, only that arm and its dependencies.

    Artifacts that are up to date are kept. With a changed config in the same folder, the artifacts that it adds or
    invalidates are listed, then made.
    """
    from vlopd.api.run import Run

    made = Run(target, *(overrides or ()), out=out, trust=trust).run(
        until=until,
        arms=arm,
        allow_other_base=allow_other_base,
        on_plan=print_plan,
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
    card: Annotated[
        str | None,
        typer.Option(
            "--device-like",
            help="with --meta: predict for a card that is not here (a100, h100, h200)",
        ),
    ] = None,
) -> None:
    """Checks a config before a run: inputs, shared vocabulary, image use, agreement of the models, memory and time."""
    from vlopd.distributed import accelerator, resolve_compute
    from vlopd.preflight.pair import first_examples, preflight, preflight_meta
    from vlopd.train.pair import load_pair

    if card is not None and not meta:
        raise ConfigError(f"--device-like {card}: only with --meta, which loads no model")
    config = load_config(target, overrides or ())
    device = accelerator().device
    print_plugins(config, list(config.arms))
    compute = resolve_compute(config.precision.compute, device)
    try:
        if meta:
            rows = preflight_meta(config, device, target.parent / "architectures", card)
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
    print_notes(config.all_notes)
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
    trust: Trust = False,
) -> None:
    """Makes the arms derived from others: retrained under a mask, projected, transplanted, extrapolated."""
    folder, config = pipeline.prepare(target, overrides or (), out, trust)
    derived = [n for n in config.arms if config.is_derived(n)]
    if not derived:
        raise ConfigError(f"{target}: no arm is derived from others; use `vlopd run {target}`")
    names = pipeline.select_arms(config, arm, derived)
    planned = pipeline.plan(folder, config, names, "arms")
    pipeline.begin(folder, config, planned, on_plan=print_plan)
    pipeline.make_arms(folder, config, names, print_artifact, allow_other_base)


app.command()(geometry.geometry)


@app.command("eval")
def evaluate(
    target: Target, overrides: Overrides = None, arm: Arms = None, trust: Trust = False
) -> None:
    """Evaluates arms with lm-eval."""
    folder, config = pipeline.prepare(target, overrides or (), trust=trust)
    names = pipeline.select_arms(config, arm, list(config.arms))
    planned = pipeline.plan(folder, config, names, "evals", geometry=False)
    pipeline.begin(folder, config, planned, ("arms", "masks"), print_plan)
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
    trust: Trust = False,
) -> None:
    """Measures training's effect on the vision tower: linear probes, drift, CLIPScore of captions."""
    if pictures < 1:
        raise ConfigError(f"--pictures {pictures}: must be at least 1")
    if scorer and scorer.startswith("local-dir:") and not Path(scorer[10:]).is_dir():
        raise ConfigError(f"--scorer {scorer}: no such folder")
    folder, config = RunFolder.open(run, trust=trust)
    names = pipeline.select_arms(config, arm, list(config.arms))
    pipeline.make_vision(folder, config, names, scorer, pictures, print_artifact)


app.command()(compare.compare)


app.command()(paper.paper)


@app.command()
def report(
    target: Target,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="another folder, for a run that is only to be read")
    ] = None,
    trust: Trust = False,
) -> None:
    """Writes the report (report.html, report.md, figures, tables), after the comparison if all arms are evaluated."""
    if out is not None:
        refuse({"--out": overrides}, "reports a run as it is; leave the overrides out")
        if out.exists() and not (out / "report.html").exists():
            raise ConfigError(f"--out {out}: is there and no report; name a new folder")
        folder, config = RunFolder.open(target, locked=False, trust=trust)
        pipeline.make_report(folder, config, print_artifact, out)
        return
    folder, config = pipeline.prepare(target, overrides or (), trust=trust)
    pipeline.begin_results(folder, config, True, print_plan)
    if all((folder.eval(name) / "results.json").exists() for name in config.arms):
        pipeline.make_comparison(folder, config, print_artifact)
    pipeline.make_report(folder, config, print_artifact)
    _print_verdict(folder)


@app.command()
def show(run: Folder, trust: Trust = False) -> None:
    """Lists a run's arms, altered files, and its verdict if there is one. Read-only: works during training."""
    from vlopd.api.run import Run

    its = Run(run, altered=True, trust=trust)
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
    for name in its.config.arms:
        tried = [its.folder.arm_record(each) for each in its.config.candidates(name)]
        if tried and (record := its.folder.arm_record(name)).exists():
            say(f"{name}, tuned", choice_in_words(read_record(record)["sweep"]))
        elif tried:
            made = sum(path.exists() for path in tried)
            say(f"{name}, to be tuned", f"{made} of {len(tried)} settings trained")
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
    """Entry point: a UserError is one line on stderr and exit code 2; SIGTERM exits with 75, SIGINT with 130."""
    for name, value in {**QUIET, **THREADS}.items():
        os.environ.setdefault(name, value)
    try:
        _refuse_words(sys.argv[1:])
        # what training, loading and evaluation did not catch, under the command's name
        guarded = one_line_out_of_memory(" ".join(["vlopd", *sys.argv[1:2]]))(app)
        with interrupts.heeded():
            code = guarded(prog_name="vlopd", standalone_mode=False) or 0
    except UserError as error:
        print(f"vlopd: {one_line(error)}", file=sys.stderr)
        code = interrupts.exit_code() if isinstance(error, Interrupted) else 2
        raise SystemExit(code) from None
    except typer.TyperException as error:
        if not error.format_message():  # the help was printed, of a command without arguments
            raise SystemExit(2) from None
        print(f"vlopd: {one_line(_usage(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        # e.g. a full disk, for which safetensors has a separate class
        print(f"vlopd: {one_line(error)}; {remedy_of(system_code(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before or after the signal was listened to
        print("vlopd: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(interrupts.exit_code(signal.SIGINT)) from None
    except SystemExit as stop:
        if (where := _foreign_exit(stop)) is not None:
            print(f"vlopd: {where} ended the command (sys.exit); remove that", file=sys.stderr)
            raise SystemExit(1) from None
        raise
    if code == INTERRUPTED:
        print("vlopd: interrupted; run the same command again to go on", file=sys.stderr)
        code = interrupts.exit_code(signal.SIGINT)
    raise SystemExit(code)


def _refuse_words(words: Sequence[str]) -> None:
    """Raises ConfigError for an empty argument, which as a path would be the current folder, and for a path of more
    folders than Python can join."""
    for before, word in zip(["vlopd", *words], words, strict=False):
        if word.count("/") > DEEPEST_PATH and "=" not in word:
            raise ConfigError(
                f"the argument after {before} names more than {DEEPEST_PATH} folders in each other; name fewer"
            )
        if not word or (word.startswith("--") and word.endswith("=")):
            raise ConfigError(
                f"the argument after {before} is empty; give a value, or leave it out"
            )


def _usage(error: typer.TyperException) -> str:
    """Typer's usage error in a line, with the command whose help says more."""
    context = vars(error).get("ctx")  # of a usage error, a class without a public name
    command = "vlopd" if context is None else context.command_path
    reason = error.format_message().replace("Value error, ", "").strip().removesuffix(".")
    return f"{reason}; `{command} --help` lists what it takes"


def _foreign_exit(stop: SystemExit) -> str | None:
    """`FILE, line N` of the code that raised SystemExit; None where it is the command line's own."""
    *_, (frame, line) = traceback.walk_tb(stop.__traceback__)
    if str(frame.f_globals.get("__name__")).split(".")[0] in ("typer", "click", "vlopd"):
        return None
    return f"{frame.f_code.co_filename}, line {line},"


if __name__ == "__main__":
    main()
