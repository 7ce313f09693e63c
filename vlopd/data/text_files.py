"""JSON-lines, JSON and CSV files, read row by row from disk without type inference (vlopd/data/raw_values.py).

The openers raise ValueError with the line or row at fault and the remedy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from vlopd.data.images import shorten
from vlopd.data.raw_values import (
    check_characters,
    decode_utf8,
    nested_field,
    nested_value,
    read_json,
    read_json_at,
    read_records,
)
from vlopd.errors import DataError
from vlopd.files import json_lines

BOM = b"\xef\xbb\xbf"
"""The UTF-8 byte order mark."""

Row = dict[str, Any]


class TextTable:
    """A JSON-lines, JSON or CSV file: the byte ranges of its rows, and a function that parses one."""

    def __init__(
        self, path: Path, spans: array[int], columns: Sequence[str], parse: Callable[[str], Row]
    ):
        self.path, self.spans, self.columns, self.parse = path, spans, list(columns), parse
        self.state = file_state(path)

    def __len__(self) -> int:
        return len(self.spans) // 2

    def __getitem__(self, index: int) -> Row:
        return next(self.rows(range(index, index + 1)))

    def rows(self, indices: range | None = None) -> Iterator[Row]:
        if not self.path.is_file() or file_state(self.path)[:2] != self.state[:2]:
            raise DataError(f"{self.path} has changed since it was opened; run again")
        with self.path.open("rb") as file:
            for index in range(len(self)) if indices is None else indices:
                start, stop = self.spans[2 * index : 2 * index + 2]
                file.seek(start)
                row = self.parse(decode_utf8(file.read(stop - start)))
                yield {**dict.fromkeys(self.columns), **row}

    def has(self, column: str) -> bool:
        if column in self.columns or "." not in column:
            return column in self.columns
        return any(_has_field(row, column) for row in self.rows())

    def values(self, column: str) -> Iterator[Any]:
        for row in self.rows():
            try:
                yield nested_value(row, column)
            except DataError:  # raised again when the row is read
                yield None

    def check_verbatim(self, column: str) -> None:
        """Text formats lose nothing."""

    def files(self) -> list[Path]:
        return [self.path]

    def named_pictures(self, column: str) -> Iterator[str]:
        for value in self.values(column):
            for each in value if isinstance(value, list) else [value]:
                name = each.get("path") if isinstance(each, Mapping) else each
                if isinstance(name, str):
                    yield name


def file_state(path: Path) -> tuple[int, ...]:
    """Size, times and inode, which change when a file is edited or replaced."""
    now = path.stat()
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def _has_field(row: Row, column: str) -> bool:
    try:
        nested_field(row, column)
    except (KeyError, DataError):
        return False
    return True


def open_lines(path: Path) -> TextTable:
    """Opens a file with one JSON object per line. Raises ValueError with the line at fault."""
    spans, columns, end = array("q"), dict[str, None](), 0
    for number, line in json_lines(path):
        start, end = end, end + len(line)
        if number == 1 and line.startswith(BOM):
            start, line = start + len(BOM), line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            row = read_json(decode_utf8(line))
        except ValueError as error:
            try:
                line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"line {number} is not UTF-8; save the file as UTF-8") from None
            raise ValueError(
                f"line {number} is not JSON ({_json_error(error)}); fix or remove it"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object {{...}}; write one row per line")
        spans.extend((start, end))
        columns |= dict.fromkeys(row)
    return TextTable(path, spans, list(columns), read_json)


def _json_error(error: ValueError) -> str:
    """The reason why a line is not JSON, with the column."""
    if isinstance(error, JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def open_json(path: Path) -> TextTable:
    """Opens a JSON file: a list of objects, or one object per line. Raises ValueError for anything else."""
    content = path.read_bytes()
    start = len(BOM) if content.startswith(BOM) else 0
    if content[start:].lstrip()[:1] == b"[":
        return _open_list(path, decode_utf8(content[start:]), start)
    try:
        return open_lines(path)
    except ValueError:
        try:
            whole = read_json(decode_utf8(content[start:]))
        except ValueError:
            whole = None
        if not isinstance(whole, dict):
            raise
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        inside = f", which may be its {lists[0]!r}," if lists else ""
        raise ValueError(
            f"it is one object; save the list of rows{inside} by itself, or one row per line (.jsonl)"
        ) from None


def _open_list(path: Path, text: str, start: int) -> TextTable:
    """Opens a JSON file that is one list, whose `text` begins at byte `start`. Raises ValueError with the row."""
    spans, columns = array("q"), dict[str, None]()
    place, done = _skip_space(text, 0), 0
    while True:
        place, count = _skip_space(text, place + 1), len(spans) // 2
        if not spans and text[place : place + 1] == "]":
            break
        row, end = read_json_at(text, place)
        if not isinstance(row, dict):
            raise ValueError(f"row {count} (from 0) is not an object {{...}}")
        columns |= dict.fromkeys(row)
        begin = start + _n_bytes(text[done:place])
        start = begin + _n_bytes(text[place:end])
        spans.extend((begin, start))
        place, done = _skip_space(text, end), end
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            raise ValueError(f"it is truncated, or lacks a comma, after row {count} (from 0)")
    if _skip_space(text, place + 1) != len(text):
        raise ValueError("data follow its list; a .json file is one list, or one row per line")
    return TextTable(path, spans, list(columns), read_json)


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def open_csv(path: Path) -> TextTable:
    """Opens a CSV file with commas and column names in its first line. Raises ValueError with the line at fault.

    Every cell is verbatim text; an empty one is None.
    """
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                yield decode_utf8(line.removeprefix(BOM) if end == len(line) else line)

    spans, records = array("q"), read_records(lines())
    _, names = next(records, (0, []))
    _check_names(names)
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


def _check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a first line without column names, or with duplicates."""
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
