"""What is fuzzed: functions of any bytes, which return or raise as documented and nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from vlopd.data.text_files import open_csv, open_json, open_lines
from vlopd.errors import UserError
from vlopd.grading.extraction import (
    choice_letter,
    math_answer,
    number_answer,
    short_answer,
    yes_or_no,
)
from vlopd.masks.files import load_mask
from vlopd.models.integrity import SINGLE, read_headers
from vlopd.weights.reader import Weights

FOLDER = Path(tempfile.mkdtemp(prefix="vlopd-fuzz-"))


def mask(content: bytes) -> None:
    """A mask file of these bytes is a mask, or refused with a UserError."""
    path = FOLDER / "m.safetensors"
    path.write_bytes(content)
    try:
        load_mask(path)
    except UserError:
        return


def weights(content: bytes) -> None:
    """A checkpoint whose file has these bytes is read, or refused with a UserError."""
    folder = FOLDER / "model"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(content)
    try:
        read_headers(folder)
        with Weights(folder) as found:
            for name in found.names():
                found.read(name)
    except UserError:
        return


def rows(content: bytes) -> None:
    """A data file of these bytes is a table, or refused with a ValueError."""
    path = FOLDER / "rows"
    path.write_bytes(content)
    for opener in (open_lines, open_json, open_csv):
        try:
            list(opener(path).rows())
        except ValueError:  # a DataError is one
            continue


def answers(content: bytes) -> None:
    """An answer of any text is read as a text, or as none."""
    text = content.decode("utf-8", "replace")
    for read in (math_answer, number_answer, short_answer, yes_or_no):
        read(text)
    choice_letter(text, ["red", "blue", "the first"])


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "mask": mask,
    "weights": weights,
    "rows": rows,
    "answers": answers,
}
