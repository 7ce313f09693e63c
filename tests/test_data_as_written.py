"""Answers, ids and fields keep the digits and words of their file, whatever the format; chat-format rows are read."""

import copy
import datetime
import decimal
import gzip
import json
import os
import pickle

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evals.tasks.benchmarks import documents, mathematics
from vlopd.config.data import FileData
from vlopd.config.models import CaptionContext, TemplateContext
from vlopd.config.objective import ReverseKL
from vlopd.data.dataset import FileDataset
from vlopd.errors import ConfigError, DataError, UserError
from vlopd.files import read_jsonl
from vlopd.train.log import rows_before
from vlopd.train.rewards import answer_named, exact_match
from vlopd.train.rollouts import from_data
from vlopd.train.teacher_context import teacher_view

NUMBERS = ["3", "2.5", "3.0", "3.10", "-0", "-0.0", "1e5", "1E-3", "9007199254740993",
           "12345678901234567", "18446744073709551617", "0.1", "1e400", "100000000000000000000.0",
           "9" * 5000]  # fmt: skip
"""As JSON may write them; read together, so that no one type is right for all."""

WORDS = ["007", "+5", "1_000", "0x10", ".5", "3.", "1e5", "1E-3", "3.10", "-0", "9007199254740993",
         "None", "NA", "N/A", "NaN", "nan", "null", "NULL", "inf", "True", "true", "false", "yes",
         "2024-01-02", "12:30", "2024-01-02T03:04:05Z", " 3 ", "\t3", "#N/A", "-", "1,000", "[1]", "{}",
         'a "word"', "two\nlines", "caf\u00e9", "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]  # fmt: skip
"""Texts that readers of tables take for something else."""


def opened(path, text=None, **columns):
    """A data file of some text, opened."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return FileDataset(FileData(**{"path": str(path), "answer": "answer", **columns}))


def answers(data):
    return [example.answer for example in data]


def as_json(path, literals):
    """Rows whose answers are these JSON literals, as JSONL or as one list."""
    rows = [f'{{"question": "q{i}", "answer": {each}}}' for i, each in enumerate(literals)]
    if path.suffix == ".json":
        return "[\n " + ",\n\n ".join(rows) + "]\n"
    return "\n".join(rows) + "\n"


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


# ------------------------------------------------------------------------------------ text formats


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
def test_json_numbers_keep_their_digits(tmp_path, name):
    """Numbers of all kinds beside each other, an empty answer and none at all: each as the file writes it."""
    literals = [*NUMBERS, "true", "false", "null", '""']
    text = as_json(tmp_path / name, literals)
    data = opened(tmp_path / name, text)
    assert answers(data) == [*NUMBERS, "true", "false", None, ""]
    assert exact_match(data[0], "3") == answer_named(data[0], "It is 3.") == 1
    assert exact_match(data[0], "3.0") == 0


def test_a_missing_key_is_no_answer(tmp_path):
    """Rows may lack a key that others have; the number beside stays 3."""
    data = opened(tmp_path / "q.jsonl", '{"question": "a", "answer": 3}\n{"question": "b"}\n')
    assert answers(data) == ["3", None] and data[1].fields == {"question": "b", "answer": None}


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_words_stay_words(tmp_path, name, end, mark):
    """Text is text in every text format, with either line end and with or without a byte-order mark."""
    if name == "q.csv":
        rows = ["question,answer", *(f"q,{quoted(word)}" for word in WORDS)]
        text = end.join([*rows, ""])
    else:
        text = as_json(tmp_path / name, map(json.dumps, WORDS)).replace("\n", end)
    assert answers(opened(tmp_path / name, mark + text)) == WORDS
    if name != "q.csv":  # as a writer does that escapes nothing
        rough = as_json(tmp_path / name, [json.dumps(w, ensure_ascii=False) for w in WORDS])
        assert answers(opened(tmp_path / name, mark + rough.replace("\n", end))) == WORDS


def test_csv_cells_are_text_and_an_empty_one_is_none(tmp_path):
    """Without quotes too; a cell may hold line breaks, and rows after it are still found by their number."""
    plain = [word for word in WORDS if not set('",\n') & set(word)]
    rows = [f"q,{word}" for word in ("3", "", *plain)]
    data = opened(
        tmp_path / "q.csv",
        "question,answer\n" + "\n\n".join(rows) + '\n"a\r\nb,\n ""c""",last\n"",""',
        id=None,
    )
    assert answers([data[i] for i in range(len(data) - 1)]) == ["3", None, *plain, "last"]
    assert data[len(data) - 2].question == 'a\r\nb,\n "c"'
    with pytest.raises(DataError, match=r"row q-\d+: column 'question' holds no text but null"):
        data[-1]


def test_ids_keep_their_digits(tmp_path):
    """Ids are texts or numbers as written, also beyond 2^53, which floats would merge; equal ones are refused."""
    ids = [
        "9007199254740992",
        "9007199254740993",
        "2.5",
        "2.50",
        '"007"',
        '"NA"',
        "18446744073709551617",
    ]
    text = "".join(f'{{"question": "q", "key": {each}}}\n' for each in ids)
    data = opened(tmp_path / "q.jsonl", text, answer=None, id="key")
    assert [example.id for example in data] == [each.strip('"') for each in ids]
    data = opened(tmp_path / "q.csv", "question,key\nq,007\nq,7\nq,7.0\n", answer=None, id="key")
    assert [example.id for example in data] == ["007", "7", "7.0"]
    same = '{"question": "q", "key": 7}\n{"question": "q", "key": "7"}\n'
    with pytest.raises(ConfigError, match="id '7' is of row 0 and of row 1"):
        opened(tmp_path / "r.jsonl", same, answer=None, id="key")
    with pytest.raises(ConfigError, match=r"row 1 .* has null for an id"):
        opened(tmp_path / "r.csv", "question,key\nq,7\nq,\n", answer=None, id="key")


def test_fields_print_as_written(tmp_path):
    """Other columns reach templates with the file's own digits and words, nested and in lists too."""
    row = '{"question": "q", "answer": 1.50, "level": 3, "p": 0.10, "meta": {"big": 1E5, "all": [2.0, 3]}, "ok": true}'
    data = opened(tmp_path / "q.jsonl", row + '\n{"question": "r", "level": 2.5}\n')
    context = TemplateContext(
        template="{{ answer }} {{ level }} {{ p }} {{ meta.big }} {{ meta['all'] }} {{ ok }} {{ level + 1 }}"
    )
    assert teacher_view(context, data[0]).question == "1.50 3 0.10 1E5 [2.0, 3] true 4"
    number = data[0].fields["p"]
    assert number == 0.1 and isinstance(number, float)
    again = [copy.deepcopy(number), pickle.loads(pickle.dumps(number))]
    assert [repr(each) for each in again] == ["0.10", "0.10"]
    caption = CaptionContext(column="meta.caption")
    with pytest.raises(UserError, match=r"no field 'meta\.caption'"):
        teacher_view(caption, data[0])


def test_nan_is_not_an_answer(tmp_path):
    """A NaN may mean no value or the word: refused with the row, in JSON and in parquet."""
    data = opened(tmp_path / "q.jsonl", as_json(tmp_path / "q.jsonl", ["NaN", "-Infinity", "5"]))
    for row in (0, 1):
        with pytest.raises(
            DataError, match=rf"row q-{row}: column 'answer' holds the number .*write null"
        ):
            data[row]
    assert data[2].answer == "5"
    table = datasets.Dataset.from_dict({"question": ["q", "r"], "answer": [2.5, float("nan")]})
    table.to_parquet(tmp_path / "q.parquet")
    with pytest.raises(DataError, match="row q-1: column 'answer' holds the number nan"):
        opened(tmp_path / "q.parquet")[1]


GOOD = '{"question": "a", "answer": "x"}'
UNREADABLE = {
    "key twice": ("q.jsonl", GOOD + '\n{"answer": 3, "answer": 4}\n', r"line 2 is not JSON \(it has 'answer' twice"),
    "nested key twice": ("q.json", '[{"m": {"a": 1, "a": 2}}]', "it has 'a' twice"),
    "leading zero": ("q.jsonl", '{"question": "a", "answer": 007}\n', "line 1 is not JSON"),
    "deep": ("q.jsonl", '{"a": ' + "[" * 100_000 + "\n", "line 1 is not JSON .*nested too deeply"),
    "a list in jsonl": ("q.jsonl", f"[{GOOD}]\n", "line 1 is not an object"),
    "one object": ("q.json", f'{{"version": 1,\n "data": [{GOOD}]}}', "it is one object; .* its 'data', by itself"),
    "one object on a line": ("q.json", f'{{"data": [{GOOD}]}}', r"no column 'question'; it has \['data'\]"),
    "cut list": ("q.json", f"[{GOOD},\n", "Expecting value: line 2"),
    "cut list after a row": ("q.json", f"[{GOOD}\n", r"truncated, or lacks a comma, after row 0 \(from 0\)"),
    "more after a list": ("q.json", f"[{GOOD}]\n[{GOOD}]", "data follow its list"),
    "no object in a list": ("q.json", f"[{GOOD}, 5]", r"row 1 \(from 0\) is not an object"),
    "empty list": ("q.json", " [ ] ", "has no rows"),
    "blank lines": ("q.jsonl", "\n \n", "has no rows"),
    "semicolons": ("q.csv", "question;answer\na;3\n", "has semicolons between its columns; save it with commas"),
    "semicolons and commas": ("q.csv", "question;answer;a,b\na;3;1,5\n", "has semicolons"),
    "tabs": ("q.csv", "question\tanswer\na\t3\n", "has tabs between"),
    "cells too many": ("q.csv", "question,answer\na, or b,3\n", "line 2 has 3 cells where the first has 2"),
    "cells too few": ("q.csv", "question,answer\na\n", "line 2 has 1 cells"),
    "open quote": ("q.csv", 'question,answer\n"a,3\nb,4\n', "is not CSV .*unexpected end"),
    "quote within": ("q.csv", 'question,answer\n"a \\"b\\" c",3\n', "line 2 is not CSV .*doubled"),
    "column twice": ("q.csv", "question,answer,answer\na,3,4\n", "two of its columns are named 'answer'"),
    "header alone": ("q.csv", "question,answer\n", "has no rows"),
    "utf-16": ("q.csv", "question,answer\n".encode("utf-16"), r"first line is not UTF-8 \(byte 0xff\); save"),
    "bare returns": ("q.csv", "question,answer\ra,3\r", "is not CSV"),
    "tsv": ("q.tsv", "question\tanswer\n", r"ends in '\.tsv'; supported are \.jsonl"),
    "split": ("q.jsonl", GOOD, r"has no split 'test' \(data.split\); it has train"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_as_written_is_refused(tmp_path, kind):
    """Each fault of a file is one line that names the file, the place and the remedy."""
    name, text, message = UNREADABLE[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path / name, text, split="test" if kind == "split" else "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_packed_file_is_to_be_unpacked(tmp_path):
    """A .jsonl.gz cannot be read row by row: the remedy says so."""
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(GOOD)
    with pytest.raises(ConfigError, match=r"ends in '\.gz'; unpack it"):
        opened(tmp_path / "q.jsonl.gz")


def test_half_a_character_names_its_row(tmp_path):
    """Half of a surrogate pair, in any field, fails in its row alone; so does a byte that is not UTF-8, in a CSV."""
    text = GOOD + '\n{"question": "b", "note": ["\\ud83d"]}\n{"question": "\\ud83d\\ude00"}\n'
    data = opened(tmp_path / "q.jsonl", text)
    assert (data[0].question, data[2].question) == ("a", "\U0001f600")
    with pytest.raises(DataError, match=r"row q-1 has half of a surrogate pair \(\\ud83d\)"):
        data[1]
    (tmp_path / "q.csv").write_bytes(b"question,answer\na,x\ncaf\xe9,y\n")
    data = opened(tmp_path / "q.csv")
    assert data[0].answer == "x"
    with pytest.raises(DataError, match=r"row q-1 is not UTF-8 \(byte 0xe9\); save"):
        data[1]


def test_rows_are_read_from_the_disk_and_not_from_another_file(tmp_path):
    """A file that changes after it was opened is refused, not read at the old places."""
    data = opened(tmp_path / "q.jsonl", GOOD + "\n")
    assert answers(data) == ["x"]
    (tmp_path / "q.jsonl").write_text(GOOD.replace("x", "y") + "\n")
    with pytest.raises(DataError, match=r"q\.jsonl has changed since it was opened"):
        data[0]


# ---------------------------------------------------------------------------------- declared types


def test_parquet_keeps_its_declared_types(tmp_path):
    """Integers are exact, floats of 32 bits print as such, decimals keep zeros, dates are ISO, text is text."""
    columns = {
        "int": (pyarrow.array([2**53 + 1, None]), [str(2**53 + 1), None]),
        "uint": (pyarrow.array([2**64 - 1, 0], "uint64"), [str(2**64 - 1), "0"]),
        "float": (pyarrow.array([2.5, 3.1]), ["2.5", "3.1"]),
        "single": (pyarrow.array([0.1, 1e-3], "float32"), ["0.1", "0.001"]),
        "half": (pyarrow.array([0.1, 2.5], "float32").cast("float16"), ["0.1", "2.5"]),
        "text": (pyarrow.array(["007", "NA"]), ["007", "NA"]),
        "word": (pyarrow.array(["007", "NA"]).dictionary_encode(), ["007", "NA"]),
        "bool": (pyarrow.array([True, False]), ["true", "false"]),
        "decimal": (pyarrow.array([decimal.Decimal("3.10"), None]), ["3.10", None]),
        "date": (pyarrow.array([datetime.date(2024, 1, 2), None]), ["2024-01-02", None]),
    }
    table = {"question": ["a", "b"], **{name: given for name, (given, _) in columns.items()}}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "q.parquet")
    datasets.Dataset(pyarrow.table(table)).save_to_disk(tmp_path / "disk")
    for name, (_, wanted) in columns.items():
        for path in (tmp_path / "q.parquet", tmp_path / "disk"):
            assert answers(opened(path, answer=name)) == wanted, (name, path)
    nested = {"m": pyarrow.StructArray.from_arrays([columns["single"][0]], ["x"]), **table}
    pyarrow.parquet.write_table(pyarrow.table(nested), tmp_path / "n.parquet")
    data = opened(tmp_path / "n.parquet", answer="m.x")
    assert answers(data) == ["0.1", "0.001"] and str(data[0].fields["m"]) == "{'x': 0.1}"


def test_whole_numbers_that_became_floats_are_refused(tmp_path):
    """pandas stores integers beside an empty cell as floats, as answers and as ids: 3.0 is not what was written."""
    frame = pandas.DataFrame({"question": ["a", "b"], "answer": [3, None], "text": ["3", None]})
    frame.to_parquet(tmp_path / "q.parquet")
    with pytest.raises(
        ConfigError, match=r"column 'answer' stores 3\.0 .* store the column as text"
    ):
        opened(tmp_path / "q.parquet")
    with pytest.raises(ConfigError, match=r"column 'answer' stores 3\.0"):
        opened(tmp_path / "q.parquet", answer=None, id="answer")
    assert answers(opened(tmp_path / "q.parquet", answer="text")) == ["3", None]
    beside = pandas.DataFrame({"question": ["a", "b"], "answer": [2.5, 3]})  # one is enough
    beside.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(
        ConfigError, match=r"column 'answer' stores 3\.0 .* store the column as text"
    ):
        opened(tmp_path / "d.parquet")
    moments = pandas.DataFrame({"question": ["a"], "answer": pandas.to_datetime(["2024-01-02"])})
    moments.to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"column 'answer' holds a datetime; .*store it as text"):
        opened(tmp_path / "m.parquet")[0]


def test_a_file_put_in_place_of_another_is_the_one_that_is_read(tmp_path):
    """Also under the same name and with the same time, by which the cache of `datasets` goes."""
    path, other = tmp_path / "q[1]*.parquet", tmp_path / "other.parquet"
    for each, answer in ((path, "old"), (other, "new")):
        datasets.Dataset.from_dict({"question": ["a"], "answer": [answer]}).to_parquet(each)
        os.utime(each, (10**9, 10**9))
    assert answers(opened(path)) == ["old"]
    other.replace(path)
    assert answers(opened(path)) == ["new"]


def test_saved_data_sets_are_read(tmp_path):
    """A folder of `save_to_disk`, with one split or several, of which data.split names one, or parts."""
    made = datasets.Dataset.from_dict({"question": list("abcd"), "answer": ["1", "2", "3", "007"]})
    made.save_to_disk(tmp_path / "one")
    assert answers(opened(tmp_path / "one")) == ["1", "2", "3", "007"]
    splits = datasets.DatasetDict({"train": made.select([0, 1]), "dev": made.select([3, 2])})
    splits.save_to_disk(tmp_path / "two")
    assert answers(opened(tmp_path / "two")) == ["1", "2"]
    assert answers(opened(tmp_path / "two", split="dev")) == ["007", "3"]
    assert answers(opened(tmp_path / "two", split="dev[:1]+train")) == ["007", "1", "2"]
    with pytest.raises(ConfigError, match=r"no split 'test' \(data\.split\); it has train, dev"):
        opened(tmp_path / "two", split="test")
    made.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no rows"):
        opened(tmp_path / "none")
    splits["dev"].save_to_disk(tmp_path / "three")
    with pytest.raises(ConfigError, match="no split 'test'"):
        opened(tmp_path / "three", split="test")


def test_what_datasets_guessed_and_saved_is_refused(tmp_path):
    """A CSV or JSON file that went through `datasets` has lost its digits: the remedy is the file itself."""
    (tmp_path / "q.jsonl").write_text(as_json(tmp_path / "q.jsonl", ["3", "2.5"]))
    (tmp_path / "q.csv").write_text("question,answer\na,007\nb,NA\n")
    for kind, message in (("json", "stores 3.0"), ("csv", "was read from CSV")):
        name = "q.jsonl" if kind == "json" else "q.csv"
        guessed = datasets.load_dataset(kind, data_files=str(tmp_path / name), split="train")
        guessed.save_to_disk(tmp_path / kind)
        with pytest.raises(ConfigError, match=f"column 'answer' {message}"):
            opened(tmp_path / kind)
        assert len(opened(tmp_path / name)) == 2


@pytest.mark.parametrize("end", ["jsonl", "json", "csv"])
def test_folders_as_on_the_hub_are_read_as_written(tmp_path, end):
    """Text files in a folder keep their words too, split by split, and pictures are found from the folder."""
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    (tmp_path / "data").mkdir()
    for split, given in (("train", ["3", "2.5"]), ("test", ["007"])):
        lines = [f"q,{each},a.png" for each in given]
        if end == "csv":
            text = "\n".join(["question,answer,image", *lines])
        else:
            rows = [f'{{"question": "q", "answer": "{x}", "image": "a.png"}}' for x in given]
            text = f"[{', '.join(rows)}]" if end == "json" else "\n".join(rows)
        (tmp_path / "data" / f"{split}.{end}").write_text(text)
    data = opened(tmp_path, image="image")
    assert answers(data) == ["3", "2.5"] and data[0].images[0].size == (7, 5)
    assert data.files() == [tmp_path / "data" / f"train.{end}", tmp_path / "a.png"]
    assert answers(opened(tmp_path, split="test+train[1:]")) == ["007", "2.5"]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        opened(tmp_path, split="dev")
    (tmp_path / "data" / f"train.{end}").write_text("[5" if end == "json" else "question\n5,6\n")
    with pytest.raises(ConfigError, match=rf"cannot read .*: train\.{end}: "):
        opened(tmp_path)


def test_pictures_with_a_table_beside_them(tmp_path):
    """An imagefolder's metadata are guessed by `datasets`; the remedy, that file itself, works."""
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    Image.new("RGB", (7, 5)).save(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,question,answer\na.png,q,x\nb.png,r,NA\n")
    with pytest.raises(
        ConfigError, match=r"was read from CSV .* give data\.path the CSV file itself"
    ):
        opened(tmp_path, image="image")
    data = opened(tmp_path / "metadata.csv", image="file_name")
    assert answers(data) == ["x", "NA"] and data[1].images[0].size == (7, 5)


def test_parts_of_a_folder_keep_their_own_types(tmp_path):
    """Integers in one parquet file stay integers beside another with floats; a column may be in one alone."""
    for name, table in (
        ("train-0", {"question": ["a"], "answer": [2**53 + 1]}),
        ("train-1", {"question": ["b"], "answer": [2.5], "more": ["x"]}),
    ):
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{name}.parquet")
    data = opened(tmp_path)
    assert answers(data) == [str(2**53 + 1), "2.5"]
    assert [example.fields["more"] for example in data] == [None, "x"]


def test_json_columns_of_datasets_keep_their_digits(tmp_path):
    """Values of mixed types, which `datasets` stores as JSON, are read as JSON."""
    table = {"question": ["a", "b", "c"], "answer": [3, 2.5, "x"]}
    stored = datasets.Dataset.from_dict(table, on_mixed_types="use_json")
    stored.to_parquet(tmp_path / "q.parquet")
    assert answers(opened(tmp_path / "q.parquet")) == ["3", "2.5", "x"]


# ---------------------------------------------------------------------------------------- pictures


def test_files_are_the_rows_and_the_pictures_that_they_name(tmp_path):
    """Named pictures, single, in lists, in tables, and for a teacher; stored ones and missing ones have no file."""
    for name in ("a.png", "b.png", "c.png", "unused.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [
        {"question": "q", "image": "a.png", "crop": [0, 0, 2, 2]},
        {"question": "q", "image": ["b.png", "a.png"], "crop": "c.png"},
        {"question": "q", "image": {"path": "gone.png"}, "crop": None},
        {"question": "q", "image": "x" * 5000, "crop": None},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FileData(path=str(path), image="image")
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    assert FileDataset(config, ["crop"]).files() == [path, *pictures]
    assert FileDataset(config).files() == [path, *pictures[:2]]
    assert FileDataset(FileData(path=str(path))).files() == [path]
    content = (tmp_path / "unused.png").read_bytes()
    cells = [[{"path": "b.png", "bytes": None}], [{"path": "a.png", "bytes": content}], None]
    kinds = {
        "question": datasets.Value("string"),
        "image": datasets.List(datasets.Image(decode=False)),
    }
    table = datasets.Dataset.from_dict(
        {"question": ["q"] * 3, "image": cells}, features=datasets.Features(kinds)
    )
    table.to_parquet(tmp_path / "p.parquet")
    data = FileDataset(FileData(path=str(tmp_path / "p.parquet"), image="image"))
    assert data.files() == [tmp_path / "p.parquet", tmp_path / "b.png"]
    assert len(data[1].images) == 1
    table.remove_columns("image").save_to_disk(tmp_path / "disk")
    found = {each.name for each in opened(tmp_path / "disk", answer=None).files()}
    assert found == {"data-00000-of-00001.arrow", "state.json", "dataset_info.json"}


# ------------------------------------------------------------------------------------ chat format


def turn(role, content):
    return {"role": role, "content": content}


def said(role, value):
    return {"from": role, "value": value}


def rows_in(tmp_path, rows, kind, **columns):
    """The same rows as JSONL, JSON, parquet or a saved data set."""
    path = tmp_path / f"q.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text(f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines))
    return FileDataset(FileData(path=str(path), **columns))


def texts(example):
    """(role, text with [image] for pictures) of each turn."""
    return [
        (each["role"], "".join(part.get("text", "[image]") for part in each["content"]))
        for each in example.messages
    ]


KINDS = pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "disk"])


@KINDS
def test_verl_rows_are_read(tmp_path, kind):
    """`prompt` is a list of turns, the answer a part of `reward_model`, the id one of `extra_info`."""
    rows = [
        {
            "data_source": "math",
            "prompt": [turn("system", "Be brief."), turn("user", f"{i} + 2?")],
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": 2**53 + i, "split": "train"},
        }
        for i, answer in enumerate(["007", "2.50"])
    ]
    data = rows_in(tmp_path, rows, kind, question="prompt", answer="reward_model.ground_truth",
                   id="extra_info.index")  # fmt: skip
    assert answers(data) == ["007", "2.50"]
    assert [example.id for example in data] == [str(2**53), str(2**53 + 1)]
    assert texts(data[1]) == [("system", "Be brief."), ("user", "1 + 2?")]
    assert data[1].question == "1 + 2?"
    whole = rows_in(tmp_path, rows, kind, question="prompt", answer="reward_model")
    with pytest.raises(
        DataError, match=r"'reward_model' holds a table .* as in reward_model\.ground_truth"
    ):
        whole[0]
    with pytest.raises(ConfigError, match=r"no column 'reward_model\.truth'"):
        rows_in(tmp_path, rows, kind, question="prompt", answer="reward_model.truth")


def test_a_nested_answer_may_be_missing_but_not_misplaced(tmp_path):
    """No table, or none of that name in it, is no answer; another value in the table's place is refused."""
    given = [{"ground_truth": 2.50}, None, {"style": "rule"}, "4"]
    rows = [{"question": "q", "reward_model": each} for each in given] + [{"question": "q"}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row).replace("2.5", "2.50") for row in rows))
    data = opened(path, answer="reward_model.ground_truth")
    assert answers([data[i] for i in (0, 1, 2, 4)]) == ["2.50", None, None, None]
    with pytest.raises(DataError, match=r"row q-3: .*ground_truth' .*'reward_model' holds a str"):
        data[3]


def test_a_column_with_a_dot_in_its_name_goes_first(tmp_path):
    """`a.b` is the column of that name where there is one, in JSON and in parquet."""
    rows = [{"question": "q", "a.b": "mine", "a": {"b": "nested", "c.d": {"e": "deep"}}}]
    for kind in ("jsonl", "parquet"):
        assert rows_in(tmp_path, rows, kind, answer="a.b")[0].answer == "mine"
        assert rows_in(tmp_path, rows, kind, answer="a.c.d.e")[0].answer == "deep"


@KINDS
def test_messages_end_with_the_answer(tmp_path, kind):
    """The last assistant turn is the answer, earlier ones are part of the prompt; a named column goes before it."""
    turns = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "3 or 4?")]
    rows = [
        {"messages": [*turns, turn("assistant", "4.0")], "gold": "four"},
        {"messages": turns, "gold": "three"},
    ]
    data = rows_in(tmp_path, rows, kind, question="messages")
    assert answers(data) == ["4.0", None]
    prompt_turns = [("user", "hi"), ("assistant", "hello"), ("user", "3 or 4?")]
    assert texts(data[0]) == texts(data[1]) == prompt_turns
    named = rows_in(tmp_path, rows, kind, question="messages", answer="gold")
    assert answers(named) == ["four", "three"] and texts(named[0]) == prompt_turns


@KINDS
def test_prompt_and_completion_as_turns(tmp_path, kind):
    """TRL's `prompt` and `completion`, each a list of turns; content may be a list of parts."""
    rows = [
        {
            "prompt": [turn("user", [{"type": "text", "text": "2 + 2?"}])],
            "completion": [turn("assistant", [{"type": "text", "text": "4"}])],
        }
    ]
    data = rows_in(tmp_path, rows, kind, question="prompt", answer="completion")
    assert texts(data[0]) == [("user", "2 + 2?")] and data[0].answer == "4"


@KINDS
def test_conversations_with_marked_images(tmp_path, kind):
    """ShareGPT's and LLaVA's `conversations`, with the image where the text marks it."""
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    rows = [
        {
            "conversations": [said("human", "see <image>\nwhat?"), said("gpt", "a cat <image>"),
                              said("human", "and <image>?"), said("gpt", "007")],
            "image": ["a.png", "a.png"],
        }
    ]  # fmt: skip
    rows_of = {"question": "conversations", "image": "image"}
    data = rows_in(tmp_path, rows, kind, **rows_of, image_mark="<image>")
    # relative to the folder that is given: a saved data set's own
    if kind == "disk":
        Image.new("RGB", (7, 5)).save(tmp_path / "q.disk" / "a.png")
    assert texts(data[0]) == [
        ("user", "see [image]\nwhat?"), ("assistant", "a cat <image>"), ("user", "and [image]?"),
    ]  # fmt: skip
    assert data[0].answer == "007" and len(data[0].images) == 2
    plain = rows_in(tmp_path, rows, kind, **rows_of)
    assert texts(plain[0])[0] == ("user", "[image][image]see <image>\nwhat?")


def test_images_stand_where_parts_say(tmp_path):
    """Parts of type image are places for the row's pictures, which must be as many."""
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    text = {"type": "text", "text": "which?"}
    content = [{"type": "image"}, text, {"type": "image"}]
    rows = [{"prompt": [turn("user", content)], "images": ["a.png"] * n} for n in (2, 1)]
    data = rows_in(tmp_path, rows, "parquet", question="prompt", image="images")
    assert texts(data[0]) == [("user", "[image]which?[image]")]
    with pytest.raises(
        DataError, match="row q-1: the question has 2 image parts and the row 1 images"
    ):
        data[1]
    without = rows_in(tmp_path, rows, "parquet", question="prompt")
    with pytest.raises(DataError, match=r"2 image parts and the row 0 images; .*data\.image"):
        without[0]


def test_an_older_sequence_of_turns(tmp_path):
    """Turns that `datasets` stored as a table of lists are the same turns."""
    rows = [{"messages": {"role": ["user", "assistant"], "content": ["q?", "a"]}}]
    data = rows_in(tmp_path, rows, "parquet", question="messages")
    assert texts(data[0]) == [("user", "q?")] and data[0].answer == "a"


USER = turn("user", "q?")
BAD_TURNS = {
    "none": ([], "holds no text but a list"),
    "texts": (["q?"], r"holds no text but a list \(expected text, or a list of \{role, content\}\)"),
    "a table": ({"text": "q?"}, "holds no text but a dict"),
    "no user": ([turn("system", "s")], "has no user turn at its end"),
    "two answers": ([USER, turn("assistant", "a"), turn("assistant", "b")], "has no user turn at its end"),
    "answer alone": ([turn("assistant", "a")], "has no user turn at its end"),
    "a tool": ([USER, turn("tool", "5")], "has turn 2 of 'tool'; roles are system, user, assistant"),
    "no role": ([{"role": None, "content": "q?"}], "has turn 1 of None"),
    "no content": ([turn("user", None)], "has nothing for the content of turn 1"),
    "a number": ([turn("user", 5)], "has a int for the content of turn 1"),
    "blank": ([turn("user", "  ")], "holds no text in its last user turn"),
    "calls": ([USER, {**turn("assistant", ""), "tool_calls": [{"id": 1}]}], "has 'tool_calls' in turn 2"),
    "thoughts": ([USER, {**turn("assistant", "4"), "reasoning_content": "hm"}], "has 'reasoning_content'"),
    "picture inside": ([turn("user", [{"type": "image", "image": "a.png"}])], "has a picture inside turn 1"),
    "sound": ([turn("user", [{"type": "audio", "audio": "a.wav"}])], "has a part of turn 1 that is neither"),
    "picture said": ([USER, turn("assistant", [{"type": "image"}])], "has a picture in its last assistant"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TURNS)
def test_turns_that_are_no_prompt_are_refused(tmp_path, kind):
    """Each is one line with the row, the column and what is wrong; rows beside it load."""
    value, message = BAD_TURNS[kind]
    rows = [{"prompt": [USER]}, {"prompt": value}, {"prompt": "plain?"}]
    data = rows_in(tmp_path, rows, "jsonl", question="prompt")
    assert [data[i].question for i in (0, 2)] == ["q?", "plain?"]
    with pytest.raises(DataError, match=f"row q-1: column 'prompt' {message}") as caught:
        data[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "answer"])
@pytest.mark.parametrize("write", [json.dumps, repr, lambda turns: str(numpy.array(turns * 2))])
@pytest.mark.parametrize("end", ["jsonl", "csv", "parquet"])
def test_turns_written_into_a_text_are_refused(tmp_path, column, write, end):
    """As JSON, Python or numpy print them: asked as they stand they are another question. Other lists are texts."""
    row = {"prompt": "[1, 2] is what?", "answer": '["a"]'}
    said = [turn("assistant" if column == "answer" else "user", "q?")]
    rows = [row, {**row, column: write(said)}]
    if end == "csv":
        pandas.DataFrame(rows).to_csv(tmp_path / "q.csv", index=False)
        data = opened(tmp_path / "q.csv", question="prompt")
    else:
        data = rows_in(tmp_path, rows, end, question="prompt", answer="answer")
    assert (data[0].question, data[0].answer) == ("[1, 2] is what?", '["a"]')
    with pytest.raises(DataError, match=f"row q-1: column '{column}' .* list of turns.*as a list"):
        data[1]


def test_two_system_turns_are_refused(tmp_path):
    """data.system is put before turns that have none of their own."""
    rows = [{"prompt": [USER]}, {"prompt": [turn("system", "s"), USER]}]
    data = rows_in(tmp_path, rows, "jsonl", question="prompt", system="brief")
    assert texts(data[0]) == [("system", "brief"), ("user", "q?")]
    with pytest.raises(
        DataError, match=r"row q-1 has a system turn of its own, beside data\.system"
    ):
        data[1]


def test_chat_rows_are_learned_from(tmp_path, kind, make_pair):
    """Both models read all turns, with the picture where it is marked; the data's answer is the last turn."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    look = "<image>" if kind == "vlm" else ""
    rows = [
        {
            "messages": [turn("user", f"{look}how many red"), turn("assistant", "3"),
                         turn("user", f"how many {colour}"), turn("assistant", answer)],
            "image": "a.png",
        }
        for colour, answer in (("blue", "4"), ("green", "nothing"))
    ]  # fmt: skip
    marked = {"image": "image", "image_mark": "<image>"} if kind == "vlm" else {}
    data = list(rows_in(tmp_path, rows, "jsonl", question="messages", **marked))
    pair = make_pair(kind)
    for model in (pair.student, pair.teachers[0].loaded):
        spoken = [w for w in model.render_text(data[0]).split() if w.strip("<>") != "image"]
        wanted = "<bos> <user> how many red <assistant> 3 <eos> <user> how many blue <assistant>"
        assert " ".join(spoken).replace("<bos><", "<bos> <") == wanted
    completions = from_data(pair, data, 6)
    assert pair.student.decode(completions) == ["4", "nothing"]
    tokens = pair.divergence(ReverseKL(), data, pair.student.render(data), completions)
    assert bool(tokens.loss.isfinite().all()) and len(tokens.loss) == completions.n_tokens


def test_routed_teachers_go_by_the_words_of_the_file(tmp_path, kind, make_pair, folders):
    """A teacher's name may be nested, true or 2.50; a row without one goes to no teacher, not to "None"."""
    teachers = {name: str(folders[kind, "teacher"]) for name in ("true", "2.50", "None")}
    pair = make_pair(kind, teacher={"type": "routed", "field": "meta.by", "teachers": teachers})
    fields = ["true", "2.50", '"true"', "null", "[]"]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"question": "q", "meta": {{"by": {x}}}}}\n' for x in fields))
    data = list(FileDataset(FileData(path=str(path))))
    assert [rows for _, rows in pair.assign(data[:3])] == [[0, 2], [1]]
    with pytest.raises(
        UserError, match=r"example 'q-3': field 'meta\.by' is None, which is not among"
    ):
        pair.assign(data[3:4])
    with pytest.raises(UserError, match=r"example 'q-4': field 'meta\.by' .* holds a list"):
        pair.assign(data[4:])


# -------------------------------------------------------------------------------- everything we read


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    """U+2028, U+0085 and others that `splitlines` divides at are data in records, samples and logs."""
    rows = [{"step": k, "text": f"a{mark}b"} for k, mark in enumerate("\u2028\u2029\x85")]
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    assert read_jsonl(path) == rows
    with path.open("a") as file:
        file.write('{"step": 3, "te')  # a kill cut it short
    assert rows_before(path, 2) == rows[:2]


def test_benchmarks_answers_are_as_written(tmp_path, monkeypatch):
    """A local copy's answers keep their digits; a line of its JSON may hold U+2028; a NaN is refused."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    (tmp_path / "aime25").mkdir()
    path = tmp_path / "aime25" / "test.jsonl"
    rows = [("What\u2028is it?", x) for x in ("3", "2.5", '"007"', "9007199254740993", "3.10")]
    lines = [f'{{"problem": "{asked}", "answer": {x}}}' for asked, x in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    docs = mathematics.dataset("aime25")["test"]
    assert docs["answer"] == ["3", "2.5", "007", "9007199254740993", "3.10"]
    assert docs[0]["question"] == "What\u2028is it?"
    documents.read.cache_clear()
    path.write_text('{"problem": "q", "answer": NaN}')
    with pytest.raises(DataError, match=r"row 0 .*'answer' holds the number NaN"):
        mathematics.dataset("aime25")
    documents.read.cache_clear()
