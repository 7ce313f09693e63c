"""Masks in formats of others: boolean tensors, index lists, PEFT's SHiRA adapters (docs/masks.md), read on demand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlopd.errors import RunError
from vlopd.files import read_settings
from vlopd.masks.files import HEADER
from vlopd.weights.adapters import CONFIG, PREFIX, WEIGHTS

Format = Literal["booleans", "indices", "shira"]
Shape = tuple[int, ...]

INDICES = ".indices"
SHIRA_INDICES, SHIRA_WEIGHT = ".shira_indices", ".shira_weight"
INTEGERS = {"I64", "I32", "U32", "I16", "U16"}
"""Stored dtypes of index lists."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a foreign mask."""

    stored: str
    """Its name in the file."""
    shape: Shape | None
    """The parameter's shape; None where the file does not hold it."""
    mark: Callable[[Shape], Tensor]
    """Reads the coordinates of a parameter of that shape, as bool. Raises RunError, without file and tensor."""


@dataclass(frozen=True)
class ForeignMask:
    """A mask in a foreign format, whose tensors are read on demand."""

    source: Path
    format: Format
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    """By parameter name, as the source has it."""

    def read(self, name: str, shape: Shape) -> Tensor:
        """The coordinates of one parameter, bool. Raises RunError naming file and tensor."""
        entry = self.entries[name]
        try:
            return entry.mark(shape)
        except RunError as error:
            raise RunError(f"{self.source}: {entry.stored} {error}") from None


def open_foreign(source: Path, format: Format | None = None) -> ForeignMask:
    """Opens a safetensors file of booleans or index lists, or a SHiRA folder; detects the format where None.

    Raises RunError, with the remedy, for anything else.
    """
    if format not in (None, *get_args(Format)):
        raise RunError(f"format {format!r}: must be one of {', '.join(get_args(Format))}")
    if source.is_dir():
        found = _open_shira(source)
    else:
        _refuse_pickle(source)
        found = _open_tensors(source, format)
    if format not in (None, found.format):
        raise RunError(f"{source} is of format {found.format}, not {format}")
    if not found.entries:
        raise RunError(f"{source} has no tensors")
    return found


def is_foreign(path: Path) -> bool:
    """Whether a path is a folder, or a safetensors file that is not a mask file of vlopd."""
    if path.is_dir():
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return HEADER not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # `load_mask` says why


def _refuse_pickle(source: Path) -> None:
    if source.suffix in PICKLES:
        raise RunError(
            f"{source} is a pickle, which is refused: it may run code when opened; convert it where you trust it, "
            'safetensors.torch.save_file(torch.load(PATH, weights_only=True), "mask.safetensors")'
        )


def _open_header(path: Path) -> dict[str, tuple[str, Shape]]:
    """{tensor: (stored dtype, shape)} of a safetensors file. Raises RunError for anything else, a mask file of vlopd
    included."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if HEADER in (file.metadata() or {}):
                raise RunError(
                    f"{path} is a mask file of vlopd already; use it as it is, by a rule of type 'file'"
                )
            return {n: (its.get_dtype(), tuple(its.get_shape())) for n, its in slices.items()}
    except FileNotFoundError:
        raise RunError(f"no mask {path}") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is not a complete safetensors file ({error})") from None


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _open_tensors(path: Path, format: Format | None) -> ForeignMask:
    """Opens a file of booleans or index lists, which is detected by the stored dtypes."""
    header = _open_header(path)
    lists = {name for name, (dtype, _) in header.items() if dtype in INTEGERS}
    if format is None:
        format = "indices" if lists else "booleans"
    for name, (dtype, shape) in header.items():
        if (name in lists) != (format == "indices"):
            raise RunError(
                f"{path}: {name} is {dtype}; a file of {format} holds only "
                + ("flat index lists (int64)" if format == "indices" else "bool, uint8 or floats")
            )
        if format == "indices" and len(shape) != 1:
            raise RunError(
                f"{path}: {name} {shape} is not flat; an index list is [K], into the flattened parameter; store a mask "
                "of the parameter's shape as bool"
            )
    entries: dict[str, Entry] = {}
    for name, (_, shape) in header.items():
        parameter = name.removesuffix(INDICES) if format == "indices" else name
        if parameter in entries:
            raise RunError(f"{path}: {parameter} is given twice, as {parameter} and as {name}")
        if format == "indices":
            entries[parameter] = Entry(name, None, functools.partial(_mark_listed, path, name))
        else:
            entries[parameter] = Entry(name, shape, functools.partial(_mark_true, path, name))
    return ForeignMask(path, format, (path,), entries)


def _mark_true(path: Path, name: str, shape: Shape) -> Tensor:
    """Coordinates of a tensor that are 1. Raises RunError for any value but 0 and 1."""
    values = _read(path, name)
    assert tuple(values.shape) == shape, name
    if values.dtype == torch.bool:
        return values
    wide = values if values.dtype.itemsize > 1 or values.dtype == torch.uint8 else values.float()
    marked = wide == 1
    wrong = ~(marked | (wide == 0))
    if bool(wrong.any()):
        first = wide[wrong].flatten()[0].item()
        raise RunError(
            f"holds {first} ({int(wrong.sum())} values that are neither 0 nor 1); compare with a threshold before "
            "saving it"
        )
    return marked


def _mark_listed(path: Path, name: str, shape: Shape) -> Tensor:
    return _mark_flat(_read(path, name).long(), shape)


def _mark_flat(indices: Tensor, shape: Shape) -> Tensor:
    """Marks flat indices. Raises RunError for one out of range, negative, or twice."""
    n = math.prod(shape)
    marked = torch.zeros(n, dtype=torch.bool)
    if indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < 0:
            raise RunError(f"holds the negative index {low}; indices count from 0")
        if high >= n:
            raise RunError(f"holds index {high}; {shape} has {n} coordinates, counted from 0")
        marked[indices] = True
        if int(marked.sum()) < indices.numel():
            ordered = indices.sort().values
            twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
            raise RunError(f"holds index {twice} twice; store each once")
    return marked.view(shape)


def _open_shira(folder: Path) -> ForeignMask:
    """Opens a folder of PEFT's SHiRA: row and column indices by module; fully trained modules are in the mask whole."""
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"{folder} is a folder without {CONFIG}; name a safetensors file, or the folder of a SHiRA adapter"
        )
    about = read_settings(folder / CONFIG)
    kind = about.get("peft_type") if isinstance(about, dict) else None
    if kind != "SHIRA":
        raise RunError(
            f"{folder} is an adapter of type {kind}, which holds no mask; make one of its update with "
            f"`vlopd mask make BASE {folder} --rule \"{{type='visible'}}\" --out FILE`"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        for pickle in sorted(folder.glob("*.bin")):
            _refuse_pickle(pickle)
        raise RunError(f"{folder} has no {WEIGHTS}; save the adapter again")
    header = _open_header(path)
    entries: dict[str, Entry] = {}
    for name, (_, shape) in header.items():
        bare = name.removeprefix(PREFIX)
        if name.endswith(SHIRA_WEIGHT):
            if name.removesuffix(SHIRA_WEIGHT) + SHIRA_INDICES not in header:
                raise RunError(
                    f"{path}: {name} has no {SHIRA_INDICES[1:]} beside it, so its coordinates are unknown; save the "
                    "adapter with PEFT 0.21 or later"
                )
        elif name.endswith(SHIRA_INDICES):
            count = header.get(name.removesuffix(SHIRA_INDICES) + SHIRA_WEIGHT, ("", None))[1]
            if len(shape) != 2 or shape[0] != 2 or count not in (None, shape[1:]):
                raise RunError(
                    f"{path}: {name} is {shape} and its weight {count}; wanted are [2, K] and [K]"
                )
            parameter = bare.removesuffix(SHIRA_INDICES) + ".weight"
            entries[parameter] = Entry(name, None, functools.partial(_mark_pairs, path, name))
        else:  # of modules_to_save
            entries[bare] = Entry(name, shape, functools.partial(torch.ones, dtype=torch.bool))
    return ForeignMask(folder, "shira", (folder / CONFIG, path), entries)


def _mark_pairs(path: Path, name: str, shape: Shape) -> Tensor:
    """Marks (row, column) pairs of a matrix; the last may be repeated, which pads the list."""
    stored = _read(path, name)
    pairs = stored.long()  # PEFT stores floats on Windows
    if bool((pairs != stored).any()):
        raise RunError("holds indices that are not whole numbers")
    if len(shape) != 2:
        raise RunError(f"is of a matrix, and the parameter is {shape}")
    for what, axis, size in (("row", pairs[0], shape[0]), ("column", pairs[1], shape[1])):
        if axis.numel() and not 0 <= int(axis.min()) <= int(axis.max()) < size:
            wrong = int(axis.min()) if int(axis.min()) < 0 else int(axis.max())
            raise RunError(f"holds {what} {wrong}; {shape} has {size}, counted from 0")
    flat = pairs[0] * shape[1] + pairs[1]
    if len(flat):
        others = (flat != flat[-1]).nonzero()
        flat = flat[: int(others[-1]) + 2 if len(others) else 1]
    return _mark_flat(flat, shape)
