"""The shape of every geometry result: a row a measure and null; thresholds are values, not column names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import stdtr

STATUSES = ("ok", "approximate", "zero", "skipped", "failed")
EQUAL = 1e-9
"""Relative differences below this are rounding of our own arithmetic, no excess."""
DETAIL = ("norm", "sizes", "places", "signs")
"""How much of an update decides a measure, besides the base: its norm; the sizes of its entries; which coordinates
have them; their signs as well. Each takes in those before it."""
KEPT = {"permuted": "sizes", "sign_flipped": "places"}
"""What of the update a null keeps; all others keep the norm. What that decides is no finding beside the null."""


class Measure(NamedTuple):
    """One number about one delta.

    status: `ok`; `approximate`, from a randomised factorisation; `zero`, undefined because nothing moved
    (0/0); `skipped`, not computed; `failed`, tried in vain. The last three have no value; all but `ok` say
    why in `reason`, and all are counted in every aggregate. `decided_by` is one of
    DETAIL: a null that keeps so much of the update equals it by construction. `chance` is the mean and deviation under
    an update without structure, where vlopd.geometry.closed_forms knows them without drawing.
    """

    metric: str
    parameter: str
    value: float | None
    status: str = "ok"
    reason: str = ""
    decided_by: str = "signs"
    chance: tuple[float, float | None] | None = None


class Standing(NamedTuple):
    """Where an observed value stands among the draws of a null.

    excess_t = excess / (sd sqrt(1 + 1/S)) follows Student's t with S - 1 degrees of freedom where the
    observed value is one more draw, so p = P(|t| > |excess_t|) is honest for few draws S too. For a null in
    closed form sd is exact and p normal. Both are None where there is nothing to standardise by: fewer than
    two draws, draws that are all equal, or a measure of what the null keeps of the update.
    """

    null: str = ""
    mean: float | None = None
    sd: float | None = None
    excess: float | None = None
    excess_t: float | None = None
    p: float | None = None


@dataclass  # a frozen one takes seven times as long to make, and there are tens of thousands
class Row:
    """One line of geometry.csv: a measure of one tensor, or of a group, beside one null model.

    It begins with the fields of a `Place`.
    excess = value - null_mean; null_sd is the sample deviation over draws; excess_t and p as in `Standing`.
    """

    name: str
    component: str
    layer: int | None
    module: str
    shape: str
    metric: str
    parameter: str
    value: float | None
    null: str
    null_mean: float | None
    null_sd: float | None
    excess: float | None
    excess_t: float | None
    p: float | None
    status: str
    reason: str


class Place(NamedTuple):
    """The columns of a row that say what it is about."""

    name: str
    component: str = ""
    layer: int | None = None
    module: str = ""
    shape: str = ""


def parameters(**values: float | str) -> str:
    """>>> parameters(ratio=0.1, atol=0)
    "ratio=0.1,atol=0"
    """
    return ",".join(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"
        for name, value in values.items()
    )


def is_kept(null: str, measure: Measure) -> bool:
    """Whether a null equals the update in this measure by construction."""
    return DETAIL.index(measure.decided_by) <= DETAIL.index(KEPT.get(null, "norm"))


def standing(null: str, observed: Measure, values: Sequence[float]) -> Standing:
    """Where `observed` stands among the draws `values` of a null."""
    if not values:
        return Standing(null)
    mean = math.fsum(values) / len(values)
    sd = None
    if len(values) > 1:
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    if observed.value is None:
        return Standing(null, mean, sd)
    excess = observed.value - mean
    if is_kept(null, observed) or sd is None:
        return Standing(null, mean, sd, excess)
    if abs(excess) <= EQUAL * max(abs(observed.value), abs(mean)):
        return Standing(null, mean, sd, excess, 0.0, 1.0)
    if sd <= EQUAL * abs(mean):
        return Standing(null, mean, sd, excess)
    t = excess / (sd * math.sqrt(1 + 1 / len(values)))
    return Standing(null, mean, sd, excess, t, 2 * float(stdtr(len(values) - 1, -abs(t))))


def beside_nulls(
    observed: Measure, draws: Mapping[str, Sequence[float]], place: Place
) -> list[Row]:
    """The rows of a measure: one a null, or a single one where there is none.

    draws: null -> the values of the same measure under its draws, those that have one.
    """
    found = [standing(null, observed, values) for null, values in draws.items()]
    if observed.chance is not None:
        found.append(in_closed_form(observed, *observed.chance))
    return [
        Row(
            *place,
            observed.metric,
            observed.parameter,
            observed.value,
            its.null,
            its.mean,
            its.sd,
            its.excess,
            its.excess_t,
            its.p,
            observed.status,
            observed.reason,
        )
        for its in found or [Standing()]
    ]


def in_closed_form(observed: Measure, mean: float, sd: float | None) -> Standing:
    """Where `observed` stands in a null whose mean and deviation are known."""
    if observed.value is None:
        return Standing("closed_form", mean, sd)
    excess = observed.value - mean
    z = excess / sd if sd else None
    p = None if z is None else math.erfc(abs(z) / math.sqrt(2))
    return Standing("closed_form", mean, sd, excess, z, p)
