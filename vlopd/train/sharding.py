"""Values, gradients and optimizer state in parts, one a process (train.sharding = "state"; arXiv 1910.02054, stage 2).

The model's own weights are whole in every process. Of each parameter's trained coordinates [K], in their order,
process r of n has the r-th part of ceil(K / n). Gradients of a backward pass are summed into their parts, parameter by
parameter in one order everywhere; after an optimizer step the rounded parts are gathered into the weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from vlopd import distributed
from vlopd.train.sparse import (
    Choice,
    Idle,
    Listed,
    Packed,
    Slot,
    Trainable,
    gather,
    scatter,
    widened,
)
from vlopd.weights.subspace import Projection


@dataclass(frozen=True)
class Split:
    """n entries in a row, in parts, of which process r has [bounds[r], bounds[r + 1]); this is process `rank`."""

    rank: int
    bounds: tuple[int, ...]

    @staticmethod
    def evenly(rank: int, count: int, n: int) -> Split:
        """Of n entries, ceil(n / count) a part; fewer or none in the last."""
        size = -(-n // count)
        return Split(rank, tuple(min(k * size, n) for k in range(count + 1)))

    @property
    def n(self) -> int:
        return self.bounds[-1]

    @property
    def own(self) -> slice:
        """This process's part."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def sizes(self) -> list[int]:
        """Entries of each part."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    def summed(self, flat: Tensor) -> Tensor:
        """[n] of every process, split evenly -> the sum over processes of this one's part. Collective."""
        size = max(self.sizes)
        parts = list(padded(flat, size * len(self.sizes)).chunk(len(self.sizes)))
        found = torch.empty_like(parts[0])
        dist.reduce_scatter(found, parts)
        return found[: self.sizes[self.rank]]

    def gathered(self, part: Tensor) -> Tensor:
        """The parts of all processes -> [n], in every process. Collective."""
        size = max(self.sizes)
        found = part.new_empty(size * len(self.sizes))
        dist.all_gather(list(found.chunk(len(self.sizes))), padded(part, size))
        if len(set(self.sizes)) == 1:
            return found
        pieces = zip(found.chunk(len(self.sizes)), self.sizes, strict=True)
        return torch.cat([piece[:own] for piece, own in pieces])


def padded(flat: Tensor, size: int) -> Tensor:
    """[n] -> [size], with zeros at the end."""
    return flat if len(flat) == size else nn.functional.pad(flat, (0, size - len(flat)))


def norm_of_parts(parts: Iterable[Tensor]) -> float:
    """The norm over all entries of all processes' parts. Collective."""
    own = [part.detach().double().square().sum() for part in parts]
    total = torch.stack(own).sum() if own else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    return math.sqrt(float(total))


class ShardedSlot(Slot):
    """A parameter of whose K trained coordinates this process has the fp32 values of its part of `split`.

    where: the K coordinates; None for all. collected: all values, in the first process while they are written to files.
    """

    offload = False

    def __init__(
        self,
        parameter: nn.Parameter,
        where: Listed | Packed | None,
        split: Split,
        stored: Tensor | None = None,
    ):
        self.parameter, self.where, self.split, self.count = parameter, where, split, split.n
        self.index_bytes = 0 if where is None else where.nbytes
        own = self.part(parameter.data if stored is None else stored)
        self.values = nn.Parameter(widened(own.to(parameter.device, copy=True)))
        self.collected: Tensor | None = None

    def compact(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape -> its entries at the trained coordinates, [K]."""
        flat = tensor.reshape(-1)
        return flat if self.where is None else gather(flat, self.where)

    def part(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape -> this process's part of its trained entries."""
        return self.compact(tensor)[self.split.own]

    def put(self, tensor: Tensor, compact: Tensor) -> None:
        """Writes [K] values into a tensor of the parameter's shape."""
        if self.where is None:
            tensor.view(-1).copy_(compact)
        else:
            scatter(tensor.view(-1), self.where, compact)

    def gather(self, dense: Tensor) -> Tensor:
        return self.compact(dense)

    def write_back(self) -> None:
        """Rounds the values into the model's parameter, in every process. Collective."""
        rounded = self.values.data.to(self.parameter.dtype)
        self.put(self.parameter.data, self.split.gathered(rounded))

    def load(self, whole: Tensor) -> None:
        """Takes the values [K], on the host, that `collect` returned, into its part and the parameter."""
        self.values.data.copy_(whole[self.split.own])
        self.put(self.parameter.data, whole.to(self.parameter.device, self.parameter.dtype))

    def put_into(self, tensor: Tensor) -> None:
        assert self.collected is not None, "collected in every process before one of them writes"
        self.put(tensor, self.collected.to(tensor.device))

    def trained(self, tensor: Tensor) -> Tensor:
        return tensor

    def collect(self, part: Tensor) -> Tensor | None:
        """The parts of all processes -> [K] in the first process's host memory; None in others. Collective."""
        whole = self.split.gathered(part)
        return whole.cpu() if self.split.rank == 0 else None


class GradientSum:
    """Sums the gradients of one backward pass over processes, and leaves each process its parts.

    All processes add every parameter once a pass, in the same order, with zeros where a process has no gradient (none
    of its rows has a picture, say) or no pass left. late: names of the output layer's parameters, whose gradients come
    in pieces, and which are added at the end of a pass.
    """

    def __init__(self, slots: dict[str, ShardedSlot], late: Sequence[str]):
        self.ready: dict[str, Tensor] = {}
        self.next = 0
        self.use(slots, late)

    def use(self, slots: dict[str, ShardedSlot], late: Sequence[str]) -> None:
        """Sets the parameters."""
        self.slots = slots
        own = [name for name in reversed(slots) if name not in late]
        self.order = [*own, *(name for name in slots if name in late)]
        self.early = len(own)

    def add(self, name: str, gradient: Tensor) -> None:
        """Takes the gradient [K] of a parameter; sums what is due."""
        if name in self.ready:
            self.ready[name] = self.ready[name] + gradient
        else:
            self.ready[name] = gradient
        while self.next < self.early and self.order[self.next] in self.ready:
            self._sum_next()

    def finish(self) -> None:
        """Ends a pass, or takes part in one that this process does not have. Collective."""
        while self.next < len(self.order):
            self._sum_next()
        assert not self.ready, "a gradient came twice in one pass"
        self.next = 0

    def drop(self) -> None:
        """Forgets the gradients that are not summed yet: their pass failed."""
        self.ready.clear()

    def _sum_next(self) -> None:
        name = self.order[self.next]
        slot = self.slots[name]
        gradient = self.ready.pop(name, None)
        if gradient is None:
            gradient = slot.parameter.new_zeros(slot.count)
        # fp32, as a single process adds the gradients of its micro-batches
        slot.accumulate(slot.split.summed(gradient.to(slot.values.dtype)))
        self.next += 1


class ShardedTrainable(Trainable):
    """A Trainable whose values, gradients and optimizer state are in parts, one a process.

    place: this process and their number. late: names of the output layer's parameters. All methods that say so are
    collective; other arguments as there.
    """

    def __init__(
        self,
        model: nn.Module,
        place: tuple[int, int],
        late: Sequence[str],
        mask: Mapping[str, Tensor] | None = None,
        projections: Mapping[str, Projection] | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ):
        self.place = place
        self.had: set[str] = set()
        """Parameters that had a gradient in this process since `zero_grad`."""
        self.gradients = GradientSum({}, ())  # until the slots are known
        super().__init__(model, mask, projections, stored=stored)
        self.gradients.use(self.sharded, late)

    @property
    def sharded(self) -> dict[str, ShardedSlot]:
        return {n: slot for n, slot in self.slots.items() if isinstance(slot, ShardedSlot)}

    def make_slot(
        self,
        parameter: nn.Parameter,
        marked: Tensor | None,
        choose: Choice,
        stored: Tensor | None,
        offload: bool,
    ) -> Slot:
        """The values of this process's part of one parameter."""
        # every process has all indices, and a part of the rest
        where = located(marked, parameter.device)
        count = parameter.numel() if where is None else where.count
        return ShardedSlot(parameter, where, Split.evenly(*self.place, count), stored)

    def make_hook(
        self, name: str, slot: Slot, projection: Projection | None
    ) -> Callable[[Tensor], None]:
        """As `sparse.collector`, into the sum over processes."""
        owners = weakref.ref(slot), weakref.ref(self)

        def collect(parameter: Tensor) -> None:
            own, trainable = owners[0](), owners[1]()
            if own is None or trainable is None:
                return
            assert parameter.grad is not None
            dense, parameter.grad = parameter.grad, None
            compact = own.gather(dense if projection is None else projection(dense))
            trainable.had.add(name)
            trainable.gradients.add(name, compact)

        return collect

    def zero_grad(self) -> None:
        super().zero_grad()
        self.had.clear()

    def free_unused(self, accelerator: Accelerator) -> None:
        """Frees the gradients of values that had none in any process since `zero_grad`. Collective."""
        own = [float(name in self.had) for name in self.slots]
        flags = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
        for slot, flag in zip(self.slots.values(), flags, strict=True):
            if not flag:
                slot.values.grad = None

    @contextmanager
    def passes(
        self, batches: Sequence[Any], accelerator: Accelerator, idle: Idle
    ) -> Iterator[Iterable[int]]:
        """As there; at the end also takes part in the sums of as many passes as others have, even where one fails."""
        most, done = max(distributed.gathered(accelerator, len(batches))), 0

        def each() -> Iterator[int]:
            nonlocal done
            for k in range(len(batches)):
                yield k
                self.gradients.finish()
                done += 1

        try:
            yield each()
        finally:
            self.gradients.drop()
            while done < most:
                self.gradients.finish()
                done += 1

    def clip(self, max_norm: float) -> float:
        values = list(self.parameters())
        norm = norm_of_parts(value.grad for value in values if value.grad is not None)
        torch.nn.utils.clip_grads_with_norm_(values, max_norm, torch.tensor(norm))
        return norm

    def collect(self) -> None:
        for slot in self.sharded.values():
            slot.collected = slot.collect(slot.values.data)

    def whole(self, name: str, tensor: Tensor) -> Tensor | None:
        found = self.sharded[name].collect(tensor)
        return None if found is None else found.view(self.shape(name))

    def shape(self, name: str) -> torch.Size:
        slot = self.slots[name]
        return slot.parameter.shape if slot.whole else torch.Size([slot.count])

    def part(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[self.sharded[name].split.own]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, slot in self.sharded.items():
            slot.load(state[name].reshape(-1))

    def round_to_bf16(self, *stream: str | int, stochastic: bool = False) -> None:
        super().round_to_bf16(*stream, self.place[0], stochastic=stochastic)


def located(marked: Tensor | None, device: torch.device) -> Listed | Packed | None:
    """The marked coordinates in the smaller storage; None for all."""
    if marked is None or bool(marked.all()):
        return None
    on_device = marked.to(device)
    listed = 4 * int(marked.sum()) < marked.numel() / 8
    return Listed(on_device) if listed else Packed(on_device)
