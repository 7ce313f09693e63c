"""The rows of optimizers: trainings that differ in the optimizer alone, with the evidence on its moments."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from evals.report.paper.numbers import (
    NO_ROW,
    NO_SIGNAL,
    Lacking,
    Number,
    Where,
    mean_of_null,
    over_seeds,
)
from evals.report.paper.pair import Group, Pair
from evals.report.paper.scores import CURVES, SCORES, Nulls, score_numbers
from evals.report.tuning import chosen_points, read_sweeps
from vlopd.config.arms import DistillArm
from vlopd.run.schemas.read import read_log

EVIDENCE = (
    ("cos(m, g) first", "momentum_alignment", lambda values: values[0]),
    ("cos(m, g) mean", "momentum_alignment", statistics.fmean),
    ("cos(m, g) last", "momentum_alignment", lambda values: values[-1]),
    ("sd/mean sqrt(v)", "sqrt_v_variation", statistics.fmean),
    ("unmoved bf16 %", "unmoved_bf16_fraction", lambda values: 100 * statistics.fmean(values)),
)
"""Columns of optimizer.jsonl over the steps at which it is written, all coordinates together."""
OPTIMIZER_COLUMNS = ("learning rate", *CURVES, "test %", *(its[0] for its in EVIDENCE))

SAME_TRAINING = {"type", "seed", "role", "optim", "sweep"}
"""Fields of an arm in which those of the optimizer table may differ."""


def optimizer_rows(pair: Pair) -> Iterator[Number]:
    """Trainings that differ only in the optimizer: scores, and the alignment and spread of its moments."""
    kinds = {
        arm: pair.config.recipe_of(its).optim
        for arm, its in pair.config.arms.items()
        if isinstance(its, DistillArm)
        and not any(its.model_dump(exclude=SAME_TRAINING).values())
        and pair.is_shown(arm)
        and arm not in pair.labels
    }
    if len({its.type for its in kinds.values()}) < 2:
        raise Lacking(
            'all arms have one optimizer: add an arm with optim = {type = "sgd", learning_rate = ...}'
        )
    for group in pair.groups(list(kinds)):
        optim = kinds[group.arms[0]]
        label = f"{optim.type}: {group.label}"
        nulls: Nulls = {"drawn": {}, "signal": group.nulls}
        for column in OPTIMIZER_COLUMNS:
            where = ("optimizers", pair.name, label, column)
            if column in SCORES:
                yield from score_numbers(pair, where, group.arms, nulls)
            elif column == "learning rate":
                rates = [_learning_rate(pair, arm) for arm in group.arms]
                yield Number(*where, "update", "", value=rates[0], n=len(rates))
            else:
                yield from _evidence_numbers(pair, where, group)


def _evidence_numbers(pair: Pair, where: Where, group: Group) -> Iterator[Number]:
    """A column of EVIDENCE over the group's arms, and over those of its signal nulls."""
    column = where[-1]
    values = _evidence(pair, group.arms, column)
    reason = "" if values else _why_no_evidence(pair, group.arms[0], column)
    yield Number(*where, "update", "", **over_seeds(values), reason=reason)
    yield Number(*where, "drawn", "", reason="a drawn null has no training, and so no moments")
    for null, arms in group.nulls.items():
        number = mean_of_null(where, null, _evidence(pair, arms, column))
        yield number._replace(reason=number.reason or NO_ROW)
    if not group.nulls:
        yield Number(*where, "signal", "", reason=NO_SIGNAL)


def _learning_rate(pair: Pair, arm: str) -> float:
    """The learning rate that an arm was trained with, the chosen one of a sweep."""
    chosen = chosen_points(pair.config, read_sweeps(pair.run, pair.config))
    its = pair.config.with_points({arm: chosen[arm]} if arm in chosen else {}).arms[arm]
    assert isinstance(its, DistillArm)
    return pair.config.recipe_of(its).optim.learning_rate


def _why_no_evidence(pair: Pair, arm: str, column: str) -> str:
    path = pair.run.arm(arm) / "optimizer.jsonl"
    if not path.exists():
        return "no optimizer.jsonl: set train.evidence_every before training"
    return f"this optimizer has no {'second moment' if 'sqrt' in column else 'first moment'}"


def _evidence(pair: Pair, arms: Sequence[str], column: str) -> list[float]:
    """The values of these arms in a column of EVIDENCE, of those that have one."""
    _, key, fold = next(its for its in EVIDENCE if its[0] == column)
    found = []
    for arm in arms:
        path = pair.run.arm(arm) / "optimizer.jsonl"
        rows = [row for row in read_log(path) if row["module"] == "all"]
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found.append(fold(values))
    return found
