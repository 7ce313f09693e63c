"""Optimizers of the trained coordinates' fp32 values, and the schedule of their learning rate.

The optimizers are torch's and timm's; this module builds their parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlopd.config.training import SGD, AdamW, Lion, Muon, OptimConfig, RMSProp
from vlopd.errors import ConfigError
from vlopd.models import parameter_names
from vlopd.train.eight_bits import BYTES, AdamW8Bit
from vlopd.train.sparse import Slot, Trainable

NO_HIDDEN_MATRIX = ("embedding", "position", "token", "patch", "norm", "scale", "head")
"""Modules that Muon leaves to AdamW, even where they are two-dimensional: tables, inputs and outputs."""

Groups = list[dict[str, Any]]
"""torch's parameter groups: named values, and the group's `factor` of the learning rate."""


class Optimizers:
    """One torch optimizer, or Muon and its AdamW behind one interface."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    def step(self, rate: float) -> None:
        """One update at learning rate `rate`, times each group's own factor."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["factor"]
            part.step()

    def state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name: tensors, numbers, None. Empty for a parameter without gradients.

        >>> optimizers.state()["lm_head.weight"]
        {"step": tensor(3.), "exp_avg": tensor(...), "exp_avg_sq": tensor(...)}
        """
        return {
            name: dict(part.state[values]) if values in part.state else {}
            for part in self.parts
            for group in part.param_groups
            for name, values in zip(group["param_names"], group["params"], strict=True)
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores `state`, each tensor on the device where torch keeps it."""
        for part in self.parts:
            names = [name for group in part.param_groups for name in group["param_names"]]
            kept = {k: dict(state[name]) for k, name in enumerate(names) if state.get(name)}
            part.load_state_dict({**part.state_dict(), "state": kept})


def build_optimizer(config: OptimConfig, trainable: Trainable) -> Optimizers:
    """The optimizer of the trained coordinates; weight decay as configured on all of them, as torch does.

    Raises ConfigError for a rate of a component that the model lacks, and for Muon with a mask that cuts
    through a hidden matrix.
    """
    factors, slots = component_factors(config, trainable), trainable.slots
    if isinstance(config, Muon):
        return muon_and_adamw(config, slots, factors)
    groups = grouped(slots, factors)
    common = shared(config)
    match config:
        case AdamW(state_bits=8):
            return Optimizers(AdamW8Bit(groups, **common, betas=config.betas, eps=config.eps))
        case AdamW():
            return Optimizers(adamw(groups, **common, betas=config.betas, eps=config.eps))
        case SGD():
            sgd = torch.optim.SGD(
                groups, **common, momentum=config.momentum, nesterov=config.nesterov
            )
            return Optimizers(sgd)
        case RMSProp():
            rmsprop = torch.optim.RMSprop(
                groups, **common, alpha=config.alpha, eps=config.eps, momentum=config.momentum
            )
            return Optimizers(rmsprop)
        case Lion():
            # timm comes with open_clip_torch; nothing else here needs it
            from timm.optim import Lion as TimmLion

            return Optimizers(TimmLion(groups, **common, betas=config.betas))


def moments(config: OptimConfig) -> float:
    """Fp32 values of optimizer state for each trained one (of Muon's matrices one; AdamW's part decides).

    With state_bits = 8 the bytes of the codes and scales, as a part of an fp32 value's.
    """
    match config:
        case SGD():
            return int(config.momentum > 0)
        case RMSProp():
            return 1 + int(config.momentum > 0)
        case Lion():
            return 1
        case AdamW(state_bits=8):
            return 2 * BYTES / 4
        case AdamW() | Muon():
            return 2


def shared(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "weight_decay": config.weight_decay}


def adamw(
    groups: Groups, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )


def muon_and_adamw(
    config: Muon, slots: Mapping[str, Slot], factors: Mapping[str, float]
) -> Optimizers:
    """Muon on hidden matrices, AdamW at its own rate on the rest."""
    hidden = {name: slot for name, slot in slots.items() if is_hidden_matrix(slot.parameter, name)}
    rest = {name: slot for name, slot in slots.items() if name not in hidden}
    for name, slot in hidden.items():
        if not slot.whole:
            raise ConfigError(
                f"Muon orthogonalises whole matrices, but the mask trains {slot.count} of the "
                f"{slot.parameter.numel()} coordinates of {name}; use a mask of whole matrices, or "
                'another optimizer, such as optim.type = "adamw", for every arm that is compared'
            )
    common = shared(config)
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        muon = torch.optim.Muon(
            grouped(hidden, factors),
            **common,
            momentum=config.momentum,
            nesterov=config.nesterov,
            adjust_lr_fn=config.scale,
        )
        parts.append(muon)
    if rest:
        own = (config.adamw_learning_rate or config.learning_rate) / config.learning_rate
        groups = grouped(rest, {name: own * factor for name, factor in factors.items()})
        parts.append(adamw(groups, **common, betas=config.adamw_betas, eps=config.adamw_eps))
    return Optimizers(*parts)


def is_hidden_matrix(parameter: Tensor, name: str) -> bool:
    """Whether Muon applies: a linear map between hidden features (arXiv 2502.16982)."""
    where = parameter_names.classify(name)
    return (
        parameter.ndim == 2
        and where.component not in ("embedding", "head")
        and where.module not in NO_HIDDEN_MATRIX
    )


def component_factors(config: OptimConfig, trainable: Trainable) -> dict[str, float]:
    """The learning rate's factor of each trained parameter, by name.

    Raises ConfigError for a component that the model has no parameter of.
    """
    refuse_missing_components(config, trainable.names)
    factors: dict[str, float] = config.component_rates.model_dump()
    return {
        name: factors.get(parameter_names.classify(name).component, 1.0) for name in trainable.slots
    }


def refuse_missing_components(config: OptimConfig, names: Iterable[str]) -> None:
    """Raises ConfigError for a factor of a component that none of the parameters `names` is of."""
    known = {parameter_names.classify(name).component for name in names}
    for component, factor in config.component_rates:
        if factor != 1.0 and component not in known:
            raise ConfigError(
                f"optim.component_rates.{component} = {factor}: the model has no {component!r}, it has "
                f"{', '.join(sorted(known))}"
            )


def grouped(slots: Mapping[str, Slot], factors: Mapping[str, float]) -> Groups:
    """One parameter group for each factor of the learning rate."""
    members: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, slot in slots.items():
        members.setdefault(factors[name], []).append((name, slot.values))
    return [{"params": named, "factor": factor} for factor, named in members.items()]


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of a step: linear warm-up over `warmup_steps`, then the schedule, to 0 after the last."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = step / steps
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * warm * decay
