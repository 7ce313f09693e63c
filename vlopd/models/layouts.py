"""Translates between checkpoint layouts of one model.

A mixture of experts is stored with one matrix per expert (the hub's layout) or with all experts in one tensor (as
transformers 5 holds them); stacks are [experts, in, out] or [experts, out, in]; modules have older names.
transformers' loading conversions define which model parameter every stored tensor fills. Two checkpoints
translate where both fill the same parameters by moving values only: stack, concatenate, slice, transpose.
Conversions that compute, or permute within a matrix, are not supported.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from vlopd.models import families
from vlopd.models.conversions import origins
from vlopd.models.parameter_names import classify, parts

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""[start, stop) on every axis of a tensor."""
SPLIT_NAMES = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}
"""Fused modules that other layouts store as q_proj, k_proj, v_proj; gate_proj, up_proj."""


@dataclass(frozen=True)
class Piece:
    """A region of tensor `name` and the region of the target that it fills: `target[into] = name[of]`.

    Either may have leading axes of length 1; `transposed`: the last two axes are swapped.
    """

    name: str
    of: Region
    into: Region
    transposed: bool = False


Pieces = tuple[Piece, ...]


class Untranslatable(Exception):
    """An unsupported conversion, or tensors that do not fill their target."""


def translate_layout(
    ours: Mapping[str, Shape],
    our_config: PretrainedConfig,
    theirs: Mapping[str, Shape],
    their_config: PretrainedConfig,
) -> dict[str, Pieces]:
    """{name in `ours`: the pieces of tensors in `theirs` with the same weights}, for all that translate exactly.

    ours, theirs: shapes of two checkpoints' tensors by name.
    """
    places, there = _place_in_model(ours, our_config), _place_in_model(theirs, their_config)
    places, there = (
        _split_fused(places, there, our_config),
        _split_fused(there, places, their_config),
    )
    found: dict[str, list[Piece]] = {}
    for parameter in places.keys() & there.keys():
        for here in places[parameter]:
            for other in there[parameter]:
                shared = _intersection(here.into, other.into)
                if shared is not None:
                    piece = Piece(
                        other.name,
                        _source_region(other, shared),
                        _source_region(here, shared),
                        here.transposed != other.transposed,
                    )
                    found.setdefault(here.name, []).append(piece)
    used: dict[str, int] = {}
    for pieces in found.values():
        for piece in pieces:
            used[piece.name] = used.get(piece.name, 0) + _size(piece.of)
    return {
        name: tuple(pieces)
        for name, pieces in sorted(found.items())
        if sum(_size(piece.into) for piece in pieces) == math.prod(ours[name])
        and all(used[piece.name] == math.prod(theirs[piece.name]) for piece in pieces)
    }


def ties_head(config: PretrainedConfig) -> bool:
    """Whether the config's model ties its head to its embedding; False where unknown."""
    try:
        model = _on_meta(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except Exception:  # a model's code may raise anything
        return False
    return head is not None and head.weight is embedding.weight


# ------------------------------------------------------------------------------------ into the model


def _place_in_model(shapes: Mapping[str, Shape], config: PretrainedConfig) -> dict[str, Pieces]:
    """{model parameter: the pieces that fill it} for a checkpoint's tensors, by name and shape.

    Only parameters that are filled completely; empty for a model that transformers cannot build.
    """
    try:
        model = _on_meta(config)
        transforms = get_model_conversion_mapping(model)
    except Exception:  # a model's code may raise anything; its layouts are then unknown
        return {}
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    patterns = {pattern: one for one in converters for pattern in one.source_patterns}
    groups: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if parameter not in parameters and name in parameters:
            parameter, pattern = name, None
        if parameter in parameters:
            groups.setdefault(parameter, {}).setdefault(pattern, []).append(name)
    found: dict[str, Pieces] = {}
    for parameter, names in groups.items():
        leaves = {
            pattern: [VirtualTensor.leaf(name, shapes[name]) for name in own]
            for pattern, own in names.items()
        }
        try:
            if None in leaves:
                ((only,),) = leaves.values()
                targets = {parameter: only}
            else:
                (converter,) = {id(patterns[p]): patterns[p] for p in names if p}.values()
                targets = _apply_converter(converter, parameter, leaves, parameters)  # type: ignore[arg-type]
        except (Untranslatable, ValueError):  # ValueError: not exactly one to unpack
            continue
        for target, virtual in targets.items():
            if parameters.get(target) == virtual.shape and target not in found:
                found[target] = virtual.pieces
    return found


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The config's model on the meta device."""
    model_class, _ = families.auto_classes(config)
    with torch.device("meta"):
        return model_class.from_config(copy.deepcopy(config))


def _model_of_config(config: PretrainedConfig) -> PreTrainedModel:
    """As `_on_meta`, of the class in the config's `architectures` if transformers has it (no head, a classifier)."""
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            found: type[PreTrainedModel] = kind
            if found.config_class is type(config):
                with torch.device("meta"):
                    return found(copy.deepcopy(config))
    return _on_meta(config)


class Fit(NamedTuple):
    """How a checkpoint's tensors fill the parameters of its config.json's model."""

    lacking: dict[str, Shape]
    """Unfilled parameters, with their shapes."""
    unlike: dict[str, tuple[Shape, Shape]]
    """{parameter: (shape in the file, shape in the model)} where the two differ."""
    unused: dict[str, Shape]
    """Stored tensors that are no parameter of the model."""


def fit_checkpoint(config: PretrainedConfig, header: Mapping[str, Tensor]) -> Fit | None:
    """Matches tensors on the meta device to the config's model; None where that needs weights.

    Raises ValueError for an invalid config.
    """
    try:
        model = _model_of_config(config)
        if not isinstance(model, PreTrainedModel):
            return None
        model._weight_conversions = get_model_conversion_mapping(model)  # as from_pretrained does
        found = origins(model, header)
        held = {name: tuple(its.read(header.__getitem__).shape) for name, its in found.items()}
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    except Exception:  # a model's code may raise anything
        return None
    copies: dict[int, list[str]] = {}  # tied parameters are one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        copies.setdefault(id(parameter), []).append(name)
    fine = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["$^"]))
    result = Fit({}, {}, {})
    for names in copies.values():
        wanted = tuple(model.get_parameter(names[0]).shape)
        filled = [name for name in names if name in held]
        if not filled and not any(map(fine.search, names)):
            result.lacking[names[0]] = wanted
        for name in filled:
            if held[name] != wanted:
                result.unlike[name] = (held[name], wanted)
    used = {name for its in found.values() for name, _ in its.stored}
    result.unused.update((n, tuple(t.shape)) for n, t in header.items() if n not in used)
    return result


@dataclass(frozen=True)
class VirtualTensor:
    """A tensor assembled from regions of stored ones, without values."""

    shape: Shape
    pieces: Pieces

    @staticmethod
    def leaf(name: str, shape: Sequence[int]) -> VirtualTensor:
        return VirtualTensor(tuple(shape), (Piece(name, _full_region(shape), _full_region(shape)),))


def _apply_converter(
    converter: WeightConverter,
    first: str,
    values: Mapping[str, list[VirtualTensor]],
    parameters: Mapping[str, Shape],
) -> dict[str, VirtualTensor]:
    """{parameter: its tensor} after one of transformers' conversions. Raises Untranslatable for an unsupported one.

    first: the first parameter that it fills. values: the stored tensors under each of its patterns, in order.
    """
    sources, targets = converter.source_patterns, converter.target_patterns
    if set(values) != set(sources):
        raise Untranslatable
    for operation in converter.operations:
        values = _apply_operation(operation, values, sources, targets, parameters[first])
    found = {}
    for pattern, (virtual,) in values.items():
        found[first.replace(targets[0], pattern, 1)] = virtual
    return found


def _apply_operation(
    operation: ConversionOps,
    values: Mapping[str, list[VirtualTensor]],
    sources: Sequence[str],
    targets: Sequence[str],
    expected: Shape,
) -> dict[str, list[VirtualTensor]]:
    """Applies one operation to the tensors under each pattern."""
    if isinstance(operation, MergeModulelist) and operation.dim == 0:
        stacks = {pattern: [_stack(own)] for pattern, own in values.items()}
        return stacks if len(stacks) > 1 else {targets[0]: stacks.popitem()[1]}
    if isinstance(operation, Concatenate) and operation.num_shards_attribute is None:
        return {
            targets[0]: [_concatenate([one for p in sources for one in values[p]], operation.dim)]
        }
    ((only,),) = values.values()
    if isinstance(operation, Chunk) and operation.num_shards_attribute is None:
        return {
            target: [part]
            for target, part in zip(targets, _chunk(only, len(targets), operation.dim), strict=True)
        }
    if isinstance(operation, Transpose) and len(only.shape) > 1:
        if {operation.dim0, operation.dim1} != {len(only.shape) - 2, len(only.shape) - 1}:
            raise Untranslatable
        as_is = operation.check_dims and only.shape == expected
        return {targets[0]: [only if as_is else _transpose(only)]}
    raise Untranslatable


def _stack(tensors: Sequence[VirtualTensor]) -> VirtualTensor:
    """Stacks along a new first axis, in the order of the number in their names, counted from 0."""
    names = [virtual.pieces[0].name.split(".") for virtual in tensors]
    numbers = [own for own in zip(*names, strict=True) if len(set(own)) > 1]
    if len(tensors) > 1 and numbers != [tuple(map(str, range(len(tensors))))]:
        raise Untranslatable  # an expert is missing
    if len({virtual.shape for virtual in tensors}) > 1:
        raise Untranslatable
    pieces = [
        replace(piece, into=((i, i + 1), *piece.into))
        for i, virtual in enumerate(tensors)
        for piece in virtual.pieces
    ]
    return VirtualTensor((len(tensors), *tensors[0].shape), tuple(pieces))


def _concatenate(tensors: Sequence[VirtualTensor], axis: int) -> VirtualTensor:
    pieces, start, shape = [], 0, list(tensors[0].shape)
    for virtual in tensors:
        if len(virtual.shape) != len(shape):
            raise Untranslatable
        pieces += [replace(p, into=_shift(p.into, axis, start)) for p in virtual.pieces]
        start += virtual.shape[axis]
        shape[axis] = virtual.shape[axis]
        if tuple(shape) != virtual.shape:
            raise Untranslatable
    shape[axis] = start
    return VirtualTensor(tuple(shape), tuple(pieces))


def _chunk(tensor: VirtualTensor, count: int, axis: int) -> Iterator[VirtualTensor]:
    """Splits into equal parts along an axis."""
    step, rest = divmod(tensor.shape[axis], count)
    if rest:
        raise Untranslatable
    for i in range(count):
        yield _slice_axis(tensor, axis, i * step, (i + 1) * step)


def _slice_axis(tensor: VirtualTensor, axis: int, start: int, stop: int) -> VirtualTensor:
    region = list(_full_region(tensor.shape))
    region[axis] = (start, stop)
    pieces = []
    for piece in tensor.pieces:
        shared = _intersection(piece.into, tuple(region))
        if shared is not None:
            into = _shift(shared, axis, -start)
            pieces.append(replace(piece, of=_source_region(piece, shared), into=into))
    shape = list(tensor.shape)
    shape[axis] = stop - start
    return VirtualTensor(tuple(shape), tuple(pieces))


def _transpose(tensor: VirtualTensor) -> VirtualTensor:
    pieces = [
        replace(piece, into=_swap_last_axes(piece.into), transposed=not piece.transposed)
        for piece in tensor.pieces
    ]
    return VirtualTensor((*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]), tuple(pieces))


def _split_fused(
    places: Mapping[str, Pieces], there: Mapping[str, Pieces], config: PretrainedConfig
) -> dict[str, Pieces]:
    """Splits a fused qkv or gate_up where the other model stores the parts separately (Phi-3 as a Llama)."""
    found: dict[str, Pieces] = {}
    for parameter, pieces in places.items():
        where = classify(parameter)
        shape = tuple(
            max(stop for _, stop in axis) for axis in zip(*(p.into for p in pieces), strict=True)
        )
        matrices = parts(where, shape, config) if where.module in SPLIT_NAMES else ()
        names = [
            parameter.replace(SPLIT_NAMES[where.module], f"{part.module}_proj") for part in matrices
        ]
        if len(set(names)) < 2 or not all(name in there for name in names):
            found[parameter] = pieces
            continue
        for name, part in zip(names, matrices, strict=True):
            rows = part.index[0]
            assert isinstance(rows, slice)
            found[name] = _slice_axis(VirtualTensor(shape, pieces), 0, rows.start, rows.stop).pieces
    return found


# ---------------------------------------------------------------------------------------------- regions


def _full_region(shape: Sequence[int]) -> Region:
    return tuple((0, n) for n in shape)


def _size(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


def _swap_last_axes(region: Region) -> Region:
    return (*region[:-2], region[-1], region[-2])


def _shift(region: Region, axis: int, by: int) -> Region:
    start, stop = region[axis]
    return (*region[:axis], (start + by, stop + by), *region[axis + 1 :])


def _intersection(a: Region, b: Region) -> Region | None:
    shared = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def _source_region(piece: Piece, region: Region) -> Region:
    """The region of the piece's stored tensor that fills `region`, a part of piece.into."""
    offsets = [
        (start - first, stop - first)
        for (start, stop), (first, _) in zip(region, piece.into, strict=True)
    ]
    missing = len(piece.of) - len(offsets)
    offsets = [(0, 1)] * missing + offsets[max(0, -missing) :]
    own = _swap_last_axes(tuple(offsets)) if piece.transposed else tuple(offsets)
    return tuple(
        (first + start, first + stop)
        for (first, _), (start, stop) in zip(piece.of, own, strict=True)
    )
