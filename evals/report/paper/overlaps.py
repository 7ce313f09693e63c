"""The rows of overlaps: how many of the coordinates that one training moved another moved too."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

from evals.report.page import rows_of
from evals.report.paper.numbers import (
    NO_DRAWN,
    NO_SIGNAL,
    Lacking,
    Number,
    Where,
    mean_of_draws,
    mean_of_null,
)
from evals.report.paper.pair import Pair
from evals.report.read import read_table

OVERLAP_COLUMNS = ("chance %", "covered %", "ratio", "ratio within |w|")
COVERED = ("first_covered_by_second", "second_covered_by_first")
ENRICHMENT = "overlap_enrichment_vs_random"
FINE = f"{ENRICHMENT}_within_tensors_and_magnitudes"
ATOL = "atol=1e-05"
Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str, str, str], Mapping[str, Row]]
"""{(first arm, second arm, metric, parameter): {null: row}} of overlap.csv."""
SHARED_PAIRS = "pairs of arms share arms: no p over pairs"


def overlap_rows(pair: Pair) -> Iterator[Number]:
    """One-sided coverage of the coordinates that moved by more than 1e-5: A's that B moved too.

    For every two trainings, and between the seeds of each.
    """
    path = pair.run.root / "geometry" / "overlap.csv"
    if len(pair.measured) < 2 or not path.exists():
        raise Lacking("no geometry/overlap.csv: measure two arms or more (geometry.arms)")
    table = read_table(path)
    table = table[table.name.eq("[all]")]
    table = table.assign(parameter=table.parameter.fillna(""), null=table.null.fillna(""))
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows_of(table):
        key = (row["first"], row["second"], row["metric"], row["parameter"])
        found.setdefault(key, {})[row["null"]] = row
    known = pair.groups(pair.measured)
    for a, b in product(known, known):
        if a is b and len(a.arms) < 2:
            continue
        label = f"{a.label}: between seeds" if a is b else f"{a.name} covered by {b.name}"
        two = list(combinations(a.arms, 2)) if a is b else list(product(a.arms, b.arms))
        for column in OVERLAP_COLUMNS:
            where = ("overlaps", pair.name, label, column)
            yield from _overlap_numbers(where, found, two, column)
            for null, arms in a.nulls.items():
                other = combinations(arms, 2) if a is b else product(arms, b.arms)
                cells = (_overlap(found, x, y, column) for x, y in other)
                values = [its.value for its in cells if its and its.value is not None]
                number = mean_of_null(where, null, values)
                yield number._replace(reason=number.reason or SHARED_PAIRS)
            if not a.nulls:
                yield Number(*where, "signal", "", reason=NO_SIGNAL)


class Cell(NamedTuple):
    """A column's value of an ordered pair of arms, and {null: row} of its drawn nulls."""

    value: float | None
    nulls: Mapping[str, Row]


def _overlap(rows: Rows, a: str, b: str, column: str) -> Cell | None:
    """The cell of the ordered pair (a, b); None where the pair is not measured."""
    ordered = (a, b, *COVERED) if (a, b, COVERED[0], ATOL) in rows else (b, a, *COVERED[::-1])
    first, second, covered, _ = ordered
    metric = {"ratio": ENRICHMENT, "ratio within |w|": FINE}.get(column, covered)
    own = rows.get((first, second, metric, ATOL))
    if own is None:
        return None
    value = next(iter(own.values()))["value"]
    value = None if value is None else _scale(column) * value
    if column == "chance %":  # the ratio is coverage over the density of B
        ratio = next(iter(rows[first, second, ENRICHMENT, ATOL].values()))["value"]
        return Cell(None if not ratio or value is None else value / ratio, {})
    return Cell(value, {null: row for null, row in own.items() if null})


def _scale(column: str) -> float:
    return 100.0 if column.endswith("%") else 1.0


def _overlap_numbers(
    where: Where, rows: Rows, two: Sequence[tuple[str, str]], column: str
) -> Iterator[Number]:
    cells = [its for a, b in two if (its := _overlap(rows, a, b, column))]
    values = [its.value for its in cells if its.value is not None]
    if not values:
        yield Number(*where, "update", "", reason="no coordinate moved by more than 1e-5")
        return
    found = Number(*where, "update", "", value=statistics.fmean(values), n=len(values))
    if len(values) > 1:
        found = found._replace(low=min(values), high=max(values), over="range of pairs")
    yield found
    if column == "chance %":
        reason = "the density of the second mask, which is chance itself"
        yield Number(*where, "drawn", "", reason=reason)
        return
    nulls: dict[str, list[Row]] = {}
    for cell in cells:
        for null, row in cell.nulls.items():
            if row["null_mean"] is not None:
                nulls.setdefault(null, []).append(row)
    for null, own in nulls.items():
        p = own[0]["p"] if len(cells) == 1 else None
        reason = "" if p is not None else SHARED_PAIRS if len(cells) > 1 else "no p for this null"
        number = mean_of_draws(Number(*where, "drawn", null), own, _scale(column))
        yield number._replace(p=p, reason=reason)
    if not nulls:
        yield Number(*where, "drawn", "", reason=NO_DRAWN)
