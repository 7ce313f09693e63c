"""Typed tables from parquet files, saved data sets and the hub, through `datasets`."""

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

from vlopd.data.raw_values import Number, decode_utf8, read_json
from vlopd.data.text_files import Row, file_state
from vlopd.digests import digest_json
from vlopd.errors import ConfigError, DataError

GUESSING = ("csv", "json", "imagefolder", "webdataset")
"""Builders of `datasets` that infer types from text."""


class ArrowTable:
    """Rows with declared types; images undecoded.

    Floats print with the digits of their own precision: float32 0.1 is 0.1.
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
        return {name: _to_python(row[name][0]) for name in self.columns}

    def has(self, column: str) -> bool:
        try:
            self.column(column)
        except KeyError:
            return False
        return True

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """A column, or a nested one by dotted name. Raises KeyError."""
        for place in [len(name), *(i for i, letter in enumerate(name) if letter == ".")]:
            if name[:place] in self.columns:
                whole = self.stored.select_columns([name[:place]])[:][name[:place]]
                return _nested_column(whole, name[place + 1 :])
        raise KeyError(name)

    def values(self, column: str) -> Iterator[Any]:
        return (_to_python(scalar) for scalar in self.column(column))

    def check_verbatim(self, column: str) -> None:
        """Raises DataError for types inferred from text, and for whole floats: 3.0 may have been written 3."""
        values = self.column(column)
        floats = pyarrow.types.is_floating(values.type)
        if self.origin == "csv" and (not _is_text(values.type) or values.null_count):
            raise DataError(
                "was read from CSV by `datasets`, which infers numbers and reads words like NA as null; "
                "give data.path the CSV file itself"
            )
        if floats:
            known = values.drop_null().cast(pyarrow.float64())
            known = known.filter(pyarrow.compute.is_finite(known))
            whole = known.filter(pyarrow.compute.equal(pyarrow.compute.floor(known), known))
            lost = known if self.origin in GUESSING else whole
            if len(lost):
                raise DataError(
                    f"stores {lost[0].as_py()} as floating point, as happens to integers in a column with an empty "
                    "cell or a decimal, so its original text is lost; store the column as text or as "
                    "integers, or give data.path the JSON or CSV file that it came from"
                )

    def files(self) -> list[Path]:
        return self.sources

    def named_pictures(self, column: str) -> Iterator[str]:
        values = self.column(column)
        while _is_list(values.type):
            values = pyarrow.compute.list_flatten(values)
        if pyarrow.types.is_struct(values.type):
            names = [field.name for field in values.type]
            if "path" not in names:
                return
            if "bytes" in names:
                values = values.filter(_nested_column(values, "bytes").is_null())
            values = _nested_column(values, "path")
        if _is_text(values.type):
            yield from (_to_python(name) for name in values.drop_null().unique())


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    return (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    )


def _nested_column(values: pyarrow.ChunkedArray, name: str) -> pyarrow.ChunkedArray:
    """A nested column by (dotted) name in a column of structs; the column itself for "". Raises KeyError."""
    if not name:
        return values
    names = [each.name for each in values.type] if pyarrow.types.is_struct(values.type) else []
    for place in [len(name), *(i for i, letter in enumerate(name) if letter == ".")]:
        if name[:place] in names:
            inner = pyarrow.compute.struct_field(values, [names.index(name[:place])])
            return _nested_column(inner, name[place + 1 :])
    raise KeyError(name)


def _to_python(value: pyarrow.Scalar) -> Any:
    """Converts a stored value to Python. Text that is not UTF-8 gets surrogate escapes: Arrow does not validate it."""
    kind = value.type
    if not value.is_valid:
        return None
    if pyarrow.types.is_struct(kind):
        return {name: _to_python(each) for name, each in value.items()}
    if _is_list(kind):
        return [_to_python(each) for each in value.values]
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        precision = numpy.float16 if pyarrow.types.is_float16(kind) else numpy.float32
        return Number(str(precision(value.as_py())))
    if isinstance(kind, pyarrow.JsonType):
        return read_json(value.as_py())
    if _is_text(kind):
        return decode_utf8(value.as_buffer().to_pybytes())
    return value.as_py()


def open_parquet(path: Path) -> ArrowTable:
    """Opens a parquet file through an uncompressed, memory-mapped copy in the cache of `datasets`.

    The copy is named by the file's state (size, times, inode): `datasets` compares only name and time, which a
    replaced file may share.
    """
    if pyarrow.parquet.read_metadata(path).num_rows == 0:
        raise ConfigError(f"{path} has no rows")
    name = digest_json(file_state(path))[:16]
    rows = load_dataset("parquet", name, data_files=glob.escape(str(path)), split="train")
    return ArrowTable(rows, [path])
