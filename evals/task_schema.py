"""The shape of a user's task file, checked before lm-eval reads it, which takes values of any type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from lm_eval.tasks._yaml_loader import load_yaml
from pydantic import BaseModel, Field, ValidationError

from evals.task_code import FAILURES
from vlopd.config.explain import explain_errors
from vlopd.errors import ConfigError

MOST_REPEATS = 10_000
MOST_EXAMPLES = 1_000
"""Of `repeats` and `num_fewshot`."""
Texts = str | list[str]


class Metric(BaseModel):
    """An entry of metric_list; functions are named as `FOLDER/FILE.NAME`."""

    metric: str
    aggregation: str | None = None
    higher_is_better: bool | None = None
    hf_evaluate: bool | None = None


class GroupMetric(BaseModel):
    """An entry of a group's aggregate_metric_list."""

    metric: str
    aggregation: str | None = None
    weight_by_size: bool | None = None
    filter_list: Texts | None = None


class Definition(BaseModel):
    """A task or group as its YAML has it, with what it includes; other keys are lm-eval's to check."""

    task: str | list[str | Definition] | None = None
    group: str | None = None
    tag: Texts | None = None
    include: Texts | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: (
        Literal["loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until"]
        | None
    ) = None
    doc_to_audio: None = None
    description: str | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    generation_kwargs: dict[str, Any] | None = None
    metric_list: list[Metric] | None = None
    aggregate_metric_list: list[GroupMetric] | GroupMetric | None = None
    filter_list: list[dict[str, Any]] | None = None
    fewshot_config: dict[str, Any] | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=MOST_EXAMPLES)] | None = None
    repeats: Annotated[int, Field(ge=1, le=MOST_REPEATS)] | None = None
    unsafe_code: bool | None = None
    metadata: dict[str, Any] | None = None


def refuse_malformed(name: str, entry: Any) -> None:
    """Raises ConfigError for a task file (an entry of lm-eval's index) of another shape."""
    settings = entry.cfg or {}
    if entry.yaml_path is not None:
        try:
            settings = load_yaml(entry.yaml_path, resolve_func=False)
        except FAILURES:  # which loading raises again, and is explained there
            return
    try:
        Definition.model_validate(settings, strict=True)
    except ValidationError as error:
        why = explain_errors(error, Definition).split("; ")[0]
        raise ConfigError(f"task {name}: {why}; fix {entry.yaml_path}") from None


def members_named(settings: Mapping[str, Any]) -> list[str]:
    """The names in a group's `task`, a list of names and tables; none of a task."""
    found: list[str] = []
    members = settings.get("task")
    for each in members if isinstance(members, list) else ():
        if isinstance(each, str):
            found.append(each)
        else:
            inner = each.get("task")
            found += [inner] if isinstance(inner, str) else members_named(each)
    return found
