"""Reads JSON and CSV values verbatim: `3.10` stays 3.10, `007` stays 007, and `NA` is a word.

Table readers infer a type per column: integers beside one decimal become floats, dates become timestamps, `NA`
becomes null. Type inference changes the correct answer, so text formats are read here without it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NoReturn

from vlopd.errors import DataError


class Number(float):
    """A float that prints with the digits of its file."""

    text: str

    def __new__(cls, text: str) -> Number:
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.text,)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__


def _parse_integer(text: str) -> int | Number:
    """Parses an integer; one that `int` would not print unchanged (`-0`, thousands of digits) keeps its text."""
    return int(text) if len(text) < 1000 and text != "-0" else Number(text)


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError for a duplicate name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


DECODER = json.JSONDecoder(
    parse_float=Number,
    parse_int=_parse_integer,
    parse_constant=Number,
    object_pairs_hook=_parse_object,
)


def read_json(text: str) -> Any:
    """Parses a JSON value whose numbers keep their digits; text that was not UTF-8 may hold surrogate escapes.

    Raises ValueError.
    """
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_at(text: str, place: int) -> tuple[Any, int]:
    """Parses the JSON value at a position in a text; returns it with its end. Raises ValueError."""
    try:
        return DECODER.raw_decode(text, place)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Reads the records of a CSV (RFC 4180) without blank lines, each with the number of its last line.

    `lines` keep their line ends, since a quoted cell may span several. Raises ValueError with the line.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may hold a long document
    reader = csv.reader(lines, strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num} is not CSV ({error}); a cell with a comma, a quote or a line break goes "
            'in quotes, and a quote within is doubled ("")'
        ) from None


def decode_utf8(content: bytes) -> str:
    """Decodes UTF-8; invalid bytes become surrogate escapes, which `check_characters` reports by row."""
    return content.decode("utf-8", "surrogateescape")


# -------------------------------------------------------------------------------------------- values


def cell_text(value: Any, column: str = "COLUMN") -> str | None:
    """A cell as text, None where it is empty: for answers, ids, names of teachers.

    Numbers keep their digits, JSON's true and false are those words, a date is 2024-01-31. Raises DataError,
    without row and column, for a value without a unique text form.
    """
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if value != value or repr(value) in ("inf", "-inf", "Infinity", "-Infinity"):
            _refuse(
                f"the number {value}",
                "which may mean a missing value: write null, or the word in quotes",
            )
        case int() | float():
            return str(value)
        case Decimal():
            return format(value, "f")
        case date() if not isinstance(value, datetime):
            return value.isoformat()
        case Mapping():
            parts = sorted(map(str, value)) or ["PART"]
            _refuse(
                f"a table of {', '.join(parts)}",
                f"name one of its fields, as in {column}.{parts[0]}",
            )
    _refuse(f"a {type(value).__name__}", "expected text or a number; store it as text")


def _refuse(what: str, remedy: str) -> NoReturn:
    raise DataError(f"holds {what}; {remedy}")


def nested_field(fields: Mapping[str, Any], name: str) -> Any:
    """A field by name or, if no field has that name, by dotted names of nested fields.

    >>> field_at({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
    "4"

    None where an enclosing table is null. Raises KeyError for an unknown name, and DataError where an enclosing
    value is not a table.
    """
    if name in fields:
        return fields[name]
    for place, letter in enumerate(name):
        if letter == "." and name[:place] in fields:
            match fields[name[:place]]:
                case None:
                    return None
                case Mapping() as nested:
                    return nested_field(nested, name[place + 1 :])
                case other:
                    kind = type(other).__name__
                    raise DataError(f"is not in this row: {name[:place]!r} holds a {kind}")
    raise KeyError(name)


def nested_value(fields: Mapping[str, Any], name: str) -> Any:
    """As `nested_field`; None for an unknown name."""
    try:
        return nested_field(fields, name)
    except KeyError:
        return None


def check_characters(value: Any) -> None:
    """Raises DataError, without the row, for text with invalid characters.

    These are bytes that are not UTF-8, read as surrogate escapes, and halves of surrogate pairs.
    """
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                code = ord(value[error.start])
                if 0xDC80 <= code <= 0xDCFF:
                    raise DataError(
                        f"is not UTF-8 (byte 0x{code - 0xDC00:02x}); save the file as UTF-8"
                    ) from None
                raise DataError(
                    f"has half of a surrogate pair (\\u{code:04x}) for a character; fix or remove the row"
                ) from None
        case list():
            for each in value:
                check_characters(each)
        case Mapping():
            for each in value.values():
                check_characters(each)
