"""Differences of two groups of training seeds: intervals, p, equivalence, and false-discovery control.

Pure functions of numbers on the scale on which they are compared (a measure, or its logarithm). The units are arms,
each trained with a seed of its own; never tensors, pairs of arms or draws. scripts/study_groups.py measures coverage
and error rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import false_discovery_control

from vlopd.update_geometry.schema import EQUAL

Similarities = Mapping[frozenset[str], float]
"""{the two arms of a pair: their similarity}."""

LEAST_ARMS = 2
"""Arms of a group without which its values have no deviation."""
LEAST_PAIRED = 3
"""The same for pairs: two arms have one pair only."""


class Part(NamedTuple):
    """A term of the variance of a difference, with its degrees of freedom."""

    variance: float
    df: float


class Difference(NamedTuple):
    """A difference of two groups with its interval; the rest is None, with a `reason`, where it has no error.

    p: two-sided, of no difference. p_equivalent: the larger p of the two one-sided tests that |difference| >= margin
    (TOST; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657).
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_equivalent: float | None = None
    reason: str = ""


def welch(real: Sequence[float], null: Sequence[float], margin: float, level: float) -> Difference:
    """The difference of the means of two groups of arms, without assuming equal variances (Welch 1947).

    level: confidence level of the interval.
    """
    parts = [_part_of_mean(x) for x in (real, null)]
    value = float(np.mean(real) - np.mean(null))
    return student(value, parts, margin, level, max(map(abs, (*real, *null))))


def welch_to_draws(
    excess: Sequence[float], draws: Part, margin: float, level: float, largest: float
) -> Difference:
    """The mean excess of arms over the mean of a drawn null.

    draws: the variance of the null's mean. It is not divided by the number of arms, which may share the draws' noise.
    largest: the largest value that an excess is of, as in `student`.
    """
    parts = [_part_of_mean(excess), draws]
    return student(float(np.mean(excess)), parts, margin, level, largest)


def _part_of_mean(values: Sequence[float]) -> Part:
    return Part(float(np.var(values, ddof=1)) / len(values), len(values) - 1)


def pair_mean(pairs: Similarities, first: Sequence[str], second: Sequence[str]) -> float:
    """The mean similarity of an arm of `first` and another of `second`."""
    found = [pairs[frozenset((a, b))] for a in first for b in second if a != b]
    return math.fsum(found) / len(found)


def jackknife(
    statistic: Callable[..., float],
    groups: Sequence[Sequence[str]],
    margin: float,
    level: float,
    largest: float,
    more: Sequence[Part] = (),
) -> Difference:
    """A statistic of the pairs within and between groups of arms, with the error of the jackknife over arms.

    statistic(*groups) is a mean over pairs, or a difference of such means: a U-statistic of arms, so pairs that share
    an arm are not independent. Leaving out one arm at a time has the right variance where similarities are sums over
    arms, and too large a one where pairs vary independently (Arvesen 1969, Ann. Math. Stat. 40, 2076; Efron and Stein
    1981, Ann. Stat. 9, 586): the test keeps its level, for three arms of a group too. more: further terms.
    """
    parts = list(more)
    for i, group in enumerate(groups):
        n = len(group)
        without = [
            statistic(*groups[:i], [arm for arm in group if arm != left], *groups[i + 1 :])
            for left in group
        ]
        parts.append(Part((n - 1) * float(np.var(without)), n - 1))
    return student(statistic(*groups), parts, margin, level, largest)


def student(
    value: float, parts: Sequence[Part], margin: float, level: float, largest: float
) -> Difference:
    """Student's t for a difference whose variance is the sum of `parts` (Welch and Satterthwaite).

    largest: the largest of the compared numbers; deviations that are its rounding count as none.
    """
    variance = math.fsum(part.variance for part in parts)
    error = math.sqrt(variance)
    if error <= EQUAL * largest:
        same = abs(value) <= EQUAL * largest
        how = "equal in all arms" if same else "without variation over seeds"
        return Difference(value, reason=f"{how}: no test")
    df = variance**2 / math.fsum(part.variance**2 / part.df for part in parts)
    half = float(stdtrit(df, (1 + level) / 2)) * error
    p = 2 * float(stdtr(df, -abs(value) / error))
    equivalent = float(stdtr(df, -(margin - abs(value)) / error))
    return Difference(value, value - half, value + half, p, equivalent)


def adjust(ps: Sequence[float | None]) -> list[float | None]:
    """q of each p by Benjamini and Hochberg (1995): q <= a flags rows of which on average a share a is false at most.

    Rows without p do not count.
    """
    known = [p for p in ps if p is not None]
    found = iter(false_discovery_control(known) if known else ())
    return [None if p is None else float(next(found)) for p in ps]
