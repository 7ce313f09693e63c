"""Applies masks to checkpoints, and verifies bit by bit which coordinates an arm changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlopd.bits import different
from vlopd.weights.delta import TensorDelta

TOLERANCES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


def transplanted(pair: TensorDelta, mask: Tensor) -> Tensor:
    """The trained value on the mask, the base value elsewhere, bit for bit, without arithmetic.

    In the stored dtype; where the two differ, in the narrowest dtype that holds both exactly.
    """
    dtype = torch.promote_types(pair.base.dtype, pair.trained.dtype)
    return torch.where(mask, pair.trained.to(dtype), pair.base.to(dtype))


def extrapolated(pair: TensorDelta, factor: float, mask: Tensor | None = None) -> Tensor:
    """w + factor * delta on the mask (everywhere without one), in float64, then rounded to the base's dtype."""
    base = pair.base.double()
    moved = (base + factor * (pair.trained.double() - base)).to(pair.base.dtype)
    moved = moved.where(pair.delta != 0, pair.base)  # exact where the delta is 0
    return moved if mask is None else moved.where(mask, pair.base)


def delta_norm(pairs: Iterable[TensorDelta]) -> float:
    """Frobenius norm of an update over the whole model, accumulated in float64."""
    return norm_over_tensors(pair.delta for pair in pairs)


def norm_over_tensors(tensors: Iterable[Tensor]) -> float:
    """Frobenius norm of all tensors together, accumulated in float64."""
    squares = (
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors
    )
    return math.sqrt(sum(squares))


def change_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference of two checkpoints as they are stored, accumulated in float64."""
    squares = (
        float((after[name].double() - old.double()).square().sum())
        for name, old in before.items()
        if old.is_floating_point()
    )
    return math.sqrt(sum(squares))


def moved_off_mask(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor]
) -> int:
    """Number of coordinates off the mask that differ in any bit; tensors missing from the mask are off it."""
    moved = 0
    for name, old in before.items():
        changed = different(old, after[name])
        moved += int((changed & ~mask[name] if name in mask else changed).sum())
    return moved


def moved_on_mask(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
) -> int:
    """Number of coordinates on the mask (all without one) that differ in any bit."""
    if mask is None:
        return moved_off_mask(before, after, {})
    named = {name: before[name] for name in mask}
    return moved_off_mask(named, after, {name: ~marked for name, marked in mask.items()})


def agreement_by_tolerance(
    before: Mapping[str, Tensor],
    arm: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None,
) -> list[dict[str, Any]]:
    """Agreement of two arms' weights: the fraction of coordinates with |arm - other| <= tolerance, as stored.

    One row per tolerance. `all` and `on_mask` are the fractions; `base_all` and `base_on_mask` those of
    |base - other|, the value for an untrained arm. Null where there are no coordinates.
    """
    totals = {"all": 0, "on_mask": 0}
    within = {
        t: dict.fromkeys(("all", "on_mask", "base_all", "base_on_mask"), 0) for t in TOLERANCES
    }
    for name, reference in other.items():
        if name not in arm or not reference.is_floating_point():
            continue
        marked = None if mask is None else mask.get(name)
        totals["all"] += reference.numel()
        totals["on_mask"] += 0 if marked is None else int(marked.sum())
        for prefix, tensor in (("", arm[name]), ("base_", before[name])):
            distance = (tensor.double() - reference.double()).abs()
            for tolerance in TOLERANCES:
                close = distance <= tolerance
                within[tolerance][f"{prefix}all"] += int(close.sum())
                if marked is not None:
                    within[tolerance][f"{prefix}on_mask"] += int((close & marked).sum())
    return [
        {"tolerance": tolerance}
        | {
            key: found / total if (total := totals[key.removeprefix("base_")]) else None
            for key, found in counts.items()
        }
        for tolerance, counts in within.items()
    ]
