"""Any JSONL, JSON, CSV or parquet file, saved data set, folder, or hub data set, as examples, through a column map.

Rows are read and pictures decoded when they are asked for.
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
from vlopd.data.images import open_picture, peek, shorten
from vlopd.data.literals import check_characters, in_words, value_at
from vlopd.data.tables import open_table
from vlopd.errors import ConfigError, DataError
from vlopd.types import Example


class FileDataset(Sequence[Example]):
    """Rows by index, images opened when a row is asked for.

    `pictures` names further columns with pictures, for a teacher's image context: they are opened too, and
    stand in the example's fields under the column's name. Boxes (lists of numbers) are left as they are.

    Raises ConfigError for a missing file or column, ids that are not unique, or an answer that has lost how it
    was written, when made; DataError with the row's id when a row is read.
    """

    def __init__(self, config: FileData, pictures: Sequence[str] = ()):
        self.config = config
        self.pictures = tuple(dict.fromkeys(pictures))  # two teachers may share a column
        path = Path(config.path)
        self.folder = path if path.is_dir() else path.parent
        self.table = open_table(config)
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
                    self.table.check_words(column)
                except DataError as error:
                    raise ConfigError(f"{config.path}: column {column!r} {error}") from None
        if config.id is not None:
            refuse_repeated_ids(config.path, self.table.values(config.id))
        self.open = open_picture

    def unopened(self) -> FileDataset:
        """The same rows with pictures of which only the header is read: sizes, and whether they are there."""
        other = copy.copy(self)
        other.open = peek
        return other

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        config = self.config
        index = range(len(self))[index]  # counts a negative index from the end
        row = self.table[index]
        name = f"{Path(config.path).stem}-{index}"
        if config.id is not None:
            name = str(in_words(value_at(row, config.id)))
        where = f"{config.path}, row {name}"
        with placed(where):
            check_characters(row)
        with placed(f"{where}: column {config.question!r}"):
            turns, answer = self.read_question(value_at(row, config.question))
        if config.answer is not None:
            with placed(f"{where}: column {config.answer!r}"):
                value = value_at(row, config.answer)
                if isinstance(value, str):
                    chat.refuse_encoded(value)
                turned = chat.is_turns(value)
                answer = chat.completion(value) if turned else in_words(value, config.answer)
        images = self.open_images(config.image, row, where) if config.image else ()
        for column in self.pictures:
            with placed(f"{where}: column {column!r}"):
                value = value_at(row, column)
            if value is not None and not is_box(value):
                value = list(self.open_images(column, row, where))
            row[column] = value  # under its whole name, also where it is nested
        with placed(f"{where}:"):
            turns = chat.with_images(turns, len(images), config.image_mark)
        with placed(where):
            turns = chat.with_system(turns, config.system)
        return Example(name, tuple(turns), images, answer, row)

    def read_question(self, value: Any) -> tuple[list[chat.Turn], str | None]:
        """The prompt's turns and the answer after them. Raises DataError, without row and column."""
        if chat.is_turns(value):
            return chat.split_answer(chat.read_turns(value))
        if not isinstance(value, str) or not value.strip():
            kinds = " (text, or a list of {role, content}, is wanted)" if value else ""
            raise DataError(
                f"holds no text but {describe(value)}{kinds}; fill it in or remove the row"
            )
        chat.refuse_encoded(value)
        return [{"role": "user", "content": [{"type": "text", "text": value}]}], None

    def open_images(
        self, column: str, row: Mapping[str, Any], where: str
    ) -> tuple[Image.Image, ...]:
        """The picture of a column, or its list of pictures; an empty list is a row without any."""
        where = f"{where}: column {column!r}"
        with placed(where):
            value = value_at(row, column)
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
                raise DataError(f"{where}, {which} {describe(each)} {error}") from None
        return tuple(images)

    def files(self) -> list[Path]:
        """Every file that the examples are made from: of the rows, and every picture that one of them names.

        Nothing is decoded, and a name without a file is left out: reading its row says so.
        """
        columns = [*([self.config.image] if self.config.image else []), *self.pictures]
        names = {name for column in columns for name in self.table.named_pictures(column)}
        pictures = {path for name in names if is_file(path := self.folder / name)}
        return list(dict.fromkeys([*self.table.files(), *sorted(pictures)]))


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Puts the row, or the row and column, before what is wrong with them."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where} {error}") from None


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False


def refuse_repeated_ids(path: str, ids: Iterator[Any]) -> None:
    """Raises ConfigError for the first id that is missing, or no text or number, or that two rows share."""
    first: dict[str, int] = {}
    for index, each in enumerate(ids):
        try:
            check_characters(each)
        except DataError as error:
            raise ConfigError(f"{path}: an id {error}") from None
        try:
            name = in_words(each)
        except DataError:
            name = None
        if not name:
            raise ConfigError(
                f"{path}: row {index} (from 0) has {describe(each)} for an id; fill in the column that "
                "data.id names, or leave data.id out to number the rows"
            )
        if name in first:
            raise ConfigError(
                f"{path}: id {shorten(name)!r} is of row {first[name]} and of row {index} (from 0); "
                "make ids unique, or leave data.id out to number the rows"
            )
        first[name] = index


def is_box(value: Any) -> bool:
    """Whether a field holds numbers (the edges of a crop) and not pictures."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, (int, float)) for each in value)
    )


def describe(value: Any) -> str:
    """A value in a few words, for a message: text is quoted, bytes are counted."""
    match value:
        case None:
            return "null"
        case str():
            return repr(shorten(value, 80))
        case bytes():
            return f"of {len(value)} bytes"
        case Mapping() if "bytes" in value or "path" in value:
            return describe(value.get("path") or value.get("bytes"))
        case int() | float():
            return f"the number {value}"
    return f"a {type(value).__name__}"
