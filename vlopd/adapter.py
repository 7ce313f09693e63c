"""LoRA adapters in PEFT's format, as the full updates that they stand for; read without PEFT.

Only what is understood is merged; anything else (DoRA, biases of their own, other methods) is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlopd.checkpoint import RunError, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"^(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedded>[AB]))$"
)
REFUSED = {
    "use_dora": "DoRA scales whole columns",
    "lora_bias": "the factors have biases",
    "layer_replication": "layers are replicated",
    "target_parameters": "parameters are targeted without their modules",
    "alora_invocation_tokens": "it is active on some tokens only",
    "arrow_config": "it routes between adapters",
}
"""Keys of adapter_config.json that, set, mean something that is no W + s B A."""


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


@dataclass(frozen=True)
class LowRank:
    """One parameter's update s B A, by the names of its factors in the adapter's file."""

    parameter: str  # as the adapter names it, without PEFT's prefix
    a: str
    b: str
    scale: float
    transposed: bool  # the parameter is stored as [in, out]

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        """The update in fp32, in the shape of the parameter (a convolution's kernel has the last two sides).

        a: [r, in, ...], b: [out, r, ...]; the second kernel of a convolution is 1 x 1.
        """
        product = b.float().flatten(1) @ a.float().flatten(1)
        if a.ndim > 2:
            return (self.scale * product).view(len(b), *a.shape[1:])
        return self.scale * (product.T if self.transposed else product)

    def shape(self, a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
        if len(a) > 2:
            return (b[0], *a[1:])
        return (a[1], b[0]) if self.transposed else (b[0], a[1])


def read_adapter(
    folder: Path, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[LowRank], dict[str, str]]:
    """(the low-rank updates, {parameter: tensor} of those that are stored whole) of an adapter folder.

    shapes: those of every tensor in its file. Raises RunError for an adapter that is no plain LoRA, naming
    the setting or tensor.
    """
    config = read_json(folder / CONFIG)
    check(folder, config)
    sides: dict[str, dict[str, str]] = {}
    embedded, whole = set(), {}
    for name in shapes:
        plain = name.removeprefix(PREFIX)
        found = FACTOR.match(plain)
        if found is None and ".lora_" in plain:
            raise RunError(
                f"{folder / WEIGHTS}: {name} is no LoRA factor that can be merged; merge it with PEFT"
            )
        if found is None:
            whole[plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
            continue
        side = found["side"] or found["embedded"]
        sides.setdefault(found["module"], {})[side] = name
        if found["embedded"]:
            embedded.add(found["module"])
    updates = []
    for module, names in sorted(sides.items()):
        if set(names) != {"A", "B"}:
            raise RunError(f"{folder / WEIGHTS}: {module} has only one of its two LoRA factors")
        rank = shapes[names["A"]][0]
        expected = by_pattern(config.get("rank_pattern"), module, config["r"])
        if rank != expected:
            raise RunError(
                f"{folder}: {module} has rank {rank}, but {CONFIG} says {expected}; save the adapter again"
            )
        alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        transposed = module in embedded or bool(config.get("fan_in_fan_out"))
        updates.append(LowRank(f"{module}.weight", names["A"], names["B"], scale, transposed))
    if not updates and not whole:
        raise RunError(f"{folder / WEIGHTS} holds no tensor")
    return updates, whole


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises RunError for a configuration that is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RunError(
            f"{folder / CONFIG}: peft_type is {kind!r}; only LORA is merged, merge it with PEFT"
        )
    for key, meaning in REFUSED.items():
        if config.get(key):
            raise RunError(f"{folder / CONFIG}: {key} is set ({meaning}); merge it with PEFT first")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise RunError(f"{folder / CONFIG} has no {key}; save the adapter again")


def by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value whose key, a regular expression, matches the end of the module's name; as PEFT chooses."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def merged(weight: Tensor, update: Tensor) -> Tensor:
    """weight + update, added in fp32 or wider and rounded once to the precision that the weight is stored in."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + update.to(wide)).to(weight.dtype)
