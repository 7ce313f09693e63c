"""What training changed: (source, trained) tensor pairs streamed from two checkpoint folders.

Only safetensors are read, one pair of tensors at a time, and only the tensors that a checkpoint's
index names. A delta is the difference of the values as stored, taken in fp32 or wider: a difference
taken in bf16 rounds a second time and hides updates. A LoRA adapter stands for its source with the adapter
merged, tensor by tensor, in the source's stored precision.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlopd import adapter
from vlopd.checkpoint import RunError, digest_checkpoint, read_json
from vlopd.models import whole
from vlopd.models.whole import INDEX, SINGLE
from vlopd.types import TensorName

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
"""A head that is tied to the embedding is stored once or twice, as the writer pleased."""
SAME_MODEL = 0.5
"""Checkpoints that share less than this part of either's parameters are not of one architecture."""


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
        return difference(self.source, self.trained)


def difference(source: Tensor, trained: Tensor) -> Tensor:
    """trained - source in fp32, or float64 where either is stored so; a new tensor."""
    wide = torch.float64 if torch.float64 in (source.dtype, trained.dtype) else torch.float32
    return trained.to(wide, copy=True).sub_(source)


@dataclass(frozen=True)
class MatchReport:
    """How the parameters of two checkpoints pair up."""

    matched: tuple[str, ...]  # by the source's names, or a head's own
    missing: tuple[str, ...]  # in the source only
    extra: tuple[str, ...]  # in the trained checkpoint only
    skipped: tuple[str, ...]  # in both, but not floating point
    aliased: Mapping[
        str, tuple[str, str]
    ]  # matched: (name in the source, in the trained checkpoint)
    tied: tuple[str, ...]  # a second copy of the embedding on one side, not counted twice
    adapted: tuple[str, ...]  # changed by a LoRA adapter; all others are then the source's own

    def names(self, matched: str) -> tuple[str, str]:
        """(name in the source, name in the trained checkpoint)."""
        return self.aliased.get(matched, (matched, matched))


class Weights:
    """The tensors of one checkpoint folder by name, read lazily; a context manager.

    A folder has `model.safetensors`, or an index and its shards; where it has both, the single file
    is read, as transformers does. Raises RunError for pickles, damaged files, and shards that lack
    a tensor the index promises, and for weights that are packed (fp8, integers with scales beside them).
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
        """Opens all files; the path of the one that holds each tensor."""
        if adapter.is_adapter(self.folder) and not isinstance(self, Adapted):
            raise RunError(
                f"{self.folder} is an adapter ({adapter.CONFIG}); give it as the trained checkpoint, beside its "
                "base, or merge it into its base with PEFT"
            )
        if (single := self.folder / self.FILE).exists():
            return dict.fromkeys(self._open_file(single), single)
        if not (self.folder / INDEX).exists():
            digest_checkpoint(self.folder)  # says so where there are no weights, or only pickles
            raise RunError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
        index = read_json(self.folder / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            raise RunError(f"{self.folder / INDEX} has no weight_map; save the checkpoint again")
        for shard in set(map(str, shards.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise RunError(
                    f"{self.folder / INDEX} names {shard!r}; only *.safetensors beside it are read"
                )
        held = {
            shard: self._open_file(self.folder / shard, holds=shards)
            for shard in sorted(set(shards.values()))
        }
        for name, shard in shards.items():
            if name not in held[shard]:
                raise RunError(f"{self.folder / shard} lacks {name}, which the index places there")
        return {name: self.folder / shard for name, shard in shards.items()}

    def _open_file(self, path: Path, holds: Mapping[str, str] | None = None) -> set[str]:
        """The names of the tensors in it."""
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            why = "missing" if not path.exists() else f"not a whole safetensors file ({error})"
            first = first_cut(path) or next(
                (name for name, shard in (holds or {}).items() if shard == path.name), None
            )
            lost = f", so {first} cannot be read" if first else ""
            raise RunError(f"{path} is {why}{lost}; copy or save the checkpoint again") from None
        self._files[path] = file
        return set(file.keys())

    def _refuse_packed(self) -> None:
        about = self.folder / "config.json"
        why = whole.quantisation(read_json(about)) if about.is_file() else None
        slices = {name: self._slice(name) for name in self._where}
        stored = {n: whole.Stored(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        if why := why or whole.packing(stored):
            raise RunError(f"{self.folder} is quantised: {why}")

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

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

    def read(self, name: str) -> Tensor:
        """The tensor as stored. Raises RunError when it holds a NaN or an infinity."""
        try:
            # a file of its own, since the pages of a mapped file count as this process's while it is open
            with safe_open(self._where[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{self.folder}: cannot read {name} ({error})") from None
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        # the extremes of a tensor with a NaN are NaN; far faster than asking every entry
        if tensor.numel() and not all(map(math.isfinite, map(float, wide.aminmax()))):
            bad = int((~torch.isfinite(wide)).sum())
            raise RunError(
                f"{self.folder}: {name} has {bad} values that are not finite; training diverged"
            )
        return tensor


def first_cut(path: Path) -> str | None:
    """The first tensor that a truncated safetensors file lacks the end of, where its header is still whole."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        held = path.stat().st_size - 8 - length
        ends = {n: its["data_offsets"][1] for n, its in header.items() if n != "__metadata__"}
        return min(
            (n for n, end in ends.items() if end > held), key=lambda n: ends[n], default=None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return None  # damaged beyond that; the caller names the file


class Adapted(Weights):
    """A source checkpoint with a LoRA adapter merged into it, tensor by tensor, under the source's names."""

    FILE = adapter.WEIGHTS

    def __init__(self, folder: Path, source: Weights):
        super().__init__(folder)
        self.source = source
        shapes = {name: super(Adapted, self).shape(name) for name in super().names()}
        updates, whole = adapter.read_adapter(folder, shapes)
        wanted = {u.parameter: u.shape(shapes[u.a], shapes[u.b]) for u in updates}
        wanted |= {parameter: tuple(shapes[tensor]) for parameter, tensor in whole.items()}
        held = {name: tuple(source.shape(name)) for name in source.names()}
        known = {name: name for name in wanted if name in held}
        known |= {theirs: ours for ours, theirs in renamed(held, wanted).items()}
        for name, shape in wanted.items():
            if name not in known:
                raise RunError(f"{folder}: its {name} is no parameter of {source.folder}")
            if held[known[name]] != shape:
                shapes_said = f"{held[known[name]]} in {source.folder}, {shape}"
                raise RunError(
                    f"{known[name]} is {shapes_said} in {folder}; these are not the same model"
                )
        self._updates = {known[u.parameter]: u for u in updates}
        self._whole = {known[parameter]: tensor for parameter, tensor in whole.items()}

    @property
    def adapted(self) -> tuple[str, ...]:
        return tuple(sorted({*self._updates, *self._whole}))

    def names(self) -> set[str]:
        return self.source.names()

    def shape(self, name: str) -> torch.Size:
        return self.source.shape(name)

    def is_floating_point(self, name: str) -> bool:
        return self.source.is_floating_point(name)

    def read(self, name: str) -> Tensor:
        base = self.source.read(name)
        if name in self._whole:
            base = super().read(self._whole[name]).to(base.dtype)
        if name in self._updates:
            its = self._updates[name]
            base = adapter.merged(base, its.update(super().read(its.a), super().read(its.b)))
        return base


# ------------------------------------------------------------------------------------------ matching


def match(source: Weights, trained: Weights) -> MatchReport:
    """Pairs parameters by name, by name under another prefix, and tied heads; in the order of names.

    Raises RunError for a parameter whose shapes differ, and when the two share less than half of either.
    """
    ours = {name: tuple(source.shape(name)) for name in source.names()}
    theirs = {name: tuple(trained.shape(name)) for name in trained.names()}
    pairs = {name: (name, name) for name in ours.keys() & theirs.keys()}
    pairs |= {name: (name, other) for name, other in renamed(ours, theirs).items()}
    for name, other in pairs.values():
        if ours[name] != theirs[other]:
            shapes = f"{ours[name]} in {source.folder}, {theirs[other]}"
            raise RunError(f"{name} is {shapes} in {trained.folder}; these are not the same model")
    missing = ours.keys() - pairs.keys()
    extra = theirs.keys() - {other for _, other in pairs.values()}
    tied, heads = tied_heads(source, trained, missing, extra, pairs)
    pairs |= heads
    missing -= {*tied, *heads}
    extra -= {*tied, *heads}
    floats = {
        name: pair
        for name, pair in sorted(pairs.items())
        if source.is_floating_point(pair[0]) and trained.is_floating_point(pair[1])
    }
    check_same_model(source, trained, floats, missing, extra)
    return MatchReport(
        matched=tuple(floats),
        missing=tuple(sorted(missing)),
        extra=tuple(sorted(extra)),
        skipped=tuple(sorted(pairs.keys() - floats.keys())),
        aliased={name: pair for name, pair in floats.items() if pair != (name, name)},
        tied=tuple(sorted(tied)),
        adapted=trained.adapted if isinstance(trained, Adapted) else (),
    )


def renamed(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """{our name: their name} of parameters that differ in a prefix, such as model. or language_model.

    Names and shapes of two checkpoints; those of equal name are left out. Of all changes of prefix that the
    names admit, the one under which most parameters meet with equal shapes is taken, then the next.
    """
    left = {name: shape for name, shape in ours.items() if name not in theirs}
    right = {name: shape for name, shape in theirs.items() if name not in ours}
    found: dict[str, str] = {}
    while left and right:
        votes: Counter[tuple[str, str]] = Counter()
        for change in prefix_changes(left, right):
            votes[change] = sum(
                right.get(other) == shape
                for name, shape in left.items()
                if (other := replaced(name, *change)) is not None
            )
        best, count = max(votes.items(), key=lambda v: (v[1], v[0]), default=((), 0))
        if not count:
            break
        for name in list(left):
            other = replaced(name, *best)
            if other in right:
                found[name] = other
                del left[name], right[other]
    return found


def prefix_changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(prefix here, prefix there) under which some stem of one side, up to its layer's number, becomes the other's."""

    def stems(names: Mapping[str, Any]) -> set[tuple[str, ...]]:
        return {tuple(re.split(r"\.(?=\d+\.)", name, maxsplit=1)[0].split(".")) for name in names}

    changes = set()
    for a in stems(left):
        for b in stems(right):
            common = 0
            while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
                common += 1
            if common:
                changes.add((".".join(a[: len(a) - common]), ".".join(b[: len(b) - common])))
    return changes


def replaced(name: str, old: str, new: str) -> str | None:
    """The name with another prefix, or None where it does not begin with the old one."""
    if old and not name.startswith(old + "."):
        return None
    rest = name[len(old) + 1 :] if old else name
    return f"{new}.{rest}" if new else rest


def tied_heads(
    source: Weights,
    trained: Weights,
    missing: set[str],
    extra: set[str],
    pairs: Mapping[str, tuple[str, str]],
) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """(heads that are a copy of their embedding, {head: names} of those that are not and need a partner).

    A head that only one side stores is tied to the embedding on the other. Where it equals its own embedding it
    is the same parameter and not counted twice; where it was trained apart, its partner is the other side's
    embedding.
    """
    tied, heads = set(), {}
    embeddings = [pair for name, pair in pairs.items() if EMBEDDING.search(name)]
    for here, own in ((missing, 0), (extra, 1)):
        for head in sorted(name for name in here if HEAD.search(name)):
            side = (source, trained)[own]
            for pair in embeddings:
                if side.shape(head) != side.shape(pair[own]):
                    continue
                if torch.equal(side.read(head), side.read(pair[own])):
                    tied.add(head)
                else:
                    heads[head] = (head, pair[1]) if own == 0 else (pair[0], head)
                break
    return tied, heads


def check_same_model(
    source: Weights,
    trained: Weights,
    matched: Mapping[str, tuple[str, str]],
    missing: set[str],
    extra: set[str],
) -> None:
    """Raises RunError when the matched parameters are less than half of either checkpoint."""
    if not matched:
        one, other = (min(its.names(), default="nothing") for its in (source, trained))
        named = f"{one} is in the first, {other} in the second"
        raise RunError(
            f"{source.folder} and {trained.folder} share no floating-point parameter ({named})"
        )
    for weights, own, rest in ((source, 0, missing), (trained, 1, extra)):
        shared = sum(weights.shape(pair[own]).numel() for pair in matched.values())
        alone = {n: weights.shape(n).numel() for n in rest if weights.is_floating_point(n)}
        if shared < SAME_MODEL * (shared + sum(alone.values())):
            part = shared / (shared + sum(alone.values()))
            raise RunError(
                f"only {part:.0%} of {weights.folder} has a partner in the other checkpoint ({min(alone)} "
                "has none); these are not the same architecture"
            )


@contextmanager
def opened(source: Path, trained: Path) -> Iterator[tuple[Weights, Weights]]:
    """Both checkpoints, the second with its adapter merged where it is one."""
    with Weights(source) as before:
        after = Adapted(trained, before) if adapter.is_adapter(trained) else Weights(trained)
        with after:
            yield before, after


def match_report(source: Path, trained: Path) -> MatchReport:
    """`match` of two folders; reads headers only, and tensors only of heads that may be tied."""
    with opened(source, trained) as (before, after):
        return match(before, after)


class Deltas:
    """The TensorDeltas of two checkpoint folders, in the order of names; see `stream`."""

    def __init__(self, source: Path, trained: Path, classify: Callable[[str], TensorName]):
        self.source, self.trained, self._classify = source, trained, classify
        self.report = match_report(source, trained)

    def __len__(self) -> int:
        return len(self.report.matched)

    def __iter__(self) -> Iterator[TensorDelta]:
        with self.reader() as read:
            for name in self.report.matched:
                yield read(name)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], TensorDelta]]:
        """A function that reads one pair by its matched name; several threads may call it at once."""
        with opened(self.source, self.trained) as (before, after):

            def read(name: str) -> TensorDelta:
                ours, theirs = self.report.names(name)
                return TensorDelta(self._classify(name), before.read(ours), after.read(theirs))

            yield read

    def sizes(self) -> dict[str, int]:
        """Entries of each matched parameter."""
        with Weights(self.source) as before:
            return {n: before.shape(self.report.names(n)[0]).numel() for n in self.report.matched}


def stream(source: Path, trained: Path, classify: Callable[[str], TensorName]) -> Deltas:
    """What changed between two checkpoint folders, tensor by tensor; may be iterated many times.

    Holds one pair of tensors at a time. Its `report` says what matched; parameters that do not
    match are left out. `trained` may be a LoRA adapter (a PEFT folder) of `source`. Raises RunError where a
    checkpoint cannot be read or is of another model, and, while iterating, for a tensor with values that
    are not finite.
    """
    return Deltas(source, trained, classify)
