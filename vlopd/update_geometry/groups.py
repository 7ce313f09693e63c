"""Geometry of the seeds of one training against those of a signal null and against drawn nulls.

group_values.csv has the measures of each arm, or of each pair of arms; groups.csv is computed from it alone, one row
per measure and null. Only measures of the whole model, a component, a module or a part: never of single tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlopd.config.analysis import GeometryConfig
from vlopd.config.roles import SignalNulls
from vlopd.update_geometry.checkpoint import write_table
from vlopd.update_geometry.group_statistics import (
    LEAST_ARMS,
    LEAST_PAIRED,
    Difference,
    Part,
    adjust,
    jackknife,
    pair_mean,
    welch,
    welch_to_draws,
)
from vlopd.update_geometry.schema import DETAIL, KEPT, LEAST_DRAWS

DIRECTION = "direction"
"""The family of measures of pairs of arms."""
PAIR = "|"
"""Between the names of a pair's arms."""


class Metric(NamedTuple):
    """A measure that is compared between groups, on its own scale or on that of its logarithm."""

    family: str
    metric: str
    parameters: tuple[str, ...]
    """Those of geometry.csv that are compared; empty: any."""
    names: tuple[str, ...]
    """Beginnings of the names of the rows, as in geometry.csv."""
    logarithmic: bool = False
    decided_by: str = "signs"
    """One of schema.DETAIL: drawn nulls that keep this part of the update have the same value."""


_SPECTRAL, _SUMS = ("[median]", "[component="), ("[all]", "[component=")
_GROUPS = ("[component=", "[module=", "[part=")
_PAIRS = ("[all]", "[median]", "[component=")
_RATIO = "ratio=0.1"
_COVERED = f"{_RATIO},atol=1e-05"
_TOP_MASK = "top_mask_overlap_over_chance"
_VISIBLE = "overlap_enrichment_vs_random_within_tensors_and_magnitudes"

METRICS = (
    Metric("spectrum", "stable_rank", (), _SPECTRAL, True),
    Metric("spectrum", "effective_rank_entropy", (), _SPECTRAL, True),
    Metric("spectrum", "top_energy_ratio", ("k=16",), _SPECTRAL),
    Metric("spectrum", "tail_energy_ratio", ("k=16",), _SPECTRAL, True),
    *(
        Metric("spectrum", f"{side}principal_projection_energy_ratio", (_RATIO,), _SPECTRAL, True)
        for side in ("", "left_", "right_")
    ),
    Metric("place", "energy_share", (), _GROUPS, decided_by="norm"),
    Metric("place", "energy_share_over_parameter_share", (), _GROUPS, True, "norm"),
    Metric("place", "principal_update_overlap_ratio", (_COVERED,), _SUMS, False, "places"),
    Metric("place", "low_magnitude_update_overlap_ratio", (_COVERED,), _SUMS, False, "places"),
    Metric("size", "relative_delta_fro", (), _SUMS, True, "norm"),
    Metric("size", "frac_delta_eq_0", ("",), _SUMS, decided_by="sizes"),
    Metric("size", "frac_isclose_zero", ("atol=1e-05",), _SUMS, decided_by="sizes"),
    Metric("size", "coord_top_energy_ratio", (_RATIO,), _SUMS, decided_by="sizes"),
    Metric(DIRECTION, "delta_cosine", (), _PAIRS),
    Metric(DIRECTION, _TOP_MASK, (), _PAIRS, True, "places"),
    Metric(DIRECTION, f"{_TOP_MASK}_within_magnitudes", (), _PAIRS, True, "places"),
    Metric(DIRECTION, _VISIBLE, ("atol=0",), _PAIRS, True, "places"),
    Metric(DIRECTION, "left_subspace_similarity", (), _PAIRS),
    Metric(DIRECTION, "right_subspace_similarity", (), _PAIRS),
)
"""All that is compared. A family's rows share one control of false discoveries."""
_BY_NAME = {its.metric: its for its in METRICS}
_TAIL = ("top_energy_ratio", "tail_energy_ratio")
"""The energy of all but the largest singular values is 1 - that of the largest."""


@dataclass(frozen=True)
class Value:
    """A row of group_values.csv: a measure of an arm, of a pair of arms, or of the drawn null of either.

    kind: `real`, `signal` (a signal null's arms), `mixed` (a pair of a real arm and a null's), or `drawn`, whose value
    is the mean of `draws` draws with deviation `sd`. of: the first of the real arms.
    """

    kind: str
    null: str
    of: str
    unit: str
    family: str
    metric: str
    parameter: str
    name: str
    value: float | None
    sd: float | None = None
    draws: int | None = None


@dataclass(frozen=True)
class GroupRow:
    """A row of groups.csv: a measure of the real arms against that of a null.

    kind: as in `Value`, of what the real arms (or pairs of them) are compared with. scale: `log` where difference,
    interval and margin are of the natural logarithm, and the means are geometric. n_real, n_null: arms, of directions
    too; of a drawn null the draws. q: p adjusted within the family of this null, all kinds together.
    """

    of: str
    null: str
    kind: str
    family: str
    metric: str
    parameter: str
    name: str
    n_real: int
    n_null: int
    real_mean: float | None
    null_mean: float | None
    scale: str
    difference: float | None
    low: float | None
    high: float | None
    test: str
    p: float | None
    q: float | None
    margin: float
    p_equivalent: float | None
    equivalent: bool | None
    reason: str


def write_groups(
    folder: Path, groups: Sequence[SignalNulls], config: GeometryConfig, level: float
) -> list[Path]:
    """Writes group_values and groups (.csv, .parquet) into a run's geometry folder; returns their paths.

    Reads ARM/geometry.parquet of the groups' arms and overlap.parquet there. level: confidence level of intervals and
    of equivalence.
    """
    values = list(group_values(folder, groups, config.null_draws))
    write_table(folder, "group_values", values)
    write_table(folder, "groups", compare_groups(values, config, level))
    return [
        folder / f"{table}.{end}"
        for table, end in product(("group_values", "groups"), ("csv", "parquet"))
    ]


def group_values(folder: Path, groups: Sequence[SignalNulls], draws: int) -> Iterator[Value]:
    """The compared measures of all groups' arms and pairs, from the tables in a run's geometry folder."""
    arms = {arm for group in groups for arm in (*group.of, *group.arms)}
    tables = {arm: _read(folder / arm / "geometry.parquet") for arm in sorted(arms)}
    pairs: dict[frozenset[str], list[dict[str, Any]]] = {}
    overlap = folder / "overlap.parquet"
    for row in _read(overlap) if overlap.exists() else ():
        pairs.setdefault(frozenset((row["first"], row["second"])), []).append(row)
    done = set()
    for group in groups:
        of = group.of[0]
        if of not in done:
            done.add(of)
            for arm in group.of:
                yield from _values("real", "", of, arm, tables[arm], draws)
            for a, b in combinations(group.of, 2):
                rows = pairs.get(frozenset((a, b)), [])
                yield from _values("real", "", of, f"{a}{PAIR}{b}", rows, draws)
        for arm in group.arms:
            yield from _values("signal", group.null, of, arm, tables[arm])
        for kind, couples in (
            ("signal", combinations(group.arms, 2)),
            ("mixed", product(group.of, group.arms)),
        ):
            for a, b in couples:
                rows = pairs.get(frozenset((a, b)), [])
                yield from _values(kind, group.null, of, f"{a}{PAIR}{b}", rows)


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table on aggregates."""
    table = pq.read_table(path)
    return table.filter(pc.starts_with(table["name"], "[")).to_pylist()


def _values(
    kind: str, null: str, of: str, unit: str, rows: Sequence[Mapping[str, Any]], draws: int = 0
) -> Iterator[Value]:
    """The compared measures of an arm's (or pair's) rows, and those of its drawn nulls where it has `draws`."""
    done = set()
    for row in rows:
        its = _BY_NAME.get(row["metric"])
        if its is None or (its.family == DIRECTION) != (PAIR in unit):
            continue
        if its.parameters and row["parameter"] not in its.parameters:
            continue
        if not row["name"].startswith(its.names):
            continue
        key = (its.family, its.metric, row["parameter"], row["name"])
        tail = (its.family, _TAIL[1], *key[2:]) if its.metric == _TAIL[0] else None
        value, mean, sd = row["value"], row["null_mean"], row["null_sd"]
        if key not in done:
            done.add(key)
            yield Value(kind, null, of, unit, *key, value)
            if tail:
                yield Value(kind, null, of, unit, *tail, None if value is None else 1 - value)
        if draws and row["null"] not in ("", "closed_form") and mean is not None:
            yield Value("drawn", row["null"], of, unit, *key, mean, sd, draws)
            if tail:
                yield Value("drawn", row["null"], of, unit, *tail, 1 - mean, sd, draws)


# ------------------------------------------------------------------------------------- comparison

_Key = tuple[str, str, str, str]
"""Family, metric, parameter, name."""
_Numbers = dict[frozenset[str], float]
"""{an arm, or the two of a pair: its value on the scale of the comparison}."""


class _Group(NamedTuple):
    """The values of one kind and null: its arms, and {measure: {unit: value}}."""

    arms: tuple[str, ...]
    values: dict[_Key, dict[frozenset[str], Value]]


def compare_groups(values: Sequence[Value], config: GeometryConfig, level: float) -> list[GroupRow]:
    """The rows of groups.csv from those of group_values.csv, of one run or several with distinct names of arms."""
    groups: dict[tuple[str, str, str], _Group] = {}
    for (of, null, kind), own in _grouped(values, lambda v: (v.of, v.null, v.kind)).items():
        arms = tuple(dict.fromkeys(arm for v in own for arm in v.unit.split(PAIR)))
        measures = _grouped(own, lambda v: (v.family, v.metric, v.parameter, v.name))
        groups[of, null, kind] = _Group(
            arms,
            {k: {frozenset(v.unit.split(PAIR)): v for v in its} for k, its in measures.items()},
        )
    rows = []
    for (of, null, kind), group in groups.items():
        if kind == "real" or (of, "", "real") not in groups:
            continue
        real = groups[of, "", "real"]
        null_arms = groups[of, null, "signal"].arms if kind == "mixed" else group.arms
        keys = dict.fromkeys((*(real.values if kind == "signal" else ()), *group.values))
        for key in keys:
            sides = real.arms, null_arms, real.values.get(key, {}), group.values.get(key, {})
            rows.append(_compare(of, null, kind, key, *sides, config, level))
    found = []
    for own in _grouped(rows, lambda row: (row.of, row.null, row.family)).values():
        qs = adjust([row.p for row in own])
        found += [replace(row, q=q) for row, q in zip(own, qs, strict=True)]
    return found


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by key, in the order of first appearance."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _compare(
    of: str,
    null: str,
    kind: str,
    key: _Key,
    arms: Sequence[str],
    null_arms: Sequence[str],
    real_values: Mapping[frozenset[str], Value],
    null_values: Mapping[frozenset[str], Value],
    config: GeometryConfig,
    level: float,
) -> GroupRow:
    """The row of one measure; q is left out."""
    metric = _BY_NAME[key[1]]
    logarithmic, paired = metric.logarithmic, metric.family == DIRECTION
    margin = math.log(config.equal_ratio) if logarithmic else config.equal_difference
    draws = max((v.draws or 0 for v in null_values.values()), default=0)
    units = [frozenset(c) for c in (combinations(arms, 2) if paired else zip(arms))]
    if kind == "mixed":
        null_units = [frozenset(pair) for pair in product(arms, null_arms)]
    elif paired:
        null_units = [frozenset(pair) for pair in combinations(null_arms, 2)]
    else:
        null_units = [frozenset((arm,)) for arm in null_arms]
    real, why = _numbers(real_values, units, logarithmic)
    nulls, why_null = _numbers(null_values, null_units, logarithmic)
    reason = why or why_null or _too_few(metric, null, kind, arms, null_arms, draws)
    if kind == "drawn" and _is_kept(metric, null):
        reason = f"{null} keeps it by construction"
    means = [math.fsum(x.values()) / len(x) if x else None for x in (real, nulls)]
    found = None
    if means[0] is not None and means[1] is not None:
        found = Difference(means[0] - means[1], reason=reason)
        if not reason:
            sides = arms, null_arms, real, nulls, null_values
            found = _test(kind, paired, logarithmic, *sides, margin, level)
    shown = [math.exp(x) if logarithmic and x is not None else x for x in means]
    return GroupRow(
        of=of,
        null=null,
        kind=kind,
        family=key[0],
        metric=key[1],
        parameter=key[2],
        name=key[3],
        n_real=len(arms),
        n_null=draws if kind == "drawn" else len(null_arms),
        real_mean=shown[0],
        null_mean=shown[1],
        scale="log" if logarithmic else "linear",
        difference=found and found.value,
        low=found and found.low,
        high=found and found.high,
        test="jackknife" if paired else "welch",
        p=found and found.p,
        q=None,
        margin=margin,
        p_equivalent=found and found.p_equivalent,
        equivalent=None
        if found is None or found.p_equivalent is None
        else found.p_equivalent <= 1 - level,
        reason=found.reason if found else reason,
    )


def _numbers(
    values: Mapping[frozenset[str], Value], units: Sequence[frozenset[str]], logarithmic: bool
) -> tuple[_Numbers, str]:
    """The values of all units on the scale of the comparison, or none with the reason."""
    found: _Numbers = {}
    for unit in units:
        name, its = PAIR.join(sorted(unit)), values.get(unit)
        if its is None or its.value is None or not math.isfinite(its.value):
            return {}, f"not measured in {name}"
        if logarithmic and its.value <= 0:
            return {}, f"{its.value:g} in {name}: no logarithm"
        found[unit] = math.log(its.value) if logarithmic else its.value
    return found, ""


def _too_few(
    metric: Metric,
    null: str,
    kind: str,
    arms: Sequence[str],
    null_arms: Sequence[str],
    draws: int,
) -> str:
    """The reason for which there are too few arms for a test, if so."""
    paired = metric.family == DIRECTION
    least = LEAST_PAIRED if paired else LEAST_ARMS
    if len(arms) < least:
        return f"{_count(arms)} with the signal; a test needs {least}"
    if kind == "drawn":
        return (
            ""
            if draws >= LEAST_DRAWS
            else f"{draws} draw{'s'[: draws != 1]} of {null}; a test needs {LEAST_DRAWS}"
        )
    least = LEAST_ARMS if kind == "mixed" else least
    return "" if len(null_arms) >= least else f"{_count(null_arms)} of {null}; a test needs {least}"


def _count(arms: Sequence[str]) -> str:
    return f"{len(arms)} arm" if len(arms) == 1 else f"{len(arms)} arms"


def _is_kept(metric: Metric, null: str) -> bool:
    """Whether a drawn null has the same value by construction."""
    return DETAIL.index(metric.decided_by) <= DETAIL.index(KEPT.get(null, "norm"))


def _test(
    kind: str,
    paired: bool,
    logarithmic: bool,
    arms: Sequence[str],
    null_arms: Sequence[str],
    real: _Numbers,
    nulls: _Numbers,
    null_values: Mapping[frozenset[str], Value],
    margin: float,
    level: float,
) -> Difference:
    """The difference of two groups that are large enough."""
    largest = max(map(abs, (*real.values(), *nulls.values())))
    if kind == "drawn":
        excess = {unit: real[unit] - nulls[unit] for unit in real}
        mean = _variance_of_mean(null_values.values(), logarithmic)
        if not paired:
            return welch_to_draws(list(excess.values()), mean, margin, level, largest)

        def above(its: Sequence[str]) -> float:
            return pair_mean(excess, its, its)

        return jackknife(above, [arms], margin, level, largest, [mean])
    if not paired:
        return welch(list(real.values()), list(nulls.values()), margin, level)
    pairs = real | nulls

    def difference(its: Sequence[str], others: Sequence[str]) -> float:
        one = its if kind == "mixed" else others
        return pair_mean(pairs, its, its) - pair_mean(pairs, one, others)

    return jackknife(difference, [arms, null_arms], margin, level, largest)


def _variance_of_mean(values: Collection[Value], logarithmic: bool) -> Part:
    """The variance of a drawn null's mean, averaged over arms."""
    draws, variances = 0, []
    for its in values:
        draws = its.draws or 0
        assert its.value is not None and its.sd is not None
        sd = its.sd / its.value if logarithmic else its.sd
        variances.append(sd**2 / draws)
    return Part(math.fsum(variances) / len(variances), draws - 1)
