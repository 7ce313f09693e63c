"""Overlap of two masks of one model: Jaccard index, coverage, and enrichment over chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def density(mask: Mapping[str, Tensor]) -> float:
    """Fraction of the coordinates that are in the mask, in [0, 1]."""
    total = sum(m.numel() for m in mask.values())
    return sum(int(m.sum()) for m in mask.values()) / total if total else 0.0


def densities_by(mask: Mapping[str, Tensor], label: Callable[[str], str]) -> dict[str, float]:
    """Density of each group of tensors, e.g. by component."""
    total: Counter[str] = Counter()
    members: Counter[str] = Counter()
    for name, chosen in mask.items():
        total[label(name)] += chosen.numel()
        members[label(name)] += int(chosen.sum())
    return {group: members[group] / total[group] for group in sorted(total) if total[group]}


def refuse_unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that only one mask has, or whose shape differs."""
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            raise ValueError(f"the masks belong to different models: they differ at {name}")


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a and b| / |a or b| over the whole model; NaN when both are empty.

    Raises ValueError naming the first tensor that only one mask has, or whose shape differs.
    """
    return overlap(a, b).jaccard


@dataclass(frozen=True)
class Overlap:
    """Overlap counts of two masks over the same coordinates, and the chance expectation.

    `expected` is the mean of |a and b| if, within every class of coordinates, both masks were drawn
    uniformly: |a_c| |b_c| / n_c summed over classes (one class: independence at the global densities).
    Ratios are NaN where they are 0/0.
    """

    n: int
    a: int
    b: int
    both: int
    expected: float

    @property
    def jaccard(self) -> float:
        return _ratio(self.both, self.a + self.b - self.both)

    @property
    def expected_jaccard(self) -> float:
        """The Jaccard index if `both` were `expected`."""
        return _ratio(self.expected, self.a + self.b - self.expected)

    @property
    def coverage_of_a(self) -> float:
        """The fraction of a that is in b."""
        return _ratio(self.both, self.a)

    @property
    def coverage_of_b(self) -> float:
        """The fraction of b that is in a."""
        return _ratio(self.both, self.b)

    @property
    def enrichment(self) -> float:
        """Observed over expected; 1 is chance."""
        return _ratio(self.both, self.expected)

    def row(self) -> dict[str, float | int | None]:
        """All counts and ratios for JSON, null where undefined."""
        measures = {
            "jaccard": self.jaccard,
            "expected_jaccard": self.expected_jaccard,
            "coverage_of_a": self.coverage_of_a,
            "coverage_of_b": self.coverage_of_b,
            "enrichment": self.enrichment,
        }
        counts = {"n": self.n, "a": self.a, "b": self.b, "both": self.both}
        defined = {k: v if math.isfinite(v) else None for k, v in measures.items()}
        return {**counts, "expected": self.expected, **defined}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _count_overlap(a: Tensor, b: Tensor) -> Overlap:
    """The overlap in one tensor, or one class of coordinates."""
    n, in_a, in_b, both = a.numel(), int(a.sum()), int(b.sum()), int((a & b).sum())
    return Overlap(n, in_a, in_b, both, in_a * in_b / n if n else 0.0)


def sum_overlaps(parts: Iterable[Overlap]) -> Overlap:
    """Sums over classes; expectations add up, so that a class that both masks prefer gives no enrichment."""
    columns = [(p.n, p.a, p.b, p.both, p.expected) for p in parts]
    n, a, b, both, expected = (sum(column) for column in zip(*columns, strict=True))
    return Overlap(int(n), int(a), int(b), int(both), float(expected))


def overlap_by_tensor(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """The overlap in each tensor. Raises ValueError for masks of different models."""
    refuse_unlike(a, b)
    return {name: _count_overlap(a[name], b[name]) for name in a}


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Overlap:
    """The overlap over the whole model, against independence at the global densities."""
    whole = sum_overlaps(overlap_by_tensor(a, b).values())
    expected = whole.a * whole.b / whole.n if whole.n else 0.0
    return Overlap(whole.n, whole.a, whole.b, whole.both, expected)


def overlap_by_class(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], classes: Iterable[tuple[str, Tensor]]
) -> Overlap:
    """The overlap over the whole model, against chance within every class of every tensor.

    `classes` gives each tensor's name and an int64 class for each of its coordinates, such as the
    quantile of its |w|.
    """
    refuse_unlike(a, b)
    parts = []
    for name, labels in classes:
        flat, in_a, in_b = labels.flatten(), a[name].flatten(), b[name].flatten()
        size = int(flat.max()) + 1 if flat.numel() else 0
        n, of_a, of_b = (torch.bincount(x, minlength=size) for x in (flat, flat[in_a], flat[in_b]))
        expected = (of_a.double() * of_b / n.clamp(min=1)).sum()
        parts.append(
            Overlap(
                flat.numel(),
                int(of_a.sum()),
                int(of_b.sum()),
                int((in_a & in_b).sum()),
                float(expected),
            )
        )
    return sum_overlaps(parts)
