"""Linear layers whose weights are packed for products of few rows: decoding on a CPU in fp32.

A decode step multiplies a few rows by every weight of the model. torch's products then run at half of a core's speed,
oneDNN's with weights in its own layout near all of it. Packing costs a few such products and, while it lasts, a copy of
the weights. The operators are those that torch's inductor emits for frozen weights; they are not public, so without
them nothing is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlopd.models.loaded import LoadedModel

FEW_ROWS = 64
"""Rows up to which packed weights are much faster."""

LEAST_STEPS = 8
"""Decode steps that pay for the packing."""

LEAST_WEIGHTS = 1 << 23
"""Weights from which on a product, and not the call of it, takes the time."""


def linears(loaded: LoadedModel) -> list[nn.Linear]:
    """The model's fp32 linear layers; subclasses, which may do more, are left alone."""
    return [
        module
        for module in loaded.model.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    ]


def pays(loaded: LoadedModel, rows: int, steps: int) -> bool:
    """Whether to pack the weights for so many decode steps of so many rows."""
    return (
        loaded.device.type == "cpu"
        and rows <= FEW_ROWS
        and steps >= LEAST_STEPS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and sum(module.weight.numel() for module in linears(loaded)) >= LEAST_WEIGHTS
    )


@contextmanager
def packed_linears(loaded: LoadedModel, rows: int, steps: int) -> Iterator[None]:
    """A context, without gradients, in which linear layers use packed weights where that pays.

    Results differ from the plain layers' by rounding. Weights must not change inside.
    """
    changed: list[Any] = linears(loaded) if pays(loaded, rows, steps) else []
    try:
        for module in changed:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            module.forward = partial(_linear, weight, module.bias)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
