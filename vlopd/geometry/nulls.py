"""Null models: what geometry shows when nothing but some plain property of an update is kept.

Rounding to bf16 hides small changes of large weights, so sparsity, low-magnitude enrichment and
overlap arise from noise too (arXiv 2606.13657's figures included). Every measure therefore stands
beside the same measure of noise with the norm and the stored precision of the observed update.

A null draws a direction; `matched_delta` scales it, adds it to the base and rounds, such that the norm
agrees after rounding. Draws are made on the fly from a named stream on the CPU, so that they are the same on
every device, and are never stored.

An update that is itself a draw of a null must look like one more draw: what a null takes from the update (entries,
energies of rows) is therefore kept through the rounding. docs/geometry.md has what that gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import eq

import torch
from torch import Tensor

from vlopd.config.analysis import (
    GaussianNull,
    LowRankNull,
    NullConfig,
    PermutedNull,
    RowColumnNull,
    SignFlippedNull,
    UlpNull,
)
from vlopd.geometry.magnitudes import CHUNK, marked, norm, places_of
from vlopd.seeding import generator

TOLERANCE = 0.02
"""Relative error of a null's norm at which the search stops, times 1 / sqrt(entries), the scale of chance."""
COARSEST = 1e-3
STEPS = 60
PASSES = 16
"""Corrections of a null's rows and columns, in turn."""


def null_name(null: NullConfig) -> str:
    """What the `null` column calls it, e.g. "gaussian", "low_rank:8"."""
    return f"low_rank:{null.rank}" if isinstance(null, LowRankNull) else null.type


def direction(null: NullConfig, base: Tensor, delta: Tensor, stream: torch.Generator) -> Tensor:
    """An update of the null's kind, up to its scale, in the shape of `delta` on the CPU.

    gaussian      i.i.d. normal entries
    row_column    the same, to be scaled by `profiled`
    permuted      the observed entries in random places, each among weights of one binade, which have one step
    sign_flipped  the observed entries where they are, with random signs
    low_rank      A B^T of i.i.d. normal A [m, rank], B [n, rank]; a vector is gaussian
    ulp           i.i.d. normal times |w|: in a stored precision, one ulp here and there
    """
    base, delta = base.cpu(), delta.cpu()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=delta.dtype)

    match null:
        case GaussianNull() | RowColumnNull():
            return normal(*delta.shape)
        case PermutedNull():
            return permuted(base, delta, stream)
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
            return normal(*delta.shape).mul_(base.abs())


def permuted(base: Tensor, delta: Tensor, stream: torch.Generator) -> Tensor:
    """The entries of `delta` shuffled within the binades of |base|.

    Anywhere else they would be rounded a second time, to other steps, and lose their sizes.
    """
    mantissa, binade = torch.frexp(base.flatten().float())
    binade[mantissa == 0] = 2**15  # a weight of zero has a step of its own
    flat = delta.flatten()
    found = torch.empty_like(flat)
    for each in binade.unique().tolist():
        places = places_of(marked(eq, binade, each))
        found[places] = flat[places[torch.randperm(len(places), generator=stream)]]
    return found.view_as(delta)


def null_delta(
    null: NullConfig, base: Tensor, delta: Tensor, stored: torch.dtype, *names: str | int
) -> Tensor:
    """One draw of a null for the update `delta` of `base`; `names` name its random stream.

    base: as stored, delta: fp32 or wider, one shape. A zero delta has a zero null.
    """
    if not delta.any():
        return torch.zeros_like(delta)
    stream = generator("cpu", "null", null_name(null), *names)
    noise = direction(null, base, delta, stream).to(delta.device)
    if isinstance(null, PermutedNull | SignFlippedNull):
        return rounded(
            base, noise, 1.0, stored
        )  # any other scale would take their sizes off the steps
    if isinstance(null, RowColumnNull) and delta.ndim > 1:
        noise = profiled(base, noise, delta, stored)
    return matched_delta(base, noise, norm(delta), stored)


def profiled(base: Tensor, noise: Tensor, delta: Tensor, stored: torch.dtype) -> Tensor:
    """`noise` with rows and columns scaled such that, once rounded, they have the energies of `delta`'s; in place.

    Both are corrected in turn, by a root that settles where rounding lets the energy rise far faster than the
    scale's square. A row in which few coordinates move has it as nearly as steps allow.
    """
    w, z, d = (tensor.flatten(1) for tensor in (base, noise, delta))
    size = max(1, CHUNK // d.shape[1])
    wanted = row_column_energies(d.split(size))
    scales = [wanted[0].sqrt() / norm(d), wanted[1].sqrt()]
    for turn in range(PASSES):
        rows, columns = (each.to(z.dtype) for each in scales)
        parts = zip(w.split(size), z.split(size), rows.split(size), strict=True)
        found = row_column_energies(
            rounded(of_w, of_z * row[:, None] * columns, 1.0, stored) for of_w, of_z, row in parts
        )
        side = turn % 2
        factor = (wanted[side] / found[side]).nan_to_num(nan=1.0).pow(0.25)
        scales[side] = scales[side] * factor.clamp(0.5, 2.0)
    rows, columns = (each.to(z.dtype) for each in scales)
    z.mul_(rows[:, None]).mul_(columns)
    return noise


def row_column_energies(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of squares over each row [m] and each column [n] of a matrix that comes some rows at a time; float64."""
    rows, columns = [], []
    for part in parts:
        squares = part.double().square()
        rows.append(squares.sum(1))
        columns.append(squares.sum(0))
    return torch.cat(rows), torch.stack(columns).sum(0)


def matched_delta(base: Tensor, noise: Tensor, target: float, stored: torch.dtype) -> Tensor:
    """stored(base + s noise) - base, with the s at which its Frobenius norm is `target`; in place of `noise`.

    Rounding swallows part of a small update, or enlarges it to whole steps, so s is searched: by secants of
    log norm over log s, kept inside a bracket. Where steps are too coarse to meet the target (a few
    coordinates of a small tensor moved by one step), the nearest that was met; zero noise stays zero.
    """
    w, z = base.reshape(-1), noise.reshape(-1)
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
    base: Tensor, noise: Tensor, scale: float, stored: torch.dtype
) -> Iterator[Tensor]:
    """What is left of an update in the stored precision, a stretch of flat coordinates at a time."""
    for w, z in zip(base.split(CHUNK), noise.split(CHUNK), strict=True):
        yield rounded(w, z, scale, stored)


def rounded(base: Tensor, noise: Tensor, scale: float, stored: torch.dtype) -> Tensor:
    """stored(base + scale noise) - base, in the noise's precision."""
    wide = base.to(noise.dtype)
    return torch.add(wide, noise, alpha=scale).to(stored).to(noise.dtype).sub_(wide)
