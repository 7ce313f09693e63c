"""Bytes that sampling needs: keys and values of a sequence, and the sampler's arrays."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from vlopd.config.objective import RolloutConfig
from vlopd.models.loaded import LoadedModel


def sampler_bytes(rollout: RolloutConfig) -> int:
    """Of sampling, for a vocabulary entry and sequence: what draws.pick holds at most, logits included.

    Logits and the waiting times of a large vocabulary (fp32, three arrays while they are made); with a temperature a
    copy, with top_k masses and masks; with top_p all entries sorted (values, int64 indices, their masses in float64),
    which a CPU does only where the nucleus is wide.
    """
    if rollout.top_p < 1:
        return 44
    if rollout.top_k is not None:
        return 25
    return 16 if rollout.temperature == 1 else 20


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, tokens: int = 1) -> int:
    """Of one sequence of `tokens`: keys and values of every attention layer and key-value head.

    A sliding-window or chunked layer keeps its window. The states of linear-attention layers, whose size does not
    depend on `tokens`, are not counted.
    """
    text = config.get_text_config()
    values = text.to_dict()
    heads = values.get("num_key_value_heads") or text.num_attention_heads
    width = values.get("head_dim") or text.hidden_size // text.num_attention_heads
    keys = (values.get("qk_nope_head_dim") or 0) + (values.get("qk_rope_head_dim") or 0)
    both = (keys or width) + (values.get("v_head_dim") or width)  # of latent attention: as cached
    kinds = values.get("layer_types") or ["full_attention"] * text.num_hidden_layers
    windows = {
        "full_attention": tokens,
        "sliding_attention": min(tokens, values.get("sliding_window") or tokens),
        "chunked_attention": min(tokens, values.get("attention_chunk_size") or tokens),
    }
    kept = sum(windows.get(kind, 0 if "linear" in kind else tokens) for kind in kinds)
    return kept * heads * both * dtype.itemsize


def sequence_bytes(loaded: LoadedModel, rollout: RolloutConfig, prompt_tokens: int) -> int:
    """Of sampling one completion: its cache at full length, the sampler's arrays, one layer of the prompt's prefill."""
    text, item = loaded.model.config.get_text_config(), loaded.model.dtype.itemsize
    values = text.to_dict()
    layer = item * (8 * text.hidden_size + 3 * (values.get("intermediate_size") or 0))
    if loaded.model.config._attn_implementation == "eager":
        layer += 2 * (item + 4) * text.num_attention_heads * prompt_tokens
    return (
        cache_bytes(loaded.model.config, loaded.model.dtype, prompt_tokens + rollout.max_new_tokens)
        + sampler_bytes(rollout) * loaded.vocabulary_rows
        + layer * prompt_tokens
    )
