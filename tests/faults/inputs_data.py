"""Malformed data files, rows and pictures."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.faults.harness import ROWS, Case, Edit, Put

TRAIN = ("run", "c.toml", "--out", "out", "--until", "arms", "--arm", "full")
SEEN = ("run", "vlm.toml", "--out", "out", "--until", "arms", "--arm", "full")
DIGITS = "9" * 5000


def row(**fields: Any) -> str:
    return json.dumps({"question": "how many red", "answer": "1", **fields}) + "\n"


LINES: dict[str, tuple[str | bytes, str]] = {
    # the content of rows.jsonl
    "empty": ("", "rows.jsonl"),
    "blank": ("\n \n\t\n", "rows.jsonl"),
    "no-json": ("how many red\n", "line 1"),
    "truncated": (ROWS[:-20], "line 6"),
    "list": (ROWS + "[1]\n", "line 7"),
    "number": (ROWS + "7\n", "line 7"),
    "null": ("null\n" + ROWS, "line 1"),
    "text": (ROWS + '"a"\n', "line 7"),
    "one-list": ("[" + ROWS.replace("\n", ",")[:-1] + "]\n", "line 1"),
    "two-on-a-line": (ROWS.replace("\n", "", 1), "line 1"),
    "trailing-comma": (ROWS.replace("}\n", "},\n"), "line 1"),
    "single-quotes": (ROWS.replace('"', "'"), "line 1"),
    "same-key-twice": ('{"question": "a", "question": "b", "answer": "1"}\n', "line 1"),
    "latin-1": (ROWS.replace("red", "r\u00e9d").encode("latin-1"), "UTF-8"),
    "utf-16": (ROWS.encode("utf-16"), "line 1"),
    "binary": (b"\x00\xff\xfe\x01" * 50, "line 1"),
    "half-a-pair": ('{"question": "\\ud800", "answer": "1"}\n', "surrogate"),
    "deep-lists": (ROWS + "[" * 100_000 + "\n", "line 7"),
    "deep-tables": (ROWS + '{"a":' * 100_000 + "\n", "line 7"),
    "deep-row": (ROWS + '{"question": "a", "answer": ' + "[" * 5000 + "]" * 5000 + "}\n", "line 7"),
    "question-missing": ('{"answer": "1"}\n', "question"),
    "question-null": (ROWS + row(question=None), "question"),
    "question-empty": (ROWS + row(question=""), "question"),
    "question-blank": (ROWS + row(question="  "), "question"),
    "question-number": (ROWS + row(question=5), "question"),
    "question-list": (ROWS + row(question=["a"]), "question"),
    "question-table": (ROWS + row(question={"a": 1}), "question"),
    "question-endless": (ROWS + row(question="how many red " * 2000), "tokens"),
    "answer-missing": ('{"question": "how many red"}\n', "answer"),
    "answer-null": (ROWS + row(answer=None), "answer"),
    "answer-nan": (ROWS + '{"question": "how many red", "answer": NaN}\n', "answer"),
    "answer-infinity": (ROWS + '{"question": "how many red", "answer": Infinity}\n', "answer"),
    "answer-list": (ROWS + row(answer=["1"]), "answer"),
    "answer-table": (ROWS + row(answer={"value": "1"}), "answer"),
    "answer-huge": (ROWS + f'{{"question": "how many red", "answer": [{DIGITS}]}}\n', "answer"),
}
OF_ANSWERS = {name for name in LINES if name.startswith("answer")}
"""Faults that are found where answers are read: completions come from the data."""

TABLES: dict[str, tuple[str, str | bytes, str]] = {
    # file, content, what is named
    "csv-empty": ("rows.csv", "", "rows.csv"),
    "csv-no-rows": ("rows.csv", "question,answer\n", "rows.csv"),
    "csv-no-column": ("rows.csv", "ask,answer\na,b\n", "question"),
    "csv-twice": ("rows.csv", "question,question,answer\na,b,c\n", "question"),
    "csv-semicolons": ("rows.csv", "question;answer\na;b\n", "semicolons"),
    "csv-tabs": ("rows.csv", "question\tanswer\na\tb\n", "tabs"),
    "csv-more-cells": ("rows.csv", "question,answer\na,b,c\n", "line 2"),
    "csv-fewer-cells": ("rows.csv", "question,answer\na\n", "line 2"),
    "csv-open-quote": ("rows.csv", 'question,answer\n"a,b\n', "line"),
    "csv-stray-quote": ("rows.csv", 'question,answer\n"a"b,c\n', "line 2"),
    "csv-latin-1": ("rows.csv", "question,answer\nr\u00e9d,b\n".encode("latin-1"), "UTF-8"),
    "csv-binary": ("rows.csv", b"\x00\xff" * 40, "rows.csv"),
    "csv-empty-cell": ("rows.csv", "question,answer\n,b\n", "question"),
    "json-number": ("rows.json", "7", "rows.json"),
    "json-object": ("rows.json", '{"rows": [{"question": "a"}]}', "rows"),
    "json-truncated": ("rows.json", '[{"question": "a", "answer": "b"}', "truncated"),
    "json-list-of-numbers": ("rows.json", "[1, 2]", "row 0"),
    "json-data-after": ("rows.json", '[{"question": "a", "answer": "1"}] x', "list"),
    "json-deep": ("rows.json", "[" * 100_000, "nested"),
    "json-empty-list": ("rows.json", "[]", "rows.json"),
    "parquet-empty": ("rows.parquet", b"", "rows.parquet"),
    "parquet-text": ("rows.parquet", ROWS, "rows.parquet"),
    "parquet-truncated": ("rows.parquet", b"PAR1" + b"\x00" * 30, "rows.parquet"),
    "packed": ("rows.jsonl.gz", b"\x1f\x8b", "unpack"),
    "excel": ("rows.xlsx", b"PK\x03\x04", ".xlsx"),
    "pickle": ("rows.pkl", b"\x80\x04.", ".pkl"),
    "no-suffix": ("rows", ROWS, "rows"),
}

SETTINGS: list[tuple[str, str, str]] = [
    # overrides of the data section: malformed, what is named, valid
    ("data.path='gone.jsonl'", "gone.jsonl", "data.path='rows.jsonl'"),
    ("data.path='gone-*.jsonl'", "gone-*.jsonl", "data.path='row*.jsonl'"),
    ("data.path='student'", "student", "data.path='rows.jsonl'"),
    ("data.path='no/such/hub/set'", "no/such/hub/set", "data.path='rows.jsonl'"),
    ("data.path='user/missing'", "user/missing", "data.path='rows.jsonl'"),
    ("data.path=['rows.jsonl', 'gone.jsonl']", "gone.jsonl", "data.path=['rows.jsonl']"),
    ("data.question='prompt'", "prompt", "data.question='question'"),
    ("data.question='answer.text'", "answer.text", "data.question='question'"),
    ("data.answer='gold'", "gold", "data.answer='answer'"),
    ("data.id='key'", "key", "data.id='answer'"),
    ("data.split='test'", "test", "data.split='train'"),
    ("data.split='train[5:2]'", "rows.jsonl", "data.split='train[0:4]'"),
    ("data.split='train['", "train[", "data.split='train'"),
    ("data.split='train[:200%]'", "rows.jsonl", "data.split='train[:50%]'"),
    ("data.skip=100", "skip", "data.skip=1"),
]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, with any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def drawn(kind: str, mode: str = "RGB", size: tuple[int, int] = (20, 20), **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **how)
    return stream.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


PICTURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a.png"),
    "text": (b"not a picture", "a.png"),
    "html": (b"<html>404</html>", "a.png"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png"),
    "pdf": (b"%PDF-1.7", "a.png"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.png"),
    "zeros": (b"\x00" * 500, "a.png"),
    "png-cut": (drawn("PNG", size=(90, 90))[:60], "a.png"),
    "png-no-data": (png(20, 20), "a.png"),
    "png-few-data": (png(20, 20, b"\x00" * 100), "a.png"),
    "png-zero-wide": (png(0, 20), "a.png"),
    "png-bomb": (png(60_000, 60_000), "a.png"),
    "png-huge": (png(2**31 - 1, 2**31 - 1), "a.png"),
    "png-sliver": (drawn("PNG", size=(2000, 2)), "a.png"),
    "jpeg-cut": (drawn("JPEG", size=(64, 64))[:300], "a.png"),
    "jpeg-head": (b"\xff\xd8\xff\xe0", "a.png"),
    "gif-frames": (animation(), "frames"),
    "tiff-32-bit": (drawn("TIFF", "F"), "32-bit"),
    "ico": (drawn("ICO"), "a.png"),
    "bmp-cut": (drawn("BMP")[:100], "a.png"),
    "webp-cut": (drawn("WEBP")[:25], "a.png"),
}

VALUES: dict[str, tuple[Any, str]] = {
    # the cell of the column of pictures
    "missing-file": ("gone.png", "gone.png"),
    "number": (5, "image"),
    "true": (True, "image"),
    "null": (None, "image"),
    "empty": ("", "image"),
    "list-of-numbers": ([1], "image"),
    "nested-list": ([["a.png"]], "image"),
    "table": ({"file": "a.png"}, "image"),
    "empty-table": ({"bytes": None, "path": None}, "image"),
    "url": ("https://example.org/a.png", "URL"),
    "data-url": ("data:image/png;base64,AAAA", "URL"),
    "folder": (".", "image"),
    "nul": ("a\x00.png", "image"),
    "long": ("a" * 5000, "image"),
}


@dataclass(frozen=True)
class Parquet:
    """Writes a parquet file of columns."""

    path: str
    columns: tuple[tuple[str, Any], ...]

    def __call__(self, folder: Path) -> None:
        pq.write_table(
            pa.table({name: list(its) for name, its in self.columns}), folder / self.path
        )


COLUMNS: dict[str, tuple[tuple[tuple[str, Any], ...], str]] = {
    "no-rows": ((("question", ()), ("answer", ())), "rows.parquet"),
    "no-column": ((("ask", ("a",)), ("answer", ("b",))), "question"),
    "binary-question": ((("question", (b"\xff",)), ("answer", ("b",))), "question"),
    "null-question": ((("question", ("a", None)), ("answer", ("b", "c"))), "question"),
    "list-question": ((("question", (["a"],)), ("answer", ("b",))), "question"),
}


def cases() -> list[Case]:
    found = []
    of_data = (*TRAIN, "rollout.source='data'", "loss={type='nll'}")
    for label, (content, says) in LINES.items():
        words = of_data if label in OF_ANSWERS else TRAIN
        found.append(Case(words, says, Put("rows.jsonl", content), name=f"rows {label}"))
    for label, (path, text, says) in TABLES.items():
        good: dict[str, str] = {
            ".csv": "question,answer\nhow many red,1\nhow many blue,2\n",
            ".json": '[{"question": "how many red", "answer": "1"}]',
        }
        suffix = Path(path).suffix
        mend: Edit | None = Put(path, good[suffix]) if suffix in good else None
        if suffix == ".parquet":
            mend = Parquet(path, (("question", ("how many red",)), ("answer", ("1",))))
        bad = (*TRAIN, f"data.path='{path}'")
        twin = bad if mend else TRAIN
        found.append(Case(bad, says, Put(path, text), twin=twin, mend=mend, name=f"table {label}"))
    for label, (columns, says) in COLUMNS.items():
        bad = (*TRAIN, "data.path='rows.parquet'")
        mend = Parquet("rows.parquet", (("question", ("how many red",)), ("answer", ("1",))))
        found.append(
            Case(bad, says, Parquet("rows.parquet", columns), mend=mend, name=f"parquet {label}")
        )
    for line, says, valid in SETTINGS:
        found.append(Case((*TRAIN, line), says, twin=(*TRAIN, valid), name=f"data {line}"))
    parts = ("vlm.toml", "pictures", "vlm-student", "vlm-teacher")
    for label, (picture, says) in PICTURES.items():
        spoil = Put("pictures/a.png", picture)
        found.append(Case(SEEN, says, spoil, parts=parts, name=f"picture {label}"))
    bad = (*SEEN, "data.image='photo'")
    found.append(Case(bad, "photo", twin=SEEN, parts=parts, name="data data.image='photo'"))
    for label, (value, says) in VALUES.items():
        spoil = Put("pictures/rows.jsonl", 3 * row(image="a.png") + row(image=value))
        found.append(Case(SEEN, says, spoil, parts=parts, name=f"picture cell {label}"))
    return found
