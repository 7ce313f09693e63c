"""Singular values of an update, in float64.

All spectra come from an eigendecomposition of the Gram matrix on the shorter side, several times
cheaper than an SVD. It resolves singular values down to about 1e-8 of the largest, far below every
tolerance here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vlopd.geometry.rows import Measure, parameters

MAX_SIDE = 4096
"""Matrices whose shorter side is longer are skipped, with a row that says so."""
TOP = (1, 4, 16)
TOLERANCES = (1e-6, 1e-5, 1e-4)
FLOOR = 2.0**-22
"""Singular values below this share of the largest are the Gram matrix's rounding: they are zero."""


def as_matrix(tensor: Tensor) -> tuple[Tensor | None, str]:
    """(the parameter as a float64 matrix [m, n], "") or (None, why it is not one).

    Convolution kernels (patch embeddings) are seen as [out, everything else].
    """
    if tensor.ndim not in (2, 4, 5):
        return None, f"{tensor.ndim}-D, not a matrix"
    matrix = tensor.flatten(1)
    if min(matrix.shape) > MAX_SIDE:
        return None, f"shorter side {min(matrix.shape)} > {MAX_SIDE}"
    return matrix.double(), ""


def rank_at(ratio: float, m: int, n: int) -> int:
    """max(1, floor(ratio * min(m, n))), for the decimal that was written."""
    return max(1, math.floor(Fraction(str(ratio)) * min(m, n)))


@dataclass(frozen=True)
class Factors:
    """Singular values of a matrix [m, n] and its leading singular subspaces, float64.

    The first k columns of `left` and `right` span the top-k subspaces, for every k up to their
    number.
    """

    values: Tensor  # [r], descending
    left: Tensor  # [m, k]
    right: Tensor  # [n, k]

    @property
    def rank(self) -> int:
        return int((self.values > 0).sum())


def factorise(matrix: Tensor, k: int) -> Factors:
    """Singular values and top-k subspaces of a float64 matrix."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    eigenvalues, vectors = torch.linalg.eigh(short @ short.T)
    near = vectors.flip(1)[:, :k]
    # QR keeps the far side orthonormal and nested where dividing by small singular values would not
    far = torch.linalg.qr(short.T @ near).Q
    left, right = (near, far) if short is matrix else (far, near)
    return Factors(_roots(eigenvalues), left, right)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a float64 matrix, descending, [min(m, n)]."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return _roots(torch.linalg.eigvalsh(short @ short.T))


def _roots(eigenvalues: Tensor) -> Tensor:
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    return values.where(values > FLOOR * values[0], torch.zeros_like(values))


def spectral_measures(values: Tensor, ratios: Sequence[float]) -> list[Measure]:
    """Rank and concentration of an update with singular values `values` [r] (arXiv 2606.13657).

    spectral_norm           s_1
    stable_rank             sum s^2 / s_1^2
    effective_rank_entropy  exp(-sum p log p), p = s / sum s
    rank_tol                number of s > tol * s_1
    top_energy_ratio        share of sum s^2 in the k largest; skipped where k takes in all of them
    """
    r = len(values)
    largest, energy = float(values[0]), float(values.square().sum())
    share = values / values.sum()
    top_energy = (values.square().cumsum(0) / energy).tolist()

    found = [Measure("spectral_norm", "", largest)]

    def add(metric: str, parameter: str, value: float) -> None:
        if energy == 0:
            found.append(Measure(metric, parameter, None, "zero", "nothing moved"))
        else:
            found.append(Measure(metric, parameter, value))

    add("stable_rank", "", energy / largest**2 if largest else 0.0)
    add("effective_rank_entropy", "", float(torch.special.entr(share).sum().exp()))
    for tol in TOLERANCES:
        add("rank_tol", parameters(tol=tol), int((values > tol * largest).sum()))
    for k in TOP:
        if k < r:
            add("top_energy_ratio", parameters(k=k), top_energy[k - 1])
        else:
            reason = f"the matrix has only {r} singular values"
            found.append(Measure("top_energy_ratio", parameters(k=k), None, "skipped", reason))
    for ratio in ratios:
        add("top_energy_ratio", parameters(ratio=ratio), top_energy[rank_at(ratio, r, r) - 1])
    return found
