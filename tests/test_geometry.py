"""Geometry: closed forms, agreement with a plain float64 SVD, and nulls that are fair."""

import csv
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlopd.checkpoint import RunError, read_json, up_to_date
from vlopd.config import GeometryConfig
from vlopd.geometry.analyse import PARTS, analyse
from vlopd.geometry.coordinates import norms_and_coordinates, source_masks
from vlopd.geometry.nulls import iid_delta
from vlopd.geometry.projection import matrix_measures, skipped_measures
from vlopd.geometry.rows import Measure, Row, beside_null
from vlopd.geometry.spectrum import as_matrix, factorise, rank_at, singular_values

RATIOS = (0.01, 0.1, 0.25)
Values = dict[tuple[str, str], float | None]


def values(measures: list[Measure]) -> Values:
    found = {(m.metric, m.parameter): m.value for m in measures}
    assert len(found) == len(measures)
    return found


def geometry(source: Tensor, delta: Tensor) -> Values:
    """Every measure of one matrix's update."""
    matrix = source.double()
    factors = factorise(matrix, max(rank_at(ratio, *matrix.shape) for ratio in RATIOS))
    masks = source_masks(source, factors, RATIOS)
    spectral = matrix_measures(matrix, factors, delta.double(), RATIOS)
    return values(norms_and_coordinates(source, delta, masks, RATIOS) + spectral)


def orthogonal(n: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def with_spectrum(left: Tensor, singular: Tensor, right: Tensor) -> Tensor:
    return left @ singular.diag() @ right.T


def reference(source: Tensor, delta: Tensor) -> Values:
    """The definitions of arXiv 2606.13657 written out with float64 SVDs and sorts."""
    w, d = source.double(), delta.double()
    m, n = w.shape
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    u2, s2, vt2 = torch.linalg.svd(w + d, full_matrices=False)
    sd = torch.linalg.svdvals(d)
    energy, p = d.square().sum(), sd / sd.sum()
    found: dict[tuple[str, str], Tensor | float] = {
        ("relative_delta_fro", ""): d.norm() / w.norm(),
        ("delta_linf_norm", ""): d.abs().max(),
        ("delta_mean_abs", ""): d.abs().mean(),
        ("frac_delta_eq_0", ""): (d == 0).double().mean(),
        ("spectral_norm", ""): sd[0],
        ("stable_rank", ""): energy / sd[0] ** 2,
        ("effective_rank_entropy", ""): (-(p * p.log()).sum()).exp(),
        ("spectral_drift_l2_ratio", ""): (s2 - s).norm() / s.norm(),
        ("spectral_drift_to_delta_fro_ratio", ""): (s2 - s).norm() / d.norm(),
    }
    for atol in ("1e-08", "1e-07", "1e-06", "1e-05", "0.0001"):
        found["frac_abs_delta_lt", f"atol={atol}"] = (d.abs() < float(atol)).double().mean()
    for tau in ("0.0001", "0.001", "0.01"):
        bound = float(tau) * w.square().mean().sqrt()
        found["frac_abs_delta_lt_src_rms", f"tau={tau}"] = (d.abs() < bound).double().mean()
    for tol in ("1e-06", "1e-05", "0.0001"):
        found["rank_tol", f"tol={tol}"] = (sd > float(tol) * sd[0]).sum()
    for k in (1, 4, 16):
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
        for atol in ("0", "1e-05"):
            moved = (d.abs() > float(atol)).flatten()
            found["update_density", f"atol={atol}"] = moved.double().mean()
            for mask, score in scores.items():
                member = score.flatten().sort(stable=True).indices[:count]
                both = moved[member].sum()
                overlap, covered = both / moved.sum(), both / count
                found[f"{mask}_update_overlap_ratio", f"{key},atol={atol}"] = overlap
                found[f"{mask}_covered_by_update_ratio", f"{key},atol={atol}"] = covered
                found[f"{mask}_enrichment_vs_random", f"{key},atol={atol}"] = overlap / (
                    count / (m * n)
                )
    return {key: float(value) for key, value in found.items()}


# ------------------------------------------------------------------------------ against the formula


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (40, 40)])
def test_every_measure_agrees_with_a_plain_float64_svd(shape):
    """All measures, of bf16 weights and a bf16 update, agree with their definitions to 1e-5."""
    torch.manual_seed(1)
    source = (torch.randn(shape) * 0.02).bfloat16().float()
    low_rank = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    change = 2e-5 * low_rank + 1e-5 * torch.randn(shape)
    delta = (source + change).bfloat16().float() - source
    ours, theirs = geometry(source, delta), reference(source, delta)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key


def test_global_rows_are_the_model_as_one_vector(tmp_path):
    """[all] norm and counts equal those of all tensors laid end to end, vectors included."""
    torch.manual_seed(2)
    before = {f"layers.{i}.mlp.up_proj.weight": torch.randn(8 + i, 12) for i in range(3)}
    before["norm.weight"] = torch.ones(12)
    after = {
        n: t + 1e-3 * torch.randn(t.shape) * (torch.rand(t.shape) < 0.5) for n, t in before.items()
    }
    rows = run(before, after, tmp_path, GeometryConfig(null_draws=1))
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
    source = torch.randn(30, 50, dtype=torch.float64)
    found = geometry(source, torch.outer(torch.randn(30).double(), torch.randn(50).double()))
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
    source, delta = torch.randn(20, 30).double(), torch.randn(20, 30).double()
    large, small = geometry(source, delta), geometry(source, 1e-12 * delta)
    for key in (("stable_rank", ""), ("principal_projection_energy_ratio", "ratio=0.1")):
        assert small[key] == pytest.approx(large[key], rel=1e-9)


def test_projection_is_one_inside_and_zero_outside():
    """An update inside the top-k subspaces projects wholly, one orthogonal to them not at all."""
    torch.manual_seed(6)
    left, right = orthogonal(40, 40), orthogonal(60, 40)
    source = with_spectrum(left, torch.linspace(5, 1, 40).double(), right)
    k = rank_at(0.25, 40, 60)
    inside = left[:, :k] @ torch.randn(k, k, dtype=torch.float64) @ right[:, :k].T
    outside = left[:, k:] @ torch.randn(40 - k, 40 - k, dtype=torch.float64) @ right[:, k:].T
    for delta, expected in ((inside, 1.0), (outside, 0.0)):
        found = geometry(source, delta)
        for side in ("", "left_", "right_"):
            value = found[f"{side}principal_projection_energy_ratio", "ratio=0.25"]
            assert value == pytest.approx(expected, abs=1e-12)


def test_rescaling_turns_nothing():
    """Turning the first left singular vector shows as sin(angle) left, as zero right."""
    torch.manual_seed(7)
    source = torch.randn(40, 60, dtype=torch.float64)
    found = geometry(source, 0.01 * source)
    assert found["spectral_drift_to_delta_fro_ratio", ""] == pytest.approx(1, abs=1e-9)
    assert found["spectral_drift_l2_ratio", ""] == pytest.approx(0.01, abs=1e-9)
    for metric in ("top_subspace_rotation", "right_subspace_rotation"):
        assert all(found[metric, f"ratio={ratio}"] < 1e-10 for ratio in RATIOS)


@pytest.mark.parametrize("angle", [0.3, 1e-3, 1e-7])
def test_a_turn_is_measured_down_to_tiny_angles(angle):
    """Turning the first left singular vector shows as sin(angle) on the left, zero on the right."""
    torch.manual_seed(8)
    left, right = orthogonal(60, 60), orthogonal(40, 40)
    source = with_spectrum(left[:, :40], torch.linspace(5, 1, 40).double(), right)
    plane = left[:, [0, -1]]
    turn = torch.tensor(
        [[math.cos(angle) - 1, -math.sin(angle)], [math.sin(angle), math.cos(angle) - 1]]
    )
    turned = source + plane @ turn.double() @ plane.T @ source
    found = geometry(source, turned - source)
    assert found["top_subspace_rotation", "ratio=0.01"] == pytest.approx(math.sin(angle), rel=1e-5)
    assert found["right_subspace_rotation", "ratio=0.01"] < 1e-10
    assert found["spectral_drift_l2_ratio", ""] < 1e-7


def test_singular_values_span_six_decades():
    """The Gram route keeps the singular values that any tolerance here looks at."""
    torch.manual_seed(9)
    spectrum = torch.logspace(0, -5.9, 20, dtype=torch.float64)
    found = singular_values(with_spectrum(orthogonal(40, 20), spectrum, orthogonal(20, 20)))
    assert torch.allclose(found, spectrum, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------------- nulls


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("relative", [3e-4, 1e-3, 1e-1])
def test_null_has_the_norm_of_the_update_after_rounding(stored, relative):
    """In the stored precision, where rounding swallows most of it, norms agree to 1 %."""
    torch.manual_seed(10)
    source = (torch.randn(64, 96) * 0.02).to(stored).float()
    delta = (source + relative * 0.02 * torch.randn(64, 96)).to(stored).float() - source
    null = iid_delta(source, delta, stored, 0, 1, "w")
    assert float(null.norm() / delta.norm()) == pytest.approx(1, abs=0.0101)
    assert torch.equal((source + null).to(stored).float(), source + null)


def test_null_of_nothing_is_nothing():
    """A tensor that did not move has a null that does not move."""
    assert not iid_delta(torch.ones(4), torch.zeros(4), torch.bfloat16, 0, 0, "w").any()


def test_null_of_one_coarse_step_is_a_coarse_step():
    """One coordinate of a norm weight moved by one bf16 step: the null moves one coordinate too."""
    source = torch.ones(64)
    delta = torch.zeros(64)
    delta[5] = 2.0**-7
    null = iid_delta(source, delta, torch.bfloat16, 0, 0, "norm")
    assert 0 < float(null.norm()) <= 2 * 2.0**-7


def test_null_streams_are_named():
    """The same seed, draw and tensor give the same noise; any other name gives another."""
    source, delta = torch.zeros(8, 8), torch.ones(8, 8)
    first = iid_delta(source, delta, torch.float32, 0, 0, "a")
    assert torch.equal(first, iid_delta(source, delta, torch.float32, 0, 0, "a"))
    for other in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert not torch.equal(first, iid_delta(source, delta, torch.float32, *other))


def test_projection_of_noise_has_its_closed_form():
    """I.i.d. noise projects k^2 / (mn) jointly, k / m on the left, k / n on the right."""
    torch.manual_seed(11)
    source = torch.randn(40, 60)
    k = rank_at(0.25, 40, 60)
    found = [
        geometry(source, iid_delta(source, torch.full((40, 60), 1e-3), torch.float32, 0, draw, "w"))
        for draw in range(30)
    ]
    for side, expected in (("", k * k / 2400), ("left_", k / 40), ("right_", k / 60)):
        key = (f"{side}principal_projection_energy_ratio", "ratio=0.25")
        mean = sum(each[key] for each in found) / len(found)
        assert mean == pytest.approx(expected, rel=0.05)


def test_beside_null():
    """A row has mean and sample deviation over draws, and the excess over the mean."""
    draws = [Measure("m", "", value) for value in (1.0, 2.0, 3.0)]
    row = beside_null(Measure("m", "", 5.0), draws, "w")
    assert (row.null, row.null_mean, row.null_sd, row.excess) == ("iid", 2.0, 1.0, 3.0)
    alone = beside_null(Measure("m", "", 5.0), [], "w")
    assert (alone.null, alone.null_mean, alone.null_sd, alone.excess) == ("", None, None, None)


# ------------------------------------------------------------------------------- what has no value


def test_zero_update_gives_zero_rows():
    """Ratios of a zero update have no value and status zero; what is defined is still given."""
    source, delta = torch.randn(20, 30), torch.zeros(20, 30)
    found = geometry(source, delta)
    moved = geometry(source, delta + 1)
    assert found.keys() == moved.keys()
    assert found["frac_delta_eq_0", ""] == 1 and found["relative_delta_fro", ""] == 0
    assert found["spectral_norm", ""] == 0
    assert found["top_subspace_rotation", "ratio=0.1"] < 1e-14
    for metric in ("stable_rank", "effective_rank_entropy", "spectral_drift_to_delta_fro_ratio"):
        assert found[metric, ""] is None
    assert found["low_magnitude_update_overlap_ratio", "ratio=0.1,atol=0"] is None


def test_vectors_experts_and_giants_are_skipped_aloud():
    """What is no matrix, or too large, has the same rows as a matrix, each with its reason."""
    assert as_matrix(torch.zeros(3))[1] == "1-D, not a matrix"
    assert as_matrix(torch.zeros(2, 3, 4))[1] == "3-D, not a matrix"
    assert as_matrix(torch.zeros(1).expand(4097, 4097))[1] == "shorter side 4097 > 4096"
    rows = skipped_measures(RATIOS, "because")
    matrix = torch.randn(20, 20).double()
    full = matrix_measures(matrix, factorise(matrix, 5), matrix, RATIOS)
    assert [(r.metric, r.parameter) for r in rows] == [(r.metric, r.parameter) for r in full]
    assert {(r.value, r.status, r.reason) for r in rows} == {(None, "skipped", "because")}


def test_patch_embeddings_are_matrices():
    """A convolution kernel [out, in, h, w] is seen as [out, in * h * w]."""
    matrix, _ = as_matrix(torch.randn(8, 3, 4, 4).bfloat16())
    assert matrix is not None and matrix.shape == (8, 48) and matrix.dtype == torch.float64


def test_source_without_a_principal_subspace():
    """Where the source has rank below k, its top-k subspace is not made up."""
    torch.manual_seed(12)
    source = torch.randn(40, 2).double() @ torch.randn(2, 60).double()
    found = geometry(source, torch.randn(40, 60).double())
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
    analyse(root / "before", root / "after", root / "out", config, {}, progress=False)
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
    config = GeometryConfig(ratios=(0.1,))
    inputs = {"settings": config.model_dump(mode="json")}
    record = analyse(root / "before", root / "after", root / "out", config, inputs, progress=False)
    assert up_to_date(record, inputs)
    with (root / "out" / "geometry.csv").open() as file:
        return root / "out", list(csv.DictReader(file))


def test_table_is_tidy_and_whole(stage):
    """Every tensor has every measure once; what has no value says why."""
    out, rows = stage
    assert list(rows[0]) == [field.name for field in fields(Row)]
    keys = [(row["name"], row["metric"], row["parameter"]) for row in rows]
    assert len(set(keys)) == len(keys)
    tensors = read_json(out / "match.json")["matched"]
    own = {n: {k[1:] for k in keys if k[0] == n} for n in {k[0] for k in keys}}
    assert all(own[name] == own[tensors[0]] for name in tensors)
    for row in rows:
        assert (row["status"] == "ok") == (row["value"] != "")
        assert row["status"] == "ok" or row["reason"]
        assert row["value"] == "" or math.isfinite(float(row["value"]))
        assert row["value"] == "" or row["null"] == "iid"


def test_noise_is_no_finding(stage):
    """For an update that is noise, observed headline values are those of the null."""
    summary = read_json(stage[0] / "summary.json")
    assert summary["null"] == {"type": "iid", "draws": 3, "seed": 0}
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
    count = {s: sum(r["status"] == s for r in own) for s in ("ok", "zero", "skipped")}
    assert sum(count.values()) == summary["tensors"] == len(own)
    expected = f"median of {count['ok']} tensors; {count['zero']} zero, {count['skipped']} skipped"
    assert median["reason"] == expected
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
        analyse(*folders, GeometryConfig(null_draws=0), {}, progress=False)
    assert not (tmp_path / "out" / "summary.json").exists()
