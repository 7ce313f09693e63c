"""Geometry: closed forms, agreement with a plain float64 SVD, and nulls that are fair."""

import csv
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlopd.bits import rounded_to_bf16
from vlopd.config.analysis import (
    AdamNull,
    Bf16WalkNull,
    GaussianNull,
    GeometryConfig,
    LowRankNull,
    PermutedNull,
    RowColumnNull,
    SignFlippedNull,
    StochasticBf16WalkNull,
    UlpNull,
    WalkNull,
)
from vlopd.errors import RunError
from vlopd.files import read_json
from vlopd.models.parameter_names import classify
from vlopd.run.folder import up_to_date
from vlopd.update_geometry.aggregate import PARTS, tensor_rows
from vlopd.update_geometry.base_masks import BaseMasks
from vlopd.update_geometry.checkpoint import measure_checkpoint
from vlopd.update_geometry.coordinates import coordinate_terms
from vlopd.update_geometry.magnitudes import norm
from vlopd.update_geometry.matrix import keys_of, measure_matrix
from vlopd.update_geometry.nulls import (
    null_delta,
    null_direction,
    null_name,
)
from vlopd.update_geometry.projection import base_factors, matrix_measures, skipped_measures
from vlopd.update_geometry.schema import (
    DETAIL,
    Measure,
    Place,
    Row,
    detectable_excess,
    rows_against_nulls,
    why_no_p,
)
from vlopd.update_geometry.spectrum import MatrixSum, as_matrix, rank_at, singular_values
from vlopd.weights.delta import TensorDelta

RATIOS = (0.01, 0.1, 0.25)
CONFIG = GeometryConfig(ratios=RATIOS)
NULLS = (
    GaussianNull(),
    AdamNull(steps=7),
    Bf16WalkNull(steps=7),
    StochasticBf16WalkNull(steps=7),
    RowColumnNull(),
    PermutedNull(),
    SignFlippedNull(),
    LowRankNull(rank=3),
    UlpNull(),
)
Values = dict[tuple[str, str], float | None]


def values(measures: list[Measure]) -> Values:
    found = {(m.metric, m.parameter): m.value for m in measures}
    assert len(found) == len(measures)
    return found


def measured(base: Tensor, delta: Tensor, config: GeometryConfig = CONFIG) -> list[Measure]:
    """Every measure of one matrix's update."""
    factors = base_factors(base, config)
    masks = BaseMasks(base, factors, config.ratios)
    terms = coordinate_terms(base, delta, masks, config.ratios)
    spectral = matrix_measures(base, factors, delta, config)
    return [term.measure() for term in terms] + spectral


def geometry(base: Tensor, delta: Tensor, config: GeometryConfig = CONFIG) -> Values:
    return values(measured(base, delta, config))


def orthogonal(n: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def with_spectrum(left: Tensor, singular: Tensor, right: Tensor) -> Tensor:
    return left @ singular.diag() @ right.T


def reference(base: Tensor, delta: Tensor) -> Values:
    """The definitions of arXiv 2606.13657 written out with float64 SVDs and sorts."""
    w, d = base.double(), delta.double()
    m, n = w.shape
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    u2, s2, vt2 = torch.linalg.svd(w + d, full_matrices=False)
    sd = torch.linalg.svdvals(d)
    energy, p = d.square().sum(), (sd / sd.sum())[sd > 0]
    found: dict[tuple[str, str], Tensor | float] = {
        ("relative_delta_fro", ""): d.norm() / w.norm(),
        ("delta_linf_norm", ""): d.abs().max(),
        ("delta_mean_abs", ""): d.abs().mean(),
        ("delta_rms", ""): d.square().mean().sqrt(),
        ("frac_delta_eq_0", "precision=bf16"): (w.bfloat16() == (w + d).bfloat16()).double().mean(),
        ("visible_fraction", "precision=bf16"): (w.bfloat16() != (w + d).bfloat16())
        .double()
        .mean(),
        ("frac_delta_eq_0", ""): (d == 0).double().mean(),
        ("spectral_norm", ""): sd[0],
        ("stable_rank", ""): energy / sd[0] ** 2,
        ("effective_rank_entropy", ""): (-(p * p.log()).sum()).exp(),
        ("spectral_drift_l2_ratio", ""): (s2 - s).norm() / s.norm(),
        ("spectral_drift_to_delta_fro_ratio", ""): (s2 - s).norm() / d.norm(),
    }
    for atol in ("1e-08", "1e-07", "1e-06", "1e-05", "0.0001"):
        found["frac_abs_delta_lt", f"atol={atol}"] = (d.abs() < float(atol)).double().mean()
        found["frac_isclose_zero", f"atol={atol}"] = (d.abs() <= float(atol)).double().mean()
    for tau in ("0.0001", "0.001", "0.01"):
        bound = float(tau) * w.square().mean().sqrt()
        found["frac_abs_delta_lt_src_rms", f"tau={tau}"] = (d.abs() < bound).double().mean()
        small = d.abs() <= float(tau) * w.abs()
        found["frac_abs_delta_le_src_abs", f"tau={tau}"] = small.double().mean()
    for tol in ("1e-06", "1e-05", "0.0001"):
        found["rank_tol", f"tol={tol}"] = (sd > float(tol) * sd[0]).sum()
    for k in (1, 2, 4, 8, 16, 32):
        found["top_energy_ratio", f"k={k}"] = sd[:k].square().sum() / energy
    for ratio in RATIOS:
        k, count = max(1, int(ratio * min(m, n))), math.ceil(round(ratio * m * n, 6))
        uk, vk, turned, turned_right = u[:, :k], vt[:k].T, u2[:, :k], vt2[:k].T
        key = f"ratio={ratio:g}"
        largest = d.abs().flatten().sort(descending=True).values[:count]
        found["coord_top_energy_ratio", key] = largest.square().sum() / energy
        found["top_energy_ratio", key] = sd[:k].square().sum() / energy
        found["principal_projection_energy_ratio", key] = (uk.T @ d @ vk).square().sum() / energy
        found["left_principal_projection_energy_ratio", key] = (uk.T @ d).square().sum() / energy
        found["right_principal_projection_energy_ratio", key] = (d @ vk).square().sum() / energy
        for metric, base, after in (
            ("top_subspace_rotation", uk, turned),
            ("right_subspace_rotation", vk, turned_right),
        ):
            sines = torch.linalg.svdvals(after - base @ (base.T @ after))
            found[metric, key] = sines.mean()
        scores = {
            "principal": -(uk @ s[:k].diag() @ vt[:k]).abs().float(),
            "low_magnitude": w.abs().float(),
        }
        member = {}
        for mask, score in scores.items():
            member[mask] = torch.zeros(m * n, dtype=torch.bool)
            member[mask][score.flatten().sort(stable=True).indices[:count]] = True
        principal, low = member["principal"], member["low_magnitude"]
        member["principal_not_low"] = principal & ~low
        member["nonprincipal_or_low"] = ~principal | low
        cut = w.abs().flatten()[low].max()
        ties = int((w.abs() == cut).sum())
        left_out = ties - int((w.abs().flatten()[low] == cut).sum())
        found["low_magnitude_ties", key] = ties if left_out else 0
        for mask, inside in member.items():
            found[f"{mask}_density", key] = inside.double().mean()
            for atol in ("0", "1e-05"):
                moved = (d.abs() > float(atol)).flatten()
                found["update_density", f"atol={atol}"] = moved.double().mean()
                both = (moved & inside).sum()
                overlap, covered = both / moved.sum(), both / inside.sum()
                found[f"{mask}_update_overlap_ratio", f"{key},atol={atol}"] = overlap
                found[f"{mask}_covered_by_update_ratio", f"{key},atol={atol}"] = covered
                chance = inside.double().mean()
                found[f"{mask}_enrichment_vs_random", f"{key},atol={atol}"] = overlap / chance
    return {key: float(value) for key, value in found.items()}


# ------------------------------------------------------------------------------ against the formula


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (40, 40)])
def test_every_measure_agrees_with_a_plain_float64_svd(shape):
    """All measures, of bf16 weights and a bf16 update, agree with their definitions to 1e-5."""
    torch.manual_seed(1)
    base = (torch.randn(shape) * 0.02).bfloat16().float()
    low_rank = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    change = 2e-5 * low_rank + 1e-5 * torch.randn(shape)
    delta = (base + change).bfloat16().float() - base
    ours, theirs = geometry(base, delta), reference(base, delta)
    skipped = {key for key, value in ours.items() if value is None}
    assert skipped == {("top_energy_ratio", "k=64")} and ours.keys() - skipped == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-12), key


def test_a_direct_svd_gives_the_same():
    """factorisation = "svd" agrees with the Gram route, and sees singular values that the latter cannot."""
    torch.manual_seed(21)
    base, delta = torch.randn(40, 60), 1e-3 * torch.randn(40, 60)
    direct = GeometryConfig(ratios=RATIOS, factorisation="svd")
    ours, theirs = geometry(base, delta), geometry(base, delta, direct)
    for key, value in theirs.items():
        assert value is None or ours[key] == pytest.approx(value, rel=1e-7, abs=1e-12), key
    tiny = with_spectrum(
        orthogonal(40, 3), torch.tensor([1.0, 0.5, 1e-9]).double(), orthogonal(30, 3)
    )
    assert float(singular_values(MatrixSum((tiny,)), "svd")[2]) == pytest.approx(1e-9, rel=1e-5)
    assert float(singular_values(MatrixSum((tiny,)))[2]) == 0


def test_global_rows_are_the_model_as_one_vector(tmp_path):
    """[all] norm and counts equal those of all tensors laid end to end, vectors included."""
    torch.manual_seed(2)
    before = {f"layers.{i}.mlp.up_proj.weight": torch.randn(8 + i, 12) for i in range(3)}
    before["norm.weight"] = torch.ones(12)
    after = {
        n: t + 1e-3 * torch.randn(t.shape) * (torch.rand(t.shape) < 0.5) for n, t in before.items()
    }
    rows = run(before, after, tmp_path, GeometryConfig(nulls=(GaussianNull(),), null_draws=1))
    w = torch.cat([before[n].flatten() for n in sorted(before)]).double()
    d = torch.cat([(after[n] - before[n]).flatten() for n in sorted(before)]).double()
    everything = {(r["metric"], r["parameter"]): r for r in rows if r["name"] == "[all]"}
    assert float(everything["relative_delta_fro", ""]["value"]) == pytest.approx(
        float(d.norm() / w.norm()), rel=1e-6
    )
    assert float(everything["frac_delta_eq_0", ""]["value"]) == float((d == 0).double().mean())
    assert float(everything["delta_linf_norm", ""]["value"]) == float(d.abs().max())


# ------------------------------------------------------------------------------------ closed forms


def test_rank_one_update():
    """A rank-1 update has stable, effective and numerical rank 1, its energy in one direction."""
    torch.manual_seed(3)
    base = torch.randn(30, 50, dtype=torch.float64)
    found = geometry(base, torch.outer(torch.randn(30).double(), torch.randn(50).double()))
    assert found["stable_rank", ""] == pytest.approx(1, abs=1e-12)
    assert found["effective_rank_entropy", ""] == pytest.approx(1, abs=1e-6)
    assert found["rank_tol", "tol=1e-06"] == 1
    assert found["top_energy_ratio", "k=1"] == pytest.approx(1, abs=1e-12)


def test_rank_two_update_in_fp32_has_rank_two():
    """Rank is not inflated by fp32 storage, nor by our arithmetic."""
    torch.manual_seed(4)
    exact = torch.randint(-8, 9, (64, 2)).float() @ torch.randint(-8, 9, (2, 96)).float()
    found = geometry(torch.randn(64, 96), exact)
    assert [found["rank_tol", f"tol={tol}"] for tol in ("1e-06", "1e-05", "0.0001")] == [2, 2, 2]


def test_stable_rank_of_tiny_updates_is_not_biased():
    """Scaling an update by 1e-12 changes no ratio: no epsilon hides in a denominator."""
    torch.manual_seed(5)
    base, delta = torch.randn(20, 30).double(), torch.randn(20, 30).double()
    large, small = geometry(base, delta), geometry(base, 1e-12 * delta)
    for key in (("stable_rank", ""), ("principal_projection_energy_ratio", "ratio=0.1")):
        assert small[key] == pytest.approx(large[key], rel=1e-9)


def test_projection_is_one_inside_and_zero_outside():
    """An update inside the top-k subspaces projects wholly, one orthogonal to them not at all."""
    torch.manual_seed(6)
    left, right = orthogonal(40, 40), orthogonal(60, 40)
    base = with_spectrum(left, torch.linspace(5, 1, 40).double(), right)
    k = rank_at(0.25, 40, 60)
    inside = left[:, :k] @ torch.randn(k, k, dtype=torch.float64) @ right[:, :k].T
    outside = left[:, k:] @ torch.randn(40 - k, 40 - k, dtype=torch.float64) @ right[:, k:].T
    for delta, expected in ((inside, 1.0), (outside, 0.0)):
        found = geometry(base, delta)
        for side in ("", "left_", "right_"):
            value = found[f"{side}principal_projection_energy_ratio", "ratio=0.25"]
            assert value == pytest.approx(expected, abs=1e-12)


def test_rescaling_turns_nothing():
    """A pure rescaling drifts by all of its norm, and rotates nothing."""
    torch.manual_seed(7)
    base = torch.randn(40, 60, dtype=torch.float64)
    found = geometry(base, 0.01 * base)
    assert found["spectral_drift_to_delta_fro_ratio", ""] == pytest.approx(1, abs=1e-9)
    assert found["spectral_drift_l2_ratio", ""] == pytest.approx(0.01, abs=1e-9)
    for metric in ("top_subspace_rotation", "right_subspace_rotation"):
        assert all(found[metric, f"ratio={ratio}"] < 1e-10 for ratio in RATIOS)


@pytest.mark.parametrize("angle", [0.3, 1e-3, 1e-7])
def test_a_turn_is_measured_down_to_tiny_angles(angle):
    """Turning the first left singular vector shows as sin(angle) on the left, zero on the right."""
    torch.manual_seed(8)
    left, right = orthogonal(60, 60), orthogonal(40, 40)
    base = with_spectrum(left[:, :40], torch.linspace(5, 1, 40).double(), right)
    plane = left[:, [0, -1]]
    turn = torch.tensor(
        [[math.cos(angle) - 1, -math.sin(angle)], [math.sin(angle), math.cos(angle) - 1]]
    )
    turned = base + plane @ turn.double() @ plane.T @ base
    found = geometry(base, turned - base)
    assert found["top_subspace_rotation", "ratio=0.01"] == pytest.approx(math.sin(angle), rel=1e-5)
    assert found["right_subspace_rotation", "ratio=0.01"] < 1e-10
    assert found["spectral_drift_l2_ratio", ""] < 1e-7


def test_singular_values_span_six_decades():
    """The Gram route keeps the singular values that any tolerance here looks at."""
    torch.manual_seed(9)
    spectrum = torch.logspace(0, -5.9, 20, dtype=torch.float64)
    matrix = with_spectrum(orthogonal(40, 20), spectrum, orthogonal(20, 20))
    found = singular_values(MatrixSum((matrix,)))
    assert torch.allclose(found, spectrum, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------------- nulls


@pytest.mark.parametrize("null", NULLS, ids=null_name)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("relative", [3e-4, 1e-3, 1e-1])
def test_null_has_the_norm_of_the_update_after_rounding(null, stored, relative):
    """In the stored precision, where rounding swallows most of it, norms agree to 0.2 % unless few move."""
    torch.manual_seed(10)
    base = (torch.randn(64, 96) * 0.02).to(stored)
    wide = base.float()
    delta = (wide + relative * 0.02 * torch.randn(64, 96)).to(stored).float() - wide
    found = null_delta(null, base, delta, stored, 0, 1, "w")
    moved = int(found.count_nonzero())  # with few of them, norms come in steps
    assert norm(found) / norm(delta) == pytest.approx(1, abs=2e-3 if moved > 50 else 0.4)
    assert torch.equal((wide + found).to(stored).float(), wide + found)


def test_null_matched_before_rounding_would_not_be_matched():
    """Noise of the unrounded norm loses a part of it to bf16: why the search is after rounding."""
    torch.manual_seed(10)
    base = (torch.randn(64, 96) * 0.02).bfloat16().float()
    noise = 3e-4 * 0.02 * torch.randn(64, 96)
    rounded = (base + noise).bfloat16().float() - base
    assert abs(norm(rounded) / norm(noise) - 1) > 0.05


def test_nulls_keep_what_they_say():
    """Each null keeps its property of the update, and loses the rest."""
    torch.manual_seed(13)
    base = torch.randn(40, 60)
    delta = torch.randn(40, 60) * torch.rand(40, 1) ** 3 * torch.rand(60) ** 3
    drawn = {
        null_name(null): null_direction(null, base, delta, torch.Generator().manual_seed(0))
        for null in NULLS
        if not isinstance(null, WalkNull)
    }
    binade = base.abs().log2().floor()
    assert len(binade.unique()) > 8
    for each in binade.unique():
        inside = binade == each
        assert torch.equal(drawn["permuted"][inside].sort().values, delta[inside].sort().values)
    assert float((drawn["permuted"] == delta).double().mean()) < 0.01
    assert torch.equal(drawn["sign_flipped"].abs(), delta.abs())
    assert 0.4 < float((drawn["sign_flipped"] == delta).float().mean()) < 0.6
    assert int(torch.linalg.matrix_rank(drawn["low_rank:3"], rtol=1e-5)) == 3
    relative = drawn["ulp"] / base.abs()
    sizes = torch.stack([relative.abs().flatten(), base.abs().flatten()])
    assert abs(float(torch.corrcoef(sizes)[0, 1])) < 0.1
    assert float(relative.std()) == pytest.approx(1, abs=0.05)
    assert float(drawn["gaussian"].std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("stored", "error"), [(torch.float32, 0.005), (torch.bfloat16, 0.03)])
def test_row_column_null_has_the_energies_of_rows_and_columns(stored, error):
    """After rounding, every row and column that moves enough has the observed energy; an unmoved one stays unmoved."""
    torch.manual_seed(13)
    base = torch.randn(64, 96).to(stored)
    wide = base.float()
    scales = torch.exp(torch.randn(64, 1)) * torch.exp(0.5 * torch.randn(96))
    scales[3] = 0
    delta = (wide + 1e-3 * scales * torch.randn(64, 96)).to(stored).float() - wide
    assert stored == torch.float32 or float((delta == 0).double().mean()) > 0.5
    found = null_delta(RowColumnNull(), base, delta, stored, 0, 0, "w")
    assert not torch.equal(found, delta) and not found[3].any()
    for axis in (0, 1):
        theirs, ours = (each.norm(dim=axis) for each in (delta, found))
        enough = (delta != 0).sum(axis) > 10
        assert int(enough.sum()) > 30
        assert float((ours / theirs - 1)[enough].abs().median()) < error


def test_a_draw_of_a_null_is_kept_by_the_next():
    """In bf16 the entries of a permuted or sign-flipped draw keep their sizes: they are not rounded a second time."""
    torch.manual_seed(13)
    base = (0.02 * torch.randn(64, 96)).bfloat16()
    wide = base.float()
    delta = (wide + 2e-5 * torch.randn(64, 96)).bfloat16().float() - wide
    for null in (PermutedNull(), SignFlippedNull()):
        first = null_delta(null, base, delta, torch.bfloat16, 0, 0, "w")
        second = null_delta(null, base, first, torch.bfloat16, 0, 1, "w")
        counts = [int(each.count_nonzero()) for each in (first, second)]
        assert counts[1] == pytest.approx(counts[0], rel=0.01) and counts[0] > 500
        assert norm(second) == pytest.approx(norm(first), rel=2e-3)
        assert not torch.equal(first, second)


def test_ulp_null_moves_single_steps():
    """A small |w|-proportional update in bf16 is one step of the last place, on coordinates of all sizes."""
    torch.manual_seed(14)
    base = torch.randn(64, 96).bfloat16()
    wide = base.float()
    delta = (wide * (1 + 1e-3 * torch.randn(64, 96))).bfloat16().float() - wide
    found = null_delta(UlpNull(), base, delta, torch.bfloat16, 0, 0, "w")
    steps = (base.view(torch.int16) - (wide + found).bfloat16().view(torch.int16)).abs()
    assert set(steps.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("null", NULLS, ids=null_name)
def test_null_of_nothing_is_nothing(null):
    """A tensor that did not move has a null that does not move."""
    assert not null_delta(null, torch.ones(4), torch.zeros(4), torch.bfloat16, 0, 0, "w").any()


def test_null_of_one_coarse_step_is_a_coarse_step():
    """One coordinate of a norm weight moved by one bf16 step: the null moves one coordinate too."""
    base = torch.ones(64)
    delta = torch.zeros(64)
    delta[5] = 2.0**-7
    null = null_delta(GaussianNull(), base, delta, torch.bfloat16, 0, 0, "norm")
    assert 0 < float(null.norm()) <= 2 * 2.0**-7


def test_null_streams_are_named():
    """The same seed, draw and tensor give the same noise; any other name gives another."""
    base, delta = torch.zeros(8, 8), torch.ones(8, 8)

    def drawn(*names):
        return null_delta(GaussianNull(), base, delta, torch.float32, *names)

    assert torch.equal(drawn(0, 0, "a"), drawn(0, 0, "a"))
    for other in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert not torch.equal(drawn(0, 0, "a"), drawn(*other))


def test_closed_forms_agree_with_the_simulation():
    """Mean and deviation of projections of i.i.d. noise, and of masks under random coordinates, in closed form."""
    torch.manual_seed(11)
    base, draws = torch.randn(24, 36), 250
    config = GeometryConfig(ratios=(0.25,))
    ones = torch.full((24, 36), 1e-3)
    found: dict[tuple[str, str], list[Measure]] = {}
    for draw in range(draws):
        noise = null_delta(GaussianNull(), base, ones, torch.float32, 0, draw, "w")
        kept = noise.flatten() * 0
        kept[torch.randperm(24 * 36)[:200]] = 1e-3
        for change, kind in ((noise, "projection"), (kept.view(24, 36), "mask")):
            for measure in measured(base, change, config):
                if (
                    measure.chance is not None
                    and measure.metric != "visible_fraction"
                    and ("projection" in measure.metric) == (kind == "projection")
                ):
                    found.setdefault((measure.metric, measure.parameter), []).append(measure)
    assert len(found) == 3 + 4 * 2 * 3
    for key, same in found.items():
        mean, sd = same[0].chance
        drawn = torch.tensor([m.value for m in same]).double()
        error = 4 * sd / math.sqrt(draws)
        assert float(drawn.mean()) == pytest.approx(mean, abs=max(error, 1e-9)), key
        assert float(drawn.std()) == pytest.approx(sd, rel=0.22, abs=1e-9), key
    k = rank_at(0.25, 24, 36)
    key = ("principal_projection_energy_ratio", "ratio=0.25")
    assert found[key][0].chance[0] == pytest.approx(k * k / (24 * 36))


def test_a_row_is_standardised_as_one_more_draw():
    """excess_t is Student's: (value - mean) / (sd sqrt(1 + 1/S)); p agrees with scipy's t distribution."""
    (row,) = rows_against_nulls(
        Measure("m", "", 5.0), {"gaussian": [0.0, 1.0, 2.0, 3.0, 4.0]}, Place("w")
    )
    sd, t = math.sqrt(2.5), 3 / math.sqrt(2.5 * 6 / 5)
    assert (row.null, row.null_mean, row.excess) == ("gaussian", 2.0, 3.0)
    assert (row.null_sd, row.excess_t) == (pytest.approx(sd), pytest.approx(t))
    assert row.p == pytest.approx(2 * stats.t.sf(t, 4))
    (alone,) = rows_against_nulls(Measure("m", "", 5.0), {}, Place("w"))
    assert (alone.null, alone.null_mean, alone.excess, alone.p) == ("", None, None, None)


def test_rows_that_cannot_be_standardised_are_not():
    """Four draws, draws that are all equal, and what a null has by construction give an excess without a p."""
    for observed, draws in (
        (Measure("m", "", 5.0), [1.0]),
        (Measure("m", "", 5.0), [1.0, 2.0, 3.0, 4.0]),
        (Measure("m", "", 5.0), [2.0] * 5),
        (Measure("m", "", 5.0, decided_by="norm"), [1.0, 2.0, 3.0, 4.0, 5.0]),
    ):
        (row,) = rows_against_nulls(observed, {"gaussian": draws}, Place("w"))
        assert row.excess is not None and row.excess_t is None and row.p is None
    (same,) = rows_against_nulls(Measure("m", "", 2.0), {"gaussian": [2.0] * 5}, Place("w"))
    assert (same.excess_t, same.p) == (0.0, 1.0)


@pytest.mark.parametrize("draws", [5, 8])
def test_the_detectable_excess_is_detected_in_four_of_five(draws):
    """Of 20,000 simulated values shifted by it, 80 % have p < 0.05; with fewer than five draws there is no p, and the
    reason says so."""
    shift = detectable_excess(draws)
    noise = torch.randn(20_000, draws + 1, generator=torch.Generator().manual_seed(draws)).double()
    value, null = noise[:, 0] + shift, noise[:, 1:]
    t = (value - null.mean(1)) / (null.std(1) * math.sqrt(1 + 1 / draws))
    p = 2 * stats.t.sf(t.abs().numpy(), draws - 1)
    assert float((p < 0.05).mean()) == pytest.approx(0.8, abs=0.01)
    assert why_no_p(draws) == "" and detectable_excess(4) is None
    assert why_no_p(3) == "3 draws: no p; geometry.null_draws = 5 or more"


def test_the_adam_null_is_adamw_on_noise():
    """Its entries have the distribution of torch's AdamW from gradients of noise, of any size per coordinate: bounded,
    and less heavy-tailed than a Gaussian."""
    null, steps = AdamNull(steps=3, schedule="linear"), 3
    drawn = null_direction(
        null, torch.zeros(200, 200), torch.ones(200, 200), torch.Generator().manual_seed(1), 0, 0
    ).flatten()
    torch.manual_seed(2)
    value = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = torch.optim.AdamW([value], lr=1.0, weight_decay=0.0)
    sizes = torch.rand(40_000) + 0.1
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 - step / steps
        value.grad = sizes * torch.randn(40_000)
        optimizer.step()
    assert stats.ks_2samp(drawn.numpy(), value.detach().numpy()).pvalue > 0.01
    assert stats.kurtosis(drawn.numpy()) < -0.5 and float(drawn.abs().max()) < 2.01
    again = null_direction(
        null, torch.zeros(200, 200), torch.ones(200, 200), torch.Generator().manual_seed(1), 0, 1
    )
    assert not torch.equal(again.flatten(), drawn), "each draw has a simulation of its own"


def test_gaussian_rejects_an_optimizer_and_adam_does_not():
    """AdamW on gradients of noise for few steps is outside the Gaussian null in its coordinates' sizes, and inside that
    of the same optimizer."""
    torch.manual_seed(3)
    base = 0.02 * torch.randn(120, 200)
    value = torch.nn.Parameter(base.clone())
    optimizer = torch.optim.AdamW([value], lr=3e-4, weight_decay=0.0)
    for _ in range(4):
        value.grad = torch.randn(120, 200)
        optimizer.step()
    pair = TensorDelta(classify("layers.0.mlp.up_proj.weight"), base, value.detach())
    config = GeometryConfig(nulls=(GaussianNull(), AdamNull(steps=4)), ratios=(0.1,))
    rows = tensor_rows(measure_matrix(pair, config), keys_of(config))
    p = {row.null: row.p for row in rows if row.metric == "coord_top_energy_ratio"}
    assert p["gaussian"] < 0.001 and p["adam"] > 0.05


@pytest.mark.parametrize("null", [Bf16WalkNull(steps=30), StochasticBf16WalkNull(steps=30)])
def test_walks_in_bf16_are_rounded_at_every_step(null):
    """To the nearest, large weights stay where steps are below half an ulp; stochastically, few of them move by whole
    ones and have most of the energy. Stored in fp32, a base of bf16 values stays on that grid."""
    torch.manual_seed(4)
    base = torch.where(torch.rand(96, 96) < 0.5, 1.0, 2.0**-6) * (1 + torch.rand(96, 96))
    base = base.bfloat16().float()
    delta = 1e-3 * torch.randn(96, 96)
    found = null_delta(null, base, delta, torch.float32, 0, 0, "w")
    assert torch.equal((base + found).bfloat16().float(), base + found)
    assert norm(found) == pytest.approx(norm(delta), rel=2e-3)
    large = base > 0.5
    if isinstance(null, StochasticBf16WalkNull):
        assert norm(found[large]) > 0.9 * norm(delta)
        assert 0 < float((found[large] != 0).double().mean()) < 0.2
    else:
        assert not found[large].any()


def test_stochastic_rounding_keeps_the_mean():
    """A value a quarter of the way between two neighbours goes up in a quarter of the draws."""
    value = torch.full((40_000,), 1 + 0.25 * 2.0**-7)
    rounded = rounded_to_bf16(value, torch.Generator().manual_seed(0)).to(value)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2.0**-7}
    assert float((rounded > 1).double().mean()) == pytest.approx(0.25, abs=0.01)
    grid = torch.randn(100).bfloat16().float()
    assert torch.equal(rounded_to_bf16(grid, torch.Generator().manual_seed(0)).to(grid), grid)


@pytest.mark.parametrize(
    ("null", "kept"),
    [
        ("gaussian", {"norm"}),
        ("low_rank:8", {"norm"}),
        ("permuted", {"norm", "sizes"}),
        ("sign_flipped", {"norm", "sizes", "places"}),
    ],
)
def test_what_a_null_keeps_has_no_p(null, kept):
    """A measure that a null equals by construction is no finding beside it, and any other one may be."""
    for detail in DETAIL:
        (row,) = rows_against_nulls(
            Measure("m", "", 5.0, decided_by=detail), {null: [0.0, 1.0, 2.0, 3.0, 4.0]}, Place("w")
        )
        assert row.excess == 3.0 and (row.p is None) == (detail in kept)


# ------------------------------------------------------------------------------- what has no value


def test_zero_update_gives_zero_rows():
    """Ratios of a zero update have no value and status zero; what is defined is still given."""
    base, delta = torch.randn(20, 30), torch.zeros(20, 30)
    found = geometry(base, delta)
    moved = geometry(base, delta + 1)
    assert found.keys() == moved.keys()
    assert found["frac_delta_eq_0", ""] == 1 and found["relative_delta_fro", ""] == 0
    assert found["spectral_norm", ""] == 0
    assert found["top_subspace_rotation", "ratio=0.1"] < 1e-14
    for metric in ("stable_rank", "effective_rank_entropy", "spectral_drift_to_delta_fro_ratio"):
        assert found[metric, ""] is None
    assert found["low_magnitude_update_overlap_ratio", "ratio=0.1,atol=0"] is None


def test_vectors_and_experts_are_skipped_aloud():
    """What is no matrix has the same rows as a matrix, each with its reason."""
    assert as_matrix(torch.zeros(3))[1] == "1-D, not a matrix"
    assert as_matrix(torch.zeros(2, 3, 4))[1] == "3-D, not a matrix"
    rows = skipped_measures(CONFIG, "because")
    matrix = torch.randn(20, 20).double()
    full = matrix_measures(matrix, base_factors(matrix, CONFIG), matrix, CONFIG)
    assert [(r.metric, r.parameter) for r in rows] == [(r.metric, r.parameter) for r in full]
    assert {(r.value, r.status, r.reason) for r in rows} == {(None, "skipped", "because")}


def test_patch_embeddings_are_matrices():
    """A convolution kernel [out, in, h, w] is seen as [out, in * h * w]."""
    matrix, _ = as_matrix(torch.randn(8, 3, 4, 4).bfloat16())
    assert matrix is not None and matrix.shape == (8, 48)


def test_base_without_a_principal_subspace():
    """Where the base has rank below k, its top-k subspace is not made up."""
    torch.manual_seed(12)
    base = torch.randn(40, 2).double() @ torch.randn(2, 60).double()
    found = geometry(base, torch.randn(40, 60).double())
    assert found["principal_projection_energy_ratio", "ratio=0.01"] is not None
    assert found["principal_projection_energy_ratio", "ratio=0.25"] is None
    assert found["top_subspace_rotation", "ratio=0.25"] is None


# ------------------------------------------------------------------------------------- the stage


def run(
    before: dict[str, Tensor], after: dict[str, Tensor], root: Path, config: GeometryConfig
) -> list[dict[str, str]]:
    for name, tensors in (("before", before), ("after", after)):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
    measure_checkpoint(root / "before", root / "after", root / "out", config, {}, progress=False)
    with (root / "out" / "geometry.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=["llm", "vlm"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(output folder, rows) of a tiny bf16 model changed by pure noise, vision tower untouched."""
    root = tmp_path_factory.mktemp(request.param)
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    if request.param == "llm":
        model = LlamaForCausalLM(text)
    else:
        both = LlavaConfig(text_config=text, vision_config=vision, image_token_index=1)
        model = LlavaForConditionalGeneration(both)
    model = model.to(torch.bfloat16)
    model.save_pretrained(root / "before")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" not in name:
                wide = parameter.float()
                parameter.copy_(wide + 1e-3 * wide.square().mean().sqrt() * torch.randn_like(wide))
    model.save_pretrained(root / "after")
    config = GeometryConfig(ratios=(0.1,), nulls=(GaussianNull(),))
    inputs = {"settings": config.model_dump(mode="json")}
    record = measure_checkpoint(
        root / "before", root / "after", root / "out", config, inputs, progress=False
    )
    assert up_to_date(record, inputs)
    with (root / "out" / "geometry.csv").open() as file:
        return root / "out", list(csv.DictReader(file))


def test_table_is_tidy_and_whole(stage):
    """Every tensor has every measure once; what has no value says why."""
    out, rows = stage
    assert list(rows[0]) == [field.name for field in fields(Row)]
    keys = [(row["name"], row["metric"], row["parameter"]) for row in rows]
    full = [(*key, row["null"]) for key, row in zip(keys, rows, strict=True)]
    assert len(set(full)) == len(full)
    tensors = read_json(out / "match.json")["matched"]
    own = {n: {k[1:] for k in keys if k[0] == n} for n in {k[0] for k in keys}}
    assert all(own[name] == own[tensors[0]] for name in tensors)
    for row in rows:
        assert (row["status"] == "ok") == (row["value"] != "")
        assert row["status"] == "ok" or row["reason"]
        assert row["value"] == "" or math.isfinite(float(row["value"]))
        assert row["value"] == "" or row["null"] in ("gaussian", "closed_form")


def test_noise_is_no_finding(stage):
    """For an update that is noise, observed headline values are those of the null."""
    summary = read_json(stage[0] / "summary.json")
    assert (summary["nulls"], summary["null_draws"]) == (["gaussian"], 5)
    assert summary["no_p"] == "" and 4 < summary["detectable_excess_sd"] < 4.2
    flagged = summary["flagged"]["gaussian"]
    assert flagged["expected_of_the_null"] == pytest.approx(0.052 * flagged["rows"])
    assert 0 < flagged["p_below_0.05"] < 0.2 * flagged["rows"]
    assert summary["null_norm_error"]["model"] < 0.1
    for item in summary["headline"]:
        spread = max(6 * item["null_sd"], 0.05 * abs(item["null_mean"]))
        assert item["value"] == pytest.approx(item["null_mean"], abs=spread), item
    names = {(item["name"], item["metric"]) for item in summary["headline"]}
    assert ("[median]", "stable_rank") in names and ("[part=ffn]", "energy_share") in names


def test_shares_add_up(stage):
    """Energy and parameter shares of components, of modules and of parts each add to one."""
    rows = stage[1]
    for kind in ("component", "module", "part"):
        for metric in ("energy_share", "parameter_share"):
            shares = [
                r for r in rows if r["metric"] == metric and r["name"].startswith(f"[{kind}=")
            ]
            assert sum(float(r["value"]) for r in shares) == pytest.approx(1)
    assert set(PARTS.values()) == {"ffn", "attention", "embedding", "head", "norm"}


def test_untouched_tensors_are_counted(stage):
    """Tensors that did not move are not dropped: medians say how many had no value."""
    out, rows = stage
    summary = read_json(out / "summary.json")
    median = next(r for r in rows if (r["name"], r["metric"]) == ("[median]", "stable_rank"))
    own = [r for r in rows if r["metric"] == "stable_rank" and not r["name"].startswith("[")]
    assert len(own) == len({r["name"] for r in own})
    count = {s: sum(r["status"] == s for r in own) for s in ("ok", "zero", "skipped")}
    assert sum(count.values()) == summary["tensors"] == len(own)
    expected = f"median of {count['ok']} tensors; 0 approximate, {count['zero']} zero, "
    assert median["reason"] == expected + f"{count['skipped']} skipped, 0 failed"
    if any(r["component"] == "vision" for r in own):
        assert summary["matrices_not_moved"] > 10 and count["zero"] > 5


def test_a_failed_analysis_leaves_no_record(tmp_path):
    """The old summary goes before the tables are replaced, so it cannot vouch for them."""
    ones = {"w": torch.ones(4, 4)}
    run(ones, {"w": torch.full((4, 4), 2.0)}, tmp_path, GeometryConfig(null_draws=0))
    assert up_to_date(tmp_path / "out" / "summary.json", {})
    save_file({"w": torch.full((4, 4), math.nan)}, tmp_path / "after" / "model.safetensors")
    with pytest.raises(RunError, match="not finite"):
        folders = (tmp_path / "before", tmp_path / "after", tmp_path / "out")
        measure_checkpoint(*folders, GeometryConfig(null_draws=0), {}, progress=False)
    assert not (tmp_path / "out" / "summary.json").exists()
