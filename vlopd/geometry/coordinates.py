"""Norms and coordinate-wise measures of an update: how much moved, how many coordinates, and which.

Every one of them is a fold of counts or energies over coordinates, so a tensor's value and a
model's are one formula: a `Term` keeps numerator and denominator, and terms of many tensors add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlopd.geometry.rows import Measure, parameters
from vlopd.geometry.spectrum import Factors, rank_at
from vlopd.masks import largest, quota, smallest, visible

ATOLS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
UPDATE_ATOLS = (0.0, 1e-5)
TAUS = (1e-4, 1e-3, 1e-2)
MASKS = ("principal", "low_magnitude")

Masks = Mapping[tuple[str, float], Tensor]
"""(mask, ratio) -> bool coordinates, the shape of the parameter."""


@dataclass(frozen=True)
class Term:
    """A measure before the division.

    fold: `ratio` numerator / denominator, `root` the square root of that, `max` the numerator
    alone. A term with a reason is skipped, and adds nothing to a sum.
    """

    metric: str
    parameter: str
    numerator: float
    denominator: float = 1.0
    fold: str = "ratio"
    reason: str = ""

    def measure(self) -> Measure:
        if self.reason:
            return Measure(self.metric, self.parameter, None, "skipped", self.reason)
        if self.denominator == 0:
            status, reason = ("skipped", "the source is all zero")
            if self.numerator == 0:
                status, reason = ("zero", "nothing moved")
            return Measure(self.metric, self.parameter, None, status, reason)
        value = self.numerator / self.denominator
        return Measure(
            self.metric, self.parameter, math.sqrt(value) if self.fold == "root" else value
        )


def total(terms: Sequence[Term]) -> Term:
    """The same measure over several tensors."""
    counted = [term for term in terms if not term.reason]
    if not counted:
        return terms[0]
    if counted[0].fold == "max":
        return max(counted, key=lambda term: term.numerator)
    return replace(
        counted[0],
        numerator=math.fsum(term.numerator for term in counted),
        denominator=math.fsum(term.denominator for term in counted),
    )


def source_masks(source: Tensor, factors: Factors | None, ratios: Sequence[float]) -> Masks:
    """The ceil(ratio * numel) coordinates that a tensor's source singles out (arXiv 2606.13657).

    principal      largest |entry| of the rank-floor(ratio * r) reconstruction; needs `factors`
    low_magnitude  smallest |entry| of the source; ties (bf16 has many) to the lowest index
    """
    if not source.any():
        return {}
    found = {("low_magnitude", r): smallest(source, quota(r, source.numel())) for r in ratios}
    if factors is None:
        return found
    matrix = source.flatten(1).double()
    for ratio in ratios:
        left = factors.left[:, : rank_at(ratio, *matrix.shape)]
        members = largest(left @ (left.T @ matrix), quota(ratio, source.numel()))
        found["principal", ratio] = members.view(source.shape)
    return found


def norms_and_coordinates(
    source: Tensor, delta: Tensor, masks: Masks, ratios: Sequence[float]
) -> list[Measure]:
    """All norm and coordinate measures of one tensor's update; see `coordinate_terms`."""
    return [term.measure() for term in coordinate_terms(source, delta, masks, ratios)]


def coordinate_terms(
    source: Tensor, delta: Tensor, masks: Masks, ratios: Sequence[float]
) -> list[Term]:
    """Norms, sparsity and concentration of `delta` [any shape], fp32 or wider (arXiv 2606.13657).

    relative_delta_fro         |D| / |W|
    delta_linf_norm            max |D|
    delta_mean_abs             mean |D|
    frac_delta_eq_0            share of D = 0
    frac_abs_delta_lt          share of |D| < atol
    frac_abs_delta_lt_src_rms  share of |D| < tau * rms(W)
    coord_top_energy_ratio     share of |D|^2 in the ceil(ratio * numel) largest coordinates
    update_density             share of |D| > atol
    and the overlap of the update with `masks`, see `overlap_terms`.
    """
    n = delta.numel()
    size = delta.abs()
    energy, source_energy = _energy(delta), _energy(source)
    rms = math.sqrt(source_energy / n) if n else 0.0

    terms = [
        Term("relative_delta_fro", "", energy, source_energy, "root"),
        Term("delta_linf_norm", "", float(size.max()) if n else 0.0, fold="max"),
        Term("delta_mean_abs", "", float(size.sum(dtype=torch.float64)), n),
        Term("frac_delta_eq_0", "", n - int(delta.count_nonzero()), n),
    ]
    for atol in ATOLS:
        terms.append(Term("frac_abs_delta_lt", parameters(atol=atol), int((size < atol).sum()), n))
    for tau in TAUS:
        below = int((size < tau * rms).sum())
        terms.append(Term("frac_abs_delta_lt_src_rms", parameters(tau=tau), below, n))
    for ratio in ratios:
        top = _energy(delta[largest(delta, quota(ratio, n))])
        terms.append(Term("coord_top_energy_ratio", parameters(ratio=ratio), top, energy))
    for atol in UPDATE_ATOLS:
        updated = visible(delta, atol)
        terms.append(Term("update_density", parameters(atol=atol), int(updated.sum()), n))
        for name in MASKS:
            for ratio in ratios:
                parameter = parameters(ratio=ratio, atol=atol)
                terms += overlap_terms(name, parameter, masks.get((name, ratio)), updated)
    return terms


def overlap_terms(name: str, parameter: str, mask: Tensor | None, updated: Tensor) -> list[Term]:
    """How a mask M and the visible update U of one tensor (n coordinates) meet.

    update_overlap_ratio     |M and U| / |U|, the share of the update inside M; by chance |M| / n
    covered_by_update_ratio  |M and U| / |M|, the share of M that moved; by chance |U| / n
    enrichment_vs_random     |M and U| / (|M| |U| / n), observed over chance. Over several tensors
                             chance adds up, so that a layer that moves more is no enrichment.
    """
    n, moved = updated.numel(), int(updated.sum())
    members = both = 0
    reason = "the source does not define this mask: no matrix, too large, or all zero"
    if mask is not None:
        members, both, reason = int(mask.sum()), int((mask & updated).sum()), ""
    return [
        Term(f"{name}_update_overlap_ratio", parameter, both, moved, reason=reason),
        Term(f"{name}_covered_by_update_ratio", parameter, both, members, reason=reason),
        Term(
            f"{name}_enrichment_vs_random",
            parameter,
            both,
            members * moved / max(n, 1),
            reason=reason,
        ),
    ]


def _energy(tensor: Tensor) -> float:
    """Sum of squares, added up in float64 without a float64 copy."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
