"""LoRA adapters: merging a PEFT folder gives what PEFT's own merge gives; what is no plain LoRA is refused by name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.families import llms, vlms
from vlopd.checkpoint import RunError
from vlopd.config import GeometryConfig
from vlopd.delta import match_report, stream
from vlopd.geometry.analyse import analyse
from vlopd.models.atlas import classify

ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "all modules": ("llama", {"target_modules": EVERYTHING}),
    "rslora": ("llama", {"target_modules": EVERYTHING, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": EVERYTHING,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 32, r"model\.layers\.0\.self_attn\.q_proj": 7},
        },
    ),
    "patterns of rslora": (
        "llama",
        {
            "target_modules": EVERYTHING,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 9},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head saved whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms trained": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "biases trained": ("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "conv1d and embeddings": (
        "gpt2",
        {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "vision and language": ("llava", {"target_modules": [*ATTENTION, "linear_1", "fc1"]}),
    "convolution": ("llava", {"target_modules": ["patch_embedding", "q_proj"]}),
}


def make_base(family: str, folder: Path) -> Any:
    """Saves a tiny fp32 model; returns it loaded."""
    if family in llms.LLMS:
        llms.LLMS[family](folder)
        return AutoModelForCausalLM.from_pretrained(folder)
    vlms.build(family, folder)
    return AutoModelForImageTextToText.from_pretrained(folder)


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """Wraps a model in PEFT's LoRA with random factors, saves the adapter and returns the wrapped model."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("case", PLAIN)
def test_merged_as_peft_merges(case, tmp_path):
    """Every tensor of base + adapter equals PEFT's merge_and_unload to fp32 rounding, and only adapted ones moved."""
    family, settings = PLAIN[case]
    model = make_base(family, tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = adapt(model, tmp_path / "adapter", **settings)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    seen, moved = set(), set()
    deltas = stream(tmp_path / "base", tmp_path / "adapter", classify)
    for pair in deltas:
        assert torch.equal(pair.source, load_file(tmp_path / "base/model.safetensors")[pair.name])
        merged = theirs[pair.name]
        assert pair.trained.dtype == merged.dtype == torch.float32
        error = float((pair.trained - merged).abs().max() / merged.abs().max())
        assert error < 3e-7, (pair.name, error)
        seen.add(pair.name)
        if pair.delta.any():
            moved.add(pair.name)
    assert seen == theirs.keys() and before.keys() >= seen
    assert moved == set(deltas.report.adapted) and moved
