"""The size of a key-value cache."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of one token: keys and values of every layer and key-value head; windows are ignored."""
    text = config.get_text_config()
    values = text.to_dict()
    heads = values.get("num_key_value_heads") or text.num_attention_heads
    width = values.get("head_dim") or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize
