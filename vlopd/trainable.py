"""Which coordinates train, and their fp32 values.

The model's own parameters hold the compute precision and never see an optimizer. `Trainable` keeps, for
each parameter that trains, the fp32 values of its trained coordinates only (all of them, or those of a
mask) and a gradient of the same size: as soon as a parameter's dense gradient exists, its trained
coordinates are gathered and the dense gradient is freed. The optimizer sees nothing else, so weight
decay, momentum and clipping cannot reach a frozen coordinate, optimizer state shrinks with density, and
a mask of all ones is dense training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One parameter's trained coordinates: fp32 `values` [K], or of the parameter's shape when all train."""

    parameter: nn.Parameter
    indices: Tensor | None  # [K] int64 into the flattened parameter, ascending; None when all train
    values: nn.Parameter  # fp32; a view of the parameter itself when that is fp32 and all train

    def gather(self, dense: Tensor) -> Tensor:
        return dense if self.indices is None else dense.reshape(-1)[self.indices]

    def write_back(self) -> None:
        """Rounds the values into the model's parameter."""
        if self.values.data_ptr() == self.parameter.data_ptr():
            return
        if self.indices is None:
            self.parameter.data.copy_(self.values.data)
        else:
            flat = self.parameter.data.view(-1)
            flat[self.indices] = self.values.data.to(flat.dtype)


class Trainable:
    """The trained coordinates of a model.

    `mask` maps parameter names to bool tensors of the parameter's shape; a parameter that it does not
    name, or of which it marks nothing, is frozen whole (and autograd skips it). Without a mask all train,
    but for parameters that do not require a gradient beforehand.

    Raises ValueError for a mask that names no parameter of the model or has another shape.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor] | None = None):
        parameters = dict(
            model.named_parameters()
        )  # tied parameters come once, under their first name
        if mask is not None:
            refuse_foreign(mask, parameters)
        self.slots: dict[str, Slot] = {}
        for name, parameter in parameters.items():
            marked = None if mask is None else mask.get(name, torch.zeros(0, dtype=torch.bool))
            trains = parameter.requires_grad and (marked is None or bool(marked.any()))
            parameter.requires_grad_(trains)
            parameter.grad = None
            if trains:
                self.slots[name] = slot = make_slot(parameter, marked)
                parameter.register_post_accumulate_grad_hook(collector(slot))
        self.names = tuple(parameters)  # of the model, whether they train or not
        self.total = sum(p.numel() for p in parameters.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer gets."""
        return (slot.values for slot in self.slots.values())

    @property
    def count(self) -> int:
        """Trained coordinates, K."""
        return sum(slot.values.numel() for slot in self.slots.values())

    def write_back(self) -> None:
        """After an optimizer step: rounds all values into the model."""
        for slot in self.slots.values():
            slot.write_back()

    def zero_grad(self) -> None:
        for slot in self.slots.values():
            slot.values.grad = None

    def state(self) -> dict[str, Tensor]:
        """The fp32 values by parameter name, for a resumable state."""
        return {name: slot.values.data for name, slot in self.slots.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave, and writes it to the model."""
        for name, slot in self.slots.items():
            slot.values.data.copy_(state[name])
        self.write_back()

    def move_towards(self, other: Trainable, share: float) -> None:
        """values += share * (other's - values), and writes them to the model: a moving average of `other`."""
        for name, slot in self.slots.items():
            slot.values.data.lerp_(other.slots[name].values.data, share)
        self.write_back()

    def merged(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The source's tensors with the trained values put in, in the source's stored precision.

        Frozen coordinates are the source's own bits, whatever the compute precision was.
        """
        merged = dict(source)
        for name, slot in self.slots.items():
            tensor = source[name].clone()
            values = slot.values.data.to(tensor.device, tensor.dtype)
            if slot.indices is None:
                tensor.copy_(values)
            else:
                tensor.view(-1)[slot.indices.to(tensor.device)] = values
            merged[name] = tensor
        return merged


def refuse_foreign(mask: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, marked in mask.items():
        if name not in parameters:
            raise ValueError(
                f"the mask names {name!r}, which the model lacks: it is of another model"
            )
        if marked.shape != parameters[name].shape:
            raise ValueError(
                f"the mask's {name!r} has shape {tuple(marked.shape)}, the model's "
                f"{tuple(parameters[name].shape)}: it is of another model"
            )


def make_slot(parameter: nn.Parameter, marked: Tensor | None) -> Slot:
    if marked is None or bool(marked.all()):
        indices, values = None, parameter.data.float()  # shares memory with an fp32 parameter
    else:
        indices = marked.reshape(-1).nonzero()[:, 0].to(parameter.device)
        values = parameter.data.reshape(-1)[indices].float()
    return Slot(parameter, indices, nn.Parameter(values))


def collector(slot: Slot):
    """The hook that moves a dense gradient's trained coordinates to the values, and frees the rest."""

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = slot.gather(parameter.grad).float()
        parameter.grad = None
        if slot.values.grad is None:
            slot.values.grad = gradient
        else:
            slot.values.grad += gradient

    return collect
