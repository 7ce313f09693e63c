"""Anybody's JSONL, parquet or pictures, and what is said when a row is broken."""

import json

import pandas
import pytest
from PIL import Image

from vlopd.config import ConfigError, FileData
from vlopd.data.files import DataError, FileSource


@pytest.fixture
def rows(tmp_path):
    Image.new("CMYK", (7, 5)).convert("CMYK").save(tmp_path / "a.jpg")
    Image.new("RGBA", (1, 1)).save(tmp_path / "b.png")
    return [
        {"q": "first?", "a": "one", "pic": "a.jpg", "key": "r1"},
        {"q": "second?", "a": "two", "pic": "b.png", "key": "r2"},
    ]


def write(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(path, **more):
    return FileData(path=str(path), question="q", answer="a", id="key", **more)


def test_jsonl_with_images_through_a_column_map(tmp_path, rows):
    """Columns by name become one Example a row; pictures come as RGB whatever they were."""
    data = FileSource(columns(write(tmp_path, rows), image="pic", system="be brief"))
    example = data[1]
    assert len(data) == 2 and (example.id, example.question, example.answer) == (
        "r2",
        "second?",
        "two",
    )
    assert [image.mode for image in example.images] == ["RGB"]
    assert [m["role"] for m in example.messages] == ["system", "user"]


def test_parquet_reads_the_same(tmp_path, rows):
    """The same rows from parquet give the same questions."""
    path = tmp_path / "data.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    assert [e.question for e in FileSource(columns(path))] == ["first?", "second?"]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "null"])
def test_a_broken_picture_names_its_row(tmp_path, rows, damage):
    """A picture that is missing, empty or truncated, or a null in its place, ends in one line with the row's id."""
    good = (tmp_path / "b.png").read_bytes()
    if damage == "missing":
        (tmp_path / "b.png").unlink()
    elif damage == "null":
        rows[1]["pic"] = None
    else:
        (tmp_path / "b.png").write_bytes(b"" if damage == "empty" else good[:40])
    data = FileSource(columns(write(tmp_path, rows), image="pic"))
    assert data[0].id == "r1"
    with pytest.raises(DataError, match="row r2"):
        data[1]


def test_broken_rows_files_and_columns_are_one_clear_line(tmp_path, rows):
    """No file, no column, no rows, no text, not JSON: each says what and where."""
    with pytest.raises(ConfigError, match=r"no data file .*nope\.jsonl"):
        FileSource(columns(tmp_path / "nope.jsonl"))
    path = write(tmp_path, rows)
    with pytest.raises(ConfigError, match="no column 'question'; it has"):
        FileSource(FileData(path=str(path)))
    with pytest.raises(DataError, match=r"row r1: column 'q' holds no text"):
        FileSource(columns(write(tmp_path, [{**rows[0], "q": "  "}])))[0]
    path.write_text('{"q": "x", \n')
    with pytest.raises(ConfigError, match=r"cannot read data\.path"):
        FileSource(columns(path))
