"""A tensor by the sizes of its entries: norm, k-th smallest, energy of the largest, which moved; nothing is sorted."""

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
"""Coordinates at a time, so that temporaries stay in the cache."""
SPARSE, SAMPLE = 128, 2**14
"""A sample has at most every 128th entry, and at most about so many."""


def magnitudes(values: Tensor) -> Tensor:
    """|values|, a copy in fp32 or wider."""
    sizes = values.abs()
    return sizes if sizes.dtype == torch.float64 else sizes.float()


def norm(tensor: Tensor) -> float:
    """Frobenius norm, added up in float64 without a float64 copy."""
    parts = tensor.reshape(-1).split(CHUNK)
    return math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts)
    )


@dataclass(frozen=True)
class Cut:
    """The k-th smallest of a tensor's sizes, with how many are smaller than it and how many equal."""

    value: float
    smaller: int
    equal: int


def cut(sizes: Tensor, k: int) -> Cut:
    """The k-th smallest of flat sizes, k in 1..n.

    A sample brackets it, and only what lies strictly within the bracket is put in order: one pass over the sizes
    where a partition of them takes several, and more among ties (Floyd and Rivest, 1975).
    """
    if sizes.device.type != "cpu":
        value = sizes.kthvalue(k).values
        return Cut(float(value), count(sizes < value), count(sizes == value))
    array = sizes.numpy()
    lowest, highest = bracket(array, k)
    upto, between = split(array, lowest, highest)
    if k <= upto:
        smaller = sum(count(marked(lt, part, lowest)) for part in sizes.split(CHUNK))
        if smaller < k:
            return Cut(lowest, smaller, upto - smaller)
        upto, between = split(array, -np.inf, lowest)  # unlucky, or a sample unlike the rest
    elif k > upto + len(between):
        equal = sum(count(marked(eq, part, highest)) for part in sizes.split(CHUNK))
        if k <= upto + len(between) + equal:
            return Cut(highest, upto + len(between), equal)
        upto, between = split(array, highest, np.inf)
    if k > upto + len(between):
        return Cut(np.inf, upto + len(between), len(array) - upto - len(between))
    between.partition(k - 1 - upto)
    value = between[k - 1 - upto]
    under, equal = (int(np.count_nonzero(each)) for each in (between < value, between == value))
    return Cut(float(value), upto + under, equal)


def bracket(array: np.ndarray, k: int) -> tuple[float, float]:
    """Two values between which the k-th smallest lies, going by every so many-th entry: four deviations each way."""
    step = max(SPARSE, len(array) // SAMPLE) | 1  # odd: an even one may stay in few columns
    sample = np.sort(array[::step])
    share = k / len(array)
    at, room = share * len(sample), 1 + 4 * math.sqrt(len(sample) * share * (1 - share))
    first, last = math.floor(at - room), math.ceil(at + room)
    lowest = sample[first] if first >= 0 else -np.inf
    highest = sample[last] if last < len(sample) else np.inf
    return float(lowest), float(highest)


def split(array: np.ndarray, lowest: float, highest: float) -> tuple[int, np.ndarray]:
    """(how many are <= lowest, those strictly between it and highest)."""
    upto, between = 0, []
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK]
        above = part > lowest
        upto += len(part) - int(np.count_nonzero(above))
        above &= part < highest
        between.append(part[np.flatnonzero(above)])
    return upto, np.concatenate(between)


def top_energy(sizes: Tensor, k: int) -> float:
    """Sum of the squares of the k largest of flat sizes, added up in float64; k in 1..n."""
    found = cut(sizes, len(sizes) - k + 1)
    ties = k - (len(sizes) - found.smaller - found.equal)
    parts = (p.index_select(0, places_of(marked(gt, p, found.value))) for p in sizes.split(CHUNK))
    return math.fsum(norm(part) ** 2 for part in parts) + ties * found.value**2


def where_moved(delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The entries of each at which `delta` is not 0; all of them where few are 0, which picking would not pay for.

    Training in bf16 leaves most entries where they were.
    """
    places = places_of(marked(ne, delta, 0.0))
    if len(places) > len(delta) // 2:
        return delta, *others
    return tuple(values.index_select(0, places) for values in (delta, *others))


def marked(test: Test, values: Tensor, limit: Tensor | float) -> Tensor:
    """Which values pass a test against a limit (on a CPU by NumPy, which takes a tenth of torch's time)."""
    if values.device.type != "cpu":
        return test(values, limit)
    against = limit.numpy() if isinstance(limit, Tensor) else limit
    return torch.from_numpy(test(values.numpy(), against))


def places_of(marks: Tensor) -> Tensor:
    """Places of the true entries of a flat tensor (NumPy finds them five times as fast as torch does on a CPU)."""
    if marks.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(marks.numpy()))
    return marks.nonzero().squeeze(1)


def count(marks: Tensor) -> int:
    """Number of true entries (NumPy counts bytes far faster than torch does on a CPU)."""
    if marks.device.type == "cpu":
        return int(np.count_nonzero(marks.numpy()))
    return int(marks.sum())
