"""Null models: random updates that keep only a simple property of the observed one.

Rounding to bf16 hides small changes of large weights, so sparsity, low-magnitude enrichment and
overlap also arise from noise (including the figures of arXiv 2606.13657). Every measure is therefore
reported with the same measure of noise of the observed update's norm and stored precision.

A null draws a direction; `matched_delta` scales it, adds it to the base and rounds, such that the norm
matches after rounding. Draws are generated on the fly from a named random stream on the CPU, so that they are the same
on every device, and are never stored.

An update that is itself a draw of a null must be exchangeable with further draws: properties that a null keeps
(entries, row energies) are therefore preserved through rounding. Results are in docs/geometry.md.

Each p asks whether the update is such noise. No trained update is: sums of an optimizer's bounded steps are not
Gaussian, so with enough draws `gaussian` rejects AdamW on gradients of noise too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import eq

import torch
from torch import Tensor

from vlopd.bits import rounded_to_bf16
from vlopd.config.analysis import (
    AdamNull,
    Bf16WalkNull,
    GaussianNull,
    LowRankNull,
    NullConfig,
    PermutedNull,
    RowColumnNull,
    SignFlippedNull,
    StochasticBf16WalkNull,
    UlpNull,
    WalkNull,
)
from vlopd.seeding import generator
from vlopd.update_geometry.magnitudes import CHUNK, compare, norm, true_indices

TOLERANCE = 0.02
"""Relative error of a null's norm at which the search stops, in units of 1 / sqrt(entries), the sampling error."""
COARSEST = 1e-3
STEPS = 60
PASSES = 16
"""Alternating corrections of a null's row and column energies."""
SIMULATED = 2**18
"""Coordinates of which an `adam` null simulates the training, for each draw; each coordinate of the model takes the sum
of one of these at random."""


def null_name(null: NullConfig) -> str:
    """The null's name in the `null` column, e.g. "gaussian", "low_rank:8"."""
    return null.name


def null_direction(
    null: NullConfig, base: Tensor, delta: Tensor, stream: torch.Generator, *draw: str | int
) -> Tensor:
    """Draws an unscaled update of a null, in the shape of `delta`, on the CPU; a walk's is in `_matched_walk`.

    gaussian      i.i.d. normal entries
    adam          i.i.d. sums of AdamW's steps, `_adam_sums` of the names `draw`
    row_column    normal entries, to be scaled by `_match_row_column_energies`
    permuted      the observed entries permuted within each binade of |w|, where the ulp is constant
    sign_flipped  the observed entries in place, with random signs
    low_rank      A B^T of i.i.d. normal A [m, rank], B [n, rank]; a vector is gaussian
    ulp           i.i.d. normal times |w|: single-ulp changes in a stored precision
    """
    base, delta = base.cpu(), delta.cpu()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=delta.dtype)

    match null:
        case GaussianNull() | RowColumnNull():
            return normal(*delta.shape)
        case AdamNull():
            at = torch.randint(0, SIMULATED, (delta.numel(),), generator=stream)
            return _adam_sums(null, *draw).take(at).to(delta.dtype).view_as(delta)
        case PermutedNull():
            return _permute_within_binades(base, delta, stream)
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
        case WalkNull():
            raise AssertionError("a walk is rounded at every step")


@lru_cache(32)
def _adam_sums(null: AdamNull, *names: str | int) -> Tensor:
    """Sums [SIMULATED] of the steps of AdamW (arXiv 1711.05101) on i.i.d. normal gradients, fp32, at rate 1.

    AdamW's steps do not depend on the gradient's scale, so one distribution serves all tensors; without decay of the
    weights. By hand, since torch's optimizers take two seconds to load. names: of the random stream.
    """
    stream = generator("cpu", "null", "adam", "sums", *names)
    sums, mean, square = (torch.zeros(SIMULATED) for _ in range(3))
    for step in range(null.steps):
        done = step / null.steps
        rate = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[null.schedule]
        gradient = torch.randn(SIMULATED, generator=stream)
        unbiased_mean, unbiased_square = (1 - beta ** (step + 1) for beta in null.betas)
        mean.lerp_(gradient, 1 - null.betas[0])
        square.lerp_(gradient.square(), 1 - null.betas[1])
        size = square.div(unbiased_square).sqrt_().add_(1e-8)
        sums.addcdiv_(mean, size, value=-rate / unbiased_mean)
    return sums


def _permute_within_binades(base: Tensor, delta: Tensor, stream: torch.Generator) -> Tensor:
    """Permutes the entries of `delta` within the binades of |base|.

    In another binade they would be rounded again, to another ulp, and change their size.
    """
    mantissa, binade = torch.frexp(base.flatten().float())
    binade[mantissa == 0] = 2**15  # zero weights form a class of their own
    flat = delta.flatten()
    found = torch.empty_like(flat)
    for each in binade.unique().tolist():
        places = true_indices(compare(eq, binade, each))
        found[places] = flat[places[torch.randperm(len(places), generator=stream)]]
    return found.view_as(delta)


def null_delta(
    null: NullConfig, base: Tensor, delta: Tensor, stored: torch.dtype, *names: str | int
) -> Tensor:
    """Draws a null of the update `delta` of `base`; `names` name its random stream, the first two the draw.

    base: as stored, delta: fp32 or wider, of the same shape. The null of a zero delta is zero.
    """
    if not delta.any():
        return torch.zeros_like(delta)
    if isinstance(null, WalkNull):
        return _matched_walk(null, base, delta, stored, *names)
    stream = generator("cpu", "null", null.name, *names)
    noise = null_direction(null, base, delta, stream, *names[:2]).to(delta.device)
    if isinstance(null, PermutedNull | SignFlippedNull):
        return _rounded_update(
            base, noise, 1.0, stored
        )  # another scale would move the entries off the ulp grid
    if isinstance(null, RowColumnNull) and delta.ndim > 1:
        noise = _match_row_column_energies(base, noise, delta, stored)
    return matched_delta(base, noise, norm(delta), stored)


def _matched_walk(
    null: Bf16WalkNull | StochasticBf16WalkNull,
    base: Tensor,
    delta: Tensor,
    stored: torch.dtype,
    *names: str | int,
) -> Tensor:
    """A walk of Gaussian steps from `base`, rounded to bf16 after each, whose size gives the norm of `delta`.

    Rounds to `stored` in place of bf16 where the base itself is not of bf16 values. To the nearest, steps far below
    half an ulp change nothing, so a small norm comes from few coordinates.
    """
    start, target = base.cpu().to(delta.dtype), norm(delta)
    on_grid = torch.equal(start.bfloat16().to(start), start)
    kept = torch.bfloat16 if on_grid else stored
    stochastic = isinstance(null, StochasticBf16WalkNull) and on_grid

    def walk(scale: float) -> Tensor:
        stream = generator("cpu", "null", null.name, *names)  # the same noise at every scale
        at = start.clone()
        for _ in range(null.steps):
            at.add_(torch.randn(at.shape, generator=stream, dtype=at.dtype), alpha=scale)
            at = (rounded_to_bf16(at, stream) if stochastic else at.to(kept)).to(at)
        return at.to(stored).to(at).sub_(start)

    guess = target / math.sqrt(delta.numel() * null.steps)
    scale = _matched_scale(lambda scale: norm(walk(scale)), guess, target, delta.numel())
    return walk(scale).to(delta.device)


def _match_row_column_energies(
    base: Tensor, noise: Tensor, delta: Tensor, stored: torch.dtype
) -> Tensor:
    """Scales rows and columns of `noise` so that, after rounding, their energies match those of `delta`; in place.

    Alternates over rows and columns with damped corrections, which converge even where rounding makes the energy grow
    much faster than the scale squared. Rows with few changed coordinates match as closely as the ulp grid allows.
    """
    w, z, d = (tensor.flatten(1) for tensor in (base, noise, delta))
    size = max(1, CHUNK // d.shape[1])
    wanted = _row_column_energies(d.split(size))
    scales = [wanted[0].sqrt() / norm(d), wanted[1].sqrt()]
    for turn in range(PASSES):
        rows, columns = (each.to(z.dtype) for each in scales)
        parts = zip(w.split(size), z.split(size), rows.split(size), strict=True)
        found = _row_column_energies(
            _rounded_update(of_w, of_z * row[:, None] * columns, 1.0, stored)
            for of_w, of_z, row in parts
        )
        side = turn % 2
        factor = (wanted[side] / found[side]).nan_to_num(nan=1.0).pow(0.25)
        scales[side] = scales[side] * factor.clamp(0.5, 2.0)
    rows, columns = (each.to(z.dtype) for each in scales)
    z.mul_(rows[:, None]).mul_(columns)
    return noise


def _row_column_energies(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of squares over each row [m] and each column [n] of a matrix given in chunks of rows; float64."""
    rows, columns = [], []
    for part in parts:
        squares = part.double().square()
        rows.append(squares.sum(1))
        columns.append(squares.sum(0))
    return torch.cat(rows), torch.stack(columns).sum(0)


def matched_delta(base: Tensor, noise: Tensor, target: float, stored: torch.dtype) -> Tensor:
    """stored(base + s noise) - base, with s such that its Frobenius norm is `target`; overwrites `noise`.

    Rounding removes part of a small update, or enlarges it to whole ulps, so s is found by bracketed secant steps of
    log norm over log s. Where the ulp grid is too coarse for the target (a small tensor with few changed
    coordinates), the nearest norm found is used; zero noise stays zero.
    """
    w, z = base.reshape(-1), noise.reshape(-1)
    size = norm(z)
    if size == 0:
        return noise

    def found_at(scale: float) -> float:
        return math.hypot(*(norm(part) for part in _rounded_chunks(w, z, scale, stored)))

    best = _matched_scale(found_at, target / size, target, len(z))
    for to, part in zip(z.split(CHUNK), _rounded_chunks(w, z, best, stored), strict=True):
        to.copy_(part)
    return z.view_as(noise)


def _matched_scale(
    found_at: Callable[[float], float], scale: float, target: float, entries: int
) -> float:
    """The scale at which the norm `found_at` is `target`, by bracketed secant steps from `scale`; else the nearest."""
    tolerance = min(COARSEST, TOLERANCE / math.sqrt(entries))
    low, high = 0.0, math.inf
    best, best_error = 0.0, math.inf
    last = None
    for _ in range(STEPS):
        found = found_at(scale)
        if abs(found / target - 1) < best_error:
            best, best_error = scale, abs(found / target - 1)
        if best_error <= tolerance:
            break
        low, high = (scale, high) if found < target else (low, scale)
        guess = _secant_scale(last, (scale, found), target)
        last = (scale, found)
        if not low < guess < high:
            guess = 2 * low if high == math.inf else (low + high) / 2
        if guess in (low, high):
            break  # adjacent floats: the norm jumps over the target
        scale = guess
    return best


def _secant_scale(
    last: tuple[float, float] | None, now: tuple[float, float], target: float
) -> float:
    """The scale at which the line through two points of log norm over log scale reaches the target.

    With a single point the slope is 1. Infinite where the line is undefined.
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


def _rounded_chunks(
    base: Tensor, noise: Tensor, scale: float, stored: torch.dtype
) -> Iterator[Tensor]:
    """`_rounded_update` of flat tensors, in chunks."""
    for w, z in zip(base.split(CHUNK), noise.split(CHUNK), strict=True):
        yield _rounded_update(w, z, scale, stored)


def _rounded_update(base: Tensor, noise: Tensor, scale: float, stored: torch.dtype) -> Tensor:
    """stored(base + scale noise) - base, in the noise's precision."""
    wide = base.to(noise.dtype)
    return torch.add(wide, noise, alpha=scale).to(stored).to(noise.dtype).sub_(wide)
