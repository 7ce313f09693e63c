"""Rows of any JSONL, JSON, CSV or parquet file, saved data set, folder, or hub data set, as their file has them.

JSON and CSV are read here, row by row from the disk, and nothing is guessed (vlopd/data/written.py). Parquet,
Arrow and hub data sets have declared types, and come through `datasets`, pictures undecoded.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import StringIO
from itertools import accumulate, islice, repeat
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from vlopd.checkpoint import digest_json, json_lines
from vlopd.config import ConfigError, DataError, FileData
from vlopd.data.pictures import shorten
from vlopd.data.written import (
    Number,
    check_characters,
    field_at,
    read_json,
    read_json_at,
    read_records,
    value_at,
)

BOM = b"\xef\xbb\xbf"
"""What Windows puts before UTF-8."""

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z")

GUESSING = ("csv", "json", "imagefolder", "webdataset")
"""Builders of `datasets` that guess types from text."""

Row = dict[str, Any]


class Table(Protocol):
    """Rows by index, all columns in each."""

    columns: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Text that is not UTF-8 comes with surrogate escapes."""

    def has(self, column: str) -> bool:
        """Whether there is such a column, or a nested one under dotted names."""

    def values(self, column: str) -> Iterator[Any]:
        """One column, which it `has`; None where a row lacks it."""

    def check_words(self, column: str) -> None:
        """Raises DataError, without the column, where its values have lost how they were written."""

    def files(self) -> list[Path]: ...

    def named_pictures(self, column: str) -> Iterator[str]:
        """The file names in a column of pictures; stored pictures have none. Nothing is decoded."""


# ---------------------------------------------------------------------------------------- text files


class TextTable:
    """A JSON-lines, JSON or CSV file: where its rows begin and end, in bytes, and what reads one."""

    def __init__(
        self, path: Path, spans: array[int], columns: Sequence[str], parse: Callable[[str], Row]
    ):
        self.path, self.spans, self.columns, self.parse = path, spans, list(columns), parse
        self.state = state_of(path)

    def __len__(self) -> int:
        return len(self.spans) // 2

    def __getitem__(self, index: int) -> Row:
        return next(self.rows(range(index, index + 1)))

    def rows(self, indices: range | None = None) -> Iterator[Row]:
        if state_of(self.path)[:2] != self.state[:2]:
            raise DataError(f"{self.path} has changed since it was opened; run again")
        with self.path.open("rb") as file:
            for index in range(len(self)) if indices is None else indices:
                start, stop = self.spans[2 * index : 2 * index + 2]
                file.seek(start)
                row = self.parse(as_text(file.read(stop - start)))
                yield {**dict.fromkeys(self.columns), **row}

    def has(self, column: str) -> bool:
        if column in self.columns or "." not in column:
            return column in self.columns
        return any(has_field(row, column) for row in self.rows())

    def values(self, column: str) -> Iterator[Any]:
        for row in self.rows():
            try:
                yield value_at(row, column)
            except DataError:  # said when the row is read
                yield None

    def check_words(self, column: str) -> None:
        """Nothing is lost."""

    def files(self) -> list[Path]:
        return [self.path]

    def named_pictures(self, column: str) -> Iterator[str]:
        for value in self.values(column):
            for each in value if isinstance(value, list) else [value]:
                name = each.get("path") if isinstance(each, Mapping) else each
                if isinstance(name, str):
                    yield name


def state_of(path: Path) -> tuple[int, ...]:
    """Size, time of the content, and what else changes when a file takes another's place."""
    now = path.stat()
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def as_text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def has_field(row: Row, column: str) -> bool:
    try:
        field_at(row, column)
    except (KeyError, DataError):
        return False
    return True


def open_lines(path: Path) -> TextTable:
    """A file of one JSON object a line. Raises ValueError with the line that is none."""
    spans, columns, end = array("q"), dict[str, None](), 0
    for number, line in json_lines(path):
        start, end = end, end + len(line)
        if number == 1 and line.startswith(BOM):
            start, line = start + len(BOM), line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            row = read_json(as_text(line))
        except ValueError as error:
            try:
                line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"line {number} is not UTF-8; save the file as UTF-8") from None
            raise ValueError(
                f"line {number} is not JSON ({reason(error)}); mend or remove it"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object {{...}}; one row a line")
        spans.extend((start, end))
        columns |= dict.fromkeys(row)
    return TextTable(path, spans, list(columns), read_json)


def reason(error: ValueError) -> str:
    """Why a line is not JSON, and where in it."""
    if isinstance(error, JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def open_json(path: Path) -> TextTable:
    """A JSON file: a list of objects, or one object a line. Raises ValueError for what is neither."""
    content = path.read_bytes()
    start = len(BOM) if content.startswith(BOM) else 0
    if content[start:].lstrip()[:1] == b"[":
        return open_list(path, as_text(content[start:]), start)
    try:
        return open_lines(path)
    except ValueError:
        try:
            whole = read_json(as_text(content[start:]))
        except ValueError:
            whole = None
        if not isinstance(whole, dict):
            raise
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        inside = f", which may be its {lists[0]!r}," if lists else ""
        raise ValueError(
            f"it is one object; save the list of rows{inside} by itself, or one row a line (.jsonl)"
        ) from None


def open_list(path: Path, text: str, start: int) -> TextTable:
    """A JSON file that is one list, whose `text` begins at byte `start`. Raises ValueError with the row."""
    spans, columns = array("q"), dict[str, None]()
    place, done = after_space(text, 0), 0
    while True:
        place, count = after_space(text, place + 1), len(spans) // 2
        if not spans and text[place : place + 1] == "]":
            break
        row, end = read_json_at(text, place)
        if not isinstance(row, dict):
            raise ValueError(f"row {count} (from 0) is not an object {{...}}")
        columns |= dict.fromkeys(row)
        begin = start + n_bytes(text[done:place])
        start = begin + n_bytes(text[place:end])
        spans.extend((begin, start))
        place, done = after_space(text, end), end
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            raise ValueError(f"it is cut short, or lacks a comma, after row {count} (from 0)")
    if after_space(text, place + 1) != len(text):
        raise ValueError("something follows its list; a .json file is one list, or one row a line")
    return TextTable(path, spans, list(columns), read_json)


def after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def open_csv(path: Path) -> TextTable:
    """A CSV file with commas and names in its first line. Raises ValueError with the line of a fault.

    Every cell is text as it stands; an empty one is None.
    """
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                yield as_text(line.removeprefix(BOM) if end == len(line) else line)

    spans, records = array("q"), read_records(lines())
    _, names = next(records, (0, []))
    check_names(names)
    start = end
    for number, cells in records:
        if len(cells) != len(names):
            raise ValueError(
                f"line {number} has {len(cells)} cells where the first has {len(names)}; a cell with a comma or "
                "a line break goes in quotes"
            )
        spans.extend((start, end))
        start = end

    def parse(text: str) -> Row:
        _, cells = next(read_records(StringIO(text)))
        return {name: cell or None for name, cell in zip(names, cells, strict=True) if name}

    return TextTable(path, spans, [name for name in names if name], parse)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a first line that names no columns, or one of them twice."""
    first = ",".join(names)
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) < 1 + first.count(mark):
            raise ValueError(
                f"its first line {shorten(first)!r} has {name} between its columns; save it with commas"
            )
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"two of its columns are named {name!r}; rename one")
    try:
        check_characters(list(names))
    except DataError as error:
        raise ValueError(f"its first line {error}") from None


# ------------------------------------------------------------------------------------ declared types


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
        """Refuses what was guessed from text, and whole numbers that became floats beside an empty cell."""
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
            whole = pyarrow.compute.all(pyarrow.compute.equal(pyarrow.compute.floor(known), known))
            if len(known) and (whole.as_py() or self.origin in GUESSING):
                raise DataError(
                    f"stores {known[0].as_py()} and so on as floating point, which is what becomes of whole "
                    "numbers beside an empty cell or a decimal; store it as text or as integers, or give "
                    "data.path the JSON or CSV file that it came from"
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
            yield from (name for name in values.unique().to_pylist() if name is not None)


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
    rows = load_dataset("parquet", name, data_files=str(path), split="train")
    return ArrowTable(rows, [path])


# --------------------------------------------------------------------------------- files and folders


class Joined:
    """Rows of several tables, one range of each after the other; a column that one lacks is None there."""

    def __init__(self, parts: Sequence[tuple[Table, range]]):
        self.parts = [(table, rows) for table, rows in parts if len(rows)]
        self.columns = list(dict.fromkeys(c for table, _ in self.parts for c in table.columns))
        self.ends = list(accumulate(len(rows) for _, rows in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self.ends, index)
        table, rows = self.parts[part]
        row = table[rows[index - self.ends[part]]]
        return {**dict.fromkeys(self.columns), **row}

    def has(self, column: str) -> bool:
        return any(table.has(column) for table, _ in self.parts)

    def values(self, column: str) -> Iterator[Any]:
        for table, rows in self.parts:
            values = table.values(column) if table.has(column) else repeat(None, len(table))
            yield from islice(values, rows.start, rows.stop)

    def check_words(self, column: str) -> None:
        for table, _ in self.parts:
            if table.has(column):
                table.check_words(column)

    def files(self) -> list[Path]:
        return [path for table, _ in self.parts for path in table.files()]

    def named_pictures(self, column: str) -> Iterator[str]:
        for table, _ in self.parts:
            if table.has(column):
                yield from table.named_pictures(column)


OPENERS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": open_lines,
    ".json": open_json,
    ".parquet": open_parquet,
    ".csv": open_csv,
}


def open_table(config: FileData) -> Table:
    """The rows that `path`, `subset` and `split` name. Raises ConfigError with the reason and the remedy."""
    path = Path(config.path)
    loudness = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what we are about to say
    try:
        if path.is_dir():
            return open_folder(path, config)
        if path.exists() or path.suffix.lower() in (*OPENERS, *PACKED):
            return of_split({"train": lambda: open_file(path)}, config)
        rows = load_dataset(config.path, config.subset, split=config.split)
        return ArrowTable(rows, [Path(file["filename"]) for file in rows.cache_files])
    except ConfigError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for unreadable input
        cause = error.__cause__ or error
        reason = shorten(str(cause) or type(cause).__name__, 300)
        raise ConfigError(f"cannot read data.path {config.path!r}: {reason}") from None
    finally:
        datasets.logging.set_verbosity(loudness)


def open_file(path: Path) -> Table:
    """Raises ConfigError, and what the readers raise."""
    suffix = path.suffix.lower()
    if suffix not in OPENERS:
        known = f"we read {', '.join(OPENERS)}, a folder, or a hub data set"
        remedy = f"unpack it ({known})" if suffix in PACKED else known
        raise ConfigError(f"data.path {str(path)!r} ends in {path.suffix!r}; {remedy}")
    if not path.is_file():
        raise ConfigError(f"no data file {path} (data.path)")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} has no rows")
    return OPENERS[suffix](path)


def open_files(paths: Sequence[Path]) -> Table:
    """Raises ConfigError, and ValueError with the file at fault."""
    tables = []
    for path in paths:
        try:
            tables.append(open_file(path))
        except ConfigError:
            raise
        except Exception as error:  # pyarrow raises what it likes
            raise ValueError(f"{path.name}: {error}") from None
    return Joined([(table, range(len(table))) for table in tables])


def open_folder(path: Path, config: FileData) -> Table:
    """A folder of `save_to_disk`, or one laid out as on the hub, whose splits `datasets` finds."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            saved = load_from_disk(str(path))
        except IndexError:  # `datasets` saves no rows, and cannot read them back
            raise ConfigError(f"{config.path} has no rows, or a split without") from None
        if not isinstance(saved, DatasetDict):  # one split, and `train` stands for it
            name = "train" if config.split == "train" else str(saved.split or "train")
            return of_split({name: partial(open_saved, path, saved)}, config)
        rooms = {name: partial(open_saved, path / name, rows) for name, rows in saved.items()}
        return of_split(rooms, config)
    builder = load_dataset_builder(str(path), config.subset)
    found = (builder.config.data_files or {}).items()
    files = {str(split): [Path(name) for name in names] for split, names in found}
    every = [file for each in files.values() for file in each]
    if all(file.suffix.lower() in (*OPENERS, *PACKED) for file in every):
        return of_split({name: partial(open_files, each) for name, each in files.items()}, config)
    rows = load_dataset(str(path), config.subset, split=config.split)
    return ArrowTable(rows, every)


def open_saved(folder: Path, rows: Dataset) -> Table:
    about = [folder / "state.json", folder / "dataset_info.json"]
    return ArrowTable(rows, [*(Path(file["filename"]) for file in rows.cache_files), *about])


def of_split(splits: Mapping[str, Callable[[], Table]], config: FileData) -> Table:
    """The rows of `data.split` (`train`, `train[:90%]`, `train+test`). Raises ConfigError for an unknown one."""
    wanted = [re.split(r"[\[(]", part)[0].strip() for part in config.split.split("+")]
    for name in wanted:
        if name not in splits:
            raise ConfigError(
                f"{config.path} has no split {name!r} (data.split); it has {', '.join(splits)}"
            )
    tables = {name: splits[name]() for name in dict.fromkeys(wanted)}
    if config.split in tables:
        return tables[config.split]
    lengths = {name: len(table) for name, table in tables.items()}
    cuts = ReadInstruction.from_spec(config.split).to_absolute(lengths)
    return Joined([(tables[cut.splitname], range(cut.from_, cut.to)) for cut in cuts])
