"""Leading singular subspaces of a matrix, in float64, projections onto those of an update, and parts of an update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

FLOOR = 2.0**-44
"""Eigenvalues of a Gram matrix below this fraction of the largest are rounding error and count as zero."""


def _leading_subspace(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis [min(m, n), k] of the leading singular subspace on the smaller side, float64.

    From an eigendecomposition of that side's Gram matrix (the left one where m = n); k < `rank`
    where the matrix has fewer singular values above rounding.
    """
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    eigenvalues, vectors = torch.linalg.eigh(short @ short.T)
    kept = int((eigenvalues > FLOOR * eigenvalues[-1]).sum())
    return vectors.flip(1)[:, : min(rank, kept)]


def _leading_subspaces(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [m, k], right [n, k]): orthonormal bases of both sides' leading subspaces, float64."""
    near = _leading_subspace(matrix, rank)
    wide = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        return near, torch.linalg.qr(wide.T @ near).Q
    return torch.linalg.qr(wide @ near).Q, near


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Best approximation of rank at most `rank`, float64."""
    near, wide = _leading_subspace(matrix, rank), matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        return near @ (near.T @ wide)
    return (wide @ near) @ near.T


def rank_of(matrix: Tensor, rank: int | None, fraction: float | None) -> int:
    """`rank`, or a fraction of the smaller side of a matrix [m, n], rounded down, at least 1."""
    if rank is None:
        rank = max(1, math.floor(Fraction(str(fraction)) * min(matrix.shape)))
    return rank


def random_subspaces(matrix: Tensor, rank: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """(left [m, k], right [n, k]): orthonormal bases of uniformly drawn subspaces, float64; k <= `rank`."""
    k = min(rank, *matrix.shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, k, generator=stream, dtype=torch.float64)).Q
        for side in matrix.shape
    )
    return left, right


def inner_part(
    base: Tensor, delta: Tensor, rank: int, stream: torch.Generator | None = None
) -> Tensor:
    """The part U U^T D V V^T of an update D that lies in subspaces of both sides, float64, in its shape.

    U [m, k] and V [n, k] are the base's leading singular vectors or, with a random stream, uniformly drawn. Tensors of
    more dimensions are flattened to [m, n]; of a vector the part is zero. All else, D minus this, is the part off the
    subspaces: the three blocks U U^T D (I - V V^T), (I - U U^T) D V V^T and (I - U U^T) D (I - V V^T).
    """
    if delta.ndim < 2:
        return torch.zeros_like(delta, dtype=torch.float64)
    matrix, of = delta.flatten(1).double(), base.flatten(1)
    if stream is None:
        left, right = _leading_subspaces(of, rank)
    else:
        left, right = random_subspaces(of, rank, stream)
    return (left @ (left.T @ matrix @ right) @ right.T).view(delta.shape)


def update_projection(delta: Tensor, rank: int, side: str) -> Projection | None:
    """The projection onto the leading subspace(s) of an update [m, ...]; None for a vector.

    side: "right", "left" or "both". For an all-zero update it projects everything to zero.
    """
    if delta.ndim < 2:
        return None
    left, right = (basis.float() for basis in _leading_subspaces(delta.flatten(1), rank))
    return Projection(None if side == "right" else left, None if side == "left" else right)


@dataclass(frozen=True)
class Projection:
    """Orthogonal projection of a matrix's gradient G [m, n] onto a subspace of rank r ("subspace locking").

    right  G V V^T  (arXiv 2606.07082, appendix on locking)
    left   U U^T G
    Applies both where both are given. Tensors with more dimensions are flattened to [m, n].
    """

    left: Tensor | None  # [m, r] fp32, orthonormal columns
    right: Tensor | None  # [n, r] fp32, orthonormal columns

    def __call__(self, gradient: Tensor) -> Tensor:
        matrix = gradient.flatten(1).float()
        if self.left is not None:
            matrix = self.left @ (self.left.T @ matrix)
        if self.right is not None:
            matrix = (matrix @ self.right) @ self.right.T
        return matrix.view(gradient.shape)

    def to(self, device: torch.device) -> Projection:
        left, right = (None if b is None else b.to(device) for b in (self.left, self.right))
        return Projection(left, right)
