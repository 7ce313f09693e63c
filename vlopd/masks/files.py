"""Mask files: a safetensors file of packed bits with provenance and a digest in the header, and a JSON record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor

from vlopd.bits import pack, unpack
from vlopd.config.explain import explain_errors
from vlopd.errors import RunError, first_line, shown
from vlopd.files import is_endless, parse_json, whole_file, write_json
from vlopd.masks.compare import densities_by, density
from vlopd.types import TensorName
from vlopd.weights.reader import Weights

HEADER = "mask"


class _Inputs(BaseModel):
    base: str
    rule: dict[str, JsonValue]


class _About(BaseModel):
    """What is read of a mask's metadata; `digest` vouches for the rest."""

    inputs: _Inputs
    shapes: dict[str, tuple[Annotated[int, Field(ge=0, lt=2**40)], ...]]
    counts: dict[str, Annotated[int, Field(ge=0)]]
    density: Annotated[float, Field(ge=0, le=1)]


def save_mask(
    path: Path,
    mask: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    classify: Callable[[str], TensorName],
    write_record: Callable[[Path, Any], None] = write_json,
) -> None:
    """Writes NAME.safetensors (packed bits) and then, by `write_record`, its JSON record NAME.json.

    `inputs` (JSON): `rule`, and the digests of the mask's inputs, of which `base`, the checkpoint that it is
    applied to, is checked on use. Both files also hold shapes, counts, densities, and a `digest` of all
    metadata and bits; equal masks give equal files.
    """
    assert "base" in inputs, "a mask must name the checkpoint it starts from"
    packed = {name: pack(marked.cpu()) for name, marked in mask.items()}
    metadata: dict[str, Any] = {
        "inputs": dict(inputs),
        "shapes": {name: list(m.shape) for name, m in mask.items()},
        "counts": {name: int(m.sum()) for name, m in mask.items()},
        "densities": {name: density({name: m}) for name, m in mask.items()},
        "density": density(mask),
        "density_by_component": densities_by(mask, lambda name: classify(name).component),
        "density_by_module": densities_by(mask, lambda name: classify(name).module),
    }
    metadata["digest"] = _digest(metadata, packed)
    record = path.with_name(f"{path.stem}.json")
    record.unlink(missing_ok=True)  # never leave an old record beside a new mask
    with whole_file(path) as temporary:
        # a single header entry: safetensors does not keep the order of several
        save_file(packed, temporary, {HEADER: json.dumps(metadata, sort_keys=True)})
    write_record(record, metadata)


def load_mask(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a mask and its metadata.

    Raises RunError where the file is missing, truncated, foreign, or does not match its digest.
    """
    if path.is_dir():
        raise RunError(
            f"{path} is a folder; a mask is one .safetensors file, as RUN/masks/NAME.safetensors, and `vlopd mask "
            "import` makes one of booleans, index lists or a SHiRA adapter"
        )
    if is_endless(path):
        raise RunError(f"{path} is a pipe or a device; name a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get(HEADER, "{}"))
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RunError(f"no mask {path}; run the stage that writes it first") from None
    except (SafetensorError, OSError, ValueError) as error:
        remedy = "delete it and run again"
        if path.suffix != ".safetensors":
            remedy = "name a .safetensors file, as RUN/masks/NAME.safetensors"
        raise RunError(f"{path} is not a complete mask ({first_line(error)}); {remedy}") from None
    if metadata == {}:
        raise RunError(
            f"{path} is not a mask file of vlopd; make one of it with `vlopd mask import {path} --base BASE --out FILE`"
        )
    try:
        about = _About.model_validate_json(json.dumps(metadata), strict=True)
    except ValidationError as error:
        raise RunError(
            f"{path} is not a mask file of vlopd: {explain_errors(error, _About)}; delete it and run again"
        ) from None
    recorded = metadata.pop("digest", None)
    if recorded is None or recorded != _digest(metadata, packed):
        raise RunError(f"{path} is damaged: it does not match its digest; delete it and run again")
    mask: dict[str, Tensor] = {}
    for name in sorted(about.shapes.keys() | about.counts.keys() | packed.keys()):
        if (wrong := _misfit(name, about, packed)) is not None:
            raise RunError(f"{path} is not a mask file of vlopd: {wrong}; delete it and run again")
        shape = about.shapes[name]
        mask[name] = unpack(packed[name], math.prod(shape)).view(shape)
        if (count := int(mask[name].sum())) != about.counts[name]:
            raise RunError(
                f"{path} is not a mask file of vlopd: {name} has {count} coordinates, and its count is "
                f"{about.counts[name]}; delete it and run again"
            )
    return {name: mask[name] for name in about.shapes}, {**metadata, "digest": recorded}


def _misfit(name: str, about: _About, packed: Mapping[str, Tensor]) -> str | None:
    """Why a tensor's bits and its metadata do not belong together; None where they do."""
    for where, its in (("shapes", about.shapes), ("counts", about.counts), ("tensors", packed)):
        if name not in its:
            return f"{name} is not among its {where}"
    shape, bits = about.shapes[name], packed[name]
    if bits.dtype != torch.uint8 or bits.numel() != -(-math.prod(shape) // 8) or len(shape) > 64:
        return f"{name} is {shown(shape)}, and has {bits.numel()} bytes of {bits.dtype}"
    return None


def _digest(metadata: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        total.update(f"\n{name} {packed[name].numel()} ".encode())
        total.update(packed[name].numpy().tobytes())
    return total.hexdigest()


def check_mask(
    mask: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    base_digest: str,
) -> None:
    """Raises RunError for a mask of another model or base checkpoint, naming the first tensor or both digests."""
    check_shapes(mask, shapes)
    made_from = metadata["inputs"]["base"]
    if made_from != base_digest:
        raise RunError(
            f"the mask was made from base checkpoint {made_from[:12]}, this one is "
            f'{base_digest[:12]}; rebuild it, or import it by a rule of type "file" with '
            "--allow-other-base"
        )


def check_base(mask: Mapping[str, Tensor], base: Path) -> None:
    """Raises RunError for a checkpoint folder whose parameters do not match the mask."""
    with Weights(base) as weights:
        shapes = weights.parameter_shapes()
    try:
        check_shapes(mask, shapes)
    except RunError as error:
        raise RunError(f"{base}: {error}") from None


def check_shapes(mask: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises RunError naming the first tensor in which a mask and a model differ."""
    for name in sorted(mask.keys() | shapes.keys()):
        if name not in mask:
            raise RunError(f"the mask is of another model: it lacks {name}")
        if name not in shapes:
            raise RunError(f"the mask is of another model: it has {name}, which the model lacks")
        if mask[name].shape != shapes[name]:
            has, needs = tuple(mask[name].shape), tuple(shapes[name])
            raise RunError(f"the mask is of another model: {name} is {has} there, {needs} here")
