"""The predicted visible fraction of an update (PULSE), against draws whose answer is known."""

import math

import numpy as np
import pytest
import torch

from vlopd.update_geometry.base_masks import BaseMasks
from vlopd.update_geometry.closed_forms import rounded_energy, unrounded_size, visible_in_bf16
from vlopd.update_geometry.coordinates import coordinate_terms
from vlopd.update_geometry.magnitudes import binade_counts

N = 60_000


def term(base, delta):
    (found,) = (
        each
        for each in coordinate_terms(base, delta, BaseMasks(base, None, (0.1,)), (0.1,))
        if each.metric == "visible_fraction"
    )
    return found


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-1])
def test_a_gaussian_update_is_predicted(stored, size):
    """Of Gaussian updates from far below to far above an ulp, the predicted and the observed share agree within four
    standard errors and half a percent, though in bf16 only the rounded update is known."""
    draws = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(N, generator=draws)).to(stored)
    trained = (base.float() + size * torch.randn(N, generator=draws)).to(stored)
    found = term(base, trained.float() - base.float())
    mean, variance = found.chance
    observed = int((base.bfloat16() != trained.bfloat16()).sum())
    assert found.numerator == observed and found.denominator == N
    assert abs(observed - mean) <= 4 * math.sqrt(variance) + 0.005 * observed
    assert (observed > 0.99 * N) == (size == 1e-1) and observed > 0


def test_known_probabilities():
    """A weight of 1 has an ulp of 1/128: on the grid an update of standard deviation ulp/2 shows with probability
    P(|z| > 1) = 31.7 %; off it, a small update with E|u| / ulp; zeros always show; an update of nothing never."""
    ones, ulp = binade_counts(torch.ones(1000)), 1 / 128
    assert np.flatnonzero(ones).tolist() == [127] and ones.sum() == 1000
    rounded = math.sqrt(float(rounded_energy(ulp / 2, np.array([ulp]))[0]))
    mean, variance = visible_in_bf16(ones, rounded, True)
    p = math.erfc(1 / math.sqrt(2))
    assert mean == pytest.approx(1000 * p) and variance == pytest.approx(1000 * p * (1 - p))
    size = ulp / 50
    assert visible_in_bf16(ones, size, False)[0] == pytest.approx(
        1000 * math.sqrt(2 / math.pi) / 50
    )
    assert visible_in_bf16(binade_counts(torch.zeros(7)), 1e-6, True)[0] == pytest.approx(7)
    assert visible_in_bf16(ones, 0.0, True) == (0.0, 0.0)


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0, 7.9, 8.1, 300.0])
def test_the_unrounded_size_is_found_again(size):
    """The energy of a rounded Gaussian is that of draws, and its size is found from it."""
    ulps, numbers = np.array([1.0, 0.25]), np.array([3.0, 1.0])
    energy = rounded_energy(size, ulps)
    draws = np.random.default_rng(0).normal(size=200_000) * size
    for ulp, one in zip(ulps, energy, strict=True):
        assert np.mean(np.square(ulp * np.round(draws / ulp))) == pytest.approx(
            one, rel=0.05, abs=1e-9
        )
    rms = math.sqrt(numbers @ energy / numbers.sum())
    assert unrounded_size(numbers, ulps, rms) == pytest.approx(size, rel=1e-6)
