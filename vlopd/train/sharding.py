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

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlopd import distributed
from vlopd.config.recipe import Recipe
from vlopd.config.training import AdamW, Muon
from vlopd.errors import ConfigError
from vlopd.train.sparse import (
    Choice,
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
class Shard:
    """This process's part: `rank` of `count`."""

    rank: int
    count: int

    def size(self, n: int) -> int:
        """Entries of a part of n."""
        return -(-n // self.count)

    def own(self, n: int) -> slice:
        """This process's part of n entries; empty for the last processes of a short tensor."""
        size = self.size(n)
        return slice(min(self.rank * size, n), min((self.rank + 1) * size, n))

    def summed(self, flat: Tensor) -> Tensor:
        """[K] of every process -> the sum over processes of this one's part. Collective."""
        parts = list(padded(flat, self.size(len(flat)) * self.count).chunk(self.count))
        found = torch.empty_like(parts[0])
        dist.reduce_scatter(found, parts)
        own = self.own(len(flat))
        return found[: own.stop - own.start]

    def gathered(self, part: Tensor, n: int) -> Tensor:
        """The parts of all processes -> [n], in every process. Collective."""
        size = self.size(n)
        found = part.new_empty(size * self.count)
        dist.all_gather(list(found.chunk(self.count)), padded(part, size))
        return found[:n]

    def norm(self, parts: Iterable[Tensor]) -> float:
        """The norm over all entries of all processes' parts. Collective."""
        own = [part.detach().double().square().sum() for part in parts]
        total = torch.stack(own).sum() if own else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total)
        return math.sqrt(float(total))


def padded(flat: Tensor, size: int) -> Tensor:
    """[n] -> [size], with zeros at the end."""
    return flat if len(flat) == size else nn.functional.pad(flat, (0, size - len(flat)))


class ShardedSlot(Slot):
    """A parameter of whose K trained coordinates this process has the fp32 values of its part.

    where: the K coordinates; None for all. collected: all values, in the first process while they are written to files.
    """

    offload = False

    def __init__(
        self,
        parameter: nn.Parameter,
        where: Listed | Packed | None,
        shard: Shard,
        stored: Tensor | None = None,
    ):
        self.parameter, self.where, self.shard = parameter, where, shard
        self.count = parameter.numel() if where is None else where.count
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
        return self.compact(tensor)[self.shard.own(self.count)]

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
        self.put(self.parameter.data, self.shard.gathered(rounded, self.count))

    def load(self, whole: Tensor) -> None:
        """Takes the values [K], on the host, that `collect` returned, into its part and the parameter."""
        self.values.data.copy_(whole[self.shard.own(self.count)])
        self.put(self.parameter.data, whole.to(self.parameter.device, self.parameter.dtype))

    def put_into(self, tensor: Tensor) -> None:
        assert self.collected is not None, "collected in every process before one of them writes"
        self.put(tensor, self.collected.to(tensor.device))

    def trained(self, tensor: Tensor) -> Tensor:
        return tensor


def collect(shard: Shard, part: Tensor, n: int) -> Tensor | None:
    """The parts of all processes -> [n] in the first process's host memory; None in others. Collective."""
    whole = shard.gathered(part, n)
    return whole.cpu() if shard.rank == 0 else None


class GradientSum:
    """Sums the gradients of one backward pass over processes, and leaves each process its parts.

    All processes add every parameter once a pass, in the same order, with zeros where a process has no gradient (none
    of its rows has a picture, say) or no pass left. late: names of the output layer's parameters, whose gradients come
    in pieces, and which are added at the end of a pass.
    """

    def __init__(self, slots: dict[str, ShardedSlot], late: Sequence[str]):
        self.ready: dict[str, Tensor] = {}
        self.had: set[str] = set()
        """Parameters that had a gradient in this process since `begin`."""
        self.next = 0
        self.use(slots, late)

    def use(self, slots: dict[str, ShardedSlot], late: Sequence[str]) -> None:
        """Sets the parameters."""
        self.slots = slots
        own = [name for name in reversed(slots) if name not in late]
        self.order = [*own, *(name for name in slots if name in late)]
        self.early = len(own)

    def begin(self) -> None:
        """Begins a step."""
        self.had.clear()

    def add(self, name: str, gradient: Tensor) -> None:
        """Takes the gradient [K] of a parameter; sums what is due."""
        if name in self.ready:
            self.ready[name] = self.ready[name] + gradient
        else:
            self.ready[name] = gradient
        self.had.add(name)
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

    def everywhere(self, device: torch.device) -> None:
        """Frees the gradients of parameters that had none in any process since `begin`. Collective."""
        flags = torch.tensor([float(name in self.had) for name in self.order], device=device)
        dist.all_reduce(flags)
        for name, flag in zip(self.order, flags.tolist(), strict=True):
            if not flag:
                self.slots[name].values.grad = None

    def _sum_next(self) -> None:
        name = self.order[self.next]
        slot = self.slots[name]
        gradient = self.ready.pop(name, None)
        if gradient is None:
            gradient = slot.parameter.new_zeros(slot.count)
        # fp32, as a single process adds the gradients of its micro-batches
        slot.accumulate(slot.shard.summed(gradient.to(slot.values.dtype)))
        self.next += 1


class ShardedTrainable(Trainable):
    """A Trainable whose values, gradients and optimizer state are in parts, one a process.

    late: names of the output layer's parameters. All methods that say so are collective; other arguments as there.
    """

    def __init__(
        self,
        model: nn.Module,
        shard: Shard,
        late: Sequence[str],
        mask: Mapping[str, Tensor] | None = None,
        projections: Mapping[str, Projection] | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ):
        self.shard = shard
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
        where: Listed | Packed | None = None
        if marked is not None and not bool(marked.all()):
            on_device = marked.to(parameter.device)
            # every process has all indices, and a part of the rest
            listed = 4 * int(marked.sum()) < marked.numel() / 8
            where = Listed(on_device) if listed else Packed(on_device)
        return ShardedSlot(parameter, where, self.shard, stored)

    def make_hook(
        self, name: str, slot: Slot, projection: Projection | None
    ) -> Callable[[Tensor], None]:
        """As `sparse.collector`, into the sum over processes."""
        owners = weakref.ref(slot), weakref.ref(self.gradients)

        def collect(parameter: Tensor) -> None:
            own, gradients = owners[0](), owners[1]()
            if own is None or gradients is None:
                return
            assert parameter.grad is not None
            dense, parameter.grad = parameter.grad, None
            gradients.add(name, own.gather(dense if projection is None else projection(dense)))

        return collect

    def zero_grad(self) -> None:
        super().zero_grad()
        self.gradients.begin()

    def finish_pass(self) -> None:
        self.gradients.finish()

    def collect(self) -> None:
        for slot in self.sharded.values():
            slot.collected = collect(self.shard, slot.values.data, slot.count)

    def whole(self, name: str, tensor: Tensor) -> Tensor | None:
        found = collect(self.shard, tensor, self.slots[name].count)
        return None if found is None else found.view(self.shape(name))

    def shape(self, name: str) -> torch.Size:
        slot = self.slots[name]
        return slot.parameter.shape if slot.whole else torch.Size([slot.count])

    def part(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[self.shard.own(self.slots[name].count)]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, slot in self.sharded.items():
            slot.load(state[name].reshape(-1))

    def round_to_bf16(self, *stream: str | int, stochastic: bool = False) -> None:
        super().round_to_bf16(*stream, self.shard.rank, stochastic=stochastic)


def refuse_unsharded(recipe: Recipe, is_lora: bool) -> None:
    """Raises ConfigError for what needs whole tensors, or is not written for parts."""
    train, optim = recipe.train, recipe.optim
    eight_bits = isinstance(optim, AdamW) and optim.state_bits == 8
    for name, is_on in {
        "optim.type = 'muon', which needs whole matrices": isinstance(optim, Muon),
        "optim.state_bits = 8": eight_bits,
        "train.offload_optimizer": train.offload_optimizer,
        "train.evidence_every": bool(train.evidence_every),
        "a LoRA": is_lora,
    }.items():
        if is_on:
            raise ConfigError(f"train.sharding = {train.sharding!r} does not go with {name}")


def trainable_of(
    model: PreTrainedModel,
    recipe: Recipe,
    accelerator: Accelerator,
    mask: Mapping[str, Tensor] | None,
    projections: Mapping[str, Projection] | None,
    stored: Mapping[str, Tensor],
) -> Trainable:
    """The trained coordinates, in parts where train.sharding says so and there are several processes."""
    train = recipe.train
    if train.sharding == "none" or accelerator.num_processes == 1:
        offload = train.offload_optimizer
        return Trainable(model, mask, projections, stored=stored, offload=offload)
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    late = [name for name, parameter in model.named_parameters() if id(parameter) in head]
    return ShardedTrainable(model, shard, late, mask, projections, stored)


@contextmanager
def passes(
    trainable: Trainable | None, own: int, accelerator: Accelerator
) -> Iterator[Callable[[], None]]:
    """A context of this process's `own` backward passes, each of which ends by the function that it yields.

    Of sharded values, at the end also of as many as other processes have, so that all take part in every sum, even
    where one fails.
    """
    if not isinstance(trainable, ShardedTrainable):
        yield lambda: None
        return
    most, done = max(distributed.gathered(accelerator, own)), 0

    def end() -> None:
        nonlocal done
        trainable.finish_pass()
        done += 1

    try:
        yield end
    finally:
        trainable.gradients.drop()
        while done < most:
            end()
