"""Mask rules: pure functions of a base and a trained checkpoint, tensor by tensor, or of other masks.

A mask is a dict of bool tensors by parameter name. Counts of coordinates are exact, see `vlopd.masks.select`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from vlopd.config.masks import (
    ComplementMask,
    DifferenceMask,
    EnergyMask,
    FileMask,
    FunctionMask,
    IntersectionMask,
    MagnitudeMask,
    MaskConfig,
    PrincipalMask,
    RandomMask,
    Selection,
    TopFractionMask,
    UnionMask,
    VisibleMask,
    WholeMask,
)
from vlopd.errors import ConfigError, PluginError
from vlopd.masks.compare import refuse_unlike
from vlopd.masks.select import (
    order_keys,
    quota,
    reverse_keys,
    select,
    select_energy,
    select_one,
)
from vlopd.plugins import call, wrong_value
from vlopd.progress import Repeated
from vlopd.seeding import generator
from vlopd.types import TensorName
from vlopd.weights.delta import TensorDelta
from vlopd.weights.subspace import low_rank, rank_of

Mask = dict[str, Tensor]
Pairs = Iterable[TensorDelta]
"""The tensors of a base and a trained checkpoint; may be iterated several times."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODULE_GROUPS = {
    "ffn": ("gate", "up", "down", "gate_up", "expert_gate_up", "expert_down"),
    "attention": ("q", "k", "v", "qkv", "o"),
}
QUANTILES = 16


def build_mask(
    rule: MaskConfig, pairs: Pairs = (), masks: Mapping[str, Mask] | None = None
) -> Mask:
    """Builds the mask of a rule.

    `pairs`: base and trained tensors; rules that read only the base ignore the trained ones.
    `masks`: the masks that the rule refers to, by name (a file's by its path).

    Raises ConfigError for a component, layer or module that the model lacks, ValueError for masks of different models.
    """
    masks = masks or {}
    pairs = Repeated(pairs, f"mask {rule.type}: tensors", "tensor")
    match rule:
        case VisibleMask():
            return {pair.name: _visible_update(pair, rule) for pair in pairs}
        case TopFractionMask(by="delta"):
            return _top_fraction(pairs, lambda p: order_keys(p.delta), rule.fraction, rule.scope)
        case TopFractionMask():
            return _top_fraction(
                pairs, lambda p: order_keys(_relative_delta(p)), rule.fraction, rule.scope
            )
        case EnergyMask():
            return _top_energy(pairs, rule.share, rule.scope)
        case MagnitudeMask():
            order = reverse_keys if rule.which == "low" else order_keys
            return _top_fraction(pairs, lambda p: order(p.base), rule.fraction, rule.scope)
        case PrincipalMask():
            order = order_keys if rule.which == "principal" else reverse_keys
            return _top_fraction(
                pairs, lambda p: order(_low_rank_approximation(p.base, rule)), rule.fraction
            )
        case WholeMask():
            return whole_parameters(pairs, rule)
        case RandomMask():
            return random_like(masks[rule.like], rule.seed, rule.match, pairs)
        case UnionMask() | IntersectionMask() | DifferenceMask():
            return combine(rule.type, [masks[name] for name in rule.masks])
        case ComplementMask():
            return {name: ~marked for name, marked in masks[rule.mask].items()}
        case FileMask():
            return dict(masks[rule.path])
        case FunctionMask():
            return by_function(rule, pairs)


def is_by_tensor(rule: MaskConfig) -> bool:
    """Whether a rule ranks or decomposes each tensor by itself, so that processes can share the tensors."""
    if isinstance(rule, TopFractionMask | EnergyMask | MagnitudeMask):
        return rule.scope == "tensor"
    return isinstance(rule, PrincipalMask)


# ------------------------------------------------------------------------------ rules on the delta


def visible(delta: Tensor, atol: float = 0.0) -> Tensor:
    """|delta| > atol, for a delta of stored values: the visible update."""
    return delta.abs() > atol


def _visible_update(pair: TensorDelta, rule: VisibleMask) -> Tensor:
    """Coordinates whose update exceeds the rule's tolerance, in the rule's precision."""
    dtype = PRECISIONS.get(rule.precision)
    base, trained = pair.base, pair.trained
    if dtype is not None:
        base, trained = base.to(dtype), trained.to(dtype)
        pair = TensorDelta(pair.where, base, trained)
    found = visible(pair.delta, rule.atol)
    if rule.rtol:
        wide = pair.delta.dtype
        found &= pair.delta.abs() > rule.atol + rule.rtol * base.to(wide).abs()
    if rule.ulps is not None:
        stored = torch.promote_types(base.dtype, trained.dtype)
        found &= steps_between(base.to(stored), trained.to(stored)) > rule.ulps
    return found


def steps_between(a: Tensor, b: Tensor) -> Tensor:
    """Distance from a to b in ulps of their dtype (16 or 32 bits), int64; 0 and -0 are equal."""

    def ordinal(x: Tensor) -> Tensor:
        bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
        whole = x.contiguous().view(bits).long()
        smallest = torch.iinfo(bits).min
        return torch.where(whole < 0, smallest - whole, whole)

    return (ordinal(a) - ordinal(b)).abs()


def _relative_delta(pair: TensorDelta) -> Tensor:
    """|delta| / |w|; infinite where a zero weight changed, 0 where delta is 0."""
    ratio = pair.delta.abs() / pair.base.to(pair.delta.dtype).abs()
    return ratio.where(pair.delta != 0, torch.zeros_like(ratio))


def _top_fraction(
    pairs: Pairs, keys: Callable[[TensorDelta], Tensor], fraction: float, scope: str = "tensor"
) -> Mask:
    """Selects the ceil(fraction * n) coordinates with the largest keys, of each tensor or of the whole model.

    An unchanged tensor still gets its quota (its lowest indices): the rule fixes the density,
    so that arms can be compared at equal density in every tensor.
    """
    if scope == "tensor":
        found = {}
        for pair in pairs:
            key = keys(pair)
            found[pair.name] = select_one(key, quota(fraction, key.numel()))
        return found
    sizes = {pair.name: pair.base.numel() for pair in pairs}
    chosen = select(lambda: (keys(pair) for pair in pairs), quota(fraction, sum(sizes.values())))
    return dict(zip(sizes, chosen, strict=True))


def _top_energy(pairs: Pairs, share: float, scope: str = "tensor") -> Mask:
    """Selects the fewest coordinates that hold `share` of the update's squared norm, of each tensor or of all."""
    if scope == "tensor":
        return {pair.name: _top_energy([pair], share, "global")[pair.name] for pair in pairs}
    names = [pair.name for pair in pairs]
    chosen = select_energy(lambda: (order_keys(pair.delta) for pair in pairs), share)
    return dict(zip(names, chosen, strict=True))


# ------------------------------------------------------------------------------- rules on the base


def _low_rank_approximation(base: Tensor, rule: PrincipalMask) -> Tensor:
    """The best rank-k approximation of a tensor as a matrix [m, everything else], in its shape; a vector unchanged."""
    matrix = base.flatten(1).double() if base.ndim > 1 else base[:, None].double()
    rank = rank_of(matrix, rule.rank, rule.rank_fraction)
    return low_rank(matrix, rank).view(base.shape)


def whole_parameters(pairs: Pairs, rule: Selection) -> Mask:
    """Selects all coordinates of the parameters that the rule names."""
    shapes = {pair.where: pair.base.shape for pair in pairs}
    modules = {module for name in rule.modules for module in MODULE_GROUPS.get(name, (name,))}
    known: dict[str, tuple[set[str] | set[int], set[str] | set[int]]] = {
        "components": (set(rule.components), {where.component for where in shapes}),
        "layers": (set(rule.layers), {w.layer for w in shapes if w.layer is not None}),
        "modules": (
            set(rule.modules),
            {where.module for where in shapes}
            | {g for g, of in MODULE_GROUPS.items() if any(w.module in of for w in shapes)},
        ),
    }
    for key, (asked, there) in known.items():
        if unknown := sorted(map(str, asked - there)):
            has = ", ".join(map(str, sorted(there, key=lambda x: (str(type(x)), x))))
            raise ConfigError(f"{key}: the model has no {unknown[0]!r}; it has {has}")

    def asked_for(where: TensorName) -> bool:
        return (
            (not rule.components or where.component in rule.components)
            and (not rule.layers or where.layer in rule.layers)
            and (not modules or where.module in modules)
        )

    found = {w.name: torch.full(shape, asked_for(w)) for w, shape in shapes.items()}
    if not any(asked_for(where) for where in shapes):
        raise ConfigError(
            "no parameter matches components, layers and modules together; remove one of them"
        )
    return found


# --------------------------------------------------------------------------------------- plug-ins


def by_function(rule: FunctionMask, pairs: Pairs) -> Mask:
    """The mask that the rule's function returns; of a parameter that it leaves out, no coordinate.

    Raises PluginError where the function cannot be used or fails, or its value is no mask of the parameters.
    """
    rule.use("mask").check()
    shapes = {pair.name: pair.base.shape for pair in pairs}
    where = f"{len(shapes)} parameters"
    found = call(rule.type, where, pairs, **rule.arguments)
    wanted = "{parameter: bool tensor of its shape}"
    if not isinstance(found, Mapping):
        raise wrong_value(rule.type, where, found, wanted)
    for name, marked in found.items():
        if name not in shapes:
            near = difflib.get_close_matches(str(name), shapes, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PluginError(
                f"{rule.type} returned a mask of {name!r}, which is no parameter{hint}"
            )
        if not isinstance(marked, Tensor) or marked.dtype != torch.bool:
            raise wrong_value(rule.type, name, marked, wanted)
        if marked.shape != shapes[name]:
            has, needs = list(marked.shape), list(shapes[name])
            raise PluginError(
                f"{rule.type} returned a mask of shape {has} for {name}, which is {needs}"
            )
    nothing = {
        n: torch.zeros(shape, dtype=torch.bool) for n, shape in shapes.items() if n not in found
    }
    return {name: found[name].cpu() if name in found else nothing[name] for name in shapes}


# ----------------------------------------------------------------------------------- random rules


def random_like(
    mask: Mapping[str, Tensor], seed: int, match: str = "tensor", pairs: Pairs = ()
) -> Mask:
    """Draws coordinates uniformly, exactly as many as `mask` has in each class of `match` (RandomMask).

    Each tensor has its own random stream, named by (seed, tensor), so the order of tensors does not matter.
    `pairs` provide component, module and |w|; not needed for "tensor" and "global".
    """

    def keys(name: str) -> Tensor:
        stream = generator("cpu", "random mask", seed, name)
        return torch.randint(0, 2**31 - 1, mask[name].shape, generator=stream, dtype=torch.int32)

    if match in ("magnitude", "visibility"):
        classes = quantiles if match == "magnitude" else binades
        return {
            pair.name: _stratified(mask[pair.name], keys(pair.name), classes(pair.base))
            for pair in pairs
        }
    label: Callable[[str], object] = {"tensor": lambda name: name}.get(match, lambda name: "all")
    if match == "module":
        places = {pair.name: (pair.where.component, pair.where.module) for pair in pairs}
        label = places.__getitem__
    groups: dict[object, list[str]] = {}
    for name in sorted(mask):
        groups.setdefault(label(name), []).append(name)

    def drawn(names: list[str]) -> list[Tensor]:
        count = sum(int(mask[name].sum()) for name in names)
        return select(lambda: (keys(name) for name in names), count)

    found: Mask = {}
    for names in groups.values():
        found |= dict(zip(names, drawn(names), strict=True))
    return {name: found[name] for name in mask}


def _stratified(like: Tensor, keys: Tensor, classes: Tensor) -> Tensor:
    """Selects in each class the coordinates with the largest keys, as many as `like` has there."""
    shape, found = like.shape, torch.zeros_like(like).view(-1)
    like, keys, classes = like.reshape(-1), keys.reshape(-1), classes.reshape(-1)
    counts = torch.bincount(classes[like]) if bool(like.any()) else torch.zeros(0).long()
    for label, count in enumerate(counts.tolist()):
        if count:
            members = (classes == label).nonzero()[:, 0]
            found[members[select_one(keys[members], count)]] = True
    return found.view(shape)


def quantiles(base: Tensor) -> Tensor:
    """The sixteen-quantile of |w| within its tensor of each coordinate; equal values share a quantile."""
    size = base.float().abs().flatten()
    ordered = size.sort().values
    n = len(ordered)
    edges = ordered[[n * k // QUANTILES for k in range(1, QUANTILES)]] if n else ordered
    return torch.bucketize(size, edges.unique(), right=True).view(base.shape)


def binades(base: Tensor) -> Tensor:
    """The fp32 exponent of each |w|: within a binade the floats of a format are equally spaced."""
    return order_keys(base).long() >> 23


# --------------------------------------------------------------------------------- combinations


def combine(how: str, masks: list[Mask]) -> Mask:
    """The union, intersection, or difference (the first without all others) of masks of one model.

    Raises ValueError naming the first tensor in which two differ in shape.
    """
    first, *others = masks
    found = {name: marked.clone() for name, marked in first.items()}
    for other in others:
        refuse_unlike(first, other)
        for name, marked in found.items():
            if how == "union":
                marked |= other[name]
            else:
                marked &= other[name] if how == "intersection" else ~other[name]
    return found
