"""What changed in a student's weights since they were last sent: the fewest bytes that bring a copy up to date.

Of a partly trained parameter its coordinates are sent once, then their values; of a wholly trained one, the coordinates
that changed in the compute precision with their values, or the whole where that is less. (Of bf16 weights most do not
change in a step: their updates are below half an ulp.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vlopd.bits import INTEGERS, different
from vlopd.train.sparse import CompactSlot, Slot, Trainable, gather

WHOLE, PLACES, VALUES = "whole", "places", "values"
"""Kinds of tensor in an update, as `kind/parameter`: all values; flat indices, which stay; values at the indices."""
FACTOR = 0x9E3779B97F4A7C15 - 2**64
"""An odd 64-bit factor, of the golden ratio."""


def checksum(parameters: Mapping[str, Tensor]) -> str:
    """A 64-bit sum, in hex, over the bits of all tensors, which depends on their places and names' order.

    Exact on every device, and as fast as memory; a copy with one other bit has another.
    """
    total = 0
    for name in sorted(parameters):
        tensor = parameters[name].detach()
        bits = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
        own = 0
        for start in range(0, len(bits), 1 << 24):
            part = bits[start : start + (1 << 24)].long()
            at = torch.arange(start, start + len(part), device=part.device)
            # int64 wraps around; a multiplication by an odd factor loses nothing
            own += int(((part + 1) * (2 * at + 1) * FACTOR).sum())
        total = (total * 31 + own) % 2**64
    return f"{total:016x}"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; shared ones once."""
    saved = model.state_dict()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


class WeightUpdates:
    """Makes the updates of one training, in order. The first has all trained values, whatever the copy holds of them.

    Of wholly trained parameters a copy of what was sent is kept in host memory.
    """

    def __init__(self, trainable: Trainable, model: nn.Module):
        self.trainable, self.model = trainable, model
        self.sent: dict[str, Tensor] = {}
        self.bytes = 0
        """Of the last update."""

    def forget(self) -> None:
        """The next update has everything again."""
        self.sent.clear()

    def next(self) -> dict[str, Tensor]:
        """{kind/parameter: tensor} of what changed since the last call."""
        found: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters())  # of sharded weights as gathered now
        for name, slot in self.trainable.slots.items():
            changes = self._changes(name, slot, parameters[name].detach())
            found |= {f"{kind}/{name}": tensor for kind, tensor in changes}
        self.bytes = sum(tensor.nbytes for tensor in found.values())
        return found

    def checksum(self) -> str:
        """Of all the model's parameters and buffers."""
        return checksum(tensors_of(self.model))

    def _changes(self, name: str, slot: Slot, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        before = self.sent.get(name)
        if isinstance(slot, CompactSlot):
            if before is None:
                places = torch.cat([chunk.cpu() for _, chunk in slot.where.chunks()])
                yield PLACES, places.to(torch.int32 if parameter.numel() < 2**31 else torch.int64)
                self.sent[name] = torch.empty(0)
            yield VALUES, gather(parameter.view(-1), slot.where).cpu()
            return
        now = parameter.cpu()
        if before is None:
            self.sent[name] = now.clone()
            yield WHOLE, now
            return
        places = different(now, before).view(-1).nonzero()[:, 0]
        if not len(places):
            return
        index = torch.int32 if now.numel() < 2**31 else torch.int64
        if len(places) * (now.element_size() + index.itemsize) >= now.nbytes:
            yield WHOLE, now
        else:
            yield f"{PLACES}-now", places.to(index)
            yield f"{VALUES}-now", now.view(-1)[places]
        before.copy_(now)


class WrongUpdate(ValueError):
    """An update that does not fit the weights it is for."""


class WeightCopy:
    """The receiving side: a model whose weights follow, by `WeightUpdates`, and can go back to its checkpoint's."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.before: dict[str, Tensor] = {}
        """Parameters that were changed, as they were at first, in host memory."""
        self.places: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Back to the checkpoint's weights."""
        for name, tensor in self.before.items():
            self.parameters[name].data.copy_(tensor)
        self.places.clear()

    def apply(self, update: Mapping[str, Tensor]) -> None:
        """Writes an update, as a whole or not at all. Raises WrongUpdate."""
        writes: list[tuple[str, Tensor | None, Tensor]] = []
        new: dict[str, Tensor] = {}
        for label, tensor in update.items():
            kind, _, name = label.partition("/")
            parameter = self.parameters.get(name)
            if parameter is None:
                raise WrongUpdate(f"{name!r}: the model has no such parameter")
            if kind == WHOLE:
                self._refuse(name, tensor, parameter.shape)
                writes.append((name, None, tensor))
            elif kind in (PLACES, f"{PLACES}-now"):
                self._refuse_places(name, tensor)
                if kind == PLACES:
                    new[name] = tensor
            elif kind in (VALUES, f"{VALUES}-now"):
                key = f"{PLACES}{kind.removeprefix(VALUES)}/{name}"
                places = update.get(key, self.places.get(name) if kind == VALUES else None)
                if places is None:
                    raise WrongUpdate(f"{name!r}: values without their coordinates")
                self._refuse(name, tensor, places.shape)
                writes.append((name, places, tensor))
            else:
                raise WrongUpdate(f"{label!r}: unknown kind")
        for name, places, tensor in writes:
            own = self.parameters[name].data
            if name not in self.before:
                self.before[name] = own.to("cpu", copy=True)
            if places is None:
                own.copy_(tensor)
            else:
                at = places.to(own.device, torch.int64)
                own.view(-1).index_copy_(0, at, tensor.to(own.device))
        self.places |= new

    def checksum(self) -> str:
        """Of all parameters and buffers, as `WeightUpdates.checksum`."""
        return checksum(tensors_of(self.model))

    def _refuse(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        if tensor.shape != shape or tensor.dtype != self.parameters[name].dtype:
            raise WrongUpdate(
                f"{name!r}: {list(tensor.shape)} of {tensor.dtype} where {list(shape)} of "
                f"{self.parameters[name].dtype} fit"
            )

    def _refuse_places(self, name: str, places: Tensor) -> None:
        n = self.parameters[name].numel()
        if places.ndim != 1 or places.dtype not in (torch.int32, torch.int64):
            raise WrongUpdate(f"{name!r}: coordinates are no list of integers")
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < n):
            raise WrongUpdate(f"{name!r}: a coordinate outside of its {n}")
