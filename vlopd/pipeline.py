"""The whole experiment, stage by stage. The only module that knows all stages, of training and of evaluation.

    base -> trained arms -> masks -> retrained, transplanted arms -> geometry, evaluation -> comparison -> report

Stages read files of the run folder, write one artifact each, and are skipped where it is up to date. A run grows: with
another config in the same folder, what both share is kept. Heavy imports sit inside the functions, so that a wrong key
and a finished run answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlopd.config.arms import CheckpointArm, ImportedArm, checkpoints_of, mask_of
from vlopd.config.experiment import ExperimentConfig, merge
from vlopd.config.input import config_of, load_config, parse_override
from vlopd.config.masks import Reference
from vlopd.errors import ConfigError, UserError
from vlopd.files import is_first_process
from vlopd.run.folder import RunFolder

Say = Callable[[str, Path, bool], None]
"""Tells the user of an artifact: what it is, where it is, and whether it was made or there already."""


def prepare(
    target: Path, overrides: Sequence[str] = (), out: Path | None = None
) -> tuple[RunFolder, ExperimentConfig]:
    """The run and config of a run folder or of a config file, with TOML lines over it; nothing is written yet.

    Raises ConfigError for a config that does not fit, or not this run.
    """
    if target.is_dir():
        if out is not None and out != target:
            raise ConfigError(f"--out {out}: {target} is a run folder already")
        run, config = RunFolder.open(target)
        if not overrides:
            return run, config
        tree = run.read()["config"]
        for line in overrides:
            merge(tree, parse_override(line))
        run.unlock()
        config = config_of(tree, target / "run.json")
        return RunFolder.prepare(target, config), config
    config = load_config(target, overrides)
    if not config.arms:
        raise ConfigError(f'{target}: arms is empty; add one, as in base = {{type = "base"}}')
    return RunFolder.prepare(out or Path("runs") / config.name, config), config


# ---------------------------------------------------------------------------------------------- plan


Plan = dict[str, str | None]
"""{artifact: why it is to be made, None where it is kept}, in the order in which they are made."""


class Planner:
    """What a run's artifacts need, asked without making any."""

    def __init__(self, run: RunFolder, config: ExperimentConfig):
        self.run, self.config = run, config
        self.found: Plan = {}

    def ask(
        self, artifact: str, needs: Iterable[str], inputs: Callable[[], Mapping[str, Any]]
    ) -> None:
        if artifact in self.found:
            return
        new = next((need for need in needs if self.found[need] is not None), None)
        if not self.run.checksums.record(artifact).exists():
            self.found[artifact] = "new"
        elif new is not None:
            self.found[artifact] = f"from {new}"
        else:
            self.found[artifact] = self.run.checksums.outdated(artifact, inputs())

    def arm(self, name: str) -> str:
        """An arm, and first what it is made from; returns the artifact's name."""
        from vlopd.run.inputs import made_from
        from vlopd.run.resolve import base_arm

        base, its = base_arm(self.config), self.config.arms.get(name)
        needs = [] if name == base else [self.arm(base)]
        if its is not None:
            needs += [self.arm(a) for a in map(arm_of, checkpoints_of(its).values()) if a]
            needs += [self.mask(mask) for mask in [mask_of(its)] if mask]
        self.ask(f"arms/{name}", needs, partial(made_from, self.run, self.config, name))
        return f"arms/{name}"

    def mask(self, name: str) -> str:
        from vlopd.run.inputs import mask_inputs
        from vlopd.run.resolve import base_arm

        rule = self.config.masks[name]
        needs = [self.arm(base_arm(self.config)), *map(self.mask, rule.combines)]
        if rule.reads is not None and (read := arm_of(rule.reads)):
            needs.append(self.arm(read))
        self.ask(f"masks/{name}", needs, partial(mask_inputs, self.run, self.config, name))
        return f"masks/{name}"

    def geometry(self, names: Sequence[str]) -> None:
        from vlopd.run.inputs import geometry_inputs, overlap_inputs

        arms = [self.arm(name) for name in names]
        for name, arm in zip(names, arms, strict=True):
            inputs = partial(geometry_inputs, self.run, self.config, name)
            self.ask(f"geometry/{name}", [arm], inputs)
        if len(names) > 1:
            inputs = partial(overlap_inputs, self.run, self.config, list(names))
            self.ask("geometry/overlap", arms, inputs)

    def evals(self, names: Sequence[str]) -> None:
        from evals.harness import arm_inputs
        from evals.token_kl import has_tokens, token_inputs

        for name in names:
            needs = [self.arm(name)]
            self.ask(f"evals/{name}", needs, partial(arm_inputs, self.run, self.config, name))
            if has_tokens(self.config, name):
                self.ask(
                    f"tokens/{name}", needs, partial(token_inputs, self.run, self.config, name)
                )


def arm_of(checkpoint: str) -> str | None:
    """The arm of this run that a named checkpoint belongs to; None for a folder."""
    return Reference.parse(checkpoint).arm


def plan(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    until: str,
    geometry: bool = True,
) -> Plan:
    """What `run_all` of these arms would keep and make, and why.

    The comparison and the report are not in it: they take seconds, and follow where all arms are evaluated. Of several
    processes the first plans: when another asks, it may be at work already.
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
    return planner.found


def unused_masks(run: RunFolder, config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """Masks that `mask make` wrote and that no arm is made with: of a whole run, they are kept as the arms are."""
    if set(names) < set(config.arms):
        return []
    return [name for name in config.masks if run.mask_record(name).exists()]


# -------------------------------------------------------------------------------------------- stages


def run_all(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    until: str,
    say: Say,
    allow_other_base: bool = False,
) -> None:
    """Makes arms, their geometry and evaluations and, of all arms, the comparison and the report.

    until: "arms", "geometry", "evals" or "report", the last stage that is made. Of several processes, all train and
    the first does the rest.
    """
    make_arms(run, config, names, say, allow_other_base)
    make_unused_masks(run, config, names, say, allow_other_base)
    if until == "arms" or not is_first_process():
        return
    make_geometry(run, config, [name for name in config.geometry.arms if name in names], say)
    if until == "geometry":
        return
    make_evals(run, config, names, say)
    if until == "report" and set(names) >= set(config.arms):
        make_comparison(run, config, say)
        make_report(run, config, say)


def make_arms(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    say: Say,
    allow_other_base: bool = False,
) -> None:
    from vlopd.run.arms import Making
    from vlopd.run.make import make_arm

    how = Making(allow_other_base, held_out(config))
    # arms that are only noted first: what is wrong with their models is said before anything is trained
    for name in sorted(names, key=lambda n: not isinstance(config.arms.get(n), CheckpointArm)):
        made = make_arm(run, config, name, how)
        say(f"arm {name}", run.arm_record(name), made)


def make_unused_masks(
    run: RunFolder, config: ExperimentConfig, names: Sequence[str], say: Say, allow_other_base: bool
) -> None:
    from vlopd.run.arms import Making
    from vlopd.run.make import make_mask

    for name in unused_masks(run, config, names):
        if make_mask(run, config, name, Making(allow_other_base)):
            say(f"mask {name}", run.mask_record(name), True)


def held_out(config: ExperimentConfig) -> Any:
    """What scores a student while it trains, if eval.during asks for it."""
    if config.eval.during is None:
        return None
    from evals.harness import held_out_scores

    return held_out_scores(config)


def make_geometry(run: RunFolder, config: ExperimentConfig, names: Sequence[str], say: Say) -> None:
    from vlopd.run import geometry

    for name in names:
        made = geometry.make_geometry(run, config, name)
        say(f"geometry of {name}", run.geometry(name) / "geometry.csv", made)
    if len(names) > 1:
        made = geometry.make_overlap(run, config, list(names))
        say("overlap of the arms' updates", run.root / "geometry" / "overlap.csv", made)


def make_evals(run: RunFolder, config: ExperimentConfig, names: Sequence[str], say: Say) -> None:
    from evals.harness import evaluate_arm
    from evals.token_kl import write_token_kl

    for name in names:
        made = evaluate_arm(run, config, name)
        made |= write_token_kl(run, config, name)
        say(f"evaluation of {name}", run.eval(name) / "results.json", made)


def make_vision(
    run: RunFolder,
    config: ExperimentConfig,
    names: Sequence[str],
    scorer: str | None,
    pictures: int,
    say: Say,
) -> None:
    """Probes the arms' vision towers and, with a `scorer`, aligns their captions; not a part of `run_all`."""
    from evals.vision.stage import vision_report

    say("vision", vision_report(run, config, names, scorer, pictures), True)


def make_comparison(run: RunFolder, config: ExperimentConfig, say: Say) -> None:
    from evals.compare import compare

    say("comparison", compare(run, config), True)


def make_report(run: RunFolder, config: ExperimentConfig, say: Say) -> None:
    from evals.report.build import build_report

    say("report", build_report(run, config), True)


# --------------------------------------------------------------------------------- what is refused first


def refuse_outdated(run: RunFolder, planned: Plan, kinds: Sequence[str]) -> None:
    """Raises ConfigError where a stage by itself would work from what the config no longer describes.

    kinds: of the artifacts that the stage reads, as in "arms". What is not made yet is for the stage to say.
    """
    for artifact, why in planned.items():
        if artifact.startswith(tuple(kinds)) and why is not None and why != "new":
            raise ConfigError(
                f"{artifact} is not what the config says ({why}); make it again with `vlopd run {run.root}`"
            )


def refuse_unready(config: ExperimentConfig, planned: Plan) -> None:
    """Raises ConfigError with all that is known to stop what is planned: one line, before anything is made."""
    from vlopd.preflight import inputs

    due = {artifact for artifact, why in planned.items() if why is not None}
    arms = [name for name in config.arms if f"arms/{name}" in due]
    evals = [name for name in config.arms if f"evals/{name}" in due]
    measured = [name for name in config.geometry.arms if f"geometry/{name}" in due]
    lines = unready(config, arms, evaluated=False) if arms else []
    lines += inputs.geometry_findings(config, measured) if measured else []
    lines += unready_tasks(config, evals) if evals else []
    if lines:
        raise ConfigError("; ".join(dict.fromkeys(lines)))


def unready(config: ExperimentConfig, names: Sequence[str], evaluated: bool) -> list[str]:
    """What would stop these arms, a line each; with `evaluated`, also what would stop their evaluation."""
    from vlopd.preflight import inputs

    lines = inputs.findings(config, list(names))
    if evaluated:
        lines += unready_tasks(config, names)
    elif (during := config.eval.during) is not None:
        only = {"tasks": during.tasks, "limit": during.limit, "during": None}
        asked = config.eval.model_copy(update=only)
        lines += unready_tasks(config.model_copy(update={"eval": asked}), names[:1])
    return list(dict.fromkeys(lines))


def unready_tasks(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """What would stop these arms' evaluation, a line each."""
    from evals import preflight
    from vlopd.preflight import inputs

    try:
        lines = preflight.find_problems(config.eval, inputs.evaluated(config, list(names)))
    except UserError as error:
        return [str(error)]
    for name in names:
        if isinstance(arm := config.arms[name], ImportedArm):
            its = preflight.find_import_problems(config.eval.tasks, Path(arm.results))
            lines += [f"arms.{name}: {line}" for line in its]
    return lines
