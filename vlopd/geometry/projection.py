"""Where an update lies relative to the source matrix's own principal subspaces, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlopd.geometry.rows import Measure, parameters
from vlopd.geometry.spectrum import (
    Factors,
    factorise,
    rank_at,
    singular_values,
    spectral_measures,
)


def projection_measures(source: Factors, delta: Tensor, ratios: Sequence[float]) -> list[Measure]:
    """Share of the update's energy inside the source's top-k subspaces (arXiv 2606.13657).

    D is the update, [m, n]. The last column is the value for noise without structure.

    principal_projection_energy_ratio        |U_k^T D V_k|^2 / |D|^2    k^2 / (mn)
    left_principal_projection_energy_ratio   |U_k^T D|^2 / |D|^2        k / m
    right_principal_projection_energy_ratio  |D V_k|^2 / |D|^2          k / n
    """
    m, n = delta.shape
    energy = float(delta.square().sum())
    from_left = source.left.T @ delta  # [k, n]
    joint = (from_left @ source.right).square()  # [k, k]
    left = from_left.square().sum(1).cumsum(0)
    right = (delta @ source.right).square().sum(0).cumsum(0)
    found = []
    for ratio in ratios:
        k = rank_at(ratio, m, n)
        for prefix, part in (
            ("", joint[:k, :k].sum()),
            ("left_", left[k - 1]),
            ("right_", right[k - 1]),
        ):
            metric = f"{prefix}principal_projection_energy_ratio"
            measure = _ratio(metric, parameters(ratio=ratio), float(part), energy)
            found.append(_defined(measure, source, k))
    return found


def rotation_measures(
    source: Factors, trained: Factors, shape: tuple[int, int], ratios: Sequence[float]
) -> list[Measure]:
    """How far the top-k subspaces turned: mean sine of their principal angles, in [0, 1].

    The sines are the singular values of (I - U_k U_k^T) U'_k; 1 - cos^2 would lose small angles.
    """
    found = []
    for ratio in ratios:
        k = rank_at(ratio, *shape)
        for metric, before, after in (
            ("top_subspace_rotation", source.left, trained.left),
            ("right_subspace_rotation", source.right, trained.right),
        ):
            base, turned = before[:, :k], after[:, :k]
            sines = singular_values(turned - base @ (base.T @ turned))
            value = float(sines.mean())
            found.append(_defined(Measure(metric, parameters(ratio=ratio), value), source, k))
    return found


def drift_measures(source: Factors, trained: Factors, delta_norm: float) -> list[Measure]:
    """How far the singular values moved.

    spectral_drift_l2_ratio            |s' - s| / |s|    (the NSS of arXiv 2511.08567)
    spectral_drift_to_delta_fro_ratio  |s' - s| / |D|    1 if D only rescales, 0 if it only turns
    """
    drift = float(torch.linalg.vector_norm(trained.values - source.values))
    length = float(torch.linalg.vector_norm(source.values))
    return [
        _ratio("spectral_drift_l2_ratio", "", drift, length, "skipped", "the source is all zero"),
        _ratio("spectral_drift_to_delta_fro_ratio", "", drift, delta_norm),
    ]


def matrix_measures(
    matrix: Tensor, source: Factors, delta: Tensor, ratios: Sequence[float]
) -> list[Measure]:
    """Every spectral and subspace measure of an update `delta` to `matrix`, both float64 [m, n].

    `source` are the factors of `matrix`, shared by the observed update and its nulls.
    """
    moved = bool(delta.any())
    trained = factorise(matrix + delta, source.left.shape[1]) if moved else source
    values = singular_values(delta) if moved else torch.zeros_like(source.values)
    shape = (matrix.shape[0], matrix.shape[1])
    return [
        *spectral_measures(values, ratios),
        *projection_measures(source, delta, ratios),
        *rotation_measures(source, trained, shape, ratios),
        *drift_measures(source, trained, float(torch.linalg.vector_norm(delta))),
    ]


def skipped_measures(ratios: Sequence[float], reason: str) -> list[Measure]:
    """The rows of a parameter that is no matrix, or too large a one: none is dropped silently."""
    unit = torch.zeros(1, 1, dtype=torch.float64)
    rows = matrix_measures(unit, factorise(unit, 1), unit, ratios)
    return [replace(row, value=None, status="skipped", reason=reason) for row in rows]


def _ratio(
    metric: str,
    parameter: str,
    part: float,
    whole: float,
    status: str = "zero",
    reason: str = "nothing moved",
) -> Measure:
    """part / whole; without a value, and with this status and reason, where `whole` is 0."""
    if whole == 0:
        return Measure(metric, parameter, None, status, reason)
    return Measure(metric, parameter, part / whole)


def _defined(measure: Measure, source: Factors, k: int) -> Measure:
    """`measure`, or skipped where the source has no top-k subspace."""
    if source.rank >= k:
        return measure
    reason = f"the source has rank {source.rank}, below k = {k}"
    return replace(measure, value=None, status="skipped", reason=reason)
