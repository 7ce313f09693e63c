"""What training changed: (source, trained) tensor pairs streamed from two checkpoint folders.

Only safetensors are read, one pair of tensors at a time, and only the tensors that a checkpoint's
index names. A delta is the difference of the values as stored, taken in fp32 or wider: a difference
taken in bf16 rounds a second time and hides updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlopd.checkpoint import RunError, digest_checkpoint, read_json
from vlopd.types import TensorName

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorDelta:
    """One parameter before and after training.

    >>> pair.name, pair.where.module, pair.source.dtype, pair.delta.dtype
    ("model.layers.3.mlp.up_proj.weight", "up", torch.bfloat16, torch.float32)
    """

    where: TensorName
    source: Tensor  # as stored
    trained: Tensor  # as stored, the same shape

    @property
    def name(self) -> str:
        return self.where.name

    @cached_property
    def delta(self) -> Tensor:
        """trained - source in fp32, or wider where stored so; zero only where the two are equal."""
        stored = (self.source.dtype, self.trained.dtype)
        wide = torch.float64 if torch.float64 in stored else torch.float32
        return self.trained.to(wide) - self.source.to(wide)


@dataclass(frozen=True)
class MatchReport:
    """How the parameter names of two checkpoints pair up."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the source only
    extra: tuple[str, ...]  # in the trained checkpoint only
    skipped: tuple[str, ...]  # in both, but not floating point


class Weights:
    """The tensors of one checkpoint folder by name, read lazily; a context manager.

    A folder has `model.safetensors`, or an index and its shards; where it has both, the single file
    is read, as transformers does. Raises RunError for pickles, damaged files, and shards that lack
    a tensor the index promises.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        try:
            self._handles = self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> dict[str, Any]:
        """The open file that holds each tensor."""
        if (self.folder / SINGLE).exists():
            file = self._open_file(self.folder / SINGLE)
            return {name: file for name in file.keys()}  # noqa: SIM118 - not a dict
        if not (self.folder / INDEX).exists():
            digest_checkpoint(self.folder)  # says so where there are no weights, or only pickles
            raise RunError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
        index = read_json(self.folder / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            raise RunError(f"{self.folder / INDEX} has no weight_map; save the checkpoint again")
        for shard in set(shards.values()):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise RunError(
                    f"{self.folder / INDEX} names {shard!r}; only *.safetensors beside it are read"
                )
        files = {
            shard: self._open_file(self.folder / shard) for shard in sorted(set(shards.values()))
        }
        held = {shard: set(file.keys()) for shard, file in files.items()}
        for name, shard in shards.items():
            if name not in held[shard]:
                raise RunError(f"{self.folder / shard} lacks {name}, which the index places there")
        return {name: files[shard] for name, shard in shards.items()}

    def _open_file(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            why = "missing" if not path.exists() else f"not a whole safetensors file ({error})"
            raise RunError(f"{path} is {why}; copy or save the checkpoint again") from None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._handles)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._handles[name].get_slice(name).get_shape())

    def is_floating_point(self, name: str) -> bool:
        return self._handles[name].get_slice(name).get_dtype().startswith(("F", "BF"))

    def read(self, name: str) -> Tensor:
        """The tensor as stored. Raises RunError when it holds a NaN or an infinity."""
        try:
            tensor = self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{self.folder}: cannot read {name} ({error})") from None
        finite = torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())
        if not finite.all():
            bad = int((~finite).sum())
            raise RunError(
                f"{self.folder}: {name} has {bad} values that are not finite; training diverged"
            )
        return tensor


def match(source: Weights, trained: Weights) -> MatchReport:
    """Pairs parameters by name, in the order of names.

    Raises RunError for a parameter whose shapes differ, and when no parameter matches.
    """
    both = sorted(source.names() & trained.names())
    for name in both:
        if source.shape(name) != trained.shape(name):
            shapes = f"{tuple(source.shape(name))} in {source.folder}, {tuple(trained.shape(name))}"
            raise RunError(f"{name} is {shapes} in {trained.folder}; these are not the same model")
    kept = tuple(n for n in both if source.is_floating_point(n) and trained.is_floating_point(n))
    if not kept:
        raise RunError(f"{source.folder} and {trained.folder} share no floating-point parameter")
    return MatchReport(
        matched=kept,
        missing=tuple(sorted(source.names() - trained.names())),
        extra=tuple(sorted(trained.names() - source.names())),
        skipped=tuple(sorted(set(both) - set(kept))),
    )


def match_report(source: Path, trained: Path) -> MatchReport:
    """`match` of two folders; reads headers only."""
    with Weights(source) as before, Weights(trained) as after:
        return match(before, after)


class Deltas:
    """The TensorDeltas of two checkpoint folders, in the order of names; see `stream`."""

    def __init__(self, source: Path, trained: Path, classify: Callable[[str], TensorName]):
        self.source, self.trained, self._classify = source, trained, classify
        self.report = match_report(source, trained)

    def __len__(self) -> int:
        return len(self.report.matched)

    def __iter__(self) -> Iterator[TensorDelta]:
        with Weights(self.source) as before, Weights(self.trained) as after:
            for name in self.report.matched:
                yield TensorDelta(self._classify(name), before.read(name), after.read(name))


def stream(source: Path, trained: Path, classify: Callable[[str], TensorName]) -> Deltas:
    """What changed between two checkpoint folders, tensor by tensor; may be iterated many times.

    Holds one pair of tensors at a time. Its `report` says what matched; parameters that do not
    match are left out. Raises RunError where a checkpoint cannot be read or is of another model,
    and, while iterating, for a tensor with values that are not finite.
    """
    return Deltas(source, trained, classify)
