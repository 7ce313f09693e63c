"""Exports masks in formats of others: boolean tensors, index lists, PEFT's SHiRA adapters."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlopd.errors import RunError
from vlopd.files import whole_file, write_json
from vlopd.masks.files import check_base, load_mask
from vlopd.masks.foreign import INDICES, SHIRA_INDICES, SHIRA_WEIGHT, Format
from vlopd.models.integrity import first_names
from vlopd.weights.adapters import CONFIG, PREFIX, WEIGHTS
from vlopd.weights.delta import stream_whole
from vlopd.weights.matching import known_config
from vlopd.weights.name_matching import pair_names

Mask = dict[str, Tensor]

SHIRA_MASK = "vlopd"
"""`mask_type` of an exported adapter. PEFT knows only `random`; of any other it reads the indices from the file."""


def export_mask(
    file: Path,
    out: Path,
    format: Format,
    base: Path | None = None,
    trained: Path | None = None,
    linear_only: bool = False,
) -> list[str]:
    """Writes a mask file in a foreign format; returns lines on what is left out.

    booleans, indices: a safetensors file. shira: a folder that PEFT loads on `base`, with the update of `trained` on
    the mask, or zeros; `linear_only` leaves out what is not of a linear layer, which is refused otherwise.
    """
    mask, _ = load_mask(file)
    if not any(bool(marked.any()) for marked in mask.values()):
        raise RunError(f"{file} has no coordinate to export")
    if format == "shira":
        if base is None:
            raise RunError("a SHiRA adapter is of a model; give --base, the checkpoint of the mask")
        return _export_shira(file, mask, out, base, trained, linear_only)
    if base is not None or trained is not None or linear_only:
        raise RunError(
            f"{format} are of the mask alone; --base, --trained and --linear-only are for shira"
        )
    if out.suffix != ".safetensors":
        raise RunError(f"{out}: {format} are written to a file *.safetensors")
    tensors = mask
    if format == "indices":
        marked = {name: its.flatten().nonzero()[:, 0] for name, its in mask.items()}
        tensors = {name + INDICES: its for name, its in marked.items() if len(its)}
    with whole_file(out) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    return []


def _export_shira(
    file: Path, mask: Mask, out: Path, base: Path, trained: Path | None, linear_only: bool
) -> list[str]:
    from vlopd.models import families
    from vlopd.models.meta import meta_model

    if out.is_file():
        raise RunError(f"{out} is a file; a SHiRA adapter is a folder")
    check_base(mask, base)
    config = known_config(base)
    if config is None:
        raise RunError(f"{base} has no config.json, which defines its linear layers")
    model = meta_model(config)
    shapes = {name: tuple(its.shape) for name, its in model.named_parameters()}
    names, _ = pair_names({name: tuple(its.shape) for name, its in mask.items()}, shapes)
    linear = {f"{n}.weight" for n, its in model.named_modules() if type(its) is torch.nn.Linear}
    marked = {name: its for name, its in mask.items() if bool(its.any())}
    others = [name for name in marked if names.get(name) not in linear]
    if others and not linear_only:
        raise RunError(
            f"{file}: SHiRA adapts linear layers alone, not {first_names(others)}; export booleans or "
            "indices, or leave them out with --linear-only"
        )
    marked = {name: its for name, its in marked.items() if name not in others}
    if not marked:
        raise RunError(f"{file} has no coordinate of a linear layer")
    rank = _shira_rank(file, marked)
    values, lines = _shira_values(marked, base, trained)
    tensors: dict[str, Tensor] = {}
    for name, its in marked.items():
        pairs = its.nonzero().T.int()
        count = rank * sum(its.shape)
        padding = count - pairs.shape[1]
        module = PREFIX + names[name].removesuffix(".weight")
        tensors[module + SHIRA_INDICES] = torch.cat([pairs, pairs[:, -1:].expand(2, padding)], 1)
        tensors[module + SHIRA_WEIGHT] = torch.cat([values[name], torch.zeros(padding)])
    about = {
        "peft_type": "SHIRA",
        "task_type": None if families.sees_images(config) else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "mask_type": SHIRA_MASK,
        "random_seed": None,
        "target_modules": sorted(names[name].removesuffix(".weight") for name in marked),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    with whole_file(out / WEIGHTS) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write_json(out / CONFIG, about)
    if others:
        n = sum(int(mask[name].sum()) for name in others)
        lines.append(f"{n:,} coordinates are not of linear layers: {first_names(others)}")
    return lines


def _shira_rank(file: Path, marked: Mask) -> int:
    """The smallest r for which every module has at least its coordinates: r (in + out) are stored of each.

    Raises RunError where that is more than another module has.
    """
    needed = {name: math.ceil(int(its.sum()) / sum(its.shape)) for name, its in marked.items()}
    room = {name: its.numel() // sum(its.shape) for name, its in marked.items()}
    most, least = max(needed, key=needed.__getitem__), min(room, key=room.__getitem__)
    if needed[most] > room[least]:
        raise RunError(
            f"{file}: SHiRA stores r (in + out) coordinates of every module; {most} needs r = {needed[most]}, for "
            f"which {least} {tuple(marked[least].shape)} is too small; export booleans or indices"
        )
    return needed[most]


def _shira_values(
    marked: Mask, base: Path, trained: Path | None
) -> tuple[dict[str, Tensor], list[str]]:
    """({parameter: the update at its coordinates, fp32}, lines on changes that are off the mask)."""
    from vlopd.models.parameter_names import classify

    if trained is None:
        return {name: torch.zeros(int(its.sum())) for name, its in marked.items()}, []
    values, off = {}, 0
    for pair in stream_whole(base, trained, classify):
        its = marked.get(pair.name, torch.zeros(pair.base.shape, dtype=torch.bool))
        off += int(((pair.delta != 0) & ~its).sum())
        if pair.name in marked:
            values[pair.name] = pair.delta[its].float()
    return values, [f"{off:,} changed coordinates are off the exported mask"] if off else []
