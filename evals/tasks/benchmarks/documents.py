"""Rows of published benchmarks, from a local copy or the hub, as lm-eval documents.

A local copy is a folder that the environment variable VLOPD_BENCHMARKS names, with one folder a benchmark that
holds the split's files as the hub calls them: `gsm8k/test*.parquet` or `gsm8k/test*.jsonl`, columns as on the
hub, pictures inside the file or as file names relative to it. What is not there is looked up on the hub, which
needs HF_HUB_OFFLINE=0 under our scripts.

Documents are small: a picture is its digest there, so that the digest of a document is that of its picture too,
and is opened when lm-eval asks for it.
"""

from __future__ import annotations

import hashlib
import os
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
from evals.tasks.kinds import mean_by_kind
from vlopd.config.data import FileData
from vlopd.data.images import open_picture
from vlopd.data.literals import cell_text, check_characters
from vlopd.data.tables import ConcatenatedTable, Table, open_table
from vlopd.errors import ConfigError, DataError

FOLDER = "VLOPD_BENCHMARKS"

Row = Mapping[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are, the columns that `read` wants of them, and what it makes of a row."""

    name: str
    hub: str
    split: str
    columns: tuple[str, ...]
    read: Callable[[Row], Document]
    """A row as a document. Raises DataError with the column, but without the row, which is added."""
    subset: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored, pictures undecoded; `place` names them in messages."""

    place: str
    folder: Path
    stored: Table

    def __getitem__(self, index: int) -> Row:
        return self.stored[index]


def open_rows(benchmark: Benchmark) -> Rows:
    """The split, from the local copy or the hub. Raises ConfigError where it is empty or lacks a column."""
    return read(benchmark, os.environ.get(FOLDER))


@lru_cache(maxsize=16)
def read(benchmark: Benchmark, root: str | None) -> Rows:
    """Rows of a benchmark, for a value of the environment variable."""
    name, split = benchmark.name, benchmark.split
    folder = Path(root or "") / name
    local = root is not None and folder.is_dir()
    if local:
        files = sorted(p for end in ("parquet", "jsonl") for p in folder.glob(f"{split}*.{end}"))
        if not files:
            raise ConfigError(
                f"{folder} has no {split}*.parquet and no {split}*.jsonl ({FOLDER}); name the files of "
                f"{benchmark.hub}, split {split}, so"
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
                f"vlopd_{name}: {error}; let the hub be reached (HF_HUB_OFFLINE=0), or put "
                f"{split}*.parquet or .jsonl into a folder {name} of the one that {FOLDER} names"
            ) from None
    for part in parts:
        for column in benchmark.columns:
            if column not in part.columns:
                raise ConfigError(
                    f"vlopd_{name}: {place} has no column {column!r}; it has {part.columns}"
                )
    return Rows(place, folder, ConcatenatedTable([(part, range(len(part))) for part in parts]))


def read_file(path: Path, benchmark: Benchmark) -> Table:
    """One file of a local copy. Raises ConfigError where it cannot be read, or is empty."""
    where = f"vlopd_{benchmark.name}, split {benchmark.split}"
    try:
        return open_table(FileData(path=str(path)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def documents(benchmark: Benchmark) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: every row as a document, with the digest of every picture.

    Questions about the same picture are a cluster. Raises DataError with the row of what cannot be read.
    """
    rows = open_rows(benchmark)
    made = []
    for index in range(len(rows.stored)):
        row = rows[index]
        try:
            check_characters(row)
            document = benchmark.read(row)
            digests = [digest(row, column, rows.folder) for column in document["pictures"]]
        except DataError as error:
            raise DataError(f"{rows.place}, row {index} (from 0): {error}") from None
        place = {"benchmark": benchmark.name, "row": index, "digests": digests}
        made.append({**document, **place, "cluster": digests[0] if digests else None})
    return {"test": Dataset.from_list(made)}


def pictures(benchmark: Benchmark, document: Mapping[str, Any]) -> list[Image.Image]:
    """A document's pictures, in the order of their marks; one that another request holds is not decoded again."""
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
"""Decoded pictures by digest, while a request holds them."""


def picture_of(row: Row, column: str) -> Any:
    """What a column holds; `images[1]` is the second picture of the list in `images`."""
    name, _, place = column.rstrip("]").partition("[")
    value = row.get(name)
    if place and value is not None:
        value = value[int(place)]
    if value is None:
        raise DataError(f"column {column!r} has no picture")
    return value


def digest(row: Row, column: str, folder: Path) -> str:
    """Sixteen digits of the SHA-256 of a stored picture."""
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
    """A document: `prompt` is what the model reads, `question` what the report shows.

    `answer` is the choice itself where there are choices. `pictures` are columns, one a mark in the prompt.
    """
    assert prompt.count(PLACEHOLDER) == len(pictures)
    if choices and answer not in choices:
        raise DataError(f"its answer {answer!r} is not among its choices {list(choices)}")
    about = {"prompt": prompt, "question": question, "answer": answer, "kind": kind}
    return {**about, "choices": list(choices), "pictures": list(pictures), **more}


def text(row: Row, column: str) -> str:
    """A column's text, or number as written, stripped. Raises DataError where there is none."""
    value = row[column]
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise DataError(f"column {column!r} holds {value!r} in place of text")
    try:
        return unmarked(str(cell_text(value))).strip()
    except DataError as error:
        raise DataError(f"column {column!r} {error}") from None


def unmarked(value: str) -> str:
    """Text in which no picture is marked: a mark without a picture would be counted as one."""
    return value.replace(PLACEHOLDER, "")


def lettered(choices: Sequence[str]) -> str:
    """One line a choice, A. first."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)
    )


def outcome(said: str | None, right: bool, metric: str = "acc") -> dict[str, float]:
    return {metric: float(right), "extraction_failure": float(said is None)}


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of a guesser among the choices, over all and by kind; an open question is not guessed right."""
    return mean_by_kind(docs, lambda doc: 1 / len(doc["choices"]) if doc["choices"] else 0.0)
