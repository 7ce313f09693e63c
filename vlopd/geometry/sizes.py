"""A tensor's entries in the order of their sizes: on a CPU NumPy's vectorised sort, which beats many passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**17
"""Coordinates at a time, so that temporaries stay in the cache."""


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
    """The k-th smallest of flat sizes, k in 1..n; reorders them."""
    if sizes.device.type == "cpu":
        sizes.numpy().partition(k - 1)
    else:
        sizes.copy_(sizes.sort().values)
    value = float(sizes[k - 1])
    before, after = (
        sum(count(part == value) for part in side.split(CHUNK))
        for side in (sizes[: k - 1], sizes[k - 1 :])
    )
    return Cut(value, k - 1 - before, before + after)


def count(marked: Tensor) -> int:
    """Number of true entries (NumPy counts bytes far faster than torch does on a CPU)."""
    if marked.device.type == "cpu":
        return int(np.count_nonzero(marked.numpy()))
    return int(marked.sum())
