"""Checks of what `distill` is called with: kinds of arguments, a student that was trained before, a foreign mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vlopd.config.recipe import Recipe
from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.train.pair import ModelPair
from vlopd.types import Example

_in_training: WeakSet[nn.Module] = WeakSet()
"""Students that were given to `distill`."""


@runtime_checkable
class Derived(Protocol):
    """A mask that has the digests of what it was made from (vlopd.api.masks: MaskTensors)."""

    inputs: Mapping[str, Any]


def refuse_other_kinds(pair: Any, data: Any, recipe: Any, seed: Any) -> None:
    """Raises ConfigError for an argument of another type, with the function that makes the right one."""
    wrong = {
        "pair": (pair, isinstance(pair, ModelPair), "load_pair(student, teacher) makes one"),
        "data": (
            data,
            isinstance(data, Sized) and not isinstance(data, str | bytes | Mapping | Set),
            "give a sequence of examples, as of load_data(source); list(...) makes one of a generator",
        ),
        "recipe": (
            recipe,
            isinstance(recipe, Recipe),
            "Recipe(train={...}, ...) makes one",
        ),
    }
    for name, (value, is_right, remedy) in wrong.items():
        if not is_right:
            raise ConfigError(f"{name} is a {type(value).__name__}; {remedy}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed = {seed!r}: must be an integer of at least 0")


def refuse_other_rows(data: Sequence[Any]) -> None:
    """Raises ConfigError for data whose first row is not an Example."""
    if not isinstance(data[0], Example):
        raise ConfigError(
            f"data[0] is a {type(data[0]).__name__}, not an Example; load_data(rows, question=..., answer=...) makes "
            "examples of rows"
        )


def refuse_trained(student: LoadedModel) -> None:
    """Raises ConfigError for a student that `distill` was given before: its weights are not its checkpoint's."""
    if student.model in _in_training:
        raise ConfigError(
            f"{student.name} was given to `distill` before, which trains it in place; load the pair again with "
            "load_pair (Trained.save(folder) writes a checkpoint that can be its student)"
        )
    _in_training.add(student.model)


def refuse_other_mask(mask: Any, student: LoadedModel) -> None:
    """Raises ConfigError for a mask that is not one of bool tensors, or was made from another base checkpoint.

    The base is known of what `make_mask` returns; a plain dict of its tensors is used with any base.
    """
    if not isinstance(mask, Mapping):
        raise ConfigError(
            f"mask is a {type(mask).__name__}; give {{parameter: bool tensor}}, as make_mask returns, which reads a "
            'file too: make_mask({"type": "file", "path": ...})'
        )
    for name, marked in mask.items():
        if not isinstance(marked, Tensor) or marked.dtype != torch.bool:
            kind = marked.dtype if isinstance(marked, Tensor) else type(marked).__name__
            raise ConfigError(f"the mask's {name!r} is {kind}, not a torch.bool tensor")
    base = mask.inputs.get("base") if isinstance(mask, Derived) else None
    if base is None or student.folder is None:
        return
    if base != (own := digest_checkpoint(student.folder, whole=True)):
        raise ConfigError(
            f"the mask was made from base checkpoint {base[:12]}, the student {student.name} is {own[:12]}; make it "
            "of this one, or give dict(mask) to use it nevertheless"
        )
