"""What changed in a student's weights since they were last sent: the fewest bytes that bring a copy up to date.

Of a partly trained parameter its coordinates are sent once, then their values; of a wholly trained one, the coordinates
that changed in the compute precision with their values, or the whole where that is less. (Of bf16 weights most do not
change in a step: their updates are below half an ulp.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlopd.bits import different
from vlopd.engines.worker.vlopd_worker import PLACES, VALUES, WHOLE, checksum
from vlopd.train.sparse import CompactSlot, Slot, Trainable, gather


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

    def state(self) -> dict[str, Tensor]:
        """All the model's parameters and saved buffers."""
        return tensors_of(self.model)

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
