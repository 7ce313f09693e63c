"""The tables of arXiv 2606.13657 from run folders: each number with its interval, drawn null and signal null.

Reads files only. A number is a `Number`: of an update (`kind` "update"), or of a null beside it ("drawn", "signal");
one that a run lacks has no value and a reason. evals/report/paper_pages.py lays them out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any, NamedTuple

from scipy.stats import t as student

from evals.report import groups, tables
from evals.report.page import rows_of
from evals.report.read import read_table
from evals.report.tuning import chosen_points, read_sweeps
from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import MaskConfig, RandomMask
from vlopd.files import read_json, read_jsonl
from vlopd.run.folder import RunFolder
from vlopd.update_geometry.paper import COLUMNS

Key = tuple[str, str, str]
"""(metric, parameter, name) of a geometry row."""
NO_SIGNAL = 'no signal null: add arms with null = "rademacher" for the seeds of this one, also to geometry.arms'
NO_DRAWN = "no null was drawn (geometry.null_draws)"
KEEPS_NORMS = "a drawn null keeps the norm of every tensor, and so this share"
SHARED_PAIRS = "pairs of arms share arms: no p over pairs"
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
CURVE = ("final", "last", "peak")
CURVE_TITLES = ("held-out final %", "mean of last 5 %", "peak %")


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


class Group(NamedTuple):
    """Arms that differ only in seeds, named after the first, with the signal nulls of them."""

    name: str
    arms: tuple[str, ...]
    nulls: Mapping[str, tuple[str, ...]]
    of: str
    """The arm that geometry/groups.csv names the group by."""

    @property
    def label(self) -> str:
        n = len(self.arms)
        return f"{self.name}, {n} seeds" if n > 1 else f"{self.name}, n = 1"


class Lacking(Exception):
    """Why a run has no rows for a table."""


class Pair:
    """One run's files."""

    def __init__(self, name: str, run: RunFolder, config: ExperimentConfig):
        self.name, self.run, self.config = name, run, config
        self.groups_files = groups.read_groups(run)
        self.labels = self.groups_files.labels()
        self.compared: Mapping[str, Any] = read_json(run.compare) if run.compare.exists() else {}
        tasks = self.compared.get("tasks", {})
        self.task = next((name for name, its in tasks.items() if not its["group"]), None)
        self.entry: Mapping[str, Any] = tasks[self.task] if self.task else {}

    @cached_property
    def measured(self) -> list[str]:
        """The arms whose geometry is measured."""
        arms = self.config.geometry.arms
        return [arm for arm in arms if (self.run.geometry(arm) / "summary.json").exists()]

    def groups(self, arms: Sequence[str]) -> list[Group]:
        """These arms in groups of one training, without the signal nulls, full first."""
        roles = self.config.roles
        found, seen = [], set(self.labels)
        for arm in sorted(arms, key=lambda arm: roles.of[arm] != "full"):
            if arm in seen:
                continue
            alike = next((its for its in roles.seed_groups if arm in its), (arm,))
            alike = tuple(its for its in alike if its in arms and its not in self.labels)
            seen.update(alike)
            of = next((each for each in alike if self.groups_files.nulls_of(each)), alike[0])
            name = alike[0].removesuffix("-0") if len(alike) > 1 else arm
            found.append(Group(name, alike, self.groups_files.nulls_of(of), of))
        return found

    @cached_property
    def geometry(self) -> dict[str, dict[Key, dict[str, dict[str, Any]]]]:
        """{arm: {(metric, parameter, name): {null: row}}} of aggregate rows."""
        found: dict[str, dict[Key, dict[str, dict[str, Any]]]] = {}
        for arm in self.measured:
            table = read_table(self.run.geometry(arm) / "geometry.csv")
            table = table[table.name.str.startswith("[")]
            text = ("metric", "parameter", "name", "null", "reason")
            table = table.assign(**{column: table[column].fillna("") for column in text})
            own = found.setdefault(arm, {})
            for row in rows_of(table):
                own.setdefault((row["metric"], row["parameter"], row["name"]), {})[row["null"]] = (
                    row
                )
        return found

    def values(self, arms: Sequence[str], key: Key) -> list[float]:
        """The values of a measure in these arms, of those that have one."""
        rows = (next(iter(self.geometry.get(arm, {}).get(key, {}).values()), None) for arm in arms)
        return [row["value"] for row in rows if row is not None and row["value"] is not None]

    @cached_property
    def curves(self) -> dict[str, dict[str, float]]:
        """{arm: final, mean of the last five and peak} of the first held-out task."""
        table = tables.held_out(tables.held_out_scores(self.run, self.config))
        if table.empty:
            return {}
        first = table[table.task == table.task.iloc[0]]
        return {row["arm"]: row for row in first.to_dict("records")}

    def is_shown(self, arm: str) -> bool:
        """Whether an arm has scores; candidates of a sweep have only a curve, and are not compared."""
        return arm in (self.entry["arms"] if self.entry else self.curves)

    @cached_property
    def records(self) -> dict[str, Any]:
        return tables.arm_records(self.run, self.config)

    def scored(self, arm: str) -> Mapping[str, Any] | None:
        """The entry of an arm in the comparison on the first task."""
        found: Mapping[str, Any] | None = self.entry.get("arms", {}).get(arm)
        return found


# ------------------------------------------------------------------------------------ update geometry


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
    rows = [pair.geometry.get(arm, {}).get(key, {}) for arm in group.arms]
    nulls = dict.fromkeys(null for own in rows for null in own if null and null != "closed_form")
    for null in nulls:
        own = [its[null] for its in rows if null in its]
        yield _drawn_number(pair, where, group, null, own, key, scale)
    if not nulls:
        yield Number(*where, "drawn", "", reason=NO_DRAWN)
    yield from _signal_numbers(pair, where, group, values, key, scale)


def _drawn_number(
    pair: Pair,
    where: tuple[str, str, str, str],
    group: Group,
    null: str,
    rows: Sequence[Mapping[str, Any]],
    key: Key,
    scale: float,
) -> Number:
    """A drawn null's mean and deviation over draws, averaged over the group's arms."""
    means = [scale * row["null_mean"] for row in rows if row["null_mean"] is not None]
    sds = [scale * row["null_sd"] for row in rows if row["null_sd"] is not None]
    found = Number(*where, "drawn", null, n=pair.config.geometry.null_draws)
    if not means:
        return found._replace(reason="undefined for this null")
    found = found._replace(value=statistics.fmean(means), sd=statistics.fmean(sds) if sds else None)
    tested = pair.groups_files.comparison(group.of, "drawn", null, key)
    if tested is not None:
        return _with_test(found, tested, scale)
    if len(rows) == 1:
        p = rows[0]["p"]
        why = "no p: this null keeps the measure, or has too few draws"
        return found._replace(p=p, reason="" if p is not None else why)
    return found._replace(reason="several seeds: no p without geometry/groups.csv")


def _signal_numbers(
    pair: Pair,
    where: tuple[str, str, str, str],
    group: Group,
    own: Sequence[float],
    key: Key,
    scale: float,
) -> Iterator[Number]:
    if not group.nulls:
        yield Number(*where, "signal", "", reason=NO_SIGNAL)
    for label, arms in group.nulls.items():
        found = _mean_of_null(where, label, [scale * x for x in pair.values(arms, key)])
        tested = pair.groups_files.comparison(group.of, "signal", label, key)
        if found.value is not None and tested is not None:
            found = _with_test(found, tested, scale)
        elif found.value is not None:
            found = found._replace(reason="no row in geometry/groups.csv, so no p")
        yield found


def _mean_of_null(where: tuple[str, str, str, str], label: str, values: Sequence[float]) -> Number:
    """The mean and deviation of a signal null's arms."""
    found = Number(*where, "signal", label, n=len(values) or None)
    if not values:
        return found._replace(reason=f"not measured of the arms of {label}")
    sd = statistics.stdev(values) if len(values) > 1 else None
    return found._replace(value=statistics.fmean(values), sd=sd)


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


# -------------------------------------------------------------------------------------- mask overlaps

COVERED = ("first_covered_by_second", "second_covered_by_first")
ENRICHMENT = "overlap_enrichment_vs_random"
FINE = f"{ENRICHMENT}_within_tensors_and_magnitudes"
ATOL = "atol=1e-05"


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
                cells = [_overlap(found, x, y, column) for x, y in other]
                values = [its["value"] for its in cells if its and its["value"] is not None]
                number = _mean_of_null(where, null, values)
                yield number._replace(reason=number.reason or SHARED_PAIRS)
            if not a.nulls:
                yield Number(*where, "signal", "", reason=NO_SIGNAL)


OVERLAP_COLUMNS = ("chance %", "covered %", "ratio", "ratio within |w|")


def _overlap(
    rows: Mapping[tuple[str, str, str, str], Mapping[str, Mapping[str, Any]]],
    a: str,
    b: str,
    column: str,
) -> dict[str, Any] | None:
    """A column's value of the ordered pair (a, b), and {null: (mean, sd)}; None where the pair is not measured."""
    ordered = (a, b, *COVERED) if (a, b, COVERED[0], ATOL) in rows else (b, a, *COVERED[::-1])
    first, second, covered, _ = ordered
    metric = {"ratio": ENRICHMENT, "ratio within |w|": FINE}.get(column, covered)
    own = rows.get((first, second, metric, ATOL))
    if own is None:
        return None
    one = next(iter(own.values()))
    scale = 100.0 if column.endswith("%") else 1.0
    if column == "chance %":  # the ratio is coverage over the density of B
        ratio = next(iter(rows[first, second, ENRICHMENT, ATOL].values()))["value"]
        value = None if not ratio or one["value"] is None else scale * one["value"] / ratio
        return {"value": value, "nulls": {}}
    value = None if one["value"] is None else scale * one["value"]
    nulls = {
        null: (
            scale * row["null_mean"],
            None if row["null_sd"] is None else scale * row["null_sd"],
            row["p"],
        )
        for null, row in own.items()
        if null and row["null_mean"] is not None
    }
    return {"value": value, "nulls": nulls}


def _overlap_numbers(
    where: tuple[str, str, str, str],
    rows: Mapping[tuple[str, str, str, str], Mapping[str, Mapping[str, Any]]],
    two: Sequence[tuple[str, str]],
    column: str,
) -> Iterator[Number]:
    cells = [its for a, b in two if (its := _overlap(rows, a, b, column))]
    values = [its["value"] for its in cells if its["value"] is not None]
    if not values:
        yield Number(*where, "update", "", reason="no coordinate moved by more than 1e-5")
        return
    mean = statistics.fmean(values)
    spread = (
        {"low": min(values), "high": max(values), "over": "range of pairs"}
        if len(values) > 1
        else {}
    )
    yield Number(*where, "update", "", value=mean, n=len(values), **spread)
    if column == "chance %":
        yield Number(
            *where, "drawn", "", reason="the density of the second mask, which is chance itself"
        )
        return
    nulls = dict.fromkeys(null for its in cells for null in its["nulls"])
    for null in nulls:
        means = [its["nulls"][null][0] for its in cells if null in its["nulls"]]
        sds = [
            sd
            for its in cells
            if null in its["nulls"] and (sd := its["nulls"][null][1]) is not None
        ]
        p = cells[0]["nulls"][null][2] if len(cells) == 1 else None
        reason = "" if p is not None else SHARED_PAIRS if len(cells) > 1 else "no p for this null"
        yield Number(
            *where,
            "drawn",
            null,
            value=statistics.fmean(means),
            sd=statistics.fmean(sds) if sds else None,
            p=p,
            reason=reason,
        )
    if not nulls:
        yield Number(*where, "drawn", "", reason=NO_DRAWN)


# ----------------------------------------------------------------------------------------- retraining


def retraining_rows(pair: Pair) -> Iterator[Number]:
    """Full training and the arms retrained under masks: density, held-out curve, test score and recovery."""
    arms = [arm for arm, its in pair.config.arms.items() if isinstance(its, DistillArm)]
    masked = [arm for arm in arms if _mask(pair, arm)]
    if not masked:
        raise Lacking("no arm is retrained under a mask: add one with mask = NAME")
    if not pair.entry and not pair.curves:
        raise Lacking("no scores: `vlopd eval RUN`, then `vlopd compare RUN`")
    shown = [arm for arm in masked if pair.is_shown(arm)]
    rows = _mask_groups(pair, shown)
    full = next(
        (g for g in pair.groups([a for a in arms if a not in masked]) if _is_full(pair, g)), None
    )
    if full is not None:
        yield from _score_rows(pair, "retraining", full.label, full.arms, full.nulls, None)
    for label, members in rows:
        signal, drawn = _controls_of(pair, members[0])
        is_control = pair.config.roles.of[members[0]] == "control"
        beside = None if is_control else drawn
        yield from _score_rows(
            pair, "retraining", label, members, {} if is_control else signal, beside, is_control
        )


SCORES = ("density %", *CURVE_TITLES, "test %", "recovery")


def _is_full(pair: Pair, group: Group) -> bool:
    return pair.config.roles.of[group.arms[0]] == "full"


def _mask(pair: Pair, arm: str) -> str | None:
    its = pair.config.arms[arm]
    return its.mask if isinstance(its, DistillArm) else None


def _mask_groups(pair: Pair, arms: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(label, arms) of the masked arms that differ only in the training seed or in the draw of the mask."""
    alike: dict[str, list[str]] = {}
    for arm in arms:
        its = pair.config.arms[arm]
        rule = pair.config.masks[_mask(pair, arm) or ""]
        drawn = isinstance(rule, RandomMask)
        which = rule.model_dump_json(exclude={"seed"}) if drawn else _mask(pair, arm)
        alike.setdefault(
            f"{which} {its.model_dump_json(exclude={'seed', 'mask', 'role'})}", []
        ).append(arm)
    found = []
    for members in alike.values():
        name = _mask(pair, members[0]) or ""
        words = _mask_words(pair, name, pair.config.masks[name])
        n = f"mean of {len(members)}" if len(members) > 1 else "n = 1"
        names = members[0] if len(members) == 1 else members[0].removesuffix("-0")
        found.append((f"{names} ({words}), {n}", tuple(members)))
    return found


def _mask_words(pair: Pair, name: str, rule: MaskConfig) -> str:
    """The origin of a mask: `mask of sft`, `mask of the rademacher null`, `random like top, per tensor`."""
    if isinstance(rule, RandomMask):
        return f"random like {rule.like}, per {rule.match}"
    of = (rule.reads or "").partition("@")[0]
    if of in pair.labels:
        return f"mask {name} of the null {pair.labels[of]}"
    return f"mask {name} of {rule.reads}" if rule.reads else f"mask {name}"


def _controls_of(
    pair: Pair, arm: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """({label: arms} under signal-null masks, {kind: arms} under random ones) of the controls of an arm."""
    mine = [its for its in pair.entry.get("controls", ()) if its["arm"] == arm]
    signal, drawn = {}, {}
    for its in mine:
        arms = tuple(its["arms"])
        rule = pair.config.masks[_mask(pair, arms[0]) or ""]
        of = (rule.reads or "").partition("@")[0]
        if of in pair.labels:
            signal[pair.labels[of]] = arms
        elif isinstance(rule, RandomMask):
            drawn[its["kind"]] = arms
    return signal, drawn


def _score_rows(
    pair: Pair,
    table: str,
    label: str,
    arms: Sequence[str],
    signal: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Sequence[str]] | None,
    is_control: bool = False,
) -> Iterator[Number]:
    """The scores of arms, and of the arms that are their nulls."""
    for column in SCORES:
        yield from _score_numbers(
            pair, (table, pair.name, label, column), arms, signal, drawn, is_control
        )


def _score_numbers(
    pair: Pair,
    where: tuple[str, str, str, str],
    arms: Sequence[str],
    signal: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Sequence[str]] | None,
    is_control: bool = False,
) -> Iterator[Number]:
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
    if is_control:
        return
    for kind, named in (("drawn", drawn or {}), ("signal", signal)):
        for null, others in named.items():
            number = _mean_of_null(where, null, _scores(pair, others, column))._replace(kind=kind)
            if number.value is not None and column == "test %":
                number = _with_contrast(pair, number, arms[0], others)
            elif number.value is not None and column != "density %":
                number = number._replace(reason="tested on the test score alone")
            yield number if column != "density %" else number._replace(sd=None)
        if not named:
            reason = (
                NO_SIGNAL
                if kind == "signal"
                else "no random mask of this mask, or training of all coordinates"
            )
            yield Number(*where, kind, "", reason=reason)


def _scores(pair: Pair, arms: Sequence[str], column: str) -> list[float]:
    """The values of these arms in a column of SCORES."""
    found = []
    for arm in arms:
        if column in CURVE_TITLES:
            its: Mapping[str, Any] | None = pair.curves.get(arm)
            key = CURVE[CURVE_TITLES.index(column)]
            value = None if its is None else 100 * its[key]
        elif column == "density %":
            density = pair.records.get(arm, {}).get("density")
            value = None if density is None else 100 * density
        else:
            entry = pair.scored(arm)
            value = None if entry is None else 100 * entry["mean"]
            if column == "recovery":
                value = None if entry is None else entry["recovery"]["value"]
        if value is not None:
            found.append(float(value))
    return found


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
    if column in CURVE_TITLES:
        return "no held-out curve: set eval.during before training"
    return (
        "not recorded"
        if column == "density %"
        else "not evaluated: `vlopd eval RUN`, `vlopd compare RUN`"
    )


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


# ----------------------------------------------------------------------------------------- optimizers

EVIDENCE = (
    ("cos(m, g) first", "momentum_alignment", lambda values: values[0]),
    ("cos(m, g) mean", "momentum_alignment", statistics.fmean),
    ("cos(m, g) last", "momentum_alignment", lambda values: values[-1]),
    ("sd/mean sqrt(v)", "sqrt_v_variation", statistics.fmean),
    ("unmoved bf16 %", "unmoved_bf16_fraction", lambda values: 100 * statistics.fmean(values)),
)
"""Columns of optimizer.jsonl over the steps at which it is written, all coordinates together."""
OPTIMIZER_COLUMNS = ("learning rate", *CURVE_TITLES, "test %", *(its[0] for its in EVIDENCE))

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
        for column in OPTIMIZER_COLUMNS:
            where = ("optimizers", pair.name, label, column)
            if column in SCORES:
                yield from _score_numbers(pair, where, group.arms, group.nulls, None)
                continue
            if column == "learning rate":
                rates = [_learning_rate(pair, arm) for arm in group.arms]
                yield Number(*where, "update", "", value=rates[0], n=len(rates))
                continue
            values = [x for arm in group.arms if (x := _evidence(pair, arm, column)) is not None]
            reason = "" if values else _why_no_evidence(pair, group.arms[0], column)
            yield Number(*where, "update", "", **over_seeds(values), reason=reason)
            yield Number(
                *where, "drawn", "", reason="a drawn null has no training, and so no moments"
            )
            for null, others in group.nulls.items():
                found = [x for arm in others if (x := _evidence(pair, arm, column)) is not None]
                number = _mean_of_null(where, null, found)
                yield number._replace(
                    reason=number.reason or "no row in geometry/groups.csv, so no p"
                )
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


def _evidence(pair: Pair, arm: str, column: str) -> float | None:
    path = pair.run.arm(arm) / "optimizer.jsonl"
    _, key, fold = next(its for its in EVIDENCE if its[0] == column)
    rows = read_jsonl(path) if path.exists() else []
    values = [row[key] for row in rows if row["module"] == "all" and row[key] is not None]
    return fold(values) if values else None


# --------------------------------------------------------------------------------------------- all

TABLES: Mapping[str, tuple[str, tuple[str, ...], Callable[[Pair], Iterator[Number]]]] = {
    "main": (
        "Size, sparsity, spectrum and place of the update",
        tuple(its.title.replace("\n", " ") for its in COLUMNS),
        main_rows,
    ),
    "modules": (
        "Shares of the update's energy",
        tuple(title for title, _ in PARTS),
        module_rows,
    ),
    "modules-relative": (
        "Shares of the energy over shares of the parameters",
        tuple(title.removesuffix(" %") for title, _ in PARTS),
        density_rows,
    ),
    "overlaps": ("Coordinates moved by both of two trainings", OVERLAP_COLUMNS, overlap_rows),
    "retraining": ("Retraining under masks", SCORES, retraining_rows),
    "optimizers": ("Optimizers", OPTIMIZER_COLUMNS, optimizer_rows),
}
"""Title, columns and rows of each table, in the paper's order."""


def paper_tables(runs: Sequence[tuple[RunFolder, ExperimentConfig]]) -> dict[str, Table]:
    """Every table over these runs, one pair each; what a run lacks is in `lacking` with the reason."""
    names = [config.name for _, config in runs]
    for more in ([run.root.name for run, _ in runs], [str(run.root) for run, _ in runs]):
        if len(set(names)) < len(names):
            names = more
    pairs = [Pair(name, run, config) for name, (run, config) in zip(names, runs, strict=True)]
    found = {}
    for name, (title, columns, rows) in TABLES.items():
        table = found[name] = Table(title, columns)
        for pair in pairs:
            try:
                table.numbers.extend(rows(pair))
            except Lacking as why:
                table.lacking[pair.name] = str(why)
            else:
                table.notes.extend(_tasks_of(pair, columns))
    return found


def _tasks_of(pair: Pair, columns: Sequence[str]) -> list[str]:
    """Which tasks the scores of a pair are on."""
    if "test %" not in columns:
        return []
    held_out = next(iter(pair.curves.values()), {})
    curve = f"held-out: {held_out['task']}, {held_out['metric']}; " if held_out else ""
    return [f"{pair.name}: {curve}test: {pair.task or 'not evaluated'}."]
