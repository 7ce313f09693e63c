"""Settings of models and teachers: source, loading, and a teacher's privileged context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from vlopd.config.base import Part, Section, Weight
from vlopd.config.engines import EngineConfig, VllmEngine
from vlopd.config.functions import IS_BUILT_IN, IS_OWN, KIND, Function


def as_table(value: Any) -> Any:
    """Expands `student = "NAME"` to `student = {model = "NAME"}`."""
    return {"model": str(value)} if isinstance(value, str | Path) else value


TEMPLATE_NAMES = frozenset(
    {
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *(
            "tokenizer_kwargs",
            "processor_kwargs",
            "sanitize_control_tokens",
            "load_audio_from_video",
        ),
        *(
            "bos_token",
            "eos_token",
            "pad_token",
            "unk_token",
            "sep_token",
            "cls_token",
            "mask_token",
        ),
        *("image_token", "video_token", "audio_token", "first_token"),
        *("raise_exception", "strftime_now", "self", "loop"),
    }
)
"""Arguments and variables that `apply_chat_template` reserves."""


class ModelConfig(Section):
    """A model and how it is loaded."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, a .gguf file, or `builtin:NAME`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null for the default branch."""
    template: str | None = None
    """Replaces the model's chat template: a .jinja file, or `plain` (bare text, for base models)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; null for transformers' default. On CPU, eager is faster for small models."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may run."""
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Further variables of the chat template, such as `enable_thinking = false`."""

    @field_validator("template_arguments")
    @classmethod
    def check_template_arguments(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if reserved := sorted(arguments.keys() & TEMPLATE_NAMES):
            raise ValueError(
                f"{', '.join(reserved)} are set by vlopd or the tokenizer for every chat template; remove them"
            )
        try:
            json.dumps(arguments, allow_nan=False)
        except ValueError:
            raise ValueError("numbers must be finite, as in JSON") from None
        return arguments


class SystemContext(Section):
    """Gives the teacher a system prompt that the student does not get (context distillation)."""

    type: Literal["system"] = "system"
    text: str = Field(min_length=1)
    """The system prompt."""


class TemplateContext(Section):
    """Renders the teacher's question by a jinja template over question, answer and the example's fields."""

    type: Literal["template"] = "template"
    template: str = Field(min_length=1)
    """Jinja template of the teacher's question, over `question`, `answer` and the example's columns."""


class ImageContext(Section):
    """Gives the teacher the image(s) of another field, or the crop [x0, y0, x1, y1] in that field."""

    type: Literal["image"] = "image"
    column: str = Field(min_length=1)
    """Column with the image or images, or with a crop box [x0, y0, x1, y1] in pixels."""


class CaptionContext(Section):
    """Gives the teacher a text field instead of the images, for text-only teachers."""

    type: Literal["caption"] = "caption"
    column: str = Field(min_length=1)
    """Column with the text that replaces the images."""


class FunctionContext(Function):
    """A function (example, **arguments) -> Example, the example as the teacher reads it (docs/plugins.md)."""

    model_config = ConfigDict(extra="allow")
    takes: ClassVar[tuple[str, ...]] = ("example",)


BuiltInContext = Annotated[
    SystemContext | TemplateContext | ImageContext | CaptionContext, Field(discriminator="type")
]

ContextConfig = Annotated[
    Annotated[BuiltInContext, IS_BUILT_IN] | Annotated[FunctionContext, IS_OWN], KIND
]


class TeacherConfig(ModelConfig):
    """A teacher with optional privileged context.

    `model = "student"`: the student's initial weights or, with `ema`, a moving average of its weights.
    """

    type: Literal["model"] = "model"
    context: ContextConfig | None = None
    """Privileged context that the student does not get; null for none."""
    ema: Part | None = None
    """Per-step decay of the moving average of the student's weights, for `model = "student"`; null keeps them fixed."""
    engine: EngineConfig | None = None
    """The process that holds the teacher's weights in training, such as {type = "vlopd"} or {type = "vllm"}; null for
    this one (docs/engines.md)."""

    @model_validator(mode="after")
    def check_ema(self) -> TeacherConfig:
        if self.ema is not None and not self.is_student:
            raise ValueError('ema averages the student\'s own weights; it needs model = "student"')
        return self

    @model_validator(mode="after")
    def check_engine(self) -> TeacherConfig:
        if self.engine is not None and self.is_student:
            raise ValueError('engine holds a model of its own; with model = "student" leave it out')
        return self

    @property
    def is_student(self) -> bool:
        return self.model == "student"

    def loaded_from(self, student: ModelConfig) -> ModelConfig:
        """The model whose weights and processor this teacher has: its own, or the student's.

        A teacher that is the student has the student's template arguments under its own.
        """
        if not self.is_student:
            return self
        arguments = {**student.template_arguments, **self.template_arguments}
        return student.model_copy(update={"template_arguments": arguments})


Named = dict[str, Annotated[TeacherConfig, BeforeValidator(as_table)]]


class RoutedTeachers(Section):
    """Several teachers, of which each example uses the one named in a field."""

    type: Literal["routed"] = "routed"
    field: str
    """Column of the data with the teacher's name, for every example."""
    teachers: Named = Field(min_length=1)
    """Teachers by name: a model's name or table each."""


class MixedTeachers(Section):
    """Several teachers as one distribution: log p = sum_k w_k log p_k + const (a geometric mean of distributions)."""

    type: Literal["mixed"] = "mixed"
    teachers: Named = Field(min_length=1)
    """Teachers by name: a model's name or table each."""
    weights: dict[str, Annotated[Weight, Field(gt=0)]] = Field(default_factory=dict)
    """Relative weights by teacher; equal by default."""

    @model_validator(mode="after")
    def check_engines(self) -> MixedTeachers:
        for name, its in self.teachers.items():
            if isinstance(its.engine, VllmEngine):
                raise ValueError(
                    f"{name}: a mixture needs whole distributions, of which vLLM gives a few log-probs alone; set "
                    'engine = {type = "vlopd"}'
                )
        return self

    @model_validator(mode="after")
    def check_weights(self) -> MixedTeachers:
        if self.weights and self.weights.keys() != self.teachers.keys():
            raise ValueError(
                f"weights are for {sorted(self.weights)}, teachers are {sorted(self.teachers)}"
            )
        return self


def _as_teacher(value: Any) -> Any:
    value = as_table(value)
    return {"type": "model", **value} if isinstance(value, Mapping) else value


TeachersConfig = Annotated[
    Annotated[TeacherConfig | RoutedTeachers | MixedTeachers, Field(discriminator="type")],
    BeforeValidator(_as_teacher),
]


def teachers_by_name(teacher: TeachersConfig | None) -> dict[str, TeacherConfig]:
    """All teachers by name; a single one is called "teacher"."""
    if teacher is None:
        return {}
    return {"teacher": teacher} if isinstance(teacher, TeacherConfig) else teacher.teachers


class PrecisionConfig(Section):
    """Precisions, which determine the visible update; recorded in every artifact."""

    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of weights and activations in rollout, forward and backward. `auto` is bf16 on accelerators and on CPUs
    with AMX, fp32 elsewhere; a run resolves it once and keeps it (run.json), also on another machine.
    Trained values are fp32 (train.master rounds them) and start from the student's stored tensors, not from their
    rounding to `compute`."""
    stored: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of checkpoints: `auto` stores each tensor in its dtype in the student's checkpoint (the widest of
    several that are fused into one); otherwise every floating-point tensor is rounded once to this dtype."""

    @property
    def resolved(self) -> Literal["fp32", "bf16"]:
        """`compute` of a run's config, in which it is not "auto" (run/folder.py: with_precision_of_run)."""
        assert self.compute != "auto"
        return self.compute
