"""Chooses the settings of tuned arms on the validation split: validation/*/ -> sweeps/GROUP.json.

Candidates are evaluated on eval.validation alone. Their scores on eval.tasks do not exist when the choice is made, and
only the chosen arm is evaluated there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from evals.compare import TaskStatistics
from evals.corpus_metrics import CorpusStatistics
from evals.harness import evaluate, evaluation_inputs, subject_of
from evals.paired_scores import PairedScores, read_results, read_tasks
from evals.scoring import Tasks
from evals.task_definition import members_of
from vlopd import distributed
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.sweeps import at_edge, candidate_name, points_of
from vlopd.digests import digest_scores
from vlopd.errors import ConfigError, RunError
from vlopd.files import without_nan
from vlopd.run.folder import RunFolder
from vlopd.run.stage import stage

RULE = (
    "the highest mean over the validation tasks of their primary metric (of a metric that is better when lower, its "
    "negative), averaged over the arms that share the choice; of equal ones the first in the grid"
)
"""How a point of the grid is chosen."""


def choose(run: RunFolder, config: ExperimentConfig, group: str) -> None:
    """Evaluates the trained candidates of a group of tuned arms on the validation split and writes the choice."""
    refuse_shared_tasks(config.eval)
    names = candidates_of(config, group)
    for name in names:
        subject = subject_of(run, config, name, {"mask": None, "other_base": None})
        evaluate(run, subject, config.eval.for_validation, "validation")

    def write() -> None:
        with stage(run, f"sweeps/{group}") as its:
            if its.is_due(lambda _: sweep_inputs(run, config, group)):
                its.finish(without_nan(_curve(run, config, group)), ())

    distributed.main_process_alone(distributed.accelerator(), write)


def candidates_of(config: ExperimentConfig, group: str) -> list[str]:
    return [c for member in config.sweep_members(group) for c in config.candidates(member)]


def validation_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The inputs that determine a candidate's validation scores, as digests; `config` has the candidates."""
    its = config.eval.for_validation
    manager = Tasks.of(its.tasks, its.include)
    return evaluation_inputs(manager, subject_of(run, config, name, {}), its, False)


def sweep_inputs(run: RunFolder, config: ExperimentConfig, group: str) -> dict[str, Any]:
    """The inputs that determine a group's choice: its grid, and every candidate's validation scores."""
    member = config.sweep_members(group)[0]
    scores = {}
    for name in candidates_of(config, group):
        run.checksums.check(f"validation/{name}", whole=False)
        scores[name] = digest_scores(run.root / "validation" / name)
    settings = config.eval.for_validation
    about = settings.model_dump(mode="json", include={"tasks", "limit", "metric", "confidence"})
    grid = config.arms[member].model_dump(mode="json", include={"sweep"})
    return {**grid, "rule": RULE, "scores": scores, "eval": about}


def refuse_shared_tasks(config: EvalConfig) -> None:
    """Raises ConfigError where a validation task, or a member of its group, is among the tested ones."""
    assert config.validation is not None
    validated, tested = (
        _members(tasks, config.include) for tasks in (config.validation.tasks, config.tasks)
    )
    if shared := sorted(validated & tested):
        raise ConfigError(
            f"eval.validation.tasks: {', '.join(shared)} is in eval.tasks too, which chosen settings are tested on; "
            "use another split"
        )


def _members(tasks: Sequence[str], include: str | None) -> set[str]:
    """Tasks and the members of groups, without the variant of their pictures."""
    index = Tasks.of(tasks, include).task_index
    return {name.partition("@")[0] for task in tasks for name in members_of(index, task)}


def _curve(run: RunFolder, config: ExperimentConfig, group: str) -> dict[str, Any]:
    """The content of sweeps/GROUP.json. Raises RunError where no validation task has a number per question."""
    settings, members = config.eval.for_validation, config.sweep_members(group)
    arm = config.arms[members[0]]
    assert isinstance(arm, DistillArm) and arm.sweep is not None
    folder, names = run.root / "validation", candidates_of(config, group)
    results = read_results(folder, names)
    paired, not_compared = read_tasks(folder, results, names, settings)
    tasks = {its.task: its for its in paired if its.group is None}  # a total stands for its tasks
    if not tasks:
        why = "; ".join(f"{task}: {reason}" for task, reason in not_compared.items())
        raise RunError(
            f"eval.validation.tasks: nothing to choose by ({why}); add a task with scores"
        )
    statistics = {task: _statistics(its, settings) for task, its in tasks.items()}

    def score(candidates: Iterable[str]) -> dict[str, Any]:
        """Mean over tasks and candidates, of which higher is better, with its standard error and each task's."""
        found = {task: its.estimate(tuple(candidates)) for task, its in statistics.items()}
        signs = {task: 1 if tasks[task].higher_is_better else -1 for task in tasks}
        return {
            "score": sum(signs[task] * its["mean"] for task, its in found.items()) / len(found),
            "standard_error": math.hypot(*(its["standard_error"] for its in found.values()))
            / len(found),
            "tasks": {
                task: {key: its[key] for key in ("mean", "standard_error", "n")}
                for task, its in found.items()
            },
        }

    curve = []
    for point in points_of(arm.sweep):
        of = {member: candidate_name(member, point) for member in members}
        each = {member: {"candidate": c, **score([c])} for member, c in of.items()}
        n = sum(len(its.groups) for its in tasks.values())
        curve.append({"settings": point, "n": n, **score(of.values()), "arms": each})
    best = best_of(curve)
    return {
        "group": group,
        "rule": RULE,
        "grid": arm.sweep,
        "tasks": {
            task: {"metric": its.metric, "higher_is_better": its.higher_is_better}
            for task, its in tasks.items()
        },
        "curve": curve,
        "chosen": best["settings"],
        "candidates": {member: its["candidate"] for member, its in best["arms"].items()},
        "at_edge": at_edge(arm.sweep, best["settings"]),
    }


def best_of(curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of the points with the highest score; scores that differ by the rounding of sums are equal."""

    def height(point: dict[str, Any]) -> float:
        return -math.inf if math.isnan(point["score"]) else round(point["score"], 12)

    return max(curve, key=height)


def _statistics(answers: PairedScores, config: EvalConfig) -> TaskStatistics | CorpusStatistics:
    if answers.corpus is None:
        return TaskStatistics(answers, config)
    return CorpusStatistics(answers.corpus, answers.clusters, config, answers.higher_is_better)
