"""Draws tokens from logits by inverting the cumulative distribution at given uniform numbers.

(`torch.multinomial` draws an exponential for every vocabulary entry, from a generator of its own.) Masses are fp32
softmax values; what is added up over the vocabulary is added in float64, in two levels: sums of blocks, then the
entries of one block. No float64 copy of [B, V] is made, and no entry of mass 0 can be drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Vocabulary entries per block of the two-level inversion."""

CANDIDATES = 1024
"""Most likely entries among which a nucleus is sought on a CPU, before all are sorted."""


def draw(
    logits: Tensor,
    temperature: float,
    banned: Tensor,
    uniform: Tensor | None,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """[B, V] logits, [V] banned (bool), [B] uniforms in float64 -> [B] columns; temperature 0 is greedy."""
    columns = banned.nonzero()[:, 0]
    return pick(logits.float().clone(), temperature, columns, uniform, top_k, top_p)[0]


def pick(
    logits: Tensor,
    temperature: float,
    banned: Tensor,
    uniform: Tensor | None,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """[B, V] fp32 logits, which are overwritten, and banned columns [K] -> [B] columns and their log-probs.

    Log-probs are at temperature 1, nothing truncated or banned. Greedy is the first of equal entries.
    """
    plain = temperature == 1 and top_k is None and top_p == 1
    if plain:
        outside = logits[:, banned].logsumexp(-1)
    else:
        total = logits.logsumexp(-1)
    logits.index_fill_(1, banned, -torch.inf)
    if temperature == 0:
        column = logits.argmax(-1)
    else:
        assert uniform is not None, "sampling needs uniforms"
        if temperature == 1:
            mass = logits.softmax(-1)
        else:  # the largest is subtracted first: no temperature makes it overflow
            mass = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if top_k is not None or top_p < 1:
            mass = mass.masked_fill_(~kept(logits, mass, top_k, top_p), 0.0)
        column, sums = invert(mass, uniform)
    chosen = logits.gather(1, column[:, None])[:, 0]
    if plain:
        # log sum exp of the allowed entries from the drawn one's mass; fp32 masses may add up to 1 + 1e-5
        share = mass.gather(1, column[:, None])[:, 0] / sums
        total = torch.logaddexp((chosen - share.log()).float(), outside)
    return column, chosen - total


def invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] masses (fp32, of any sum), [B] uniforms -> [B] columns, [B] sums of the masses in float64.

    The column is the first whose cumulative mass exceeds the uniform's share of the sum.
    """
    entries, sums = mass.shape[1], _block_sums(mass)
    total = sums.sum(-1)
    block, rest = _first_beyond(sums, uniform * total)
    within = block[:, None] * BLOCK + torch.arange(BLOCK, device=mass.device)
    piece = mass.gather(1, within.clamp(max=entries - 1)).double()
    place, _ = _first_beyond(piece.masked_fill_(within >= entries, 0.0), rest)
    return (block * BLOCK + place).clamp(max=entries - 1), total


def _block_sums(mass: Tensor) -> Tensor:
    """[B, V] -> [B, V / BLOCK rounded up] in float64, each block summed in fp32."""
    whole = mass.shape[1] // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(-1)
    if whole < mass.shape[1]:
        sums = torch.cat([sums, mass[:, whole:].sum(-1, keepdim=True)], 1)
    return sums.double()


def _first_beyond(mass: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n] float64 masses, [B] amounts -> [B] first entries whose cumulative mass exceeds it; what is left there.

    An amount that rounding put at the sum or beyond it counts as just below: the entry has mass.
    """
    cumulative = mass.cumsum(-1)
    last = cumulative[:, -1]
    wanted = torch.minimum(wanted, torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(cumulative, wanted[:, None], right=True)
    index = index.clamp_(max=mass.shape[1] - 1)
    before = cumulative.gather(1, (index - 1).clamp(min=0)).masked_fill_(index == 0, 0.0)
    return index[:, 0], wanted - before[:, 0]


# ------------------------------------------------------------------------------------------ truncation


def kept(logits: Tensor, mass: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[B, V] bool: the top k, and of these the nucleus; of equal logits, those of lowest index.

    The nucleus (arXiv 1904.09751) is the smallest set of the most likely entries whose share of the mass in the top k
    reaches top_p, the entry that reaches it included. `mass` [B, V]: the softmax of the logits after the temperature.
    """
    top = _most_likely(logits, mass, top_k, top_p)
    ordered = mass.gather(1, top.indices).double()
    total = _block_sums(mass).sum(-1) if top_k is None else ordered.sum(-1)
    before = ordered.cumsum(-1) - ordered
    count = (before < top_p * total[:, None]).sum(-1, keepdim=True).clamp(min=1)
    threshold = top.values.gather(1, count - 1)
    above, tied = logits > threshold, logits == threshold
    left = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= left))


def _most_likely(logits: Tensor, mass: Tensor, top_k: int | None, top_p: float) -> Any:
    """The top k in descending order; without k, enough for the nucleus (on accelerators all: no host sync)."""
    if top_k is not None:
        return logits.topk(min(top_k, logits.shape[1]))
    if logits.device.type == "cpu":
        top = logits.topk(min(CANDIDATES, logits.shape[1]))
        found = mass.gather(1, top.indices).double().sum(-1)
        if bool((found >= top_p * _block_sums(mass).sum(-1)).all()):
            return top
    return logits.sort(dim=-1, descending=True)
