"""Schemas of finished evaluations: results.json and the rows of samples, a run's and lm-eval's."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from vlopd.run.schemas.base import Count, Entry, OpenEntry, Record, Table, Value
from vlopd.run.schemas.comparison import Estimate


class Metric(Entry):
    """How a metric is aggregated over questions."""

    aggregation: str | None = None
    higher_is_better: bool | None = None
    filter: str | None = None


class MetricOfList(OpenEntry):
    """An entry of a task's metric_list."""

    __pydantic_extra__: dict[str, Any]

    metric: str
    higher_is_better: bool | None = None


class TaskConfig(OpenEntry):
    """A task's settings as lm-eval records them."""

    __pydantic_extra__: dict[str, Any]

    metric_list: tuple[MetricOfList, ...] | None = None


class Total(Entry):
    """How a group's total is made of its members."""

    members: Annotated[tuple[str, ...], Field(min_length=1)]
    metric: str
    filter: str | None
    weight_by_size: bool


class Samples(OpenEntry):
    """The numbers of questions of a task."""

    __pydantic_extra__: dict[str, Any]

    effective: Count | None = None


Scores = dict[str, JsonValue]
"""lm-eval's entry of a task: numbers by `metric,filter`, texts such as its alias and "N/A"."""


class Results(OpenEntry):
    """What is read of any results file of lm-eval."""

    __pydantic_extra__: dict[str, Any]

    results: dict[str, Scores]
    groups: dict[str, Scores] | None = None
    group_subtasks: dict[str, tuple[str, ...]] | None = None
    configs: dict[str, TaskConfig] | None = None
    higher_is_better: dict[str, dict[str, bool | None] | None] | None = None
    metrics: dict[str, dict[str, Metric]] | None = None
    totals: dict[str, Total] | None = None
    chance: dict[str, dict[str, Value]] | None = None
    picture_size: dict[str, Table] | None = None
    samples: dict[str, Samples] | None = Field(None, alias="n-samples")


class Thinking(Entry):
    """Of a model that thinks: fractions of its answers."""

    answered_fraction: float
    correct_fraction: Value
    stopped_fraction: float


class EvalInputs(OpenEntry):
    """What an evaluation was made from."""

    __pydantic_extra__: dict[str, JsonValue]

    checkpoint: dict[str, str] = Field(default_factory=dict)
    """{file: sha256}."""


class EvalRecord(Results):
    """evals/NAME/results.json, and validation/NAME/results.json."""

    inputs: EvalInputs
    arm: str
    checkpoint_digest: str
    data_digest: Annotated[dict[str, str], Field(min_length=1)]
    primary_metric: dict[str, str]
    leaves: dict[str, tuple[str, ...]] | None = None
    results: dict[str, Scores] | None = None  # type: ignore[assignment]
    """None of imported samples alone."""
    pictures: tuple[str, ...] = ()
    not_compared: dict[str, str] = Field(default_factory=dict)
    pass_at: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    extraction_failure_fraction: dict[str, Value] = Field(default_factory=dict)
    mean_tokens: dict[str, Value] = Field(default_factory=dict)
    mean_thought_tokens: dict[str, Value] = Field(default_factory=dict)
    truncated_fraction: dict[str, Value] = Field(default_factory=dict)
    thought_truncated_fraction: dict[str, Value] = Field(default_factory=dict)
    thinking: dict[str, Thinking] = Field(default_factory=dict)
    other_base: Table | None = None

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        """Of a task of a thinking model, how many answers were cut."""
        for cut in (self.truncated_fraction, self.thought_truncated_fraction):
            if lacking := [task for task in self.thinking if cut.get(task) is None]:
                raise ValueError(
                    f"{lacking[0]} has no truncated fraction, but an entry of thinking"
                )
        return self


class Probe(Entry):
    """What can be read of an attribute from a vision tower, by a linear probe."""

    chance: float
    base: Estimate
    trained: Estimate
    difference: Estimate


class Drift(Entry):
    """Of a tower's features from the base's."""

    linear_cka: Value
    cosine: Value


class Tower(Entry):
    """An arm's vision tower."""

    probes: dict[str, Probe]
    drift: Drift


class Alignment(Entry):
    """Of an arm's captions with their pictures; without a score, why."""

    clip_score: Estimate | None = None
    exact_match: Estimate | None = None
    difference: Estimate | None = None
    warnings: tuple[str, ...] = ()


class VisionRecord(Record):
    """evals/vision.json."""

    base: str
    towers: dict[str, Tower]
    alignment: dict[str, Alignment]


def _finite(value: Any) -> Any:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inside:
        _finite(each)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Item = Annotated[JsonValue, AfterValidator(_finite)]
"""A score, or what a corpus metric is computed from."""


class AnswerRow(OpenEntry):
    """Of samples_TASK.jsonl of a run: a question and its answer. Further columns are metrics: numbers, or the items
    of corpus metrics."""

    __pydantic_extra__: dict[str, Item]

    doc_id: int | str
    doc_hash: str
    question: str
    prompt: str = ""
    target: str
    completion: str
    thought: str | None = None
    thought_truncated: Value = None
    tokens: Value = None
    thought_tokens: Value = None
    stop: str | None = None
    truncated: Value = None
    outcome: str | None = None
    group: str | None = None
    cluster: str | int | None = None
    images: tuple[str, ...] = ()
    image: str | None = None
    extraction_failure: Value = None


class ScoredRow(OpenEntry):
    """Of samples_TASK_TIME.jsonl of lm-eval: a question, its answers and their metrics by one filter."""

    __pydantic_extra__: dict[str, Any]

    doc_id: int | str
    doc: JsonValue
    doc_hash: str
    prompt_hash: str
    target: JsonValue
    arguments: JsonValue
    filtered_resps: Annotated[list[JsonValue], Field(min_length=1)]
    filter: str
    metrics: tuple[str, ...]


class TokenRow(Entry):
    """Of tokens_TASK.jsonl: KL(arm || teacher) in nats at the tokens of an answer."""

    doc_id: int | str
    tokens: list[str]
    kl: list[float]


class TokenKlRecord(Entry):
    """evals/NAME/tokens.json."""

    inputs: EvalInputs
    leaves: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class BaseKlRecord(Entry):
    """evals/NAME/base_kl.json."""

    inputs: EvalInputs
    kl_to_base: Value
