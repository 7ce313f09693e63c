"""Maps each tensor of a loaded model to the checkpoint tensors it is converted from, as transformers does.

Follows `transformers.core_model_loading`: a stored name is renamed and then belongs to at most one converter, which
stacks, concatenates, splits or permutes the tensors it collects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from vlopd.bits import widest

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Origin:
    """The stored tensors that one model tensor is made of, and the conversion."""

    name: str  # of the model's tensor
    stored: tuple[tuple[str, str], ...]  # (name in the checkpoint, the converter's pattern for it)
    dtype: torch.dtype  # the narrowest that holds all of them
    converter: WeightConverter | None = None
    first: str = ""  # name of the first tensor that the converter makes, its key in transformers
    model: Any = None

    def read(self, read: Read) -> Tensor:
        """The model's tensor, in `dtype`; `read` returns stored tensors by name."""
        if self.converter is None:
            return read(self.stored[0][0])
        return self.convert(read)[self.name]

    def convert(self, read: Read) -> dict[str, Tensor]:
        """All tensors that the converter makes, by model name."""
        assert self.converter is not None
        converter = deepcopy(self.converter)
        for key, pattern in self.stored:
            converter.add_tensor(self.first, key, pattern, read(key).to(self.dtype))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def origins(model: PreTrainedModel, header: Mapping[str, Tensor]) -> dict[str, Origin]:
    """{name in the model: its origin} for every tensor of `header` that the model uses.

    `header`: tensors on the meta device by checkpoint name, with stored shapes and dtypes. A tied parameter that is
    stored once is found under all of its names, except in a model on the meta device, which has no data pointers.
    """
    state = model.state_dict()
    used = getattr(model, "_weight_conversions", None) or []
    renamings = [each for each in used if isinstance(each, WeightRenaming)]
    converters = [each for each in used if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, Origin] = {}
    collected: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    prefix = model.base_model_prefix
    for key in sorted(header, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is None:
            found[name] = Origin(name, ((key, key),), header[key].dtype)
        else:
            _, keys = collected.setdefault(name, (by_pattern[pattern], []))
            keys.append((key, pattern))
    for first, (converter, keys) in collected.items():
        dtype = widest(*(header[key].dtype for key, _ in keys))
        whole = Origin(first, tuple(keys), dtype, converter, first, model)
        for name in whole.convert(header.__getitem__):
            if name in state:
                found[name] = Origin(name, whole.stored, dtype, converter, first, model)
    by_place = {state[name].data_ptr(): origin for name, origin in found.items()}
    for name, tensor in state.items():
        if name in found or tensor.is_meta:
            continue
        if tensor.data_ptr() in by_place and tensor.numel():
            found[name] = by_place[tensor.data_ptr()]
    return found
