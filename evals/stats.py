"""Standard errors, intervals and tests for scores of the same questions under several arms.

Pure functions of numpy arrays, one entry per question, aligned across arms. A score is the value of the
task's metric (mostly 0/1); means, errors and differences are in its unit. `clusters` names
the group of each question (a passage, an image) where questions are not independent.
Sources: Miller 2024 (arXiv 2411.00640) for the errors, Bowyer et al. 2025 (2503.01747) for why the
normal interval is not used on few questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import comb
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Scores = NDArray[np.float64]

FEW_QUESTIONS = 100
FEW_EVENTS = 10
"""Below either, 0/1 scores get exact or adjusted intervals, since the normal one is too narrow."""
BLOCK = 2_000_000
"""Bootstrap weights per block, to bound memory."""


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
    test: Literal["mcnemar", "paired_t"]


@dataclass(frozen=True)
class Recovery:
    """A fraction of a gain. `value`, `low`, `high` are None unless `status` is "ok".

    "undefined": the gain's interval includes 0. "negative": the gain is negative.
    """

    value: float | None
    low: float | None
    high: float | None
    status: Literal["ok", "undefined", "negative"]


@dataclass(frozen=True)
class NonInferiority:
    """Whether a - b lies above -margin, at the one-sided level (1 - confidence) / 2."""

    margin: float
    low: float
    p: float
    holds: bool


@dataclass(frozen=True)
class SeedDifference:
    """A mean difference of two groups of training seeds, with an interval over seeds and questions.

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
    """Rank among controls, 1 the best, and its permutation p-value."""

    rank: int
    of: int
    p: float
    smallest_possible_p: float


def mean_with_error(
    x: ArrayLike, clusters: ArrayLike | None = None, confidence: float = 0.95
) -> Estimate:
    """Mean with its standard error, sd(ddof=1)/sqrt(n) or clustered, and an interval.

    The interval is Student's t over units (questions or clusters); Wilson's for few 0/1 scores.
    """
    x = _as_scores(x)
    error, units = standard_error(x, clusters)
    events = min(x.sum(), len(x) - x.sum())
    if clusters is None and _is_binary(x) and (len(x) < FEW_QUESTIONS or events < FEW_EVENTS):
        low, high = proportion_confint(int(x.sum()), len(x), alpha=1 - confidence, method="wilson")
    else:
        low, high = _t_interval(x.mean(), error, units, confidence)
    return Estimate(len(x), float(x.mean()), error, float(low), float(high))


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None, confidence: float = 0.95
) -> Difference:
    """Mean of a - b over the same questions, with the error of the differences.

    Unclustered 0/1 scores are tested by exact McNemar, others by the paired t. Few discordant pairs
    get the adjusted Wald interval of Bonett and Price 2012 (J. Educ. Behav. Stat. 37, 479).
    """
    a, b = _as_scores(a), _as_scores(b)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same questions; got {len(a)} and {len(b)}")
    d = a - b
    error, units = standard_error(d, clusters)
    low, high = _t_interval(d.mean(), error, units, confidence)
    test: Literal["mcnemar", "paired_t"]
    if clusters is None and _is_binary(a) and _is_binary(b):
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        if len(d) < FEW_QUESTIONS or wins + losses < FEW_EVENTS:
            low, high = _adjusted_wald(wins, losses, len(d), confidence)
        p, test = _mcnemar_exact(wins, losses), "mcnemar"
    else:
        p, test = _t_test(d.mean(), error, units), "paired_t"
    return Difference(len(d), float(d.mean()), error, float(low), float(high), p, test)


def non_inferiority(
    a: ArrayLike,
    b: ArrayLike,
    margin: float,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
) -> NonInferiority:
    """Tests H0: mean(a - b) <= -margin (a is worse than b by at least `margin`).

    Not the same as "p > 0.05 for zero difference". Unclustered 0/1 scores are tested by Tango's score test
    (1998, Stat. Med. 17, 891), which keeps its level where few questions are discordant; others by the paired t.
    `low` is the lower end of the difference's interval.
    """
    found = paired_difference(a, b, clusters, confidence)
    a, b = _as_scores(a), _as_scores(b)
    if clusters is None and _is_binary(a) and _is_binary(b):
        p = tango(int((a > b).sum()), int((a < b).sum()), len(a), margin)
    else:
        _, units = standard_error(a - b, clusters)
        distance = found.mean + margin
        if units < 2:
            p = 1.0
        elif found.standard_error == 0:
            p = float(distance <= 0)
        else:
            p = float(stats.t.sf(distance / found.standard_error, units - 1))
    return NonInferiority(margin, found.low, p, p <= (1 - confidence) / 2)


def tango(wins: int, losses: int, n: int, margin: float) -> float:
    """One-sided p-value of H0: P(win) - P(loss) <= -margin, by the score test with the rates fitted under H0."""
    shift = -margin
    slope = -wins - losses + (2 * n - wins + losses) * shift
    root = np.sqrt(max(slope**2 + 8 * n * losses * shift * (1 - shift), 0.0))
    loss_rate = (root - slope) / (4 * n)
    error = np.sqrt(n * (2 * loss_rate + shift * (1 - shift)))
    return float(stats.norm.sf((wins - losses + n * margin) / error))


def seed_difference(
    a: ArrayLike,
    b: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
) -> SeedDifference:
    """Mean over seeds of a minus that of b, from scores [seeds of a, n] and [seeds of b, n].

    Two-level bootstrap: resamples seeds within each group, and questions (or clusters) jointly.
    Draws one seed fewer than available, which makes the variance between seeds unbiased (Rao and Wu 1988,
    J. Am. Stat. Assoc. 83, 231); with two or three seeds it remains poorly estimated.
    """
    both = [np.asarray(x, dtype=np.float64) for x in (a, b)]
    if (
        any(x.ndim != 2 or not np.isfinite(x).all() for x in both)
        or len({x.shape[1] for x in both}) > 1
    ):
        raise ValueError("scores of seeds must be [seeds, questions], of the same questions")
    n = both[0].shape[1]
    names = np.arange(n) if clusters is None else clusters
    sums = [_cluster_sums(x.T, names) for x in both]  # [units, seeds]
    sizes = _cluster_sums(np.ones(n), names)
    rng, found = np.random.default_rng(seed), []
    for drawn in _resampled(np.column_stack([*sums, sizes]), draws, rng):
        means = []
        for own in (drawn[:, : len(both[0])], drawn[:, len(both[0]) : -1]):
            each = own / drawn[:, -1:]  # [draws, seeds]
            count = own.shape[1]
            times = max(count - 1, 1)
            chosen = rng.multinomial(times, np.full(count, 1 / count), size=len(own)) / times
            means.append((each * chosen).sum(1))
        found.append(means[0] - means[1])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    of_seeds = [x.mean(1) for x in both]
    deviations = [float(m.std(ddof=1)) if len(m) > 1 else float("nan") for m in of_seeds]
    mean = float(of_seeds[0].mean() - of_seeds[1].mean())
    return SeedDifference(
        len(of_seeds[0]), len(of_seeds[1]), mean, float(low), float(high), *deviations
    )


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(a - b) over questions or clusters, to check the closed forms."""
    found = seed_difference([_as_scores(a)], [_as_scores(b)], draws, seed, confidence, clusters)
    return found.low, found.high


def pass_at_k(successes: ArrayLike, n: int, k: int) -> Scores:
    """Probability that at least one of k answers is right, from `successes` of n samples, per question.

    1 - C(n - c, k) / C(n, k), unbiased (arXiv 2107.03374).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples; got {n}")
    c = np.asarray(successes, dtype=np.float64)
    return 1.0 - comb(n - c, k) / comb(n, k)


def _mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p-value from the discordant pairs; 1 without any."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def recovery(
    sub: ArrayLike,
    base: ArrayLike,
    full: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters: ArrayLike | None = None,
) -> Recovery:
    """(sub - base) / (full - base), with a percentile interval from a paired bootstrap over questions.

    With `clusters`, whole clusters are resampled.
    """
    sub, base, full = _as_scores(sub), _as_scores(base), _as_scores(full)
    gain = paired_difference(full, base, clusters, confidence)
    if not gain.low > 0:  # nan too
        return Recovery(None, None, None, "negative" if gain.high < 0 else "undefined")
    rows = np.stack([sub - base, full - base], axis=1)
    if clusters is not None:
        rows = _cluster_sums(rows, clusters)
    rng = np.random.default_rng(seed)
    parts, wholes = np.concatenate(list(_resampled(rows, draws, rng))).T
    ratios = parts[wholes != 0] / wholes[wholes != 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Recovery(float((sub - base).mean() / gain.mean), float(low), float(high), "ok")


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
    k = len(controls)
    rank = 1 + sum(control >= value for control in controls)
    return Rank(rank, k + 1, rank / (k + 1), 1 / (k + 1))


# ----------------------------------------------------------------------------------------- helpers


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


def standard_error(x: Scores, clusters: ArrayLike | None) -> tuple[float, int]:
    """Standard error of the mean and the number of independent units; nan for a single unit.

    Clustered: sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / n, which is sd/sqrt(n) when every
    cluster has one question, and what OLS on a constant gives (statsmodels, cov_type="cluster").
    """
    deviations = x - x.mean()
    if clusters is not None:
        deviations = _cluster_sums(deviations, clusters)
    units = len(deviations)
    if units < 2:
        return float("nan"), units
    return float(np.sqrt(units / (units - 1) * np.sum(deviations**2)) / len(x)), units


def _t_interval(mean: float, error: float, units: int, confidence: float) -> tuple[float, float]:
    if units < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, units - 1) * error
    return mean - half, mean + half


def _t_test(mean: float, error: float, units: int) -> float:
    """Two-sided p-value of mean = 0; 1 for a single unit."""
    if units < 2 or mean == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(mean) / error, units - 1)) if error else 0.0


def _adjusted_wald(wins: int, losses: int, n: int, confidence: float) -> tuple[float, float]:
    """Adjusted Wald interval of a difference of paired proportions: adds one win and one loss."""
    up, down = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    error = np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    half = stats.norm.ppf((1 + confidence) / 2) * error
    return max(-1.0, up - down - half), min(1.0, up - down + half)
