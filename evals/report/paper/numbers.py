"""One number of the paper's tables, with its interval, its null and the reason where something lacks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scipy.stats import t as student

NO_SIGNAL = 'no signal null: add arms with null = "rademacher" for the seeds of this one, also to geometry.arms'
NO_DRAWN = "no null was drawn (geometry.null_draws)"
NO_ROW = "no row in geometry/groups.csv, so no p"
Where = tuple[str, str, str, str]
"""The (table, pair, row, column) of a number."""


class Number(NamedTuple):
    """One cell of a table. `value`, `low`, `high` and `sd` are in the unit of `column`.

    kind "update": the mean over n arms with its interval (over training seeds where n > 1); "drawn" and "signal": a
    null's mean and standard deviation over n draws or arms, and the update's difference to it with interval and p.
    """

    table: str
    pair: str
    row: str
    column: str
    kind: str
    null: str
    value: float | None = None
    n: int | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    over: str = ""
    """What the interval is over: `seeds` or `questions`."""
    difference: float | None = None
    """Update minus null in the unit of the column, or their ratio where `scale` is "ratio"."""
    difference_low: float | None = None
    difference_high: float | None = None
    scale: str = "difference"
    p: float | None = None
    q: float | None = None
    p_equivalent: float | None = None
    equivalent: bool | None = None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The numbers of one table over all pairs, and the pairs that it lacks with the reason."""

    title: str
    columns: tuple[str, ...]
    numbers: list[Number] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Lacking(Exception):
    """Why a run has no rows for a table."""


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean, n and, of two or more values, standard deviation and Student's t interval over them."""
    n = len(values)
    found: dict[str, Any] = {"value": statistics.fmean(values) if n else None, "n": n or None}
    if n > 1:
        sd = statistics.stdev(values)
        half = float(student.ppf((1 + confidence) / 2, n - 1)) * sd / n**0.5
        found |= {
            "sd": sd,
            "low": found["value"] - half,
            "high": found["value"] + half,
            "over": "seeds",
        }
    return found


def mean_of_draws(number: Number, rows: Sequence[Mapping[str, Any]], scale: float) -> Number:
    """The number with a drawn null's mean and deviation over draws, averaged over rows of a geometry file."""
    means = [scale * row["null_mean"] for row in rows if row["null_mean"] is not None]
    sds = [scale * row["null_sd"] for row in rows if row["null_sd"] is not None]
    return number._replace(
        value=statistics.fmean(means) if means else None, sd=statistics.fmean(sds) if sds else None
    )


def mean_of_null(where: Where, label: str, values: Sequence[float]) -> Number:
    """The mean and deviation of a signal null's arms."""
    found = Number(*where, "signal", label, n=len(values) or None)
    if not values:
        return found._replace(reason=f"not measured of the arms of {label}")
    sd = statistics.stdev(values) if len(values) > 1 else None
    return found._replace(value=statistics.fmean(values), sd=sd)
