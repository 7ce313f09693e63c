"""The schema of geometry results: one row per measure and null; thresholds are values, not column names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import nctdtrinc, stdtr, stdtrit

STATUSES = ("ok", "approximate", "zero", "skipped", "failed")
EQUAL = 1e-9
"""Relative differences below this are floating-point rounding, not an excess."""
LEAST_DRAWS = 5
"""Fewest draws of a null that give a p: with three, only differences of 6.5 sd would be detected, with five 4.1."""
LEVEL, POWER = 0.05, 0.8
"""Level of p, and the power at which `detectable_excess` is stated."""
FLAGGED_BY_CHANCE = 0.052
"""Share of rows with p < LEVEL of an update that is itself a draw of the null, over 150 pairs in bf16 and in fp32."""
HITS_SD, INDEPENDENT_HITS_SD = 6.2, 2.1
"""Standard deviation over those in bf16 of the number of rows with p < LEVEL in a matrix (mean 4.8 of 93), and that of
independent rows (scripts/study_calibration.py)."""
DETAIL = ("norm", "sizes", "places", "signs")
"""The part of an update that determines a measure, besides the base: its norm; the sizes of its entries; their
positions; their signs. Each includes those before it."""
KEPT = {"permuted": "sizes", "sign_flipped": "places"}
"""The part of the update that a null preserves; all others preserve the norm. Measures determined by it equal the
null's by construction."""


class Measure(NamedTuple):
    """One number of one delta.

    status: `ok`; `approximate`, from a randomised factorisation; `zero`, undefined because the update is zero
    (0/0); `skipped`, not computed; `failed`, raised an error. The last three have no value; all but `ok` have a
    `reason`, and all are counted in every aggregate. `decided_by` is one of DETAIL: a null that preserves this part of
    the update has the same value by construction. `chance` is the mean and standard deviation under an unstructured
    update, where vlopd.update_geometry.closed_forms has a closed form.
    """

    metric: str
    parameter: str
    value: float | None
    status: str = "ok"
    reason: str = ""
    decided_by: str = "signs"
    chance: tuple[float, float | None] | None = None


class NullComparison(NamedTuple):
    """An observed value compared with the draws of a null.

    excess_t = excess / (sd sqrt(1 + 1/S)) follows Student's t with S - 1 degrees of freedom where the
    observed value is one more draw, so p = P(|t| > |excess_t|). For a null in closed form sd is exact and p normal.
    Both are None with fewer than LEAST_DRAWS draws, whose p could detect little, for draws that are all equal, and for
    a measure that the null preserves by construction.
    """

    null: str = ""
    mean: float | None = None
    sd: float | None = None
    excess: float | None = None
    excess_t: float | None = None
    p: float | None = None


@dataclass  # a frozen one takes seven times as long to construct, and there are tens of thousands
class Row:
    """One row of geometry.csv: a measure of one tensor or group against one null model.

    Begins with the fields of a `Place`.
    excess = value - null_mean; null_sd is the sample deviation over draws; excess_t and p as in `NullComparison`.
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


NEEDED_COLUMNS = ("name", "metric", "parameter", "value", "null")
"""Columns of geometry.csv without which it says nothing; earlier versions had fewer of the others."""


class Place(NamedTuple):
    """The columns of a row that identify its tensor or group."""

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


def detectable_excess(draws: int) -> float | None:
    """The smallest excess, in sd of the null, that has p < LEVEL with probability POWER; None where there is no p.

    For an observed value that is a draw of the null shifted by d sd, excess_t follows Student's noncentral t with
    S - 1 degrees of freedom and noncentrality d / sqrt(1 + 1/S); p < LEVEL on the other side is neglected.
    """
    if draws < LEAST_DRAWS:
        return None
    critical = stdtrit(draws - 1, 1 - LEVEL / 2)
    shift = nctdtrinc(draws - 1, 1 - POWER, critical)
    return float(shift * math.sqrt(1 + 1 / draws))


def why_no_p(draws: int) -> str:
    """The reason why this number of draws gives no p, with the remedy; empty where it does."""
    if draws >= LEAST_DRAWS:
        return ""
    plural = "" if draws == 1 else "s"
    return f"{draws} draw{plural}: no p; geometry.null_draws = {LEAST_DRAWS} or more"


def count_flagged(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """For each drawn null: the rows with a p, those below LEVEL, and how many a draw of the null itself would have.

    A description, not a test: rows of a matrix share the draws.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.p is not None and row.null != "closed_form":
            own = found.setdefault(row.null, {"rows": 0, "p_below_0.05": 0})
            own["rows"] += 1
            own["p_below_0.05"] += row.p < LEVEL
    for own in found.values():
        own["expected_of_the_null"] = FLAGGED_BY_CHANCE * own["rows"]
    return found


def _is_preserved(null: str, measure: Measure) -> bool:
    """Whether a null preserves this measure by construction."""
    return DETAIL.index(measure.decided_by) <= DETAIL.index(KEPT.get(null, "norm"))


def _compare_to_null(null: str, observed: Measure, values: Sequence[float]) -> NullComparison:
    """Compares `observed` with the draws `values` of a null."""
    if not values:
        return NullComparison(null)
    mean = math.fsum(values) / len(values)
    sd = None
    if len(values) > 1:
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    if observed.value is None:
        return NullComparison(null, mean, sd)
    excess = observed.value - mean
    if _is_preserved(null, observed) or sd is None or len(values) < LEAST_DRAWS:
        return NullComparison(null, mean, sd, excess)
    if abs(excess) <= EQUAL * max(abs(observed.value), abs(mean)):
        return NullComparison(null, mean, sd, excess, 0.0, 1.0)
    if sd <= EQUAL * abs(mean):
        return NullComparison(null, mean, sd, excess)
    t = excess / (sd * math.sqrt(1 + 1 / len(values)))
    return NullComparison(null, mean, sd, excess, t, 2 * float(stdtr(len(values) - 1, -abs(t))))


def rows_against_nulls(
    observed: Measure, draws: Mapping[str, Sequence[float]], place: Place
) -> list[Row]:
    """The rows of a measure: one per null, or a single one without nulls.

    draws: null -> the values of the same measure under its draws, where defined.
    """
    found = [_compare_to_null(null, observed, values) for null, values in draws.items()]
    if observed.chance is not None:
        found.append(_compare_to_closed_form(observed, *observed.chance))
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
        for its in found or [NullComparison()]
    ]


def _compare_to_closed_form(observed: Measure, mean: float, sd: float | None) -> NullComparison:
    """Compares `observed` with a null of known mean and standard deviation."""
    if observed.value is None:
        return NullComparison("closed_form", mean, sd)
    excess = observed.value - mean
    z = excess / sd if sd else None
    p = None if z is None else math.erfc(abs(z) / math.sqrt(2))
    return NullComparison("closed_form", mean, sd, excess, z, p)
