"""Any JSONL, JSON, CSV or parquet file, or hub data set, as examples, through `datasets` and a column map.

Rows are read and pictures decoded when they are asked for, by our own code: `datasets` would decode every
picture column of a row, and say nothing of the row when one is broken.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Audio, Dataset, Features, LargeList, List, Video, load_dataset
from PIL import Image

from vlopd.config import ConfigError, DataError, FileData
from vlopd.data.pictures import open_picture, peek, shorten
from vlopd.types import Example, parts_at_marks

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class FileSource(Sequence[Example]):
    """Rows by index, images opened when a row is asked for.

    `pictures` names further columns with pictures, for a teacher's image context: they are opened too, and
    stand in the example's fields under the column's name. Boxes (lists of numbers) are left as they are.

    Raises ConfigError for a missing file or column, or ids that are not unique, when made; DataError with the
    row's id when a row is read.
    """

    def __init__(self, config: FileData, pictures: Sequence[str] = ()):
        self.config = config
        self.pictures = tuple(dict.fromkeys(pictures))  # two teachers may share a column
        path = Path(config.path)
        self.folder = path if path.is_dir() else path.parent
        rows = read_rows(config)
        wanted = [config.question, config.answer, config.image, config.id, *pictures]
        for column in wanted:
            if column is not None and column not in rows.column_names:
                raise ConfigError(
                    f"{config.path} has no column {column!r}; it has {rows.column_names}; name them in "
                    "[data]: question, answer, image, id (a teacher's picture: teacher.context.column)"
                )
        if len(rows) == 0:
            raise ConfigError(f"{config.path} has no rows")
        if config.id is not None:
            refuse_repeated_ids(config.path, rows.data.column(config.id))
        self.open = open_picture
        self.features = Features({name: undecoded(f) for name, f in rows.features.items()})
        self.rows = rows.with_format("arrow")  # nothing is decoded behind our back

    def unopened(self) -> FileSource:
        """The same rows with pictures of which only the header is read: sizes, and whether they are there."""
        other = copy.copy(self)
        other.open = peek
        return other

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        config = self.config
        index = range(len(self))[index]  # counts a negative index from the end
        stored = self.rows[index]
        try:
            row = self.features.decode_example(stored.to_pylist()[0])
        except UnicodeDecodeError as error:  # Arrow takes bytes as they come
            name = stored[config.id][0].as_py() if config.id else f"{index} (from 0)"
            raise DataError(
                f"{config.path}, row {name} is not UTF-8 ({error.reason}); save the file as UTF-8"
            ) from None
        name = str(row[config.id]) if config.id else f"{Path(config.path).stem}-{index}"
        question = row[config.question]
        if not isinstance(question, str) or not question.strip():
            raise DataError(
                f"{config.path}, row {name}: column {config.question!r} holds no text but "
                f"{describe(question)}; fill it in or remove the row"
            )
        answer = None if config.answer is None else row[config.answer]
        if not isinstance(answer, (str, int, float, type(None))):
            raise DataError(
                f"{config.path}, row {name}: column {config.answer!r} holds {describe(answer)}; "
                "an answer is text or a number"
            )
        images = self.open_images(config.image, row, name) if config.image else ()
        for column in self.pictures:
            if row[column] is not None and not is_box(row[column]):
                row[column] = list(self.open_images(column, row, name))
        answer = None if answer is None else str(answer)
        example = Example.ask(name, question, images, answer, row)
        if config.image_mark is not None:
            example = self.with_marks(example, question, config.image_mark)
        if config.system is None:
            return example
        system: Mapping[str, Any] = {
            "role": "system",
            "content": [{"type": "text", "text": config.system}],
        }
        return replace(example, messages=(system, *example.messages))

    def with_marks(self, example: Example, question: str, mark: str) -> Example:
        """The example with its images where the question marks them."""
        parts = parts_at_marks(question, mark)
        marked = sum(part["type"] == "image" for part in parts)
        if marked != len(example.images):
            raise DataError(
                f"{self.config.path}, row {example.id}: the question has {marked} {mark!r} and the row "
                f"{len(example.images)} images; mend the row or data.image_mark"
            )
        return replace(example, messages=({"role": "user", "content": parts},))

    def open_images(
        self, column: str, row: Mapping[str, Any], name: str
    ) -> tuple[Image.Image, ...]:
        """The picture of a column, or its list of pictures; an empty list is a row without any."""
        where = f"{self.config.path}, row {name}: column {column!r}"
        value = row[column]
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


def read_rows(config: FileData) -> Dataset:
    """The rows, from the disk or the hub. Raises ConfigError with the reason and, for JSONL, the line."""
    path = Path(config.path)
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None and path.is_file():
        raise ConfigError(
            f"data.path {config.path!r} ends in {path.suffix!r}; we read {', '.join(BUILDERS)}, "
            "a folder, or a hub data set"
        )
    if builder is not None and not path.is_file():
        raise ConfigError(f"no data file {path} (data.path)")
    if builder is not None and path.stat().st_size == 0:
        raise ConfigError(f"{config.path} has no rows")
    loudness = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what we are about to say
    try:
        if builder is None:
            return load_dataset(config.path, config.subset, split=config.split)
        return load_dataset(builder, data_files=str(path), split="train")
    except Exception as error:  # `datasets` raises a dozen kinds for unreadable input
        reason = broken_line(path) if path.suffix.lower() == ".jsonl" else None
        cause = error.__cause__ or error
        reason = reason or shorten(str(cause) or type(cause).__name__, 300)
        raise ConfigError(f"cannot read data.path {config.path!r}: {reason}") from None
    finally:
        datasets.logging.set_verbosity(loudness)


def broken_line(path: Path) -> str | None:
    """The first line of a JSONL file that is not a JSON object, and the remedy; None where all are."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and not isinstance(json.loads(text), dict):
                    return f"line {number} is not an object {{...}}; one row a line"
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8; save the file as UTF-8"
            except ValueError as error:
                return f"line {number} is not JSON ({error}); mend or remove it"
    return None


def undecoded(feature: Any) -> Any:
    """A `datasets` feature whose pictures, sounds and films stay as they are stored."""
    match feature:
        case datasets.Image() | Audio() | Video():
            return replace(feature, decode=False)
        case List() | LargeList():
            return replace(feature, feature=undecoded(feature.feature))
        case dict():
            return {name: undecoded(each) for name, each in feature.items()}
    return feature


def refuse_repeated_ids(path: str, column: Any) -> None:
    """Raises ConfigError for the first id of an Arrow column that is missing, or that two rows share."""
    try:
        ids = column.to_pylist()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: an id is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from None
    first: dict[str, int] = {}
    for index, each in enumerate(ids):
        if not isinstance(each, (str, int)) or each == "":
            raise ConfigError(
                f"{path}: row {index} (from 0) has {describe(each)} for an id; fill in the column that "
                "data.id names, or leave data.id out to number the rows"
            )
        if str(each) in first:
            raise ConfigError(
                f"{path}: id {shorten(str(each))!r} is of row {first[str(each)]} and of row {index} (from 0); "
                "make ids unique, or leave data.id out to number the rows"
            )
        first[str(each)] = index


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
