"""Bounds of the numbers in a model's JSON files, before a model of that size is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlopd.errors import shown

WIDTH, LAYERS, ROWS, POSITIONS = 2**20, 10_000, 2**24, 2**31
"""Largest width of a layer, and numbers of layers, of tokens of a vocabulary and of positions: tenfold those known."""


class Bounds(NamedTuple):
    """Of a number, both included."""

    low: float
    high: float
    integer: bool = True

    def hold(self, value: Any) -> bool:
        if self.integer and isinstance(value, float) and value.is_integer():
            value = int(value)  # as some configs have it
        types = (int,) if self.integer else (int, float)
        return type(value) in types and self.low <= value <= self.high  # NaN is not

    def __str__(self) -> str:
        form = "," if self.integer else "g"
        kind = "an integer" if self.integer else "a number"
        return f"{kind} from {self.low:{form}} to {self.high:{form}}"


BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "n_embd", "d_model", "embed_dim"), Bounds(1, WIDTH)
    ),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), Bounds(1, WIDTH)),
    **dict.fromkeys(("num_heads", "image_size", "patch_size", "out_hidden_size"), Bounds(1, WIDTH)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "depth"), Bounds(1, LAYERS)),
    **dict.fromkeys(("vocab_size", "num_labels"), Bounds(1, ROWS)),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), Bounds(1, POSITIONS)),
    # of a processor, sizes in pixels of a side, or of the area
    **dict.fromkeys(("size", "crop_size"), Bounds(1, POSITIONS)),
    "num_additional_image_tokens": Bounds(0, WIDTH),
    "head_dim": Bounds(0, WIDTH),  # 0 of attention without rotation
    **dict.fromkeys(("image_std", "rescale_factor", "rope_theta"), Bounds(1e-12, 1e12, False)),
    "image_mean": Bounds(-1e6, 1e6, False),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Bounds(0, 1, False)),
}
"""Of the numbers in config.json and a processor's files, by their names."""
NAMES = ("dtype", "torch_dtype")
PLACEHOLDERS = ("image_token_id", "image_token_index")
KERNELS = ("attn_implementation", "experts_implementation")
"""Ends of names of settings whose value may name a kernel: OWNER/NAME of the hub, or of this machine."""


def find_bad_number(config: Any, where: str = "") -> str | None:
    """Describes the first number of a model's JSON file, or of a part of it, that no model has; None without one.

    It may be null for its default, or a list or table of numbers (by stage, channel or side).
    """
    if not isinstance(config, Mapping):
        return None
    for key, value in config.items():
        bounds = BOUNDS.get(key)
        if isinstance(value, Mapping) and bounds is None:
            if (found := find_bad_number(value, f"{where}{key}.")) is not None:
                return found
            continue
        if key in NAMES and not isinstance(value, str | None):
            return f"{where}{key} is {shown(value)}; it must be the name of a type, as bfloat16"
        if key in PLACEHOLDERS and type(value) is int and value < 0:
            return f"{where}{key} is {value}; it must be an id of the vocabulary"
        if bounds is None or value is None:
            continue
        values = [value]
        if isinstance(value, list | tuple):
            values = list(value)
        elif isinstance(value, Mapping):
            values = [its for its in value.values() if its is not None]
        for each in values:
            if not bounds.hold(each):
                return f"{where}{key} is {shown(each)}; it must be {bounds}"
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
