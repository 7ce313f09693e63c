"""What training changed: (source, trained) tensor pairs streamed from two checkpoint folders.

Only safetensors are read, one pair of tensors at a time, and only the tensors that a checkpoint's
index names. A delta is the difference of the values as stored, taken in fp32 or wider: a difference
taken in bf16 rounds a second time and hides updates. A LoRA adapter stands for its source with the adapter
merged, tensor by tensor, in the source's stored precision.

Parameters are paired where that is sure: by name; by name without wrappers; under another prefix; and through
transformers' own conversions between layouts (vlopd.models.layouts). What has no partner is counted, and above a
share of either checkpoint refused. Buffers are no parameters: causal masks, position tables and integers that only
some versions store are counted and named, but never compared, and no share of anything.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlopd import adapter
from vlopd.bits import holds
from vlopd.checkpoint import RunError, digest_checkpoint, read_settings
from vlopd.models import whole
from vlopd.models.atlas import unwrapped_name
from vlopd.models.whole import INDEX, SINGLE
from vlopd.types import TensorName

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from transformers import PretrainedConfig

    from vlopd.models.layouts import Pieces, Region

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
"""A head that is tied to the embedding is stored once or twice, as the writer pleased."""
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored formats whose values are compared and trained from. Integers do not train, and narrower floats mean little
without the scales that they are stored with."""
ADAPTER = re.compile(
    r"(^|\.)((lora|ia3|hada|lokr|vera|oft|boft|hra|adalora|vblora|fourierft|bone|miss|shira|c3a|road|randlora)_\w+"
    r"|modules_to_save|token_adapter|trainable_tokens_delta|prompt_encoder)(\.|$)"
)
"""Names of PEFT's own parameters within a wrapped model."""
SAME_MODEL = 0.5
"""Checkpoints that share less than this part of either's entries are not of one architecture."""
LEFT_OUT = 0.01
"""The largest part of either checkpoint's parameters that may be left out; above it is a refusal. An embedding, a
head, a vision tower or the experts are more than that; a value head is less, and counted. Constants (causal masks,
rotary tables) and integers (position ids) are named, whatever their size, and are part of neither share."""


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
class LeftOut:
    """A tensor that is not compared.

    Its shares are of each checkpoint's parameters, 0 where it has no such tensor or the tensor is no parameter.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    source_share: float
    trained_share: float
    parameter: bool  # a floating-point parameter of the source


@dataclass(frozen=True)
class MatchReport:
    """How the parameters of two checkpoints pair up."""

    matched: tuple[str, ...]  # by the source's names, or a head's own
    missing: tuple[str, ...]  # in the source only
    extra: tuple[str, ...]  # in the trained checkpoint only
    skipped: tuple[str, ...]  # in both, but a constant, or in a format that is not compared
    aliased: Mapping[
        str, tuple[str, str]
    ]  # matched: (name in the source, in the trained checkpoint)
    converted: Mapping[str, Pieces]  # matched: what the trained checkpoint's layout has of it
    tied: tuple[str, ...]  # a second copy of the embedding on one side, not counted twice
    adapted: tuple[str, ...]  # changed by a LoRA adapter; all others are then the source's own
    left_out: tuple[LeftOut, ...]  # missing, extra and skipped, the largest first
    narrowed: tuple[str, ...]
    """Matched, but the trained dtype cannot hold the source's values: the delta has that rounding too."""

    def names(self, matched: str) -> tuple[str, str]:
        """(name in the source, name in the trained checkpoint)."""
        return self.aliased.get(matched, (matched, matched))

    @property
    def source_share(self) -> float:
        """The part of the source's parameters that is not compared."""
        return math.fsum(its.source_share for its in self.left_out)

    @property
    def trained_share(self) -> float:
        return math.fsum(its.trained_share for its in self.left_out)

    def said(self, most: int = 3) -> str:
        """What is left out, in one line that names the largest; empty where everything is compared."""
        if not self.left_out:
            return ""
        count = len(self.left_out)
        names = [f"{its.name} {its.shape} ({its.reason})" for its in self.left_out[:most]]
        names += [f"{count - most} more"] if count > most else []
        return (
            f"{count} tensor{'s' if count != 1 else ''} not compared, {self.source_share:.2%} of the source's "
            f"parameters and {self.trained_share:.2%} of the trained checkpoint's: {', '.join(names)}"
        )


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
        index = read_settings(self.folder / INDEX)
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
        why = whole.quantisation(read_settings(about)) if about.is_file() else None
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

    def is_parameter(self, name: str) -> bool:
        """False for integers and for constants such as causal masks."""
        return self.is_floating_point(name) and not whole.is_constant(name, self.shape(name))

    def header(self) -> dict[str, Tensor]:
        """The floating-point tensors on the meta device: shapes and dtypes without values."""
        dtypes = {name: FLOATS.get(self.stored(name)) for name in sorted(self._where)}
        return {
            name: torch.empty(self.shape(name), dtype=dtype, device="meta")
            for name, dtype in dtypes.items()
            if dtype is not None
        }

    def stored(self, name: str) -> str:
        """The format that it is stored in, as safetensors names it."""
        return self._slice(name).get_dtype()

    def read(self, name: str, of: Region | None = None) -> Tensor:
        """The tensor, or a region of it, as stored. Raises RunError when it holds a NaN or an infinity."""
        try:
            # a file of its own, since the pages of a mapped file count as this process's while it is open
            with safe_open(self._where[name], framework="pt") as file:
                if of is None:
                    tensor = file.get_tensor(name)
                else:
                    tensor = file.get_slice(name)[tuple(slice(*axis) for axis in of)]
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
        refuse_both(folder)
        super().__init__(folder)
        self.source = source
        shapes = {name: super(Adapted, self).shape(name) for name in super().names()}
        updates, whole = adapter.read_adapter(folder, shapes)
        wanted = {u.parameter: u.shape(shapes[u.a], shapes[u.b]) for u in updates}
        wanted |= {parameter: tuple(shapes[tensor]) for parameter, tensor in whole.items()}
        held = {name: tuple(source.shape(name)) for name in source.names()}
        known = {theirs: ours for ours, theirs in paired(held, wanted)[0].items()}
        for name, shape in wanted.items():
            if name not in known:
                raise RunError(f"{folder}: its {name} is no parameter of {source.folder}")
            if held[known[name]] != shape:
                shapes_said = f"{held[known[name]]} in {source.folder}, {shape}"
                raise RunError(
                    f"{known[name]} is {shapes_said} in {folder}; these are not the same model"
                )
        for update in updates:
            refuse_orientation(folder, source, known[update.parameter], update)
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

    def header(self) -> dict[str, Tensor]:
        return self.source.header()

    def stored(self, name: str) -> str:
        return self.source.stored(name)

    def read(self, name: str, of: Region | None = None) -> Tensor:
        assert of is None, "an adapter has the source's layout"
        base = self.source.read(name)
        if name in self._whole:
            base = super().read(self._whole[name]).to(base.dtype)
        if name in self._updates:
            its = self._updates[name]
            base = adapter.merged(base, its.update(super().read(its.a), super().read(its.b)))
            if not torch.isfinite(base).all():
                raise RunError(
                    f"{self.folder}: {name} is not finite once merged in {base.dtype}; the adapter diverged, or needs "
                    "a source in a wider format"
                )
        return base


# ------------------------------------------------------------------------------------------ matching


def match(source: Weights, trained: Weights, limit: float = LEFT_OUT) -> MatchReport:
    """Pairs parameters where that is sure, in the order of names; the module says how.

    Raises RunError for a parameter whose shapes differ, for adapters that are not merged, and where more than `limit`
    of either checkpoint's entries would not be compared.
    """
    sides = (source, trained)
    shapes = [{name: tuple(side.shape(name)) for name in side.names()} for side in sides]
    buffers = {n for n in shapes[0] | shapes[1] if is_buffer(n, sides)}
    ours, theirs = ({n: shape for n, shape in own.items() if n not in buffers} for own in shapes)
    names, changes = paired(ours, theirs)
    unlike = {name: other for name, other in names.items() if ours[name] != theirs[other]}
    names = {name: other for name, other in names.items() if name not in unlike}
    missing, extra = ours.keys() - names.keys(), theirs.keys() - set(names.values())
    converted: dict[str, Pieces] = {}
    if missing and extra:
        here, there = {n: ours[n] for n in missing}, {n: theirs[n] for n in extra}
        converted = in_another_layout(source, here, trained, there, changes)
    for name, other in sorted(unlike.items()):
        if name not in converted:
            refuse_shapes(name, ours[name], source, theirs[other], trained)
    missing -= converted.keys()
    extra -= {piece.name for pieces in converted.values() for piece in pieces}
    refuse_unmerged(source, missing)
    refuse_unmerged(trained, extra)
    for name, (first, *more) in list(converted.items()):
        if not more and not first.transposed and ours[name] == theirs[first.name]:
            names[name] = converted.pop(name)[0].name  # only a name of its own
    refuse_square(source, trained, ours, names, converted)
    pairs = {name: (name, other) for name, other in names.items()}
    tied, heads = tied_heads(source, trained, missing, extra, pairs)
    pairs |= heads
    missing -= {*tied, *heads}
    extra -= {*tied, *heads}

    stored: dict[str, tuple[str, ...]] = {
        name: (source.stored(own), trained.stored(other)) for name, (own, other) in pairs.items()
    }
    for name, pieces in converted.items():
        formats = dict.fromkeys(trained.stored(piece.name) for piece in pieces)
        stored[name] = (source.stored(name), *formats)
    skipped = {name: its for name, its in stored.items() if not set(its) <= FLOATS.keys()}
    totals = [
        max(1, sum(math.prod(shape) for name, shape in own.items() if name not in tied))
        for own in (ours, theirs)
    ]

    def left(name: str, side: int | None, reason: str) -> LeftOut:
        """side: 0 in the source only, 1 in the trained checkpoint only, None in both."""
        own = pairs.get(name, (name, name))[0]
        shape = theirs[name] if side == 1 else ours[own]
        here, there = (
            0.0 if side == 1 - i else math.prod(shape) / total for i, total in enumerate(totals)
        )
        return LeftOut(
            name, shape, reason, here, there, side != 1 and source.is_floating_point(own)
        )

    def aside(name: str) -> LeftOut:
        held = [side for side in sides if name in side.names()]
        formats = " and ".join(dict.fromkeys(side.stored(name) for side in held))
        constant = whole.is_constant(name, held[0].shape(name))
        kind = "a constant" if constant else f"stored as {formats}"
        only = "the source" if held[0] is source else "the trained checkpoint"
        where = f", in {only} only" if len(held) == 1 else ""
        return LeftOut(name, tuple(held[0].shape(name)), f"{kind}{where}", 0.0, 0.0, False)

    left_out = [
        *map(aside, buffers),
        *(left(name, 0, "in the source only") for name in missing),
        *(left(name, 1, "in the trained checkpoint only") for name in extra),
        *(left(n, None, f"stored as {' and '.join(dict.fromkeys(f))}") for n, f in skipped.items()),
    ]
    left_out.sort(key=lambda its: (-max(its.source_share, its.trained_share), its.name))
    matched = tuple(sorted(stored.keys() - skipped.keys()))
    report = MatchReport(
        matched=matched,
        missing=tuple(sorted({*missing, *(buffers - shapes[1].keys())})),
        extra=tuple(sorted({*extra, *(buffers - shapes[0].keys())})),
        skipped=tuple(sorted({*skipped, *(buffers & shapes[0].keys() & shapes[1].keys())})),
        aliased={n: pairs[n] for n in matched if n in pairs and pairs[n] != (n, n)},
        converted={n: converted[n] for n in matched if n in converted},
        tied=tuple(sorted(tied)),
        adapted=trained.adapted if isinstance(trained, Adapted) else (),
        left_out=tuple(left_out),
        narrowed=tuple(n for n in matched if loses(*stored[n])),
    )
    refuse_left_out(source, trained, report, limit)
    return report


def is_buffer(name: str, sides: Iterable[Weights]) -> bool:
    """Whether a tensor is a parameter of none of the checkpoints that hold it."""
    return not any(side.is_parameter(name) for side in sides if name in side.names())


def loses(own: str, *others: str) -> bool:
    """Whether some of the other formats cannot hold all values of a tensor's own."""
    return not all(holds(FLOATS[other], FLOATS[own]) for other in others)


Shapes = Mapping[str, tuple[int, ...]]
Changes = list[tuple[str, str]]
"""(prefix here, prefix there), in the order in which they apply."""


def paired(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({our name: their name}, the changes of prefix): by name, without wrappers, and under another prefix."""
    found = {name: name for name in ours.keys() & theirs.keys()}
    left = unwrapped(ours.keys() - found.keys())
    right = unwrapped(theirs.keys() - found.keys())
    found |= {left[bare]: right[bare] for bare in left.keys() & right.keys()}
    under, changes = renamed(
        {bare: ours[name] for bare, name in left.items()},
        {bare: theirs[name] for bare, name in right.items()},
    )
    return found | {left[bare]: right[other] for bare, other in under.items()}, changes


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """{name without wrappers: name}; those that two names share are left out."""
    bare = {name: unwrapped_name(name) for name in names}
    count = Counter(bare.values())
    return {plain: name for name, plain in bare.items() if count[plain] == 1}


def renamed(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({our name: their name}, the changes of prefix) of parameters under another prefix, such as language_model.

    Names and shapes of two checkpoints; those of equal name are left out. Of all changes of prefix that the
    names admit, the one under which most parameters meet with equal shapes is taken, then the next. Where two
    changes of equal number give a parameter different partners, none is sure.
    """
    left = {name: shape for name, shape in ours.items() if name not in theirs}
    right = {name: shape for name, shape in theirs.items() if name not in ours}
    found: dict[str, str] = {}
    changes: Changes = []
    while left and right:
        votes = {change: meeting(left, right, change) for change in prefix_changes(left, right)}
        best = max(votes, key=lambda change: (len(votes[change]), change), default=None)
        if best is None or not votes[best]:
            break
        rivals = [v for v in votes.values() if len(v) == len(votes[best])]
        partners: dict[str, set[str]] = {}
        for rival in rivals:
            for name, other in rival.items():
                partners.setdefault(name, set()).add(other)
                partners.setdefault(other, set()).add(name)
        unsure = {name for name, its in partners.items() if len(its) > 1}
        unsure |= {other for name in unsure for other in partners[name]}
        before = len(found)
        for name in list(left):
            partner = replaced(name, *best)
            if partner is not None and partner in right and not {name, partner} & unsure:
                found[name] = partner
                del left[name], right[partner]
        changes += [best] if len(found) > before else []
        for name in unsure:
            left.pop(name, None)
            right.pop(name, None)
    return found, changes


def meeting(left: Shapes, right: Shapes, change: tuple[str, str]) -> dict[str, str]:
    """{name here: name there} of parameters that a change of prefix brings together with equal shapes."""
    others = {name: replaced(name, *change) for name in left}
    return {n: other for n, other in others.items() if other and right.get(other) == left[n]}


def prefix_changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(prefix here, prefix there) under which some stem of one side, up to its layer's number, becomes the other's.

    Names without a layer are a stem as a whole, and meet in their module at least: norm.weight, not weight alone.
    """

    def stems(names: Mapping[str, Any]) -> set[tuple[str, ...]]:
        return {tuple(re.split(r"\.(?=\d+\.)", name, maxsplit=1)[0].split(".")) for name in names}

    changes = set()
    for a in stems(left):
        for b in stems(right):
            common = 0
            while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
                common += 1
            needed = 2 if a[-1] in ("weight", "bias") else 1
            if common >= min(needed, len(a), len(b)):
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

    Where a head that only one side stores equals its own embedding, it is the same parameter and not counted twice.
    Where it was trained apart, its partner is the other side's embedding, if the model there ties the two (by its
    config.json); otherwise that side has lost its head.
    """
    tied, heads = set(), {}
    embeddings = [pair for name, pair in pairs.items() if EMBEDDING.search(name)]
    for here, own in ((missing, 0), (extra, 1)):
        for head in sorted(name for name in here if HEAD.search(name)):
            side, other = (source, trained)[own], (trained, source)[own]
            for pair in embeddings:
                if side.shape(head) != side.shape(pair[own]):
                    continue
                if same_values(side.read(head), side.read(pair[own])):
                    tied.add(head)
                elif is_tied(known_config(other.folder) or known_config(side.folder)):
                    heads[head] = (head, pair[1]) if own == 0 else (pair[0], head)
                break
    return tied, heads


def same_values(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def is_tied(config: PretrainedConfig | None) -> bool:
    if config is None:
        return False
    from vlopd.models.layouts import ties_head

    return ties_head(config)


def in_another_layout(
    source: Weights, ours: Shapes, trained: Weights, theirs: Shapes, changes: Changes
) -> dict[str, Pieces]:
    """{our name: the pieces of their tensors} of what the two checkpoints lay out differently.

    ours, theirs: what has no partner. changes: of prefix, which are undone in their names. Needs a config.json.
    """
    configs = [known_config(weights.folder) for weights in (source, trained)]
    our_config, their_config = configs[0] or configs[1], configs[1] or configs[0]
    if our_config is None or their_config is None:
        return {}
    from vlopd.models.layouts import translated

    here, there = unwrapped(ours), unwrapped(theirs)
    back = [(new, old) for old, new in changes]
    tries = ((here, renamed_by(back, there)), (renamed_by(changes, here), there))
    found: dict[str, Pieces] = {}
    for own, other in tries[
        : 2 if changes else 1
    ]:  # one of the two has the names that the model has
        pieces = translated(
            {bare: ours[name] for bare, name in own.items()},
            our_config,
            {bare: theirs[name] for bare, name in other.items()},
            their_config,
        )
        if len(pieces) > len(found):
            found = {
                own[bare]: tuple(replace(piece, name=other[piece.name]) for piece in its)
                for bare, its in pieces.items()
            }
    return found


def renamed_by(changes: Changes, names: Mapping[str, str]) -> dict[str, str]:
    """The same under the first change of prefix that fits each name."""
    found = {}
    for bare, name in names.items():
        others = (replaced(bare, *change) for change in changes)
        found[next((other for other in others if other is not None), bare)] = name
    return found


def known_config(folder: Path) -> PretrainedConfig | None:
    """The folder's config.json; None where it has none, or one that transformers does not know."""
    from vlopd.models.about import config_of

    try:
        return config_of(folder)
    except RunError:
        return None


# ------------------------------------------------------------------------------------------ refusals


def refuse_shapes(
    name: str, ours: tuple[int, ...], source: Weights, theirs: tuple[int, ...], trained: Weights
) -> None:
    why = "these are not the same model"
    if ours[1:] == theirs[1:] and (EMBEDDING.search(name) or HEAD.search(name)):
        why += "; if one vocabulary was resized, resize the other alike (resize_token_embeddings)"
    raise RunError(f"{name} is {ours} in {source.folder}, {theirs} in {trained.folder}; {why}")


def refuse_unmerged(weights: Weights, names: set[str]) -> None:
    """Raises RunError where parameters without a partner are an adapter's: small as they are, they hold the update."""
    for name in sorted(names):
        if ADAPTER.search(name):
            raise RunError(
                f"{weights.folder} holds {name}, part of an adapter that is not merged; save the model after "
                "merge_and_unload(), or give the folder that the adapter was saved in"
            )


def refuse_unlike_config(folder: Path) -> None:
    """Raises RunError where a folder's weights are not those of its config.json: the first that is missing or unlike.

    Reads headers alone. Adapters, folders without a config.json and those of models that transformers does not know
    are accepted, as are tensors that the model has no place for: the pairing counts them.
    """
    path = folder / "config.json"
    if not path.is_file() or adapter.is_adapter(folder):
        return
    about = read_settings(path)
    if not isinstance(about, dict):
        raise RunError(f"{path} is no JSON object; give the config.json of the model, or remove it")
    from vlopd.models.about import config_of, is_known

    if not is_known(about):
        return
    from vlopd.models.layouts import fit

    config = config_of(folder)
    assert config is not None
    with Weights(folder) as weights:
        tensors = {name: weights.stored(name) for name in weights.names()}
        why = whole.ragged(
            {n: whole.Stored(d, tuple(weights.shape(n))) for n, d in tensors.items()}
        )
        if why is not None:
            raise RunError(f"{folder}: {why}")
        header = weights.header()
        named = unwrapped(header)
    try:
        found = fit(config, {bare: header[name] for bare, name in named.items()})
        if found is not None:  # once more with what is under another prefix
            pairs, changes = paired(found.lacking, found.unused)
            back = [(new, old) for old, new in changes]
            placed = {bare: its for bare, its in named.items() if bare not in found.unused}
            placed |= {own: named[other] for own, other in pairs.items()}
            others = found.unused.keys() - set(pairs.values())
            moved = renamed_by(back, {bare: named[bare] for bare in others})
            found = fit(config, {n: header[its] for n, its in (moved | placed).items()})
    except ValueError as error:
        said = " ".join(str(error).split())
        raise RunError(f"{path} describes no model ({said}); give the model's own") from None
    if found is None:
        return
    for name, (held, wanted) in sorted(found.unlike.items()):
        raise RunError(
            f"{folder}: {name} is {held} in its file and {wanted} in config.json; give the config.json that its "
            "weights were saved with"
        )
    lacking, unused = (sum(map(math.prod, its.values())) for its in (found.lacking, found.unused))
    if not lacking or (unused >= lacking and 2 * len(found.lacking) > len(header)):
        return  # in the second case they are there under names of a layout that we do not know
    raise RunError(
        f"{folder} is not whole: {whole.few(sorted(found.lacking))} of config.json's model "
        f"{'are' if len(found.lacking) > 1 else 'is'} not in its file; save the whole model again, or give the "
        "config.json that its weights were saved with"
    )


def refuse_both(folder: Path) -> None:
    """Raises RunError for a folder that holds a model and an adapter: which of the two is meant cannot be told."""
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            raise RunError(
                f"{folder} holds a model ({name}) and an adapter ({adapter.CONFIG}); move one of them to a folder of "
                "its own"
            )


def refuse_square(
    source: Weights,
    trained: Weights,
    ours: Shapes,
    names: Mapping[str, str],
    converted: Mapping[str, Pieces],
) -> None:
    """Raises RunError for a stack of square matrices beside one that the two checkpoints store transposed."""
    turned = {
        n.rpartition(".")[0] for n, its in converted.items() if any(p.transposed for p in its)
    }
    for name in sorted(names):
        shape = ours[name]
        if len(shape) == 3 and shape[1] == shape[2] and name.rpartition(".")[0] in turned:
            raise RunError(
                f"{name} {shape} is square, and its neighbours are transposed between {source.folder} and "
                f"{trained.folder}, so which way it lies cannot be told; save both in one layout"
            )


def refuse_orientation(folder: Path, source: Weights, name: str, update: adapter.LowRank) -> None:
    """Raises RunError for a square matrix that the model stores the other way round than the adapter says.

    PEFT keeps one fan_in_fan_out for all modules; a shape shows where it does not hold, a square one cannot.
    """
    shape = source.shape(name)
    if len(shape) != 2 or shape[0] != shape[1] or "lora_embedding" in update.a:
        return
    config = known_config(source.folder)
    if config is None:
        return
    from vlopd.models.atlas import classify, parts

    if parts(classify(name), shape, config)[0].transposed != update.transposed:
        raise RunError(
            f"{folder}: {adapter.CONFIG} says fan_in_fan_out = {str(update.transposed).lower()}, but {name} is stored "
            "the other way round; merge it with PEFT first"
        )


def refuse_left_out(source: Weights, trained: Weights, report: MatchReport, limit: float) -> None:
    """Raises RunError when too much of either checkpoint is not compared."""
    here, there = source.folder, trained.folder
    if not report.matched:
        one, other = (min(its.names(), default="nothing") for its in (source, trained))
        named = f"{one} is in the first, {other} in the second"
        raise RunError(
            f"{here} and {there} share no floating-point parameter ({named}); "
            "these are not the same architecture"
        )
    if max(report.source_share, report.trained_share) <= limit:
        return
    remedy = "save both in one layout under the same names"
    if report.skipped and report.left_out[0].name in report.skipped:
        remedy = "save both in bf16 or a wider format, dequantised if need be"
    elif not any((folder / "config.json").is_file() for folder in (here, there)):
        remedy += (
            ", or put the model's config.json beside the weights, which says how layouts translate"
        )
    if max(report.source_share, report.trained_share) > SAME_MODEL:
        remedy = f"these are not the same architecture, unless only their layouts differ: {remedy}"
    raise RunError(
        f"{here} and {there}: {report.said()}; more than {limit:.2%} of either is refused; {remedy}; geometry's "
        "max_left_out admits more and measures the rest"
    )


# ------------------------------------------------------------------------------------------- streams


@contextmanager
def opened(source: Path, trained: Path) -> Iterator[tuple[Weights, Weights]]:
    """Both checkpoints, the second with its adapter merged where it is one."""
    if adapter.is_adapter(source):
        refuse_both(source)
        raise RunError(
            f"{source} is an adapter; the source is the model that adapters are added to"
        )
    with Weights(source) as before:
        after = Adapted(trained, before) if adapter.is_adapter(trained) else Weights(trained)
        with after:
            yield before, after


def match_report(source: Path, trained: Path, limit: float = LEFT_OUT) -> MatchReport:
    """`match` of two folders; reads headers only, and tensors only of heads that may be tied."""
    with opened(source, trained) as (before, after):
        return match(before, after, limit)


def assembled(weights: Weights, pieces: Pieces, shape: torch.Size) -> Tensor:
    """A tensor of `shape` from pieces of others, bit for bit; in the format that holds all of them."""
    parts = []
    for piece in pieces:
        part = weights.read(piece.name, piece.of)
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
    """The TensorDeltas of two checkpoint folders, in the order of names; see `stream`."""

    def __init__(
        self,
        source: Path,
        trained: Path,
        classify: Callable[[str], TensorName],
        limit: float = LEFT_OUT,
    ):
        self.source, self.trained, self._classify = source, trained, classify
        self.report = match_report(source, trained, limit)

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
                if (pieces := self.report.converted.get(name)) is not None:
                    old = before.read(name)
                    return TensorDelta(
                        self._classify(name), old, assembled(after, pieces, old.shape)
                    )
                ours, theirs = self.report.names(name)
                return TensorDelta(self._classify(name), before.read(ours), after.read(theirs))

            yield read

    def sizes(self) -> dict[str, int]:
        """Entries of each matched parameter."""
        with Weights(self.source) as before:
            return {n: before.shape(self.report.names(n)[0]).numel() for n in self.report.matched}


def stream(
    source: Path, trained: Path, classify: Callable[[str], TensorName], limit: float = LEFT_OUT
) -> Deltas:
    """What changed between two checkpoint folders, tensor by tensor; may be iterated many times.

    Holds one pair of tensors at a time, both in the source's naming and layout. Its `report` says what matched and
    what is left out, which is at most `limit` of either's entries. `trained` may be a LoRA adapter (a PEFT folder)
    of `source`. Raises RunError where a checkpoint cannot be read or is of another model, and, while iterating, for a
    tensor with values that are not finite.
    """
    return Deltas(source, trained, classify, limit)


def stream_whole(source: Path, trained: Path, classify: Callable[[str], TensorName]) -> Deltas:
    """`stream` for what is built from an update: raises RunError where a parameter of the source has no partner.

    What is not compared would silently count as unmoved there.
    """
    deltas = stream(source, trained, classify)
    for its in deltas.report.left_out:
        if its.parameter:
            raise RunError(
                f"{trained}: {its.name} {its.shape} is {its.reason}, so how it moved is not known; save the "
                "whole model"
            )
    return deltas
