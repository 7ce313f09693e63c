"""Masks: which coordinates may train. A mask is a dict of bool tensors by parameter name.

Rules are pure functions of deltas. Wherever a rule takes a number of coordinates, it takes exactly
that number, and among equal values the lowest flat index first: bf16 deltas are massively tied, and
a mask must not depend on the machine. A saved mask is one safetensors file of packed bits with its
origin and a digest in the header, beside a readable JSON of the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor

from vlopd.checkpoint import RunError, whole_file, write_json
from vlopd.config import MaskConfig, RandomMask, TopFractionMask, VisibleMask
from vlopd.delta import TensorDelta
from vlopd.seeding import generator
from vlopd.types import TensorName

Mask = dict[str, Tensor]
HEADER = "mask"


# --------------------------------------------------------------------------------- exact counts


def quota(fraction: float, n: int) -> int:
    """ceil(fraction * n) for the decimal as written: 7 % of 100 is 7, though 0.07 * 100 > 7."""
    return math.ceil(Fraction(str(fraction)) * n)


def select(keys: Callable[[], Iterable[Tensor]], count: int) -> list[Tensor]:
    """Marks the `count` largest keys of many tensors; ties to the earliest tensor, lowest index.

    `keys()` gives int32 tensors of values >= 0, the same ones on each of three calls. The threshold
    is found digit by digit in two histograms of 2^16 bins, so nothing is sorted, copied or
    concatenated.
    """
    high = sum(torch.bincount(k.flatten() >> 16, minlength=1 << 15) for k in keys())
    top, above = _digit(high, count)
    low = sum(
        torch.bincount(k.flatten()[k.flatten() >> 16 == top] & 0xFFFF, minlength=1 << 16)
        for k in keys()
    )
    bottom, above_low = _digit(low, count - above)
    threshold, ties = (top << 16) | bottom, count - above - above_low
    chosen = []
    for key in keys():
        mask = key > threshold
        equal = (key == threshold).flatten().nonzero().squeeze(1)[:ties]
        mask.view(-1)[equal] = True
        ties -= len(equal)
        chosen.append(mask)
    return chosen


def _digit(histogram: Tensor | int, count: int) -> tuple[int, int]:
    """(bin of the count-th largest key, number of keys in higher bins)."""
    assert isinstance(histogram, Tensor) and 0 <= count <= int(histogram.sum())
    cumulative = histogram.flip(0).cumsum(0)
    steps = int((cumulative < max(count, 1)).sum())
    return len(histogram) - 1 - steps, int(cumulative[steps - 1]) if steps else 0


def order_keys(values: Tensor) -> Tensor:
    """int32 keys that order |values| as fp32 does (IEEE bits are monotonic), in the same shape."""
    return values.float().abs().contiguous().view(torch.int32)


def largest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries with the largest |value| (compared in fp32)."""
    return select(lambda: [order_keys(values)], count)[0]


def smallest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries with the smallest |value| (compared in fp32)."""
    return select(lambda: [0x7FFFFFFF - order_keys(values)], count)[0]


# ----------------------------------------------------------------------------------------- rules


def visible(delta: Tensor, atol: float = 0.0) -> Tensor:
    """|delta| > atol, for a delta taken from stored values: what the stored precision shows."""
    return delta.abs() > atol


def top_fraction(delta: Tensor, fraction: float) -> Tensor:
    """The ceil(fraction * numel) coordinates of one tensor with the largest |delta|.

    A tensor that did not move still gets its quota (its lowest indices): the rule fixes density,
    and arms that are compared at one density must have it everywhere.
    """
    return largest(delta, quota(fraction, delta.numel()))


def top_fraction_global(deltas: Iterable[TensorDelta], fraction: float) -> Mask:
    """The ceil(fraction * total) coordinates of the whole model with the largest |delta|.

    `deltas` is iterated several times; ties go to the earliest tensor.
    """
    sizes = {pair.name: pair.source.numel() for pair in deltas}
    chosen = select(
        lambda: (order_keys(pair.delta) for pair in deltas), quota(fraction, sum(sizes.values()))
    )
    return dict(zip(sizes, chosen, strict=True))


def random_like(mask: Mapping[str, Tensor], seed: int) -> Mask:
    """Uniformly drawn coordinates, in each tensor exactly as many as `mask` has there.

    Each tensor has its own stream, named by (seed, tensor), so the order of tensors does not
    matter.
    """

    def drawn(name: str, like: Tensor) -> Tensor:
        stream = generator("cpu", "random mask", seed, name)
        keys = torch.randint(0, 2**31 - 1, like.shape, generator=stream, dtype=torch.int32)
        return select(lambda: [keys], int(like.sum()))[0]

    return {name: drawn(name, like) for name, like in mask.items()}


def build_mask(
    config: MaskConfig, deltas: Iterable[TensorDelta] = (), like: Mapping[str, Tensor] | None = None
) -> Mask:
    """The mask a config asks for: from the deltas of the arm it names, or like another mask."""
    match config:
        case VisibleMask():
            return {pair.name: visible(pair.delta, config.atol) for pair in deltas}
        case TopFractionMask(scope="tensor"):
            return {pair.name: top_fraction(pair.delta, config.fraction) for pair in deltas}
        case TopFractionMask():
            return top_fraction_global(deltas, config.fraction)
        case RandomMask():
            assert like is not None, "a random mask needs the mask it is like"
            return random_like(like, config.seed)


def transplanted(pair: TensorDelta, mask: Tensor) -> Tensor:
    """The trained value on the mask, the source value elsewhere, bit for bit, without arithmetic.

    In the stored dtype; where the two are stored differently, in the one that holds both exactly.
    """
    dtype = torch.promote_types(pair.source.dtype, pair.trained.dtype)
    return torch.where(mask, pair.trained.to(dtype), pair.source.to(dtype))


# --------------------------------------------------------------------------------------- algebra


def density(mask: Mapping[str, Tensor]) -> float:
    """Share of the coordinates that are in the mask, in [0, 1]."""
    total = sum(m.numel() for m in mask.values())
    return sum(int(m.sum()) for m in mask.values()) / total if total else 0.0


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a and b| / |a or b| over the whole model; NaN when both are empty.

    Raises ValueError naming the first tensor that only one has, or whose shape differs.
    """
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            raise ValueError(f"the masks belong to different models: they differ at {name}")
    union = sum(int((a[n] | b[n]).sum()) for n in a)
    return sum(int((a[n] & b[n]).sum()) for n in a) / union if union else math.nan


def _densities_by(mask: Mapping[str, Tensor], label: Callable[[str], str]) -> dict[str, float]:
    """Density of each group of tensors, e.g. by component."""
    total: Counter[str] = Counter()
    members: Counter[str] = Counter()
    for name, chosen in mask.items():
        total[label(name)] += chosen.numel()
        members[label(name)] += int(chosen.sum())
    return {group: members[group] / total[group] for group in sorted(total) if total[group]}


# ----------------------------------------------------------------------------------------- files


def save_mask(
    path: Path,
    mask: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    classify: Callable[[str], TensorName],
) -> None:
    """Writes NAME.safetensors (packed bits) and then its readable record NAME.json.

    `inputs` is JSON: `rule`, and the digests of what the mask was made from, of which `source`, the
    checkpoint that it may train, is checked on use. Both files hold them with shapes, counts and
    densities, and a `digest` of all that and of every bit; equal masks are equal files.
    """
    assert "source" in inputs, "a mask must name the checkpoint it starts from"
    packed = {name: torch.from_numpy(np.packbits(m.cpu().numpy())) for name, m in mask.items()}
    metadata: dict[str, Any] = {
        "inputs": dict(inputs),
        "shapes": {name: list(m.shape) for name, m in mask.items()},
        "counts": {name: int(m.sum()) for name, m in mask.items()},
        "densities": {name: density({name: m}) for name, m in mask.items()},
    }
    metadata["digest"] = _digest(metadata, packed)
    record = path.with_name(f"{path.stem}.json")
    record.unlink(missing_ok=True)  # an old record must never lie beside a new mask
    with whole_file(path) as temporary:
        # one header entry: safetensors shuffles several
        save_file(packed, temporary, {HEADER: json.dumps(metadata, sort_keys=True)})
    summary = {
        "density": density(mask),
        "density_by_component": _densities_by(mask, lambda name: classify(name).component),
        "density_by_module": _densities_by(mask, lambda name: classify(name).module),
    }
    write_json(record, {**summary, **metadata})


def load_mask(path: Path) -> tuple[Mask, dict[str, Any]]:
    """Reads a mask and its metadata back.

    Raises RunError when the file is missing, cut short, or any bit of it differs from what was
    saved.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RunError(f"no mask {path}; run the stage that writes it first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is not a whole mask ({error}); delete it and run again") from None
    recorded = metadata.pop("digest", None)
    if recorded is None or recorded != _digest(metadata, packed):
        raise RunError(f"{path} is damaged: it does not match its digest; delete it and run again")
    mask = {}
    for name, shape in metadata["shapes"].items():
        bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
        mask[name] = torch.from_numpy(bits.view(bool)).view(shape)
    return mask, {**metadata, "digest": recorded}


def _digest(metadata: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(packed):
        total.update(f"\n{name} {packed[name].numel()} ".encode())
        total.update(packed[name].numpy().tobytes())
    return total.hexdigest()


def check_mask(
    mask: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    source_digest: str,
) -> None:
    """Refuses a mask that was not made for this model, from this source checkpoint.

    Raises RunError naming the first offending tensor, or both digests.
    """
    for name in sorted(mask.keys() | shapes.keys()):
        if name not in mask:
            raise RunError(f"the mask is of another model: it lacks {name}")
        if name not in shapes:
            raise RunError(f"the mask is of another model: it has {name}, which the model lacks")
        if mask[name].shape != shapes[name]:
            theirs, ours = tuple(mask[name].shape), tuple(shapes[name])
            raise RunError(f"the mask is of another model: {name} is {theirs} there, {ours} here")
    made_from = metadata["inputs"]["source"]
    if made_from != source_digest:
        raise RunError(
            f"the mask was made from source checkpoint {made_from[:12]}, this one is "
            f"{source_digest[:12]}; rebuild it"
        )
