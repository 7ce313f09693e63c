"""Geometry of tiny real models: fused, stacked, transposed and convolution weights; trained pairs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import recipe_of
from tests.families import llms, vlms
from tests.test_geometry import RATIOS, reference
from vlopd.config.analysis import GeometryConfig
from vlopd.data.load import load_data
from vlopd.loop import distill
from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows

CONFIG = GeometryConfig(null_draws=0, ratios=RATIOS)
Values = dict[tuple[str, str], float | None]

MATRICES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "gpt2": {  # Conv1D keeps its weights as [in, out]; 32 wide
        "transformer.h.0.attn.c_attn.weight[q]": lambda t: t[:, :32].T,
        "transformer.h.0.attn.c_attn.weight[k]": lambda t: t[:, 32:64].T,
        "transformer.h.0.attn.c_attn.weight[v]": lambda t: t[:, 64:].T,
        "transformer.h.1.attn.c_proj.weight": lambda t: t.T,
        "transformer.h.1.mlp.c_fc.weight": lambda t: t.T,
        "transformer.h.1.mlp.c_proj.weight": lambda t: t.T,
        "transformer.wte.weight": lambda t: t,
        "transformer.wpe.weight": lambda t: t,
    },
    "phi3": {  # 4 heads of 16, 2 groups of keys and values; gate above up
        "model.layers.0.self_attn.qkv_proj.weight[q]": lambda t: t[:64],
        "model.layers.0.self_attn.qkv_proj.weight[k]": lambda t: t[64:96],
        "model.layers.0.self_attn.qkv_proj.weight[v]": lambda t: t[96:],
        "model.layers.1.mlp.gate_up_proj.weight[gate]": lambda t: t[:48],
        "model.layers.1.mlp.gate_up_proj.weight[up]": lambda t: t[48:],
        "model.layers.1.mlp.down_proj.weight": lambda t: t,
    },
    "qwen3_moe": {  # experts are stored one by one
        "model.layers.0.mlp.experts.3.gate_proj.weight": lambda t: t,
        "model.layers.0.mlp.experts.0.down_proj.weight": lambda t: t,
        "model.layers.0.mlp.gate.weight": lambda t: t,
    },
    "gpt_oss": {  # experts are stacked as [experts, in, out]; gate and up take turns and are left together
        "model.layers.0.mlp.experts.gate_up_proj[2]": lambda t: t[2].T,
        "model.layers.0.mlp.experts.down_proj[0]": lambda t: t[0].T,
    },
    "qwen3_vl_moe": {  # experts are stacked as [experts, out, in], gate above up
        "model.language_model.layers.0.mlp.experts.gate_up_proj[1][gate]": lambda t: t[1, :24],
        "model.language_model.layers.0.mlp.experts.gate_up_proj[1][up]": lambda t: t[1, 24:],
        "model.language_model.layers.0.mlp.experts.down_proj[3]": lambda t: t[3],
        "model.visual.blocks.0.attn.qkv.weight[k]": lambda t: t[16:32],
    },
    "qwen2_vl": {  # a patch embedding over two frames
        "visual.blocks.0.attn.qkv.weight[q]": lambda t: t[:16],
        "visual.blocks.1.attn.qkv.weight[v]": lambda t: t[32:],
        "visual.patch_embed.proj.weight": lambda t: t.reshape(16, 3 * 2 * 8 * 8),
    },
    "llava": {
        "vision_tower.embeddings.patch_embedding.weight": lambda t: t.reshape(16, 3 * 8 * 8),
        "vision_tower.encoder.layers.0.mlp.fc1.weight": lambda t: t,
        "multi_modal_projector.linear_1.weight": lambda t: t,
    },
}
"""The matrix of a row, [out, in], within the stored tensor; written out by hand."""


def build(family: str, folder: Path) -> None:
    (llms if family in llms.LLMS else vlms).build(family, folder)


def tensor_values(folder: Path) -> dict[str, Values]:
    """{name: {(metric, parameter): value}} of a folder's rows about single matrices."""
    found: dict[str, Values] = {}
    for row in read_rows(folder):
        if not row["name"].startswith("["):
            value = float(row["value"]) if row["value"] else None
            found.setdefault(row["name"], {})[row["metric"], row["parameter"]] = value
    return found


def agree(ours: Values, base: Tensor, trained: Tensor) -> int:
    """Every value is the plain float64 one, to 1e-5 of it, ranks and counts exactly; returns how many there were."""
    theirs = reference(base, trained.double() - base.double())
    compared = 0
    for key, value in theirs.items():
        if ours.get(key) is None:
            r = min(base.shape)
            assert key[0] == "top_energy_ratio" and int(key[1].removeprefix("k=")) >= r, key
            continue
        exact = key[0] in ("rank_tol", "low_magnitude_ties")
        assert ours[key] == (value if exact else pytest.approx(value, rel=1e-5, abs=1e-12)), key
        compared += 1
    assert {key for key, value in ours.items() if value is not None} <= theirs.keys()
    return compared


@pytest.mark.parametrize("family", MATRICES)
def test_matrices_within_stored_tensors_are_measured(family, tmp_path):
    """Fused, stacked, transposed and convolution weights give what float64 gives of the matrices that they hold."""
    build(family, tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    torch.manual_seed(3)
    after = {
        n: t + 0.02 * t.std() * torch.randn_like(t) for n, t in before.items() if t.numel() > 1
    }
    (tmp_path / "after").mkdir()
    save_file(after, tmp_path / "after" / "model.safetensors")
    folders = (tmp_path / "before", tmp_path / "after", tmp_path / "out")
    measure_checkpoint(*folders, CONFIG, {}, progress=False, workers=1)
    found = tensor_values(tmp_path / "out")
    for name, matrix in MATRICES[family].items():
        stored = re.sub(r"(\[\w+\])+$", "", name)
        base, trained = matrix(before[stored]), matrix(after[stored])
        assert agree(found[name], base, trained) > 80, name
    covered = {re.sub(r"(\[\w+\])+$", "", name) for name in found}
    assert covered == before.keys()


def test_a_trained_pair_agrees_with_float64(kind, folders, make_pair, make_config, tmp_path):
    """Every matrix of a student that was distilled for some AdamW steps and stored in bf16 has its float64 values."""
    train = {"steps": 5, "prompts_per_step": 4}
    config = make_config(kind, optim={"learning_rate": 1e-4}, train=train)
    pair = make_pair(kind, optim={"learning_rate": 1e-4}, train=train)
    distill(pair, load_data(config.data, 20), recipe_of(config), tmp_path / "arm")
    base, trained = folders[kind, "student"], tmp_path / "trained"
    pair.student.model.bfloat16().save_pretrained(trained)
    measure_checkpoint(base, trained, tmp_path / "out", CONFIG, {}, progress=False, workers=1)

    before, after = (load_file(folder / "model.safetensors") for folder in (base, trained))
    found = tensor_values(tmp_path / "out")
    matrices = {name: tensor for name, tensor in before.items() if tensor.ndim in (2, 4)}
    assert len(matrices) > 14 and {name.split("[")[0] for name in found} == before.keys()
    for name, tensor in matrices.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert 0 < float((tensor != after[name]).double().mean()) < 1, name
        assert agree(found[name], tensor.flatten(1), after[name].flatten(1)) > 80, name
