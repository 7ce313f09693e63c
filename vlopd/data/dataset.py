"""Examples from any JSONL, JSON, CSV or parquet files, saved data set, folder or hub data set.

A column map names question, answer, image and id. Rows are read and images decoded on access.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from vlopd.config.data import QUESTION, FileData
from vlopd.data import chat
from vlopd.data.images import open_header, open_picture, shorten
from vlopd.data.raw_values import cell_text, check_characters, nested_value
from vlopd.data.tables import Table, open_table
from vlopd.errors import ConfigError, DataError
from vlopd.files import is_inside, shortest_distinct_names
from vlopd.types import Example

TURNS = ("messages", "prompt", "conversations")
"""Columns that are read where a file has no column `question`."""


class StoredDataset(Sequence[Example]):
    """Examples that are stored in files, or a mixture with such."""

    notes: tuple[str, ...] = ()
    """Lines on what was found in the files, such as the column of the prompts."""

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, index) -> Example: ...  # type: ignore[override]

    @abstractmethod
    def with_headers_only(self) -> StoredDataset:
        """The same rows with only the headers of images read: existence and sizes."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that the examples are made from: the data files, and all images that a row names.

        Nothing is decoded. Missing files are left out: reading their row raises.
        """

    @abstractmethod
    def counts(self) -> dict[str, str]:
        """The number of rows of each source, in words."""


def cut(config: FileData, count: int) -> range:
    """The rows that `skip` and `limit` leave of `count`. Raises ConfigError where none are left."""
    start = config.skip or 0
    stop = count if config.limit is None else min(count, start + config.limit)
    if start >= count:
        raise ConfigError(
            f"data.skip = {start} leaves nothing of the {count} rows of {config.path}"
        )
    return range(start, stop)


class FileDataset(StoredDataset):
    """Examples of one file, folder or hub data set by index; images are decoded on access.

    `pictures` names further image columns, for a teacher's image context: they are decoded into the example's
    fields under the column's name. Boxes (lists of numbers) stay as they are.

    The constructor raises ConfigError for a missing file or column, ids that are not unique, or answers whose original
    text is lost; reading a row raises DataError with the row's id.
    """

    def __init__(
        self,
        config: FileData,
        pictures: Sequence[str] = (),
        label: str | None = None,
        table: Table | None = None,
    ):
        """`label` distinguishes the ids of several files; `table` has the rows where they are in memory."""
        assert isinstance(config.path, str)
        self.config, self.label = config, label
        self.pictures = tuple(dict.fromkeys(pictures))  # two teachers may share a column
        path = Path(config.path)
        self.folder = path if path.is_dir() else path.parent
        self.contained = table is None  # rows in memory are of the caller, not of a file
        self.image_folders = [self.folder, *map(Path, config.image_folders)]
        # the hub's caches, where files are links, or unpacked from archives
        own = [each.parent for each in self.folder.resolve().parents if each.name == "snapshots"]
        self.image_folders += (
            own if path.exists() else [Path(HF_HUB_CACHE), Path(HF_DATASETS_CACHE)]
        )
        self.table = open_table(config) if table is None else table
        if len(self.table) == 0:
            raise ConfigError(f"{config.path} has no rows")
        self.question = config.question
        if self.question == QUESTION and not self.table.has(QUESTION):
            self.question = next(filter(self.table.has, TURNS), QUESTION)
            self.notes = (
                f"{config.path} has no column 'question'; prompts are read from {self.question!r} (data.question)",
            )
        if config.answer is None and self.table.has("answer"):
            self.notes += (f"{config.path} has a column 'answer', which is not read (data.answer)",)
        wanted = [self.question, config.answer, config.image, config.id, *pictures]
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
        self.rows = cut(config, len(self.table))
        self.open = open_picture

    def with_rows(self, rows: range) -> FileDataset:
        """Other rows of the same file."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def __repr__(self) -> str:
        return f"FileDataset({self.config.path}: {len(self):,} examples)"

    def with_headers_only(self) -> FileDataset:
        other = copy.copy(self)
        other.open = open_header
        return other

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return self.with_rows(self.rows[index])
        config = self.config
        index = self.rows[index]
        row = self.table[index]
        name = f"{self.label or Path(str(config.path)).stem}-{index}"
        if config.id is not None:
            own = str(cell_text(nested_value(row, config.id)))
            name = own if self.label is None else f"{self.label}/{own}"
        where = f"{config.path}, row {name}"
        with _errors_at(where):
            check_characters(row)
        inside: list[Any] | None = None
        with _errors_at(f"{where}: column {self.question!r}"):
            turns, answer = self.read_question(nested_value(row, self.question))
            if config.image == self.question:
                turns, inside = chat.take_pictures(turns)
        if config.answer is not None:
            with _errors_at(f"{where}: column {config.answer!r}"):
                value = nested_value(row, config.answer)
                if isinstance(value, str):
                    chat.refuse_encoded(value)
                turned = chat.is_turns(value)
                answer = chat.completion_text(value) if turned else cell_text(value, config.answer)
        images: tuple[Image.Image, ...] = ()
        if inside is not None:
            images = self._open_each(inside, f"{where}: column {self.question!r}")
        elif config.image is not None:
            images = self.open_images(config.image, row, where)
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
            turns = chat.read_turns(value)
            if self.config.image != self.question:
                chat.refuse_pictures(turns, self.question)
            return chat.split_answer(turns)
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
        return self._open_each(value if isinstance(value, list) else [value], where)

    def _open_each(self, values: Sequence[Any], where: str) -> tuple[Image.Image, ...]:
        images = []
        for place, each in enumerate(values, 1):
            try:
                self._refuse_outside(each)
                images.append(self.open(each, self.folder))
            except DataError as error:
                which = "picture" if len(values) == 1 else f"picture {place} of {len(values)}"
                raise DataError(f"{where}, {which} {_describe(each)} {error}") from None
        return tuple(images)

    def _refuse_outside(self, value: Any) -> None:
        """Raises DataError for the name of an image that leads out of the folders it may lie in."""
        if isinstance(value, Mapping):
            value = None if value.get("bytes") else value.get("path")
        if isinstance(value, str) and "\0" not in value and "://" not in value:
            path = self.folder / value
            if self.contained and _file_exists(path) and not is_inside(path, self.image_folders):
                raise DataError(
                    f"leads out of {self.folder}; put it there, or name its folder in data.image_folders"
                )

    def files(self) -> list[Path]:
        image = self.config.image
        inside = image == self.question
        columns = [*([image] if image and not inside else []), *self.pictures]
        names = {name for column in columns for name in self.table.named_pictures(column)}
        if inside:
            names |= {
                n for each in self.table.values(self.question) for n in chat.names_inside(each)
            }
        pictures = {path for name in names if _file_exists(path := self.folder / name)}
        return list(dict.fromkeys([*self.table.files(), *sorted(pictures)]))

    def counts(self) -> dict[str, str]:
        some = "" if len(self) == len(self.table) else f"{len(self):,} of "
        return {str(self.config.path): f"{some}{len(self.table):,} rows"}


class ConcatenatedDataset(StoredDataset):
    """Several files, one after the other, under one set of column names; `skip` and `limit` are of all rows together.

    The files' names are put before the ids.
    """

    def __init__(self, config: FileData, paths: Sequence[str], pictures: Sequence[str] = ()):
        self.parts = [
            FileDataset(
                config.model_copy(update={"path": path, "skip": None, "limit": None}),
                pictures,
                label,
            )
            for path, label in zip(paths, _labels(paths), strict=True)
        ]
        rows, end = cut(config, sum(map(len, self.parts))), 0
        for place, part in enumerate(self.parts):
            start, end = end, end + len(part)
            first, last = max(rows.start, start), min(rows.stop, end)
            self.parts[place] = part.with_rows(range(first - start, max(first, last) - start))
        self.ends = list(accumulate(map(len, self.parts)))
        self.notes = tuple(note for part in self.parts for note in part.notes)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        index = range(len(self))[index]  # resolves a negative index
        part = bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part] + len(self.parts[part])]

    def with_headers_only(self) -> ConcatenatedDataset:
        other = copy.copy(self)
        other.parts = [part.with_headers_only() for part in self.parts]
        return other

    def files(self) -> list[Path]:
        return list(dict.fromkeys(path for part in self.parts for path in part.files()))

    def counts(self) -> dict[str, str]:
        return {source: rows for part in self.parts for source, rows in part.counts().items()}


def _labels(paths: Sequence[str]) -> list[str]:
    """Short distinct names of files: without their endings where those are not needed."""
    bare = [Path(path).with_suffix("").parts for path in paths]
    return shortest_distinct_names(
        bare if len(set(bare)) == len(bare) else [Path(path).parts for path in paths]
    )


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
