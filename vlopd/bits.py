"""Packed bit masks (eight coordinates per byte, first in the highest bit, as numpy.packbits), bitwise comparison of
tensors, exact representability between dtypes, and rounding to bf16."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from torch import Tensor

WEIGHTS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
BYTES = (torch.arange(256, dtype=torch.uint8)[:, None] & WEIGHTS).ne(0).view(torch.int64).view(-1)
"""The eight bools of every byte, as one int64."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(marked: Tensor) -> Tensor:
    """bool [any shape], n entries -> uint8 [ceil(n / 8)] on the same device."""
    flat = marked.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8))
    return (padded.view(-1, 8) * WEIGHTS.to(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=n).view(bool))
    return BYTES.to(packed.device).index_select(0, packed.int()).view(torch.bool)[:n]


def positions(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> int64 [K]: indices of the set bits, ascending."""
    if packed.device.type == "cpu":  # five times faster than torch's nonzero
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), count=n).view(bool)))
    return unpack(packed, n).nonzero()[:, 0]


def different(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise bitwise inequality, bool (0 and -0 differ).

    Tensors of two dtypes are compared in the narrowest dtype that holds both exactly, so a rounded value differs from
    its original unless rounding was exact.
    """
    dtype = widest(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    integer = INTEGERS[a.element_size()]
    return a.contiguous().view(integer) != b.contiguous().view(integer)


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` represents every value of `other` exactly (float32 holds bfloat16, not vice versa)."""
    return widest(dtype, other) == dtype


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds all of them: float32 for float16 with bfloat16, and for no dtype."""
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def rounded_to_bf16(values: Tensor, draws: torch.Generator | None = None) -> Tensor:
    """The values in bf16: the nearest, or with `draws` one of the two neighbours, whose mean is the value.

    bf16 is the upper half of an fp32: a uniform 16-bit integer is added to the lower half, which is then dropped
    (arXiv 2010.06192).
    """
    if draws is None:
        return values.bfloat16()
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=draws, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) >> 16 << 16).view(torch.float32).bfloat16()
