"""Groups of arms, as the files of the stage geometry/groups have them: the seeds of a training, its signal nulls, and
the drawn nulls.

groups.csv has a comparison a row, group_values.csv the value of every arm, pair of arms or draw (docs/run-folder.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evals.report.read import read_table
from vlopd.run.folder import RunFolder

KEYS = ("metric", "parameter", "name")
NAMES = ("of", "null", "kind", "family", *KEYS, "unit", "test", "reason")
"""Columns of text."""


@dataclass(frozen=True)
class Groups:
    """The two files of a run; empty tables where it has no signal null."""

    comparisons: pd.DataFrame
    values: pd.DataFrame

    @property
    def found(self) -> bool:
        return not self.values.empty

    def nulls_of(self, arm: str) -> dict[str, tuple[str, ...]]:
        """{label: arms} of the signal nulls of the group that begins with this arm, in their order."""
        if not self.found:
            return {}
        own = self.values[(self.values.kind == "signal") & (self.values.of == arm)]
        return {str(label): _arms(part.unit) for label, part in own.groupby("null", sort=False)}

    def arms_of(self, arm: str) -> tuple[str, ...]:
        """The arms of the group of this name: the training's seeds."""
        if not self.found:
            return ()
        own = self.values[(self.values.kind == "real") & (self.values.of == arm)]
        return _arms(own.unit)

    def labels(self) -> dict[str, str]:
        """{null arm: its label} of all signal nulls."""
        if not self.found:
            return {}
        own = self.values[self.values.kind == "signal"]
        found = own.groupby("null", sort=False).unit
        return {arm: str(label) for label, units in found for arm in _arms(units)}

    def comparison(
        self, of: str, kind: str, null: str, key: Sequence[str]
    ) -> dict[str, Any] | None:
        """The row of groups.csv of this group against a null, of a (metric, parameter, name); None for no such row."""
        if self.comparisons.empty:
            return None
        table = self.comparisons
        chosen = (table.of == of) & (table.kind == kind) & (table.null == null)
        for column, value in zip(KEYS, key, strict=True):
            chosen &= table[column] == value
        rows = table[chosen]
        if rows.empty:
            return None
        row = rows.iloc[0]
        return {str(k): None if pd.isna(row[k]) else row[k] for k in table.columns}

    def of_measure(self, of: str, key: Sequence[str]) -> pd.DataFrame:
        """The rows of group_values.csv of a group and its nulls, of a (metric, parameter, name)."""
        if not self.found:
            return self.values
        table = self.values
        chosen = table.of == of
        for column, value in zip(KEYS, key, strict=True):
            chosen &= table[column] == value
        return table[chosen & table.value.notna()]


def read_groups(run: RunFolder) -> Groups:
    """The groups of a run; empty tables where it has none."""
    tables = []
    for name in ("groups", "group_values"):
        path = run.root / "geometry" / f"{name}.csv"
        table = read_table(path) if path.exists() else pd.DataFrame()
        text = [column for column in NAMES if column in table]
        tables.append(
            table.assign(**{column: table[column].fillna("").astype(str) for column in text})
        )
    return Groups(*tables)


def _arms(units: pd.Series) -> tuple[str, ...]:
    """The arms among units, which may also be pairs of arms."""
    return tuple(dict.fromkeys(str(unit) for unit in units if "|" not in str(unit)))
