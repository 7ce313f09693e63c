"""Reads a model's tensors as its checkpoint stores them, before rounding to the compute precision.

transformers casts each tensor of a checkpoint on loading, and renames, stacks or splits some (experts, fused
projections). Here the same renamings and conversions are applied without the cast, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vlopd.bits import holds
from vlopd.models.conversions import Origin, origins
from vlopd.models.loaded import LoadedModel
from vlopd.weights.reader import Weights


class StoredTensors(Mapping[str, Tensor]):
    """The floating-point tensors of a model by parameter name, read lazily from its checkpoint.

    Each is in its stored dtype; a tensor made of several stored ones is in the widest of their dtypes.
    """

    def __init__(self, origins: Mapping[str, Origin], weights: Weights):
        self._origins, self._weights = origins, weights
        self.dtypes = {name: origin.dtype for name, origin in origins.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._origins[name].read(self._weights.read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def not_exact_in(self, held: Mapping[str, torch.dtype]) -> StoredTensors:
        """The tensors that the given dtypes, by name, cannot represent exactly."""
        lost = {n: o for n, o in self._origins.items() if n in held and not holds(held[n], o.dtype)}
        return StoredTensors(lost, self._weights)


@contextmanager
def stored_tensors(loaded: LoadedModel) -> Iterator[StoredTensors]:
    """Opens the checkpoint that a model was loaded from. Raises RunError where it cannot be read."""
    assert loaded.folder is not None, f"{loaded.name} was not loaded from a checkpoint"
    with Weights(loaded.folder) as weights:
        yield StoredTensors(origins(loaded.model, weights.header()), weights)


@contextmanager
def rounded_on_load(loaded: LoadedModel) -> Iterator[Mapping[str, Tensor]]:
    """The stored values of the parameters that loading rounded; empty for a model made in memory."""
    if loaded.folder is None:
        yield {}
        return
    parameters = {name: p.dtype for name, p in loaded.model.named_parameters()}
    with stored_tensors(loaded) as tensors:
        yield tensors.not_exact_in(parameters)
