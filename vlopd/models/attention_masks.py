"""Attention masks of decode steps, prepared once for all of a completion's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

SLICED = {"full_attention": DynamicLayer, "sliding_attention": DynamicSlidingWindowLayer}
"""Layer types whose decode mask is a slice of the padding mask, with their cache layers."""


def prepare(model: PreTrainedModel, cache: Cache, padding: Tensor) -> Tensor | None:
    """[B, T] padding mask -> [B, 1, 1, T] mask of one query that follows T - 1 tokens, for `at_step` to slice.

    None where the model's attention or cache has no such mask; what it accepts is for a conformance test to find.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    known = (*SLICED.values(),)
    if attention not in ("sdpa", "eager") or not all(isinstance(x, known) for x in cache.layers):
        return None
    if not set(getattr(config, "layer_types", None) or ()) <= SLICED.keys():
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[attention](
        batch_size=len(padding),
        q_length=1,
        kv_length=padding.shape[1],
        q_offset=padding.shape[1] - 1,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=padding.bool(),
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=config,
        device=padding.device,
    )


def at_step(model: PreTrainedModel, cache: Cache, prepared: Tensor) -> Any:
    """The slices of a prepared mask that the cache's layers need for the next token: views, in the model's form."""

    def of(layer: Any) -> Tensor:
        length, offset = layer.get_mask_sizes(1)
        return prepared[..., offset : offset + length]

    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types is None:
        return of(cache.layers[0])
    return {kind: of(layer) for kind, layer in dict(zip(types, cache.layers, strict=False)).items()}


def needs_none(model: PreTrainedModel, padding: Tensor) -> bool:
    """Whether a decode step needs no mask: nothing is padded, and the attention does without. Looks at the device."""
    return model.config.get_text_config()._attn_implementation == "sdpa" and bool(
        torch.all(padding != 0)
    )
