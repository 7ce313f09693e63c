"""Position of an update relative to the base matrix's principal subspaces, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlopd.config.analysis import GeometryConfig
from vlopd.update_geometry.closed_forms import projected_share
from vlopd.update_geometry.linalg import eigenvalues_of, product
from vlopd.update_geometry.magnitudes import norm
from vlopd.update_geometry.schema import Measure, parameters
from vlopd.update_geometry.spectrum import (
    ROWS,
    TOP,
    Factors,
    MatrixSum,
    factorise,
    gram,
    matmul,
    rank_at,
    singular_values,
    singular_values_of_gram,
    spectral_measures,
    too_large,
    transposed_matmul,
)

SUBSPACE = "exact subspaces are needed; "


def _projection_measures(
    base: Factors, delta: MatrixSum, energy: float, squares: Tensor | None, ratios: Sequence[float]
) -> list[Measure]:
    """Share of the update's energy inside the base's top-k subspaces (arXiv 2606.13657).

    D is the update, [m, n]. The last column is the expectation for isotropic noise.

    principal_projection_energy_ratio        |U_k^T D V_k|^2 / |D|^2    k^2 / (mn)
    left_principal_projection_energy_ratio   |U_k^T D|^2 / |D|^2        k / m
    right_principal_projection_energy_ratio  |D V_k|^2 / |D|^2          k / n

    `squares`: D's Gram matrix on its shorter side, where known: |D V_k|^2 = tr V_k^T (D^T D) V_k.
    """
    m, n = delta.shape
    tall = m >= n
    along = delta if tall else delta.T  # [longer side, shorter side]
    near, far = (base.right, base.left) if tall else (base.left, base.right)
    from_far = transposed_matmul(along, far).T  # [k, shorter side]
    joint = product(from_far, near).square()  # [k far, k near]
    far_energy = from_far.square().sum(1)
    if squares is None:
        near_energy = matmul(along, near).square().sum(0)
    else:
        near_energy = (near * product(squares, near)).sum(0).clamp(min=0)
    left, right = (far_energy, near_energy) if tall else (near_energy, far_energy)
    left, right = left.cumsum(0), right.cumsum(0)
    found = []
    for ratio in ratios:
        k = rank_at(ratio, m, n)
        parts = (
            ("", float(joint[:k, :k].sum()), k * k),
            ("left_", float(left[k - 1]), k * n),
            ("right_", float(right[k - 1]), k * m),
        )
        for prefix, part, dimensions in parts:
            metric = f"{prefix}principal_projection_energy_ratio"
            measure = _ratio(metric, parameters(ratio=ratio), part, energy)
            measure = measure._replace(chance=projected_share(dimensions, m * n))
            found.append(_defined(_as(measure, base.approximate), base, k))
    return found


def _principal_angle_sines(before: Tensor, after: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """Sines of the principal angles between the spans of the first k columns, for every k in `cuts`.

    before, after: nested orthonormal bases [m, K]. The sines are the singular values of
    (I - U_k U_k^T) U'_k, which has a part outside U_K and one between k and K; both are computed without
    cancellation, so that angles far below 1e-8 stay accurate.
    """
    inside = product(before.T, after)  # [K, K]
    outer = torch.zeros_like(inside)
    for one, other in zip(before.split(ROWS), after.split(ROWS), strict=True):
        outside = other - product(one, inside)
        outer += product(outside.T, outside)
    found = []
    for k in cuts:
        between = inside[k:, :k]
        found.append(
            singular_values_of_gram(eigenvalues_of(outer[:k, :k] + product(between.T, between)))
        )
    return found


def _rotation_measures(
    base: Factors, trained: Factors, shape: tuple[int, int], ratios: Sequence[float]
) -> list[Measure]:
    """Rotation of the top-k subspaces: mean sine of their principal angles, in [0, 1]."""
    cuts = [rank_at(ratio, *shape) for ratio in ratios]
    found = []
    for metric, before, after in (
        ("top_subspace_rotation", base.left, trained.left),
        ("right_subspace_rotation", base.right, trained.right),
    ):
        angles = [0.0] * len(cuts)
        if trained is not base:
            angles = [float(each.mean()) for each in _principal_angle_sines(before, after, cuts)]
        for ratio, k, angle in zip(ratios, cuts, angles, strict=True):
            measure = Measure(metric, parameters(ratio=ratio), angle)
            if base.approximate:
                reason = SUBSPACE + base.approximate
                measure = measure._replace(value=None, status="skipped", reason=reason)
            found.append(_defined(measure, base, k))
    return found


def _drift_measures(base: Factors, trained: Factors, delta_norm: float) -> list[Measure]:
    """Change of the singular values.

    spectral_drift_l2_ratio            |s' - s| / |s|    (the NSS of arXiv 2511.08567)
    spectral_drift_to_delta_fro_ratio  |s' - s| / |D|    1 if D only rescales, 0 if it only rotates
    """
    names = ("spectral_drift_l2_ratio", "spectral_drift_to_delta_fro_ratio")
    if base.approximate:
        reason = f"all values: {base.approximate}"
        return [Measure(name, "", None, "skipped", reason) for name in names]
    drift = float(torch.linalg.vector_norm(trained.values - base.values))
    length = float(torch.linalg.vector_norm(base.values))
    return [
        _ratio(names[0], "", drift, length, "skipped", "the base is all zero"),
        _ratio(names[1], "", drift, delta_norm),
    ]


def matrix_measures(
    matrix: Tensor, base: Factors, delta: Tensor, config: GeometryConfig
) -> list[Measure]:
    """All spectral and subspace measures of an update `delta` to `matrix`, both [m, n] of any dtype.

    `base`: the factors of `matrix`, shared by the observed update and its nulls; where they are
    approximate, so are all measures.
    """
    ratios, method, approximate = config.ratios, config.factorisation, base.approximate
    m, n = delta.shape
    r = min(m, n)
    energy = norm(delta) ** 2
    change = MatrixSum((delta,))
    squares, after = None, base
    if energy == 0:
        values = torch.zeros(1 if approximate else r, dtype=torch.float64)
    elif approximate:
        values = factorise(change, min(max(TOP), r), method, approximate).values
    else:
        after = factorise(MatrixSum((matrix, delta)), base.left.shape[1], method)
        if method == "svd":
            values = singular_values(change, method)
        else:
            squares = gram(change)
            values = singular_values_of_gram(eigenvalues_of(squares))
    return [
        *spectral_measures(values, energy, ratios, r, approximate),
        *_projection_measures(base, change, energy, squares, ratios),
        *_rotation_measures(base, after, (m, n), ratios),
        *_drift_measures(base, after, energy**0.5),
    ]


def base_factors(matrix: Tensor, config: GeometryConfig) -> Factors:
    """The factors of a base matrix [m, n], up to the largest of the config's ratios."""
    m, n = matrix.shape
    k = max(rank_at(ratio, m, n) for ratio in config.ratios)
    return factorise(MatrixSum((matrix,)), k, config.factorisation, too_large(m, n, config))


def skipped_measures(config: GeometryConfig, reason: str, status: str = "skipped") -> list[Measure]:
    """Measures without values for a parameter that is not a matrix, or whose factorisation failed."""
    unit = torch.ones(1, 1, dtype=torch.float64)
    rows = matrix_measures(unit, base_factors(unit, config), unit, config)
    return [row._replace(value=None, status=status, reason=reason, chance=None) for row in rows]


def _as(measure: Measure, approximate: str) -> Measure:
    if not approximate or measure.value is None:
        return measure
    return measure._replace(status="approximate", reason=approximate)


def _ratio(
    metric: str,
    parameter: str,
    part: float,
    whole: float,
    status: str = "zero",
    reason: str = "nothing moved",
) -> Measure:
    """part / whole; no value, and the given status and reason, where `whole` is 0."""
    if whole == 0:
        return Measure(metric, parameter, None, status, reason)
    return Measure(metric, parameter, part / whole)


def _defined(measure: Measure, base: Factors, k: int) -> Measure:
    """`measure`, or skipped where the base has no top-k subspace."""
    if base.rank >= k:
        return measure
    reason = f"the base has rank {base.rank}, below k = {k}"
    return measure._replace(value=None, status="skipped", reason=reason, chance=None)
