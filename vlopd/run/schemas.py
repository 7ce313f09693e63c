"""Schemas of the JSON records of a run, and their reading: a file that is no such record is refused in one line.

A schema has what is read of a record; further entries are left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from vlopd.config.explain import explain_errors
from vlopd.errors import RunError
from vlopd.files import read_json, read_jsonl

Count = Annotated[int, Field(ge=0)]
Table = dict[str, JsonValue]
Bounds = tuple[float | None, ...] | None


class Record(BaseModel):
    """The record of any stage."""

    inputs: Table


class Moved(BaseModel):
    """Coordinates on or off a mask."""

    coordinates: Count
    moved: Count


class ArmRecord(Record):
    """arms/NAME/record.json."""

    type: str
    checkpoint_digest: str
    density: float | None = None
    mask: str | None = None
    seed: int | None = None
    steps: Count | None = None
    seconds: float | None = None
    trained_parameters: Count | None = None
    total_parameters: Count | None = None
    on_mask: Moved | None = None
    off_mask: Moved | None = None
    other_base: JsonValue = None


class MaskRecord(Record):
    """masks/NAME.json."""

    inputs: Table = Field(default_factory=dict)
    counts: dict[str, Count] = Field(default_factory=dict)
    density: float
    density_by_component: dict[str, float | None] = Field(default_factory=dict)


class EvalRecord(Record):
    """evals/NAME/results.json."""

    checkpoint_digest: str
    data_digest: dict[str, str]
    primary_metric: dict[str, JsonValue]
    leaves: dict[str, tuple[str, ...]] | None = None
    results: dict[str, Table] | None = None
    """None of imported samples alone."""


class HeadlineRow(BaseModel):
    """A row of the headline of a measurement."""

    name: str
    metric: str
    parameter: str
    value: float | None
    null: str = ""
    null_mean: float | None = None
    null_sd: float | None = None
    p: float | None = None


class LeftOut(BaseModel):
    """What a measurement leaves out."""

    summary: str


class GeometryRecord(Record):
    """geometry/NAME/summary.json."""

    left_out: LeftOut
    headline: tuple[HeadlineRow, ...]


class Score(BaseModel):
    """An arm's score on a task."""

    role: str
    n: Count
    mean: float
    standard_error: float | None
    interval: Bounds
    difference_to_full: Table | None
    recovery: Table


class Contrast(BaseModel):
    """A difference between two arms, or an arm and several."""

    a: str | tuple[str, ...]
    b: str | tuple[str, ...]
    mean: float
    interval: Bounds
    p: float | None
    p_holm: float | None
    exploratory: bool
    direction: JsonValue


class ComparedTask(BaseModel):
    """A task of a comparison."""

    metric: str
    n: Count
    scale: str
    higher_is_better: bool
    group: str | None
    arms: Annotated[dict[str, Score], Field(min_length=1)]
    contrasts: tuple[Contrast, ...]
    controls: tuple[Table, ...]
    seeds: tuple[Table, ...]


class ComparedArm(BaseModel):
    """An arm of a comparison."""

    role: str


class Comparison(Record):
    """compare.json."""

    confidence: float
    margin: float
    arms: dict[str, ComparedArm]
    tasks: Annotated[dict[str, ComparedTask], Field(min_length=1)]


def schema_of(path: Path) -> type[Record]:
    """The schema of a record, by its place in a run folder (docs/run-folder.md)."""
    if path.parent.name == "masks":
        return MaskRecord
    if path.name == "record.json":
        return ArmRecord if path.parent.parent.name == "arms" else Record
    kinds: dict[str, type[Record]] = {
        "summary.json": GeometryRecord,
        "results.json": EvalRecord,
        "compare.json": Comparison,
    }
    return kinds.get(path.name, Record)


def _first(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first of a file's faults."""
    return explain_errors(error, schema).split("; ")[0]


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a stage. Raises RunError, with the entry, for a file that is missing or not its record."""
    value, schema = read_json(path), schema_of(path)
    try:
        schema.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise RunError(
            f"{path} is not a record of this version of vlopd: {_first(error, schema)}; restore it, or "
            "delete it and run its stage again"
        ) from None
    return value


class LogRow(BaseModel):
    """A row of metrics.jsonl: numbers, or null."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    step: Count


class HeldOutRow(LogRow):
    """Of heldout.jsonl."""

    task: str


class EvidenceRow(BaseModel):
    """Of optimizer.jsonl."""

    step: Count
    module: str
    momentum_alignment: float | None = None
    sqrt_v_variation: float | None = None
    unmoved_bf16_fraction: float | None = None


class SampleRow(BaseModel):
    """Of samples.jsonl."""

    step: Count
    question: str
    reference: JsonValue = None
    image: str | None
    completion: str
    tokens: list[str]
    student_logprobs: list[float | None]
    teacher_logprobs: list[float | None] | None = None

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        """A log-prob for each token."""
        for logprobs in (self.student_logprobs, self.teacher_logprobs):
            if logprobs is not None and len(logprobs) != len(self.tokens):
                raise ValueError(f"{len(self.tokens)} tokens have {len(logprobs)} log-probs")
        return self


LOGS: dict[str, type[BaseModel]] = {
    "metrics.jsonl": LogRow,
    "heldout.jsonl": HeldOutRow,
    "optimizer.jsonl": EvidenceRow,
    "samples.jsonl": SampleRow,
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of one of an arm's logs, none where it does not exist. Raises RunError, with the line, for others."""
    if not path.exists():
        return []
    rows, schema = read_jsonl(path, "step"), LOGS[path.name]
    for number, row in enumerate(rows, 1):
        try:
            schema.model_validate(row, strict=True)
        except ValidationError as error:
            raise RunError(
                f"{path} line {number} is not a row of this log: {_first(error, schema)}; restore it, or "
                f"delete {path.parent} and run again"
            ) from None
    return rows
