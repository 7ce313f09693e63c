"""A tensor's entries in the order of their sizes: on a CPU NumPy's vectorised sort, which beats many passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**17
"""Coordinates at a time, so that temporaries stay in the cache."""
SPARSE, SAMPLE = 128, 2**14
"""A sample has at most every 128th entry, and at most about so many."""


def ordered(values: Tensor) -> Tensor:
    """|values| of a flat tensor, ascending, in fp32 or wider."""
    sizes = magnitudes(values)
    if sizes.device.type != "cpu":
        return sizes.sort().values
    sizes.numpy().sort()
    return sizes


def magnitudes(values: Tensor) -> Tensor:
    """|values|, a copy in fp32 or wider."""
    sizes = values.abs()
    return sizes if sizes.dtype == torch.float64 else sizes.float()


def below(sizes: Tensor, threshold: float) -> int:
    """How many of the `ordered` sizes are < threshold, a value of their dtype."""
    return int(torch.searchsorted(sizes, sizes.new_tensor(threshold)))


def upto(sizes: Tensor, threshold: float) -> int:
    """How many of the `ordered` sizes are <= threshold, a value of their dtype."""
    return int(torch.searchsorted(sizes, sizes.new_tensor(threshold), right=True))


@dataclass(frozen=True)
class Cut:
    """The k-th smallest of a tensor's sizes, with how many are smaller than it and how many equal."""

    value: float
    smaller: int
    equal: int


def cut(sizes: Tensor, k: int) -> Cut:
    """The k-th smallest of flat sizes, k in 1..n.

    A sample brackets it, and only what lies within the bracket is put in order: one pass over the sizes where a
    partition of them takes several (Floyd and Rivest, 1975).
    """
    if sizes.device.type != "cpu":
        value = sizes.kthvalue(k).values
        return Cut(float(value), count(sizes < value), count(sizes == value))
    array = sizes.numpy()
    smaller, middle = within(array, *bracket(array, k))
    if not smaller < k <= smaller + len(middle):  # unlucky, or a sample unlike the rest
        smaller, middle = 0, array.copy()
    rank = k - 1 - smaller
    middle.partition(rank)
    value = middle[rank]
    under, equal = (int(np.count_nonzero(each)) for each in (middle < value, middle == value))
    return Cut(float(value), smaller + under, equal)


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


def within(array: np.ndarray, lowest: float, highest: float) -> tuple[int, np.ndarray]:
    """(how many entries are < lowest, those from lowest to highest)."""
    smaller, found = 0, []
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK]
        under = part < lowest
        smaller += int(np.count_nonzero(under))
        found.append(part[np.flatnonzero((part <= highest) ^ under)])
    return smaller, np.concatenate(found)


def where_moved(delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The entries of each at which `delta` is not 0; all of them where few are 0, which picking would not pay for.

    Training in bf16 leaves most entries where they were.
    """
    if delta.device.type == "cpu":
        places = torch.from_numpy(
            np.flatnonzero(delta.numpy() != 0)
        )  # torch's takes five times as long
    else:
        places = delta.nonzero().squeeze(1)
    if len(places) > len(delta) // 2:
        return delta, *others
    return tuple(values.index_select(0, places) for values in (delta, *others))


def count(marked: Tensor) -> int:
    """Number of true entries (NumPy counts bytes far faster than torch does on a CPU)."""
    if marked.device.type == "cpu":
        return int(np.count_nonzero(marked.numpy()))
    return int(marked.sum())
