"""A base checkpoint with a LoRA adapter merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlopd.errors import RunError
from vlopd.models.integrity import INDEX, SINGLE
from vlopd.weights import adapters

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from vlopd.models.layouts import Region
from vlopd.weights.matching import known_config
from vlopd.weights.name_matching import pair_names
from vlopd.weights.reader import Weights


class AdaptedWeights(Weights):
    """A base checkpoint with a LoRA adapter merged into it, tensor by tensor, under the base's names."""

    FILE = adapters.WEIGHTS

    def __init__(self, folder: Path, base: Weights):
        refuse_both(folder)
        super().__init__(folder)
        self.base = base
        shapes = {name: super(AdaptedWeights, self).shape(name) for name in super().names()}
        updates, whole = adapters.read_adapter(folder, shapes)
        wanted = {u.parameter: u.shape(shapes[u.a], shapes[u.b]) for u in updates}
        wanted |= {parameter: tuple(shapes[tensor]) for parameter, tensor in whole.items()}
        held = {name: tuple(base.shape(name)) for name in base.names()}
        known = {theirs: ours for ours, theirs in pair_names(held, wanted)[0].items()}
        for name, shape in wanted.items():
            if name not in known:
                raise RunError(f"{folder}: {name} is not a parameter of {base.folder}")
            if held[known[name]] != shape:
                raise RunError(
                    f"{known[name]} is {held[known[name]]} in {base.folder}, {shape} in {folder}; these are not the "
                    "same model"
                )
        for update in updates:
            _refuse_orientation(folder, base, known[update.parameter], update)
        self._updates = {known[u.parameter]: u for u in updates}
        self._whole = {known[parameter]: tensor for parameter, tensor in whole.items()}

    @property
    def adapted(self) -> tuple[str, ...]:
        return tuple(sorted({*self._updates, *self._whole}))

    def names(self) -> set[str]:
        return self.base.names()

    def shape(self, name: str) -> torch.Size:
        return self.base.shape(name)

    def is_floating_point(self, name: str) -> bool:
        return self.base.is_floating_point(name)

    def header(self) -> dict[str, Tensor]:
        return self.base.header()

    def stored(self, name: str) -> str:
        return self.base.stored(name)

    def read(self, name: str, of: Region | None = None) -> Tensor:
        assert of is None, "an adapter has the base's layout"
        merged_in = self.base.read(name)
        if name in self._whole:
            merged_in = super().read(self._whole[name]).to(merged_in.dtype)
        if name in self._updates:
            its = self._updates[name]
            merged_in = adapters.add_update(
                merged_in, its.update(super().read(its.a), super().read(its.b))
            )
            if not torch.isfinite(merged_in).all():
                raise RunError(
                    f"{self.folder}: {name} is not finite once merged in {merged_in.dtype}; the adapter diverged, or "
                    "needs a base in a wider format"
                )
        return merged_in


def refuse_both(folder: Path) -> None:
    """Raises RunError for a folder that holds both a model and an adapter, which is ambiguous."""
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            raise RunError(
                f"{folder} holds a model ({name}) and an adapter ({adapters.CONFIG}); move one elsewhere"
            )


def _refuse_orientation(folder: Path, base: Weights, name: str, update: adapters.LowRank) -> None:
    """Raises RunError for a square matrix whose stored orientation contradicts the adapter's fan_in_fan_out.

    PEFT keeps one fan_in_fan_out for all modules. A shape mismatch reveals a wrong one, except in a square matrix.
    """
    shape = base.shape(name)
    if len(shape) != 2 or shape[0] != shape[1] or "lora_embedding" in update.a:
        return
    config = known_config(base.folder)
    if config is None:
        return
    from vlopd.models.parameter_names import classify, parts

    if parts(classify(name), shape, config)[0].transposed != update.transposed:
        raise RunError(
            f"{folder}: {adapters.CONFIG} has fan_in_fan_out = {str(update.transposed).lower()}, but {name} is stored "
            "transposed; merge it with PEFT first"
        )
