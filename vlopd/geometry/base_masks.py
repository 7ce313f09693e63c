"""The coordinates that a tensor's base singles out: its principal and its smallest weights (arXiv 2606.13657).

Kept as one small integer a coordinate, a bit for each mask and ratio, so that one count of codes among the
coordinates that moved gives every overlap at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt

import torch
from torch import Tensor

from vlopd.geometry.linalg import product
from vlopd.geometry.magnitudes import CHUNK, Cut, Test, count, cut, magnitudes, marked, places_of
from vlopd.geometry.spectrum import ROWS, Factors, rank_at
from vlopd.masks.select import quota

NAMES = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low")
REASON = "the base does not define this mask: no matrix, too large, or all zero"


@dataclass
class Border:
    """Where a mask ends: it takes all sizes beyond the cut and the first `room` of those that equal it."""

    cut: Cut
    room: int
    bit: int
    beyond: Test
    upto: Test
    whole: bool = field(init=False)
    """Whether all that equal the cut are members, so that no tie is broken."""

    def __post_init__(self):
        self.whole = self.room == self.cut.equal

    def mark(self, code: Tensor, size: Tensor) -> None:
        """Sets the bit of the next stretch's members."""
        member = marked(self.upto if self.room else self.beyond, size, self.cut.value)
        if self.room and not self.whole:
            equal = marked(eq, size, self.cut.value)
            ties = count(equal)
            if ties > self.room:
                member[places_of(equal)[self.room :]] = False
            self.room -= min(ties, self.room)
        code.add_(member.view(torch.uint8), alpha=self.bit)


class BaseMasks:
    """The masks of one tensor's base at every ratio.

    principal            largest |entry| of the rank-floor(ratio * r) reconstruction; needs `factors`
    low_magnitude        smallest |entry| of the base
    principal_not_low    in the first and not in the second
    nonprincipal_or_low  not in the first, or in the second

    The first two have ceil(ratio * numel) members; among equal values the lowest index comes first, so that a
    mask does not depend on the machine. `ties`: parameter -> how many entries of the base equal
    the largest member of low_magnitude (bf16 has many).
    """

    def __init__(self, base: Tensor, factors: Factors | None, ratios: Sequence[float]):
        self.ratios = tuple(ratios)
        flat = base.reshape(-1)
        self.empty = not any(bool(part.any()) for part in flat.split(CHUNK))
        self.has_principal = factors is not None and not self.empty
        self.ties = dict.fromkeys(self.ratios, 0)
        dtype = torch.uint8 if len(ratios) <= 4 else torch.int16
        self.code = torch.zeros(len(flat), dtype=dtype, device=flat.device)
        if not self.empty:
            self._add_low(flat)
            if factors is not None:
                self._add_principal(base.flatten(1), factors)
        self.select = selectors(len(ratios))
        table = self._no_codes()
        for code in self.code.split(CHUNK):
            table += frequencies(code, len(table))
        self.table = self._counts(table)

    def _add_low(self, flat: Tensor) -> None:
        """Marks the smallest entries at every ratio."""
        sizes, borders, found = magnitudes(flat), [], None
        for ratio in sorted(self.ratios, reverse=True):
            members = quota(ratio, len(flat))
            if found is None or members <= found.smaller:
                found = cut(sizes, members)
            bit = 2 << (2 * self.ratios.index(ratio))
            border = Border(found, members - found.smaller, bit, lt, le)
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
            found = cut(flat, m * n - members + 1)
            larger = m * n - found.smaller - found.equal
            self._mark(flat, [Border(found, members - larger, 1 << (2 * i), gt, ge)])

    def _mark(self, sizes: Tensor, borders: Sequence[Border]) -> None:
        for code, size in zip(self.code.split(CHUNK), sizes.split(CHUNK), strict=True):
            for border in borders:
                border.mark(code, size)

    def names(self) -> list[tuple[str, float]]:
        return [(name, ratio) for name in NAMES for ratio in self.ratios]

    def members(self, name: str, ratio: float) -> int | None:
        """How many coordinates a mask has; None where the base does not define it."""
        known = not self.empty and (name == "low_magnitude" or self.has_principal)
        return self.table[name, ratio] if known else None

    def tally(
        self, sizes: Tensor, codes: Tensor, thresholds: Sequence[float]
    ) -> list[tuple[int, dict[tuple[str, float], int]]]:
        """(coordinates of a size > threshold, how many of them each mask has), by threshold; codes: of the sizes."""
        tables = [self._no_codes() for _ in thresholds]
        for size, code in zip(sizes.split(CHUNK), codes.split(CHUNK), strict=True):
            for table, threshold in zip(tables, thresholds, strict=True):
                visible = marked(gt, size, threshold)
                # the code of what is not visible becomes 0, which is faster than taking out what is
                table += frequencies(code * visible.view(torch.uint8), len(table))
                table[0] -= len(visible) - count(visible)
        return [(int(table.sum()), self._counts(table)) for table in tables]

    def _no_codes(self) -> Tensor:
        return torch.zeros(4 ** len(self.ratios), dtype=torch.int64)

    def _counts(self, table: Tensor) -> dict[tuple[str, float], int]:
        """Entries of a table by code that belong to each mask."""
        return dict(zip(self.names(), (self.select @ table.cpu()).tolist(), strict=True))


def frequencies(code: Tensor, number: int) -> Tensor:
    """How often each of so many codes comes, [number] on the CPU."""
    return torch.bincount(code, minlength=number).cpu()


def selectors(ratios: int) -> Tensor:
    """Which codes belong to which mask, [masks, codes] of 0 and 1, in the order of `BaseMasks.names`."""
    codes = torch.arange(4**ratios)
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for i in range(ratios):
        principal, low = codes & (1 << (2 * i)) > 0, codes & (2 << (2 * i)) > 0
        rows["principal"].append(principal)
        rows["low_magnitude"].append(low)
        rows["principal_not_low"].append(principal & ~low)
        rows["nonprincipal_or_low"].append(~principal | low)
    return torch.stack([row for name in NAMES for row in rows[name]]).long()
