"""Reads a checkpoint folder's tensors one at a time from safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError, RunError
from vlopd.files import parse_json, read_settings
from vlopd.models import integrity
from vlopd.models.integrity import INDEX, SINGLE
from vlopd.weights import adapters

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from vlopd.models.layouts import Region

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored dtypes that are compared and trained from. Integers do not train, and narrower floats need the scales that
are stored beside them."""


class Weights:
    """Lazily reads the tensors of one checkpoint folder by name; a context manager.

    A folder has `model.safetensors`, or an index and its shards; where it has both, the single file
    is read, as transformers does. Raises RunError for pickles, damaged files, shards that lack
    a tensor of the index, and quantised weights (fp8, integers with scales beside them).
    """

    FILE = SINGLE

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        try:
            self._where = self._open()
            self._refuse_packed()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> dict[str, Path]:
        """Opens all files; returns {tensor: the file that holds it}."""
        if adapters.is_adapter(self.folder) and self.FILE == SINGLE:
            raise RunError(
                f"{self.folder} is an adapter ({adapters.CONFIG}); give it as the trained checkpoint, beside its "
                "base, or merge it into its base with PEFT"
            )
        if (single := self.folder / self.FILE).exists():
            return dict.fromkeys(self._open_file(single), single)
        if not (self.folder / INDEX).exists():
            digest_checkpoint(self.folder)  # raises where there are no weights, or only pickles
            raise RunError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
        try:
            shards = integrity.read_index(self.folder / INDEX).weight_map
        except ConfigError as error:
            raise RunError(str(error)) from None
        held = {
            shard: self._open_file(self.folder / shard, holds=shards)
            for shard in sorted(set(shards.values()))
        }
        for name, shard in shards.items():
            if name not in held[shard]:
                raise RunError(f"{self.folder / shard} lacks {name}, which the index places there")
        return {name: self.folder / shard for name, shard in shards.items()}

    def _open_file(self, path: Path, holds: Mapping[str, str] | None = None) -> set[str]:
        """Opens one file; returns the names of its tensors."""
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            state = "missing" if not path.exists() else f"not a complete safetensors file ({error})"
            first = _first_truncated(path) or next(
                (name for name, shard in (holds or {}).items() if shard == path.name), None
            )
            lost = f", so {first} cannot be read" if first else ""
            raise RunError(f"{path} is {state}{lost}; copy or save the checkpoint again") from None
        self._files[path] = file
        return set(file.keys())

    def _refuse_packed(self) -> None:
        about = self.folder / "config.json"
        reason = integrity.find_quantisation(read_settings(about)) if about.is_file() else None
        slices = {name: self._slice(name) for name in self._where}
        stored = {
            n: integrity.TensorHeader(s.get_dtype(), tuple(s.get_shape()))
            for n, s in slices.items()
        }
        if reason := reason or integrity.find_packed(stored):
            raise RunError(f"{self.folder} is quantised: {reason}")

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The tensors that a LoRA adapter changes; empty except in `AdaptedWeights`."""
        return ()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._slice(name).get_shape())

    def is_floating_point(self, name: str) -> bool:
        return self._slice(name).get_dtype().startswith(("F", "BF"))

    def is_parameter(self, name: str) -> bool:
        """False for integers and for constants such as causal masks."""
        return self.is_floating_point(name) and not integrity.is_constant(name, self.shape(name))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """{parameter: its shape}, in the order of names."""
        names = sorted(self._where)
        return {name: tuple(self.shape(name)) for name in names if self.is_parameter(name)}

    def header(self) -> dict[str, Tensor]:
        """The floating-point tensors on the meta device: shapes and dtypes without values."""
        dtypes = {name: FLOATS.get(self.stored(name)) for name in sorted(self._where)}
        return {
            name: torch.empty(self.shape(name), dtype=dtype, device="meta")
            for name, dtype in dtypes.items()
            if dtype is not None
        }

    def stored(self, name: str) -> str:
        """The tensor's stored dtype, as safetensors names it."""
        return self._slice(name).get_dtype()

    def read(self, name: str, of: Region | None = None) -> Tensor:
        """Reads the tensor, or a region of it, as stored. Raises RunError for a NaN or an infinity."""
        try:
            # reopened per tensor: the pages of a mapped file count as resident memory while it is open
            with safe_open(self._where[name], framework="pt") as file:
                if of is None:
                    tensor = file.get_tensor(name)
                else:
                    tensor = file.get_slice(name)[tuple(slice(*axis) for axis in of)]
        except (SafetensorError, OSError) as error:
            raise RunError(f"{self.folder}: cannot read {name} ({error})") from None
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        # aminmax propagates NaN, and is far faster than isfinite on every entry
        if tensor.numel() and not all(map(math.isfinite, map(float, wide.aminmax()))):
            bad = int((~torch.isfinite(wide)).sum())
            raise RunError(
                f"{self.folder}: {name} has {bad} values that are not finite; training diverged"
            )
        return tensor


def _first_truncated(path: Path) -> str | None:
    """The first incomplete tensor of a truncated safetensors file whose header is intact."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
        held = path.stat().st_size - 8 - length
        ends = {n: its["data_offsets"][1] for n, its in header.items() if n != "__metadata__"}
        return min(
            (n for n, end in ends.items() if end > held), key=lambda n: ends[n], default=None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return None  # the header is damaged too; the caller names the file
