"""Bounds of the sizes in a model's config.json, before a model of that size is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlopd.errors import shown

WIDTH, LAYERS, ROWS, POSITIONS = 2**20, 10_000, 2**24, 2**31
"""Largest width of a layer, and numbers of layers, of tokens of a vocabulary and of positions: tenfold those known."""

LARGEST: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "d_model", "embed_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), WIDTH),
    **dict.fromkeys(("num_heads", "image_size", "patch_size", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("vocab_size", "num_labels"), ROWS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
}
"""Sizes by their name in config.json, and the largest of each; the smallest is 1."""
NAMES = ("dtype", "torch_dtype")
PLACEHOLDERS = ("image_token_id", "image_token_index")
KERNELS = ("attn_implementation", "experts_implementation")
"""Ends of names of settings whose value may name a kernel: OWNER/NAME of the hub, or of this machine."""


def find_bad_size(config: Any, where: str = "") -> str | None:
    """Describes the first size of a config.json, or of a part of it, that no model has; None without one.

    A size is an integer, null for its default, or a list or table of them (by stage, or by side).
    """
    if not isinstance(config, Mapping):
        return None
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in LARGEST:
            if (found := find_bad_size(value, f"{where}{key}.")) is not None:
                return found
            continue
        if key in NAMES and not isinstance(value, str | None):
            return f"{where}{key} is {shown(value)}; it must be the name of a type, as bfloat16"
        if key in PLACEHOLDERS and type(value) is int and value < 0:
            return f"{where}{key} is {value}; it must be an id of the vocabulary"
        most = LARGEST.get(key)
        if most is None or value is None:
            continue
        values = [value]
        if isinstance(value, list | tuple):
            values = list(value)
        elif isinstance(value, Mapping):
            values = list(value.values())
        for each in values:
            if type(each) is not int or not 1 <= each <= most:
                return f"{where}{key} is {shown(each)}; it must be an integer from 1 to {most:,}"
    return None


def find_code_of_the_hub(config: Any, where: str = "") -> str | None:
    """Describes a setting of a config.json that has transformers download and run a kernel; None without one."""
    if not isinstance(config, Mapping):
        return None
    for key, value in config.items():
        if isinstance(value, Mapping) and not key.endswith(KERNELS):
            if (found := find_code_of_the_hub(value, f"{where}{key}.")) is not None:
                return found
        elif key.endswith(KERNELS) and "/" in str(value):
            return f"{where}{key} is {shown(value)}, which is code of the hub"
    return None
