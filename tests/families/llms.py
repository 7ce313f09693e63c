"""Tiny language models of many families, for the conformance tests.

`LLMS` maps a model type to a function that saves a seeded random model (fp32, some ten thousand
parameters), its generation config and its tokenizer into a folder; no network. All share the tokenizer of
the visual world (58 words). To add a family, add a configuration to `CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlopd.models.load import BUILTIN

SHAPE: dict[str, Any] = dict(
    vocab_size=58,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
NO_DROPOUT: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 8},
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        **SHAPE,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "smollm3": {**SHAPE, "no_rope_layers": [1, 0]},
    "gemma2": {
        **SHAPE,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        **SHAPE,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
    },
    "phi3": {**SHAPE, "vocab_size": 64, "head_dim": 16},  # a padded output layer
    "olmo2": SHAPE,
    "granite": {
        **SHAPE,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "gpt2": {
        **NO_DROPOUT,
        "vocab_size": 58,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "cohere": {**SHAPE, "logit_scale": 0.25},
    "gpt_neox": {**SHAPE, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "gpt_oss": {
        **SHAPE,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "qwen3_5_text": {
        **SHAPE,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    # in no table of families.py: works as any causal language model does
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def build(family: str, folder: Path, seed: int = 0) -> None:
    """Saves a tiny model of the family, with weights scaled up so that inputs matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # 0.2 keeps attention and logits lively without saturating either
                parameter.normal_(std=0.2)
            elif family != "gpt_neox":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN / "shapes-text-student").save_pretrained(folder)


LLMS: dict[str, Callable[..., None]] = {family: partial(build, family) for family in CONFIGS}
