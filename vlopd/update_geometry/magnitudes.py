"""Magnitudes of a tensor's entries: norm, k-th smallest, energy of the largest, nonzero entries; without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import eq, gt, lt, ne
from typing import Any

import numpy as np
import torch
from torch import Tensor

Test = Callable[[Any, Any], Any]
"""A comparison: one of operator's lt, le, gt, ge, eq, ne."""

CHUNK = 2**17
"""Coordinates per chunk, so that temporaries stay in the CPU cache."""
SPARSE, SAMPLE = 128, 2**14
"""A sample has at most every 128th entry, and at most about 2^14 entries."""


def magnitudes(values: Tensor) -> Tensor:
    """|values|, a copy in fp32 or wider."""
    sizes = values.abs()
    return sizes if sizes.dtype == torch.float64 else sizes.float()


def norm(tensor: Tensor) -> float:
    """Frobenius norm, accumulated in float64 without a float64 copy."""
    parts = tensor.reshape(-1).split(CHUNK)
    return math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts)
    )


@dataclass(frozen=True)
class OrderStatistic:
    """The k-th smallest value, with the counts of smaller and of equal ones."""

    value: float
    smaller: int
    equal: int


def kth_smallest(sizes: Tensor, k: int) -> OrderStatistic:
    """The k-th smallest of flat sizes, k in 1..n.

    A sample brackets it, and only values strictly within the bracket are partitioned: one pass over the sizes, where
    a full partition takes several, and more with ties (Floyd and Rivest, 1975).
    """
    if sizes.device.type != "cpu":
        value = sizes.kthvalue(k).values
        return OrderStatistic(float(value), count(sizes < value), count(sizes == value))
    array = sizes.numpy()
    lowest, highest = bracket(array, k)
    upto, between = _split_at_bracket(array, lowest, highest)
    if k <= upto:
        smaller = sum(count(compare(lt, part, lowest)) for part in sizes.split(CHUNK))
        if smaller < k:
            return OrderStatistic(lowest, smaller, upto - smaller)
        upto, between = _split_at_bracket(array, -np.inf, lowest)  # unrepresentative sample
    elif k > upto + len(between):
        equal = sum(count(compare(eq, part, highest)) for part in sizes.split(CHUNK))
        if k <= upto + len(between) + equal:
            return OrderStatistic(highest, upto + len(between), equal)
        upto, between = _split_at_bracket(array, highest, np.inf)
    if k > upto + len(between):
        return OrderStatistic(np.inf, upto + len(between), len(array) - upto - len(between))
    between.partition(k - 1 - upto)
    value = between[k - 1 - upto]
    under, equal = (int(np.count_nonzero(each)) for each in (between < value, between == value))
    return OrderStatistic(float(value), upto + under, equal)


def bracket(array: np.ndarray, k: int) -> tuple[float, float]:
    """A bracket of the k-th smallest value from a strided sample, +- 4 standard errors."""
    step = max(SPARSE, len(array) // SAMPLE) | 1  # odd: an even stride may visit few columns only
    sample = np.sort(array[::step])
    share = k / len(array)
    at, room = share * len(sample), 1 + 4 * math.sqrt(len(sample) * share * (1 - share))
    first, last = math.floor(at - room), math.ceil(at + room)
    lowest = sample[first] if first >= 0 else -np.inf
    highest = sample[last] if last < len(sample) else np.inf
    return float(lowest), float(highest)


def _split_at_bracket(array: np.ndarray, lowest: float, highest: float) -> tuple[int, np.ndarray]:
    """(number of values <= lowest, the values strictly between lowest and highest)."""
    upto, between = 0, []
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK]
        above = part > lowest
        upto += len(part) - int(np.count_nonzero(above))
        above &= part < highest
        between.append(part[np.flatnonzero(above)])
    return upto, np.concatenate(between)


def top_energy(sizes: Tensor, k: int) -> float:
    """Sum of the squares of the k largest of flat sizes, accumulated in float64; k in 1..n."""
    found = kth_smallest(sizes, len(sizes) - k + 1)
    ties = k - (len(sizes) - found.smaller - found.equal)
    parts = (
        p.index_select(0, true_indices(compare(gt, p, found.value))) for p in sizes.split(CHUNK)
    )
    return math.fsum(norm(part) ** 2 for part in parts) + ties * found.value**2


def nonzero_entries(delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The entries of each tensor at which `delta` is not 0; all where few are 0 (gathering does not pay off).

    Training in bf16 leaves most entries unchanged.
    """
    places = true_indices(compare(ne, delta, 0.0))
    if len(places) > len(delta) // 2:
        return delta, *others
    return tuple(values.index_select(0, places) for values in (delta, *others))


def compare(test: Test, values: Tensor, limit: Tensor | float) -> Tensor:
    """Elementwise comparison with a limit (on a CPU by NumPy, which takes a tenth of torch's time)."""
    if values.device.type != "cpu":
        return test(values, limit)
    against = limit.numpy() if isinstance(limit, Tensor) else limit
    return torch.from_numpy(test(values.numpy(), against))


def true_indices(marks: Tensor) -> Tensor:
    """Indices of the true entries of a flat tensor (on a CPU NumPy is five times as fast as torch)."""
    if marks.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(marks.numpy()))
    return marks.nonzero().squeeze(1)


def count(marks: Tensor) -> int:
    """Number of true entries (on a CPU NumPy is far faster than torch)."""
    if marks.device.type == "cpu":
        return int(np.count_nonzero(marks.numpy()))
    return int(marks.sum())


def binade_counts(values: Tensor) -> np.ndarray:
    """Number of flat values with each biased exponent of fp32 [256]; 0 is that of zeros and subnormal numbers."""
    found = torch.zeros(256, dtype=torch.int64, device=values.device)
    for part in values.split(CHUNK):
        exponents = (part.float().view(torch.int32) >> 23) & 255
        found += torch.bincount(exponents, minlength=256)
    return found.cpu().numpy()
