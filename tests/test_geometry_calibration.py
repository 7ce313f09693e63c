"""p is honest: scripts/study_calibration.py on fewer and smaller pairs."""

import importlib.util
from pathlib import Path

import pytest

from vlopd.config.analysis import GaussianNull

spec = importlib.util.spec_from_file_location(
    "study_calibration", Path(__file__).parents[1] / "scripts" / "study_calibration.py"
)
assert spec is not None and spec.loader is not None
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

PAIRS, DRAWS = 16, 5
QUICK = ("gaussian", "permuted", "low_rank:8")


def outcomes(null, stored, shape, planted=False):
    return [
        one
        for pair in range(PAIRS)
        for one in study.outcomes(null, stored, pair, planted, (DRAWS,), shape)
    ]


def share(own, level: float) -> float:
    return sum(one.p < level for one in own) / len(own)


@pytest.mark.parametrize(
    "null",
    [
        pytest.param(null, id=null.name, marks=() if null.name in QUICK else pytest.mark.slow)
        for null in study.NULLS
    ],
)
def test_a_draw_of_a_null_is_no_finding(null):
    """Where the trained matrix is itself a draw of the null, about 5 % of rows have p < 0.05, and 1 % p < 0.01."""
    found = [one for stored in study.PRECISIONS for one in outcomes(null, stored, (24, 32))]
    assert len(found) > 500
    assert 0.02 < share(found, 0.05) < 0.09
    assert share(found, 0.01) < 0.03


@pytest.mark.parametrize("stored", study.PRECISIONS, ids=str)
def test_planted_directions_are_a_finding_of_spectra_alone(stored):
    """Two directions with a fifth of the energy put spectral rows far outside, and coordinate rows nowhere."""
    found = outcomes(GaussianNull(), stored, (48, 64), True)
    spectral = [one for one in found if one.family == "spectrum"]
    coordinates = [one for one in found if one.family in ("sparsity", "sizes", "masks")]
    assert len(spectral) > 100 and len(coordinates) > 400
    assert share(spectral, 0.05) > 0.8
    assert share(coordinates, 0.05) < 0.1
