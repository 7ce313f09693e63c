"""Selects an exact number of coordinates of one or many tensors: the largest, the smallest, the highest energy.

Ties go to the earliest tensor and the lowest flat index: bf16 deltas have many ties, and a mask must not depend on
the machine. The threshold is found by a radix selection over two histograms of 2^16 bins, without sorting, copying
or concatenating.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor

Keys = Callable[[], Iterable[Tensor]]
"""Returns int32 tensors of values >= 0, the same on every call."""


def quota(fraction: float, n: int) -> int:
    """ceil(fraction * n) for the decimal as written: 7 % of 100 is 7, although 0.07 * 100 > 7."""
    return math.ceil(Fraction(str(fraction)) * n)


def select(keys: Keys, count: int) -> list[Tensor]:
    """Selects the `count` largest keys of many tensors; ties to the earliest tensor, lowest index."""
    high = sum(torch.bincount(k.flatten() >> 16, minlength=1 << 15) for k in keys())
    top, above = _digit(high, count)
    low = sum(
        torch.bincount(k.flatten()[k.flatten() >> 16 == top] & 0xFFFF, minlength=1 << 16)
        for k in keys()
    )
    bottom, above_low = _digit(low, count - above)
    return _marked(keys, (top << 16) | bottom, count - int(above) - int(above_low))


def select_energy(keys: Keys, share: float) -> list[Tensor]:
    """Selects the fewest largest magnitudes whose squares make up `share`, in (0, 1], of the sum of all squares.

    Keys are `order_keys`: the bits of an fp32 magnitude. Selects nothing where all are zero. Sums are in float64.
    """
    high = sum(
        torch.bincount(k.flatten() >> 16, _energy(k.flatten()), minlength=1 << 15) for k in keys()
    )
    assert isinstance(high, Tensor)
    wanted = share * float(high.sum())
    if wanted == 0:
        return [torch.zeros_like(k, dtype=torch.bool) for k in keys()]
    top, above = _digit(high, wanted)
    inside = [k.flatten()[k.flatten() >> 16 == top] for k in keys()]
    low = torch.stack(
        [torch.bincount(k & 0xFFFF, _energy(k), minlength=1 << 16) for k in inside]
    ).sum(0)
    # rounding may leave the last bin slightly below the target
    bottom, above_low = _digit(low, min(wanted - above, float(low.sum()) * (1 - 1e-15)))
    threshold = (top << 16) | bottom
    each = float(_energy(torch.tensor([threshold], dtype=torch.int32)))
    equal = sum(int((k == threshold).sum()) for k in inside)
    ties = math.ceil((wanted - above - above_low) / each * (1 - 1e-12))
    return _marked(keys, threshold, min(max(ties, 1), equal))


def _energy(keys: Tensor) -> Tensor:
    return keys.view(torch.float32).double().square()


def _digit(histogram: Tensor | int, count: float) -> tuple[int, float]:
    """(bin of the count-th largest key, number of keys in higher bins); of weighted keys, by weight."""
    assert isinstance(histogram, Tensor)
    cumulative = histogram.flip(0).cumsum(0)
    assert 0 <= count <= float(cumulative[-1]) * (1 + 1e-12)
    if not histogram.is_floating_point():
        count = max(count, 1)
    steps = min(int((cumulative < count).sum()), len(histogram) - 1)
    above = cumulative[steps - 1].item() if steps else 0
    return len(histogram) - 1 - steps, above


def _marked(keys: Keys, threshold: int, ties: int) -> list[Tensor]:
    """The keys above the threshold, and the first `ties` of those equal to it."""
    chosen = []
    for key in keys():
        mask = key > threshold
        equal = (key == threshold).flatten().nonzero().squeeze(1)[:ties]
        mask.view(-1)[equal] = True
        ties -= len(equal)
        chosen.append(mask)
    return chosen


def order_keys(values: Tensor) -> Tensor:
    """int32 keys that order |values| as fp32 does (IEEE bits are monotonic), in the same shape."""
    return values.float().abs().contiguous().view(torch.int32)


def reverse_keys(values: Tensor) -> Tensor:
    """int32 keys that order -|values|."""
    return 0x7FFFFFFF - order_keys(values)


def select_one(key: Tensor, count: int) -> Tensor:
    """`select` of one tensor."""
    return select(lambda: [key], count)[0]


def largest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries with the largest |value| (compared in fp32)."""
    return select_one(order_keys(values), count)


def smallest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries with the smallest |value| (compared in fp32)."""
    return select_one(reverse_keys(values), count)
