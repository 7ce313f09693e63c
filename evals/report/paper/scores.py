"""The scores of arms beside those of their nulls: density, held-out curve, test score and recovery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from evals.report.paper.numbers import NO_SIGNAL, Number, Where, mean_of_null, over_seeds
from evals.report.paper.pair import Pair

CURVES = {"held-out final %": "final", "mean of last 5 %": "last", "peak %": "peak"}
NO_RANDOM = "no random mask of this mask, or training of all coordinates"
SCORES = ("density %", *CURVES, "test %", "recovery")
Nulls = Mapping[Literal["drawn", "signal"], Mapping[str, Sequence[str]]]
"""{kind: {null: arms}}: the arms under random masks, and those of signal nulls."""


def score_numbers(
    pair: Pair,
    where: Where,
    arms: Sequence[str],
    nulls: Nulls | None,
) -> Iterator[Number]:
    """The mean score of arms in a column of SCORES, and that of each of their nulls; None for arms that are nulls."""
    column = where[-1]
    values = _scores(pair, arms, column)
    found = Number(*where, "update", "", **over_seeds(values))
    if column == "density %":  # chosen, not estimated
        found = found._replace(sd=None, low=None, high=None, over="")
    if len(values) == 1 and (ends := _interval(pair, arms[0], column)):
        found = found._replace(low=ends[0], high=ends[1], over="questions")
    if not values:
        found = found._replace(reason=_why_no_score(column))
    yield found
    for kind, named in ({} if nulls is None else nulls).items():
        for null, others in named.items():
            number = mean_of_null(where, null, _scores(pair, others, column))._replace(kind=kind)
            if number.value is not None and column == "test %":
                number = _with_contrast(pair, number, arms[0], others)
            elif number.value is not None and column != "density %":
                number = number._replace(reason="tested on the test score alone")
            yield number if column != "density %" else number._replace(sd=None)
        if not named:
            yield Number(*where, kind, "", reason=NO_SIGNAL if kind == "signal" else NO_RANDOM)


def _scores(pair: Pair, arms: Sequence[str], column: str) -> list[float]:
    """The values of these arms in a column of SCORES, of those that have one."""
    found = (_score(pair, arm, column) for arm in arms)
    return [float(value) for value in found if value is not None]


def _score(pair: Pair, arm: str, column: str) -> float | None:
    if column in CURVES:
        curve = pair.curves.get(arm)
        return None if curve is None else 100 * curve[CURVES[column]]
    if column == "density %":
        density = pair.records.get(arm, {}).get("density")
        return None if density is None else 100 * density
    entry = pair.scored(arm)
    if entry is None:
        return None
    return entry["recovery"]["value"] if column == "recovery" else 100 * entry["mean"]


def _interval(pair: Pair, arm: str, column: str) -> tuple[float, float] | None:
    """The interval over questions of one arm's test score or recovery."""
    entry = pair.scored(arm)
    if entry is None or column not in ("test %", "recovery"):
        return None
    if column == "recovery" and pair.config.roles.of[arm] in ("full", "base"):
        return None  # 1 and 0 by definition
    scale = 100 if column == "test %" else 1
    low, high = (entry if column == "test %" else entry["recovery"])["interval"] or (None, None)
    return None if low is None or high is None else (scale * low, scale * high)


def _why_no_score(column: str) -> str:
    if column in CURVES:
        return "no held-out curve: set eval.during before training"
    if column == "density %":
        return "not recorded"
    return "not evaluated: `vlopd eval RUN`, `vlopd compare RUN`"


def _with_contrast(pair: Pair, number: Number, arm: str, others: Sequence[str]) -> Number:
    """The number with the paired difference over questions of compare.json, if it has that contrast."""
    sides = (list(others), others[0] if len(others) == 1 else None)
    known = [its["difference"] for its in pair.entry["controls"]] + list(pair.entry["contrasts"])
    its = next((c for c in known if c["a"] == arm and (c["b"] in sides)), None)
    if its is None:
        return number._replace(
            reason="no such contrast in compare.json: declare it in eval.contrasts"
        )
    low, high = its["interval"]
    return number._replace(
        difference=100 * its["mean"],
        difference_low=100 * low,
        difference_high=100 * high,
        p=its["p"],
    )
