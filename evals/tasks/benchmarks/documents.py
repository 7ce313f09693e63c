"""Loads published benchmarks, from a local copy or the hub, as lm-eval documents.

A local copy is in the folder of the environment variable VLOPD_BENCHMARKS, with one folder per benchmark that holds
the split's files under their hub names: `gsm8k/test*.parquet` or `gsm8k/test*.jsonl`, columns as on the hub, images
in the file or as file names relative to it. Other benchmarks are loaded from the hub, which needs HF_HUB_OFFLINE=0
under our scripts.

Documents hold digests of images instead of the images, which are opened on demand; a document's digest thus covers
its images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from weakref import WeakValueDictionary

from datasets import Dataset
from PIL import Image

from evals.lm import PLACEHOLDER
from evals.tasks.chance import mean_by_kind
from vlopd.config.data import FileData
from vlopd.data.images import open_picture
from vlopd.data.raw_values import cell_text, check_characters
from vlopd.data.tables import ConcatenatedTable, Table, open_table
from vlopd.errors import ConfigError, DataError

FOLDER = "VLOPD_BENCHMARKS"

Row = Mapping[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its hub data set and split, the columns it needs, and `read`, which converts a row."""

    name: str
    hub: str
    split: str
    columns: tuple[str, ...]
    read: Callable[[Row], Document | None]
    """Converts a row to a document, or to None to leave it out.

    Raises DataError with the column; the caller adds the row.
    """
    subset: str | None = None


@dataclass(frozen=True)
class Rows:
    """Stored rows, with images undecoded; `place` names them in messages."""

    place: str
    folder: Path
    stored: Table

    def __getitem__(self, index: int) -> Row:
        return self.stored[index]


def open_rows(benchmark: Benchmark) -> Rows:
    """Opens a split, from the local copy or the hub. Raises ConfigError where it is empty or lacks a column."""
    return read(benchmark, os.environ.get(FOLDER))


@lru_cache(maxsize=16)
def read(benchmark: Benchmark, root: str | None) -> Rows:
    """Reads a benchmark's rows; `root` is the value of the environment variable."""
    name, split = benchmark.name, benchmark.split
    folder = Path(root or "") / name
    local = root is not None and folder.is_dir()
    if local:
        found = sorted(p for end in ("parquet", "jsonl") for p in folder.glob(f"{split}*.{end}"))
        files = [p for p in found if not re.match(rf"{split}[a-z]", p.name)]  # testmini is not test
        if not files:
            raise ConfigError(
                f"{folder} has no {split}*.parquet and no {split}*.jsonl ({FOLDER}); copy the files of "
                f"{benchmark.hub}, split {split}, there under such names"
            )
        place = str(files[0] if len(files) == 1 else folder)
        parts = [read_file(file, benchmark) for file in files]
    else:
        place = f"{benchmark.hub} (split {split})"
        source = FileData(path=benchmark.hub, subset=benchmark.subset, split=split)
        try:
            parts = [open_table(source)]
        except ConfigError as error:
            raise ConfigError(
                f"vlopd_{name}: {error}; allow access to the hub (HF_HUB_OFFLINE=0), or put "
                f"{split}*.parquet or .jsonl into ${FOLDER}/{name}"
            ) from None
    for part in parts:
        for column in benchmark.columns:
            if column not in part.columns:
                raise ConfigError(
                    f"vlopd_{name}: {place} has no column {column!r}; it has {part.columns}"
                )
    return Rows(place, folder, ConcatenatedTable([(part, range(len(part))) for part in parts]))


def read_file(path: Path, benchmark: Benchmark) -> Table:
    """Opens one file of a local copy. Raises ConfigError where it is unreadable or empty."""
    where = f"vlopd_{benchmark.name}, split {benchmark.split}"
    try:
        return open_table(FileData(path=str(path)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def documents(benchmark: Benchmark) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: all rows as documents, with digests of their images.

    Questions on the same image form a cluster, unless the document names its own. Raises DataError with the row that
    is invalid.
    """
    rows = open_rows(benchmark)
    made = []
    for index in range(len(rows.stored)):
        row = rows[index]
        try:
            check_characters(row)
            if (document := benchmark.read(row)) is None:
                continue
            digests = [digest(row, column, rows.folder) for column in document["pictures"]]
        except DataError as error:
            raise DataError(f"{rows.place}, row {index} (from 0): {error}") from None
        place = {"benchmark": benchmark.name, "row": index, "digests": digests}
        cluster = document.get("cluster", digests[0] if digests else None)
        made.append({**document, **place, "cluster": cluster})
    return {"test": Dataset.from_list(made)}


def pictures(benchmark: Benchmark, document: Mapping[str, Any]) -> list[Image.Image]:
    """A document's images, in the order of their placeholders; an image that another request holds is reused."""
    rows = open_rows(benchmark)
    row = rows[document["row"]]
    found = []
    for column, key in zip(document["pictures"], document["digests"], strict=True):
        if (image := HELD.get(key)) is None:
            try:
                image = HELD[key] = open_picture(picture_of(row, column), rows.folder)
            except DataError as error:
                place = f"{rows.place}, row {document['row']} (from 0): column {column!r}"
                raise DataError(f"{place} {error}") from None
        found.append(image)
    return found


HELD: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()
"""Decoded images by digest, while a request holds them."""


def picture_of(row: Row, column: str) -> Any:
    """The value of a column; `images[1]` is the second image of the list in `images`."""
    name, _, place = column.rstrip("]").partition("[")
    value = row.get(name)
    if place and value is not None:
        value = value[int(place)]
    if value is None:
        raise DataError(f"column {column!r} has no picture")
    return value


def digest(row: Row, column: str, folder: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a stored image."""
    value = picture_of(row, column)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = folder / value
        if not path.is_file():
            raise DataError(f"column {column!r} names {value!r}, which is not in {folder}")
        value = path.read_bytes()
    return hashlib.sha256(value).hexdigest()[:16]


# ------------------------------------------------------------- for readers of rows, and for scoring


def document(
    prompt: str,
    question: str,
    answer: str,
    kind: str | None = None,
    choices: Sequence[str] = (),
    pictures: Sequence[str] = (),
    **more: Any,
) -> Document:
    """Makes a document: `prompt` is the model's input, `question` is for the report.

    `answer` is the text of the right choice, if there are choices. `pictures`: columns, one per placeholder in the
    prompt.
    """
    assert prompt.count(PLACEHOLDER) == len(pictures)
    if choices and answer not in choices:
        raise DataError(f"answer {answer!r} is not among the choices {list(choices)}")
    about = {"prompt": prompt, "question": question, "answer": answer, "kind": kind}
    return {**about, "choices": list(choices), "pictures": list(pictures), **more}


def text(row: Row, column: str) -> str:
    """A column's text, or number as written, stripped. Raises DataError for any other value."""
    value = row[column]
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise DataError(f"column {column!r} holds {value!r} in place of text")
    try:
        return unmarked(str(cell_text(value))).strip()
    except DataError as error:
        raise DataError(f"column {column!r} {error}") from None


def unmarked(value: str) -> str:
    """Removes image placeholders from text, which would be counted as images."""
    return value.replace(PLACEHOLDER, "")


def lettered(choices: Sequence[str]) -> str:
    """The choices as lines `A. ...`, `B. ...`."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)
    )


def outcome(extracted: str | None, right: bool, metric: str = "acc") -> dict[str, float]:
    return {metric: float(right), "extraction_failure": float(extracted is None)}


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Chance level of a random choice, overall and by kind; 0 for open questions."""
    return mean_by_kind(docs, lambda doc: 1 / len(doc["choices"]) if doc["choices"] else 0.0)
