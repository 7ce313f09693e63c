"""Norms and coordinate-wise measures of an update: its size, sparsity, and overlap with the base's masks.

Each is a ratio of counts or energies summed over coordinates, so one formula serves a tensor and the whole model:
a `Term` keeps numerator and denominator, and the terms of many tensors add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq, le, lt
from typing import NamedTuple

import torch
from torch import Tensor

from vlopd.masks.select import quota
from vlopd.update_geometry.base_masks import REASON, BaseMasks
from vlopd.update_geometry.closed_forms import hypergeometric, visible_in_bf16
from vlopd.update_geometry.magnitudes import (
    CHUNK,
    Test,
    compare,
    count,
    nonzero_entries,
    norm,
    top_energy,
)
from vlopd.update_geometry.schema import Measure, parameters

ATOLS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
UPDATE_ATOLS = (0.0, 1e-5)
TAUS = (1e-4, 1e-3, 1e-2)

Threshold = tuple[Test, float]
"""A comparison and its limit."""


class Term(NamedTuple):
    """A measure as numerator and denominator, additive over tensors.

    fold: `ratio` numerator / denominator, `root` the square root of that, `max` and `sum` the numerator
    alone. A term with a reason is skipped, and contributes nothing to a sum. `chance` is mean and variance of the
    numerator where they have a closed form; they add up as well. `decided_by` as in `Measure`.
    """

    metric: str
    parameter: str
    numerator: float
    denominator: float = 1.0
    fold: str = "ratio"
    reason: str = ""
    decided_by: str = "signs"
    chance: tuple[float, float] | None = None

    def measure(self) -> Measure:
        key = (self.metric, self.parameter)
        if self.reason:
            return Measure(*key, None, "skipped", self.reason, self.decided_by)
        if self.denominator == 0:
            status, reason = ("skipped", "the base is all zero")
            if self.numerator == 0:
                status, reason = ("zero", "nothing moved")
            return Measure(*key, None, status, reason, self.decided_by)
        value = self.numerator / self.denominator
        if self.fold == "root":
            return Measure(*key, math.sqrt(value), decided_by=self.decided_by)
        chance = None
        if self.chance is not None:
            chance = (
                self.chance[0] / self.denominator,
                math.sqrt(self.chance[1]) / self.denominator,
            )
        return Measure(*key, value, decided_by=self.decided_by, chance=chance)


# --------------------------------------------------------------------------------------- thresholds


def _not_below(threshold: float, dtype: torch.dtype) -> float:
    """The smallest value of `dtype` that is >= threshold: x < threshold exactly where x < this."""
    rounded = float(torch.tensor(threshold, dtype=dtype))
    if rounded >= threshold:
        return rounded
    return float(
        torch.nextafter(torch.tensor(rounded, dtype=dtype), torch.tensor(math.inf, dtype=dtype))
    )


def not_above(threshold: float, dtype: torch.dtype) -> float:
    """The largest value of `dtype` that is <= threshold: x > threshold exactly where x > this."""
    return -_not_below(-threshold, dtype)


def thresholds(rms: float, dtype: torch.dtype) -> dict[tuple[str, str], Threshold]:
    """The thresholds for |delta| of `dtype`, by metric and parameter; rms: of the base."""
    found: dict[tuple[str, str], Threshold] = {("frac_delta_eq_0", ""): (le, 0.0)}
    for atol in ATOLS:
        key = parameters(atol=atol)
        found["frac_isclose_zero", key] = (le, not_above(atol, dtype))
        found["frac_abs_delta_lt", key] = (lt, _not_below(atol, dtype))
    for tau in TAUS:
        found["frac_abs_delta_lt_src_rms", parameters(tau=tau)] = (lt, _not_below(tau * rms, dtype))
    return found


@dataclass
class CoordinateCounts:
    """Counts of one pass over a tensor's coordinates.

    within: coordinates below each threshold. within_share: those with |D| <= tau |w|.
    sizes, codes: |D| and the base's mask codes of all changed and possibly some unchanged coordinates.
    """

    within: dict[tuple[str, str], int]
    within_share: dict[float, int]
    same_in_bf16: int
    total: float
    largest: float
    sizes: Tensor
    codes: Tensor


def count_coordinates(
    w: Tensor, d: Tensor, code: Tensor, limits: dict[tuple[str, str], Threshold]
) -> CoordinateCounts:
    """Makes one pass over a flat base, its delta and its mask codes; compares changed coordinates only."""
    sizes, codes, moved = torch.empty_like(d), torch.empty_like(code), 0
    counts = CoordinateCounts(
        dict.fromkeys(limits, 0), dict.fromkeys(TAUS, 0), 0, 0.0, 0.0, sizes, codes
    )
    for parts in zip(*(each.split(CHUNK) for each in (d, w, code)), strict=True):
        b, a, c = nonzero_entries(*parts)
        if not len(b):
            continue
        here = slice(moved, moved + len(b))
        moved += len(b)
        wide = a.to(b.dtype)
        codes[here] = c
        size, reference = torch.abs(b, out=sizes[here]), wide.abs()
        for key, (test, limit) in limits.items():
            counts.within[key] += count(compare(test, size, limit))
        for tau in TAUS:
            counts.within_share[tau] += count(compare(le, size, tau * reference))
        before, after = (x.bfloat16().to(b.dtype) for x in (a, wide + b))
        counts.same_in_bf16 += count(compare(eq, before, after))
        counts.total += float(size.sum(dtype=torch.float64))
        counts.largest = max(counts.largest, float(size.max()))

    counts.sizes, counts.codes = sizes[:moved], codes[:moved]
    still = len(d) - moved
    counts.same_in_bf16 += still
    for tau in TAUS:
        counts.within_share[tau] += still
    for key, (test, limit) in limits.items():
        counts.within[key] += still * test(0.0, limit)
    return counts


# ------------------------------------------------------------------------------------------ measures


def coordinate_terms(
    base: Tensor, delta: Tensor, masks: BaseMasks, ratios: Sequence[float]
) -> list[Term]:
    """Norms, sparsity and concentration of `delta` [any shape], fp32 or wider (arXiv 2606.13657).

    relative_delta_fro          |D| / |W|
    delta_rms                   |D| / sqrt(entries), per parameter
    delta_linf_norm             max |D|
    delta_mean_abs              mean |D|
    frac_delta_eq_0             share of D = 0 as stored; precision=bf16 where both are rounded to bf16 first
    visible_fraction            share that differs once both are rounded to bf16, beside what the sizes of update and
                                weights predict (`visible_in_bf16`, in the rows of the null closed_form)
    frac_isclose_zero           share of |D| <= atol
    frac_abs_delta_lt           share of |D| < atol
    frac_abs_delta_lt_src_rms   share of |D| < tau * rms(W)
    frac_abs_delta_le_src_abs   share of |D| <= tau |w|, coordinate by coordinate
    coord_top_energy_ratio      share of |D|^2 in the ceil(ratio * numel) largest coordinates
    update_density              share of |D| > atol
    low_magnitude_ties          base entries equal to the mask's threshold; ties go to the lowest index
    and density and overlap of the base's masks, see `_overlap_terms`.

    base: as stored, in the shape of delta. Thresholds are compared exactly, not rounded to a dtype.
    """
    n = delta.numel()
    w, d = base.reshape(-1), delta.reshape(-1)
    energy, base_energy = norm(d) ** 2, norm(w) ** 2
    rms = math.sqrt(base_energy / n) if n else 0.0
    counts = count_coordinates(w, d, masks.code, thresholds(rms, d.dtype))
    ks = [quota(ratio, n) for ratio in ratios]
    tops = [top_energy(counts.sizes, k) if k < len(counts.sizes) else energy for k in ks]

    is_rounded = base.dtype == torch.bfloat16
    chance = visible_in_bf16(masks.binades, math.sqrt(energy / n) if n else 0.0, is_rounded)

    terms = [
        Term("relative_delta_fro", "", energy, base_energy, "root", decided_by="norm"),
        Term("delta_rms", "", energy, n, "root", decided_by="norm"),
        Term("delta_linf_norm", "", counts.largest, fold="max", decided_by="sizes"),
        Term("delta_mean_abs", "", counts.total, n, decided_by="sizes"),
        Term("frac_delta_eq_0", "precision=bf16", counts.same_in_bf16, n, decided_by="places"),
        Term(
            "visible_fraction",
            "precision=bf16",
            n - counts.same_in_bf16,
            n,
            decided_by="places",
            chance=chance,
        ),
    ]
    for (metric, key), number in counts.within.items():
        terms.append(Term(metric, key, number, n, decided_by="sizes"))
    for tau, number in counts.within_share.items():
        key = parameters(tau=tau)
        terms.append(Term("frac_abs_delta_le_src_abs", key, number, n, decided_by="places"))
    for ratio, top in zip(ratios, tops, strict=True):
        key = parameters(ratio=ratio)
        terms.append(Term("coord_top_energy_ratio", key, top, energy, decided_by="sizes"))
    found = masks.tally(
        counts.sizes, counts.codes, [not_above(atol, d.dtype) for atol in UPDATE_ATOLS]
    )
    for atol, (moved, tallies) in zip(UPDATE_ATOLS, found, strict=True):
        key = parameters(atol=atol)
        terms.append(Term("update_density", key, moved, n, decided_by="sizes"))
        for (name, ratio), both in tallies.items():
            terms += _overlap_terms(name, ratio, atol, masks.members(name, ratio), both, moved, n)
    for name, ratio in masks.names():
        members = masks.members(name, ratio)
        reason = REASON if members is None else ""
        key = parameters(ratio=ratio)
        terms.append(
            Term(f"{name}_density", key, members or 0, n, reason=reason, decided_by="norm")
        )
    for ratio, ties in masks.ties.items():
        key = parameters(ratio=ratio)
        terms.append(Term("low_magnitude_ties", key, ties, fold="sum", decided_by="norm"))
    return terms


def _overlap_terms(
    name: str, ratio: float, atol: float, members: int | None, both: int, moved: int, n: int
) -> list[Term]:
    """Overlap of a mask M and the visible update U of one tensor (n coordinates).

    update_overlap_ratio     |M and U| / |U|, the share of the update inside M; by chance |M| / n
    covered_by_update_ratio  |M and U| / |M|, the share of M that changed; by chance |U| / n
    enrichment_vs_random     |M and U| / (|M| |U| / n), observed over chance. Expectations add up over
                             tensors, so that a layer with a denser update gives no enrichment.
    """
    key = parameters(ratio=ratio, atol=atol)
    reason = REASON if members is None else ""
    members = members or 0
    chance = hypergeometric(members, moved, n)
    wholes = {
        "update_overlap_ratio": moved,
        "covered_by_update_ratio": members,
        "enrichment_vs_random": chance[0],
    }
    return [
        Term(f"{name}_{of}", key, both, whole, "ratio", reason, "places", chance)
        for of, whole in wholes.items()
    ]
