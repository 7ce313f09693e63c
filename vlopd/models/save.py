"""Writes a model as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from vlopd.bits import holds, widest
from vlopd.errors import ConfigError, UserError
from vlopd.models.bars import bars_where_drawn
from vlopd.models.loaded import LoadedModel


def save(
    loaded: LoadedModel, folder: Path, card: str, state: dict[str, Tensor] | None = None
) -> None:
    """Writes a Hugging Face folder: weights (`state` replaces the model's), configs, processor, model card.

    Tensors are saved under the model's parameter names, so that masks, deltas and checkpoints share one naming.
    config.json has the dtype that loads the weights unrounded (`_reload_dtype`), whatever the dtype of the model in
    memory.

    Raises UserError for a tensor of `state` with values that its dtype cannot hold.
    """
    _refuse_overflow(state or {})
    dtype = _reload_dtype(loaded.model, state or loaded.model.state_dict())
    before = loaded.model.config.dtype
    try:
        with bars_where_drawn():
            loaded.model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        loaded.model.config.dtype = before
    _write_dtype(folder / "config.json", dtype)
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def in_original_format(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as checkpoints of its family have them, from those by parameter name."""
    return revert_weight_conversion(model, state)


def original_names(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: its name in checkpoints of its family}, of a family whose checkpoints have every tensor as it is.

    Raises ConfigError for others: some split or stack them.
    """
    names = {}
    for name, parameter in model.named_parameters():
        try:
            found = in_original_format(model, {name: torch.empty_like(parameter, device="meta")})
        except Exception:  # of a conversion that needs others beside it
            found = {}
        if [each.shape for each in found.values()] != [parameter.shape]:
            raise ConfigError(
                f"rollout.engine: checkpoints of {model.config.model_type!r} do not have {name} as the model has it; "
                'set rollout.engine.weights = "whole"'
            )
        names[name] = next(iter(found))
    return names


def _refuse_overflow(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {bad} of {tensor.numel()} values are not finite in {kind}, in which it is to be stored; "
                'set precision.stored = "fp32", or lower the learning rate (or factor) that moved them'
            )


def _reload_dtype(model: PreTrainedModel, state: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype with which transformers loads every tensor of `state` unrounded.

    Tensors that the model class keeps in float32 anyway do not count (float32 router biases beside bfloat16 weights:
    bfloat16).
    """
    stored = {name: t.dtype for name, t in state.items() if t.is_floating_point()}
    present = sorted(set(stored.values()), key=lambda dtype: (dtype.itemsize, str(dtype)))
    for dtype in present:
        plan = model._get_dtype_plan(dtype)
        kept = build_glob_alternation(list(plan))[0] if plan else None
        loaded = {n: torch.float32 if kept and kept.search(n) else dtype for n in stored}
        if all(holds(loaded[n], own) for n, own in stored.items()):
            return dtype
    return widest(torch.float32, *present)


def _write_dtype(path: Path, dtype: torch.dtype) -> None:
    """Sets `dtype` in a config.json and its sub-configs."""

    def put(section: dict[str, Any], top: bool) -> None:
        for key, value in section.items():
            if isinstance(value, dict) and key.endswith("_config"):
                put(value, False)
        for key in {"dtype", "torch_dtype"} & section.keys() | ({"dtype"} if top else set()):
            section[key] = str(dtype).removeprefix("torch.")

    config = json.loads(path.read_text())
    put(config, True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
