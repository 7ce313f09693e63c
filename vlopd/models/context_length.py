"""How many tokens a model can read: the positions of its language model."""

from __future__ import annotations

from transformers import PretrainedConfig

FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Config fields that hold the number of positions; the first that is there counts."""

EXTENDED = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling whose factor lengthens the context, where the number of positions does not count it yet."""


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens of prompt and completion together that a model takes; None where it has no such limit.

    Of learned positions the table's size, of rotary ones what the model was trained for, lengthened by rotary scaling.
    A sliding window is no limit, and neither are the linear biases (ALiBi) and states (Mamba) of models without
    positions. A vision-language model's is its language model's.
    """
    text = config.get_text_config()
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        return None
    found = (getattr(text, field, None) for field in FIELDS)
    positions = next((n for n in found if isinstance(n, int) and n > 0), None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if positions is None or scaling.get("rope_type", scaling.get("type")) not in EXTENDED:
        return positions
    trained = scaling.get("original_max_position_embeddings") or positions
    return max(positions, int(trained * (scaling.get("factor") or 1)))
