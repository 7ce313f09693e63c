"""Pairs the parameters of two checkpoints, and refuses the pair where too many have no partner."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlopd.bits import holds
from vlopd.errors import RunError
from vlopd.models import integrity

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from transformers import PretrainedConfig

    from vlopd.models.layouts import Pieces
from vlopd.weights.name_matching import Changes, Shapes, pair_names, rename_prefixes, strip_wrappers
from vlopd.weights.reader import FLOATS, Weights

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
"""A head that is tied to the embedding is stored once or twice, depending on the writer."""


ADAPTER = re.compile(
    r"(^|\.)((lora|ia3|hada|lokr|vera|oft|boft|hra|adalora|vblora|fourierft|bone|miss|shira|c3a|road|randlora)_\w+"
    r"|modules_to_save|token_adapter|trainable_tokens_delta|prompt_encoder)(\.|$)"
)
"""Names of PEFT's parameters within a wrapped model."""


SAME_MODEL = 0.5
"""Checkpoints with a larger unpaired fraction are reported as different architectures."""


LEFT_OUT = 0.01
"""The largest fraction of either checkpoint's parameters that may be left out. An embedding, a head, a vision tower or
the experts exceed it; a value head does not, and is counted. Constants (causal masks, rotary tables) and integers
(position ids) are listed, whatever their size, and count towards neither fraction."""


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is not compared.

    The shares are fractions of each checkpoint's parameters, 0 where the tensor is absent or not a parameter.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    base_share: float
    trained_share: float
    parameter: bool  # a floating-point parameter of the base


@dataclass(frozen=True)
class MatchReport:
    """How the parameters of two checkpoints pair up."""

    matched: tuple[str, ...]  # by the base's names, or a head's own
    missing: tuple[str, ...]  # in the base only
    extra: tuple[str, ...]  # in the trained checkpoint only
    skipped: tuple[str, ...]  # in both, but a constant, or in a format that is not compared
    aliased: Mapping[str, tuple[str, str]]  # matched: (name in the base, in the trained checkpoint)
    converted: Mapping[str, Pieces]  # matched: the pieces of the trained checkpoint's layout
    tied: tuple[str, ...]  # a second copy of the embedding on one side, not counted twice
    adapted: tuple[str, ...]  # changed by a LoRA adapter; all others are then the base's own
    left_out: tuple[LeftOut, ...]  # missing, extra and skipped, the largest first
    narrowed: tuple[str, ...]
    """Matched, but the trained dtype cannot hold the base's values, so the delta includes that rounding."""

    def names(self, matched: str) -> tuple[str, str]:
        """(name in the base, name in the trained checkpoint)."""
        return self.aliased.get(matched, (matched, matched))

    @property
    def base_share(self) -> float:
        """The fraction of the base's parameters that is not compared."""
        return math.fsum(its.base_share for its in self.left_out)

    @property
    def trained_share(self) -> float:
        return math.fsum(its.trained_share for its in self.left_out)

    def summary(self, most: int = 3) -> str:
        """One line on the tensors left out, naming the largest; empty where everything is compared."""
        if not self.left_out:
            return ""
        count = len(self.left_out)
        names = [f"{its.name} {its.shape} ({its.reason})" for its in self.left_out[:most]]
        names += [f"{count - most} more"] if count > most else []
        return (
            f"{count} tensor{'s' if count != 1 else ''} not compared, {self.base_share:.2%} of the base's "
            f"parameters and {self.trained_share:.2%} of the trained checkpoint's: {', '.join(names)}"
        )


def match(base: Weights, trained: Weights, limit: float = LEFT_OUT) -> MatchReport:
    """Pairs the parameters of two checkpoints, by the rules in vlopd/weights/delta.py.

    Raises RunError for a parameter whose shapes differ, for unmerged adapters, and where more than `limit`
    of either checkpoint's entries would not be compared.
    """
    sides = (base, trained)
    shapes = [{name: tuple(side.shape(name)) for name in side.names()} for side in sides]
    buffers = {n for n in shapes[0] | shapes[1] if _is_buffer(n, sides)}
    ours, theirs = ({n: shape for n, shape in own.items() if n not in buffers} for own in shapes)
    names, changes = pair_names(ours, theirs)
    unlike = {name: other for name, other in names.items() if ours[name] != theirs[other]}
    names = {name: other for name, other in names.items() if name not in unlike}
    missing, extra = ours.keys() - names.keys(), theirs.keys() - set(names.values())
    converted: dict[str, Pieces] = {}
    if missing and extra:
        here, there = {n: ours[n] for n in missing}, {n: theirs[n] for n in extra}
        one, other = (known_config(weights.folder) for weights in sides)
        converted = match_layouts(one or other, here, other or one, there, changes)
    for name, other in sorted(unlike.items()):
        if name not in converted:
            _refuse_shapes(name, ours[name], base, theirs[other], trained)
    missing -= converted.keys()
    extra -= {piece.name for pieces in converted.values() for piece in pieces}
    _refuse_unmerged(base, missing)
    _refuse_unmerged(trained, extra)
    for name, (first, *more) in list(converted.items()):
        if not more and not first.transposed and ours[name] == theirs[first.name]:
            names[name] = converted.pop(name)[0].name  # only renamed
    refuse_ambiguous_transpose(base.folder, trained.folder, ours, names, converted)
    pairs = {name: (name, other) for name, other in names.items()}
    tied, heads = _tied_heads(base, trained, missing, extra, pairs)
    pairs |= heads
    missing -= {*tied, *heads}
    extra -= {*tied, *heads}

    stored: dict[str, tuple[str, ...]] = {
        name: (base.stored(own), trained.stored(other)) for name, (own, other) in pairs.items()
    }
    for name, pieces in converted.items():
        formats = dict.fromkeys(trained.stored(piece.name) for piece in pieces)
        stored[name] = (base.stored(name), *formats)
    skipped = {name: its for name, its in stored.items() if not set(its) <= FLOATS.keys()}
    totals = [
        max(1, sum(math.prod(shape) for name, shape in own.items() if name not in tied))
        for own in (ours, theirs)
    ]

    def left(name: str, side: int | None, reason: str) -> LeftOut:
        """side: 0 in the base only, 1 in the trained checkpoint only, None in both."""
        own = pairs.get(name, (name, name))[0]
        shape = theirs[name] if side == 1 else ours[own]
        here, there = (
            0.0 if side == 1 - i else math.prod(shape) / total for i, total in enumerate(totals)
        )
        return LeftOut(name, shape, reason, here, there, side != 1 and base.is_floating_point(own))

    def aside(name: str) -> LeftOut:
        held = [side for side in sides if name in side.names()]
        formats = " and ".join(dict.fromkeys(side.stored(name) for side in held))
        constant = integrity.is_constant(name, held[0].shape(name))
        kind = "a constant" if constant else f"stored as {formats}"
        only = "the base" if held[0] is base else "the trained checkpoint"
        where = f", in {only} only" if len(held) == 1 else ""
        return LeftOut(name, tuple(held[0].shape(name)), f"{kind}{where}", 0.0, 0.0, False)

    left_out = [
        *map(aside, buffers),
        *(left(name, 0, "in the base only") for name in missing),
        *(left(name, 1, "in the trained checkpoint only") for name in extra),
        *(left(n, None, f"stored as {' and '.join(dict.fromkeys(f))}") for n, f in skipped.items()),
    ]
    left_out.sort(key=lambda its: (-max(its.base_share, its.trained_share), its.name))
    matched = tuple(sorted(stored.keys() - skipped.keys()))
    report = MatchReport(
        matched=matched,
        missing=tuple(sorted({*missing, *(buffers - shapes[1].keys())})),
        extra=tuple(sorted({*extra, *(buffers - shapes[0].keys())})),
        skipped=tuple(sorted({*skipped, *(buffers & shapes[0].keys() & shapes[1].keys())})),
        aliased={n: pairs[n] for n in matched if n in pairs and pairs[n] != (n, n)},
        converted={n: converted[n] for n in matched if n in converted},
        tied=tuple(sorted(tied)),
        adapted=trained.adapted,
        left_out=tuple(left_out),
        narrowed=tuple(n for n in matched if _cannot_hold(*stored[n])),
    )
    _refuse_left_out(base, trained, report, limit)
    return report


def _is_buffer(name: str, sides: Iterable[Weights]) -> bool:
    """Whether no checkpoint that holds the tensor stores it as a parameter."""
    return not any(side.is_parameter(name) for side in sides if name in side.names())


def _cannot_hold(own: str, *others: str) -> bool:
    """Whether one of the other dtypes cannot represent every value of a tensor's own dtype."""
    return not all(holds(FLOATS[other], FLOATS[own]) for other in others)


def _tied_heads(
    base: Weights,
    trained: Weights,
    missing: set[str],
    extra: set[str],
    pairs: Mapping[str, tuple[str, str]],
) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """(heads that are a copy of their embedding, {head: (base name, trained name)} of untied heads).

    A head that only one side stores and that equals its embedding is the same parameter, and not counted twice.
    An untied head is paired with the other side's embedding if that model ties the two (by its config.json);
    otherwise it is missing on that side.
    """
    tied, heads = set(), {}
    embeddings = [pair for name, pair in pairs.items() if EMBEDDING.search(name)]
    for here, own in ((missing, 0), (extra, 1)):
        for head in sorted(name for name in here if HEAD.search(name)):
            side, other = (base, trained)[own], (trained, base)[own]
            for pair in embeddings:
                if side.shape(head) != side.shape(pair[own]):
                    continue
                if _same_values(side.read(head), side.read(pair[own])):
                    tied.add(head)
                elif is_tied(known_config(other.folder) or known_config(side.folder)):
                    heads[head] = (head, pair[1]) if own == 0 else (pair[0], head)
                break
    return tied, heads


def _same_values(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def is_tied(config: PretrainedConfig | None) -> bool:
    """Whether the config's model ties its head to its embedding; False without a config."""
    if config is None:
        return False
    from vlopd.models.layouts import ties_head

    return ties_head(config)


def match_layouts(
    our_config: PretrainedConfig | None,
    ours: Shapes,
    their_config: PretrainedConfig | None,
    theirs: Shapes,
    changes: Changes,
) -> dict[str, Pieces]:
    """{first name: the pieces of second tensors} of parameters that two checkpoints lay out differently.

    ours, theirs: the unpaired parameters. changes: prefix changes, undone in the second names. Needs the configs.
    """
    if our_config is None or their_config is None:
        return {}
    from vlopd.models.layouts import translate_layout

    here, there = strip_wrappers(ours), strip_wrappers(theirs)
    back = [(new, old) for old, new in changes]
    tries = ((here, rename_prefixes(back, there)), (rename_prefixes(changes, here), there))
    found: dict[str, Pieces] = {}
    for own, other in tries[
        : 2 if changes else 1
    ]:  # one of the two has the names that the model has
        pieces = translate_layout(
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


def known_config(folder: Path) -> PretrainedConfig | None:
    """The folder's config; None without a config.json that transformers knows."""
    from vlopd.models.config_files import config_of

    try:
        return config_of(folder)
    except RunError:
        return None


def _refuse_shapes(
    name: str, ours: tuple[int, ...], base: Weights, theirs: tuple[int, ...], trained: Weights
) -> None:
    reason = "these are not the same model"
    if ours[1:] == theirs[1:] and (EMBEDDING.search(name) or HEAD.search(name)):
        reason += "; if one vocabulary was resized, resize the other too (resize_token_embeddings)"
    raise RunError(f"{name} is {ours} in {base.folder}, {theirs} in {trained.folder}; {reason}")


def _refuse_unmerged(weights: Weights, names: set[str]) -> None:
    """Raises RunError where unpaired parameters belong to an adapter: they hold the update, however small they are."""
    for name in sorted(names):
        if ADAPTER.search(name):
            raise RunError(
                f"{weights.folder} holds {name}, part of an unmerged adapter; save the model after "
                "merge_and_unload(), or give the folder that the adapter was saved in"
            )


def refuse_ambiguous_transpose(
    base: Path,
    trained: Path,
    ours: Shapes,
    names: Mapping[str, str],
    converted: Mapping[str, Pieces],
) -> None:
    """Raises RunError for a stack of square matrices next to one that the two checkpoints store transposed."""
    turned = {
        n.rpartition(".")[0] for n, its in converted.items() if any(p.transposed for p in its)
    }
    for name in sorted(names):
        shape = ours[name]
        if len(shape) == 3 and shape[1] == shape[2] and name.rpartition(".")[0] in turned:
            raise RunError(
                f"{name} {shape} is square, and its neighbours are transposed between {base} and "
                f"{trained}, so its orientation is ambiguous; save both in one layout"
            )


def _refuse_left_out(base: Weights, trained: Weights, report: MatchReport, limit: float) -> None:
    """Raises RunError where too large a fraction of either checkpoint is not compared."""
    here, there = base.folder, trained.folder
    if not report.matched:
        one, other = (min(its.names(), default="nothing") for its in (base, trained))
        named = f"{one} is in the first, {other} in the second"
        raise RunError(
            f"{here} and {there} share no floating-point parameter ({named}); "
            "these are not the same architecture"
        )
    if max(report.base_share, report.trained_share) <= limit:
        return
    remedy = "save both in one layout under the same names"
    if report.skipped and report.left_out[0].name in report.skipped:
        remedy = "save both in bf16 or a wider format, dequantised if need be"
    elif not any((folder / "config.json").is_file() for folder in (here, there)):
        remedy += ", or put the model's config.json beside the weights, which defines how layouts translate"
    if max(report.base_share, report.trained_share) > SAME_MODEL:
        remedy = f"these are not the same architecture, unless only their layouts differ: {remedy}"
    raise RunError(
        f"{here} and {there}: {report.summary()}; more than {limit:.2%} of either is refused; {remedy}; geometry's "
        "max_left_out admits more and measures the rest"
    )
