"""Deltas: (base, trained) tensor pairs streamed from two checkpoint folders.

Only safetensors are read, one pair of tensors at a time, and only the tensors that a checkpoint's
index names. A delta is the difference of the stored values, taken in fp32 or wider: a difference
taken in bf16 rounds a second time and hides updates. A LoRA adapter is read as its base with the adapter
merged, tensor by tensor, in the base's stored precision.

Parameters are paired where the match is unambiguous: by name; by name without wrappers; under another prefix; and
through transformers' own conversions between layouts (vlopd.models.layouts). Unpaired parameters are counted, and
refused above a fraction of either checkpoint. Buffers (causal masks, position tables, integers that only some
versions store) are listed but never compared, and count towards no fraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlopd.errors import RunError
from vlopd.types import TensorName
from vlopd.weights import adapters

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from vlopd.models.layouts import Pieces, Region
from vlopd.weights.matching import LEFT_OUT, MatchReport, match
from vlopd.weights.merged_adapter import AdaptedWeights, refuse_both
from vlopd.weights.reader import Weights


@dataclass(frozen=True)
class TensorDelta:
    """One parameter before and after training.

    >>> pair.name, pair.where.module, pair.base.dtype, pair.delta.dtype
    ("model.layers.3.mlp.up_proj.weight", "up", torch.bfloat16, torch.float32)
    """

    where: TensorName
    base: Tensor  # as stored
    trained: Tensor  # as stored, the same shape

    @property
    def name(self) -> str:
        return self.where.name

    @cached_property
    def delta(self) -> Tensor:
        """trained - base in fp32, or wider where stored so; zero only where the two are equal."""
        return difference(self.base, self.trained)


def difference(base: Tensor, trained: Tensor) -> Tensor:
    """trained - base in fp32, or float64 where either is stored so; a new tensor."""
    wide = torch.float64 if torch.float64 in (base.dtype, trained.dtype) else torch.float32
    return trained.to(wide, copy=True).sub_(base)


@contextmanager
def _open_pair(base: Path, trained: Path) -> Iterator[tuple[Weights, Weights]]:
    """Opens both checkpoints; a trained folder that is an adapter is opened merged into the base."""
    if adapters.is_adapter(base):
        refuse_both(base)
        raise RunError(f"{base} is an adapter; the base is the model that adapters are added to")
    with Weights(base) as before:
        after = (
            AdaptedWeights(trained, before) if adapters.is_adapter(trained) else Weights(trained)
        )
        with after:
            yield before, after


def match_report(base: Path, trained: Path, limit: float = LEFT_OUT) -> MatchReport:
    """`match` of two folders; reads headers only, plus the tensors of output heads that may be tied."""
    with _open_pair(base, trained) as (before, after):
        return match(before, after, limit)


def assemble(read: Callable[[str, Region], Tensor], pieces: Pieces, shape: torch.Size) -> Tensor:
    """Assembles a tensor of `shape` from pieces of others, bit for bit, in the dtype that holds all of them.

    read: a region of a tensor, by name.
    """
    parts = []
    for piece in pieces:
        part = read(piece.name, piece.of)
        part = part.transpose(-1, -2) if piece.transposed else part
        parts.append(part.reshape([stop - start for start, stop in piece.into]))
    if len(parts) == 1:
        return parts[0].contiguous()
    dtype = functools.reduce(torch.promote_types, {part.dtype for part in parts})
    whole = torch.empty(shape, dtype=dtype)
    for piece, part in zip(pieces, parts, strict=True):
        whole[tuple(slice(*axis) for axis in piece.into)] = part
    return whole


class Deltas:
    """The TensorDeltas of two checkpoint folders, sorted by name; see `stream`."""

    def __init__(
        self,
        base: Path,
        trained: Path,
        classify: Callable[[str], TensorName],
        limit: float = LEFT_OUT,
    ):
        self.base, self.trained, self._classify = base, trained, classify
        self.report = match_report(base, trained, limit)

    def __len__(self) -> int:
        return len(self.report.matched)

    def __iter__(self) -> Iterator[TensorDelta]:
        with self.reader() as read:
            for name in self.report.matched:
                yield read(name)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], TensorDelta]]:
        """Yields a thread-safe function that reads one pair by its matched name."""
        with _open_pair(self.base, self.trained) as (before, after):

            def read(name: str) -> TensorDelta:
                if (pieces := self.report.converted.get(name)) is not None:
                    old = before.read(name)
                    return TensorDelta(
                        self._classify(name), old, assemble(after.read, pieces, old.shape)
                    )
                ours, theirs = self.report.names(name)
                return TensorDelta(self._classify(name), before.read(ours), after.read(theirs))

            yield read

    def sizes(self) -> dict[str, int]:
        """Entries of each matched parameter."""
        with Weights(self.base) as before:
            return {n: before.shape(self.report.names(n)[0]).numel() for n in self.report.matched}


def stream(
    base: Path, trained: Path, classify: Callable[[str], TensorName], limit: float = LEFT_OUT
) -> Deltas:
    """Streams the deltas between two checkpoint folders, tensor by tensor; may be iterated many times.

    Holds one pair of tensors at a time, both in the base's naming and layout. `report` lists what matched and
    what is left out, at most `limit` of either checkpoint's entries. `trained` may be a LoRA adapter (a PEFT folder)
    of `base`. Raises RunError where a checkpoint cannot be read or is of another model, and, while iterating, for a
    tensor with non-finite values.
    """
    return Deltas(base, trained, classify, limit)


def stream_whole(base: Path, trained: Path, classify: Callable[[str], TensorName]) -> Deltas:
    """`stream` that raises RunError where a parameter of the base has no partner.

    For masks and arms built from a delta, where an unpaired parameter would silently count as unchanged.
    """
    deltas = stream(base, trained, classify)
    for its in deltas.report.left_out:
        if its.parameter:
            raise RunError(
                f"{trained}: {its.name} {its.shape} is {its.reason}, so its update is unknown; save the "
                "whole model"
            )
    return deltas
