"""The study's results from docs/study/data, as docs/study/protocol.md says: tests of its hypotheses, verdicts, tables.

Pure functions of tables that scripts/study_collect.py wrote; scripts/study_report.py writes the pages. Geometry is
compared by vlopd.update_geometry.groups, scores by scipy's t tests.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from evals.report.read import read_table  # noqa: E402
from evals.stats import holm  # noqa: E402
from scripts.study_collect import OPD, kind_of  # noqa: E402
from vlopd.config.analysis import GeometryConfig  # noqa: E402
from vlopd.update_geometry.group_statistics import adjust  # noqa: E402
from vlopd.update_geometry.groups import (  # noqa: E402
    METRICS,
    PAIR,
    GroupRow,
    Value,
    compare_groups,
)

LEVEL, SHARE = 0.05, 0.10
"""Of the primary tests, and of false discoveries of the secondary ones."""
POINTS_MARGIN = 0.02
NOT_RUN = "not run yet"
SIGNAL, DRAWN = "signs", "gaussian"
KINDS = {
    OPD: "OPD",
    SIGNAL: "signal null",
    "shuffled": "shuffled teacher",
    "gradients": "i.i.d. gradients",
    "sft": "SFT",
    "rlvr": "GRPO",
}
"""Kinds of training, by the arms' names without their number."""
MASKS = {
    "full": "full",
    "top": "chosen",
    "other": "other seed's",
    "sft": "SFT's",
    "null": "signal null's",
    "magnitude": "random, |w|-matched",
    "random": "random, tensor-matched",
}
"""Kinds of mask, by the first word of the arms' or masks' names."""
PALETTE = "shapes_students_palette"
_OVERLAP = "top_mask_overlap_over_chance_within_magnitudes"
SHARES = "energy_share_over_parameter_share"
_SHARES = "energy share / parameter share"


class Claim(NamedTuple):
    """A part of H1 to H3."""

    hypothesis: str
    part: str
    metric: str
    name: str
    claim: str
    """equivalent, above or different."""
    null: str
    words: str


CLAIMS = (
    Claim("H1", "a", "stable_rank", "[median]", "equivalent", SIGNAL, "stable rank"),
    Claim("H1", "b", "tail_energy_ratio", "[median]", "equivalent", SIGNAL, "1 - top-16 energy"),
    Claim("H2", "a", "delta_cosine", "[all]", "above", SIGNAL, "cosine between seeds"),
    Claim("H2", "b", "delta_cosine", "[all]", "above", DRAWN, "cosine between seeds"),
    Claim("H2", "c", _OVERLAP, "[all]", "above", SIGNAL, "mask overlap over chance"),
    Claim("H2", "d", _OVERLAP, "[all]", "above", DRAWN, "mask overlap over chance"),
    Claim("H3", "a", SHARES, "[component=vision]", "different", SIGNAL, f"vision: {_SHARES}"),
    Claim("H3", "b", SHARES, "[part=ffn]", "different", SIGNAL, f"FFN: {_SHARES}"),
)
SCORES = {
    "a": ("top", "magnitude", "above"),
    "b": ("top", "random", "above"),
    "c": ("null", "magnitude", "equivalent"),
    "d": ("null", "random", "equivalent"),
    "e": ("top", "full", "not inferior"),
}
"""The parts of H4: two kinds of mask, and what is claimed of the first."""
DENSITIES = (5, 1)
"""Of H4, in percent."""
WHOLE = 100
"""The density of an arm without a mask."""


@dataclass(frozen=True)
class Part:
    """A part of a hypothesis, or a secondary comparison of the same form.

    one, other: means of the compared groups (geometric, where `scale` is `ratio`); drawn: that of drawn noise.
    estimate, low, high: their ratio or difference with a 95 % interval. p: of the claim. n, n_other: seeds. reason: why
    there is no test; a part that was run and has none is not shown.
    """

    hypothesis: str
    part: str
    words: str
    claim: str
    than: str
    where: str = ""
    one: float | None = None
    other: float | None = None
    drawn: float | None = None
    scale: str = "difference"
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    n_other: int = 0
    p: float | None = None
    is_reversed: bool = False
    reason: str = ""
    q: float | None = None

    @property
    def is_run(self) -> bool:
        return not self.reason.startswith(NOT_RUN)

    @property
    def is_shown(self) -> bool:
        """Whether it is shown by itself, without correction."""
        return self.is_run and self.p is not None and self.p <= LEVEL

    @property
    def is_different(self) -> bool:
        """Whether the 95 % interval excludes equality."""
        if self.low is None or self.high is None:
            return False
        return not self.low <= (1 if self.scale == "ratio" else 0) <= self.high


@dataclass(frozen=True)
class Verdict:
    """A hypothesis with its parts; p: the largest of theirs."""

    hypothesis: str
    parts: tuple[Part, ...]
    p: float | None
    p_holm: float | None = None
    verdict: str = NOT_RUN

    @property
    def decisive(self) -> Part | None:
        """The part with the largest p, of those with a test."""
        tested = [part for part in self.parts if part.p is not None]
        return max(tested, key=lambda part: part.p or 0.0, default=None)


# ----------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Run:
    """The tables of one run; empty where it has none."""

    name: str
    arms: pd.DataFrame = field(default_factory=pd.DataFrame)
    updates: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    excluded: int = 0
    """Number of seeds that are left out of the geometry."""


def read_run(folder: Path, name: str) -> Run:
    """The tables of a run without its excluded seeds; the score of an excluded arm is that of the base."""
    tables = []
    for ending in ("", "-updates", "-pairs"):
        path = folder / f"{name}{ending}.csv"
        table = read_table(path) if path.exists() else pd.DataFrame()
        tables.append(table.fillna({"null": "", "statistic": ""}) if ending else table)
    excluded = exclusions(folder)
    return without(Run(name, *tables), excluded[excluded["run"] == name])


def exclusions(folder: Path) -> pd.DataFrame:
    """The arms that stopped twice with an error: exclusions.csv, written by hand, columns run, arm, seed, why."""
    path = folder / "exclusions.csv"
    return (
        read_table(path) if path.exists() else pd.DataFrame(columns=["run", "arm", "seed", "why"])
    )


def without(run: Run, excluded: pd.DataFrame) -> Run:
    """A run without the seeds of the excluded arms (columns arm, seed) in its geometry; their scores are the base's."""
    if excluded.empty:
        return run
    seeds = set(excluded["seed"])
    gone = {*excluded["arm"], *run.arms.loc[run.arms["seed"].isin(seeds), "arm"]}
    arms = run.arms[~run.arms["arm"].isin(set(excluded["arm"]))]
    base = arms[arms["arm"] == "base"].set_index("task")["score"]
    rows = [
        {"arm": its.arm, "seed": its.seed, "task": task, "score": score}
        for its in excluded.itertuples()
        for task, score in base.items()
    ]

    def kept(table: pd.DataFrame) -> pd.DataFrame:
        if table.empty:
            return table
        return table[[gone.isdisjoint(unit.split(PAIR)) for unit in table["unit"]]]

    tables = pd.concat([arms, pd.DataFrame(rows)]), kept(run.updates), kept(run.pairs)
    return Run(run.name, *tables, len(seeds))


def runs_of(folder: Path, part: str) -> list[str]:
    """The names of a part's runs that have rows, in their order: b-31, b-32, ..., or s4-early-61, ..."""
    names = (path.stem for path in folder.glob(f"{part}-*.csv"))
    word = "-[a-z]+" if part.startswith("s") else ""
    return sorted(name for name in names if re.fullmatch(rf"{part}{word}-\d+", name))


HEAD = ("unit", "null", "statistic", "draws")
"""The columns of updates and pairs that are no measures."""
_FAMILY = {its.metric: its.family for its in METRICS}


def values_of(
    run: Run, real: str, nulls: Sequence[str], claims: Sequence[Claim] = ()
) -> Iterator[Value]:
    """The rows of group_values.csv of one kind of training against others and its own drawn noise.

    claims: those whose measures are wanted; none for all measures.
    """
    wanted = {(claim.metric, claim.name) for claim in claims}
    for table in (run.updates, run.pairs):
        if table.empty:
            continue
        keys = {column: _key(column) for column in table.columns if column not in HEAD}
        keys = {c: key for c, key in keys.items() if not wanted or (key[1], key[3]) in wanted}
        rows = table.to_dict("records")
        deviations = {(r["unit"], r["null"]): r for r in rows if r["statistic"] == "sd"}
        for row in rows:
            if row["statistic"] == "sd" or (where := _group(row, real, nulls)) is None:
                continue
            sd = deviations.get((row["unit"], row["null"]))
            for column, key in keys.items():
                if not math.isnan(row[column]):
                    more = () if sd is None else (sd[column], int(row["draws"]))
                    yield Value(*where, real, row["unit"], *key, row[column], *more)


def _group(row: Mapping[str, Any], real: str, nulls: Sequence[str]) -> tuple[str, str] | None:
    """Kind and null of a row's values where `real` is compared with `nulls`; None for one that is not."""
    kinds = [kind_of(arm) for arm in row["unit"].split(PAIR)]
    others = [kind for kind in kinds if kind != real]
    if row["null"]:
        return None if others else ("drawn", row["null"])
    if not others:
        return "real", ""
    if others[0] not in nulls:
        return None
    return "signal" if len(others) == len(kinds) else "mixed", others[0]


def _key(column: str) -> tuple[str, str, str, str]:
    """Family, metric, parameter and name of a column."""
    metric, *parameter, name = column.split(" ")
    return _FAMILY[metric], metric, " ".join(parameter), name


# ------------------------------------------------------------------------------------------ geometry


def geometry_rows(
    run: Run, real: str = OPD, nulls: Sequence[str] = (), claims: Sequence[Claim] = ()
) -> list[GroupRow]:
    """The rows of groups.csv of a kind of training against others and its drawn noise, of the measures of `claims`."""
    values = list(values_of(run, real, nulls, claims))
    return compare_groups(values, GeometryConfig(), 1 - LEVEL)


def kinds_of(run: Run) -> list[str]:
    """The kinds of training whose geometry a run has."""
    units = run.updates["unit"] if len(run.updates) else ()
    return list(dict.fromkeys(kind_of(unit) for unit in units))


def geometry_parts(
    rows: Sequence[GroupRow], seeds: int, claims: Sequence[Claim] = CLAIMS
) -> list[Part]:
    """The parts of H1 to H3 from the rows of a run; `seeds` is the number that the protocol asks for."""
    parts = []
    for its in claims:
        own = {
            (row.kind, row.null): row
            for row in rows
            if row.metric == its.metric and row.name == its.name and row.kind != "mixed"
        }
        drawn, kind = own.get(("drawn", DRAWN)), "drawn" if its.null == DRAWN else "signal"
        than = "drawn noise" if kind == "drawn" else KINDS[its.null]
        part = Part(its.hypothesis, its.part, its.words, its.claim, than)
        row, signal = own.get((kind, its.null)), own.get(("signal", SIGNAL))
        if row is None or row.difference is None:
            lacking = row is None or row.reason.startswith("not measured")
            parts.append(replace(part, reason=NOT_RUN if lacking or row is None else row.reason))
            continue
        shown = math.exp if row.scale == "log" else float
        reason = row.reason
        if row.n_real < seeds or (kind == "signal" and row.n_null < seeds):
            reason = f"{NOT_RUN}: {min(row.n_real, row.n_null)} of {seeds} seeds"
        parts.append(
            replace(
                part,
                one=row.real_mean,
                other=signal and signal.null_mean,
                drawn=drawn and drawn.null_mean,
                scale="ratio" if row.scale == "log" else "difference",
                estimate=shown(row.difference),
                low=None if row.low is None else shown(row.low),
                high=None if row.high is None else shown(row.high),
                n=row.n_real,
                n_other=row.n_null,
                p=claim_p(row, its.claim),
                is_reversed=_is_reversed(row, its.claim),
                reason=reason,
            )
        )
    return parts


def claim_p(row: GroupRow, claim: str) -> float | None:
    """The p of a claim about the difference of two groups."""
    if claim == "equivalent":
        return row.p_equivalent
    if row.p is None or claim == "different":
        return row.p
    assert row.difference is not None
    return row.p / 2 if row.difference > 0 else 1 - row.p / 2


def _is_reversed(row: GroupRow, claim: str) -> bool:
    if row.low is None or row.high is None or claim == "different":
        return False
    return row.high < 0 if claim == "above" else row.low > row.margin or row.high < -row.margin


# -------------------------------------------------------------------------------------------- scores


def scores_of(run: Run) -> pd.Series:
    """The test score of each arm, by its name, on the first task."""
    if run.arms.empty or run.arms["task"].isna().all():
        return pd.Series(dtype=float)
    first = run.arms["task"].dropna().iloc[0]
    return run.arms[run.arms["task"] == first].set_index("arm")["score"]


def mask_scores(runs: Sequence[Run]) -> pd.DataFrame:
    """The scores of B or D, columns run, kind, density (percent), score."""
    rows = []
    for run in runs:
        for arm, score in scores_of(run).items():
            kind, _, density = str(arm).partition("-")
            if arm in ("base", "full", "teacher"):
                rows.append((run.name, kind, WHOLE, score))
            elif kind in MASKS and density.isdigit():
                rows.append((run.name, kind, int(density), score))
    return pd.DataFrame(rows, columns=["run", "kind", "density", "score"])


def score_parts(
    table: pd.DataFrame,
    seeds: int,
    where: str,
    densities: Sequence[int] = DENSITIES,
    claims: Mapping[str, tuple[str, str, str]] = SCORES,
) -> list[Part]:
    """The parts of H4 on one pair of models, from `mask_scores`; a pair of seeds is a unit."""
    parts = []
    for density in densities:
        own = table[table["density"].isin([density, WHOLE])]
        own = own.pivot(index="run", columns="kind", values="score")
        for letter, (one, other, claim) in claims.items():
            part = Part("H4", letter, MASKS[one], claim, MASKS[other], f"{where}, {density} %")
            known = own.reindex(columns=[one, other]).dropna()
            parts.append(paired(part, known[one], known[other], seeds))
    return parts


def paired(part: Part, one: pd.Series, other: pd.Series, seeds: int) -> Part:
    """A part with the paired t test of its claim over seeds, margin two points."""
    n = len(one)
    part = replace(part, scale="points", n=n, n_other=n)
    reason = NOT_RUN if not n else f"{NOT_RUN}: {n} of {seeds} seeds" if n < seeds else ""
    if n:
        part = replace(part, one=float(one.mean()), other=float(other.mean()))
        part = replace(part, estimate=float((one - other).mean()))
    if n < 2:
        return replace(part, reason=reason)
    differences = (one - other).to_numpy(float)
    if np.ptp(differences) < 1e-12:
        return replace(part, reason=reason or "equal in all seeds: no test")

    def p(mean: float, alternative: str) -> float:
        return float(stats.ttest_1samp(differences, mean, alternative=alternative).pvalue)

    interval = stats.ttest_1samp(differences, 0).confidence_interval(1 - LEVEL)
    low, high = float(interval.low), float(interval.high)
    tests: dict[str, Callable[[], float]] = {
        "above": lambda: p(0, "greater"),
        "not inferior": lambda: p(-POINTS_MARGIN, "greater"),
        "equivalent": lambda: max(p(-POINTS_MARGIN, "greater"), p(POINTS_MARGIN, "less")),
        "different": lambda: p(0, "two-sided"),
    }
    opposite = {
        "above": high < 0,
        "not inferior": high < -POINTS_MARGIN,
        "equivalent": low > POINTS_MARGIN or high < -POINTS_MARGIN,
        "different": False,
    }
    found = replace(part, low=low, high=high, p=tests[part.claim](), reason=reason)
    return replace(found, is_reversed=opposite[part.claim])


def paired_ratio(part: Part, one: pd.Series, other: pd.Series, seeds: int) -> Part:
    """The same of the logarithms of positive values; estimate and interval are of the ratio."""
    found = paired(part, np.log(one), np.log(other), seeds)
    numbers = {key: vars(found)[key] for key in ("one", "other", "estimate", "low", "high")}
    shown = {key: None if x is None else math.exp(x) for key, x in numbers.items()}
    return replace(found, scale="ratio", **shown)


def seed_scores(run: Run) -> pd.DataFrame:
    """The scores of C or E, as of `mask_scores`: a seed is a `run`, a mask's kind the first word of its name."""
    scores = scores_of(run)
    if scores.empty:
        return pd.DataFrame(columns=["run", "kind", "density", "score"])
    rows = []
    arms = run.arms.drop_duplicates("arm")
    seeds = sorted(arms["seed"].dropna().unique())
    for its in arms[arms["arm"].isin(scores.index)].itertuples():
        masked = isinstance(its.mask, str)
        kind = its.mask.split("-")[0] if masked else kind_of(its.arm)
        density = round(100 * its.density) if masked else WHOLE
        if its.arm in ("base", "teacher"):
            rows += [(seed, kind, WHOLE, scores[its.arm]) for seed in seeds]
        elif kind in MASKS if masked else kind == OPD:
            rows.append((its.seed, kind, density, scores[its.arm]))
    return pd.DataFrame(rows, columns=["run", "kind", "density", "score"])


def tuned(runs: Sequence[Run]) -> pd.DataFrame:
    """The tuned arms of several runs, columns run, arm, learning_rate, grid, validation, at_edge, score."""
    columns = ["arm", "seed", "learning_rate", "grid", "validation", "at_edge", "score", "seconds"]
    known = [run for run in runs if len(run.arms) and "grid" in run.arms]
    found = [run.arms[run.arms["grid"].notna()][columns].assign(run=run.name) for run in known]
    return pd.concat(found) if found else pd.DataFrame(columns=[*columns, "run"])


# ------------------------------------------------------------------------------------------ verdicts


def verdicts(parts: Sequence[Part]) -> list[Verdict]:
    """Each hypothesis with Holm's correction over all of them; one that is not run yet counts with p = 1."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.hypothesis, []).append(part)
    found = []
    for name, own in groups.items():
        # a part that was run and has no test is not shown
        known = [1.0 if its.p is None else its.p for its in own if its.is_run]
        found.append(Verdict(name, tuple(own), max(known) if len(known) == len(own) else None))
    adjusted = holm([1.0 if its.p is None else its.p for its in found])
    return [
        replace(its, p_holm=None if its.p is None else p, verdict=_verdict(its, p))
        for its, p in zip(found, adjusted, strict=True)
    ]


def _verdict(its: Verdict, p_holm: float) -> str:
    if any(part.is_reversed and part.is_run for part in its.parts):
        return "reversed"
    if its.p is None:
        return NOT_RUN
    return "holds" if p_holm <= LEVEL else "not shown"


# ----------------------------------------------------------------------------------------- secondary


def s0(run: Run, seeds: int) -> list[Part]:
    """S0: the signal null's cosine between seeds and mask overlap above drawn noise, one-sided, corrected together."""
    claims = [its for its in CLAIMS if its.hypothesis == "H2" and its.null == DRAWN]
    parts = geometry_parts(geometry_rows(run, SIGNAL, (), claims), seeds, claims)
    return with_q([replace(its, hypothesis="S0") for its in parts])


def with_q(parts: Sequence[Part]) -> list[Part]:
    """Parts with p adjusted over them by Benjamini and Hochberg."""
    qs = adjust([its.p for its in parts])
    return [replace(its, q=q) for its, q in zip(parts, qs, strict=True)]


REFERENCES = {
    "s3": lambda arm: "adamw",
    "s4": lambda arm: f"final-{arm.rpartition('-')[2]}",
    **dict.fromkeys(("s5", "s6", "s7"), lambda arm: "full"),
}
"""What an arm of S3 to S7 is compared with."""
SECONDARY_SEEDS = 3
MIDDLE = "reverse-kl-3e-4"
"""The arm of S2 whose norm is the common one."""
RECIPE_MEASURES = {
    "stable_rank": "spectrum",
    "tail_16_energy": "spectrum",
    "joint_projection_10": "spectrum",
    "low_magnitude_10": "place",
    "ffn_energy_share": "place",
    "vision_energy_share": "place",
    "unmoved_1e-5": "size",
}
"""Measures of S2 with their families; tail_16_energy is 1 - top_16_energy."""


def secondary_arms(runs: Sequence[Run]) -> pd.DataFrame:
    """The arms of several runs of one seed each, on their first task, with the column run."""
    found = []
    for run in runs:
        if len(run.arms) and run.arms["task"].notna().any():
            first = run.arms["task"].dropna().iloc[0]
            found.append(run.arms[run.arms["task"] == first].assign(run=run.name))
    table = pd.concat(found) if found else pd.DataFrame()
    return table.assign(tail_16_energy=1 - table["top_16_energy"]) if len(table) else table


def secondary_parts(study: str, table: pd.DataFrame, column: str = "score") -> list[Part]:
    """The arms of S3 to S7 against their reference, two-sided, paired over seeds, corrected together."""
    if table.empty:
        return []
    by_arm = table.pivot(index="run", columns="arm", values=column)
    test = paired if column == "score" else paired_ratio
    parts = []
    for arm in table["arm"].unique():
        than = REFERENCES[study](arm)
        if arm in (than, "base", "teacher", "discovery") or than not in by_arm:
            continue
        known = by_arm[[arm, than]].dropna()
        part = Part(study.upper(), arm, column, "different", than)
        parts.append(test(part, known[arm], known[than], SECONDARY_SEEDS))
    return with_q(parts)


def at_equal_norm(table: pd.DataFrame) -> pd.DataFrame:
    """S2: each recipe's measures at the update norm of MIDDLE in the same seed; columns run, recipe, measure, value.

    The logarithm is interpolated linearly in log ||delta||; a norm that a recipe's rates do not enclose has no value.
    """
    rows = []
    for run, own in table.groupby("run") if len(table) else ():
        wanted = own.loc[own["arm"] == MIDDLE, "delta_norm"]
        if wanted.empty:
            continue
        trained = own[own["arm"].str.fullmatch(r".+-\de-\d")]
        for recipe, its in trained.groupby(trained["arm"].str[:-5], sort=False):
            its = its.sort_values("delta_norm")
            norms = np.log(its["delta_norm"].to_numpy(float))
            for measure in RECIPE_MEASURES:
                values = its[measure].to_numpy(float)
                value = math.nan
                if np.isfinite(values).all() and (values > 0).all():
                    at = np.interp(
                        math.log(wanted.iloc[0]), norms, np.log(values), math.nan, math.nan
                    )
                    value = float(np.exp(at))
                rows.append((run, recipe, measure, value))
    return pd.DataFrame(rows, columns=["run", "recipe", "measure", "value"])


def recipe_parts(table: pd.DataFrame) -> list[Part]:
    """S2: recipes against reverse KL at equal norm, from `at_equal_norm`, corrected within families of measures."""
    parts: dict[str, list[Part]] = {}
    for (measure, recipe), own in table.groupby(["measure", "recipe"], sort=False):
        reverse = table[(table["measure"] == measure) & (table["recipe"] == "reverse-kl")]
        both = pd.concat([x.set_index("run")["value"] for x in (own, reverse)], axis=1).dropna()
        if recipe == "reverse-kl":
            continue
        part = Part("S2", str(recipe), str(measure), "different", "reverse-kl")
        found = paired_ratio(part, both.iloc[:, 0], both.iloc[:, 1], SECONDARY_SEEDS)
        if len(both) < own["run"].nunique():
            found = replace(found, reason=f"the norm is reached in {len(both)} seeds")
        parts.setdefault(RECIPE_MEASURES[str(measure)], []).append(found)
    return [part for family in parts.values() for part in with_q(family)]


class Correlation(NamedTuple):
    """A rank correlation over arms with a bootstrap interval; within: that of the ranks less their kind's mean."""

    of: str
    n: int
    value: float
    low: float
    high: float
    p: float
    within: float
    q: float | None = None


def forgetting(run: Run, draws: int = 1000) -> list[Correlation]:
    """S8: rank correlations of the score on the student's own palette with KL to the base and the update's norm."""
    table = run.arms
    if table.empty or PALETTE not in set(table["task"]):
        return []
    trained = table[(table["task"] == PALETTE) & table["kl_to_base"].notna()]
    kinds = trained["arm"].map(kind_of)
    found = []
    for column in ("kl_to_base", "delta_norm"):
        pairs = trained[[column, "score"]].dropna().to_numpy()
        its = stats.spearmanr(pairs[:, 0], pairs[:, 1])
        rng = np.random.default_rng(0)
        resampled = pairs[rng.integers(len(pairs), size=(draws, len(pairs)))]
        ranks = stats.rankdata(resampled, axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        products = (ranks[..., 0] * ranks[..., 1]).sum(1)
        norms = np.sqrt((ranks**2).sum(1)).prod(1)
        low, high = np.nanpercentile(products / norms, [2.5, 97.5])
        own = trained[[column, "score"]].rank()
        own -= own.groupby(kinds).transform("mean")
        numbers = its.statistic, low, high, its.pvalue, own.corr().iloc[0, 1]
        found.append(Correlation(column, len(pairs), *map(float, numbers)))
    qs = adjust([its.p for its in found])
    return [its._replace(q=q) for its, q in zip(found, qs, strict=True)]


def kinds_table(run: Run) -> pd.DataFrame:
    """Means and deviations over seeds of every kind of training's scores, size and cost; columns kind, n, task, ..."""
    if run.arms.empty:
        return pd.DataFrame()
    trained = run.arms[run.arms["tokens"].notna() & run.arms["task"].notna()]
    trained = trained.assign(kind=trained["arm"].map(kind_of))
    columns = ["score", "kl_to_base", "delta_norm", "tokens", "seconds"]
    found = trained.groupby(["kind", "task"], sort=False)[columns].agg(["mean", "std", "count"])
    found.columns = [f"{column}_{how}" for column, how in found.columns]
    return found.reset_index()


def cloud(run: Run, kind: str, metric: str, name: str, drawn: bool = False) -> list[float]:
    """A measure of every seed of a kind of training; of pairs the mean of a seed's with the others of its kind."""
    paired = _FAMILY[metric] == "direction"
    table = run.pairs if paired else run.updates
    column = next(
        (c for c in table.columns if c.split(" ")[0] == metric and c.endswith(name)), None
    )
    if column is None:
        return []
    rows = table[table["statistic"] == ("mean" if drawn else "")]
    found: dict[str, list[float]] = {}
    for unit, value in zip(rows["unit"], rows[column], strict=True):
        arms = unit.split(PAIR)
        if {kind_of(arm) for arm in arms} == {kind} and not math.isnan(value):
            for arm in arms:
                found.setdefault(arm, []).append(value)
    return [float(np.mean(values)) for values in found.values()]
