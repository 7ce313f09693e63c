"""Schemas of the records of arms and masks, and of the rows of an arm's logs."""

from __future__ import annotations

from typing import Self

from pydantic import Field, JsonValue, model_validator

from vlopd.run.schemas.base import Count, Entry, OpenEntry, Record, Table, Value


class Moved(Entry):
    """Coordinates on or off a mask."""

    coordinates: Count
    moved: Count


class Agreement(Entry):
    """The fraction of coordinates that agree within a tolerance, with the base's beside it."""

    tolerance: float
    all: Value
    on_mask: Value
    base_all: Value
    base_on_mask: Value


class Precision(Entry):
    """Dtypes of an arm."""

    compute: str
    stored: str | None
    values: str


class Lora(Entry):
    """An adapter."""

    rank: Count
    parameters: Count
    layers: Count


class Tuned(Entry):
    """The choice of a tuned arm."""

    chosen: Table
    at_edge: tuple[str, ...]
    curve: tuple[Table, ...]


class ArmRecord(Record):
    """arms/NAME/record.json."""

    type: str
    checkpoint_digest: str
    precision: Precision | None = None
    density: Value = None
    delta_norm: Value = None
    mask: str | None = None
    seed: int | None = None
    discovery_seeds: dict[str, int | None] | None = None
    steps: Count | None = None
    seconds: Value = None
    device: str | None = None
    processes: Count | None = None
    notes: tuple[str, ...] = ()
    execution: Table = Field(default_factory=dict)
    trained_parameters: Count | None = None
    total_parameters: Count | None = None
    on_mask: Moved | None = None
    off_mask: Moved | None = None
    off_mask_unmoved: bool | None = None
    identity: dict[str, tuple[Agreement, ...]] | None = None
    lora: Lora | None = None
    sweep: Tuned | None = None
    other_base: Table | None = None


class MemoryRecord(Entry):
    """arms/NAME/memory.json."""

    device: str
    peak_bytes: dict[str, Count] | None = None
    peak_of: str


class MaskRecord(Record):
    """masks/NAME.json."""

    inputs: Table = Field(default_factory=dict)
    digest: str | None = None
    counts: dict[str, Count] = Field(default_factory=dict)
    density: float
    density_by_component: dict[str, Value] = Field(default_factory=dict)


class Point(Entry):
    """A point of the curve of a sweep."""

    settings: Table
    score: Value
    standard_error: Value = None
    n: Count | None = None


class SweepRecord(Record):
    """sweeps/GROUP.json."""

    chosen: Table
    grid: Table
    at_edge: tuple[str, ...]
    curve: tuple[Point, ...]
    candidates: dict[str, JsonValue]


class LogRow(OpenEntry):
    """A row of metrics.jsonl: numbers, or null."""

    __pydantic_extra__: dict[str, Value]

    step: Count


class HeldOutRow(LogRow):
    """Of heldout.jsonl."""

    task: str


class EvidenceRow(Entry):
    """Of optimizer.jsonl."""

    step: Count
    module: str
    momentum_alignment: Value = None
    sqrt_v_variation: Value = None
    unmoved_bf16_fraction: Value = None


class CompletionRow(Entry):
    """Of samples.jsonl."""

    step: Count
    question: str
    reference: JsonValue = None
    image: str | None
    completion: str
    tokens: list[str]
    student_logprobs: list[Value]
    teacher_logprobs: list[Value] | None = None

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        """A log-prob for each token."""
        for logprobs in (self.student_logprobs, self.teacher_logprobs):
            if logprobs is not None and len(logprobs) != len(self.tokens):
                raise ValueError(f"{len(self.tokens)} tokens have {len(logprobs)} log-probs")
        return self
