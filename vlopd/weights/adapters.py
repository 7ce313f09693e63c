"""Reads LoRA adapters in PEFT's format, without PEFT, as full-size weight updates.

Only plain LoRA is merged; any other method or option (DoRA, LoRA biases, ...) is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vlopd.config.explain import explain_errors
from vlopd.errors import RunError, first_line, shown
from vlopd.files import read_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"^(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedded>[AB]))$"
)
REFUSED = {
    "use_dora": "DoRA rescales columns",
    "lora_bias": "the factors have biases",
    "layer_replication": "layers are replicated",
    "target_parameters": "parameters are targeted directly, not by module",
    "trainable_token_indices": "embedding rows are stored separately",
    "alora_invocation_tokens": "the adapter is active on some tokens only",
    "arrow_config": "routes between adapters",
    "use_qalora": "inputs are pooled",
    "monteclora_config": "weights are sampled",
    "use_bdlora": "the factors are block-diagonal",
    "kasa_config": "truncates singular values of the base",
}
"""Keys of adapter_config.json that, when set, make the merged weight differ from W + s B A."""
UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"),
}
"""Keys that are handled here, or that affect training but not the merged weight. Any other key that is set is refused:
in a later PEFT version it may change the merged weight."""
KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
"""Values of init_lora_weights that leave the base unchanged (null: PEFT's default, true)."""
CHANGE_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
"""Prefixes of the values that change the base before training, to W - s B A or to quantised weights: added to the
original base, such factors are not the training update. PEFT's conversion doubles the rank and writes true."""


REPEAT, REPEATED_GROUP, MOST_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3
"""A regular expression without a repeated group takes time up to the length of a name to the power of its repeats."""


class _Numbers(BaseModel):
    """The numbers of adapter_config.json."""

    model_config = ConfigDict(allow_inf_nan=False)

    r: Annotated[int, Field(gt=0, lt=2**31)]
    lora_alpha: Annotated[float, Field(gt=-1e30, lt=1e30)]
    rank_pattern: dict[str, Annotated[int, Field(gt=0, lt=2**31)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=-1e30, lt=1e30)]] | None = None


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
        """The update in fp32, in the parameter's shape (for a convolution, the last two dimensions are the kernel's).

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
    """(low-rank updates, {parameter: tensor name} of parameters stored in full) of an adapter folder.

    shapes: of every tensor in the adapter's file. Raises RunError naming the setting or tensor for an adapter that is
    not plain LoRA.
    """
    config = read_settings(folder / CONFIG)
    if not isinstance(config, dict):
        raise RunError(f"{folder / CONFIG} is not a JSON object; save the adapter again")
    _check_config(folder, config)
    sides: dict[str, dict[str, str]] = {}
    embedded, whole = set(), {}
    for name in shapes:
        plain = name.removeprefix(PREFIX)
        found = FACTOR.match(plain)
        if found is None and ".lora_" in plain:
            raise RunError(
                f"{folder / WEIGHTS}: {name} is not a mergeable LoRA factor; merge it with PEFT"
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
        a, b = (shapes[names[side]] for side in "AB")
        if min(len(a), len(b)) < 2 or not a[0] or b[1] != a[0]:
            raise RunError(
                f"{folder / WEIGHTS}: the LoRA factors of {module} are {tuple(a)} and {tuple(b)}; wanted are [r, in] "
                "and [out, r]; save the adapter again"
            )
        rank = a[0]
        expected = _value_for_module(config.get("rank_pattern"), module, config["r"])
        if rank != expected:
            raise RunError(
                f"{folder}: {module} has rank {rank}, but {CONFIG} says {expected}; save the adapter again"
            )
        alpha = _value_for_module(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        transposed = module in embedded or bool(config.get("fan_in_fan_out"))
        updates.append(LowRank(f"{module}.weight", names["A"], names["B"], scale, transposed))
    if not updates and not whole:
        raise RunError(f"{folder / WEIGHTS} holds no tensor")
    return updates, whole


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises RunError for a configuration that is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RunError(
            f"{folder / CONFIG}: peft_type is {kind!r}; only LORA is merged, merge it with PEFT"
        )
    for key, meaning in REFUSED.items():
        if config.get(key):
            raise RunError(f"{folder / CONFIG}: {key} is set ({meaning}); merge it with PEFT first")
    for key in sorted(config.keys() - UNDERSTOOD):
        if config[key]:
            raise RunError(
                f"{folder / CONFIG}: {key} is set, which is not supported here; merge it with PEFT first"
            )
    _check_initialisation(folder, config.get("init_lora_weights"))
    try:
        numbers = _Numbers.model_validate(config, strict=True)
    except ValidationError as error:
        raise RunError(
            f"{folder / CONFIG}: {explain_errors(error, _Numbers)}; save the adapter again"
        ) from None
    patterns = {"rank_pattern": numbers.rank_pattern, "alpha_pattern": numbers.alpha_pattern}
    for key, pattern in ((key, pattern) for key, its in patterns.items() for pattern in its or ()):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            reason = first_line(error)
        else:
            if len(REPEAT.findall(pattern)) <= MOST_REPEATS and not REPEATED_GROUP.search(pattern):
                continue
            reason = f"more than {MOST_REPEATS} repeats, or a repeated group, may match for ever"
        raise RunError(
            f"{folder / CONFIG}: {key} has {shown(pattern)}: {reason}; merge it with PEFT"
        )


def _check_initialisation(folder: Path, method: object) -> None:
    """Raises RunError for an initialisation that changes the base before training, unless it was converted."""
    name = method.lower() if isinstance(method, str) else method
    if name in KEEP_BASE:
        return
    known = next((m for start, m in CHANGE_BASE.items() if str(name).startswith(start)), None)
    reason = f"{known} changes the base before training" if known else "not supported here"
    remedy = "merge it with PEFT into the base that it was trained on"
    if known != "LoftQ":
        remedy = f"save it with path_initial_model_for_weight_conversion, or {remedy}"
    raise RunError(f"{folder / CONFIG}: init_lora_weights is {method!r} ({reason}); {remedy}")


def _value_for_module(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value whose key, a regular expression, matches the end of the module's name (PEFT's rule)."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def add_update(weight: Tensor, update: Tensor) -> Tensor:
    """weight + update, added in fp32 or wider and rounded once to the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + update.to(wide)).to(weight.dtype)
