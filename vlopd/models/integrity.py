"""Integrity checks of a checkpoint: missing, quantised, non-finite or mismatched tensors.

The checks that need no weights (config.json, safetensors headers) are pure functions that return a description of the
problem, shared by models (load.py) and deltas (weights/reader.py); the callers raise their own errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, JsonValue
from safetensors import SafetensorError, safe_open
from torch import nn

from vlopd.errors import ConfigError, shown
from vlopd.files import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

PLAIN = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that store weights directly; fp8 and narrower come with scales."""

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
"""Names of tensors that only quantised checkpoints have, beside their weights or in their place."""

INTEGER_BUFFER = re.compile(r"(^|[._])(ids?|index|indices|positions?|mask|bias)$")
"""Names of multi-dimensional integer tensors that are not weights: position ids, causal masks."""

CONSTANT = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|inv_freq|position_ids|(cos|sin)_cached)$"
)
"""Causal masks and position tables that earlier versions stored and that models now compute."""

EXPERT = re.compile(r"^(?P<layer>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.+)$")

DEQUANTISED = (
    "quantised weights are not supported: give the dequantised model, saved in bf16 or fp32"
)


def is_constant(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is such a constant; a bias of that name with one value per unit is a parameter."""
    if not CONSTANT.search(name):
        return False
    return not name.endswith("bias") or len(shape) == 0 or tuple(shape[:2]) == (1, 1)


class TensorHeader(NamedTuple):
    """Dtype and shape of a tensor, from the header of its file."""

    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]


def find_quantisation(config: Any) -> str | None:
    """Describes the quantisation that a config.json declares, in any of its parts; None without one."""
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
    """Names the first quantised tensor of a checkpoint (narrow dtype, integer, or scale); None without one."""
    for name, (dtype, shape) in sorted(tensors.items()):
        if PACKING.search(name):
            return f"it holds {name}, which only quantised checkpoints have; {DEQUANTISED}"
        if dtype in PLAIN or dtype.startswith("C"):
            continue  # complex tensors are reported by `find_complex`
        integer = dtype == "BOOL" or dtype.startswith(("I", "U"))
        weight = name.rpartition(".")[2].endswith("weight")
        if not integer or weight or (len(shape) > 1 and not INTEGER_BUFFER.search(name)):
            return f"{name} is stored as {dtype}; {DEQUANTISED}"
    return None


def find_complex(tensors: Mapping[str, TensorHeader]) -> str | None:
    """Names the first complex tensor of a checkpoint; None without one."""
    for name, (dtype, _) in sorted(tensors.items()):
        if dtype.startswith("C"):
            return f"{name} is stored as {dtype}, complex numbers; weights are real: save it again in bf16 or fp32"
    return None


def find_incomplete_experts(tensors: Mapping[str, TensorHeader]) -> str | None:
    """Names the first expert, of those stored one by one, with a missing or mis-shaped tensor; None without one.

    transformers stacks experts on loading and does not name the one that does not fit.
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


class Index(BaseModel):
    """What is read of an index of shards, model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]
    """{tensor: shard}, shards being *.safetensors beside the index."""
    metadata: dict[str, JsonValue] | None = None


def read_index(path: Path) -> Index:
    """Reads an index. Raises ConfigError for anything else, and for shards elsewhere or of another format."""
    try:
        index = Index.model_validate(parse_json(path.read_bytes()))
    except (OSError, ValueError):  # pydantic's is a ValueError
        raise ConfigError(
            f"{path} is not an index of shards: it has no weight_map of names; save the model again"
        ) from None
    for shard in set(index.weight_map.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConfigError(f"{path} names {shown(shard)}; only *.safetensors beside it are read")
    return index


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Headers of the tensors that transformers loads from a folder (one file, or an index's shards).

    Raises ConfigError naming the file where one is missing or incomplete, or there are only pickles.
    """
    if (folder / SINGLE).exists():
        paths = [folder / SINGLE]
    elif (folder / INDEX).exists():
        shards = read_index(folder / INDEX).weight_map
        paths = [folder / name for name in sorted(set(shards.values()))]
    else:
        pickled = sorted(p.name for how in ("*.bin", "*.pt", "*.pth") for p in folder.glob(how))
        held = (
            f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        )
        raise ConfigError(f"{folder} holds {held}; it needs {SINGLE} or {INDEX}")
    found: dict[str, TensorHeader] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in set(file.keys()):
                    header = file.get_slice(tensor)
                    found[tensor] = TensorHeader(header.get_dtype(), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            state = f"not a complete safetensors file ({error})" if path.exists() else "missing"
            raise ConfigError(f"{path} is {state}; copy or save the model again") from None
    return found


def refuse_partial(name: str, loading: Mapping[str, Any], model: nn.Module) -> None:
    """Raises ConfigError where the model's tensors and its files' do not match one to one, by name and shape.

    loading: transformers' `output_loading_info`, which accounts for tied heads and keys that a family ignores.
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
            f"{name} is incomplete: {first_names(missing)} of {kind} {'are' if len(missing) > 1 else 'is'} not in its "
            f"file{instead}; save the whole model again, under its own names"
        )
    if extra:
        raise ConfigError(
            f"{name}: {kind}, as config.json defines it, has no parameter for {first_names(extra)} of its file; give "
            "the config.json that its weights were saved with, or save the model again without them"
        )
    if loading["error_msgs"]:
        raise ConfigError(f"{name}: {' '.join(str(loading['error_msgs'][0]).split())}")


def first_names(names: Sequence[str]) -> str:
    """The first three names and, if there are more, the total."""
    more = f", ... ({len(names)} tensors in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@torch.no_grad()
def refuse_not_finite(name: str, model: nn.Module) -> None:
    """Raises ConfigError naming the first parameter or persistent buffer with a NaN or an infinity."""
    seen: set[int] = set()
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        # aminmax propagates NaN, and is far faster than isfinite on every entry
        if not all(math.isfinite(float(extreme)) for extreme in tensor.aminmax()):
            bad = int((~torch.isfinite(tensor)).sum())
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name}: {bad} of the {tensor.numel():,} values of {tensor_name} are not finite in {dtype}; "
                "the model is damaged, or its training diverged"
            )
