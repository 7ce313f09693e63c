"""The coordinates that a tensor's source singles out: its principal and its smallest weights (arXiv 2606.13657).

Kept as one small integer a coordinate, a bit for each mask and ratio, so that one count of codes among the
coordinates that moved gives every overlap at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlopd.geometry.spectrum import ROWS, Factors, Sum, rank_at, transposed_times
from vlopd.masks import quota

NAMES = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low")
CHUNK = 2**18
REASON = "the source does not define this mask: no matrix, too large, or all zero"


@dataclass(frozen=True)
class Cut:
    """The k-th smallest |value| of a tensor, with how many are smaller than it and how many equal."""

    value: float
    smaller: int
    equal: int


def cuts(values: Tensor, ks: Sequence[int]) -> list[Cut]:
    """The k-th smallest |value| of a flat tensor, compared in fp32, for every k in 1..n.

    The high half of the bits of |x| orders it coarsely: one histogram finds the bin of every k, and only what
    lies in those bins is sorted, so nothing as large as the tensor is copied.
    """
    histogram = torch.zeros(2**15, dtype=torch.int64)
    for part in values.split(CHUNK):
        histogram += torch.bincount(high_bits(part), minlength=2**15).cpu()
    upto = histogram.cumsum(0)
    bins = torch.searchsorted(upto, torch.tensor(ks))
    wanted = torch.zeros(2**15, dtype=torch.bool)
    wanted[bins] = True
    kept = [
        part[bits == number].float().abs().cpu()
        for part in values.split(CHUNK)
        for bits in [high_bits(part)]
        for number in sorted(set(bins.tolist()))
    ]
    entries = np.sort(torch.cat(kept).numpy())
    found = []
    for k, bin_ in zip(ks, bins.tolist(), strict=True):
        below = int(upto[bin_ - 1]) if bin_ else 0
        gathered = int(
            histogram[:bin_][wanted[:bin_]].sum()
        )  # entries of lower bins that were kept
        value = entries[gathered + k - below - 1]
        first, last = (int(np.searchsorted(entries, value, side)) for side in ("left", "right"))
        found.append(Cut(float(value), below + first - gathered, last - first))
    return found


def high_bits(values: Tensor) -> Tensor:
    """The upper 15 bits of |x| as fp32, which order by size (IEEE 754); flat int32."""
    return values.float().abs().view(torch.int32) >> 16


class SourceMasks:
    """The masks of one tensor's source at every ratio.

    principal            largest |entry| of the rank-floor(ratio * r) reconstruction; needs `factors`
    low_magnitude        smallest |entry| of the source
    principal_not_low    in the first and not in the second
    nonprincipal_or_low  not in the first, or in the second

    The first two have ceil(ratio * numel) members; among equal values the lowest index comes first, so that a
    mask does not depend on the machine. `ties`: parameter -> how many entries of the source equal
    the largest member of low_magnitude (bf16 has many).
    """

    def __init__(self, source: Tensor, factors: Factors | None, ratios: Sequence[float]):
        self.ratios = tuple(ratios)
        flat = source.reshape(-1)
        self.empty = not bool(flat.any())
        self.has_principal = factors is not None and not self.empty
        self.ties = dict.fromkeys(self.ratios, 0)
        dtype = torch.uint8 if len(ratios) <= 4 else torch.int16
        self.code = torch.zeros(len(flat), dtype=dtype, device=flat.device)
        if not self.empty:
            counts = [quota(ratio, len(flat)) for ratio in self.ratios]
            for i, (count, cut) in enumerate(zip(counts, cuts(flat, counts), strict=True)):
                room = count - cut.smaller
                self.ties[self.ratios[i]] = cut.equal if room < cut.equal else 0
                self._mark(flat, cut.value, room, 2 << (2 * i), torch.lt)
            if factors is not None:
                self._add_principal(source.flatten(1), factors)
        self.select = selectors(len(ratios))
        table = torch.zeros(4 ** len(ratios), dtype=torch.int64)
        for code in self.code.split(CHUNK):  # all at once they would be widened to 8 bytes each
            table += torch.bincount(code, minlength=len(table)).cpu()
        self.table = self._counts(table)

    def _add_principal(self, matrix: Tensor, factors: Factors) -> None:
        """Marks the largest of each reconstruction U_k U_k^T W, which is made in fp32, some rows at a time."""
        m, n = matrix.shape
        right = transposed_times(Sum((matrix,)), factors.left)  # W^T U [n, K]
        size = torch.empty(m, n, dtype=torch.float32, device=matrix.device)
        for i, ratio in enumerate(self.ratios):
            k = rank_at(ratio, m, n)
            for to, left in zip(size.split(ROWS), factors.left.split(ROWS), strict=True):
                torch.abs((left[:, :k] @ right[:, :k].T).float(), out=to)
            count, flat = quota(ratio, m * n), size.view(-1)
            (cut,) = cuts(flat, [m * n - count + 1])
            larger = m * n - cut.smaller - cut.equal
            self._mark(flat, cut.value, count - larger, 1 << (2 * i), torch.gt)

    def _mark(
        self,
        values: Tensor,
        cut: float,
        room: int,
        bit: int,
        beyond: Callable[[Tensor, float], Tensor],
    ) -> None:
        """Sets a bit where |value| is beyond the cut, and at the first `room` of those that equal it."""
        for code, part in zip(self.code.split(CHUNK), values.split(CHUNK), strict=True):
            size = part.float().abs()
            member = beyond(size, cut)
            if room:
                equal = (size == cut).nonzero().squeeze(1)[:room]
                member[equal] = True
                room -= len(equal)
            code += bit * member.to(code.dtype)

    def names(self) -> list[tuple[str, float]]:
        return [(name, ratio) for name in NAMES for ratio in self.ratios]

    def members(self, name: str, ratio: float) -> int | None:
        """How many coordinates a mask has; None where the source does not define it."""
        known = not self.empty and (name == "low_magnitude" or self.has_principal)
        return self.table[name, ratio] if known else None

    def tally(self, delta: Tensor, threshold: float) -> tuple[int, dict[tuple[str, float], int]]:
        """(coordinates with |delta| > threshold, how many of them each mask has); delta is flat."""
        table = torch.zeros(4 ** len(self.ratios), dtype=torch.int64)
        for code, part in zip(self.code.split(CHUNK), delta.split(CHUNK), strict=True):
            table += torch.bincount(code[part.abs() > threshold], minlength=len(table)).cpu()
        return int(table.sum()), self._counts(table)

    def _counts(self, table: Tensor) -> dict[tuple[str, float], int]:
        """Entries of a table by code that belong to each mask."""
        return dict(zip(self.names(), (self.select @ table.cpu()).tolist(), strict=True))


def selectors(ratios: int) -> Tensor:
    """Which codes belong to which mask, [masks, codes] of 0 and 1, in the order of `SourceMasks.names`."""
    codes = torch.arange(4**ratios)
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for i in range(ratios):
        principal, low = codes & (1 << (2 * i)) > 0, codes & (2 << (2 * i)) > 0
        rows["principal"].append(principal)
        rows["low_magnitude"].append(low)
        rows["principal_not_low"].append(principal & ~low)
        rows["nonprincipal_or_low"].append(~principal | low)
    return torch.stack([row for name in NAMES for row in rows[name]]).long()
