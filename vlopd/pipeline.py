"""The stages of an experiment and their order. The only module that knows all of them, training and evaluation.

    base -> trained arms -> masks -> retrained, transplanted arms -> geometry, evaluation -> comparison -> report

Stages read files of the run folder, write one artifact each, and are skipped where it is up to date. A run can grow:
with another config in the same folder, artifacts that both configs share are kept. Heavy imports are inside the
functions, so that an invalid config and a finished run return at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlopd.config.arms import (
    CheckpointArm,
    DistillArm,
    ImportedArm,
    checkpoints_of,
    masks_read,
    replay_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of, load_config, merged
from vlopd.config.masks import Reference
from vlopd.config.recipe import EXECUTION
from vlopd.errors import ConfigError, OutOfMemory, UserError
from vlopd.files import is_first_process
from vlopd.plugins import Use
from vlopd.run.folder import RunFolder, with_precision_of_run
from vlopd.run.schemas.read import read_record
from vlopd.trust import grant

OnArtifact = Callable[[str, Path, bool], None]
"""Callback for each artifact: its description, its path, and whether it was made (False: already up to date)."""
Target = Path | str | Mapping[str, Any] | ExperimentConfig
"""A run folder, a config file, or a config."""


def prepare(
    target: Target,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    trust: bool = False,
) -> tuple[RunFolder, ExperimentConfig]:
    """Opens the run of `find_run` to work in it: locks its folder, but writes no part of the run.

    Returns the run and its config, with `precision.compute` resolved. Raises ConfigError for an invalid config or
    one of another run.
    """
    root, config = find_run(target, overrides, out, trust=trust)
    config = with_precision_of_run(root, config)
    return RunFolder.prepare(root, config, trust), config


def find_run(
    target: Target,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    altered: bool = False,
    trust: bool = False,
) -> tuple[Path, ExperimentConfig]:
    """The folder and config of a run folder, or of a config (file, table or object), with TOML overrides.

    Neither locks nor writes anything. Code that a run folder's config names, and the overrides do not, runs only with
    `trust` (trust.py). Raises ConfigError for an invalid config, and RunError for a run.json that was changed, unless
    `altered`.
    """
    if isinstance(target, str | Path) and Path(target).is_dir():
        root = Path(target)
        if out is not None and Path(out) != root:
            raise ConfigError(f"--out {out}: {target} is a run folder already")
        _, config = RunFolder.open(root, locked=False, altered=altered, trust=trust)
        return root, _changed(config, overrides, root / "run.json")
    if isinstance(target, ExperimentConfig):
        where, config = "config", _changed(target, overrides, "config")
    elif not isinstance(target, str | Path | Mapping):
        raise ConfigError(
            f"a run is a run folder, a config file, a dict or an ExperimentConfig, not a {type(target).__name__}"
        )
    else:
        where = str(target) if isinstance(target, str | Path) else "config"
        if isinstance(target, str | Path) and not Path(target).exists():
            raise ConfigError(f"no config file or run folder {target}")
        config = load_config(target, overrides)
    if not config.arms:
        raise ConfigError(f'{where}: arms is empty; add one, as in base = {{type = "base"}}')
    return Path(out or Path("runs") / config.name), config


def _changed(
    config: ExperimentConfig, overrides: Sequence[str], where: Path | str
) -> ExperimentConfig:
    """A config with TOML overrides. Raises ConfigError that begins with `where`."""
    if not overrides:
        return config
    grant(merged({}, overrides))
    return config_of(merged(config.model_dump(mode="json"), overrides), where)


def select_arms(
    config: ExperimentConfig, arms: Sequence[str] | None, names: Sequence[str]
) -> list[str]:
    """The arms of `names` that are among `arms`; all without `arms`.

    Raises ConfigError for an unknown arm, and where none of `arms` is among `names`.
    """
    arms = [arms] if isinstance(arms, str) else arms
    for arm in arms or ():
        if arm not in config.arms:
            raise ConfigError(f"arm {arm}: not in the config, which has {', '.join(config.arms)}")
    chosen = [name for name in names if not arms or name in arms]
    if arms and names and not chosen:
        raise ConfigError(f"arm {', '.join(arms)}: not among {', '.join(names)}")
    return chosen


# ---------------------------------------------------------------------------------------------- plan


Plan = dict[str, str | None]
"""{artifact: reason to make it, None where it is up to date}, in the order of making."""

OnPlan = Callable[[RunFolder, ExperimentConfig, Plan], None]
"""Callback before anything is made."""


class Planner:
    """Builds the plan of a run without making any artifact."""

    def __init__(self, run: RunFolder, config: ExperimentConfig):
        self.run, self.config = run, config.with_candidates()
        self.plan: Plan = {}

    def add(
        self, artifact: str, needs: Iterable[str], inputs: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Adds an artifact after those that it `needs`."""
        if artifact in self.plan:
            return
        new = next((need for need in needs if self.plan[need] is not None), None)
        if not self.run.checksums.record(artifact).exists():
            self.plan[artifact] = "new"
        elif new is not None:
            self.plan[artifact] = f"depends on {new}, if that changes"
        else:
            self.plan[artifact] = self.run.checksums.outdated(artifact, inputs())

    def arm(self, name: str) -> str:
        """Adds an arm after its dependencies; returns the artifact's name."""
        from vlopd.run.dependencies import arm_inputs

        base, arm = self.config.base_arm, self.config.arms.get(name)
        needs = [] if name == base else [self.arm(base)]
        group = self.config.sweep_group(name) or self.config.follows(name)
        if group is not None:
            needs.append(self.sweep(group))
        if arm is not None:
            needs += [self.arm(a) for a in map(_arm_of, checkpoints_of(arm).values()) if a]
            needs += map(self.mask, masks_read(arm))
            needs += [self.arm(replayed) for replayed in [replay_of(arm)] if replayed]
        self.add(f"arms/{name}", needs, partial(arm_inputs, self.run, self.config, name))
        return f"arms/{name}"

    def sweep(self, group: str) -> str:
        """Adds the choice of a group of tuned arms, after their candidates."""
        from evals.sweeps import candidates_of, sweep_inputs, validation_inputs

        needs = []
        for name in candidates_of(self.config, group):
            needs.append(f"validation/{name}")
            inputs = partial(validation_inputs, self.run, self.config, name)
            self.add(f"validation/{name}", [self.arm(name)], inputs)
        self.add(f"sweeps/{group}", needs, partial(sweep_inputs, self.run, self.config, group))
        return f"sweeps/{group}"

    def mask(self, name: str) -> str:
        from vlopd.run.dependencies import mask_inputs

        rule = self.config.masks[name]
        needs = [self.arm(self.config.base_arm), *map(self.mask, rule.combines)]
        if rule.reads is not None and (read := _arm_of(rule.reads)):
            needs.append(self.arm(read))
        self.add(f"masks/{name}", needs, partial(mask_inputs, self.run, self.config, name))
        return f"masks/{name}"

    def geometry(self, names: Sequence[str]) -> None:
        from vlopd.run.dependencies import geometry_inputs, overlap_inputs

        arms = [self.arm(name) for name in names]
        for name, arm in zip(names, arms, strict=True):
            inputs = partial(geometry_inputs, self.run, self.config, name)
            self.add(f"geometry/{name}", [arm], inputs)
        if len(names) > 1:
            inputs = partial(overlap_inputs, self.run, self.config, list(names))
            self.add("geometry/overlap", arms, inputs)
        self.groups(names)

    def groups(self, names: Sequence[str]) -> None:
        """Adds the comparison of groups among the measured arms, if there are any, after their measures."""
        from vlopd.run.dependencies import groups_inputs, null_groups

        if null_groups(self.config, names):
            needs = ["geometry/overlap", *(f"geometry/{name}" for name in names)]
            inputs = partial(groups_inputs, self.run, self.config, names)
            self.add("geometry/groups", needs, inputs)

    def evals(self, names: Sequence[str]) -> None:
        from evals.harness import eval_inputs
        from evals.token_kl import base_kl_inputs, has_base_kl, has_tokens, token_inputs

        for name in names:
            needs = [self.arm(name)]
            self.add(f"evals/{name}", needs, partial(eval_inputs, self.run, self.config, name))
            if has_tokens(self.config, name):
                self.add(
                    f"tokens/{name}", needs, partial(token_inputs, self.run, self.config, name)
                )
            if has_base_kl(self.config, name):
                self.add(
                    f"base_kl/{name}", needs, partial(base_kl_inputs, self.run, self.config, name)
                )


def _arm_of(checkpoint: str) -> str | None:
    """The arm of this run that a checkpoint reference names; None for a folder."""
    return Reference.parse(checkpoint).arm


def plan(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    until: str,
    geometry: bool = True,
) -> Plan:
    """The artifacts that `run_all` of these arms would keep and make, with reasons.

    Excludes the comparison and the report, which take seconds and are made once all arms are evaluated. Of several
    processes only the first plans, before any withdraws a record.
    """
    if not is_first_process():
        return {}
    planner = Planner(run, config)
    for name in names:
        planner.arm(name)
    if until != "arms" and geometry:
        planner.geometry([name for name in config.geometry.arms if name in names])
    if until in ("evals", "report"):
        planner.evals(names)
    for mask in unused_masks(run, config, names) if geometry else ():
        planner.mask(mask)
    return planner.plan


def without_effect(run: RunFolder, config: ExperimentConfig, planned: Plan) -> list[str]:
    """Changed settings (`run.changes`) that do not reach artifacts which are kept, one line each."""
    kept = [artifact for artifact, why in planned.items() if why is None]
    lines = []
    execution = [f"{name}.{key}" for name, keys in EXECUTION.items() for key in sorted(keys)]
    for keys, kind, when in (
        (
            ("tracking", "eval.during", "train.keep_completions", *execution),
            "arms/",
            "while an arm trains",
        ),
        (("eval.keep_images",), "evals/", "while an arm is evaluated"),
    ):
        changed = [key for key in keys if any(line.startswith(key) for line in run.changes)]
        names = [artifact.removeprefix(kind) for artifact in kept if artifact.startswith(kind)]
        if kind == "arms/":
            names = [name for name in names if isinstance(config.arms.get(name), DistillArm)]
        if changed and names:
            lines.append(
                f"{' and '.join(changed)}: only read {when}, so not for {', '.join(names)}"
            )
    return lines


def unused_masks(run: RunFolder, config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """Existing masks that no arm is made under (of `mask make`); a run of all arms keeps them up to date too."""
    if set(names) < set(config.arms):
        return []
    used = {mask for arm in config.arms.values() for mask in masks_read(arm)}
    return [name for name in config.masks if name not in used and run.mask_record(name).exists()]


# -------------------------------------------------------------------------------------------- stages


def run_all(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    until: str,
    on_artifact: OnArtifact,
    allow_other_base: bool = False,
) -> None:
    """Makes the arms, their geometry and evaluations and, with all arms, the comparison and the report.

    until: the last stage to make: "arms", "geometry", "evals" or "report". All processes of a launcher train, measure
    and evaluate; the first writes, compares and reports.
    """
    make_arms(run, config, names, on_artifact, allow_other_base)
    make_unused_masks(run, config, names, on_artifact, allow_other_base)
    if until == "arms":
        return
    make_geometry(
        run, config, [name for name in config.geometry.arms if name in names], on_artifact
    )
    if until == "geometry":
        return
    make_evals(run, config, names, on_artifact)
    if until == "report" and set(names) >= set(config.arms) and is_first_process():
        make_comparison(run, config, on_artifact)
        make_report(run, config, on_artifact)


def make_arms(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    on_artifact: OnArtifact,
    allow_other_base: bool = False,
) -> None:
    from vlopd.preflight.record import predicted_memory
    from vlopd.run.arms import ArmOptions
    from vlopd.run.make import make_arm

    evaluate, choose = _held_out(config), choice_of(config)
    options = ArmOptions(allow_other_base, evaluate, {}, predicted_memory, choose)
    # external checkpoints first, so that an error in one is raised before any training
    for name in sorted(names, key=lambda n: not isinstance(config.arms.get(n), CheckpointArm)):
        try:
            made = make_arm(run, config, name, options)
        except OutOfMemory as error:
            raise with_remedy(run, config, name, error) from None
        on_artifact(f"arm {name}", run.arm_record(name), made)


def with_remedy(
    run: RunFolder, config: ExperimentConfig, name: str, error: OutOfMemory
) -> OutOfMemory:
    """The error of an arm, or of one that it depends on, with settings that would fit."""
    from vlopd.preflight.remedy import with_settings_that_fit

    for each in (*reversed(config.ancestors(name)), name):  # the first that is not made
        arm = config.arms[each]
        if isinstance(arm, DistillArm) and not run.arm_record(each).exists():
            density = 1.0 if arm.mask is None else read_record(run.mask_record(arm.mask))["density"]
            return with_settings_that_fit(error, config, arm, density)
    return error


def make_unused_masks(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    on_artifact: OnArtifact,
    allow_other_base: bool,
) -> None:
    from vlopd import distributed
    from vlopd.run.arms import ArmOptions
    from vlopd.run.make import make_mask

    state = distributed.accelerator()
    with distributed.in_step(state):  # before the first process withdraws any
        masks = distributed.exchanged(state, unused_masks(run, config, names))[0]
    for name in masks:
        if make_mask(run, config, name, ArmOptions(allow_other_base, choose=choice_of(config))):
            on_artifact(f"mask {name}", run.mask_record(name), True)


def _held_out(config: ExperimentConfig) -> Any:
    """The function that evaluates the student during training, if eval.during is set."""
    if config.eval.during is None:
        return None
    from evals.harness import held_out_scores

    return held_out_scores(config)


def choice_of(config: ExperimentConfig) -> Any:
    """The function that chooses the settings of tuned arms, if there are any."""
    if not config.sweep_groups:
        return None
    from evals.sweeps import choose

    return choose


def make_geometry(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    on_artifact: OnArtifact,
    workers: int | None = None,
    device: str = "cpu",
) -> None:
    """Measures the arms' updates; workers and device as in `measure_checkpoint`."""
    from vlopd.run import geometry
    from vlopd.run.dependencies import null_groups

    for name in names:
        made = geometry.make_geometry(run, config, name, workers, device)
        on_artifact(f"geometry of {name}", run.geometry(name) / "geometry.csv", made)
    if len(names) > 1:
        made = geometry.make_overlap(run, config, list(names))
        on_artifact("overlap of the arms' updates", run.root / "geometry" / "overlap.csv", made)
    if null_groups(config, names):
        made = geometry.make_groups(run, config, list(names))
        on_artifact("arms against nulls", run.root / "geometry" / "groups.csv", made)


def make_evals(
    run: RunFolder, config: ExperimentConfig, names: Sequence[str], on_artifact: OnArtifact
) -> None:
    from evals.harness import evaluate_arm
    from evals.token_kl import write_base_kl, write_token_kl
    from vlopd.train.pair import LoadedTeachers

    base: LoadedTeachers = {}  # loaded once for all arms
    for name in names:
        made = evaluate_arm(run, config, name)
        made |= write_token_kl(run, config, name)
        made |= write_base_kl(run, config, name, base)
        on_artifact(f"evaluation of {name}", run.eval(name) / "results.json", made)


def make_vision(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    scorer: str | None,
    pictures: int,
    on_artifact: OnArtifact,
) -> None:
    """Probes the arms' vision towers and, with a `scorer`, scores their captions (CLIPScore); not in `run_all`."""
    from evals.vision.stage import vision_report

    on_artifact("vision", vision_report(run, config, names, scorer, pictures), True)


def make_comparison(run: RunFolder, config: ExperimentConfig, on_artifact: OnArtifact) -> None:
    from evals.compare import compare

    on_artifact("comparison", compare(run, config), True)


def make_report(
    run: RunFolder, config: ExperimentConfig, on_artifact: OnArtifact, out: Path | None = None
) -> None:
    """Writes the report of a run into it, or with `out` into another folder, the run being only read."""
    from evals.report.build import build_report

    on_artifact("report", build_report(run, config, out), True)


# --------------------------------------------------------------------------------- checks before a stage


def begin(
    run: RunFolder,
    config: ExperimentConfig,
    planned: Plan,
    reads: Sequence[str] = (),
    on_plan: OnPlan | None = None,
) -> None:
    """Reports the plan, refuses known problems and outdated artifacts that a stage `reads`, saves the config."""
    if on_plan is not None:
        on_plan(run, config, planned)
    refuse_outdated(run, planned, reads)
    refuse_unready(config, planned)
    run.save_config(config)


def begin_results(
    run: RunFolder, config: ExperimentConfig, geometry: bool, on_plan: OnPlan | None = None
) -> None:
    """As `begin`, for stages that read results alone: raises ConfigError for results that do not match the config.

    A run that had one config only is not checked: its results are that config's, and its models may be gone.
    """
    if run.changes or run.read()["history"]:
        planned = plan(run, config, list(config.arms), "evals", geometry)
        if run.changes and on_plan is not None:
            on_plan(run, config, planned)
        kinds = ["arms", "masks", "evals", "tokens", "base_kl"]
        refuse_outdated(run, planned, [*kinds, "geometry"] if geometry else kinds)
    run.save_config(config)


def refuse_outdated(run: RunFolder, planned: Plan, kinds: Sequence[str]) -> None:
    """Raises ConfigError where a single stage would read an artifact that does not match the config.

    kinds: kinds of artifacts the stage reads, e.g. "arms". Artifacts not yet made are left to the stage.
    """
    for artifact, why in planned.items():
        if artifact.startswith(tuple(kinds)) and why is not None and why != "new":
            raise ConfigError(
                f"{artifact} is outdated ({why}); make it again with `vlopd run {run.root}`"
            )


def refuse_unready(config: ExperimentConfig, planned: Plan) -> None:
    """Raises ConfigError with all known problems of the planned artifacts, in one line, before any is made."""
    from vlopd.preflight import inputs

    due = {artifact for artifact, why in planned.items() if why is not None}
    config = config.with_candidates()
    arms = [name for name in config.arms if f"arms/{name}" in due]
    evals = [name for name in config.arms if f"evals/{name}" in due]
    measured = [name for name in config.geometry.arms if f"geometry/{name}" in due]
    lines = find_problems(config, arms, evaluated=False) if arms else []
    lines += inputs.find_geometry_problems(config, measured) if measured else []
    lines += _find_task_problems(config, evals) if evals else []
    if lines:
        raise ConfigError("; ".join(dict.fromkeys(lines)))


def plugins_of(config: ExperimentConfig, names: Sequence[str]) -> list[Use]:
    """The plug-ins of these arms and of those that they are made from."""
    every = dict.fromkeys(a for name in names for a in (name, *config.ancestors(name)))
    return config.plugins_of(every)


def find_problems(config: ExperimentConfig, names: Sequence[str], evaluated: bool) -> list[str]:
    """Problems that would stop making these arms, one line each; with `evaluated`, also their evaluation."""
    from vlopd.preflight import inputs

    config = config.with_candidates()
    names = list(dict.fromkeys(c for name in names for c in (name, *config.candidates(name))))
    lines = inputs.find_problems(config, names)
    if tuned := [name for name in names if config.candidates(name)]:
        lines += _find_validation_problems(config, tuned[:1])
    if evaluated:
        lines += _find_task_problems(config, names)
    elif (during := config.eval.during) is not None:
        subset = {"tasks": during.tasks, "limit": during.limit, "during": None}
        settings = config.eval.model_copy(update=subset)
        lines += _find_task_problems(config.model_copy(update={"eval": settings}), names[:1])
    return list(dict.fromkeys(lines))


def _find_validation_problems(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """Problems that would stop the choice of tuned arms, one line each."""
    from evals.sweeps import refuse_shared_tasks

    try:
        refuse_shared_tasks(config.eval)
    except UserError as error:
        return [str(error)]
    settings = config.eval.for_validation
    lines = _find_task_problems(config.model_copy(update={"eval": settings}), names)
    return [f"eval.validation: {line}" for line in lines]


def _find_task_problems(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """Problems that would stop the evaluation of these arms, one line each."""
    from evals import preflight
    from vlopd.preflight import inputs

    try:
        lines = preflight.find_problems(config.eval, inputs.evaluated(config, list(names)))
    except UserError as error:
        return [str(error)]
    for name in names:
        if isinstance(arm := config.arms[name], ImportedArm):
            problems = preflight.find_import_problems(config.eval.tasks, [Path(arm.results)])
            lines += [f"arms.{name}: {line}" for line in problems]
    return lines
