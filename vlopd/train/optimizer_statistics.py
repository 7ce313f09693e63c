"""Optimizer statistics of a step: why AdamW and SGD move weights differently.

For each (component, module) and for all of them together, over trained coordinates (as in arXiv 2606.13657 and
2602.07729):

    momentum_alignment       cos(m, g): the first moment after the update against the step's (clipped) gradient
    sqrt_v_variation         standard deviation over mean of sqrt(v): the spread of the coordinates' step sizes
    unmoved_fp32_fraction    coordinates whose value this update did not change
    unmoved_bf16_fraction    the same after rounding to bf16, as a checkpoint stored in bf16 shows
    update_rms               root mean square of the update
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlopd.models import parameter_names
from vlopd.train.eight_bits import with_moments
from vlopd.train.optimizers import Optimizers
from vlopd.train.sparse import Trainable

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
MOMENTS = (*FIRST_MOMENTS, *SECOND_MOMENTS)
"""Names in the state of torch's and timm's optimizers."""


class UpdateStatistics:
    """Statistics of one update: made before it, which copies the trained values; `rows` after it."""

    def __init__(self, trainable: Trainable):
        self.before = {name: values.clone() for name, values in trainable.state().items()}

    def rows(self, step: int, trainable: Trainable, optimizer: Optimizers) -> list[dict[str, Any]]:
        """A row for each (component, module), and one for all; null where the optimizer has no such moment."""
        state = optimizer.state()
        sums: defaultdict[tuple[str, str], defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        for name, slot in trainable.slots.items():
            gradient = slot.values.grad
            if gradient is None:  # parameter unused in this forward pass
                continue
            where = parameter_names.classify(name)
            moments = {
                k: slot.trained(x)
                for k, x in with_moments(state[name]).items()
                if k in MOMENTS and isinstance(x, Tensor)
            }
            before, after = slot.trained(self.before[name]), slot.trained(slot.values.data)
            one = sums_of(before, after, slot.trained(gradient), moments)
            for group in ((where.component, where.module), ("all", "all")):
                for key, value in one.items():
                    sums[group][key] += value
        return [
            {"step": step, "component": component, "module": module, **ratios(total)}
            for (component, module), total in sums.items()
        ]


def sums_of(
    before: Tensor, after: Tensor, gradient: Tensor, moments: Mapping[str, Tensor]
) -> dict[str, float]:
    """Sums over a tensor, in float64, which add up over tensors."""
    found = {
        "coordinates": float(after.numel()),
        "unmoved fp32": float((before == after).sum()),
        "unmoved bf16": float((before.bfloat16() == after.bfloat16()).sum()),
        "update^2": squares(after - before),
    }
    for key in FIRST_MOMENTS:
        if (moment := moments.get(key)) is not None:
            wide, own = moment.double(), gradient.double()
            found |= {"m.g": float((wide * own).sum()), "m^2": squares(wide), "g^2": squares(own)}
    for key in SECOND_MOMENTS:
        if (moment := moments.get(key)) is not None:
            wide = moment.double()
            found |= {
                "sqrt v": float(wide.sqrt().sum()),
                "v": float(wide.sum()),
                "n of v": float(wide.numel()),
            }
    return found


def squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def ratios(total: Mapping[str, float]) -> dict[str, float | int | None]:
    n = total["coordinates"]
    norms = math.sqrt(total.get("m^2", 0.0) * total.get("g^2", 0.0))
    variation = None
    if total.get("sqrt v", 0.0) > 0:
        mean = total["sqrt v"] / total["n of v"]
        variation = math.sqrt(max(0.0, total["v"] / total["n of v"] - mean**2)) / mean
    return {
        "coordinates": int(n),
        "momentum_alignment": total["m.g"] / norms if norms > 0 else None,
        "sqrt_v_variation": variation,
        "unmoved_fp32_fraction": total["unmoved fp32"] / n,
        "unmoved_bf16_fraction": total["unmoved bf16"] / n,
        "update_rms": math.sqrt(total["update^2"] / n),
    }
