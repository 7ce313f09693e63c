"""Anybody's JSONL, parquet or pictures, and what is said when a row is broken."""

import itertools
import json
import os
import struct
import zlib
from io import BytesIO

import datasets
import numpy
import pandas
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from vlopd.config.data import FileData, MixtureData
from vlopd.data.dataset import FileDataset
from vlopd.data.images import open_picture
from vlopd.data.load import files_of, load_data, order, pick
from vlopd.errors import ConfigError, DataError

QUESTIONS = [
    {"q": "first?", "a": "one", "pic": "good.png", "key": "r1"},
    {"q": "second?", "a": "two", "pic": "other.png", "key": "r2"},
    {"q": "third?", "a": "three", "pic": "good.png", "key": "r3"},
]


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (7, 5), "red").save(tmp_path / "good.png")
    Image.new("RGB", (5, 7), "blue").save(tmp_path / "other.png")
    return [dict(row) for row in QUESTIONS]


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(path, **more):
    path = path if isinstance(path, list) else str(path)
    return FileData(**{"path": path, "question": "q", "answer": "a", "id": "key", **more})


def saved(image, kind, **more):
    stream = BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data, colour=2, interlace=0, depth=8):
    """A PNG of our own making, so that header and data can disagree."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


PHOTO = Image.fromarray(noise(64, 64))

BAD_FILES = {
    "empty": (b"", "empty file"),
    "text": (b"not a picture\n", "not an image of a supported format"),
    "page": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an image of a supported format",
    ),
    "cut jpeg": (saved(PHOTO, "JPEG")[:900], "is broken .*truncated"),
    "cut png": (saved(PHOTO, "PNG")[:900], "is broken .*truncated"),
    "cut webp": (saved(PHOTO, "WEBP")[:900], "is broken"),
    "cut gif": (saved(PHOTO, "GIF")[:2000], "is broken .*truncated"),
    "cut bmp": (saved(PHOTO, "BMP")[:900], "is broken .*truncated"),
    "cut tiff": (saved(PHOTO, "TIFF")[:-900], "is broken"),
    "cut in the header": (saved(PHOTO, "PNG")[:20], "is broken|not an image"),
    "damaged png": (saved(PHOTO, "PNG").replace(b"IDAT", b"IDAT\0", 1), "is broken"),
    "short png": (png(100, 100, (b"\0" + b"\xff" * 300) * 50), "ends early"),
    "short interlaced png": (png(4, 4, b"\0" * 18, colour=0, interlace=1), "ends early"),
    "huge header": (png(60_000, 60_000, b"\0" * 900), "; make it smaller"),
    "large header": (png(12_000, 9_000, b"\0" * 900), "12000 x 9000 pixels, more than 90000000"),
    "30000 x 30000": (saved(Image.new("1", (30_000, 30_000)), "PNG"), "make it smaller"),
    "30000 x 10": (saved(Image.new("RGB", (30_000, 10)), "PNG"), "longer than 200 : 1"),
    "animated gif": (animation("GIF"), "has 3 frames or pages; save the one"),
    "animated png": (animation("PNG"), "has 3 frames or pages"),
    "animated webp": (animation("WEBP"), "has 3 frames or pages"),
    "tiff of pages": (animation("TIFF"), "has 3 frames or pages"),
    "floats": (saved(Image.new("F", (4, 4)), "TIFF"), "unknown scale"),
}

BAD_VALUES = {
    "no file": ("nope.png", "'nope.png' does not exist in .*relative to the data file's folder"),
    "folder": (".", "is not a file"),
    "address": ("https://example.org/a.png", "is a URL; download"),
    "data address": ("data:image/png;base64,iVBORw0KGgo=", "is a URL; download"),
    "no name": ("", "is not a file"),
    "base64": ("iVBORw0KGgo" * 900, "picture 'iVBORw.*name too long"),
    "null": (None, "is empty; name a picture"),
    "number": (5, "number 5 is neither a file name nor bytes"),
    "null in a list": (["good.png", None], "picture 2 of 2 null is neither"),
    "bad in a list": (["good.png", "good.png", "nope.png"], "picture 3 of 3 'nope.png' does not"),
    "dict without": ({"bytes": None, "path": None}, 'needs "bytes" or "path"'),
    "dict of other keys": ({"url": "x.png"}, 'needs "bytes" or "path"'),
    "list in a list": ([["good.png"]], "a list is neither"),
}


def good_beside_bad(source, match):
    """Rows r1 and r3 load; r2 is refused in one short line that names it. Returns the line."""
    assert [source[i].images[0].getpixel((0, 0)) for i in (0, 2)] == [(255, 0, 0)] * 2
    with pytest.raises(DataError, match=match) as caught:
        source[1]
    message = str(caught.value)
    assert "row r2" in message and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("damage", BAD_FILES)
def test_a_broken_picture_file_names_its_row(tmp_path, rows, damage):
    """Every kind of broken file ends in one line with the row's id and the reason; rows beside it load."""
    content, match = BAD_FILES[damage]
    (tmp_path / "other.png").write_bytes(content)
    good_beside_bad(FileDataset(columns(write(tmp_path, rows), image="pic")), match)


@pytest.mark.parametrize("damage", BAD_VALUES)
def test_a_wrong_picture_value_names_its_row(tmp_path, rows, damage):
    """Every wrong value in the picture column ends in one line with the row's id; rows beside it load."""
    rows[1]["pic"], match = BAD_VALUES[damage]
    good_beside_bad(FileDataset(columns(write(tmp_path, rows), image="pic")), match)


def test_a_pipe_is_not_waited_for(tmp_path, rows):
    """A named pipe in place of a picture is refused, not read for ever."""
    (tmp_path / "other.png").unlink()
    os.mkfifo(tmp_path / "other.png")
    good_beside_bad(FileDataset(columns(write(tmp_path, rows), image="pic")), "is not a file")


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]  # fmt: skip


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("colour, bits", [(0, 1), (0, 4), (0, 16), (2, 24), (4, 16), (6, 32)])
def test_a_png_with_rows_missing_is_refused_and_a_whole_one_is_not(
    tmp_path, colour, bits, interlace
):
    """Of every small size, a white PNG without its last row or rows is refused, and only then."""
    depth = bits // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    for width, height in itertools.product((1, 2, 3, 5, 8, 9), repeat=2):
        rows = []
        for x, y, step_x, step_y in ADAM7 if interlace else [(0, 0, 1, 1)]:
            across = len(range(x, width, step_x))
            if across:
                line = b"\0" + b"\xff" * ((across * bits + 7) // 8)
                rows += [line] * len(range(y, height, step_y))
        for missing in range(len(rows)):
            data = b"".join(rows[: len(rows) - missing])
            file = png(width, height, data, colour, interlace, depth)
            if missing:
                with pytest.raises(DataError, match="ends early"):
                    open_picture(file, tmp_path)
            else:
                assert open_picture(file, tmp_path).size == (width, height)


RED = (255, 0, 0)
WHITE = (255, 255, 255)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"

MODES = {
    "cmyk": (saved(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF"), RED),
    "grey": (saved(Image.new("L", (6, 4), 77), "PNG"), (77, 77, 77)),
    "one bit": (saved(Image.new("1", (6, 4), 1), "PNG"), WHITE),
    "palette": (saved(Image.new("RGB", (6, 4), RED).quantize(4), "GIF"), RED),
    "opaque": (saved(Image.new("RGBA", (6, 4), (*RED, 255)), "PNG"), RED),
    "clear black": (saved(Image.new("RGBA", (6, 4), (0, 0, 0, 0)), "PNG"), WHITE),
    "half clear": (saved(Image.new("RGBA", (6, 4), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
    "grey and clear": (saved(Image.new("LA", (6, 4), (9, 0)), "PNG"), WHITE),
    "clear palette": (saved(Image.new("P", (6, 4), 0), "PNG", transparency=0), WHITE),
    "clear colour": (saved(Image.new("RGB", (6, 4), RED), "PNG", transparency=RED), WHITE),
    "16 bit": (
        saved(Image.fromarray(numpy.full((4, 6), 100 * 257, numpy.uint16)), "PNG"),
        (100,) * 3,
    ),
    "webp": (saved(Image.new("RGBA", (6, 4), (0, 0, 0, 0)), "WEBP", lossless=True), WHITE),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_with_the_colours_it_shows(tmp_path, mode):
    """Colours survive the way to RGB: 16 bits are scaled, and what is transparent shows white paper."""
    content, colour = MODES[mode]
    image = open_picture(content, tmp_path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert set(image.get_flattened_data()) == {colour}


def test_a_photo_is_turned_upright(tmp_path):
    """The rotation that a camera notes in EXIF is applied, once."""
    pixels = Image.fromarray(noise(6, 4))
    image = open_picture(saved(pixels, "PNG", exif=TURNED), tmp_path)
    assert image.size == (4, 6)
    assert image.tobytes() == pixels.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert ImageOps.exif_transpose(image).size == (4, 6)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_pixels_come_through_unchanged(tmp_path, kind):
    """What looks for more frames and for missing data leaves the pixels of lossless kinds alone."""
    image = Image.fromarray(noise(33, 21, 1))
    again = open_picture(saved(image, kind), tmp_path)
    assert again.tobytes() == image.convert("RGB").tobytes()


def test_a_camera_picture_with_a_second_one_inside_is_its_first(tmp_path):
    """An MPO (a phone's JPEG with a gain map or a second view) is no animation."""
    data = saved(PHOTO, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert open_picture(data, tmp_path).size == (64, 64)


def test_pictures_are_found_wherever_a_path_leads(tmp_path, rows):
    """Absolute paths and paths out of the data's folder, into one that is named, lists, one pixel, dicts, and no
    picture at all load."""
    inner = tmp_path / "inner"
    inner.mkdir()
    Image.new("RGB", (1, 1)).save(inner / "dot.png")
    rows[0]["pic"] = ["../good.png", str(tmp_path / "other.png"), "dot.png"]
    rows[1]["pic"] = []
    rows[2]["pic"] = {"path": "dot.png", "bytes": None}
    named = {"image": "pic", "image_folders": [str(tmp_path)]}
    source = FileDataset(columns(write(inner, rows), **named))
    assert [[i.size for i in e.images] for e in source] == [[(7, 5), (5, 7), (1, 1)], [], [(1, 1)]]
    assert [part["type"] for part in source[0].messages[0]["content"]] == ["image"] * 3 + ["text"]


def test_parquet_pictures_are_decoded_by_us(tmp_path):
    """Pictures stored as `datasets` stores them (one, and lists) load; a broken one among them names its row."""
    good = saved(Image.new("RGB", (7, 5), "red"), "PNG")
    kinds = datasets.Features(
        {
            "key": datasets.Value("string"),
            "q": datasets.Value("string"),
            "a": datasets.Value("string"),
            "pic": datasets.Image(),
            "pics": datasets.List(datasets.Image()),
        }
    )
    made = [
        {"key": f"r{i}", "q": "what?", "a": "x", "pic": {"bytes": b}, "pics": [{"bytes": b}] * 2}
        for i, b in ((1, good), (2, b"junk"), (3, good))
    ]
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(made, kinds).to_parquet(path)
    good_beside_bad(FileDataset(columns(path, image="pic")), "of 4 bytes is not an image")
    lists = FileDataset(columns(path, image="pics"))
    good_beside_bad(lists, "picture 1 of 2 of 4 bytes is not an image")
    assert [image.size for image in lists[0].images] == [(7, 5), (7, 5)]
    # a column that nobody asked for may hold what it likes
    assert [e.images for e in FileDataset(columns(path))] == [(), (), ()]


def test_a_teachers_pictures_are_opened_into_the_fields(tmp_path, rows):
    """Columns in `pictures` hold opened pictures; boxes and nulls are left for the context to judge."""
    for row, value in zip(rows, (["other.png"], [0, 0, 3, 4.5], None), strict=True):
        row["crop"] = value
    path = write(tmp_path, rows)
    source = FileDataset(columns(path, image="pic"), pictures=("crop", "crop"))
    assert source[0].fields["crop"][0].size == (5, 7)
    assert [source[i].fields["crop"] for i in (1, 2)] == [[0, 0, 3, 4.5], None]
    (tmp_path / "other.png").unlink()
    with pytest.raises(DataError, match=r"row r1: column 'crop', picture 'other\.png' does not"):
        source[0]
    with pytest.raises(ConfigError, match=r"no column 'zoom'; .*teacher\.context\.column"):
        FileDataset(columns(path), pictures=("zoom",))


# --------------------------------------------------------------------------------------------- rows


def test_jsonl_with_images_through_a_column_map(tmp_path, rows):
    """Columns by name become one Example a row, with the system prompt before its question."""
    data = FileDataset(columns(write(tmp_path, rows), image="pic", system="be brief"))
    example = data[1]
    assert (len(data), example.id, example.question) == (3, "r2", "second?")
    assert (example.answer, example.fields["key"]) == ("two", "r2")
    assert [image.mode for image in example.images] == ["RGB"]
    assert [m["role"] for m in example.messages] == ["system", "user"]


def test_parquet_reads_the_same(tmp_path, rows):
    """The same rows from parquet give the same questions."""
    path = tmp_path / "data.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    assert [e.question for e in FileDataset(columns(path))] == ["first?", "second?", "third?"]


def test_rows_without_ids_are_numbered(tmp_path, rows):
    """Without an id column a row's id is the file's name and its number, also counted from the end."""
    data = FileDataset(columns(write(tmp_path, rows), id=None))
    assert [data[i].id for i in (0, 2, -1)] == ["data-0", "data-2", "data-2"]
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("value", [None, "", "  ", 5, ["x"], {"text": "x"}])
def test_a_question_that_is_no_text_is_refused_when_read(tmp_path, value):
    """Deep in a large file, a row without a text for a question fails alone, when it is its turn."""
    rows = [{"q": f"{i}?", "key": f"r{i}", "a": "x"} for i in range(3000)]
    rows[1500]["q"] = value
    data = FileDataset(columns(write(tmp_path, rows)))
    assert [data[i].question for i in (1499, 1501, 2999)] == ["1499?", "1501?", "2999?"]
    with pytest.raises(DataError, match="row r1500: column 'q' holds no text but"):
        data[1500]


def test_answers_may_be_missing_or_numbers_but_not_lists(tmp_path, rows):
    """A null or absent answer is None, a number its digits; a list is refused with the row's id."""
    del rows[0]["a"]
    rows[1]["a"], rows[2]["a"] = 7, ["x", "y"]
    data = FileDataset(columns(write(tmp_path, rows)))
    assert [data[i].answer for i in (0, 1)] == [None, "7"]
    with pytest.raises(DataError, match="row r3: column 'a' holds a list"):
        data[2]


def test_images_go_where_the_question_marks_them(tmp_path):
    """With `image_mark`, pictures stand where the text has it, and counts must agree; without, text is text."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"q": "see <image> and <image>: which?", "key": "r1", "a": "x", "i": ["a.png", "a.png"]},
        {"q": "<image>one", "key": "r2", "a": "x", "i": ["a.png", "a.png"]},
    ]
    path = write(tmp_path, rows)
    data = FileDataset(columns(path, image="i", image_mark="<image>"))
    content = data[0].messages[-1]["content"]
    assert [part.get("text", "[image]") for part in content] == [
        "see ", "[image]", " and ", "[image]", ": which?",
    ]  # fmt: skip
    with pytest.raises(
        DataError, match=r"row r2: the question has 1 '<image>' and the row 2 images"
    ):
        data[1]
    plain = FileDataset(columns(path, image="i"))[1]
    assert plain.question == "<image>one" and len(plain.images) == 2


def test_ids_must_be_there_and_differ(tmp_path, rows):
    """Two rows of one id, or a row without, are refused at once, with both numbers and the remedy."""
    rows[2]["key"] = "r1"
    with pytest.raises(ConfigError, match=r"id 'r1' is of row 0 and of row 2 .*leave data\.id out"):
        FileDataset(columns(write(tmp_path, rows)))
    rows[2]["key"] = None
    with pytest.raises(ConfigError, match=r"row 2 .* has null for an id"):
        FileDataset(columns(write(tmp_path, rows, "other.jsonl")))


GOOD_LINE = b'{"q": "x", "a": "y", "key": "r%d"}\n'
BAD_LINES = {
    "cut short at the end": (b'{"q": "x", "a', "line 3 is not JSON"),
    "utf-16": ('{"q": "x"}\n'.encode("utf-16"), "line 3 is not UTF-8; save"),
    "zeros": (b"\0\0\0\n", "line 3 is not JSON"),
    "a number": (b"5\n", "line 3 is not an object"),
}


@pytest.mark.parametrize("damage", BAD_LINES)
def test_a_broken_line_is_named(tmp_path, damage, capfd):
    """A line of JSONL that cannot be read is named by its number, and nothing else is printed."""
    line, match = BAD_LINES[damage]
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD_LINE % 1 + GOOD_LINE % 2 + line)
    with pytest.raises(ConfigError, match=match) as caught:
        FileDataset(columns(path))
    assert "\n" not in str(caught.value) and "Failed" not in capfd.readouterr().err


def test_a_row_in_another_encoding_names_itself(tmp_path):
    """A row with a letter in Latin-1 fails when it is read, with its id; rows beside it load."""
    path = tmp_path / "data.jsonl"
    odd = '{"q": "caf\xe9", "a": "y", "key": "r2"}\n'.encode("latin-1")
    path.write_bytes(GOOD_LINE % 1 + odd + GOOD_LINE % 3)
    data = FileDataset(columns(path))
    assert [data[i].question for i in (0, 2)] == ["x", "x"]
    with pytest.raises(DataError, match=r"row r2 is not UTF-8 .*; save the file as UTF-8"):
        data[1]
    path.write_bytes(GOOD_LINE % 1 + odd.replace(b"r2", b"r\xe9"))
    with pytest.raises(ConfigError, match="an id is not UTF-8"):
        FileDataset(columns(path))


def test_broken_files_and_columns_are_one_clear_line(tmp_path, rows):
    """No file, another kind of file, no column, no rows, not parquet: each says what and where."""
    with pytest.raises(ConfigError, match=r"no data file .*nope\.jsonl"):
        FileDataset(columns(tmp_path / "nope.jsonl"))
    with pytest.raises(ConfigError, match=r"ends in '\.txt'; supported are \.jsonl, "):
        FileDataset(columns(write(tmp_path, rows, "data.txt")))
    with pytest.raises(ConfigError, match="no column 'question'; it has"):
        FileDataset(FileData(path=str(write(tmp_path, rows))))
    (tmp_path / "none.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="has no rows"):
        FileDataset(columns(tmp_path / "none.jsonl"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(ConfigError, match=r"cannot read data\.path"):
        FileDataset(columns(tmp_path / "cut.parquet"))


# ------------------------------------------------------------------------- chats, several files, mixtures


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_a_chat_needs_its_path_alone(tmp_path, column, capsys):
    """Without a column `question` the chat's is read, which is printed once; an explicit column is never replaced."""
    path = write(tmp_path, [{column: [turn("user", "q?"), turn("assistant", "a")]}], "chat.jsonl")
    for _ in range(2):
        data = load_data(FileData(path=str(path)), 1)
        assert (data[0].question, data[0].answer) == ("q?", "a")
    printed = capsys.readouterr().err
    assert printed.count("has no column 'question'") == 1 and f"read from {column!r}" in printed
    with pytest.raises(ConfigError, match="no column 'text'"):
        load_data(FileData(path=str(path), question="text"), 1)
    both = write(tmp_path, [{"question": "mine?", "messages": [turn("user", "q?")]}], "both.jsonl")
    assert load_data(FileData(path=str(both)), 1)[0].question == "mine?"


PARTS = {
    "name": lambda name, _: {"type": "image", "image": name},
    "table": lambda name, _: {"type": "image", "image": {"path": name, "bytes": None}},
    "url": lambda name, _: {"type": "image_url", "image_url": {"url": name}},
    "path": lambda name, _: {"type": "image", "path": name},
    "bytes": lambda _, content: {"type": "image", "image": {"path": None, "bytes": content}},
}


@pytest.mark.parametrize("kind", PARTS)
def test_pictures_inside_turns_are_read(tmp_path, rows, kind):
    """`image` names the column of the turns; the pictures stand where their parts do, and their files are known."""
    names = ["good.png", "other.png"]
    parts = [PARTS[kind](name, (tmp_path / name).read_bytes()) for name in names]
    content = [parts[0], {"type": "text", "text": "which?"}, parts[1]]
    made = [
        {"messages": [turn("user", content), turn("assistant", [{"type": "text", "text": "a"}])]}
    ]
    path = tmp_path / ("data.parquet" if kind == "bytes" else "data.jsonl")
    if kind == "bytes":
        datasets.Dataset.from_list(made).to_parquet(path)
    else:
        write(tmp_path, made)
    config = FileData(path=str(path), image="messages")
    data = FileDataset(config)
    assert [image.size for image in data[0].images] == [(7, 5), (5, 7)] and data[0].answer == "a"
    assert [part["type"] for part in data[0].messages[0]["content"]] == ["image", "text", "image"]
    assert config.has_images and all(len(part) <= 2 for part in data[0].messages[0]["content"])
    pictures = [] if kind == "bytes" else [tmp_path / name for name in names]
    assert files_of(config) == [path, *pictures]
    with pytest.raises(DataError, match=r'picture inside turn 1; set data\.image = "messages"'):
        FileDataset(FileData(path=str(path)))[0]


def test_a_turn_without_its_picture_names_its_row(tmp_path, rows):
    """Where pictures are inside the turns, a bare image part, a missing file and odd keys are refused by row."""
    bad = [
        ({"type": "image"}, "has an image part of turn 1 without a picture"),
        ({"type": "image", "image": "gone.png"}, "picture 'gone.png' does not exist"),
        ({"type": "image", "image": "https://x.org/a.png"}, "is a URL; download"),
        ({"type": "image", "image": "good.png", "detail": "low"}, "image part of turn 1 with detail, image"),
    ]  # fmt: skip
    text = {"type": "text", "text": "q?"}
    path = write(tmp_path, [{"messages": [turn("user", [part, text])]} for part, _ in bad])
    data = FileDataset(FileData(path=str(path), image="messages"))
    for index, (_, message) in enumerate(bad):
        with pytest.raises(DataError, match=f"row data-{index}.*{message}"):
            data[index]


def test_several_files_are_read_one_after_the_other(tmp_path, rows):
    """By list or pattern, of any formats, each with its own folder of pictures; the file's name is put before ids."""
    inner = tmp_path / "inner"
    inner.mkdir()
    Image.new("RGB", (1, 1)).save(inner / "good.png")
    a, b = write(tmp_path, rows, "a.jsonl"), inner / "b.parquet"
    pandas.DataFrame(rows[:1]).to_parquet(b)
    data = load_data(columns([str(a), str(b)], image="pic"), 0)
    assert [e.id for e in data] == ["a/r1", "a/r2", "a/r3", "b/r1"]
    assert [e.images[0].size for e in data] == [(7, 5), (5, 7), (7, 5), (1, 1)]
    assert data[-1].id == "b/r1" and len(data) == 4
    config = columns([str(b), str(tmp_path / "*.jsonl")], id=None)
    assert [e.id for e in load_data(config, 0)] == ["b-0", "a-0", "a-1", "a-2"]
    assert files_of(config) == [b, a]
    same = write(inner, rows, "a.jsonl")
    ids = [e.id for e in load_data(columns([str(a), str(same)], id=None), 0)]
    assert len(set(ids)) == 6 and ids[3] == "inner-a-0"
    write(tmp_path, [{"x": 1}], "odd.jsonl")
    with pytest.raises(ConfigError, match=r"odd\.jsonl has no column 'q'"):
        load_data(columns(str(tmp_path / "*.jsonl")), 0)
    with pytest.raises(ConfigError, match=r"no file matches .*\.csv' \(data\.path\)"):
        load_data(columns(str(tmp_path / "*.csv")), 0)


@pytest.mark.parametrize("several", [False, True])
def test_skip_and_limit_keep_the_rows_names(tmp_path, rows, several):
    """The first rows after those skipped, of all files together, under the ids that they have without."""
    a, b = write(tmp_path, rows, "a.jsonl"), write(tmp_path, rows, "b.jsonl")
    path = [str(a), str(b)] if several else str(a)
    whole = [e.id for e in load_data(columns(path, id=None), 0)]
    for skip, limit in ((None, 2), (2, None), (2, 2), (1, 9), (None, 1)):
        data = load_data(columns(path, id=None, skip=skip, limit=limit), 0)
        expected = whole[skip or 0 :][:limit]
        assert [e.id for e in data] == expected and len(data) == len(expected)
        assert data[-1].id == expected[-1]
    with pytest.raises(ConfigError, match=r"data\.skip = 6 leaves nothing of the \d rows"):
        load_data(columns(path, skip=6), 0)


def mixture(tmp_path, rows, **weights):
    path = write(tmp_path, rows, "a.jsonl")
    sources = {"file": columns(path).model_dump(), "world": {"type": "shapes", "modality": "text"}}
    return MixtureData.model_validate({"type": "mixture", "sources": sources, "weights": weights})


def test_a_mixture_draws_by_weight_as_a_function_of_position(tmp_path, rows):
    """Any cut of the stream is the same stream, in any process; shares are the weights', epochs each source's."""
    config = mixture(tmp_path, rows, file=3.0, world=1.0)
    data = load_data(config, 5000, 1)
    stream = order(data, 0, 9000, 7)
    again = load_data(config, 5000, 1)
    assert order(again, 8000, 1000, 7) == stream[8000:]
    cuts = [0, 1, 4095, 4096, 4097, 9000]
    pieces = [order(again, a, b - a, 7) for a, b in itertools.pairwise(cuts)]
    assert [index for piece in pieces for index in piece] == stream
    assert order(data, 0, 100, 8) != stream[:100]
    file, world = ([i for i in stream if (i < 3) == own] for own in (True, False))
    assert abs(len(file) / 9000 - 0.75) < 5 * (0.75 * 0.25 / 9000) ** 0.5
    assert all(sorted(file[k : k + 3]) == [0, 1, 2] for k in range(0, len(file) - 2, 3))
    assert len(set(world)) == len(world)
    assert {e.id.split("/")[0] for e in pick(data, 0, 20, 7)} == {"file", "world"}
    assert data.first(4) == [0, 3, 1, 4] and not config.has_images
    assert files_of(config) == [tmp_path / "a.jsonl"]
    assert list(data.counts().values()) == [f"{tmp_path / 'a.jsonl'}: 3 rows", "generated"]


def test_a_mixture_names_the_source_of_an_error(tmp_path, rows):
    """A source that cannot be read, weights of other names, and a row that cannot be used name the source."""
    with pytest.raises(ValidationError, match=r"weights are for \['file'\], sources are"):
        mixture(tmp_path, rows, file=1.0)
    rows[1]["q"] = None
    data = load_data(mixture(tmp_path, rows), 10, 1)
    with pytest.raises(DataError, match=r"a\.jsonl, row r2: column 'q' holds no text"):
        pick(data, 0, 20, 1)
    (tmp_path / "a.jsonl").write_text("{}\n")
    config = MixtureData(sources={"file": columns(tmp_path / "a.jsonl")})
    with pytest.raises(ConfigError, match=r"data\.sources\.file: .*has no column 'q'"):
        load_data(config, 10, 1)
