"""The rows of update geometry: size, sparsity, spectrum and place of an update, and its shares by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evals.report.paper.numbers import (
    NO_DRAWN,
    NO_ROW,
    NO_SIGNAL,
    Lacking,
    Number,
    mean_of_draws,
    mean_of_null,
    over_seeds,
)
from evals.report.paper.pair import Group, Key, Pair
from vlopd.update_geometry.paper import COLUMNS

KEEPS_NORMS = "a drawn null keeps the norm of every tensor, and so this share"
PARTS = (
    *(
        ("FFN %", "[part=ffn]"),
        ("attention %", "[part=attention]"),
        ("embedding %", "[part=embedding]"),
    ),
    *(("head %", "[part=head]"), ("norm %", "[part=norm]"), ("other %", "[part=other]")),
    *(("vision %", "[component=vision]"), ("projector %", "[component=projector]")),
    ("language %", "[component=language]"),
)
"""Columns of the module shares, with the rows of geometry.csv; the paper's first, then the components."""


def main_rows(pair: Pair) -> Iterator[Number]:
    """The update's size, sparsity, spectrum and place: one row for each training."""
    for group in _measured_groups(pair):
        for its in COLUMNS:
            title = its.title.replace("\n", " ")
            key = (its.metric, its.parameter, its.name)
            yield from _geometry_numbers(pair, "main", group, title, key, its.scale)


def module_rows(pair: Pair) -> Iterator[Number]:
    """Shares of the update's energy, in percent."""
    yield from _share_rows(pair, "modules", "energy_share", 100)


def density_rows(pair: Pair) -> Iterator[Number]:
    """Shares of the energy over shares of the parameters: 1 where a module moves as much as the whole does."""
    yield from _share_rows(pair, "modules-relative", "energy_share_over_parameter_share", 1)


def _share_rows(pair: Pair, table: str, metric: str, scale: float) -> Iterator[Number]:
    for group in _measured_groups(pair):
        for title, name in PARTS:
            shown = title if scale == 100 else title.removesuffix(" %")
            for number in _geometry_numbers(pair, table, group, shown, (metric, "", name), scale):
                if number.kind == "drawn" and number.p is None:
                    number = number._replace(reason=number.reason or KEEPS_NORMS)
                if number.kind == "update" and number.value is None:
                    number = number._replace(reason=f"the model has no {title.removesuffix(' %')}")
                yield number


def _measured_groups(pair: Pair) -> list[Group]:
    if not pair.measured:
        raise Lacking("no geometry: name arms in geometry.arms, then `vlopd geometry RUN`")
    return pair.groups(pair.measured)


def _geometry_numbers(
    pair: Pair, table: str, group: Group, column: str, key: Key, scale: float
) -> Iterator[Number]:
    """The number of a group, of each drawn null, and of each signal null."""
    where = (table, pair.name, group.label, column)
    values = [scale * value for value in pair.values(group.arms, key)]
    missing = f"no row {' '.join(filter(None, key))} in geometry.csv (geometry.ratios)"
    yield Number(*where, "update", "", **over_seeds(values), reason="" if values else missing)

    def tested(number: Number) -> Number:
        row = pair.groups_files.comparison(group.of, number.kind, number.null, key)
        return number if number.value is None or row is None else _with_test(number, row, scale)

    rows = [pair.geometry.get(arm, {}).get(key, {}) for arm in group.arms]
    nulls = dict.fromkeys(null for own in rows for null in own if null and null != "closed_form")
    for null in nulls:
        number = Number(*where, "drawn", null, n=pair.config.geometry.null_draws)
        yield tested(_of_draws(number, [its[null] for its in rows if null in its], scale))
    if not nulls:
        yield Number(*where, "drawn", "", reason=NO_DRAWN)
    for label, arms in group.nulls.items():
        number = mean_of_null(where, label, [scale * x for x in pair.values(arms, key)])
        yield tested(number._replace(reason=number.reason or NO_ROW))
    if not group.nulls:
        yield Number(*where, "signal", "", reason=NO_SIGNAL)


def _of_draws(number: Number, rows: Sequence[Mapping[str, Any]], scale: float) -> Number:
    """The number of a drawn null, with the p of the row of geometry.csv where there is one arm."""
    number = mean_of_draws(number, rows, scale)
    if number.value is None:
        return number._replace(reason="undefined for this null")
    if len(rows) > 1:
        return number._replace(reason="several seeds: no p without geometry/groups.csv")
    p = rows[0]["p"]
    why = "no p: this null keeps the measure, or has too few draws"
    return number._replace(p=p, reason="" if p is not None else why)


def _with_test(number: Number, row: Mapping[str, Any], scale: float) -> Number:
    """The number with difference (ratio, of what is compared as logarithms), interval and p of a row of groups.csv."""
    reason = row["reason"] or ("" if row["p"] is not None else "no p in geometry/groups.csv")
    is_log = row.get("scale") == "log"
    ends = (row["difference"], row["low"], row["high"])
    difference, low, high = (
        None if x is None else math.exp(x) if is_log else scale * x for x in ends
    )
    return number._replace(
        difference=difference,
        difference_low=low,
        difference_high=high,
        scale="ratio" if is_log else "difference",
        p=row["p"],
        q=row["q"],
        p_equivalent=row["p_equivalent"],
        equivalent=None if row["equivalent"] is None else str(row["equivalent"]) == "True",
        reason=str(reason),
    )
