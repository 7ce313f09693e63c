"""Products and eigenproblems of float64 matrices, which dominate the cost of the spectral measures.

On a CPU these use NumPy and SciPy, whose BLAS and LAPACK are faster than torch's on non-Intel processors. The
eigenproblems need all values but few vectors, for which neither has a call: `eigh` computes all vectors, at twice the
cost of all values. So LAPACK's steps are called one by one: tridiagonal form, all values (dsterf), inverse iteration
for the leading vectors (dstein). They are called through ctypes, since SciPy's wrappers hold the GIL and would
serialise the workers.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch
from scipy.linalg import cython_lapack
from torch import Tensor

FEW = 0.25
"""Largest fraction of vectors for which inverse iteration pays off; its cost is quadratic in their number."""
ORTHONORMAL = 1e-10
"""Largest accepted error of the vectors' inner products; typical errors are 1e-14."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; for A^T A NumPy computes only half, by symmetry."""
    if a.device.type != "cpu":
        return a @ b
    return torch.from_numpy(a.numpy() @ b.numpy())


def eigenvalues_of(symmetric: Tensor) -> Tensor:
    """All eigenvalues [n] of a symmetric matrix, ascending."""
    if symmetric.device.type != "cpu":
        return torch.linalg.eigvalsh(symmetric)
    return torch.from_numpy(np.linalg.eigvalsh(symmetric.numpy()))


def leading_eigenvectors(symmetric: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(all eigenvalues [n], ascending; eigenvectors of the k largest [n, k], the largest first)."""
    if symmetric.device.type != "cpu":
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors[:, -k:].flip(1)
    matrix = symmetric.numpy()
    try:
        found = by_inverse_iteration(matrix, k)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        found = values, vectors[:, -k:]
    return torch.from_numpy(found[0]), torch.from_numpy(found[1]).flip(1)


def by_inverse_iteration(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(all eigenvalues, ascending; eigenvectors of the k largest [n, k], ascending).

    Raises LinAlgError where k is too large to pay off, and where the tridiagonal form splits, as for a low-rank
    matrix: eigenvalues are then equal and their vectors arbitrary.
    """
    n = len(matrix)
    if k > FEW * n:
        raise np.linalg.LinAlgError("too many vectors")
    reflectors = np.array(matrix, order="F")
    diagonal, beside, scales = np.empty(n), np.empty(n - 1), np.empty(n - 1)
    space = np.empty(64 * n)  # LAPACK's blocks have 32 columns
    _call_lapack("dsytrd", b"L", n, reflectors, n, diagonal, beside, scales, space, len(space))
    if not np.abs(beside).min() > np.finfo(float).eps * np.abs(diagonal).max():
        raise np.linalg.LinAlgError("the tridiagonal form splits")

    values = diagonal.copy()
    _call_lapack("dsterf", n, values, beside.copy())

    leading, vectors = values[-k:].copy(), np.empty((n, k), order="F")
    block, ends = np.ones(n, np.int32), np.full(n, n, np.int32)  # one block
    spaces = np.empty(5 * n), np.empty(n, np.int32), np.empty(k, np.int32)
    _call_lapack("dstein", n, diagonal, beside, k, leading, block, ends, vectors, n, *spaces)
    sides = b"L", b"L", b"N"
    _call_lapack("dormtr", *sides, n, k, reflectors, n, scales, vectors, n, space, len(space))
    error = np.abs(vectors.T @ vectors - np.eye(k)).max()
    if not error < ORTHONORMAL:
        raise np.linalg.LinAlgError(f"vectors are not orthonormal: {error:g}")
    return values, vectors


def _call_lapack(name: str, *arguments: bytes | int | np.ndarray) -> None:
    """Calls one of SciPy's LAPACK routines without the GIL. Raises LinAlgError where `info` is set."""
    info = ctypes.c_int(-1)
    given = [
        value.ctypes.data_as(ctypes.c_void_p)
        if isinstance(value, np.ndarray)
        else ctypes.byref(ctypes.c_char(value) if isinstance(value, bytes) else ctypes.c_int(value))
        for value in arguments
    ]
    types = [ctypes.c_void_p] * (len(given) + 1)
    ctypes.CFUNCTYPE(None, *types)(_lapack_address(name))(*given, ctypes.byref(info))
    if info.value:
        raise np.linalg.LinAlgError(f"{name}: info = {info.value}")


@cache
def _lapack_address(name: str) -> int:
    """Address of a routine of scipy.linalg.cython_lapack, whose capsules are named by their C signatures."""
    capsule = cython_lapack.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = (
        ctypes.c_char_p,
        [ctypes.py_object],
    )
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
