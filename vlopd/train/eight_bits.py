"""AdamW whose moments are stored in 8 bits, in blocks of 256 (arXiv 2110.02861).

A block of 256 values has a scale, its largest magnitude, in fp32; each value divided by it is stored as the nearest of
256 levels, 1.02 bytes a value in all. Levels are dense near 0 ("dynamic tree", section 1.3 there): after z leading zero
bits the rest are equal steps of a decade, so that the relative precision falls slowly from 1 down to 1e-7. A second
moment that is not 0 is never stored as 0, where the step would be divided by eps alone (arXiv 2309.01507).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BLOCK = 256
"""Values with a common scale."""
BYTES = 1 + 4 / BLOCK
"""Of one stored value."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The first is signed, the second not."""
SCALES = tuple(f"{name}_scales" for name in MOMENTS)
"""Their names in the optimizer's state; not finite where a moment is not."""


@cache
def levels(signed: bool) -> Tensor:
    """The 256 levels in ascending order, in [-1, 1] or [0, 1], fp32."""
    bits = 7 - signed  # left for the steps where no bit is zero
    decades = []
    for zeros in range(7):
        steps = 1 << (bits - zeros)
        decades.append((0.1 + 0.9 * (torch.arange(steps).double() + 0.5) / steps) * 10.0**-zeros)
    positive = torch.cat(decades)
    every = [positive, torch.tensor([0.0, 1.0])] + ([-positive] if signed else [])
    return torch.cat(every).sort().values.float()


def encoded(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Values of any shape -> (codes of that shape, uint8; scales [blocks], fp32)."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    table = levels(signed).to(values.device)
    ratios = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(ratios, (table[1:] + table[:-1]) / 2)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).view(-1)[: len(flat)].view(values.shape), scales


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The fp32 values of the codes."""
    values = levels(signed).to(codes.device)[codes.flatten().int()]
    return (values * scales.repeat_interleave(BLOCK)[: len(values)]).view(codes.shape)


def with_moments(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with its moments decoded; any other as it is."""
    if "exp_avg_codes" not in state:
        return state
    found = {
        name: decoded(state[f"{name}_codes"], state[f"{name}_scales"], signed)
        for name, signed in zip(MOMENTS, (True, False), strict=True)
    }
    return {"step": state["step"], **found}


class AdamW8Bit(torch.optim.Optimizer):
    """torch's AdamW, one parameter at a time: its moments are decoded before its update and encoded after it."""

    def __init__(self, groups: Any, **defaults: Any):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for values in group["params"]:
                if values.grad is None:
                    continue
                state = self.state[values]
                if state:
                    now = with_moments(state)
                else:
                    zeros = {name: torch.zeros_like(values) for name in MOMENTS}
                    now = {"step": torch.zeros((), device=values.device), **zeros}
                adamw(
                    [values],
                    [values.grad],
                    [now["exp_avg"]],
                    [now["exp_avg_sq"]],
                    [],
                    [now["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                state["step"] = now["step"]
                for name, signed in zip(MOMENTS, (True, False), strict=True):
                    codes, scales = encoded(now[name], signed)
                    state[f"{name}_codes"], state[f"{name}_scales"] = codes, scales

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which casts all state to the values' dtype; codes are integers below 256, exact in any."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[f"{name}_codes"] = state[f"{name}_codes"].to(torch.uint8)
