"""Nulls whose mean and standard deviation are known in closed form.

They hold for an unrounded update. Where rounding to the stored precision matters, as for coordinates in bf16, their
distance from the drawn nulls shows how much of an excess is due to rounding.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfc

BF16_BITS = 7
"""Bits of a bf16 mantissa: an ulp is 2^-7 of the binade's lower end."""
COARSE = 8.0
"""Standard deviations in ulps above which rounding only adds its own variance, 1/12 ulp^2."""


def projected_share(dimensions: int, entries: int) -> tuple[float, float]:
    """Mean and standard deviation of the share of an i.i.d. Gaussian update's energy in a fixed subspace.

    The share is Beta(d/2, (N - d)/2), d of N dimensions; d = k^2 for the joint projection onto top-k subspaces
    (k^2 / (mn)), kn for the left one (k / m), km for the right one (k / n).
    """
    mean = dimensions / entries
    return mean, math.sqrt(2 * mean * (1 - mean) / (entries + 2))


def hypergeometric(members: int, moved: int, n: int) -> tuple[float, float]:
    """Mean and variance of |M and U| for `members` and `moved` coordinates drawn uniformly from n."""
    if n == 0:
        return 0.0, 0.0
    mean = members * moved / n
    if n == 1:
        return mean, 0.0
    return mean, mean * (n - members) * (n - moved) / (n * (n - 1))


def visible_in_bf16(binades: np.ndarray, rms: float, is_rounded: bool) -> tuple[float, float]:
    """Mean and variance of the number of coordinates that a Gaussian update moves in bf16.

    An update shows where it carries the weight over a rounding boundary of bf16, which depends on its size beside |w|
    alone: the account that arXiv 2602.03839 (PULSE) gives of sparse updates. With ulp h of the weight, standard
    deviation s and x = h / s, the probability is, with the normal tail Q and density phi,

        2 Q(x / 2)                           for a base stored in bf16, half an ulp from either boundary
        2 Q(x) + 2 (phi(0) - phi(x)) / x     for one stored more finely, at a uniform place between boundaries

    binades: number of weights with each biased exponent of fp32 [256]; rms: of the update as stored. `is_rounded`: both
    are stored in bf16; s is then the one at which the rounded update has this rms (`unrounded_size`). Ignored: that
    below a power of two the ulp is half as large, and an update that leaves the weight's binade. The variance is of
    independent coordinates, an upper bound where the update's norm is given.
    """
    found = np.flatnonzero(binades)
    numbers, ulps = binades[found].astype(float), ulps_of(found)
    if rms == 0 or not len(found):
        return 0.0, 0.0
    if is_rounded:
        x = ulps / unrounded_size(numbers, ulps, rms)
        chance = erfc(x / math.sqrt(8))
    else:
        x = ulps / rms
        flat = -np.expm1(-np.square(x) / 2) * math.sqrt(2 / math.pi)
        chance = np.minimum(1.0, erfc(x / math.sqrt(2)) + flat / x)
    return float(numbers @ chance), float(numbers @ (chance * (1 - chance)))


def ulps_of(exponents: np.ndarray) -> np.ndarray:
    """The ulp of bf16 at each biased exponent of fp32; 0 has that of the smallest normal numbers."""
    return np.exp2(np.maximum(exponents, 1) - 127.0 - BF16_BITS)


def unrounded_size(numbers: np.ndarray, ulps: np.ndarray, rms: float) -> float:
    """The standard deviation of a Gaussian update whose r.m.s. is `rms` once it is rounded to whole ulps.

    numbers: of weights with each of `ulps`. Rounding at most doubles an entry, and takes at most half an ulp from it.
    """

    def excess(log_size: float) -> float:
        size = math.exp(log_size)
        return math.sqrt(float(numbers @ rounded_energy(size, ulps)) / numbers.sum()) - rms

    return math.exp(brentq(excess, math.log(rms / 2.1), math.log(1.1 * (rms + ulps.max() / 2))))


def rounded_energy(size: float, ulps: np.ndarray) -> np.ndarray:
    """E[(h round(u / h))^2] of u ~ N(0, size^2) for each ulp h: h^2 sum_k (2 k - 1) P(|u| > (k - 1/2) h)."""
    scale = size / ulps
    k = np.arange(1, int(8 * COARSE) + 2)
    with np.errstate(over="ignore"):
        tails = erfc((k - 0.5) / (np.minimum(scale, COARSE)[:, None] * math.sqrt(2)))
    series = np.square(ulps) * (tails @ (2.0 * k - 1))
    return np.where(scale <= COARSE, series, size**2 + np.square(ulps) / 12)
