"""The grid of settings of a tuned arm, of which a validation split chooses one."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from vlopd.config.base import NAME
from vlopd.digests import digest_json

Point = dict[str, Any]
"""One setting of each swept key: {"optim.learning_rate": 1e-3}."""


def _flat(table: Any, above: str = "") -> Any:
    """{"optim": {"learning_rate": [..]}}, as TOML has of a key without quotes -> {"optim.learning_rate": (..)}."""
    if not isinstance(table, Mapping):
        return table
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            more = _flat(value, f"{above}{key}.")
        else:
            more = {f"{above}{key}": tuple(value) if isinstance(value, list) else value}
        if twice := next((each for each in more if each in found), None):
            raise ValueError(f"sweep of {twice}: given twice, with and without quotes")
        found |= more
    return found


def _refuse_repeats(grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Raises ValueError for a grid without a key or value, and for a value given twice."""
    if not grid:
        raise ValueError('a sweep needs a key, as in {"optim.learning_rate" = [3e-4, 1e-3]}')
    for key, values in grid.items():
        if inner := next((each for each in grid if each.startswith(f"{key}.")), None):
            raise ValueError(f"sweep of {key}: the sweep of {inner} is of a part of it; keep one")
        if not values:
            raise ValueError(f"sweep of {key}: give at least one value")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise ValueError(f"sweep of {key}: {value!r} is given twice")
    return grid


Grid = Annotated[
    dict[str, tuple[Any, ...]], BeforeValidator(_flat), AfterValidator(_refuse_repeats)
]
"""{key of a recipe: its values}; the points are their product."""


def points_of(grid: Mapping[str, tuple[Any, ...]]) -> list[Point]:
    """The grid's points, the last key varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def candidate_name(arm: str, point: Point) -> str:
    """The name of an arm at a point, the same in a larger grid: `full.learning_rate-0.001`.

    A value that is no part of a file name stands as its digest.
    """
    count = Counter(key.rpartition(".")[2] for key in point)
    parts = []
    for key, value in point.items():
        last = key.rpartition(".")[2]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if isinstance(value, float) and float(text) != value:
            text = repr(value)
        if not re.match(NAME, text):
            text = digest_json(value)[:8]
        parts.append(f"{last if count[last] == 1 else key}-{text}")
    return ".".join([arm, *parts])


def nested(point: Point) -> dict[str, Any]:
    """{"optim.learning_rate": 1e-3} -> {"optim": {"learning_rate": 1e-3}}."""
    tree: dict[str, Any] = {}
    for key, value in point.items():
        *above, last = key.split(".")
        here = tree
        for part in above:
            here = here.setdefault(part, {})
        here[last] = list(value) if isinstance(value, tuple) else value
    return tree


def words_of(point: Mapping[str, Any]) -> str:
    """A point in words: `optim.learning_rate 0.001, train.steps 40`."""
    return ", ".join(f"{k} {f'{v:g}' if isinstance(v, float) else v}" for k, v in point.items())


def at_edge(grid: Mapping[str, tuple[Any, ...]], point: Mapping[str, Any]) -> list[str]:
    """The numeric keys of several values of which a point has the least or the largest."""
    found = []
    for key, values in grid.items():
        is_numeric = all(type(value) in (int, float) for value in values)
        if is_numeric and len(values) > 1 and point[key] in (min(values), max(values)):
            found.append(key)
    return found
