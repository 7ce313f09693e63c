"""Metrics that are no mean over questions, compared by a paired bootstrap over documents, in their own unit.

Perplexities, F1, the Matthews correlation, BLEU, chrF and TER are functions of sums over documents, so that a resample
costs one product of its weights with the documents' sums. Other aggregations are called on every resample, of which
there are fewer (SLOW_DRAWS).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t

from evals import stats
from vlopd.config.analysis import EvalConfig
from vlopd.errors import RunError, first_line

Array = NDArray[np.float64]
Sums = tuple[Array, Callable[[Array], Array]]
"""Each document's sums [n, k], and the metric of summed rows [draws, k] -> [draws]."""

SLOW_DRAWS = 1000
"""Bootstrap resamples of an aggregation that is called on each."""
UNITS_PER_BLOCK = 4_000_000
"""Bootstrap weights per block, to bound memory."""
FRACTIONS = ("f1", "mean", "median", "nanmean")
"""lm-eval's aggregations whose values are fractions where all are in [0, 1]."""
OTHERS = ("matthews_corrcoef", "brier_score", "perplexity", "weighted_perplexity", "bits_per_byte")
TRANSLATION = ("bleu", "chrf", "chrf++", "ter")
KNOWN = (*FRACTIONS, *OTHERS, *TRANSLATION)


def why_not(column: str, facts: Mapping[str, Any]) -> str | None:
    """Why a metric cannot be compared, from its entry of results.json; None if it can."""
    name = facts.get("aggregation")
    if name is None:
        return (
            f"{column} has no number per question, and no aggregation that could be computed again"
        )
    if name not in KNOWN and ":" not in name:
        return f"{column}'s aggregation {name!r} is unknown here"
    return None


@dataclass(frozen=True)
class CorpusMetric:
    """A corpus metric: its aggregation as results.json names it, and each document's item, by arm."""

    aggregation: str
    items: Mapping[str, Sequence[Any]]

    @property
    def is_slow(self) -> bool:
        return self.aggregation not in KNOWN

    def values(self, clusters: ArrayLike | None, draws: int, seed: int = 0) -> dict[str, Array]:
        """{arm: [1 + draws] values: of all documents, then of each resample}; the same resamples for every arm.

        With `clusters`, whole clusters are resampled. Raises RunError where the aggregation fails.
        """
        n = len(next(iter(self.items.values())))
        _, unit = np.unique(np.arange(n) if clusters is None else clusters, return_inverse=True)
        units = int(unit.max()) + 1
        made = {arm: self._compiled(items, unit, units) for arm, items in self.items.items()}
        found: dict[str, list[Array]] = {arm: [of(np.ones((1, units)))] for arm, of in made.items()}
        rng = np.random.default_rng(seed)
        draws = min(draws, SLOW_DRAWS) if self.is_slow else draws
        block = max(1, UNITS_PER_BLOCK // units)
        for start in range(0, draws, block):
            size = min(block, draws - start)
            weights = rng.multinomial(units, np.full(units, 1 / units), size=size).astype(float)
            for arm, of in made.items():
                found[arm].append(of(weights))
        return {arm: np.concatenate(parts) for arm, parts in found.items()}

    def _compiled(
        self, items: Sequence[Any], unit: NDArray[np.intp], units: int
    ) -> Callable[[Array], Array]:
        """The metric of resamples, given how often each unit was drawn [draws, units]."""
        try:
            if self.aggregation == "median":
                return _median(np.asarray(items, dtype=float), unit)
            if self.is_slow:
                return _called(load(self.aggregation), items, unit)
            rows, metric = sums_of(self.aggregation, items)
        except RunError:
            raise
        except Exception as error:  # items of another form
            raise RunError(f"{self.aggregation} cannot be computed: {first_line(error)}") from None
        sums = np.zeros((units, rows.shape[1]))
        np.add.at(sums, unit, rows)
        return lambda weights: metric(weights @ sums)


def sums_of(aggregation: str, items: Sequence[Any]) -> Sums:
    """The sums of lm-eval's aggregations; its formulas, of which the point value is the same to rounding."""
    if aggregation in TRANSLATION:
        return _translation_sums(aggregation, items)
    if aggregation == "f1":
        gold, said = (np.asarray(column).astype(float) == 1 for column in zip(*items, strict=True))
        rows = np.stack([gold & said, gold | said], axis=1).astype(float)
        # 2 TP / (2 TP + FP + FN); 0 without positives, as in sklearn
        return rows, lambda s: 2 * s[:, 0] / np.maximum(s[:, 0] + s[:, 1], 1)
    if aggregation == "matthews_corrcoef":
        return _matthews_sums(items)
    if aggregation == "brier_score":
        gold, said = zip(*items, strict=True)
        chances = np.asarray(said, dtype=float)
        errors = ((chances - np.eye(chances.shape[1])[list(gold)]) ** 2).sum(1)
        return _with_count(errors), _ratio
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        rows = np.asarray(items, dtype=float)  # [log-likelihood, words or bytes]
        if aggregation == "bits_per_byte":
            return rows, lambda s: -_ratio(s) / math.log(2)
        return rows, lambda s: np.exp(-_ratio(s))
    rows = _with_count(np.asarray(items, dtype=float))
    return rows, (lambda s: np.exp(-_ratio(s))) if aggregation == "perplexity" else _ratio


def _ratio(sums: Array) -> Array:
    return sums[:, 0] / sums[:, 1]


def _with_count(x: Array) -> Array:
    return np.stack([x, np.ones_like(x)], axis=1)


def _matthews_sums(items: Sequence[Any]) -> Sums:
    """The confusion matrix of (gold, said), flattened; the correlation for any number of classes (Gorodkin 2004)."""
    _, codes = np.unique(np.asarray(items), return_inverse=True)
    gold, said = codes.reshape(-1, 2).T
    k = int(codes.max()) + 1
    rows = np.zeros((len(gold), k * k))
    rows[np.arange(len(gold)), gold * k + said] = 1

    def metric(sums: Array) -> Array:
        confusion = sums.reshape(-1, k, k)
        total, right = confusion.sum((1, 2)), np.trace(confusion, axis1=1, axis2=2)
        golds, saids = confusion.sum(2), confusion.sum(1)
        above = right * total - (golds * saids).sum(1)
        below = np.sqrt((total**2 - (golds**2).sum(1)) * (total**2 - (saids**2).sum(1)))
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    return rows, metric


def _translation_sums(aggregation: str, items: Sequence[Any]) -> Sums:
    """Sacrebleu's counts of each (reference or references, hypothesis)."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    scorers: dict[str, Callable[[], Any]] = {
        "bleu": BLEU,
        "chrf": CHRF,
        "chrf++": partial(CHRF, word_order=2),
        "ter": TER,
    }
    scorer = scorers[aggregation]()
    references = [[ref] if isinstance(ref, str) else list(ref) for ref, _ in items]
    said = [text if isinstance(text, str) else text[0] for _, text in items]
    streams = list(zip(*references, strict=True))
    rows = np.asarray(scorer._extract_corpus_statistics(said, streams), dtype=float)
    whole = aggregation != "ter"  # counts, which sacrebleu's formulas need as integers

    def metric(sums: Array) -> Array:
        each = ([round(x) for x in row] if whole else list(row) for row in sums.tolist())
        return np.array([scorer._compute_score_from_stats(row).score for row in each])

    return rows, metric


def _median(x: Array, unit: NDArray[np.intp]) -> Callable[[Array], Array]:
    """lm-eval's median, the upper one of an even number."""
    order = np.argsort(x, kind="stable")

    def metric(weights: Array) -> Array:
        counts = np.cumsum(weights[:, unit[order]], axis=1)
        return x[order][(counts > counts[:, -1:] // 2).argmax(1)]

    return metric


def _called(
    total: Callable[[list[Any]], float], items: Sequence[Any], unit: NDArray[np.intp]
) -> Callable[[Array], Array]:
    """An aggregation called on the list of each resample's items."""

    def metric(weights: Array) -> Array:
        found = []
        for row in weights.astype(int):
            drawn = np.repeat(np.arange(len(items)), row[unit]).tolist()
            try:
                found.append(float(total([items[i] for i in drawn])))
            except Exception as error:  # a task's function; a resample may lack a class
                raise RunError(
                    f"its aggregation fails on a resample: {type(error).__name__}: {first_line(error)}"
                ) from None
        return np.array(found)

    return metric


def load(name: str) -> Callable[[list[Any]], float]:
    """The function of `FILE.py:FUNCTION` (scoring.name_of_aggregation). Raises RunError where it is not there."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    try:
        if not path.is_absolute():
            package = path.parts[0]
            spec = importlib.util.find_spec(package)
            assert package in ("evals", "lm_eval") and spec is not None and spec.origin is not None
            module = importlib.import_module(".".join(path.with_suffix("").parts))
        else:
            own = importlib.util.spec_from_file_location(path.stem, path)
            assert own is not None and own.loader is not None
            module = importlib.util.module_from_spec(own)
            own.loader.exec_module(module)
        return vars(module)[function]
    except Exception as error:  # imports run a task's code
        raise RunError(
            f"its aggregation {name} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from None


# ------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class CorpusStatistics:
    """Estimates of a corpus metric as JSON values, by the paired bootstrap; several arms stand for their mean.

    Errors are the bootstrap's times sqrt(G / (G - 1)) over G documents or clusters, intervals and tests Student's t of
    G - 1 degrees of freedom: of few documents percentile intervals are too narrow.
    """

    metric: CorpusMetric
    clusters: Sequence[str] | None
    config: EvalConfig
    higher_is_better: bool = True

    @cached_property
    def values(self) -> dict[str, Array]:
        """{arm: [1 + draws] values} (CorpusMetric.values)."""
        return self.metric.values(self.clusters, self.config.bootstrap_draws)

    @property
    def n(self) -> int:
        return len(next(iter(self.metric.items.values())))

    @property
    def units(self) -> Sequence[Any]:
        """The cluster of every document, or itself."""
        return range(self.n) if self.clusters is None else self.clusters

    @property
    def df(self) -> int:
        return len(set(self.units)) - 1

    @property
    def is_fraction(self) -> bool:
        """Whether values are shown in percent: F1 and the like, or a task's own aggregation, all in [0, 1]."""
        name = self.metric.aggregation
        inside = all(0 <= x[0] <= 1 for x in self.values.values())
        return (name in FRACTIONS or self.metric.is_slow) and inside

    def estimate(self, arms: Sequence[str]) -> dict[str, Any]:
        """The value with its error and interval."""
        found = self._estimate(self._mean(arms))
        if self.is_fraction:
            found["interval"] = np.clip(found["interval"], 0, 1).tolist()
        return found

    def difference(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        """a - b with its interval, and the two-sided p of no difference.

        p is at least 2^(1 - k), the smallest that k differing documents (or clusters) allow by their signs. Without
        any there is no interval.
        """
        found, differ = self._estimate(self._mean(a) - self._mean(b)), self.differing(a, b)
        if not differ:
            found["interval"] = [float("nan")] * 2
        p = min(1.0, max(2 * self._tail(abs(found["mean"]), found), 2.0 ** (1 - differ)))
        return {**found, "p": p, "test": "paired_bootstrap"}

    def contrast(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        found, confidence = self.difference(a, b), self.config.confidence
        x = self._mean(a) - self._mean(b)
        tail = (1 - confidence) / 2
        error = found["standard_error"] or float(
            "nan"
        )  # equal answers do not say what could be detected
        return {
            **found,
            "bootstrap": np.quantile(x[1:], [tail, 1 - tail]).tolist(),
            "draws": len(x) - 1,
            "minimum_detectable_effect": stats.minimum_detectable_effect(
                error, 1, alpha=1 - confidence
            ),
        }

    def recovery(
        self, sub: Sequence[str], base: Sequence[str], full: Sequence[str]
    ) -> dict[str, Any]:
        """(sub - base) / (full - base) with Fieller's interval, from the bootstrap's covariance."""
        sign = 1 if self.higher_is_better else -1
        parts, gains = (sign * (self._mean(of) - self._mean(base)) for of in (sub, full))
        if not self.df:
            return recovery_to_json(stats.Recovery(None, None, None, "undefined"))
        covariance = np.cov(parts[1:], gains[1:]) * (1 + 1 / self.df)
        part, gain = float(parts[0]), float(gains[0])
        found = stats.fieller(part, gain, covariance, self.df, self.config.confidence)
        return recovery_to_json(found)

    def non_inferiority(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        """Whether a is worse than b by less than eval.margin; of metrics shown in percent alone.

        Not stated where few documents (or clusters) differ, of which the bootstrap knows too little.
        """
        margin, level = self.config.margin, (1 - self.config.confidence) / 2
        sign = 1 if self.higher_is_better else -1
        found, differ = self._estimate(sign * (self._mean(a) - self._mean(b))), self.differing(a, b)
        p, why = self._tail(found["mean"] + margin, found), None
        if not self.is_fraction:
            why = "the margin is in units of a score in [0, 1]"
        elif p <= level and differ < stats.FEW_UNITS:
            what = "documents" if self.clusters is None else "clusters"
            why = f"{differ} differing {what} of the {stats.FEW_UNITS} needed"
        return {
            "margin": margin,
            "low": found["interval"][0] if differ else float("nan"),
            "p": p if self.is_fraction else None,
            "holds": p <= level and why is None,
            "why": why,
        }

    def over_seeds(self, a: Sequence[str], b: Sequence[str]) -> stats.SeedDifference:
        """The difference of two groups of seeds, its error over documents by the bootstrap."""
        x = self._mean(a) - self._mean(b)
        of_a, of_b = (np.array([self.values[arm][0] for arm in arms]) for arms in (a, b))
        error = self._estimate(x)["standard_error"] if self.differing(a, b) else float("nan")
        confidence = self.config.confidence
        return stats.over_seeds(float(x[0]), error, self.df or 1, of_a, of_b, confidence)

    def differing(self, a: Sequence[str], b: Sequence[str]) -> int:
        """The number of documents (or clusters) of which the arms of a and b have different items."""
        items = zip(*(self.metric.items[arm] for arm in (*a, *b)), strict=True)
        return len(
            {
                unit
                for unit, (first, *rest) in zip(self.units, items, strict=True)
                if any(other != first for other in rest)
            }
        )

    def _mean(self, arms: Sequence[str]) -> Array:
        return np.mean([self.values[arm] for arm in arms], axis=0)

    def _estimate(self, x: Array) -> dict[str, Any]:
        error = half = float("nan")  # of one document or cluster
        if self.df:
            error = float(x[1:].std(ddof=1)) * math.sqrt(1 + 1 / self.df)
            half = float(t.ppf((1 + self.config.confidence) / 2, self.df)) * error
        mean = float(x[0])
        return {
            "n": self.n,
            "mean": mean,
            "standard_error": error,
            "interval": [mean - half, mean + half],
        }

    def _tail(self, distance: float, found: Mapping[str, Any]) -> float:
        """The one-sided p of a distance in units of the estimate's error; 1 without one."""
        error = found["standard_error"]
        if math.isnan(error):
            return 1.0
        return float(t.sf(distance / error, self.df)) if error else float(distance <= 0)


def recovery_to_json(found: stats.Recovery) -> dict[str, Any]:
    """A recovery as in compare.json: value, interval (null without a value), status."""
    interval = None if found.value is None else [found.low, found.high]
    return {"value": found.value, "interval": interval, "status": found.status}
