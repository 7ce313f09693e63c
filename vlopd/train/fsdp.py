"""A student whose weights are in parts too, one a process (train.sharding = "full"; torch's FSDP2, arXiv 2304.11277).

Each layer's weights are gathered for its forward and its backward pass, and freed. Its gradient is summed in fp32, and
each process keeps its rows' part, of which the trained coordinates go to the fp32 values. Everything else (sampling,
evaluation, files) sees whole weights: `assemble` gathers them, `passes` frees them again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from vlopd import distributed
from vlopd.errors import ConfigError
from vlopd.models import families
from vlopd.models.loaded import LoadedModel
from vlopd.train.checkpointing import layers_of
from vlopd.train.rollouts import Batch
from vlopd.train.sharding import ShardedSlot, ShardedTrainable, Split, located, padded
from vlopd.train.sparse import Choice, Idle, Slot, local, widened
from vlopd.types import Completions, Prompts
from vlopd.weights.subspace import Projection


def split_axis(shape: torch.Size, count: int) -> int:
    """The axis whose parts are the processes': the first, or the second where the first has length 1 and it divides."""
    return int(len(shape) > 1 and shape[0] == 1 and shape[1] % count == 0)


def row_split(rank: int, count: int, shape: torch.Size, marked: Tensor | None) -> Split:
    """How FSDP2 splits a parameter, as a split of its flattened coordinates, or of the marked among them."""
    rows = shape[split_axis(shape, count)] if shape else 1
    size, each = -(-rows // count), math.prod(shape) // rows
    bounds = [min(k * size, rows) * each for k in range(count + 1)]
    if marked is not None:
        flat = marked.reshape(-1)
        found = [int(flat[start:stop].sum()) for start, stop in pairwise(bounds)]
        bounds = [sum(found[:k]) for k in range(count + 1)]
    return Split(rank, tuple(bounds))


class RowSlot(ShardedSlot):
    """A parameter of which this process has some rows, and the indices and fp32 values of those rows' coordinates.

    weights: those rows, flat; stored: the whole parameter before it was rounded, if it was. `bind` follows once the
    model's own is split.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        weights: Tensor,
        marked: Tensor | None,
        place: tuple[int, int],
        stored: Tensor | None = None,
    ):
        if marked is not None and bool(marked.all()):
            marked = None
        self.parameter, self.marked = parameter, marked
        self.rows = row_split(*place, parameter.shape, None)
        self.split = row_split(*place, parameter.shape, marked)
        self.count = self.split.n
        own = None if marked is None else marked.reshape(-1)[self.rows.own]
        # on the host until it is known where the rows will be
        self.where = located(own, torch.device("cpu")) if own is not None and len(own) else None
        self.index_bytes = 0 if self.where is None else self.where.nbytes
        exact = weights if stored is None else stored.reshape(-1)[self.rows.own]
        self.values = nn.Parameter(widened(self.compact(exact.cpu()).clone()))
        self.collected: Tensor | None = None

    def bind(self, parameter: nn.Parameter) -> None:
        """Takes the parameter whose part this process has."""
        self.parameter = parameter
        self.values = nn.Parameter(self.values.data.to(parameter.device))
        if self.where is not None:
            self.where.to(parameter.device)

    @property
    def local(self) -> Tensor:
        """This process's rows."""
        return local(self.parameter.data)

    def gather(self, dense: Tensor) -> Tensor:
        return self.compact(local(dense))

    def write_back(self) -> None:
        self.put(self.local, self.values.data.to(self.parameter.dtype))

    def load(self, whole: Tensor) -> None:
        self.values.data.copy_(whole[self.split.own])
        self.write_back()

    def put_into(self, tensor: Tensor) -> None:
        assert self.collected is not None, "collected in every process before one of them writes"
        values = self.collected.to(tensor)
        if self.marked is None:
            tensor.view(-1).copy_(values)
        else:
            tensor.view(-1)[self.marked.reshape(-1)] = values


class CompletionStates(nn.Module):
    """The forward pass of training, as the outermost module that FSDP2 wants: hidden states of completion tokens."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, prompts: Prompts | None = None, completions: Completions | None = None
    ) -> Tensor | None:
        """Without arguments nothing, which is how FSDP2 learns what is outermost."""
        if prompts is None or completions is None:
            return None
        hidden = families.completion_hidden(self.model, prompts, completions)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # a backward pass of the output layer alone ends with the sum of gradients too
            hidden = hidden.detach().requires_grad_()
        return hidden


@dataclass(frozen=True, repr=False)
class ShardedStudent(LoadedModel):
    """A model whose forward passes over completions gather its weights."""

    states: CompletionStates | None = None

    def completion_hidden(self, prompts: Prompts, completions: Completions) -> Tensor:
        assert self.states is not None
        return self.states(prompts, completions)


def rows_of(
    model: PreTrainedModel, place: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """This process's rows of each weight, flat and on the host; the first process has all of them. Collective."""
    rank, count = place
    about = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    if (first := distributed.gathered(distributed.accelerator(), about)[0]) != about:
        odd = next(iter({**first, **about}.items() ^ first.items()), None) or "a name"
        raise ConfigError(
            f"train.sharding = 'full': the processes have other weights, such as {odd}; use 'state'"
        )
    found = {}
    for name, parameter in model.named_parameters():
        split = row_split(rank, count, parameter.shape, None)
        size = max(split.sizes)
        own = torch.empty(size, dtype=parameter.dtype, device=device)
        parts = None
        if rank == 0:
            flat = parameter.detach().reshape(-1)
            pieces = [flat[start:stop] for start, stop in pairwise(split.bounds)]
            parts = [padded(piece.to(device), size) for piece in pieces]
        dist.scatter(own, parts, src=0)
        found[name] = own[: split.sizes[rank]].cpu()
    return found


def shard(model: PreTrainedModel, device: torch.device, count: int) -> CompletionStates:
    """Splits the model among the processes, in place; of one without weights the parts are not set. Collective."""
    mesh = init_device_mesh(device.type, (count,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    is_empty = any(p.is_meta for p in model.parameters())

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(split_axis(parameter.shape, count))

    states = CompletionStates(model)
    for layer in (*layers_of(model), states):
        fully_shard(layer, mesh=mesh, mp_policy=precision, shard_placement_fn=placement)
    if is_empty:
        states.to_empty(device=device)
    for sharded in sharded_modules(states):
        # sums, as the losses are weighted over the whole step
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_reduce_scatter_unused_params(True, recurse=False)
    states()
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    for (
        module
    ) in states.modules():  # `state_dict` would part gathered weights again, in one process
        module._state_dict_pre_hooks.clear()
    return states


def sharded_modules(states: nn.Module) -> list[FSDPModule]:
    return [module for module in states.modules() if isinstance(module, FSDPModule)]


class FullyShardedTrainable(ShardedTrainable):
    """A Trainable of a model whose weights it splits among the processes."""

    def __init__(
        self,
        model: PreTrainedModel,
        place: tuple[int, int],
        device: torch.device,
        mask: Mapping[str, Tensor] | None = None,
        projections: Mapping[str, Projection] | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ):
        weights = rows_of(model, place, device)
        self.weights = {p: weights[name] for name, p in model.named_parameters()}
        super().__init__(model, place, (), mask, projections, stored)
        self.weights.clear()
        self.model = model
        self.states = shard(model, device, place[1])
        self.is_whole = True
        self.part_again()
        self.hooks.clear()  # of parameters that are gone
        self.model_parameters = dict(model.named_parameters())
        for name, parameter in self.model_parameters.items():
            local(parameter.data).view(-1).copy_(weights[name])
        for name, slot in self.rows.items():
            parameter = self.model_parameters[name]
            slot.bind(parameter)
            projection = (projections or {}).get(name)
            if projection is not None:
                projection = projection.to(parameter.device)
            collect = self.make_row_hook(slot, projection)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        self.states()
        for (
            module
        ) in model.modules():  # `state_dict` would part gathered weights again, in one process
            module._state_dict_pre_hooks.clear()
        self.is_whole = False
        self.assemble()
        for name, parameter in model.named_parameters():  # as gathered, the same ones every time
            if name in self.slots:
                mark = self.make_mark(name)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(mark))

    @property
    def rows(self) -> dict[str, RowSlot]:
        return {name: slot for name, slot in self.slots.items() if isinstance(slot, RowSlot)}

    def make_slot(
        self,
        parameter: nn.Parameter,
        marked: Tensor | None,
        choose: Choice,
        stored: Tensor | None,
        offload: bool,
    ) -> Slot:
        """The values of this process's rows of one parameter."""
        return RowSlot(parameter, self.weights[parameter], marked, self.place, stored)

    def make_row_hook(
        self, slot: RowSlot, projection: Projection | None
    ) -> Callable[[Tensor], None]:
        """As `sparse.collector`, of the summed gradient's rows."""
        owner = weakref.ref(slot)

        def collect(parameter: Tensor) -> None:
            own = owner()
            if own is None:
                return
            dense, parameter.grad = parameter.grad, None
            if projection is not None and isinstance(dense, DTensor):
                whole = projection(dense.full_tensor())  # collective, in the same order everywhere
                own.accumulate(own.compact(whole.reshape(-1)[own.rows.own]))
            else:
                assert dense is not None
                own.accumulate(own.gather(dense))

        return collect

    def make_mark(self, name: str) -> Callable[[Tensor], None]:
        """Notes that a parameter has a gradient in this process."""
        owner = weakref.ref(self)

        def mark(parameter: Tensor) -> None:
            if (trainable := owner()) is not None:
                trainable.had.add(name)

        return mark

    def student(self, loaded: LoadedModel) -> LoadedModel:
        own = {each.name: vars(loaded)[each.name] for each in fields(loaded)}
        return ShardedStudent(**own, states=self.states)

    def assemble(self) -> None:
        if self.is_whole:
            return
        self.is_whole = True
        for module in sharded_modules(self.states):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self.model_parameters = dict(self.model.named_parameters())  # as gathered

    def part_again(self) -> None:
        """Frees what `assemble` gathered."""
        if not self.is_whole:
            return
        self.is_whole = False
        states = self.states
        assert isinstance(states, FSDPModule)
        states.reset_iter_state()  # also of the order in which layers ran, which differs between processes
        for module in sharded_modules(states):
            module.set_reshard_after_forward(module is not states, recurse=False)

    @contextmanager
    def passes(
        self, batches: Sequence[Batch], accelerator: Accelerator, idle: Idle
    ) -> Iterator[Iterable[int]]:
        """As there. Passes with pictures come first, so that all processes run the same modules in each."""
        self.part_again()
        with distributed.inseparable(accelerator):
            yield self._aligned(batches, accelerator, idle)
        assert isinstance(self.states, FSDPModule)
        self.states.reset_iter_state()

    def _aligned(
        self, batches: Sequence[Batch], accelerator: Accelerator, idle: Idle
    ) -> Iterator[int]:
        own = [has_pictures(batch) for batch in batches]
        everyones = distributed.gathered(accelerator, own)
        idles = {}
        for kind in (True, False):
            counts = [each.count(kind) for each in everyones]
            if min(counts) < max(counts):
                source = next(rank for rank, count in enumerate(counts) if count)
                mine = source == accelerator.process_index
                offered = offer(batches[own.index(kind)]) if mine else None
                idles[kind] = distributed.gathered(accelerator, offered)[source]
        device, dtype = self.model.device, self.model.dtype
        for kind in (True, False):
            yield from (k for k, has in enumerate(own) if has == kind)
            most = max(each.count(kind) for each in everyones)
            for _ in range(most - own.count(kind)):
                given = idles[kind]
                assert given is not None
                prompts, completions = given
                idle(prompts.to(device, dtype), completions.to(device))


def has_pictures(batch: Batch) -> bool:
    return any(each.student.per_image for each in batch.rendered)


def offer(batch: Batch) -> tuple[Prompts, Completions]:
    """The first completion's prompt and first token, on the host, for processes that have no such batch."""
    prompts = batch.rendered[0].student
    for each in batch.rendered:
        if each.student.per_image:
            prompts = each.student
            break
    taken = batch.completions.take([0]).to(torch.device("cpu"))
    columns = (taken.ids[:, :1], taken.mask[:, :1], taken.logprobs[:, :1], taken.ended)
    return prompts, Completions(*(column.clone() for column in columns))


class RowAverage(ShardedTrainable):
    """The average of a fully sharded student: its values are in the same parts, its weights whole."""

    def make_slot(
        self,
        parameter: nn.Parameter,
        marked: Tensor | None,
        choose: Choice,
        stored: Tensor | None,
        offload: bool,
    ) -> Slot:
        where = located(marked, parameter.device)
        split = row_split(*self.place, parameter.shape, None if where is None else marked)
        return ShardedSlot(parameter, where, split, stored)
