"""Geometry's own numerics: eigenproblems with few vectors, orthonormal bases, and orders of sizes."""

import math
from operator import le, lt

import numpy as np
import pytest
import torch

from vlopd.update_geometry.coordinates import count_coordinates, thresholds
from vlopd.update_geometry.linalg import by_inverse_iteration, leading_eigenvectors, product
from vlopd.update_geometry.magnitudes import (
    SAMPLE,
    SPARSE,
    OrderStatistic,
    bracket,
    compare,
    count,
    kth_smallest,
    magnitudes,
    nonzero_entries,
    top_energy,
)
from vlopd.update_geometry.spectrum import orthonormal

N, K = 96, 20
SPECTRA = {
    "noise": torch.rand(N, dtype=torch.float64) + 0.1,
    "six decades": torch.logspace(-6, 0, N, dtype=torch.float64),
    "below rounding": torch.logspace(-40, 0, N, dtype=torch.float64),
    "low rank": torch.cat([torch.zeros(N - 5), torch.arange(1.0, 6)]).double(),
    "pairs": torch.arange(1.0, N // 2 + 1).double().repeat_interleave(2),
    "all equal": torch.ones(N, dtype=torch.float64),
    "nothing": torch.zeros(N, dtype=torch.float64),
}


def symmetric(spectrum: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    matrix = (basis * spectrum) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_leading_eigenvectors_are_exact_whatever_the_spectrum(spectrum):
    """Values are eigvalsh's and vectors orthonormal eigenvectors, both to rounding, also where values are equal."""
    matrix = symmetric(spectrum)
    values, vectors = leading_eigenvectors(matrix, K)
    scale = float(spectrum.max()) or 1.0
    expected = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(values, expected, rtol=0, atol=1e-13 * scale)
    assert torch.allclose(vectors.T @ vectors, torch.eye(K).double(), rtol=0, atol=1e-12)
    error = matrix @ vectors - vectors * values.flip(0)[:K]
    assert float(error.abs().max()) < 1e-13 * scale


def test_inverse_iteration_does_the_work_where_it_can():
    """An ordinary matrix takes the short way, and one that falls apart or wants many vectors does not."""
    values, vectors = by_inverse_iteration(symmetric(SPECTRA["noise"]).numpy(), K)
    assert values.shape == (N,) and vectors.shape == (N, K)
    for name, k in (("low rank", K), ("all equal", K), ("nothing", K), ("noise", N // 2)):
        with pytest.raises(np.linalg.LinAlgError):
            by_inverse_iteration(symmetric(SPECTRA[name]).numpy(), k)


def test_a_matrix_that_is_not_finite_is_no_result():
    """A NaN is an error that the rows then name, not a silent number."""
    matrix = symmetric(SPECTRA["noise"])
    matrix[5, 3] = matrix[3, 5] = torch.nan
    try:
        values, _ = leading_eigenvectors(matrix, K)
    except np.linalg.LinAlgError:
        return
    assert values.isnan().any()


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e12])
def test_bases_are_nested_and_point_the_same_way(spread):
    """The Q of A = Q R with positive diagonal, for columns nearly orthogonal, uneven, and nearly dependent."""
    torch.manual_seed(2)
    columns = torch.randn(60, 8, dtype=torch.float64)
    columns[:, 1:] = columns[:, 1:] / spread + columns[:, :1] * (spread > 1)
    q = orthonormal(columns.clone())
    assert torch.allclose(q.T @ q, torch.eye(8).double(), rtol=0, atol=1e-12)
    r = q.T @ columns
    assert (r.diagonal() > 0).all()
    assert float(r.tril(-1).abs().max()) < 1e-12 * float(columns.norm())


def test_products_are_torchs():
    """Also those of a matrix with its own transpose, of which half is worked out."""
    torch.manual_seed(3)
    a, b = torch.randn(30, 7).double(), torch.randn(7, 5).double()
    assert torch.allclose(product(a, b), a @ b, rtol=1e-13)
    assert torch.equal(product(a.T, a), product(a.T, a).T)
    assert torch.allclose(product(a.T, a), a.T @ a, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sizes_are_counted_as_by_hand(dtype):
    """Cuts, counts and top energies among many ties, of signs and zeros, agree with a sorted list."""
    torch.manual_seed(4)
    values = (torch.randn(5000) * 8).round().div(8).to(dtype)
    by_hand = sorted(abs(v) for v in values.tolist())
    sizes = magnitudes(values)
    for threshold in (0.0, 0.125, 1.0, 100.0):
        assert count(compare(lt, sizes, threshold)) == sum(v < threshold for v in by_hand)
        assert count(compare(le, sizes, threshold)) == sum(v <= threshold for v in by_hand)
    for k in (1, 2, 700, 4999, 5000):
        value = by_hand[k - 1]
        found = kth_smallest(sizes, k)
        assert found == OrderStatistic(value, sum(v < value for v in by_hand), by_hand.count(value))
        expected = math.fsum(v**2 for v in by_hand[-k:])
        assert top_energy(sizes, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_where_moved(share):
    """What moved is picked with its partners; what is left out did not move."""
    torch.manual_seed(6)
    delta = torch.randn(1000) * (torch.rand(1000) < share)
    partner = torch.arange(1000)
    some, theirs = nonzero_entries(delta, partner)
    assert torch.equal(delta[theirs], some)
    assert int((some != 0).sum()) == int((delta != 0).sum())
    assert len(some) == (1000 if share > 0.5 else int((delta != 0).sum()))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_look_at_many(share):
    """What one look tells of several stretches is what whole tensors say, where few moved and where most did."""
    torch.manual_seed(7)
    n = 300_000
    w = torch.randn(n).bfloat16()
    d = 1e-2 * torch.randn(n) * (torch.rand(n) < share)
    code = torch.randint(0, 16, (n,), dtype=torch.uint8)
    limits = thresholds(1.0, d.dtype)
    seen = count_coordinates(w, d, code, limits)
    for key, (test, limit) in limits.items():
        assert seen.within[key] == int(test(d.abs(), limit).sum())
    for tau, number in seen.within_share.items():
        assert number == int((d.abs() <= tau * w.float().abs()).sum())
    assert seen.same_in_bf16 == int((w == (w.float() + d).bfloat16()).sum())
    assert seen.total == pytest.approx(float(d.double().abs().sum()), rel=1e-12)
    assert seen.largest == float(d.abs().max())
    picked, moved = seen.sizes != 0, d != 0
    assert torch.equal(seen.sizes[picked], d.abs()[moved])
    assert torch.equal(seen.codes[picked], code[moved])


@pytest.mark.parametrize("kind", ["smooth", "ties", "unlike its sample", "infinite"])
def test_cut_of_many(kind):
    """The k-th smallest of many entries is that of a sort, also where every sampled entry misleads."""
    torch.manual_seed(5)
    sizes = torch.randn(300_000).abs()
    if kind == "ties":
        sizes = sizes.bfloat16().float()
    elif kind == "infinite":
        sizes[::3] = torch.inf
    elif kind == "unlike its sample":
        first, last = bracket(sizes.numpy(), 150_000)
        assert first < float(sizes.median()) < last
        sizes[:: max(SPARSE, len(sizes) // SAMPLE) | 1] += 100
        assert bracket(sizes.numpy(), 150_000)[0] > 100
    before, by_hand = sizes.clone(), sizes.sort().values
    for k in (1, 2, 3_000, 150_000, 240_000, 299_999, 300_000):
        value = by_hand[k - 1]
        expected = OrderStatistic(
            float(value), int((by_hand < value).sum()), int((by_hand == value).sum())
        )
        assert kth_smallest(sizes, k) == expected
    assert torch.equal(sizes, before)
