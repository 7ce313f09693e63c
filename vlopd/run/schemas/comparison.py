"""The schema of compare.json, which evals/compare.py writes: statistics are null where they are not defined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vlopd.config.arms import Role
from vlopd.run.schemas.base import Count, Entry, Record, Table, Value

Bounds = tuple[Value, Value]
Arms = Annotated[tuple[str, ...], Field(min_length=1)]


class Estimate(Entry):
    """A mean with its error, and interval (None for a side without a bound)."""

    n: Count
    mean: float
    standard_error: Value
    interval: Bounds


class Recovery(Entry):
    """A fraction of another arm's gain."""

    value: Value
    interval: Bounds | None
    status: Literal["ok", "weak", "undefined", "negative", "no base or full arm"]


class DifferenceToFull(Entry):
    """An arm's difference to the full arm."""

    mean: float
    standard_error: Value
    interval: Bounds
    mcnemar_p: Value


class ArmScore(Estimate):
    """Of one arm, or the mean of several."""

    difference_to_full: DifferenceToFull | None
    recovery: Recovery


class Outcomes(Entry):
    """Fractions of answers."""

    right: float
    wrong: float
    unreadable: float
    cut: float


class Score(ArmScore):
    """An arm's score on a task."""

    role: Role
    by_group: dict[str, Estimate]
    pass_at: dict[str, Estimate]
    further: dict[str, Estimate]
    gap_closed: Recovery | None
    extraction_failure_fraction: Value
    outcomes: Outcomes | None
    mean_tokens: Value = None
    truncated_fraction: Value = None
    mean_thought_tokens: Value = None
    answered_fraction: Value = None


class NonInferiority(Entry):
    """Whether an arm is worse than another by less than the margin."""

    margin: float
    low: Value
    p: Value
    holds: bool
    why: str | None


class Contrast(Estimate):
    """A difference between two arms, or an arm and the mean of several."""

    name: str
    a: str
    b: str | Arms
    p: float
    p_holm: Value
    test: str
    bootstrap: Bounds
    minimum_detectable_effect: Value
    declared: bool
    exploratory: bool
    direction: Literal["above", "below"] | None
    non_inferiority: NonInferiority | None = None


class Pooled(ArmScore):
    """The mean of several controls."""

    sd_between_arms: Value


class Controls(Entry):
    """Controls of an arm that differ in the draw of the mask alone."""

    arm: str
    kind: str
    match: str | None
    arms: Arms
    pooled: Pooled
    difference: Contrast
    rank: Count
    of: Count
    tied: Count
    p: float
    smallest_possible_p: float


class Levels(Entry):
    """What the arms of each side differ in."""

    a: str
    b: str


class SeedContrast(Entry):
    """A difference between two groups of seeds."""

    name: str
    a: Arms
    b: Arms
    levels: Levels
    two_level: bool
    seeds_a: Count
    seeds_b: Count
    mean: float
    sd_a: Value
    sd_b: Value
    interval: Bounds


class ComparedTask(Entry):
    """A task, or the total of a group."""

    metric: str
    n: Count
    clusters: Count | None
    scale: Literal["fraction", "own"]
    higher_is_better: bool
    chance: dict[str, Value] | None
    members: tuple[str, ...] | None
    group: str | None
    in_family: bool
    arms: Annotated[dict[str, Score], Field(min_length=1)]
    contrasts: tuple[Contrast, ...]
    controls: tuple[Controls, ...]
    seeds: tuple[SeedContrast, ...]
    gap_closed: Recovery | None
    minimum_detectable_effect: Value
    minimum_detectable_effect_of: str | None

    def names(self) -> Iterator[str]:
        """The arms that its statistics are of."""
        sides = [side for its in self.contrasts for side in (its.a, its.b)]
        sides += [side for its in self.seeds for side in (its.a, its.b)]
        for its in self.controls:
            sides += [its.arm, its.arms, its.difference.a, its.difference.b]
        for side in sides:
            yield from [side] if isinstance(side, str) else side


class Choice(Entry):
    """Of the settings of a tuned arm."""

    chosen: Table
    grid: Table
    at_edge: tuple[str, ...]


class Budget(Entry):
    """What a trained arm's settings may have cost."""

    settings: Count
    completions: Count


class ComparedArm(Entry):
    """What is known of an arm besides its scores."""

    role: Role
    training: str | None = None
    seed: int | None = None
    density: Value = None
    delta_norm: Value = None
    kl_to_base: Value = None
    null: str | None = None
    budget: Budget | None = None
    sweep: Choice | None = None


class Sampling(Entry):
    """Several answers per question."""

    n: Count
    temperature: float
    top_p: float
    top_k: Count | None


class Family(Entry):
    """The contrasts that Holm's correction is over."""

    name: str
    correction: str
    tests: Count
    tasks: tuple[str, ...]


class Unpooled(Entry):
    """A control that is not averaged."""

    arm: str
    of: str
    differences: tuple[str, ...]


class Comparison(Record):
    """compare.json."""

    confidence: Annotated[float, Field(gt=0, lt=1)]
    margin: float
    family: Family
    declared_contrasts: tuple[str, ...] | None
    sampled: Sampling | None
    other_base: dict[str, Table]
    not_compared: dict[str, str]
    arms: Annotated[dict[str, ComparedArm], Field(min_length=1)]
    not_pooled: tuple[Unpooled, ...]
    tasks: Annotated[dict[str, ComparedTask], Field(min_length=1)]

    @model_validator(mode="after")
    def check_names(self) -> Self:
        """Arms and tasks are among those compared."""
        for task, entry in self.tasks.items():
            if entry.arms.keys() != self.arms.keys():
                raise ValueError(f"the arms of {task} are not those compared")
            if unknown := set(entry.names()) - self.arms.keys():
                raise ValueError(f"{task} has statistics of {min(unknown)}, which is not compared")
        named = [*self.family.tasks, *(its.group for its in self.tasks.values() if its.group)]
        if unknown := set(named) - self.tasks.keys():
            raise ValueError(f"{min(unknown)} is no task of it")
        return self
