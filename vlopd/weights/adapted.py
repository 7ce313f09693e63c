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
from vlopd.weights.pairing import paired
from vlopd.weights.reader import Weights


class Adapted(Weights):
    """A source checkpoint with a LoRA adapter merged into it, tensor by tensor, under the source's names."""

    FILE = adapters.WEIGHTS

    def __init__(self, folder: Path, source: Weights):
        refuse_both(folder)
        super().__init__(folder)
        self.source = source
        shapes = {name: super(Adapted, self).shape(name) for name in super().names()}
        updates, whole = adapters.read_adapter(folder, shapes)
        wanted = {u.parameter: u.shape(shapes[u.a], shapes[u.b]) for u in updates}
        wanted |= {parameter: tuple(shapes[tensor]) for parameter, tensor in whole.items()}
        held = {name: tuple(source.shape(name)) for name in source.names()}
        known = {theirs: ours for ours, theirs in paired(held, wanted)[0].items()}
        for name, shape in wanted.items():
            if name not in known:
                raise RunError(f"{folder}: its {name} is no parameter of {source.folder}")
            if held[known[name]] != shape:
                shapes_said = f"{held[known[name]]} in {source.folder}, {shape}"
                raise RunError(
                    f"{known[name]} is {shapes_said} in {folder}; these are not the same model"
                )
        for update in updates:
            refuse_orientation(folder, source, known[update.parameter], update)
        self._updates = {known[u.parameter]: u for u in updates}
        self._whole = {known[parameter]: tensor for parameter, tensor in whole.items()}

    @property
    def adapted(self) -> tuple[str, ...]:
        return tuple(sorted({*self._updates, *self._whole}))

    def names(self) -> set[str]:
        return self.source.names()

    def shape(self, name: str) -> torch.Size:
        return self.source.shape(name)

    def is_floating_point(self, name: str) -> bool:
        return self.source.is_floating_point(name)

    def header(self) -> dict[str, Tensor]:
        return self.source.header()

    def stored(self, name: str) -> str:
        return self.source.stored(name)

    def read(self, name: str, of: Region | None = None) -> Tensor:
        assert of is None, "an adapter has the source's layout"
        base = self.source.read(name)
        if name in self._whole:
            base = super().read(self._whole[name]).to(base.dtype)
        if name in self._updates:
            its = self._updates[name]
            base = adapters.merged(base, its.update(super().read(its.a), super().read(its.b)))
            if not torch.isfinite(base).all():
                raise RunError(
                    f"{self.folder}: {name} is not finite once merged in {base.dtype}; the adapter diverged, or needs "
                    "a source in a wider format"
                )
        return base


def refuse_both(folder: Path) -> None:
    """Raises RunError for a folder that holds a model and an adapter: which of the two is meant cannot be told."""
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            raise RunError(
                f"{folder} holds a model ({name}) and an adapter ({adapters.CONFIG}); move one of them to a folder of "
                "its own"
            )


def refuse_orientation(folder: Path, source: Weights, name: str, update: adapters.LowRank) -> None:
    """Raises RunError for a square matrix that the model stores the other way round than the adapter says.

    PEFT keeps one fan_in_fan_out for all modules; a shape shows where it does not hold, a square one cannot.
    """
    shape = source.shape(name)
    if len(shape) != 2 or shape[0] != shape[1] or "lora_embedding" in update.a:
        return
    config = known_config(source.folder)
    if config is None:
        return
    from vlopd.models.names import classify, parts

    if parts(classify(name), shape, config)[0].transposed != update.transposed:
        raise RunError(
            f"{folder}: {adapters.CONFIG} says fan_in_fan_out = {str(update.transposed).lower()}, but {name} is stored "
            "the other way round; merge it with PEFT first"
        )
