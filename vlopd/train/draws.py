"""Draws tokens from logits, each decided by one uniform number.

A small vocabulary's cumulative distribution is inverted at the number. Masses are fp32 softmax values; what is added up
over the vocabulary is added in float64, in two levels: sums of blocks, then the entries of one block. No float64 copy
of [B, V] is made, and no entry of mass 0 can be drawn.

In a large vocabulary thousands of entries are narrower than the rounding of those before them, and the draw would
depend on the batch: over 49,152 entries, fp32 logits of SmolLM2 from batches of another size move 0.4 % of such draws.
There the number is the key of a hash that gives every entry an exponential waiting time, and the first to arrive is
drawn (the Gumbel-max trick): the same distribution, and rounding moves 3 draws of a million. (`torch.multinomial`
is such a race too, with times from a generator of its own.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Vocabulary entries per block of the two-level inversion."""

RACE_ENTRIES = 4096
"""Vocabulary entries from which on a draw is a race."""

CANDIDATES = 1024
"""Most likely entries among which a nucleus is sought on a CPU, before all are sorted."""


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
    races = logits.shape[1] >= RACE_ENTRIES
    plain = temperature == 1 and top_k is None and top_p == 1 and not races
    if plain:
        outside = logits[:, banned].logsumexp(-1)
    else:
        total = logits.logsumexp(-1)
    logits.index_fill_(1, banned, -torch.inf)
    if temperature == 0:
        column = logits.argmax(-1)
    else:
        assert uniform is not None, "sampling needs uniforms"
        scaled = logits
        if temperature != 1:  # the largest is subtracted first: no temperature makes it overflow
            scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        cuts = top_k is not None or top_p < 1
        mass = logits if races and not cuts else scaled.softmax(-1)
        inside = kept(logits, mass, top_k, top_p) if cuts else None
        if races:
            column = race(
                scaled if inside is None else scaled.masked_fill(~inside, -torch.inf), uniform
            )
        else:
            mass = mass if inside is None else mass.masked_fill_(~inside, 0.0)
            column, sums = invert(mass, uniform)
    chosen = logits.gather(1, column[:, None])[:, 0]
    if plain:
        # log sum exp of the allowed entries from the drawn one's mass; fp32 masses may add up to 1 + 1e-5
        share = mass.gather(1, column[:, None])[:, 0] / sums
        total = torch.logaddexp((chosen - share.log()).float(), outside)
    return column, chosen - total


def race(logits: Tensor, uniform: Tensor) -> Tensor:
    """[B, V] fp32 logits, [B] uniforms in float64 -> [B] columns, drawn from the softmax.

    Column v arrives after an Exp(1) time E_v over its mass; the first is that of the largest logit_v - log E_v.
    """
    return waiting_times(uniform, logits.shape[1]).log_().neg_().add_(logits).argmax(-1)


def waiting_times(uniform: Tensor, entries: int) -> Tensor:
    """[B] uniforms in float64 -> [B, V] independent Exp(1) numbers, fp32: a hash of a uniform's 53 bits and the column.

    The hash mixes as MurmurHash3 does, first the column alone, then with both halves of the key.
    """
    key = (uniform * 2.0**53).long()[:, None]
    low, high = (key & 0xFFFFFFFF).int(), (key >> 32).int()
    column = torch.arange(entries, dtype=torch.int32, device=uniform.device)
    mixed = low ^ _mix(column.mul_(_GOLDEN), 0)
    bits = _mix(mixed, high).bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
    times = bits.float()
    del mixed, bits
    times.add_(0.5).mul_(2.0**-31)  # uniform
    # -log(1 - u) with all digits of a small u, which 1 - u loses (torch's log1p is eight times slower than its log)
    rest = (1.0 - times).clamp_(min=2.0**-24)  # finite: the only entry left must arrive
    lost = rest.sub(1.0).neg_()  # u as 1 - u has it
    ratio = rest.log_().neg_().div_(lost)
    return times.mul_(ratio.nan_to_num_(1.0))


_GOLDEN, _FIRST, _SECOND = (x - (1 << 32) for x in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))
"""Odd constants as signed numbers: 2^32 over the golden ratio, and the mixer's two."""


def _mix(x: Tensor, key: int | Tensor) -> Tensor:
    """Mixes int32 numbers, in place; products wrap around. Shifts are logical: the sign's copies are masked off."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x += key
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


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
