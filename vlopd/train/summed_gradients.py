"""Adding up the gradients of a head over chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SummedGradients(TorchFunctionMode):
    """Adds up the gradients of trained weights [V, H] over several calls of a linear map, and then back-propagates
    their sums: a weight's hooks run once, and its gradient is added to in place rather than written for each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and torch.is_grad_enabled():
            weight, bias = args[1], args[2] if len(args) > 2 else None
            if weight.requires_grad and weight.is_leaf and bias is None and args[0].dim() == 2:
                return _SummedLinear.apply(args[0], (weight, self.sums))
        return func(*args, **(kwargs or {}))

    def backward(self) -> None:
        """Passes the sums on to the weights, whose hooks run."""
        while self.sums:
            weight, total = self.sums.popitem()
            weight.backward(total)


class _SummedLinear(torch.autograd.Function):
    """torch.nn.functional.linear [N, H] -> [N, V], whose weight's gradient is added to `sums`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight_and_sums: tuple[Tensor, dict[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.sums = weight_and_sums  # in a tuple, autograd does not see the weight
        return torch.nn.functional.linear(inputs, ctx.weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (inputs,), (gradient,) = ctx.saved_tensors, upstream
        if ctx.weight in ctx.sums:
            ctx.sums[ctx.weight].addmm_(gradient.t(), inputs)
        else:
            ctx.sums[ctx.weight] = gradient.t().mm(inputs)
        return gradient.mm(ctx.weight), None
