"""Properties that hold for any input: round trips, set algebra, and parsers that refuse in their own way only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from vlopd.bits import pack, unpack
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import load_config, parse_override
from vlopd.data.raw_values import cell_text, read_json
from vlopd.data.text_files import open_csv, open_json, open_lines
from vlopd.errors import DataError, UserError, one_line
from vlopd.files import depth, parse_json
from vlopd.grading.extraction import math_answer, number_answer, short_answer, yes_or_no
from vlopd.masks.files import load_mask, save_mask
from vlopd.models.parameter_names import classify
from vlopd.models.sizes import find_bad_number

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(max_size=40)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
MASKS = st.dictionaries(
    st.text("abcdefgh.", min_size=1, max_size=8),
    st.lists(st.integers(0, 4), min_size=0, max_size=3).flatmap(
        lambda shape: st.integers(0, 2**32 - 1).map(lambda seed: _drawn(shape, seed))
    ),
    min_size=1,
    max_size=3,
)
CONFIG: dict[str, Any] = {
    "name": "any",
    "student": "builtin:shapes-text-student",
    "teacher": "builtin:shapes-text-teacher",
    "data": {"type": "shapes", "modality": "text"},
    "train": {"steps": 1, "prompts_per_step": 2},
    "arms": {"full": {"type": "distill"}},
}


def _drawn(shape: list[int], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@FEW
@given(
    steps=st.integers(1, 1000),
    rate=st.floats(1e-30, 1e30),
    ratios=st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=7, unique=True),
    stops=st.lists(st.text(min_size=1, max_size=9), max_size=3),
)
def test_a_config_survives_json(
    steps: int, rate: float, ratios: list[float], stops: list[str]
) -> None:
    """A config written to run.json and read again is the same, whatever its numbers and texts."""
    tree = {
        **CONFIG,
        "train": {"steps": steps, "prompts_per_step": 2},
        "optim": {"learning_rate": rate},
        "geometry": {"ratios": ratios},
        "eval": {"generation": {"*": {"stops": stops}}},
    }
    config = load_config(tree)
    assert ExperimentConfig.model_validate(json.loads(config.model_dump_json())) == config


@FEW
@given(
    key=st.sampled_from(["train.steps", "optim.learning_rate", "masks", "arms", "eval.tasks", "x"]),
    value=JSON,
)
def test_a_config_is_read_or_refused_in_a_line(key: str, value: Any) -> None:
    """Any value in a config's place is accepted, or refused with one printable line."""
    outer, _, inner = key.partition(".")
    tree = {**CONFIG, outer: {**CONFIG.get(outer, {}), inner: value} if inner else value}
    try:
        load_config(tree)
    except UserError as error:
        assert "\n" not in one_line(error) and one_line(error).isprintable()


@FEW
@given(line=st.text(max_size=60))
def test_an_override_is_read_or_refused_in_a_line(line: str) -> None:
    """Any override is a TOML line, or refused with one printable line."""
    try:
        assert isinstance(parse_override(line), dict)
    except UserError as error:
        assert one_line(error).isprintable()


@FEW
@given(MASKS)
def test_a_mask_file_holds_its_mask(tmp_path: Path, mask: dict[str, torch.Tensor]) -> None:
    """A mask is read as it was written, whatever its names and shapes, also of no coordinate."""
    path = tmp_path / "m.safetensors"
    save_mask(path, mask, {"rule": {"type": "any"}, "base": "b"}, classify)
    found, about = load_mask(path)
    assert found.keys() == mask.keys() and about["counts"] == {
        n: int(m.sum()) for n, m in mask.items()
    }
    assert all(torch.equal(found[name], mask[name]) for name in mask)


@FEW
@given(MASKS, st.data())
def test_a_damaged_mask_file_is_refused(
    tmp_path: Path, mask: dict[str, torch.Tensor], data: Any
) -> None:
    """A mask file with any one byte changed, or cut anywhere, is refused as such."""
    path = tmp_path / "m.safetensors"
    save_mask(path, mask, {"rule": {"type": "any"}, "base": "b"}, classify)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        found, _ = load_mask(path)
    except UserError:
        return
    assert all(torch.equal(found[name], mask[name]) for name in mask)  # of padding, say


@FEW
@given(st.integers(0, 70), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_packed_masks_have_the_algebra_of_sets(n: int, a: int, b: int) -> None:
    """Union, intersection and complement of packed bits are those of the coordinates."""
    x, y = _drawn([n], a), _drawn([n], b)
    assert torch.equal(unpack(pack(x) | pack(y), n), x | y)
    assert torch.equal(unpack(pack(x) & pack(y), n), x & y)
    assert torch.equal(unpack(~pack(x), n), ~x)
    assert torch.equal(unpack(pack(x) & ~pack(y), n), x & ~y)


@FEW
@given(st.binary(max_size=200), st.sampled_from([open_lines, open_json, open_csv]))
def test_any_bytes_are_rows_or_refused(tmp_path: Path, content: bytes, opener: Any) -> None:
    """A data file of any bytes is a table whose rows can be read, or raises ValueError."""
    path = tmp_path / "rows"
    path.write_bytes(content)
    try:
        assert len(list(opener(path).rows())) == len(opener(path))
    except ValueError as error:  # a DataError is one
        assert str(error)


@FEW
@given(
    st.lists(
        st.dictionaries(st.text(min_size=1, max_size=8), PLAIN, min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_json_lines_are_read_verbatim(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows of a JSON-lines file are those that were written; numbers keep their digits."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for found, row in zip(open_lines(path).rows(), rows, strict=True):
        for key, value in row.items():
            assert found[key] == value
            if isinstance(value, float):
                assert cell_text(found[key]) == json.dumps(value)


@FEW
@given(JSON)
def test_json_within_bounds_is_read_as_it_is(value: Any) -> None:
    """`parse_json` is Python's, but for what is nested too deeply."""
    assert depth(value) <= 64 and parse_json(json.dumps(value)) == value
    assert find_bad_number(value) is None or isinstance(value, dict)


@FEW
@given(st.text(max_size=300))
def test_answers_are_taken_from_any_text(text: str) -> None:
    """Extraction of an answer returns a text or nothing, whatever a model has written."""
    for read in (math_answer, number_answer, short_answer, yes_or_no):
        found = read(text)
        assert found is None or isinstance(found, str)


@FEW
@given(st.text(max_size=80))
def test_cells_are_texts_or_refused(text: str) -> None:
    """Any JSON value is a cell's text, or refused with a DataError."""
    try:
        value = read_json(text)
    except ValueError:
        return
    try:
        assert value is None or isinstance(cell_text(value), str)
    except DataError as error:
        assert str(error)


def test_foreign_files_are_no_masks(tmp_path: Path) -> None:
    """A safetensors file without the metadata of a mask is refused with the way to import it."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(save({"a": torch.ones(2)}))
    try:
        load_mask(path)
    except UserError as error:
        assert "mask import" in str(error)
    else:
        raise AssertionError("accepted")
