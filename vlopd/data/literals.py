"""Values as their file wrote them: `3.10` stays 3.10, `007` stays 007, and `NA` is a word.

Readers of tables guess a type for a column: whole numbers beside one decimal become floats, dates become
timestamps, `NA` becomes nothing. A guess changes what a right answer is, so text formats are read here without.
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
    """A number that prints with the digits of its file."""

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


def integer(text: str) -> int | Number:
    """A whole number; what Python's `int` would not print again (`-0`, thousands of digits) keeps its text."""
    return int(text) if len(text) < 1000 and text != "-0" else Number(text)


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name comes twice: which of the two is meant, nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


DECODER = json.JSONDecoder(
    parse_float=Number, parse_int=integer, parse_constant=Number, object_pairs_hook=table
)


def read_json(text: str) -> Any:
    """A JSON value whose numbers keep their digits; text that was not UTF-8 may hold surrogate escapes.

    Raises ValueError.
    """
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at a place in a text, and where it ends. Raises ValueError."""
    try:
        return DECODER.raw_decode(text, place)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV (RFC 4180), blank lines left out, each with the number of its last line.

    `lines` keep their line ends, for a quoted cell may run over several. Raises ValueError with the line.
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


def as_text(content: bytes) -> str:
    """Bytes that are not UTF-8 become surrogate escapes, which `check_characters` finds in the rows that have them."""
    return content.decode("utf-8", "surrogateescape")


# -------------------------------------------------------------------------------------------- values


def in_words(value: Any, column: str = "COLUMN") -> str | None:
    """A cell as text, None where it is empty: answers, ids, names of teachers.

    A number keeps its digits, JSON's true and false are those words, a date is 2024-01-31. Raises DataError,
    without row and column, for what has no one way to be written.
    """
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if value != value or repr(value) in ("inf", "-inf", "Infinity", "-Infinity"):
            refuse(
                f"the number {value}",
                "which may stand for no value: write null, or the word in quotes",
            )
        case int() | float():
            return str(value)
        case Decimal():
            return format(value, "f")
        case date() if not isinstance(value, datetime):
            return value.isoformat()
        case Mapping():
            parts = sorted(map(str, value)) or ["PART"]
            refuse(
                f"a table of {', '.join(parts)}",
                f"name the part that is meant, as in {column}.{parts[0]}",
            )
    refuse(f"a {type(value).__name__}", "text or a number is wanted; store it as text")


def refuse(what: str, remedy: str) -> NoReturn:
    raise DataError(f"holds {what}; {remedy}")


def field_at(fields: Mapping[str, Any], name: str) -> Any:
    """A field by its name or, where no field has it, by dotted names into nested ones.

    >>> field_at({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
    "4"

    None where a table on the way is empty. Raises KeyError where nothing has the name, and DataError where a
    value on the way is no table.
    """
    if name in fields:
        return fields[name]
    for place, letter in enumerate(name):
        if letter == "." and name[:place] in fields:
            match fields[name[:place]]:
                case None:
                    return None
                case Mapping() as nested:
                    return field_at(nested, name[place + 1 :])
                case other:
                    kind = type(other).__name__
                    raise DataError(f"is not in this row: {name[:place]!r} holds a {kind}")
    raise KeyError(name)


def value_at(fields: Mapping[str, Any], name: str) -> Any:
    """As `field_at`; None where nothing has the name."""
    try:
        return field_at(fields, name)
    except KeyError:
        return None


def check_characters(value: Any) -> None:
    """Raises DataError, without the row, for text with what is no character.

    That is a byte that is not UTF-8, read as a surrogate escape, or half of a surrogate pair.
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
                    f"has half of a surrogate pair (\\u{code:04x}) for a character; mend or remove the row"
                ) from None
        case list():
            for each in value:
                check_characters(each)
        case Mapping():
            for each in value.values():
                check_characters(each)
