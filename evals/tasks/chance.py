"""Chance levels: means over all questions and by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def mean_by_kind(
    docs: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> dict[str, float]:
    """{"all": mean, kind: mean, ...} of a value per document; documents without a kind count only in "all"."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for doc in docs:
        for kind in dict.fromkeys(("all", doc["kind"] or "all")):
            found[kind].append(value(doc))
    return {kind: float(np.mean(values)) for kind, values in found.items()}
