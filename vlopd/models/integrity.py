"""Whether a checkpoint holds a whole model as plain numbers: nothing missing, packed, not finite, or of another model.

What is read without weights (config.json, the headers of safetensors files) is judged by pure functions that
say what is wrong, for models (load.py) and for deltas (delta.py) alike; the callers raise their own errors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vlopd.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

PLAIN = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the types whose numbers are the weights themselves; fp8 and narrower go with scales."""

PACKING = re.compile(
    r"(^|\.)("
    r"qweight|qzeros|scales|(weight_)?g_idx"  # GPTQ, AWQ
    r"|SCB|(nested_)?absmax|(nested_)?quant_map|weight_format|quant_state\.\w+"  # bitsandbytes
    r"|(weight|input|output|activation)_(global_)?(scale|scales|zero_point)(_\w+)?"  # compressed-tensors, fp8
    r"|weight_packed|weight_shape"  # compressed-tensors
    r"|\w+_(blocks|scales|scale_inv)"  # mxfp4's and fp8's experts
    r"|W_q|\w*qdata|Qidxs|codebooks"  # HQQ, torchao, QuIP#, AQLM
    r")$"
)
"""Names of tensors that only packed checkpoints have, beside their weights or in their place."""

INTEGER_BUFFER = re.compile(r"(^|[._])(ids?|index|indices|positions?|mask|bias)$")
"""Names of integer tensors of several dimensions that are no weights: position ids, causal masks."""

CONSTANT = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|inv_freq|position_ids|(cos|sin)_cached)$"
)
"""Causal masks and position tables that earlier versions stored and that models work out by themselves."""

EXPERT = re.compile(r"^(?P<layer>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.+)$")

DEQUANTISED = "packed weights are not read: give the dequantised model, saved in bf16 or fp32"


def is_constant(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is one of those; a bias of that name with a value per unit is a parameter."""
    if not CONSTANT.search(name):
        return False
    return not name.endswith("bias") or len(shape) == 0 or tuple(shape[:2]) == (1, 1)


class TensorHeader(NamedTuple):
    """A tensor as the header of its file describes it."""

    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]


def find_quantisation(config: Any) -> str | None:
    """What a config.json says of quantised weights, in any of its parts; None where it says nothing."""
    if not isinstance(config, Mapping):
        return None
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            return (
                f"config.json has a {key} ({method or 'of no stated method'}); {DEQUANTISED} (or remove "
                f"that key where the tensors are plain)"
            )
        if (found := find_quantisation(value)) is not None:
            return found
    return None


def find_packed(tensors: Mapping[str, TensorHeader]) -> str | None:
    """Which of a checkpoint's tensors is packed: narrow, an integer, or a scale; None where all are plain."""
    for name, (dtype, shape) in sorted(tensors.items()):
        if PACKING.search(name):
            return f"it holds {name}, which only quantised weights have; {DEQUANTISED}"
        if dtype in PLAIN or dtype.startswith("C"):
            continue  # complex ones are no packed weights either: `find_complex`
        integer = dtype == "BOOL" or dtype.startswith(("I", "U"))
        weight = name.rpartition(".")[2].endswith("weight")
        if not integer or weight or (len(shape) > 1 and not INTEGER_BUFFER.search(name)):
            return f"{name} is stored as {dtype}; {DEQUANTISED}"
    return None


def find_complex(tensors: Mapping[str, TensorHeader]) -> str | None:
    """Which of a checkpoint's tensors is complex; None where none is."""
    for name, (dtype, _) in sorted(tensors.items()):
        if dtype.startswith("C"):
            return f"{name} is stored as {dtype}, complex numbers; weights are real: save it again in bf16 or fp32"
    return None


def find_incomplete_experts(tensors: Mapping[str, TensorHeader]) -> str | None:
    """Which of a layer's experts, stored one by one, lacks a tensor or has one of another shape; None if none.

    transformers stacks experts on loading, and does not say which one did not fit.
    """
    layers: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for name, stored in tensors.items():
        if found := EXPERT.match(name):
            experts = layers.setdefault(found["layer"], {})
            experts.setdefault(found["number"], {})[found["rest"]] = stored.shape
    for layer, experts in sorted(layers.items()):
        (number, whole), *others = sorted(experts.items(), key=lambda item: -len(item[1]))
        for other, its in others:
            for rest, shape in sorted(whole.items()):
                here, there = (f"{layer}.{n}.{rest}" for n in (other, number))
                if rest not in its:
                    return f"its file lacks {here}, but has {there}; save the model again"
                if its[rest] != shape:
                    return f"{here} is {its[rest]} and {there} is {shape}; save the model again"
    return None


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """The tensors that transformers reads from a folder (one file, or an index's shards), from their headers.

    Raises ConfigError with the file's name where one is missing or not whole, or there are only pickles.
    """
    if (folder / SINGLE).exists():
        paths = [folder / SINGLE]
    elif (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            paths = [folder / name for name in names]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise ConfigError(
                f"{folder / INDEX} is no index of shards; save the model again"
            ) from None
    else:
        pickled = sorted(p.name for how in ("*.bin", "*.pt", "*.pth") for p in folder.glob(how))
        why = f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        raise ConfigError(f"{folder} holds {why}; it needs {SINGLE} or {INDEX}")
    found: dict[str, TensorHeader] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
                for tensor in held:
                    header = file.get_slice(tensor)
                    found[tensor] = TensorHeader(header.get_dtype(), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            why = f"not a whole safetensors file ({error})" if path.exists() else "missing"
            raise ConfigError(f"{path} is {why}; copy or save the model again") from None
    return found


def refuse_partial(name: str, loading: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses a model whose tensors and those of its files are not one to one, by their names and shapes.

    loading: transformers' `output_loading_info`, which knows of tied heads and of what a family leaves out.
    """
    kind = type(model).__name__
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        tensor, held, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ConfigError(
            f"{name}: {tensor} is {tuple(held)} in its file and {tuple(wanted)} in config.json{more}; give "
            "the config.json that its weights were saved with"
        )
    missing = sorted(loading["missing_keys"])
    extra = sorted(key for key in loading["unexpected_keys"] if not CONSTANT.search(key))
    if missing:
        instead = f", which has {first_names(extra)} instead" if extra else ""
        raise ConfigError(
            f"{name} is not whole: {first_names(missing)} of {kind} {'are' if len(missing) > 1 else 'is'} not in its "
            f"file{instead}; save the whole model again, under its own names"
        )
    if extra:
        raise ConfigError(
            f"{name}: {kind} as config.json describes it has no place for {first_names(extra)} of its file; give the "
            "config.json that its weights were saved with, or save the model again without them"
        )
    if loading["error_msgs"]:
        raise ConfigError(f"{name}: {' '.join(str(loading['error_msgs'][0]).split())}")


def first_names(names: Sequence[str]) -> str:
    """The first three names, and how many there are."""
    more = f", ... ({len(names)} tensors in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@torch.no_grad()
def refuse_not_finite(name: str, model: nn.Module) -> None:
    """Refuses a model with a NaN or an infinity in a parameter or a buffer that is stored with it, by its name."""
    seen: set[int] = set()
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        # the extremes of a tensor with a NaN are NaN; far faster than asking every entry
        if not all(math.isfinite(float(extreme)) for extreme in tensor.aminmax()):
            bad = int((~torch.isfinite(tensor)).sum())
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name}: {bad} of the {tensor.numel():,} values of {tensor_name} are not finite in {dtype}; "
                "the model is damaged, or its training diverged"
            )
