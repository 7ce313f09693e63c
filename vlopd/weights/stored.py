"""A model's tensors as its checkpoint stores them: every value before it is rounded to the compute precision.

transformers casts each tensor of a checkpoint while it loads, and some of them it renames, stacks or splits (experts,
fused projections). Here the same names and conversions are followed without the cast, one tensor at a time.
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


class Stored(Mapping[str, Tensor]):
    """The floating-point tensors of a model by its own names, read from its checkpoint when asked for.

    Each comes in its stored dtype; one that is made of several stored tensors in the widest of theirs.
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

    def beyond(self, held: Mapping[str, torch.dtype]) -> Stored:
        """Those that the given dtypes, by name, cannot represent exactly."""
        lost = {n: o for n, o in self._origins.items() if n in held and not holds(held[n], o.dtype)}
        return Stored(lost, self._weights)


@contextmanager
def stored_tensors(loaded: LoadedModel) -> Iterator[Stored]:
    """Opens the checkpoint that a model was loaded from. Raises RunError where it cannot be read."""
    assert loaded.folder is not None, f"{loaded.name} was not loaded from a checkpoint"
    with Weights(loaded.folder) as weights:
        yield Stored(origins(loaded.model, weights.header()), weights)


@contextmanager
def unrounded(loaded: LoadedModel) -> Iterator[Mapping[str, Tensor]]:
    """The parameters that were rounded when the model was loaded, as stored; none for a model made in memory."""
    if loaded.folder is None:
        yield {}
        return
    parameters = {name: p.dtype for name, p in loaded.model.named_parameters()}
    with stored_tensors(loaded) as tensors:
        yield tensors.beyond(parameters)
