"""Null models: what geometry shows when nothing but some plain property of an update is kept.

Rounding to bf16 hides small changes of large weights, so sparsity, low-magnitude enrichment and
overlap arise from noise too (arXiv 2606.13657's figures included). Every measure therefore stands
beside the same measure of noise with the norm and the stored precision of the observed update.

A null draws a direction; `matched_delta` scales it, adds it to the source and rounds, such that the norm
agrees after rounding. Draws are made on the fly from a named stream on the CPU, so that they are the same on
every device, and are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vlopd.config import (
    GaussianNull,
    LowRankNull,
    NullConfig,
    PermutedNull,
    RowColumnNull,
    SignFlippedNull,
    UlpNull,
)
from vlopd.seeding import generator

TOLERANCE = 0.02
"""Relative error of a null's norm at which the search stops, times 1 / sqrt(entries), the scale of chance."""
COARSEST = 1e-3
STEPS = 60
DITHER = 0.03
"""Relative spread that is given to sizes taken from a stored update, so that norms can be met."""
CHUNK = 2**18
"""Coordinates at a time, so that temporaries stay in the cache."""


def null_name(null: NullConfig) -> str:
    """What the `null` column calls it, e.g. "gaussian", "low_rank:8"."""
    return f"low_rank:{null.rank}" if isinstance(null, LowRankNull) else null.type


def direction(null: NullConfig, source: Tensor, delta: Tensor, stream: torch.Generator) -> Tensor:
    """An update of the null's kind, up to its scale, in the shape of `delta` on the CPU.

    gaussian      i.i.d. normal entries
    row_column    the same, entry ij times the r.m.s. of the observed row i and column j
    permuted      the observed entries in random places
    sign_flipped  the observed entries where they are, with random signs
    low_rank      A B^T of i.i.d. normal A [m, rank], B [n, rank]; a vector is gaussian
    ulp           i.i.d. normal times |w|: in a stored precision, one ulp here and there
    """
    source, delta = source.cpu(), delta.cpu()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=delta.dtype)

    match null:
        case GaussianNull():
            return normal(*delta.shape)
        case RowColumnNull():
            return normal(*delta.shape) * row_column_scales(delta)
        case PermutedNull():
            return delta.flatten()[torch.randperm(delta.numel(), generator=stream)].view_as(delta)
        case SignFlippedNull():
            signs = torch.randint(0, 2, delta.shape, generator=stream, dtype=torch.int8)
            return delta * (2 * signs - 1)
        case LowRankNull():
            if delta.ndim < 2:
                return normal(*delta.shape)
            n = delta[0].numel()
            rank = min(null.rank, len(delta), n)
            return (normal(len(delta), rank) @ normal(rank, n)).view_as(delta)
        case UlpNull():
            return normal(*delta.shape).mul_(source.abs())


def row_column_scales(delta: Tensor) -> Tensor:
    """r_i c_j, the r.m.s. of the update's rows and columns; a vector's own is the same everywhere."""
    if delta.ndim < 2:
        return torch.ones_like(delta)
    matrix = delta.flatten(1)
    rows = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    return (rows * torch.linalg.vector_norm(matrix, dim=0)).view_as(delta)


def null_delta(
    null: NullConfig, source: Tensor, delta: Tensor, stored: torch.dtype, *names: str | int
) -> Tensor:
    """One draw of a null for the update `delta` of `source`; `names` name its random stream.

    source: as stored, delta: fp32 or wider, one shape. A zero delta has a zero null.
    """
    if not delta.any():
        return torch.zeros_like(delta)
    stream = generator("cpu", "null", null_name(null), *names)
    noise = direction(null, source, delta, stream).to(delta.device)
    if isinstance(null, PermutedNull | SignFlippedNull):
        # a stored update has few distinct sizes, which would all cross a rounding boundary at one scale
        dither = torch.randn(noise.shape, generator=stream, dtype=noise.dtype).to(noise.device)
        noise.mul_(1 + DITHER * dither)
    return matched_delta(source, noise, norm(delta), stored)


def matched_delta(source: Tensor, noise: Tensor, target: float, stored: torch.dtype) -> Tensor:
    """stored(source + s noise) - source, with the s at which its Frobenius norm is `target`; in place of `noise`.

    Rounding swallows part of a small update, or enlarges it to whole steps, so s is searched: by secants of
    log norm over log s, kept inside a bracket. Where steps are too coarse to meet the target (a few
    coordinates of a small tensor moved by one step), the nearest that was met; zero noise stays zero.
    """
    w, z = source.reshape(-1), noise.reshape(-1)
    size = norm(z)
    if size == 0:
        return noise

    def found_at(scale: float) -> float:
        return math.hypot(*(norm(part) for part in rounded_parts(w, z, scale, stored)))

    tolerance = min(COARSEST, TOLERANCE / math.sqrt(len(z)))
    low, high = 0.0, math.inf
    best, best_error = 0.0, math.inf
    scale, last = target / size, None
    for _ in range(STEPS):
        found = found_at(scale)
        if abs(found / target - 1) < best_error:
            best, best_error = scale, abs(found / target - 1)
        if best_error <= tolerance:
            break
        low, high = (scale, high) if found < target else (low, scale)
        guess = secant(last, (scale, found), target)
        last = (scale, found)
        if not low < guess < high:
            guess = 2 * low if high == math.inf else (low + high) / 2
        if guess in (low, high):
            break  # neighbouring floats: the norm jumps over the target
        scale = guess
    for to, part in zip(z.split(CHUNK), rounded_parts(w, z, best, stored), strict=True):
        to.copy_(part)
    return z.view_as(noise)


def secant(last: tuple[float, float] | None, now: tuple[float, float], target: float) -> float:
    """The scale at which the line through two points of log norm over log scale meets the target.

    Of one point alone the line has slope 1. Infinite where there is no such line.
    """
    scale, found = now
    if found == 0 or (last is not None and last[1] == 0):
        return math.inf
    if last is None:
        return scale * target / found
    rise = math.log(found / last[1])
    if rise == 0:
        return math.inf
    exponent = math.log(scale / last[0]) / rise * math.log(target / found)
    return scale * math.exp(min(max(exponent, -2.0), 2.0))


def rounded_parts(
    source: Tensor, noise: Tensor, scale: float, stored: torch.dtype
) -> Iterator[Tensor]:
    """What is left of an update in the stored precision, a stretch of flat coordinates at a time."""
    for w, z in zip(source.split(CHUNK), noise.split(CHUNK), strict=True):
        wide = w.to(z.dtype)
        yield torch.add(wide, z, alpha=scale).to(stored).to(z.dtype).sub_(wide)


def norm(tensor: Tensor) -> float:
    """Frobenius norm, added up in float64 without a float64 copy."""
    parts = tensor.reshape(-1).split(CHUNK)
    return math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts)
    )
