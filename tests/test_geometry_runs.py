"""The geometry of pairs and of runs: names and ties, going on after a kill, large matrices, overlap, trajectories, and
checkpoints that cannot be read."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import llms
from tests.test_geometry import RATIOS, orthogonal, reference
from vlopd.checkpoint import RunError, read_json
from vlopd.config import GaussianNull, GeometryConfig, PermutedNull, SignFlippedNull
from vlopd.geometry.analyse import analyse, read_rows
from vlopd.geometry.overlap import overlap
from vlopd.geometry.trajectory import trajectory

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


def run(source: Path, trained: Path, out: Path, config: GeometryConfig = QUICK, workers: int = 1):
    analyse(source, trained, out, config, {"test": 1}, progress=False, workers=workers)
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
    """Tensors under another prefix are matched, listed as aliases, and measured under the source's names."""
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


@pytest.mark.parametrize("stored", ["source", "trained", "both", "neither"])
def test_a_tied_head_is_counted_once(stored, tmp_path):
    """A copy of the embedding that one side stores as its head changes no number; match.json calls it tied."""
    llms.build("qwen2", tmp_path / "before")  # ties its head
    before = load_file(tmp_path / "before" / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in before
    after = noised(before, 2)
    expected = run(tmp_path / "before", save(after, tmp_path / "after"), tmp_path / "plain")
    for side, tensors in (("source", before), ("trained", after)):
        if stored in (side, "both"):
            tensors[head] = tensors[embedding].clone()
    folders = save(before, tmp_path / "source"), save(after, tmp_path / "trained")
    (tmp_path / "source" / "config.json").write_text((tmp_path / "before/config.json").read_text())
    rows = run(*folders, tmp_path / "out")
    report = read_json(tmp_path / "out" / "match.json")
    if stored == "both":  # two parameters by every account
        assert head in report["matched"] and report["tied"] == []
        return
    assert rows == expected
    assert report["tied"] == ([] if stored == "neither" else [head])
    assert report["missing"] == report["extra"] == []


@pytest.mark.parametrize("untied", ["source", "trained"])
def test_a_head_that_was_trained_apart_has_its_own_row(untied, tmp_path):
    """Where one side's head is no copy of its embedding, its partner is the other side's embedding."""
    llms.build("qwen2", tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    after = noised(before, 2)
    own = before if untied == "source" else after
    own[head] = own[embedding] + 0.05 * torch.randn_like(own[embedding])
    folders = save(before, tmp_path / "source"), save(after, tmp_path / "trained")
    rows = run(*folders, tmp_path / "out")
    first = before[head if untied == "source" else embedding].double()
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
    with pytest.raises(RunError, match=last):
        run(root / "before", root / "after", root / "out", config)
    assert not (root / "out" / "summary.json").exists()
    assert len(list((root / "out" / "partial").glob("*.npz"))) == len(before) - 1
    return after


def test_a_killed_analysis_goes_on(tmp_path):
    """What was measured before the end is not measured again, and the tables are those of one run."""
    before = llama(tmp_path / "before")
    config = GeometryConfig(null_draws=2, ratios=(0.1,))
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
    config = GeometryConfig(null_draws=1, ratios=(0.1,))
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
    source = orthogonal(m, min(m, n)) @ spectrum.diag() @ orthogonal(n, min(m, n)).T
    update = 1e-5 * torch.randn(m, n)
    if kind == "directions":
        sizes = 1e-3 * torch.arange(1, 41).double() ** -0.5
        update = update + orthogonal(m, 40) @ sizes.diag() @ orthogonal(n, 40).T
    before = {"layers.0.mlp.up_proj.weight": source.float(), "layers.0.norm.weight": torch.ones(9)}
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
