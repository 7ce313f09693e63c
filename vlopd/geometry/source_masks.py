"""The coordinates that a tensor's source singles out: its principal and its smallest weights (arXiv 2606.13657).

Kept as one small integer a coordinate, a bit for each mask and ratio, so that one count of codes among the
coordinates that moved gives every overlap at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlopd.geometry.spectrum import ROWS, Factors, rank_at, transposed_times
from vlopd.masks import quota

NAMES = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low")
CHUNK = 2**18
REASON = "the source does not define this mask: no matrix, too large, or all zero"


def kth(values: Tensor, k: int) -> float:
    """The k-th smallest entry (NumPy, on a CPU, needs a third of the memory of torch.kthvalue)."""
    if values.device.type == "cpu":
        return float(np.partition(values.numpy(), k - 1)[k - 1])
    return float(values.kthvalue(k).values)


def largest(values: Tensor, k: int) -> tuple[Tensor, int]:
    """(bool mask of the k largest of flat `values`, how many entries tie at the cut).

    Among equal values the lowest index comes first, so that a mask does not depend on the machine. The ties are
    all entries equal to the smallest member where some of them are left out, else 0.
    """
    threshold = kth(values, len(values) - k + 1)
    mask = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    room = k - int(mask.sum())
    mask[equal[:room]] = True
    return mask, len(equal) if room < len(equal) else 0


class SourceMasks:
    """The masks of one tensor's source at every ratio.

    principal            largest |entry| of the rank-floor(ratio * r) reconstruction; needs `factors`
    low_magnitude        smallest |entry| of the source
    principal_not_low    in the first and not in the second
    nonprincipal_or_low  not in the first, or in the second

    The first two have ceil(ratio * numel) members. `ties`: parameter -> how many entries of the source equal
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
            size = flat.abs().neg_()
            for i, ratio in enumerate(self.ratios):
                mask, self.ties[ratio] = largest(size, quota(ratio, len(flat)))
                self.code[mask] += 2 << (2 * i)
            del size
            if factors is not None:
                self._add_principal(source.flatten(1), factors)
        self.select = selectors(len(ratios))
        self.table = self._counts(torch.bincount(self.code, minlength=4 ** len(ratios)))

    def _add_principal(self, matrix: Tensor, factors: Factors) -> None:
        """Marks the largest of each reconstruction U_k U_k^T W, which is made in fp32, some rows at a time."""
        m, n = matrix.shape
        right = transposed_times(matrix, factors.left)  # W^T U [n, K]
        size = torch.empty(m, n, dtype=torch.float32, device=matrix.device)
        for i, ratio in enumerate(self.ratios):
            k = rank_at(ratio, m, n)
            for to, left in zip(size.split(ROWS), factors.left.split(ROWS), strict=True):
                torch.abs((left[:, :k] @ right[:, :k].T).float(), out=to)
            mask, _ = largest(size.view(-1), quota(ratio, m * n))
            self.code[mask] += 1 << (2 * i)

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
