"""Masks defined by a tensor's base: its principal and its smallest weights (arXiv 2606.13657).

Stored as one small integer per coordinate, one bit per mask and ratio, so that one histogram of the codes of the
changed coordinates gives all overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt

import torch
from torch import Tensor

from vlopd.masks.select import quota
from vlopd.update_geometry.linalg import product
from vlopd.update_geometry.magnitudes import (
    CHUNK,
    OrderStatistic,
    Test,
    binade_counts,
    compare,
    count,
    kth_smallest,
    magnitudes,
    true_indices,
)
from vlopd.update_geometry.spectrum import ROWS, Factors, rank_at

NAMES = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low")
REASON = "the base does not define this mask: no matrix, too large, or all zero"


@dataclass
class MaskBoundary:
    """The threshold of a mask: it contains all sizes beyond the cut and the first `room` of those equal to it."""

    cut: OrderStatistic
    room: int
    bit: int
    beyond: Test
    upto: Test
    whole: bool = field(init=False)
    """Whether all entries equal to the cut are members, so that there are no ties to break."""

    def __post_init__(self):
        self.whole = self.room == self.cut.equal

    def mark(self, code: Tensor, size: Tensor) -> None:
        """Sets the bit of the members in the next chunk."""
        member = compare(self.upto if self.room else self.beyond, size, self.cut.value)
        if self.room and not self.whole:
            equal = compare(eq, size, self.cut.value)
            ties = count(equal)
            if ties > self.room:
                member[true_indices(equal)[self.room :]] = False
            self.room -= min(ties, self.room)
        code.add_(member.view(torch.uint8), alpha=self.bit)


class BaseMasks:
    """The base masks of one tensor at every ratio.

    principal            largest |entry| of the rank-floor(ratio * r) reconstruction; needs `factors`
    low_magnitude        smallest |entry| of the base
    principal_not_low    principal and not low_magnitude
    nonprincipal_or_low  the complement of principal_not_low

    The first two have ceil(ratio * numel) members; ties go to the lowest index, so that a mask does not depend on
    the machine. `ties`: ratio -> number of base entries equal to the largest member of low_magnitude, where the tie
    is broken (bf16 has many). `binades`: `binade_counts` of the base.
    """

    def __init__(self, base: Tensor, factors: Factors | None, ratios: Sequence[float]):
        self.ratios = tuple(ratios)
        flat = base.reshape(-1)
        self.binades = binade_counts(flat)
        self.empty = not any(bool(part.any()) for part in flat.split(CHUNK))
        self.has_principal = factors is not None and not self.empty
        self.ties = dict.fromkeys(self.ratios, 0)
        dtype = torch.uint8 if len(ratios) <= 4 else torch.int16
        self.code = torch.zeros(len(flat), dtype=dtype, device=flat.device)
        if not self.empty:
            self._add_low(flat)
            if factors is not None:
                self._add_principal(base.flatten(1), factors)
        self.select = _mask_codes(len(ratios))
        table = self._no_codes()
        for code in self.code.split(CHUNK):
            table += _count_codes(code, len(table))
        self.table = self._counts(table)

    def _add_low(self, flat: Tensor) -> None:
        """Marks the smallest entries at every ratio."""
        sizes, borders, found = magnitudes(flat), [], None
        for ratio in sorted(self.ratios, reverse=True):
            members = quota(ratio, len(flat))
            if found is None or members <= found.smaller:
                found = kth_smallest(sizes, members)
            bit = 2 << (2 * self.ratios.index(ratio))
            border = MaskBoundary(found, members - found.smaller, bit, lt, le)
            self.ties[ratio] = 0 if border.whole else found.equal
            borders.append(border)
        self._mark(sizes, borders)

    def _add_principal(self, matrix: Tensor, factors: Factors) -> None:
        """Marks the largest of each reconstruction U_k U_k^T W, rounded to fp32."""
        m, n = matrix.shape
        right = factors.right * factors.values[: factors.right.shape[1]]  # W^T U [n, K]
        sizes = torch.empty(m, n, dtype=torch.float32, device=matrix.device)
        for i, ratio in enumerate(self.ratios):
            k = rank_at(ratio, m, n)
            of_right = right[:, :k].T
            for to, left in zip(sizes.split(ROWS), factors.left.split(ROWS), strict=True):
                to.copy_(product(left[:, :k], of_right)).abs_()
            members, flat = quota(ratio, m * n), sizes.view(-1)
            found = kth_smallest(flat, m * n - members + 1)
            larger = m * n - found.smaller - found.equal
            self._mark(flat, [MaskBoundary(found, members - larger, 1 << (2 * i), gt, ge)])

    def _mark(self, sizes: Tensor, borders: Sequence[MaskBoundary]) -> None:
        for code, size in zip(self.code.split(CHUNK), sizes.split(CHUNK), strict=True):
            for border in borders:
                border.mark(code, size)

    def names(self) -> list[tuple[str, float]]:
        return [(name, ratio) for name in NAMES for ratio in self.ratios]

    def members(self, name: str, ratio: float) -> int | None:
        """Number of coordinates of a mask; None where the base does not define it."""
        known = not self.empty and (name == "low_magnitude" or self.has_principal)
        return self.table[name, ratio] if known else None

    def tally(
        self, sizes: Tensor, codes: Tensor, thresholds: Sequence[float]
    ) -> list[tuple[int, dict[tuple[str, float], int]]]:
        """(coordinates with size > threshold, how many of them are in each mask), by threshold; codes: of the sizes."""
        tables = [self._no_codes() for _ in thresholds]
        for size, code in zip(sizes.split(CHUNK), codes.split(CHUNK), strict=True):
            for table, threshold in zip(tables, thresholds, strict=True):
                visible = compare(gt, size, threshold)
                # zeroing the codes below the threshold is faster than gathering those above
                table += _count_codes(code * visible.view(torch.uint8), len(table))
                table[0] -= len(visible) - count(visible)
        return [(int(table.sum()), self._counts(table)) for table in tables]

    def _no_codes(self) -> Tensor:
        return torch.zeros(4 ** len(self.ratios), dtype=torch.int64)

    def _counts(self, table: Tensor) -> dict[tuple[str, float], int]:
        """Sums the histogram of codes into one count per mask."""
        return dict(zip(self.names(), (self.select @ table.cpu()).tolist(), strict=True))


def _count_codes(code: Tensor, number: int) -> Tensor:
    """Histogram of the codes, [number] on the CPU."""
    return torch.bincount(code, minlength=number).cpu()


def _mask_codes(ratios: int) -> Tensor:
    """Membership of each code in each mask, [masks, codes] of 0 and 1, in the order of `BaseMasks.names`."""
    codes = torch.arange(4**ratios)
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for i in range(ratios):
        principal, low = codes & (1 << (2 * i)) > 0, codes & (2 << (2 * i)) > 0
        rows["principal"].append(principal)
        rows["low_magnitude"].append(low)
        rows["principal_not_low"].append(principal & ~low)
        rows["nonprincipal_or_low"].append(~principal | low)
    return torch.stack([row for name in NAMES for row in rows[name]]).long()
