"""Singular values and leading subspaces in float64, from the Gram matrix of the smaller side.

An eigendecomposition of the Gram matrix costs a fraction of an SVD and resolves singular values down to
about 1e-8 of the largest, below every tolerance here. A direct SVD is available for smaller values,
and a randomised range finder (arXiv 0909.4061) for matrices above a cost limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from vlopd.config.analysis import GeometryConfig
from vlopd.seeding import generator
from vlopd.update_geometry.linalg import eigenvalues_of, leading_eigenvectors, product
from vlopd.update_geometry.schema import Measure, parameters

TOP = (1, 2, 4, 8, 16, 32, 64)
TOLERANCES = (1e-6, 1e-5, 1e-4)
FLOOR = 2.0**-22
"""Singular values below this fraction of the largest are rounding error of the Gram matrix and count as zero."""
ROWS = 512
"""Rows of a large matrix that are converted to float64 at a time."""
HELD = 2**21
"""Entries (16 MB in float64) up to which a matrix is converted once, rather than on every pass."""
OVERSAMPLE, POWER = 16, 4
"""Extra directions and power iterations of the randomised pass."""


def as_matrix(tensor: Tensor) -> tuple[Tensor | None, str]:
    """(the parameter as a matrix [m, n], "") or (None, the reason why it is not one).

    Convolution kernels (patch embeddings) are flattened to [out, everything else].
    """
    if tensor.ndim not in (2, 4, 5):
        return None, f"{tensor.ndim}-D, not a matrix"
    return tensor.flatten(1), ""


@cache
def rank_at(ratio: float, m: int, n: int) -> int:
    """max(1, floor(ratio * min(m, n))), for the ratio as a decimal."""
    return max(1, math.floor(Fraction(str(ratio)) * min(m, n)))


def too_large(m: int, n: int, config: GeometryConfig) -> str:
    """The reason why an [m, n] matrix is factorised approximately; empty where exact."""
    if min(m, n) > config.max_exact_side:
        return f"randomised: shorter side {min(m, n)} > {config.max_exact_side}"
    if m * n * min(m, n) > config.max_exact_cost:
        cost = f"{m * n * min(m, n):.2g} > {config.max_exact_cost:.2g}"
        return f"randomised: cost m n min(m, n) = {cost}"
    return ""


@dataclass(frozen=True)
class Factors:
    """Singular values of a matrix [m, n] and its leading singular subspaces, float64.

    The first k columns of `left` and `right` span the top-k subspaces, for every k up to their number.
    `approximate`: the reason why the factors are inexact and `values` has the largest only; empty where exact.
    """

    values: Tensor  # [r], descending; [q] of the largest where approximate
    left: Tensor  # [m, k]
    right: Tensor  # [n, k]
    approximate: str = ""

    @property
    def rank(self) -> int:
        return int((self.values > 0).sum())


class MatrixSum:
    """A sum of matrices [m, n] in float64, e.g. base + delta; a large one is streamed in chunks of rows."""

    def __init__(self, terms: tuple[Tensor, ...]):
        self.terms, self.height = terms, ROWS
        self.shape, self.device = terms[0].shape, terms[0].device
        if terms[0].numel() <= HELD:
            self.terms, self.height = (_sum_float64(terms),), max(1, self.shape[0])

    @property
    def T(self) -> MatrixSum:
        return MatrixSum(tuple(term.T for term in self.terms))

    def widened(self) -> Iterator[Tensor]:
        """Yields float64 rows, `height` at a time."""
        yield from map(
            _sum_float64, zip(*(term.split(self.height) for term in self.terms), strict=True)
        )


def _sum_float64(terms: Sequence[Tensor]) -> Tensor:
    """The sum of several tensors in float64; may return a single one itself."""
    total = terms[0].double()
    for term in terms[1:]:
        total = total + term.double()  # converted first: torch adds mixed dtypes slowly
    return total


def gram(matrix: MatrixSum) -> Tensor:
    """The smaller Gram matrix, A^T A or A A^T, [r, r] in float64, of a matrix of any dtype.

    Converted in chunks of rows, so that no float64 copy of an embedding is made.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    r = tall.shape[1]
    found = torch.zeros(r, r, dtype=torch.float64, device=matrix.device)
    for rows in tall.widened():
        found += product(rows.T, rows)
    return found


def _materialise(matrix: MatrixSum) -> Tensor:
    return torch.cat(list(matrix.widened()))


def matmul(matrix: MatrixSum, basis: Tensor) -> Tensor:
    """matrix @ basis in float64: [m, n] of any dtype and [n, k] -> [m, k]."""
    found = basis.new_empty(matrix.shape[0], basis.shape[1])
    for to, rows in zip(found.split(matrix.height), matrix.widened(), strict=True):
        to.copy_(product(rows, basis))
    return found


def factorise(matrix: MatrixSum, k: int, method: str = "gram", approximate: str = "") -> Factors:
    """Singular values and top-k subspaces of a matrix [m, n] of any dtype, computed in float64.

    method: `gram`, or `svd` for singular values below 1e-7 of the largest. If `approximate` (a reason) is given, a
    randomised range finder computes the k largest values only.
    """
    if approximate:
        return _randomised_factors(matrix, k, approximate)
    if method == "svd":
        u, values, vt = torch.linalg.svd(_materialise(matrix), full_matrices=False)
        return Factors(values, u[:, :k].contiguous(), vt[:k].T.contiguous())
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    eigenvalues, near = leading_eigenvectors(gram(matrix), k)
    far = orthonormal(matmul(tall, near))
    left, right = (far, near) if tall is matrix else (near, far)
    return Factors(singular_values_of_gram(eigenvalues), left, right)


def _randomised_factors(matrix: MatrixSum, k: int, reason: str) -> Factors:
    """The k largest singular values and their subspaces, by a randomised range finder with power iterations.

    The test matrix is the same for every matrix of one shape, so results are reproducible. Well-separated values are
    accurate to 1e-9; for a flat spectrum, such as a null's, the sum of the top squares is up to 8 % low (3000 x 1500).
    """
    m, n = matrix.shape
    tall = matrix if m >= n else matrix.T
    size = min(k + OVERSAMPLE, min(m, n))
    noise = generator("cpu", "range finder", tall.shape[1], size)
    basis = torch.randn(tall.shape[1], size, generator=noise, dtype=torch.float64)
    near = orthonormal(basis.to(matrix.device))
    for _ in range(POWER):
        far = orthonormal(matmul(tall, near))
        near = orthonormal(transposed_matmul(tall, far))
    far = matmul(tall, near)
    eigenvalues, vectors = leading_eigenvectors(product(far.T, far), k)
    near, far = product(near, vectors), orthonormal(product(far, vectors))
    left, right = (far, near) if tall is matrix else (near, far)
    return Factors(singular_values_of_gram(eigenvalues)[:k], left, right, reason)


def transposed_matmul(matrix: MatrixSum, basis: Tensor) -> Tensor:
    """matrix^T @ basis in float64: [m, n] of any dtype and [m, k] -> [n, k]."""
    found = basis.new_zeros(matrix.shape[1], basis.shape[1])
    for rows, part in zip(matrix.widened(), basis.split(matrix.height), strict=True):
        found += product(rows.T, part)
    return found


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormalises columns [m, k] in place, keeping the span of the first j, for every j.

    The Q of A = Q R with a positive diagonal. By CholeskyQR (a few matrix products): once where the columns are nearly
    orthogonal already, as W V is, else twice; by Householder reflections where they are nearly dependent
    (arXiv 1401.5171).
    """
    for _ in range(2):
        inner = product(columns.T, columns)
        factor, info = torch.linalg.cholesky_ex(inner)
        diagonal = factor.diagonal()
        if int(info) or float(diagonal.min()) < 1e-6 * float(diagonal.max()):
            q, r = torch.linalg.qr(columns)
            return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor.T, one, upper=True)
        # in chunks of rows: for an embedding a copy is as large as its tensor
        for rows in columns.split(ROWS):
            rows.copy_(product(rows, inverse))
        lengths = inner.diagonal().sqrt()
        cosines = (inner / lengths).T / lengths
        if float(cosines.fill_diagonal_(0).norm()) < 0.1:
            break  # condition number near 1; the error of one pass is its square times epsilon
    return columns


def singular_values(matrix: MatrixSum, method: str = "gram") -> Tensor:
    """Singular values of a matrix of any dtype in float64, descending, [min(m, n)]."""
    if method == "svd":
        return torch.linalg.svdvals(_materialise(matrix))
    return singular_values_of_gram(eigenvalues_of(gram(matrix)))


def singular_values_of_gram(eigenvalues: Tensor) -> Tensor:
    """Singular values, descending, from ascending eigenvalues of a Gram matrix."""
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    return values.where(values > FLOOR * values[0], torch.zeros_like(values))


def spectral_measures(
    values: Tensor, energy: float, ratios: Sequence[float], r: int, approximate: str = ""
) -> list[Measure]:
    """Rank and concentration of an update with singular values `values` [r] (arXiv 2606.13657).

    spectral_norm           s_1
    stable_rank             sum s^2 / s_1^2
    effective_rank_entropy  exp(-sum p log p), p = s / sum s
    rank_tol                number of s > tol * s_1
    top_energy_ratio        share of sum s^2 in the k largest; skipped where k covers all of them

    `energy`: the update's squared norm, sum s^2; r = min(m, n). If `approximate`, `values` has the largest only, and
    measures that need all of them are skipped.
    """
    values = values.cpu()
    status, reason = ("approximate", approximate) if approximate else ("ok", "")
    largest = float(values[0])
    share = values / values.sum()
    top_energy = values.square().cumsum(0).tolist()
    found = [Measure("spectral_norm", "", largest, status, reason)]

    def add(metric: str, parameter: str, value: float, whole: bool = False) -> None:
        if energy == 0:
            found.append(Measure(metric, parameter, None, "zero", "nothing moved"))
        elif whole and approximate:
            found.append(Measure(metric, parameter, None, "skipped", f"all values: {approximate}"))
        else:
            found.append(Measure(metric, parameter, value, status, reason))

    add("stable_rank", "", energy / largest**2 if largest else 0.0)
    add("effective_rank_entropy", "", float(torch.special.entr(share).sum().exp()), whole=True)
    for tol in TOLERANCES:
        count = int((values > tol * largest).sum())
        add("rank_tol", parameters(tol=tol), count, whole=True)
    cuts = [(parameters(k=k), k) for k in TOP]
    cuts += [(parameters(ratio=ratio), rank_at(ratio, r, r)) for ratio in ratios]
    for parameter, k in cuts:
        if k >= r and "k=" in parameter:
            reason = f"the matrix has only {r} singular values"
            found.append(Measure("top_energy_ratio", parameter, None, "skipped", reason))
        elif k <= len(values):
            add("top_energy_ratio", parameter, top_energy[k - 1] / energy if energy else 0.0)
        else:
            add("top_energy_ratio", parameter, 0.0, whole=True)
    return found
