"""Tables of declared types, from parquet files, saved data sets and the hub, through `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, load_dataset

from vlopd.data.literals import Number, as_text, read_json
from vlopd.data.text_files import Row, state_of
from vlopd.digests import digest_json
from vlopd.errors import ConfigError, DataError

GUESSING = ("csv", "json", "imagefolder", "webdataset")
"""Builders of `datasets` that guess types from text."""


class ArrowTable:
    """Rows with declared types, pictures as they are stored.

    Floating point has the digits of its own precision: 0.1 of 32 bits is 0.1.
    """

    def __init__(self, stored: Dataset, sources: Sequence[Path]):
        self.stored = stored.with_format("arrow")
        self.columns = stored.column_names
        self.sources = list(dict.fromkeys(sources))
        from_csv = any(path.suffix in (".csv", ".tsv") for path in sources)  # an imagefolder's
        self.origin = "csv" if from_csv else stored.info.builder_name

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Row:
        row = self.stored[index]
        return {name: as_stored(row[name][0]) for name in self.columns}

    def has(self, column: str) -> bool:
        try:
            self.column(column)
        except KeyError:
            return False
        return True

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """A column, or a nested one under dotted names. Raises KeyError."""
        for place in [len(name), *(i for i, letter in enumerate(name) if letter == ".")]:
            if name[:place] in self.columns:
                whole = self.stored.select_columns([name[:place]])[:][name[:place]]
                return nested_column(whole, name[place + 1 :])
        raise KeyError(name)

    def values(self, column: str) -> Iterator[Any]:
        return (as_stored(scalar) for scalar in self.column(column))

    def check_words(self, column: str) -> None:
        """Refuses what was guessed from text, and floats of which one is whole: whether 3.0 was 3, nobody knows."""
        values = self.column(column)
        floats = pyarrow.types.is_floating(values.type)
        if self.origin == "csv" and (not is_text(values.type) or values.null_count):
            raise DataError(
                "was read from CSV by `datasets`, which guesses numbers and takes words like NA for nothing; "
                "give data.path the CSV file itself"
            )
        if floats:
            known = values.drop_null().cast(pyarrow.float64())
            known = known.filter(pyarrow.compute.is_finite(known))
            whole = known.filter(pyarrow.compute.equal(pyarrow.compute.floor(known), known))
            lost = known if self.origin in GUESSING else whole
            if len(lost):
                raise DataError(
                    f"stores {lost[0].as_py()} as floating point, which is what becomes of whole numbers beside an "
                    "empty cell or a decimal, so how it was written is lost; store the column as text or as "
                    "integers, or give data.path the JSON or CSV file that it came from"
                )

    def files(self) -> list[Path]:
        return self.sources

    def named_pictures(self, column: str) -> Iterator[str]:
        values = self.column(column)
        while is_list(values.type):
            values = pyarrow.compute.list_flatten(values)
        if pyarrow.types.is_struct(values.type):
            names = [field.name for field in values.type]
            if "path" not in names:
                return
            if "bytes" in names:
                values = values.filter(nested_column(values, "bytes").is_null())
            values = nested_column(values, "path")
        if is_text(values.type):
            yield from (as_stored(name) for name in values.drop_null().unique())


def is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def is_list(kind: pyarrow.DataType) -> bool:
    return (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    )


def nested_column(values: pyarrow.ChunkedArray, name: str) -> pyarrow.ChunkedArray:
    """What is under a name, or dotted names, in a column of structs; all of it under none. Raises KeyError."""
    if not name:
        return values
    names = [each.name for each in values.type] if pyarrow.types.is_struct(values.type) else []
    for place in [len(name), *(i for i, letter in enumerate(name) if letter == ".")]:
        if name[:place] in names:
            inner = pyarrow.compute.struct_field(values, [names.index(name[:place])])
            return nested_column(inner, name[place + 1 :])
    raise KeyError(name)


def as_stored(value: pyarrow.Scalar) -> Any:
    """A stored value in Python. Text that is not UTF-8 has surrogate escapes: Arrow takes bytes as they come."""
    kind = value.type
    if not value.is_valid:
        return None
    if pyarrow.types.is_struct(kind):
        return {name: as_stored(each) for name, each in value.items()}
    if is_list(kind):
        return [as_stored(each) for each in value.values]
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        precision = numpy.float16 if pyarrow.types.is_float16(kind) else numpy.float32
        return Number(str(precision(value.as_py())))
    if isinstance(kind, pyarrow.JsonType):
        return read_json(value.as_py())
    if is_text(kind):
        return as_text(value.as_buffer().to_pybytes())
    return value.as_py()


def open_parquet(path: Path) -> ArrowTable:
    """Through an uncompressed copy in the cache of `datasets`, which is read in place.

    The copy's name is that of just this content: `datasets` itself looks at the name and the time, which a file
    put in the place of another may share.
    """
    if pyarrow.parquet.read_metadata(path).num_rows == 0:
        raise ConfigError(f"{path} has no rows")
    name = digest_json(state_of(path))[:16]
    rows = load_dataset("parquet", name, data_files=glob.escape(str(path)), split="train")
    return ArrowTable(rows, [path])
