"""The geometry of pairs and of runs: names and ties, going on after a kill, large matrices, overlap, trajectories, and
checkpoints that cannot be read."""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import llms
from tests.test_geometry import RATIOS, orthogonal, reference
from vlopd.config.analysis import GaussianNull, GeometryConfig, SignFlippedNull
from vlopd.errors import RunError
from vlopd.files import read_json
from vlopd.models.parameter_names import classify
from vlopd.update_geometry import overlap, paper
from vlopd.update_geometry.aggregate import PARTS
from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows
from vlopd.update_geometry.overlap import write_overlap
from vlopd.update_geometry.partial import Partial
from vlopd.update_geometry.trajectory import write_trajectory
from vlopd.weights.delta import stream

QUICK = GeometryConfig(null_draws=0, ratios=RATIOS)
Tensors = dict[str, Tensor]


def save(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def noised(tensors: Mapping[str, Tensor], seed: int, relative: float = 0.01) -> Tensors:
    torch.manual_seed(seed)
    return {n: t + relative * t.std() * torch.randn_like(t) for n, t in tensors.items()}


def llama(folder: Path) -> Tensors:
    llms.build("llama", folder)
    return load_file(folder / "model.safetensors")


def run(base: Path, trained: Path, out: Path, config: GeometryConfig = QUICK, workers: int = 1):
    measure_checkpoint(base, trained, out, config, {"test": 1}, progress=False, workers=workers)
    return list(read_rows(out))


def value_of(rows, name: str, metric: str, parameter: str = "") -> float | None:
    (text,) = {
        row["value"]
        for row in rows
        if (row["name"], row["metric"], row["parameter"]) == (name, metric, parameter)
    }
    return float(text) if text else None


# ------------------------------------------------------------------------------------ names and ties


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.", "model.language_model."), ("", "base."), ("model.", "transformer.decoder.")],
)
def test_a_renamed_prefix_changes_no_value(old, new, tmp_path):
    """Tensors under another prefix are matched, listed as aliases, and measured under the base's names."""
    before = llama(tmp_path / "before")
    after = noised(before, 1)
    renamed = {n.replace(old, new, 1) if n.startswith(old) else n: t for n, t in after.items()}
    assert renamed.keys() != after.keys()
    save(after, tmp_path / "plain")
    save(renamed, tmp_path / "renamed")
    plain = run(tmp_path / "before", tmp_path / "plain", tmp_path / "a")
    assert run(tmp_path / "before", tmp_path / "renamed", tmp_path / "b") == plain
    report = read_json(tmp_path / "b" / "match.json")
    assert report["matched"] == sorted(before) and report["missing"] == report["extra"] == []
    expected = {n: n.replace(old, new, 1) for n in before if n.startswith(old)}
    assert report["aliased"] == {n: [n, other] for n, other in expected.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    delta = after[name].double() - before[name].double()
    theirs = reference(before[name], delta)
    for metric in ("stable_rank", "relative_delta_fro", "spectral_drift_l2_ratio"):
        assert value_of(plain, name, metric) == pytest.approx(theirs[metric, ""], rel=1e-5)


@pytest.mark.parametrize("stored", ["base", "trained", "both", "neither"])
def test_a_tied_head_is_counted_once(stored, tmp_path):
    """A copy of the embedding that one side stores as its head changes no number; match.json calls it tied."""
    llms.build("qwen2", tmp_path / "before")  # ties its head
    before = load_file(tmp_path / "before" / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in before
    after = noised(before, 2)
    expected = run(tmp_path / "before", save(after, tmp_path / "after"), tmp_path / "plain")
    for side, tensors in (("base", before), ("trained", after)):
        if stored in (side, "both"):
            tensors[head] = tensors[embedding].clone()
    folders = save(before, tmp_path / "base"), save(after, tmp_path / "trained")
    (tmp_path / "base" / "config.json").write_text((tmp_path / "before/config.json").read_text())
    rows = run(*folders, tmp_path / "out")
    report = read_json(tmp_path / "out" / "match.json")
    if stored == "both":  # two parameters by every account
        assert head in report["matched"] and report["tied"] == []
        return
    assert rows == expected
    assert report["tied"] == ([] if stored == "neither" else [head])
    assert report["missing"] == report["extra"] == []


@pytest.mark.parametrize("untied", ["base", "trained"])
def test_a_head_that_was_trained_apart_has_its_own_row(untied, tmp_path):
    """Where one side's head is no copy of its embedding, its partner is the other side's embedding."""
    llms.build("qwen2", tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    after = noised(before, 2)
    own = before if untied == "base" else after
    own[head] = own[embedding] + 0.05 * torch.randn_like(own[embedding])
    folders = save(before, tmp_path / "base"), save(after, tmp_path / "trained")
    for folder in folders:  # which says that a head is tied where none is stored
        (folder / "config.json").write_text((tmp_path / "before/config.json").read_text())
    rows = run(*folders, tmp_path / "out")
    first = before[head if untied == "base" else embedding].double()
    last = after[head if untied == "trained" else embedding].double()
    theirs = reference(first, last - first)
    for metric in ("relative_delta_fro", "stable_rank"):
        assert value_of(rows, head, metric) == pytest.approx(theirs[metric, ""], rel=1e-5)
    (component,) = {row["component"] for row in rows if row["name"] == head}
    assert component == "head" and read_json(tmp_path / "out" / "match.json")["tied"] == []


# ---------------------------------------------------------------------------------- after a kill


def stopped(before: Tensors, root: Path, config: GeometryConfig) -> Tensors:
    """Starts an analysis in root/out that ends at the last tensor, which is broken; returns the whole checkpoint."""
    after = noised(before, 3)
    last = "model.norm.weight"  # the smallest go last, in the order of names
    broken = {**after, last: torch.full_like(after[last], math.nan)}
    save(broken, root / "after")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "remove", lambda self: None)  # a kill removes nothing
        with pytest.raises(RunError, match=last):
            run(root / "before", root / "after", root / "out", config)
    assert not (root / "out" / "summary.json").exists()
    assert len(list((root / "out" / "partial").glob("*.npz"))) == len(before) - 1
    return after


def test_a_killed_analysis_goes_on(tmp_path):
    """What was measured before the end is not measured again, and the tables are those of one run."""
    before = llama(tmp_path / "before")
    config = GeometryConfig(nulls=(GaussianNull(),), null_draws=2, ratios=(0.1,))
    after = stopped(before, tmp_path, config)
    whole = run(tmp_path / "before", save(after, tmp_path / "same"), tmp_path / "whole", config)

    partial, names = tmp_path / "out" / "partial", sorted(before)
    for path in sorted(partial.glob("*.npz"))[::2]:
        path.unlink()  # as if the end had come half way
    done = {names[int(path.stem)] for path in partial.glob("*.npz")}
    assert len(before) // 2 - 1 <= len(done) <= len(before) // 2
    # whoever looks at one of these again finds that it did not move
    save({n: before[n] if n in done else t for n, t in after.items()}, tmp_path / "after")
    assert run(tmp_path / "before", tmp_path / "after", tmp_path / "out", config) == whole
    assert not partial.exists()


def test_other_settings_do_not_go_on_from_it(tmp_path):
    """What was measured under other settings is thrown away, not mixed in."""
    before = llama(tmp_path / "before")
    save(stopped(before, tmp_path, QUICK), tmp_path / "after")
    folders, other = (
        (tmp_path / "before", tmp_path / "after"),
        GeometryConfig(null_draws=0, ratios=(0.5,)),
    )
    assert run(*folders, tmp_path / "out", other) == run(*folders, tmp_path / "fresh", other)


def test_workers_change_nothing(tmp_path):
    """One thread or three, the rows are the same."""
    save(noised(llama(tmp_path / "before"), 3), tmp_path / "after")
    config = GeometryConfig(nulls=(GaussianNull(),), null_draws=1, ratios=(0.1,))
    one, three = (
        run(tmp_path / "before", tmp_path / "after", tmp_path / f"out-{n}", config, n)
        for n in (1, 3)
    )
    assert one == three


# ------------------------------------------------------------------------------------ large matrices

APPROXIMATE = {
    # metric: (error for an update with a few directions, for one that is noise, whose values lie close together)
    "spectral_norm": (1e-6, 0.02),
    "stable_rank": (1e-6, 0.04),
    "top_energy_ratio": (5e-3, 0.04),
    "principal_projection_energy_ratio": (2e-3, 2e-3),
    "left_principal_projection_energy_ratio": (2e-3, 2e-3),
    "right_principal_projection_energy_ratio": (2e-3, 2e-3),
}
"""Metrics of the randomised pass, and their largest relative errors on these matrices."""


@pytest.mark.parametrize("kind", ["directions", "noise"])
@pytest.mark.parametrize("shape", [(400, 160), (160, 400)])
def test_the_randomised_pass(shape, kind, tmp_path):
    """Beyond the stated cost, spectra are within a stated error of the exact ones; a status says so, and nothing is
    silently missing: what needs all singular values or exact subspaces is skipped by name."""
    torch.manual_seed(4)
    m, n = shape
    spectrum = torch.arange(1, min(m, n) + 1).double() ** -0.7
    base = orthogonal(m, min(m, n)) @ spectrum.diag() @ orthogonal(n, min(m, n)).T
    update = 1e-5 * torch.randn(m, n)
    if kind == "directions":
        sizes = 1e-3 * torch.arange(1, 41).double() ** -0.5
        update = update + orthogonal(m, 40) @ sizes.diag() @ orthogonal(n, 40).T
    before = {"layers.0.mlp.up_proj.weight": base.float(), "layers.0.norm.weight": torch.ones(9)}
    after = {n: t + (update.float() if t.ndim == 2 else 0.1) for n, t in before.items()}
    folders = save(before, tmp_path / "before"), save(after, tmp_path / "after")
    limits = ({}, {"max_exact_side": 100}, {"max_exact_cost": 1e6})
    exact, side, cost = (
        run(*folders, tmp_path / f"out-{i}", GeometryConfig(null_draws=0, ratios=(0.1,), **limit))
        for i, limit in enumerate(limits)
    )
    keys = [(row["name"], row["metric"], row["parameter"], row["null"]) for row in exact]
    for rows, why in ((side, "shorter side 160 > 100"), (cost, "= 1e+07 > 1e+06")):
        found = [(row["name"], row["metric"], row["parameter"], row["null"]) for row in rows]
        chances = [key for key in keys if key[3] == "closed_form"]
        assert {key[:3] for key in found} == {key[:3] for key in keys} and len(chances) > 10
        skipped = set()
        for row in rows:
            if row["name"] != "layers.0.mlp.up_proj.weight":
                continue
            value = value_of(exact, row["name"], row["metric"], row["parameter"])
            if row["metric"] in APPROXIMATE:
                assert row["status"] == "approximate" and why in row["reason"]
                error = APPROXIMATE[row["metric"]][kind == "noise"]
                assert float(row["value"]) == pytest.approx(value, rel=error), row["metric"]
            elif row["status"] == "skipped":
                assert row["value"] == "" and why in row["reason"]
                skipped.add(row["metric"])
            else:  # coordinates: as exact as ever, but for the principal masks, which need subspaces
                assert row["status"] == "ok"
                if "principal" not in row["metric"]:
                    assert float(row["value"]) == value
        assert skipped == {
            "effective_rank_entropy",
            "rank_tol",
            "top_subspace_rotation",
            "right_subspace_rotation",
            "spectral_drift_l2_ratio",
            "spectral_drift_to_delta_fro_ratio",
        }
    summary = read_json(tmp_path / "out-1" / "summary.json")
    assert (summary["matrices_approximate"], summary["matrices_failed"]) == (1, 0)
    medians = [row for row in side if row["name"] == "[median]" and row["metric"] == "stable_rank"]
    assert all(row["status"] == "approximate" for row in medians)
    assert all("1 approximate" in row["reason"] for row in medians)


# ------------------------------------------------------------------------------------ several runs


def deciles(base: Tensor) -> np.ndarray:
    """The stratum of every coordinate: how many of the nine cuts of sorted |w| its own |w| exceeds."""
    size = base.double().abs().flatten().numpy()
    ordered = np.sort(size)
    cuts = {ordered[max(1, len(size) * i // 10) - 1] for i in range(1, 10)}
    return np.array([sum(value > cut for cut in cuts) for value in size])


def plain_overlap(before: Tensors, one: Tensors, other: Tensors, atol: float) -> dict[str, float]:
    """The overlap of two updates, coordinate by coordinate, and what chance has everywhere, by tensor, by stratum."""
    a, b, tensor, stratum = [], [], [], []
    for i, name in enumerate(sorted(before)):
        for moved, after in ((a, one), (b, other)):
            moved.append((after[name].double() - before[name].double()).abs().flatten() > atol)
        tensor.append(np.full(before[name].numel(), i))
        stratum.append(deciles(before[name]))
    a, b = torch.cat(a).numpy(), torch.cat(b).numpy()
    tensor, stratum = np.concatenate(tensor), np.concatenate(stratum)

    def chance(groups: np.ndarray) -> float:
        own = [groups == group for group in np.unique(groups)]
        return sum(a[inside].sum() * b[inside].sum() / inside.sum() for inside in own)

    both = (a & b).sum()
    return {
        "update_jaccard": both / (a | b).sum(),
        "first_covered_by_second": both / a.sum(),
        "second_covered_by_first": both / b.sum(),
        "overlap_enrichment_vs_random": both / (a.mean() * b.sum()),
        "overlap_enrichment_vs_random_within_tensors": both / chance(tensor),
        "overlap_enrichment_vs_random_within_tensors_and_magnitudes": both
        / chance(10 * tensor + stratum),
    }


def overlap_rows(before: Tensors, runs: Mapping[str, Tensors], root: Path, config: GeometryConfig):
    base = save(before, root / "before")
    folders = {name: save(tensors, root / name) for name, tensors in runs.items()}
    with write_overlap(base, folders, root / "out", config, progress=False).open() as file:
        return list(csv.DictReader(file))


def test_a_killed_overlap_goes_on(tmp_path, monkeypatch):
    """Tensors compared before the end are not compared again, the table is that of one run, and another comparison does
    not go on from them."""
    before = llama(tmp_path / "before")
    config = GeometryConfig(nulls=(GaussianNull(),), null_draws=1, ratios=(0.1,))
    base = tmp_path / "before"
    folders = {str(seed): save(noised(before, seed), tmp_path / str(seed)) for seed in (1, 2, 3)}
    compared, whole = [], overlap._compare_updates

    def counted(where, *others):
        compared.append(where.name)
        if len(compared) == 5:
            raise KeyboardInterrupt
        return whole(where, *others)

    monkeypatch.setattr(overlap, "_compare_updates", counted)

    def compare(out: str, inputs: object) -> bytes:
        where, given = tmp_path / out, {"inputs": inputs, "progress": False, "workers": 1}
        return write_overlap(base, folders, where, config, **given).read_bytes()

    for out in ("out", "other"):
        compared.clear()
        with pytest.raises(KeyboardInterrupt):
            compare(out, {"of": 1})
    done = set(compared[:4])
    compared[:] = [""] * 5
    expected = compare("whole", None)
    compared[:] = [""] * 5
    assert compare("out", {"of": 1}) == expected
    assert set(compared[5:]) == set(before) - done
    assert not (tmp_path / "out" / "overlap.partial").exists()
    compared[:] = [""] * 5
    assert compare("other", {"of": 2}) == expected
    assert set(compared[5:]) == set(before)


def test_overlap_agrees_with_plain_counting(tmp_path):
    """Jaccard, both one-sided coverages and the three enrichments are those of counting coordinate by coordinate."""
    torch.manual_seed(5)
    before = {
        "layers.0.mlp.up_proj.weight": (0.02 * torch.randn(30, 40)).bfloat16(),
        "layers.1.mlp.up_proj.weight": (0.05 * torch.randn(20, 30)).bfloat16(),
        "norm.weight": torch.ones(17).bfloat16(),
    }
    runs = {}
    for run_, seed in (("a", 1), ("b", 2), ("c", 3)):
        torch.manual_seed(seed)
        runs[run_] = {
            name: (t.float() + 2e-5 * seed * (1 + 9 * ("1" in name)) * torch.randn(t.shape)).to(t)
            for name, t in before.items()
        }
        runs[run_]["norm.weight"][seed] += 2.0**-6
    rows = overlap_rows(before, runs, tmp_path, GeometryConfig(null_draws=0))
    assert {(row["first"], row["second"]) for row in rows} == {("a", "b"), ("a", "c"), ("b", "c")}
    compared = 0
    for row in rows:
        one, other = runs[row["first"]], runs[row["second"]]
        if not row["parameter"].startswith("atol="):
            continue
        atol = float(row["parameter"].removeprefix("atol="))
        if row["name"] == "[all]":
            theirs = plain_overlap(before, one, other, atol)
        elif row["name"] in before and row["name"] != "norm.weight":
            name = row["name"]
            chosen = ({name: tensors[name]} for tensors in (before, one, other))
            theirs = plain_overlap(*chosen, atol)
        else:
            continue
        assert float(row["value"]) == pytest.approx(theirs[row["metric"]], rel=1e-12), row
        compared += 1
    assert compared == 3 * 3 * 2 * 6  # pairs of runs, names, thresholds, metrics


def test_directions_agree_with_float64(tmp_path):
    """Cosine, overlap of the top masks over chance and similarity of subspaces are those of plain float64, for stored
    bf16 with its ties; of the whole model, of components and parts, and of tensors. A fused qkv is three matrices."""
    llms.build("gpt2", tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    before = {n: t.bfloat16() for n, t in before.items()}
    save_file(before, tmp_path / "before" / "model.safetensors", {"format": "pt"})
    torch.manual_seed(11)
    shared = {n: torch.randn(t.shape) for n, t in before.items()}
    folders, changes = {}, []
    for name in ("a", "b"):
        after = {
            n: (t.float() + 3e-3 * (0.5 * shared[n] + torch.randn(t.shape))).bfloat16()
            for n, t in before.items()
        }
        folders[name] = save(after, tmp_path / name)
        changes.append({n: after[n].double() - before[n].double() for n in before})
    config = GeometryConfig(null_draws=0)
    path = write_overlap(
        tmp_path / "before", folders, tmp_path / "out", config, progress=False, workers=1
    )
    with path.open() as file:
        rows = {(r["name"], r["metric"]): r["value"] for r in csv.DictReader(file)}

    def top(change: Tensor) -> Tensor:
        size, k = change.abs().flatten(), math.ceil(0.05 * change.numel())
        cut = size.sort(descending=True).values[k - 1]
        above, tied = size > cut, size == cut
        return above.double() + tied * (k - above.sum()) / tied.sum()

    def references(names: list[str]) -> dict[str, float | None]:
        a, b = (torch.cat([its[n].flatten() for n in names]) for its in changes)
        both = tensor = fine = 0.0
        for n in names:
            one, other = (top(its[n]) for its in changes)
            both += float(one @ other)
            tensor += float(one.sum() * other.sum() / len(one))
            sizes = before[n].float().abs().flatten()
            cuts = sizes.sort().values[[max(1, len(sizes) * i // 10) - 1 for i in range(1, 10)]]
            decile = (sizes[:, None] > cuts.unique()).sum(1)
            for stratum in decile.unique():
                here = decile == stratum
                fine += float(one[here].sum() * other[here].sum() / here.sum())
        return {
            "delta_cosine": float(a @ b / (a.norm() * b.norm())),
            "top_mask_overlap_over_chance": both / tensor,
            "top_mask_overlap_over_chance_within_magnitudes": both / fine if fine else None,
        }

    names = sorted(before)
    scopes = {"[all]": names}
    for n in names:
        where = classify(n)
        scopes.setdefault(n, []).append(n)
        scopes.setdefault(f"[component={where.component}]", []).append(n)
        scopes.setdefault(f"[part={PARTS.get(where.module, 'other')}]", []).append(n)
    assert {"[part=attention]", "[part=ffn]", "[component=language]"} <= set(scopes)
    for scope, members in scopes.items():
        for metric, value in references(members).items():
            text = rows[scope, metric]
            found = float(text) if text else None  # a bias whose masks have no decile in common
            assert found == (None if value is None else pytest.approx(value, rel=1e-6)), scope
    cosine = references(names)["delta_cosine"]
    assert float(rows["[all]", "delta_cosine"]) == pytest.approx(cosine, rel=1e-13)

    similar: dict[str, list[float]] = {"left": [], "right": []}
    for n in (n for n in names if before[n].ndim == 2):
        stored = [its[n] if "wte" in n or "wpe" in n else its[n].T for its in changes]
        for pair in zip(*(d.chunk(3) if "c_attn" in n else [d] for d in stored), strict=True):
            (u, _, vh), (other_u, _, other_vh) = (torch.linalg.svd(d) for d in pair)
            similar["left"].append(float((u[:, :16].T @ other_u[:, :16]).square().sum()) / 16)
            similar["right"].append(float((vh[:16] @ other_vh[:16].T).square().sum()) / 16)
    for side, own in similar.items():
        found = float(rows["[median]", f"{side}_subspace_similarity"])
        assert found == pytest.approx(float(np.median(own)), rel=1e-6)


def test_two_runs_that_move_small_weights_overlap_by_magnitude_alone(tmp_path):
    """Both move a random 60 % of the smaller half: enrichment 2 over the whole, and 1 within deciles of |w|."""
    torch.manual_seed(6)
    before = {"layers.0.mlp.up_proj.weight": torch.randn(100, 200)}
    (base,) = before.values()
    small = base.abs() <= base.abs().median()
    runs = {
        name: {"layers.0.mlp.up_proj.weight": base + small * (torch.rand(100, 200) < 0.6)}
        for name in ("a", "b")
    }
    rows = overlap_rows(before, runs, tmp_path, GeometryConfig(null_draws=0))
    found = {r["metric"]: float(r["value"]) for r in rows
             if (r["name"], r["parameter"]) == ("[all]", "atol=0")}  # fmt: skip
    name = "overlap_enrichment_vs_random"
    assert found[name] == pytest.approx(2, abs=0.04)
    assert found[f"{name}_within_tensors_and_magnitudes"] == pytest.approx(1, abs=0.02)
    assert found["first_covered_by_second"] == pytest.approx(0.6, abs=0.02)
    lowest = [r for r in rows if r["name"] == "[magnitude=0]" and r["metric"] == name]
    assert all(float(r["value"]) == pytest.approx(1, abs=0.05) for r in lowest) and len(lowest) == 2


def test_overlap_of_noise_is_that_of_its_nulls(tmp_path):
    """Two independent noises in bf16 overlap far above chance, and not beyond what two nulls do."""
    torch.manual_seed(7)
    before = {"layers.0.mlp.up_proj.weight": (0.02 * torch.randn(120, 200)).bfloat16()}
    runs = {
        name: {n: (t.float() + 2e-5 * torch.randn(t.shape)).bfloat16() for n, t in before.items()}
        for name in ("a", "b")
    }
    nulls = (GaussianNull(), SignFlippedNull())
    rows = overlap_rows(before, runs, tmp_path, GeometryConfig(null_draws=8, nulls=nulls))
    own = {
        row["null"]: row
        for row in rows
        if (row["name"], row["metric"], row["parameter"])
        == ("[all]", "overlap_enrichment_vs_random", "atol=0")
    }
    gaussian = own["gaussian"]
    assert float(gaussian["value"]) > 2
    assert float(gaussian["null_mean"]) == pytest.approx(float(gaussian["value"]), rel=0.1)
    assert float(gaussian["p"]) > 0.01
    directions = {
        row["metric"]: row
        for row in rows
        if row["name"] in ("[all]", "[median]") and row["null"] == "gaussian"
    }
    for metric in ("delta_cosine", "top_mask_overlap_over_chance", "left_subspace_similarity"):
        assert float(directions[metric]["p"]) > 0.01, metric
    assert float(directions["delta_cosine"]["value"]) == pytest.approx(0, abs=0.03)
    flipped = own["sign_flipped"]  # keeps the places, so that overlap is no finding beside it
    assert flipped["p"] == "" and abs(float(flipped["excess"])) < 0.02 * float(flipped["value"])


def test_runs_that_moved_nothing_do_not_overlap_wholly(tmp_path):
    """Two updates of nothing have no overlap, rather than 1."""
    before = {"layers.0.mlp.up_proj.weight": torch.randn(8, 8)}
    rows = overlap_rows(before, {"a": before, "b": before}, tmp_path, GeometryConfig())
    assert {(row["value"], row["status"]) for row in rows if row["name"] != "[median]"} == {
        ("", "zero")
    }
    assert {row["status"] for row in rows if row["name"] == "[median]"} == {"skipped"}


def test_trajectory_agrees_with_float64(tmp_path):
    """Cosines to the final update and the one before, and similarities of subspaces, are those of plain SVDs; those of
    a transposed weight are of its output side on the left."""
    llms.build("gpt2", tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    steps, changes, at = {}, {}, {n: torch.zeros_like(t) for n, t in before.items()}
    for step in (2, 5, 9):
        torch.manual_seed(step)
        at = {n: t + 0.01 * torch.randn_like(t) for n, t in at.items()}
        after = {n: before[n] + t for n, t in at.items()}
        steps[step] = save(after, tmp_path / f"step-{step}")
        changes[step] = {n: after[n].double() - before[n].double() for n in before}
    path = write_trajectory(tmp_path / "before", steps, tmp_path / "out", QUICK, progress=False)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = {
        (row["name"], int(row["step"]), row["metric"], row["parameter"]): row["value"]
        for row in rows
    }
    assert len(found) == len(rows)

    def flat(step: int) -> Tensor:
        return torch.cat([changes[step][n].flatten() for n in sorted(before)])

    stored, name = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight[k]"
    for step, previous in ((2, None), (5, 2), (9, 5)):
        for partner, other in (("final", 9), ("previous", previous)):
            cosine = found["[all]", step, f"cosine_to_{partner}", ""]
            if other is None:
                assert cosine == "" == found[name, step, f"cosine_to_{partner}", ""]
                continue
            a, b = flat(step), flat(other)
            assert float(cosine) == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-6)
            a, b = (changes[s][stored][:, 32:64].T for s in (step, other))
            cosine = found[name, step, f"cosine_to_{partner}", ""]
            assert float(cosine) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
            (u, _, vt), (u2, _, vt2) = (torch.linalg.svd(each) for each in (a, b))
            for k in (1, 4, 16):
                for side, x, y in (("left", u, u2), ("right", vt.T, vt2.T)):
                    expected = float((x[:, :k].T @ y[:, :k]).square().sum()) / k
                    value = found[name, step, f"{side}_subspace_similarity_to_{partner}", f"k={k}"]
                    assert float(value) == pytest.approx(expected, rel=1e-5), (step, partner, k)


def test_trajectory_of_large_matrices_says_approximate(tmp_path):
    """Subspaces of a matrix beyond the stated cost carry the status and its reason; cosines stay exact."""
    torch.manual_seed(8)
    before = {"layers.0.mlp.up_proj.weight": torch.randn(60, 80), "norm.weight": torch.rand(9)}
    base = save(before, tmp_path / "before")
    steps = {i: save(noised(before, i), tmp_path / f"step-{i}") for i in (1, 2)}
    config = GeometryConfig(nulls=(GaussianNull(),), null_draws=1, max_exact_side=20)
    with write_trajectory(base, steps, tmp_path / "out", config, progress=False).open() as file:
        rows = list(csv.DictReader(file))
    similar = [r for r in rows if "similarity" in r["metric"] and r["value"]]
    assert len(similar) > 10
    assert all(r["status"] == "approximate" and "side 60 > 20" in r["reason"] for r in similar)
    assert {r["status"] for r in rows if r["metric"] == "cosine_to_final"} == {"ok"}
    vector = [r for r in rows if r["name"] == "norm.weight" and "similarity" in r["metric"]]
    assert {(r["status"], r["reason"]) for r in vector} == {
        ("skipped", "no such subspace on both sides")
    }


def test_the_papers_table_repeats_the_rows(tmp_path):
    """Each cell of --preset paper is a value of geometry.csv, of the update and of every null with its deviation."""
    save(noised(llama(tmp_path / "before"), 4, 1e-3), tmp_path / "after")
    config = paper.preset().model_copy(
        update={"nulls": (GaussianNull(), SignFlippedNull()), "null_draws": 2}
    )
    rows = run(tmp_path / "before", tmp_path / "after", tmp_path / "out", config)
    lines = dict(paper.paper_table(rows))
    assert list(lines) == ["update", "gaussian", "sign flipped", "closed form"]
    for i, column in enumerate(paper.COLUMNS):
        own = {
            row["null"].replace("_", " "): row
            for row in rows
            if (row["name"], row["metric"], row["parameter"])
            == (column.name, column.metric, column.parameter)
        }
        first = next(iter(own.values()))
        assert float(lines["update"][i]) == pytest.approx(
            column.scale * float(first["value"]), rel=1e-3
        )
        for null in list(lines)[1:]:
            if null not in own:
                assert lines[null][i] == "-" and null == "closed form"
                continue
            mean, _, sd = lines[null][i].partition("\n±")
            row = own[null]
            assert float(mean) == pytest.approx(column.scale * float(row["null_mean"]), rel=1e-3)
            if sd:
                assert float(sd) == pytest.approx(column.scale * float(row["null_sd"]), rel=0.5)


# ---------------------------------------------------------------------------- what cannot be read

UP = "model.layers.1.mlp.up_proj.weight"


def pickled(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def other_shape(folder: Path, tensors: Tensors) -> None:
    save({**tensors, UP: tensors[UP][:, :-1]}, folder)


def not_finite(value: float) -> Callable[[Path, Tensors], None]:
    def damage(folder: Path, tensors: Tensors) -> None:
        broken = tensors[UP].clone()
        broken[3, 5] = value
        save({**tensors, UP: broken}, folder)

    return damage


def other_model(folder: Path, tensors: Tensors) -> None:
    llms.build("gpt2", folder)


def half_another_model(folder: Path, tensors: Tensors) -> None:
    torch.manual_seed(0)
    save({**{n: t for n, t in tensors.items() if t.ndim == 1}, "x.y": torch.randn(9, 9)}, folder)


def nothing_shared(folder: Path, tensors: Tensors) -> None:
    save({"x.y": torch.ones(3, 3)}, folder)


def cut(share: float, sharded: bool) -> Callable[[Path, Tensors], None]:
    """Cuts the file, or the second of two shards, within the tensor that has this share of its data before it."""

    def damage(folder: Path, tensors: Tensors) -> None:
        path = folder / "model.safetensors"
        if sharded:
            names = sorted(tensors)
            places = {n: f"part-{1 + (n >= UP)}.safetensors" for n in names}
            for place in set(places.values()):
                save_file({n: tensors[n] for n in names if places[n] == place}, folder / place)
            path.unlink()
            index = folder / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": places}))
            path = folder / "part-2.safetensors"
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[: header + int(share * (len(content) - header))])

    return damage


def first_lost(folder: Path, share: float) -> str:
    """The name of the tensor that lies at this share of a file's data, by the header of the whole file."""
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    at = int(share * (len(content) - 8 - length))
    return next(
        name
        for name, its in header.items()
        if name != "__metadata__" and its["data_offsets"][0] <= at < its["data_offsets"][1]
    )


BAD: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "pickle": (pickled, r"only pickled weights \(pytorch_model\.bin\), which are refused"),
    "shape": (other_shape, rf"{UP} is \(48, 32\) in .*, \(48, 31\) in .*; these are not the same"),
    "nan": (not_finite(math.nan), rf"{UP} has 1 values that are not finite; training diverged"),
    "infinity": (not_finite(-math.inf), rf"{UP} has 1 values that are not finite"),
    "other model": (
        other_model,
        r"share no .* parameter \((transformer\.\S+|lm_head\.weight) is in the first.*not the same architecture",
    ),
    "nothing shared": (
        nothing_shared,
        r"share no floating-point parameter \((lm_head\.weight is in the first, x\.y|x\.y is in the first, lm_)",
    ),
    "little shared": (
        half_another_model,
        r"lm_head\.weight \(58, 32\) \(in the (base|trained checkpoint) only\).*not the same architecture",
    ),
    "cut": (cut(0.6, False), r"so FIRST cannot be read; copy or save the checkpoint again"),
    "last byte": (cut(0.99999, False), r"so FIRST cannot be read"),
    "cut shard": (
        cut(0.01, True),
        rf"part-2\.safetensors is not a complete .* so {UP} cannot be read",
    ),
}


@pytest.mark.parametrize("side", ["base", "trained"])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_line_with_the_tensors_name(case, side, tmp_path):
    """Pickles, other shapes, values that are not finite, other models and cut files are refused, by the tensor's name
    where there is one, by `stream` and by `measure_checkpoint`, which leaves no record."""
    damage, message = BAD[case]
    tensors = llama(tmp_path / "base")
    save(noised(tensors, 1), tmp_path / "trained")
    if "FIRST" in message:
        share = 0.6 if case == "cut" else 0.99999
        message = message.replace("FIRST", re.escape(first_lost(tmp_path / side, share)))
    if case == "shape" and side == "base":
        message = rf"{UP} is \(48, 31\) in .*, \(48, 32\) in "
    damage(tmp_path / side, load_file(tmp_path / side / "model.safetensors"))
    folders = tmp_path / "base", tmp_path / "trained"
    with pytest.raises(RunError) as streamed:
        list(stream(*folders, classify))
    with pytest.raises(RunError) as analysed:
        run(*folders, tmp_path / "out")
    assert str(streamed.value) == str(analysed.value)
    assert re.search(message, str(analysed.value)), str(analysed.value)
    assert "\n" not in str(analysed.value)
    assert not (tmp_path / "out" / "summary.json").exists()
