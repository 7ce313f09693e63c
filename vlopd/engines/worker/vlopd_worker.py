"""The receiving side of weight updates: a copy of a model's tensors that follows a training.

`vlopd serve` and the tests import this as a module of the package; vLLM as one on its own (`--worker-extension-cls
vlopd_worker.Extension`, with this folder in PYTHONPATH), where nothing else of vlopd is: it imports torch and
safetensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WHOLE, PLACES, VALUES = "whole", "places", "values"
"""Kinds of tensor in an update, as `kind/parameter`: all values; flat indices, which stay; values at the indices."""
FACTOR = 0x9E3779B97F4A7C15 - 2**64
"""An odd 64-bit factor, of the golden ratio."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A 64-bit sum, in hex, over the bits of all tensors, which depends on their places and names' order.

    Exact on every device, and as fast as memory; a copy with one other bit has another.
    """
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        bits = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
        own = 0
        for start in range(0, len(bits), 1 << 24):
            part = bits[start : start + (1 << 24)].long()
            at = torch.arange(start, start + len(part), device=part.device)
            # int64 wraps around; a multiplication by an odd factor loses nothing
            own += int(((part + 1) * (2 * at + 1) * FACTOR).sum())
        total = (total * 31 + own) % 2**64
    return f"{total:016x}"


class WrongUpdate(ValueError):
    """An update that does not fit the weights it is for."""


class WeightCopy:
    """Tensors that follow a training by the updates of train.weight_updates.

    tensors: written in place. resets: whether `reset` can bring back their first values, of which a copy is kept.
    """

    def __init__(self, tensors: Mapping[str, Tensor], resets: bool = True):
        self.tensors, self.resets = dict(tensors), resets
        self.before: dict[str, Tensor] = {}
        """Tensors that were changed, as they were at first, in host memory."""
        self.places: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Back to the first values."""
        for name, tensor in self.before.items():
            self.tensors[name].data.copy_(tensor)
        self.places.clear()

    def apply(self, update: Mapping[str, Tensor]) -> None:
        """Writes an update, as a whole or not at all. Raises WrongUpdate."""
        new = {}
        for label, tensor in update.items():
            kind, _, name = label.partition("/")
            if kind in (PLACES, f"{PLACES}-now"):
                self._refuse_places(name, tensor)
                if kind == PLACES:
                    new[name] = tensor
        writes = list(self._writes(update, self.places | new))
        for name, places, values in writes:
            own = self.tensors[name].data
            if self.resets and name not in self.before:
                self.before[name] = own.to("cpu", copy=True)
            if places is None:
                own.copy_(values)
            else:
                at = places.to(own.device, torch.int64)
                own.view(-1).index_copy_(0, at, values.to(own.device))
        self.places |= new

    def written(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is now where an update that was applied wrote, by its labels: to be compared with its values."""
        found = {}
        for label, (name, places, _) in zip(
            values_of(update), self._writes(update, self.places), strict=True
        ):
            own = self.tensors[name].data
            at = None if places is None else places.to(own.device, torch.int64)
            found[label] = own if at is None else own.view(-1)[at]
        return found

    def checksum(self) -> str:
        """Of all tensors."""
        return checksum(self.tensors)

    def _writes(
        self, update: Mapping[str, Tensor], known: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """(name, flat indices or None for all, values) of an update, checked. known: places by name."""
        for label, tensor in values_of(update).items():
            kind, _, name = label.partition("/")
            if kind == WHOLE:
                self._refuse(name, tensor, self._own(name).shape)
                yield name, None, tensor
            elif kind in (VALUES, f"{VALUES}-now"):
                now = update.get(f"{PLACES}-now/{name}")
                places = known.get(name) if kind == VALUES else now
                if places is None:
                    raise WrongUpdate(f"{name!r}: values without their coordinates")
                self._refuse(name, tensor, places.shape)
                yield name, places, tensor
            else:
                raise WrongUpdate(f"{label!r}: unknown kind")

    def _own(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise WrongUpdate(f"{name!r}: the model has no such parameter")
        return self.tensors[name]

    def _refuse(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        own = self._own(name)
        if tensor.shape != shape or tensor.dtype != own.dtype:
            raise WrongUpdate(
                f"{name!r}: {list(tensor.shape)} of {tensor.dtype} where {list(shape)} of {own.dtype} fit"
            )

    def _refuse_places(self, name: str, places: Tensor) -> None:
        n = self._own(name).numel()
        if places.ndim != 1 or places.dtype not in (torch.int32, torch.int64):
            raise WrongUpdate(f"{name!r}: coordinates are no list of integers")
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < n):
            raise WrongUpdate(f"{name!r}: a coordinate outside of its {n}")


def values_of(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an update that are values, by label."""
    return {label: each for label, each in update.items() if not label.startswith(PLACES)}


class Extension:
    """Methods of vLLM's workers: weights that follow a training, through files that both sides see.

    The copy is in host memory, in the training's names; vLLM's own loader takes its tensors, whatever it fuses, pads or
    shards.
    """

    reload_weights: Callable[..., None]  # of vLLM's worker

    _copy: WeightCopy | None = None
    _held: tuple[str, int] | None = None
    _names: Mapping[str, str] = {}

    def vlopd_take(
        self,
        session: str,
        version: int,
        before: int | None,
        files: list[str],
        names: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Brings the weights of a training to a version, from the version `before`; None: the files have everything.

        names: those of tensors in checkpoints, where they are others. The answer has a checksum of what is now where
        each file wrote, or says `lost` where the version before is not here, or `wrong` why an update does not fit. A
        repeated update is not applied again.
        """
        if before is not None and self._held not in ((session, before), (session, version)):
            return {"lost": True}
        try:
            updates = [load_file(file) for file in files]
            is_here = self._held == (session, version)
            if before is None:
                first = {
                    label.partition("/")[2]: each.clone()
                    for update in updates
                    for label, each in update.items()
                    if label.startswith(f"{WHOLE}/")
                }
                self._copy, self._names = WeightCopy(first, resets=False), names or {}
            assert self._copy is not None
            if before is None or not is_here:
                self._held = None  # until all is done
                for update in updates:
                    self._copy.apply(update)
                tensors = self._copy.tensors.items()
                self.reload_weights(
                    weights_iterator=((self._names.get(n, n), t) for n, t in tensors)
                )
                self._held = (session, version)
            return {"checksums": [checksum(self._copy.written(update)) for update in updates]}
        except Exception as error:  # an answer rather than the end of vLLM
            return {"wrong": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
