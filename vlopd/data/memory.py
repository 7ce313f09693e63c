"""Rows that are in memory already, as a table like that of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from vlopd.data.arrow import ArrowTable
from vlopd.data.raw_values import nested_field, nested_value
from vlopd.data.text_files import Row
from vlopd.errors import ConfigError, DataError


class MemoryTable:
    """A list of dicts; a key that a row lacks is None in it. Pictures are PIL images, bytes or file names."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.stored = rows
        self.columns = list(dict.fromkeys(name for row in rows for name in row))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Row:
        return {**dict.fromkeys(self.columns), **self.stored[index]}

    def has(self, column: str) -> bool:
        return column in self.columns or any(_has_field(row, column) for row in self.stored)

    def values(self, column: str) -> Iterator[Any]:
        return (
            nested_value(row, column) if _has_field(row, column) else None for row in self.stored
        )

    def check_verbatim(self, column: str) -> None:
        """The values are what the caller wrote."""

    def files(self) -> list[Path]:
        return []

    def named_pictures(self, column: str) -> Iterator[str]:
        return iter(())


def _has_field(row: Mapping[str, Any], column: str) -> bool:
    try:
        nested_field(row, column)
    except (KeyError, DataError):
        return False
    return True


def open_rows(rows: Sequence[Mapping[str, Any]] | Dataset) -> MemoryTable | ArrowTable:
    """Opens a list of dicts or a `datasets.Dataset`. Raises ConfigError for another type."""
    if isinstance(rows, Dataset):
        return ArrowTable(rows, [])
    if not isinstance(rows, Sequence):
        raise ConfigError(
            f"rows are a list of dicts or a datasets.Dataset, not a {type(rows).__name__}; list(...) makes a list of "
            'an iterable, frame.to_dict("records") of a DataFrame'
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(
                f"row {index} (from 0) is a {type(row).__name__}, not a dict of columns; give a list of "
                "dicts, a datasets.Dataset, a path, a hub id, or the name of a built-in data set"
            )
    return MemoryTable(rows)
