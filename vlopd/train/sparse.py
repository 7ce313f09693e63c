"""The trained coordinates of a model and their fp32 values.

The model's own parameters are in the compute precision, and no optimizer updates them. `Trainable` holds, for each
trained parameter, the fp32 values of its trained coordinates only (all of them, or those of a mask) and a gradient of
the same size. The values start from the tensor in the checkpoint, not from its rounding to the compute precision. As
soon as a parameter's dense gradient exists, its trained coordinates are gathered and the dense gradient is freed. The
optimizer has nothing else, so weight decay, momentum and clipping cannot change a frozen coordinate, optimizer state
shrinks with density, and a mask of all ones is dense training, bit for bit.

A partly trained parameter uses the storage of the fewest bytes, see `cheapest`. With `offload`, values (and so
gradients and optimizer state) are in host memory, see offload.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from vlopd.bits import different, pack, positions, rounded_to_bf16, widest
from vlopd.errors import ConfigError, UserError
from vlopd.seeding import generator
from vlopd.train.offload import HOST, Downloads, staged
from vlopd.types import Completions, Prompts
from vlopd.weights.subspace import Projection

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlopd.models.loaded import LoadedModel

Storage = Literal["whole", "listed", "packed", "dense"]


CHUNK = 1 << 20
"""Coordinates whose indices are expanded at once: bounds the temporary memory of a gather."""


class Listed:
    """K coordinates of a flattened tensor by their indices: 4 bytes each (8 past 2^31 coordinates)."""

    def __init__(self, marked: Tensor):
        small = marked.numel() < 1 << 31
        found = positions(pack(marked), marked.numel())
        self.indices = found.to(torch.int32 if small else torch.int64)
        self.count, self.nbytes = len(self.indices), self.indices.nbytes

    def to(self, device: torch.device) -> None:
        """Moves the indices."""
        self.indices = self.indices.to(device)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.count, CHUNK):
            part = slice(start, min(start + CHUNK, self.count))
            yield part, self.indices[part]


class Packed:
    """K of n coordinates of a flattened tensor as n bits."""

    def __init__(self, marked: Tensor):
        self.bits, self.n = pack(marked), marked.numel()
        self.count, self.nbytes = int(marked.sum()), self.bits.nbytes

    def to(self, device: torch.device) -> None:
        """Moves the bits."""
        self.bits = self.bits.to(device)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        done = 0
        for start in range(0, self.n, CHUNK):
            stop = min(start + CHUNK, self.n)
            found = positions(self.bits[start // 8 : (stop + 7) // 8], stop - start)
            if len(found):
                yield slice(done, done + len(found)), found + start
            done += len(found)


def gather(flat: Tensor, where: Listed | Packed) -> Tensor:
    """[n] -> [K], the entries at the coordinates."""
    found = flat.new_empty(where.count)
    for part, chunk in where.chunks():
        torch.index_select(flat, 0, chunk.to(flat.device), out=found[part])
    return found


def scatter(flat: Tensor, where: Listed | Packed, values: Tensor) -> None:
    """Writes [K] values into [n] entries at the coordinates, in place."""
    for part, chunk in where.chunks():
        flat.scatter_(0, chunk.to(flat.device, torch.int64), values[part].to(flat))


def cheapest(n: int, count: int, shared: bool) -> Storage:
    """The storage of `count` trained coordinates of n with the fewest bytes, an AdamW's two moments included.

    listed  4 a trained coordinate for its index, 16 for value, gradient and moments
    packed  a bit a coordinate, 16 a trained one
    whole   all coordinates train: no masking at all
    dense   12 a coordinate for gradient and moments, and the frozen values with their indices; only where the fp32
            values are the parameter itself (`shared`)
    """
    if count == n:
        return "whole"
    index = 4 if n < 1 << 31 else 8
    frozen = n - count
    cost: dict[Storage, float] = {"listed": (16 + index) * count, "packed": n / 8 + 16 * count}
    if shared:
        cost["dense"] = 12 * n + 4 * frozen + min(index * frozen, n / 8)
    return min(cost, key=lambda storage: cost[storage])


def locate(marked: Tensor) -> Listed | Packed:
    """The indices of the marked coordinates, in the smaller storage."""
    n, count = marked.numel(), int(marked.sum())
    return Listed(marked) if cheapest(n, count, False) == "listed" else Packed(marked)


class Slot:
    """A wholly trained parameter: fp32 `values` of its shape, the parameter itself where that is fp32.

    `stored` is the parameter before it was rounded; None where the parameter holds it exactly. With `offload`, the
    values are a copy in host memory.
    """

    def __init__(
        self, parameter: nn.Parameter, stored: Tensor | None = None, offload: bool = False
    ):
        self.parameter, self.offload = parameter, offload
        where = HOST if offload else parameter.device
        # without `stored` and `offload`, shares memory with an fp32 parameter
        held = parameter.data if stored is None else stored
        held = held.to(where, copy=offload or stored is not None)
        self.values = nn.Parameter(widened(held))
        self.count = parameter.numel()

    @property
    def whole(self) -> bool:
        return self.count == self.parameter.numel()

    def gather(self, dense: Tensor) -> Tensor:
        """Gradient entries of the trained coordinates; may alias `dense` and modify it."""
        return dense

    def accumulate(self, gradient: Tensor) -> None:
        """Adds the `gather`ed gradient of a backward pass to the values'."""
        gradient = gradient.to(self.values.dtype)
        if self.values.grad is None:
            self.values.grad = gradient
        else:
            self.values.grad += gradient

    index_bytes = 0
    """Bytes of the indices of trained or frozen coordinates."""

    def rounded(self) -> Tensor:
        """The values; those in host memory rounded to the parameter's dtype, page-locked."""
        return staged(self.values.data, self.parameter) if self.offload else self.values.data

    def write_back(self) -> None:
        """Rounds the values into the model's parameter."""
        if self.values.data_ptr() != self.parameter.data_ptr():
            self.parameter.data.copy_(self.rounded(), non_blocking=self.offload)

    def put_into(self, tensor: Tensor) -> None:
        """Writes the values into a tensor of the parameter's shape; other coordinates keep theirs."""
        tensor.copy_(self.values.data)

    def trained(self, tensor: Tensor) -> Tensor:
        """The entries of trained coordinates in a tensor of the values' shape (a gradient, a moment)."""
        return tensor


class CompactSlot(Slot):
    """A partly trained parameter: fp32 `values` [K] of its trained coordinates."""

    def __init__(
        self,
        parameter: nn.Parameter,
        where: Listed | Packed,
        stored: Tensor | None = None,
        offload: bool = False,
    ):
        self.parameter, self.where, self.offload = parameter, where, offload
        held = gather((parameter.data if stored is None else stored).view(-1), where)
        self.values = nn.Parameter(widened(held.to(HOST if offload else parameter.device)))
        self.count, self.index_bytes = where.count, where.nbytes

    def gather(self, dense: Tensor) -> Tensor:
        return gather(dense.reshape(-1), self.where)

    def write_back(self) -> None:
        values = self.rounded().to(self.parameter.device, non_blocking=self.offload)
        scatter(self.parameter.data.view(-1), self.where, values)

    def put_into(self, tensor: Tensor) -> None:
        scatter(tensor.view(-1), self.where, self.values.data)


class DenseSlot(Slot):
    """A mostly trained fp32 parameter: `values` is the parameter itself.

    The gradient of frozen coordinates is 0, and their updates (weight decay) are undone after every step.
    """

    def __init__(self, parameter: nn.Parameter, marked: Tensor):
        super().__init__(parameter)
        self.off = locate(~marked)
        self.frozen = gather(parameter.data.view(-1), self.off)
        self.count = parameter.numel() - self.off.count
        self.index_bytes = self.off.nbytes

    def gather(self, dense: Tensor) -> Tensor:
        dense = dense.contiguous()
        scatter(dense.view(-1), self.off, torch.zeros_like(self.frozen))
        return dense

    def write_back(self) -> None:
        scatter(self.values.data.view(-1), self.off, self.frozen)
        super().write_back()

    def put_into(self, tensor: Tensor) -> None:
        kept = gather(tensor.view(-1), self.off)
        tensor.copy_(self.values.data)
        scatter(tensor.view(-1), self.off, kept)

    def trained(self, tensor: Tensor) -> Tensor:
        on = torch.ones(tensor.numel(), dtype=torch.bool, device=tensor.device)
        scatter(on, self.off, torch.zeros_like(self.frozen))
        return tensor.reshape(-1)[on]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if stored so; itself if it already is."""
    return tensor.to(widest(tensor.dtype, torch.float32))


def make_slot(
    parameter: nn.Parameter,
    marked: Tensor | None,
    choose: Choice,
    stored: Tensor | None = None,
    offload: bool = False,
) -> Slot:
    n = parameter.numel()
    count = n if marked is None else int(marked.sum())
    shared = parameter.dtype == torch.float32 and stored is None and not offload
    storage = choose(n, count, shared)
    if marked is None or storage == "whole":
        return Slot(parameter, stored, offload)
    marked = marked.to(parameter.device)
    if storage == "dense":
        return DenseSlot(parameter, marked)
    where = Listed(marked) if storage == "listed" else Packed(marked)
    return CompactSlot(parameter, where, stored, offload)


def check_rounding(name: str, parameter: Tensor, stored: Tensor) -> None:
    """Raises UserError where a parameter is not its stored tensor, rounded once to the parameter's dtype."""
    if parameter.is_meta:  # of another process, which checks it
        return
    apart = different(stored.to(parameter.dtype), parameter.detach().cpu())
    if bool(apart.any()):
        raise UserError(
            f"{name}: {int(apart.sum())} of {parameter.numel()} values are not those of the checkpoint that the "
            "model was loaded from; save the changed model and load that"
        )


Idle = Callable[[Prompts, Completions], object]
"""Runs the student forward and backward on a completion that has no loss."""
Choice = Callable[[int, int, bool], Storage]
"""(coordinates, of which train, whether fp32 values can share the parameter's memory) -> storage."""


class Trainable:
    """The trained coordinates of a model.

    `mask` maps parameter names to bool tensors of the parameter's shape; a parameter that it does not name, or
    without a marked coordinate, is frozen (and autograd skips it). Without a mask all train, except parameters that
    do not require a gradient beforehand. `projections`, by matrix name, are applied to the gradients before anything
    else; the optimizer's updates, which scale coordinates separately, may leave the subspace.

    `stored` has, by name, the checkpoint's tensors of the parameters that were rounded when the model was loaded
    (`vlopd.weights.stored.unrounded`): their values start from these, all others from the model.

    `offload` keeps values and gradients in host memory; `wait` before the gradients are read.

    As a context manager, or by `close`, its hooks leave the model at the end; a gradient then stays the model's own.

    Raises ConfigError for a mask that names no parameter of the model or has another shape, and UserError for a
    parameter that is not its stored tensor, rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor] | None = None,
        projections: Mapping[str, Projection] | None = None,
        choose: Choice = cheapest,
        stored: Mapping[str, Tensor] | None = None,
        offload: bool = False,
    ):
        # tied parameters come once, under their first name
        self.model_parameters = dict(model.named_parameters())
        for named in (mask, projections):
            refuse_foreign(named or {}, self.model_parameters)
        self.slots: dict[str, Slot] = {}
        self.downloads = Downloads() if offload else None
        self.hooks: list[RemovableHandle] = []
        for name, parameter in self.model_parameters.items():
            marked = None if mask is None else mask.get(name, torch.zeros(0, dtype=torch.bool))
            if marked is not None and marked.dtype != torch.bool:
                raise ConfigError(f"the mask's {name!r} is {marked.dtype}, not torch.bool")
            trains = parameter.requires_grad and (marked is None or bool(marked.any()))
            parameter.requires_grad_(trains)
            parameter.grad = None
            if trains:
                own = (stored or {}).get(name)
                if own is not None:
                    check_rounding(name, parameter, own)
                self.slots[name] = slot = self.make_slot(parameter, marked, choose, own, offload)
                projection = (projections or {}).get(name)
                if projection is not None:
                    projection = projection.to(parameter.device)
                collect = self.make_hook(name, slot, projection)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        self.names = tuple(self.model_parameters)  # of the model, whether they train or not
        self.total = sum(p.numel() for p in self.model_parameters.values())

    def make_slot(
        self,
        parameter: nn.Parameter,
        marked: Tensor | None,
        choose: Choice,
        stored: Tensor | None,
        offload: bool,
    ) -> Slot:
        """The values of one parameter, some of whose coordinates train."""
        return make_slot(parameter, marked, choose, stored, offload)

    def make_hook(
        self, name: str, slot: Slot, projection: Projection | None
    ) -> Callable[[Tensor], None]:
        """What is done with a parameter's gradient as soon as it exists."""
        return collector(slot, projection, self.downloads)

    def __enter__(self) -> Trainable:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the training: removes the hooks from the model and frees the gradients. The values stay."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.zero_grad()

    def student(self, loaded: LoadedModel) -> LoadedModel:
        """The trained model, for forward passes."""
        return loaded

    def assemble(self) -> None:
        """Before the model is used outside of `passes`. Of sharded weights collective."""

    @contextmanager
    def passes(
        self, batches: Sequence[Any], accelerator: Accelerator, idle: Idle
    ) -> Iterator[Iterable[int]]:
        """A context of forward and backward passes over this process's `batches`: yields their indices in turn.

        Of sharded values collective, since all processes take part in every pass: one without a batch of its own for
        it runs an `idle` one where weights are sharded too.
        """
        yield range(len(batches))

    def clip(self, max_norm: float) -> float:
        """Clips the gradients to a norm over all of them; returns their norm before. Of sharded values collective."""
        return float(nn.utils.clip_grad_norm_(list(self.parameters()), max_norm))

    def collect(self) -> None:
        """Before `merged` and `moved_off_mask`, which the first process calls. Of sharded values collective."""

    def whole(self, name: str, tensor: Tensor) -> Tensor | None:
        """A tensor of the values' shape (a moment, say) -> that of all of them, for a file.

        Of sharded values collective; None in processes other than the first.
        """
        return tensor

    def shape(self, name: str) -> torch.Size:
        """The shape of all values of a parameter."""
        return self.slots[name].values.shape

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `whole`: what this process has of a tensor from a file."""
        return tensor

    def wait(self) -> None:
        """Waits for gradients on their way to host memory, if there are any."""
        if self.downloads is not None:
            self.downloads.finish()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The values, for the optimizer."""
        return (slot.values for slot in self.slots.values())

    @property
    def count(self) -> int:
        """Trained coordinates, K."""
        return sum(slot.count for slot in self.slots.values())

    def write_back(self) -> None:
        """After an optimizer step: rounds all values into the model."""
        for slot in self.slots.values():
            slot.write_back()

    def round_to_bf16(self, *stream: str | int, stochastic: bool = False) -> None:
        """After an optimizer step: rounds all values to bf16, in place; `write_back` is still due.

        Stochastically, each goes to one of its two neighbours with the probability of its nearness, from the named
        random `stream` (on the values' device), so that the mean is the value.
        """
        for name, slot in self.slots.items():
            draws = generator(slot.values.device, *stream, name) if stochastic else None
            slot.values.data.copy_(rounded_to_bf16(slot.values.data, draws))

    def zero_grad(self) -> None:
        if self.downloads is not None:
            self.downloads.drop()
        for slot in self.slots.values():
            slot.values.grad = None

    def state(self) -> dict[str, Tensor]:
        """The fp32 values by parameter name, for a resumable state."""
        return {name: slot.values.data for name, slot in self.slots.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`, and writes it to the model."""
        for name, slot in self.slots.items():
            slot.values.data.copy_(state[name])
        self.write_back()

    def move_towards(self, other: Trainable, share: float) -> None:
        """values += share * (other's - values), and writes them to the model: a moving average of `other`."""
        for name, slot in self.slots.items():
            theirs = other.slots[name].values.data
            slot.values.data.lerp_(theirs.to(slot.values.device), share)
        self.write_back()

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's tensors with the trained values, each rounded once to its tensor's stored precision.

        Frozen coordinates are the base's own bits, whatever the compute precision was, and so are trained ones
        whose rounded value equals the base's (0 and -0 do).
        """
        merged = dict(base)
        for name, slot in self.slots.items():
            rounded = base[name].clone()
            slot.put_into(rounded)
            merged[name] = torch.where(rounded == base[name], base[name], rounded)
        return merged

    def moved_off_mask(self, base: Mapping[str, Tensor]) -> int:
        """The number of untrained coordinates of the model that differ from the base by any bit.

        `base`: the checkpoint's tensors, before they were rounded to the compute precision.
        """
        moved = 0
        for name, parameter in self.model_parameters.items():
            before = base[name].to(parameter.dtype)
            after = parameter.detach().cpu().clone()
            if name in self.slots:  # trained coordinates may differ: the same values into both
                before = before.clone()
                for tensor in (before, after):
                    self.slots[name].put_into(tensor)
            moved += int(different(before, after).sum())
        return moved


def refuse_foreign(
    named: Mapping[str, Tensor] | Mapping[str, Projection], parameters: Mapping[str, nn.Parameter]
) -> None:
    for name, of in named.items():
        if name not in parameters:
            raise ConfigError(
                f"the mask names {name!r}, which the model lacks: it is of another model"
            )
        if isinstance(of, Tensor) and of.shape != parameters[name].shape:
            raise ConfigError(
                f"the mask's {name!r} has shape {tuple(of.shape)}, the model's "
                f"{tuple(parameters[name].shape)}: it is of another model"
            )


def collector(
    slot: Slot, projection: Projection | None = None, downloads: Downloads | None = None
) -> Callable[[Tensor], None]:
    """The hook that moves a dense gradient's trained coordinates to the values, and frees the rest.

    A parameter owns its hooks, beyond the sight of the garbage collector, and a slot its parameter: the hook must not
    own the slot, or the model would never be freed. Without its slot, it leaves the gradient as it is.
    """
    owner = weakref.ref(slot)

    def collect(parameter: Tensor) -> None:
        slot = owner()
        if slot is None:
            return
        assert parameter.grad is not None
        dense, parameter.grad = parameter.grad, None
        gradient = slot.gather(dense if projection is None else projection(dense))
        if downloads is None:
            slot.accumulate(gradient)
        else:
            downloads.start(gradient, slot.accumulate)

    return collect
