"""Standard errors, intervals and tests for scores of the same questions under several arms.

Pure functions of numpy arrays, one entry per question, aligned across arms. A score is the value of the
task's metric (mostly 0/1); means, errors and differences are in its unit. `clusters` names
the group of each question (a passage, an image) where questions are not independent; `weights` are those of
the questions in the mean (a group of tasks that is not weighted by size). Units are clusters, or questions without.
Sources: Miller 2024 (arXiv 2411.00640) for the errors, Bowyer et al. 2025 (2503.01747) for why the
normal interval is not used on few questions. scripts/study_statistics.py measures coverage and error rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import comb, stdtrit
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Scores = NDArray[np.float64]

FEW_UNITS = 10
"""Units with a non-zero difference (or off the most common score) below which the t interval is too narrow, and a
clustered score test alone does not establish non-inferiority."""
FLIPS = 20_000
"""Random sign flips, where the exact distribution is too large."""
SUPPORT = 200_000
"""Sums of the exact sign-flip distribution beyond which it is sampled, to bound time and memory."""
BLOCK = 2_000_000
"""Random numbers per block, to bound memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions; error and interval are nan for a single unit."""

    n: int
    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference and the p-value of `test` for zero difference."""

    p: float
    test: Literal["mcnemar", "sign_flip"]


@dataclass(frozen=True)
class Recovery:
    """A fraction of a gain; `low` and `high` are both None where every fraction is compatible with the data.

    "weak": the gain's interval includes 0. "negative": it lies below 0; "undefined": the gain is exactly 0 or has no
    error. Both have no value.
    """

    value: float | None
    low: float | None
    high: float | None
    status: Literal["ok", "weak", "undefined", "negative"]


@dataclass(frozen=True)
class NonInferiority:
    """Whether a - b lies above -margin, at the one-sided level (1 - confidence) / 2.

    `why`: the reason for which non-inferiority is not stated despite the p-value, else None.
    """

    margin: float
    low: float
    p: float
    holds: bool
    why: str | None


@dataclass(frozen=True)
class SeedDifference:
    """A mean difference of two groups of seeds, with an interval over seeds and questions.

    `sd_a` and `sd_b` are the standard deviations over seeds; nan for a single seed, whose training noise is then
    not in the interval.
    """

    seeds_a: int
    seeds_b: int
    mean: float
    low: float
    high: float
    sd_a: float
    sd_b: float


@dataclass(frozen=True)
class Rank:
    """Rank among controls, 1 the best, ties counted against it; `tied` controls have the same value.

    p is the permutation p-value.
    """

    rank: int
    of: int
    tied: int
    p: float
    smallest_possible_p: float


def mean_with_error(
    x: ArrayLike,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> Estimate:
    """Mean with its standard error, sd(ddof=1)/sqrt(n) or clustered, and an interval.

    0/1 scores have Wilson's interval, with the effective sample size of clusters or weights (Korn and Graubard 1998,
    Surv. Methodol. 24, 193) and t quantiles; others Student's t over units. Other scores in [0, 1] that are almost
    all equal have Wilson's too, whose variance m (1 - m) bounds theirs.
    """
    x = _as_scores(x)
    w = _as_weights(weights, len(x))
    mean = float(np.mean(w * x))
    error, units = standard_error(x, clusters, w)
    plain = clusters is None and weights is None
    if units < 2:
        low = high = float("nan")
    elif _is_binary(x):
        size = len(x) if plain else _effective_size(x, mean * (1 - mean), clusters, w, True)
        low, high = _wilson(mean, size, math.inf if plain else units - 1, confidence)
    elif _off_mode(x, clusters) < FEW_UNITS and 0 <= x.min() <= x.max() <= 1:
        low, high = _wilson(mean, len(x) / _cluster_size(clusters, w), units - 1, confidence)
    else:
        low, high = _t_interval(mean, error, units, confidence)
    return Estimate(len(x), mean, error, low, high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> Difference:
    """Mean of a - b over the same questions, with the error of the differences.

    p: unclustered 0/1 scores are tested by exact McNemar, others by flipping the signs of the units' differences.
    Interval: Tango's (`tango`) for 0/1 scores, and for scores in [0, 1] with few differences; else Student's t.
    """
    found, _, _ = _compared(a, b, clusters, confidence, weights)
    a, b = _as_scores(a), _as_scores(b)
    d = _as_weights(weights, len(a)) * (a - b)
    p = sign_flip(d if clusters is None else _cluster_sums(d, clusters))
    exact = clusters is None and weights is None and _is_binary(a) and _is_binary(b)
    return Difference(**found.__dict__, p=p, test="mcnemar" if exact else "sign_flip")


def sign_flip(sums: ArrayLike, seed: int = 0) -> float:
    """Two-sided p-value of the sum of `sums`, one per unit, among those with the units' signs flipped at random.

    Exact, by convolution over the distinct sizes, unless they are too many; then by FLIPS random flips. Of
    unclustered 0/1 scores it is exact McNemar.
    """
    x = np.asarray(sums, dtype=np.float64)
    if not x.any():
        return 1.0
    # sums of weighted scores that are equal but for rounding are one size
    x = np.round(x / np.abs(x).max(), 9)
    sizes, counts = np.unique(np.abs(x[x != 0]), return_counts=True)
    observed = abs(float(x.sum())) - 1e-6
    if observed < 0:
        return 1.0
    totals: Scores = np.zeros(1)
    chances: Scores = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        if len(totals) * (count + 1) > SUPPORT:
            rng, beyond = np.random.default_rng(seed), 0
            block = max(1, BLOCK // len(sizes))
            for start in range(0, FLIPS, block):
                shape = (min(block, FLIPS - start), len(sizes))
                flipped = (2 * rng.binomial(counts, 0.5, size=shape) - counts) @ sizes
                beyond += int(np.sum(np.abs(flipped) >= observed))
            return (1 + beyond) / (1 + FLIPS)
        heads = np.arange(count + 1)
        totals = np.round(np.add.outer(totals, size * (2 * heads - count)).ravel(), 9)
        chances = np.multiply.outer(chances, stats.binom.pmf(heads, count, 0.5)).ravel()
        totals, where = np.unique(totals, return_inverse=True)
        chances = np.bincount(where, weights=chances).astype(np.float64)
    return min(1.0, float(chances[np.abs(totals) >= observed].sum()))


def non_inferiority(
    a: ArrayLike,
    b: ArrayLike,
    margin: float,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> NonInferiority:
    """Tests H0: mean(a - b) <= -margin (a is worse than b by at least `margin`).

    Not the same as "p > 0.05 for zero difference". 0/1 scores are tested by Tango's score test (`tango`), which keeps
    its level where few questions are discordant; others by the paired t. Where fewer than FEW_UNITS clusters are
    discordant, the exact upper limit of the fraction of losing clusters must exclude the margin too.
    `low` is the lower end of the difference's interval.
    """
    found, test, units = _compared(a, b, clusters, confidence, weights)
    a, b = _as_scores(a), _as_scores(b)
    w = _as_weights(weights, len(a))
    level = (1 - confidence) / 2
    distance = found.mean + margin
    if units < 2:
        p = 1.0
    elif test is not None:
        p = float(stats.t.sf(test.z(-margin), test.df))
    elif found.standard_error == 0:
        p = float(distance <= 0)
    else:
        p = float(stats.t.sf(distance / found.standard_error, units - 1))
    holds, why = p <= level, None
    if holds and test is not None and math.isfinite(test.df):
        sums = w * (a - b) if clusters is None else _cluster_sums(w * (a - b), clusters)
        differ, lost = int(np.sum(sums != 0)), int(np.sum(sums < 0))
        independent = max(len(a) / _cluster_size(clusters, w), lost)
        limit = float(stats.beta.ppf(1 - level, lost + 1, max(independent - lost, 1e-9)))
        if differ < FEW_UNITS and limit >= margin:
            what = "questions" if clusters is None else "clusters"
            holds, why = False, f"{differ} discordant {what} of the {FEW_UNITS} needed"
    return NonInferiority(margin, found.low, p, holds, why)


def tango(wins: float, losses: float, n: float, margin: float) -> float:
    """One-sided p-value of H0: P(win) - P(loss) <= -margin, by the score test with the rates fitted under H0.

    Tango 1998 (Stat. Med. 17, 891). Clustered counts are divided by their design effect.
    """
    return float(stats.norm.sf(_tango_z(wins, losses, n, -margin)))


def seed_difference(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> SeedDifference:
    """Mean over seeds of a minus that of b, from scores [seeds of a, n] and [seeds of b, n].

    The variance is that over questions of the difference of the seeds' means plus those of both groups' means over
    seeds, with Satterthwaite's degrees of freedom (Welch's t, and one more term). Question noise of each seed is
    in both, so that without noise between seeds the interval is conservative.
    """
    both = [np.asarray(x, dtype=np.float64) for x in (a, b)]
    if (
        any(x.ndim != 2 or not np.isfinite(x).all() for x in both)
        or len({x.shape[1] for x in both}) > 1
    ):
        raise ValueError("scores of seeds must be [seeds, questions], of the same questions")
    w = _as_weights(weights, both[0].shape[1])
    questions, _, units = _compared(both[0].mean(0), both[1].mean(0), clusters, confidence, weights)
    of_questions = max(units - 1, 1)
    # equal answers have no error, but an interval
    guarded = (questions.high - questions.low) / 2 / _quantile(confidence, of_questions)
    error = max(guarded, questions.standard_error)
    of_a, of_b = ((scores * w).mean(1) for scores in both)
    return over_seeds(questions.mean, error, of_questions, of_a, of_b, confidence)


def over_seeds(
    mean: float, error: float, df: float, a: Scores, b: Scores, confidence: float = 0.95
) -> SeedDifference:
    """The interval of `seed_difference` from the mean difference, its error over questions with the degrees of freedom
    of that, and the scores of each seed of a and of b."""
    parts, deviations = [(error**2, df)], []
    for of_seeds in (a, b):
        count = len(of_seeds)
        deviations.append(float(np.std(of_seeds, ddof=1)) if count > 1 else float("nan"))
        if count > 1:
            parts.append((deviations[-1] ** 2 / count, count - 1))
    variance = sum(part for part, _ in parts)
    total = variance**2 / sum(part**2 / of for part, of in parts) if variance else 1.0
    half = _quantile(confidence, total) * math.sqrt(variance)
    return SeedDifference(len(a), len(b), mean, mean - half, mean + half, *deviations)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(a - b) over questions or clusters, to check the closed forms."""
    d = _as_scores(a) - _as_scores(b)
    w = _as_weights(weights, len(d))
    rows = np.stack([w * d, w], axis=1)
    if clusters is not None:
        rows = _cluster_sums(rows, clusters)
    sums = np.concatenate(list(_resampled(rows, draws, np.random.default_rng(seed))))
    tail = (1 - confidence) / 2
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(successes: ArrayLike, n: int, k: int) -> Scores:
    """Probability that at least one of k answers is right, from `successes` of n samples, per question.

    1 - C(n - c, k) / C(n, k), unbiased (arXiv 2107.03374).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples; got {n}")
    c = np.asarray(successes, dtype=np.float64)
    return 1.0 - comb(n - c, k) / comb(n, k)


def recovery(
    sub: ArrayLike,
    base: ArrayLike,
    full: ArrayLike,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Recovery:
    """(sub - base) / (full - base), with Fieller's interval: the ratios r for which sub - base - r (full - base) has a
    mean that the t test does not tell from 0.

    Not conditional on the gain: where the t test does not tell it from 0, that set is unbounded ("weak"). A value alone
    that is reported only after a significant gain would be biased towards 0, since the gain is then overestimated.
    """
    sub, base, full = _as_scores(sub), _as_scores(base), _as_scores(full)
    w = _as_weights(weights, len(sub))
    part, whole = float(np.mean(w * (sub - base))), float(np.mean(w * (full - base)))
    covariance, units = _covariance(sub, base, full, clusters, w)
    if units < 2:
        return Recovery(None, None, None, "undefined")
    return fieller(part, whole, covariance, units - 1, confidence)


def fieller(
    part: float, whole: float, covariance: NDArray[np.float64], df: float, confidence: float = 0.95
) -> Recovery:
    """part / whole with the interval of `recovery`, from the covariance [2, 2] of both (Fieller 1954, J. R. Stat.
    Soc. B 16, 175)."""
    if whole == 0:
        return Recovery(None, None, None, "undefined")
    squared = _quantile(confidence, df) ** 2
    # roots of (part - r whole)^2 = t^2 Var(part - r whole), as leading r^2 - 2 middle r + last = 0
    leading = whole**2 - squared * covariance[1, 1]
    middle = part * whole - squared * covariance[0, 1]
    last = part**2 - squared * covariance[0, 0]
    if leading <= 0:
        return Recovery(part / whole, None, None, "weak")
    if whole < 0:
        return Recovery(None, None, None, "negative")
    root = math.sqrt(max(middle**2 - leading * last, 0.0))
    low, high = (middle - root) / leading, (middle + root) / leading
    return Recovery(part / whole, float(low), float(high), "ok")


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, which controls the family-wise error rate."""
    if not pvalues:
        return []
    return [float(p) for p in multipletests(pvalues, method="holm")[1]]


def minimum_detectable_effect(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The mean difference detected with probability `power` by a two-sided test at level `alpha`.

    (z_{1 - alpha/2} + z_power) sd / sqrt(n), sd of the paired differences (Miller 2024).
    """
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * sd / np.sqrt(n))


def rank_among(value: float, controls: Sequence[float]) -> Rank:
    """Rank of a value among k controls, ties counted against it; p = rank/(k+1) >= 1/(k+1)."""
    k, tied = len(controls), sum(control == value for control in controls)
    rank = 1 + tied + sum(control > value for control in controls)
    return Rank(rank, k + 1, tied, rank / (k + 1), 1 / (k + 1))


# ----------------------------------------------------------------------------------------- helpers


@dataclass(frozen=True)
class _ScoreTest:
    """Tango's statistic of wins and losses among n effective questions, with the degrees of freedom of its variance."""

    wins: float
    losses: float
    n: float
    df: float

    def z(self, difference: float) -> float:
        return _tango_z(self.wins, self.losses, self.n, difference)


def _compared(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None,
    confidence: float,
    weights: ArrayLike | None,
) -> tuple[Estimate, _ScoreTest | None, int]:
    """The mean of a - b with its error and interval, the test that the interval inverts, and the number of units."""
    a, b = _as_scores(a), _as_scores(b)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same questions; got {len(a)} and {len(b)}")
    d, w = a - b, _as_weights(weights, len(a))
    mean = float(np.mean(w * d))
    error, units = standard_error(d, clusters, w)
    test = _score_test(a, b, clusters, weights)
    low, high = _interval_of(test, mean, error, units, confidence)
    return Estimate(len(d), mean, error, low, high), test, units


def _score_test(
    a: Scores, b: Scores, clusters: ArrayLike | None, weights: ArrayLike | None
) -> _ScoreTest | None:
    """The score test of a - b, or None where Student's t serves: scores that are not 0/1, with many differences.

    Fractional differences count as fractions of wins and losses, whose variance bounds theirs.
    """
    d, w = a - b, _as_weights(weights, len(a))
    binary = _is_binary(a) and _is_binary(b)
    plain = binary and clusters is None and weights is None
    units = d if clusters is None else _cluster_sums(np.abs(d), clusters)
    if len(units) < 2 or (
        not binary and (np.count_nonzero(units) >= FEW_UNITS or np.abs(d).max() > 1)
    ):
        return None
    wins, losses = float(np.mean(w * np.maximum(d, 0))), float(np.mean(w * np.maximum(-d, 0)))
    spread = wins + losses - (wins - losses) ** 2
    n = len(d) if plain else _effective_size(d, spread, clusters, w, binary)
    return _ScoreTest(wins * n, losses * n, n, math.inf if plain else len(units) - 1)


def _tango_z(wins: float, losses: float, n: float, difference: float) -> float:
    """Tango's statistic for H0: P(win) - P(loss) = difference."""
    slope = -wins - losses + (2 * n - wins + losses) * difference
    root = math.sqrt(max(slope**2 + 8 * n * losses * difference * (1 - difference), 0.0))
    loss_rate = max((root - slope) / (4 * n), -difference, 0.0)
    variance = n * (2 * loss_rate + difference * (1 - difference))
    distance = wins - losses - n * difference
    if variance <= 0:  # no discordant pair, and none expected
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _interval_of(
    test: _ScoreTest | None, mean: float, error: float, units: int, confidence: float
) -> tuple[float, float]:
    """The differences that the score test does not reject, or Student's t interval without one."""
    if test is None:
        return _t_interval(mean, error, units, confidence)
    quantile = _quantile(confidence, test.df)
    edge = 1 - 1e-12

    def end(sign: int) -> float:
        if sign * mean >= edge:
            return float(sign)
        return float(brentq(lambda x: sign * test.z(x) + quantile, mean, sign * edge, xtol=1e-10))

    return end(-1), end(1)


def _effective_size(
    x: Scores, spread: float, clusters: ArrayLike | None, w: Scores, at_least_one: bool
) -> float:
    """n over the design effect: the variance of the mean over that of n independent questions with variance `spread`.

    Few differing units do not determine it, so one more unit counts, whose questions all differ alike.
    """
    n = len(x)
    error, units = standard_error(x, clusters, w)
    size = n / units
    independent = spread * n * n / (n - 1) + size
    effect = ((n * error) ** 2 + _cluster_size(clusters, w) * size) / independent
    return n / max(effect, 1.0 if at_least_one else 1e-9)


def _cluster_size(clusters: ArrayLike | None, w: Scores) -> float:
    """The design effect of clusters whose questions all answer alike: sum of (sum of weights)^2 over n."""
    sums = w if clusters is None else _cluster_sums(w, clusters)
    return float(np.sum(sums**2) / len(w))


def _wilson(mean: float, n: float, df: float, confidence: float) -> tuple[float, float]:
    quantile = _quantile(confidence, df)
    low, high = proportion_confint(mean * n, n, alpha=2 * stats.norm.sf(quantile), method="wilson")
    return min(float(low), mean), max(float(high), mean)  # an end at 0 or 1 is off by rounding


def _off_mode(x: Scores, clusters: ArrayLike | None) -> int:
    """The number of units that have a score other than the most common one."""
    values, counts = np.unique(x, return_counts=True)
    off = (x != values[counts.argmax()]).astype(np.float64)
    return int(np.count_nonzero(off if clusters is None else _cluster_sums(off, clusters)))


def _covariance(
    sub: Scores, base: Scores, full: Scores, clusters: ArrayLike | None, w: Scores
) -> tuple[NDArray[np.float64], int]:
    """Covariance [2, 2] of the means of sub - base and full - base, and the number of units.

    Where two of the three differ in few units, a win and a loss between them are added, so that arms with equal
    answers have an interval (as Bonett and Price 2012 do for a difference; J. Educ. Behav. Stat. 37, 479).
    """
    rows = np.stack([sub - base, full - base], axis=1)
    rows = w[:, None] * (rows - (w[:, None] * rows).mean(0))
    differ = np.stack([sub != full, sub != base, full != base], axis=1).astype(np.float64)
    if clusters is not None:
        rows, differ = _cluster_sums(rows, clusters), _cluster_sums(differ, clusters)
    units = len(rows)
    if units < 2:
        return np.full((2, 2), np.nan), units
    moments = units / (units - 1) * rows.T @ rows
    bounded = min(map(np.min, (sub, base, full))) >= 0 and max(map(np.max, (sub, base, full))) <= 1
    moved = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for direction, count in zip(moved, np.count_nonzero(differ, axis=0), strict=True):
        if count < FEW_UNITS and bounded:
            size = _cluster_size(clusters, w) * len(sub) / units
            moments = moments + 2 * size * np.outer(direction, direction)
    return moments / len(sub) ** 2, units


def _as_weights(weights: ArrayLike | None, n: int) -> Scores:
    """Weights with a mean of 1; ones without."""
    if weights is None:
        return np.ones(n)
    found = _as_scores(weights)
    return found / found.mean()


def _as_scores(x: ArrayLike) -> Scores:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"scores must be one finite number per question; got shape {x.shape}")
    return x


def _is_binary(x: Scores) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _cluster_sums(x: NDArray[np.float64], clusters: ArrayLike) -> NDArray[np.float64]:
    """Sums of x ([n] or [n, k]) over each cluster."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(index) != len(x):
        raise ValueError(f"{len(x)} questions but {len(index)} cluster names")
    sums = np.zeros((len(names), *x.shape[1:]))
    np.add.at(sums, index, x)
    return sums


def _resampled(
    rows: NDArray[np.float64], draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Yields bootstrap sums of rows [units, k] over resampled units, in blocks [some draws, k], `draws` in all.

    Resampling units is drawing multinomial weights; equal units share one weight, so two differences of 0/1 scores
    need nine weights per draw for any number of questions.
    """
    rows, counts = np.unique(rows, axis=0, return_counts=True)
    block = max(1, BLOCK // len(rows))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        weights = rng.multinomial(counts.sum(), counts / counts.sum(), size=size)
        yield weights @ rows


def standard_error(
    x: Scores, clusters: ArrayLike | None, weights: Scores | None = None
) -> tuple[float, int]:
    """Standard error of the (weighted) mean and the number of independent units; nan for a single unit.

    Clustered: sqrt(G/(G-1) sum_g (sum_{i in g} w_i (x_i - mean))^2) / n, weights with mean 1, which is sd/sqrt(n) when
    every cluster has one question, and what OLS on a constant gives (statsmodels, cov_type="cluster").
    """
    w = np.ones(len(x)) if weights is None else weights
    deviations = w * (x - np.mean(w * x))
    if clusters is not None:
        deviations = _cluster_sums(deviations, clusters)
    units = len(deviations)
    if units < 2:
        return float("nan"), units
    return float(np.sqrt(units / (units - 1) * np.sum(deviations**2)) / len(x)), units


def _quantile(confidence: float, df: float) -> float:
    """The two-sided quantile of Student's t, of the normal for infinite df; scipy.stats' takes 60 times as long."""
    return float(stdtrit(df, (1 + confidence) / 2))


def _t_interval(mean: float, error: float, units: int, confidence: float) -> tuple[float, float]:
    if units < 2:
        return float("nan"), float("nan")
    half = _quantile(confidence, units - 1) * error
    return float(mean - half), float(mean + half)
