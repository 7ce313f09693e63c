"""A model's context length: the number of positions of its language model."""

from __future__ import annotations

from transformers import PretrainedConfig

FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Config fields for the number of positions; the first present is used."""

EXTENDED = ("linear", "dynamic", "yarn")
"""Types of rotary scaling whose factor extends the context, where the number of positions does not include it yet."""


def context_length(config: PretrainedConfig) -> int | None:
    """Maximum tokens of prompt and completion together; None without a limit.

    For learned positions the table's size; for rotary ones the trained length, extended by rotary scaling. A sliding
    window is no limit, and models without positions (ALiBi, Mamba) have none. For a vision-language model, that of its
    language model.
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
