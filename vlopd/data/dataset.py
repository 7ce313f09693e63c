"""`FileDataset`: examples from any JSONL, JSON, CSV or parquet file, saved data set, folder or hub data set.

A column map names question, answer, image and id. Rows are read and images decoded on access.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vlopd.config.data import FileData
from vlopd.data import chat
from vlopd.data.images import open_header, open_picture, shorten
from vlopd.data.raw_values import cell_text, check_characters, nested_value
from vlopd.data.tables import Table, open_table
from vlopd.errors import ConfigError, DataError
from vlopd.types import Example


class FileDataset(Sequence[Example]):
    """Examples by index; images are decoded on access.

    `pictures` names further image columns, for a teacher's image context: they are decoded into the example's
    fields under the column's name. Boxes (lists of numbers) stay as they are.

    The constructor raises ConfigError for a missing file or column, ids that are not unique, or answers whose original
    text is lost; reading a row raises DataError with the row's id.
    """

    def __init__(self, config: FileData, pictures: Sequence[str] = (), table: Table | None = None):
        self.config = config
        self.pictures = tuple(dict.fromkeys(pictures))  # two teachers may share a column
        path = Path(config.path)
        self.folder = path if path.is_dir() else path.parent
        self.table = open_table(config) if table is None else table
        if len(self.table) == 0:
            raise ConfigError(f"{config.path} has no rows")
        wanted = [config.question, config.answer, config.image, config.id, *pictures]
        for column in wanted:
            if column is not None and not self.table.has(column):
                raise ConfigError(
                    f"{config.path} has no column {column!r}; it has {self.table.columns}; name them in "
                    "[data]: question, answer, image, id (a teacher's picture: teacher.context.column)"
                )
        for column in (config.answer, config.id):
            if column is not None:
                try:
                    self.table.check_verbatim(column)
                except DataError as error:
                    raise ConfigError(f"{config.path}: column {column!r} {error}") from None
        if config.id is not None:
            _refuse_repeated_ids(config.path, self.table.values(config.id))
        self.open = open_picture

    def __repr__(self) -> str:
        return f"FileDataset({self.config.path}: {len(self):,} examples)"

    def with_headers_only(self) -> FileDataset:
        """The same rows with only the headers of images read: existence and sizes."""
        other = copy.copy(self)
        other.open = open_header
        return other

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        config = self.config
        index = range(len(self))[index]  # resolves a negative index
        row = self.table[index]
        name = f"{Path(config.path).stem}-{index}"
        if config.id is not None:
            name = str(cell_text(nested_value(row, config.id)))
        where = f"{config.path}, row {name}"
        with _errors_at(where):
            check_characters(row)
        with _errors_at(f"{where}: column {config.question!r}"):
            turns, answer = self.read_question(nested_value(row, config.question))
        if config.answer is not None:
            with _errors_at(f"{where}: column {config.answer!r}"):
                value = nested_value(row, config.answer)
                if isinstance(value, str):
                    chat.refuse_encoded(value)
                turned = chat.is_turns(value)
                answer = chat.completion_text(value) if turned else cell_text(value, config.answer)
        images = self.open_images(config.image, row, where) if config.image else ()
        for column in self.pictures:
            with _errors_at(f"{where}: column {column!r}"):
                value = nested_value(row, column)
            if value is not None and not _is_box(value):
                value = list(self.open_images(column, row, where))
            row[column] = value  # under its whole name, also where it is nested
        with _errors_at(f"{where}:"):
            turns = chat.insert_images(turns, len(images), config.image_mark)
        with _errors_at(where):
            turns = chat.prepend_system(turns, config.system)
        return Example(name, tuple(turns), images, answer, row)

    def read_question(self, value: Any) -> tuple[list[chat.Turn], str | None]:
        """Splits a question into prompt turns and answer. Raises DataError, without row and column."""
        if chat.is_turns(value):
            return chat.split_answer(chat.read_turns(value))
        if not isinstance(value, str) or not value.strip():
            kinds = " (expected text, or a list of {role, content})" if value else ""
            raise DataError(
                f"holds no text but {_describe(value)}{kinds}; fill it in or remove the row"
            )
        chat.refuse_encoded(value)
        return [{"role": "user", "content": [{"type": "text", "text": value}]}], None

    def open_images(
        self, column: str, row: Mapping[str, Any], where: str
    ) -> tuple[Image.Image, ...]:
        """Opens the image of a column, or its list of images; an empty list is a row without images."""
        where = f"{where}: column {column!r}"
        with _errors_at(where):
            value = nested_value(row, column)
        if value is None:
            raise DataError(
                f"{where} is empty; name a picture, give an empty list, or remove the row"
            )
        values = value if isinstance(value, list) else [value]
        images = []
        for place, each in enumerate(values, 1):
            try:
                images.append(self.open(each, self.folder))
            except DataError as error:
                which = "picture" if len(values) == 1 else f"picture {place} of {len(values)}"
                raise DataError(f"{where}, {which} {_describe(each)} {error}") from None
        return tuple(images)

    def files(self) -> list[Path]:
        """Every file that the examples are made from: the data files, and all images that a row names.

        Nothing is decoded. Missing files are left out: reading their row raises.
        """
        columns = [*([self.config.image] if self.config.image else []), *self.pictures]
        names = {name for column in columns for name in self.table.named_pictures(column)}
        pictures = {path for name in names if _file_exists(path := self.folder / name)}
        return list(dict.fromkeys([*self.table.files(), *sorted(pictures)]))


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Prefixes DataErrors with the row, or the row and column."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where} {error}") from None


def _file_exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False


def _refuse_repeated_ids(path: str, ids: Iterator[Any]) -> None:
    """Raises ConfigError for the first id that is missing, not a text or number, or repeated."""
    first: dict[str, int] = {}
    for index, each in enumerate(ids):
        try:
            check_characters(each)
        except DataError as error:
            raise ConfigError(f"{path}: an id {error}") from None
        try:
            name = cell_text(each)
        except DataError:
            name = None
        if not name:
            raise ConfigError(
                f"{path}: row {index} (from 0) has {_describe(each)} for an id; fill in the column named by "
                "data.id, or leave data.id out to number the rows"
            )
        if name in first:
            raise ConfigError(
                f"{path}: id {shorten(name)!r} is of row {first[name]} and of row {index} (from 0); "
                "make ids unique, or leave data.id out to number the rows"
            )
        first[name] = index


def _is_box(value: Any) -> bool:
    """Whether a field holds numbers (the edges of a crop) rather than images."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, (int, float)) for each in value)
    )


def _describe(value: Any) -> str:
    """Describes a value for an error message: text quoted, bytes counted."""
    match value:
        case None:
            return "null"
        case str():
            return repr(shorten(value, 80))
        case bytes():
            return f"of {len(value)} bytes"
        case Mapping() if "bytes" in value or "path" in value:
            return _describe(value.get("path") or value.get("bytes"))
        case int() | float():
            return f"the number {value}"
    return f"a {type(value).__name__}"
