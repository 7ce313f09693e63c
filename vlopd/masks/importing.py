"""Imports masks of others: aligns their names and layouts with a base checkpoint's parameters.

Every name is accounted for: parameters that the source does not mention are out of the mask, and names that the base
lacks are refused.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlopd.digests import digest_checkpoint, file_digest
from vlopd.errors import RunError
from vlopd.masks.foreign import Entry, ForeignMask, Format, Shape, open_foreign
from vlopd.models.integrity import first_names
from vlopd.weights.delta import assemble
from vlopd.weights.matching import (
    EMBEDDING,
    HEAD,
    is_tied,
    known_config,
    match_layouts,
    refuse_ambiguous_transpose,
)
from vlopd.weights.name_matching import pair_names
from vlopd.weights.reader import Weights

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    from transformers import PretrainedConfig

    from vlopd.models.layouts import Pieces, Region
    from vlopd.models.loaded import LoadedModel


class Aligned(NamedTuple):
    """A foreign mask in the names and shapes of a model."""

    mask: dict[str, Tensor]
    unmentioned: list[str]
    """Parameters that the source does not mention: no coordinate of them is in the mask."""
    ignored: list[str]
    """Names of the source that the model lacks."""

    def summary(self) -> list[str]:
        """A line on the parameters that are not mentioned, and one on ignored names; none where there are none."""
        lines = []
        if self.unmentioned:
            n = sum(self.mask[name].numel() for name in self.unmentioned)
            lines.append(
                f"{len(self.unmentioned)} of {len(self.mask)} parameters ({n:,} coordinates) are not in the file, and "
                f"so not in the mask: {first_names(self.unmentioned)}"
            )
        if self.ignored:
            lines.append(f"ignored, as the base lacks them: {first_names(self.ignored)}")
        return lines


def align(
    foreign: ForeignMask,
    shapes: Mapping[str, Shape],
    config: PretrainedConfig | None,
    buffers: Iterable[str] = (),
    ignore_unknown: bool = False,
) -> Aligned:
    """Aligns a foreign mask with a model's parameters, by the rules that pair checkpoints (vlopd/weights/delta.py).

    shapes: of all parameters. config: the model's, for tied heads and, where the source holds shapes, other layouts.
    buffers: names that are no parameters, which must not be marked. Raises RunError with the tensor's name.
    """
    source, entries = foreign.source, foreign.entries
    names, converted = _pair(foreign, shapes, config)
    used = {*names.values(), *(piece.name for its in converted.values() for piece in its)}
    extra = sorted(entries.keys() - used)
    missing = shapes.keys() - names.keys() - converted.keys()
    heads = [name for name in (*extra, *missing) if HEAD.search(name)]
    if heads and is_tied(config):
        extra = [name for name in extra if name not in heads]
        _tie_heads(foreign, shapes, names, heads)
    ignored = []
    for name in extra:
        if name in buffers and (shape := entries[name].shape) is not None:
            if bool(foreign.read(name, shape).any()):
                raise RunError(
                    f"{source}: {entries[name].stored} is a buffer, which does not train"
                )
        elif ignore_unknown:
            ignored.append(name)
        else:
            near = difflib.get_close_matches(name, shapes, 1, 0.0)
            raise RunError(
                f"{source}: the base has no parameter {name}; nearest is {near[0] if near else 'none'}; rename it, or "
                "leave it out by `vlopd mask import --ignore-unknown`"
            )

    @functools.lru_cache(maxsize=1)  # one stack of experts fills many parameters
    def whole(name: str) -> Tensor:
        shape = entries[name].shape
        assert shape is not None
        return foreign.read(name, shape)

    def region(name: str, of: Region) -> Tensor:
        return whole(name)[tuple(slice(*axis) for axis in of)]

    mask: dict[str, Tensor] = {}
    for name in sorted(shapes):
        if name in converted:
            mask[name] = assemble(region, converted[name], torch.Size(shapes[name]))
        elif name in names:
            mask[name] = foreign.read(names[name], shapes[name])
        else:
            mask[name] = torch.zeros(shapes[name], dtype=torch.bool)
    if not any(bool(marked.any()) for marked in mask.values()):
        raise RunError(
            f"{source}: the mask is empty: no coordinate of {first_names(sorted(entries))} is in it"
        )
    unmentioned = [name for name in mask if name not in names and name not in converted]
    return Aligned(mask, unmentioned, ignored)


def _pair(
    foreign: ForeignMask, shapes: Mapping[str, Shape], config: PretrainedConfig | None
) -> tuple[dict[str, str], dict[str, Pieces]]:
    """({parameter: name in the source}, {parameter: pieces of tensors in another layout})."""
    source = foreign.source
    theirs = {n: its.shape for n, its in foreign.entries.items() if its.shape is not None}
    if len(theirs) < len(foreign.entries):  # by name alone
        names, _ = pair_names(dict.fromkeys(shapes, ()), dict.fromkeys(foreign.entries, ()))
        unlike = {
            n: other for n, other in names.items() if theirs.get(other, shapes[n]) != shapes[n]
        }
        converted: dict[str, Pieces] = {}
    else:
        names, changes = pair_names(shapes, theirs)
        unlike = {n: other for n, other in names.items() if theirs[other] != shapes[n]}
        names = {n: other for n, other in names.items() if n not in unlike}
        here = {n: shape for n, shape in shapes.items() if n not in names}
        there = {n: theirs[n] for n in theirs.keys() - set(names.values())}
        converted = match_layouts(config, here, config, there, changes) if here and there else {}
        for name, (first, *more) in list(converted.items()):
            if not more and not first.transposed and shapes[name] == theirs[first.name]:
                names[name] = converted.pop(name)[0].name  # only renamed
        refuse_ambiguous_transpose(Path("the base"), source, shapes, names, converted)
        used = {piece.name for its in converted.values() for piece in its} | set(names.values())
        here = {n: () for n in here if n not in names and n not in converted}
        left, _ = pair_names(here, {n: () for n in there if n not in used})
        unlike |= left  # under another prefix, with another shape
        unlike = {n: other for n, other in unlike.items() if n not in converted}
    for name, other in sorted(unlike.items()):
        raise RunError(f"{source}: {other} is {theirs[other]}, {name} of the base {shapes[name]}")
    return names, converted


def _tie_heads(
    foreign: ForeignMask, shapes: Mapping[str, Shape], names: dict[str, str], heads: list[str]
) -> None:
    """Adds tied heads to `names`: head and embedding are one parameter, which either side may store under both names.

    Raises RunError where the source marks the two differently.
    """
    embeddings = [name for name in shapes if EMBEDDING.search(name)]
    for head in heads:
        shape = shapes.get(head) or foreign.entries[head].shape
        alike = [name for name in embeddings if shape in (None, shapes[name])]
        if len(alike) != 1:
            raise RunError(f"{foreign.source}: {head} is tied to an embedding that the base lacks")
        (embedding,) = alike
        if head in shapes:
            names |= {head: names[embedding]} if embedding in names else {}
        elif embedding not in names:
            names[embedding] = head
        else:
            a, b = (foreign.read(name, shapes[embedding]) for name in (head, names[embedding]))
            if not torch.equal(a, b):
                raise RunError(
                    f"{foreign.source}: {head} and {names[embedding]} are one parameter (tied), but their masks "
                    "differ; leave one of them out"
                )


def align_with_checkpoint(
    foreign: ForeignMask, base: Path, ignore_unknown: bool = False
) -> Aligned:
    """`align` with the parameters of a checkpoint folder."""
    with Weights(base) as weights:
        shapes = weights.parameter_shapes()
        buffers = weights.names() - shapes.keys()
    return align(foreign, shapes, known_config(base), buffers, ignore_unknown)


def in_parameter_names(
    mask: Mapping[str, Tensor], loaded: LoadedModel, partial: bool = False
) -> dict[str, Tensor]:
    """A mask of a model's checkpoint under the names of its parameters, without buffers; see `under_names_of`."""
    shapes = {name: tuple(p.shape) for name, p in loaded.model.named_parameters()}
    others = loaded.model.state_dict().keys() - shapes.keys()  # running means, tied names
    held = {name: marked for name, marked in mask.items() if name not in others}
    return under_names_of(held, shapes, loaded.model.config, partial)


def under_names_of(
    mask: dict[str, Tensor],
    shapes: Mapping[str, Shape],
    config: PretrainedConfig | None,
    partial: bool = False,
) -> dict[str, Tensor]:
    """A mask under a model's own parameter names, where it has each of them under another name; else unchanged.

    A checkpoint from the hub may have other names than the model that transformers makes of it, and than a run's base.
    A `partial` mask may lack some: no coordinate of them is in the result.
    """
    if mask.keys() <= shapes.keys():
        return mask
    entries = {
        name: Entry(name, tuple(marked.shape), functools.partial(_as_it_is, marked))
        for name, marked in mask.items()
    }
    try:
        found = align(ForeignMask(Path("mask"), "booleans", (), entries), shapes, config)
    except RunError:
        return mask
    return found.mask if partial or not found.unmentioned else mask


def _as_it_is(marked: Tensor, shape: Shape) -> Tensor:
    return marked


def import_mask(
    source: Path, base: Path, format: Format | None = None, ignore_unknown: bool = False
) -> tuple[Aligned, dict[str, Any]]:
    """Reads a foreign mask for a base checkpoint folder: the mask, and the `inputs` that `save_mask` records.

    `format` is detected where None. Raises RunError as `open_foreign` and `align` do.
    """
    foreign = open_foreign(source, format)
    found = align_with_checkpoint(foreign, base, ignore_unknown)
    rule = {"type": "imported", "format": foreign.format, "file": str(source)}
    return found, {
        "rule": rule,
        "base": digest_checkpoint(base, whole=True),
        **origin(foreign, found),
    }


def origin(foreign: ForeignMask, found: Aligned) -> dict[str, Any]:
    """The sha256 of the source's files, and the names of parameters that it lacks and that the base lacks."""
    listed = {"unmentioned": found.unmentioned, "ignored": found.ignored}
    digests = {path.name: file_digest(path, whole=True) for path in foreign.files}
    return {"files": digests, **{key: names for key, names in listed.items() if names}}
