"""Activation checkpointing: layers keep their inputs alone, and run again in the backward pass (arXiv 1604.06174).

transformers' own switch works in training mode only, which would turn dropout on; models here are in evaluation mode,
so that the loss is a function of the weights. torch's `checkpoint` around each layer's forward needs no mode, and no
random state, since there is no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlopd.errors import ConfigError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers to recompute, of language model and vision tower: the outermost that transformers marks as such.

    In a part without marks (a tower of another library), the repeated blocks: members of one class of the outermost
    list or sequence of at least two.
    """
    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    children = list(model.children())
    marked = any(isinstance(each, GradientCheckpointingLayer) for each in model.modules())
    if isinstance(model, (nn.ModuleList, nn.Sequential)) and not marked:
        repeats = len(children) > 1 and len({type(each) for each in children}) == 1
        if repeats and all(any(True for _ in each.parameters()) for each in children):
            return children
    return [layer for child in children for layer in layers_of(child)]


def refuse_without_layers(model: PreTrainedModel) -> None:
    """Raises ConfigError where there is no layer to recompute."""
    if not layers_of(model):
        raise ConfigError(
            f"train.activation_checkpointing: model type {model.config.model_type!r} has no repeated layers to "
            "recompute; leave it out, and lower train.micro_batch"
        )


@contextmanager
def recomputed(
    model: nn.Module, on: bool = True, note: Callable[[Tensor], object] | None = None
) -> Iterator[None]:
    """A context in which forward passes with gradients keep each layer's inputs alone. Nothing if not `on`.

    `note` is called with every tensor among these inputs, which autograd's hooks do not see.
    """
    layers = dict.fromkeys(layers_of(model)) if on else {}  # a shared one once
    own = {layer: vars(layer).get("forward") for layer in layers}
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, note)
    try:
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward  # the class's again
            else:
                layer.forward = forward


def _forward(
    forward: Callable[..., Any],
    note: Callable[[Tensor], object] | None,
    *inputs: Any,
    **named: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    if note is not None:
        for tensor in (*inputs, *named.values()):
            if isinstance(tensor, Tensor):
                note(tensor)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
