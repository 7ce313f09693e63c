"""Merges the updates of several checkpoints of one base, tensor by tensor: in float64, then rounded as stored.

sum   w + scale sum_i D_i                                     (task arithmetic, arXiv 2212.04089)
ties  w + scale mean of the trimmed D_i that have the elected sign, which is that of their sum
      (TIES: trim, elect sign, disjoint mean; arXiv 2306.01708)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vlopd.weights.delta import TensorDelta


def merged(
    pairs: Sequence[TensorDelta],
    method: str,
    scale: float = 1.0,
    kept: Sequence[Tensor] | None = None,
) -> Tensor:
    """One parameter with the merged updates of `pairs`, which have one base; in the dtype that holds all as stored.

    kept: of each update the coordinates that trimming leaves, bool; None for all. A single update at scale 1 gives its
    trained values bit for bit, as do coordinates that a single update moves; unmoved ones keep the base's bits.
    """
    stored = [pairs[0].base.dtype, *(pair.trained.dtype for pair in pairs)]
    dtype = functools.reduce(torch.promote_types, stored)
    if len(pairs) == 1 and scale == 1 and kept is None:
        return pairs[0].trained.to(dtype)
    base = pairs[0].base.double()
    deltas = [pair.trained.double() - base for pair in pairs]
    if kept is not None:
        deltas = [delta.where(own, 0.0) for delta, own in zip(deltas, kept, strict=True)]
    if method == "ties":
        deltas = agreeing(deltas)
    count = sum((delta != 0).to(torch.int32) for delta in deltas)
    assert isinstance(count, Tensor)
    change = functools.reduce(torch.add, deltas)
    if method == "ties":
        change = change / count.clamp(min=1)
    found = base + scale * change
    if scale == 1:  # base + (trained - base) may differ from trained in its last bit
        for pair, delta in zip(pairs, deltas, strict=True):
            found = pair.trained.double().where((delta != 0) & (count == 1), found)
    return found.to(dtype).where(change != 0, pairs[0].base.to(dtype))


def moved(pair: TensorDelta, change: Tensor) -> Tensor:
    """The base plus a float64 change, rounded to the dtype that holds base and trained values; exact where it is 0."""
    dtype = torch.promote_types(pair.base.dtype, pair.trained.dtype)
    found = (pair.base.double() + change).to(dtype)
    return found.where(change != 0, pair.base.to(dtype))


def agreeing(deltas: Sequence[Tensor]) -> list[Tensor]:
    """The updates' entries that have the sign of their sum, coordinate by coordinate; 0 elsewhere, or where it is 0."""
    elected = functools.reduce(torch.add, deltas).sign()
    return [delta.where(delta.sign() == elected, 0.0) for delta in deltas]
