"""Nulls whose mean and standard deviation are known in closed form.

They hold for an unrounded update. Where rounding to the stored precision matters, as for coordinates in bf16, their
distance from the drawn nulls shows how much of an excess is due to rounding.
"""

from __future__ import annotations

import math


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
