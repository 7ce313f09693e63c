"""Builds a model on the meta device: shapes without weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from vlopd.errors import ConfigError, first_line
from vlopd.models import families


def meta_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, attention: str | None = "eager"
) -> PreTrainedModel:
    """The config's model on the meta device (names and shapes, no memory). Does not change `config`.

    Every family has eager attention; None: its default.

    Raises ConfigError where no model can be built from it.
    """
    model_class, _ = families.auto_classes(config)
    try:
        return on_meta(model_class, config, dtype, attention)
    except Exception as error:  # a family's own code, given the user's config.json
        raise ConfigError(
            f"no model can be built from the config.json of {config.name_or_path}: {first_line(error)}"
        ) from None


def on_meta(
    model_class: Any,
    config: PretrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = "eager",
) -> PreTrainedModel:
    """As `meta_model`, of a class. Raises what its code raises."""
    with torch.device("meta"):
        model = model_class.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
    return model.eval()
