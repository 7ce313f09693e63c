"""The experiment's configuration: one frozen class a concept, TOML in, JSON out.

A variant is a union on `type`. An unknown key is an error that names the nearest known one. Overrides
are TOML lines with dotted keys: `optim.learning_rate=2e-4`, `arms.full.seed=3`. The resolved config is
written as JSON (run.json), which keeps nulls; hand-written files stay TOML.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class UserError(ValueError):
    """The user can mend this; the message is one line that names the thing and the remedy."""


class ConfigError(UserError):
    """The user's configuration is wrong; the message names the key and the remedy."""


class DataError(UserError):
    """A row of the user's data is broken; the message names the row and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------- the models


def as_table(value: Any) -> Any:
    """`student = "NAME"` is short for `student = {model = "NAME"}`."""
    return {"model": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """One model: where it is, and how it is loaded."""

    model: str = Field(min_length=1)
    """A hub id, a local folder, a .gguf file, or `builtin:NAME`."""
    revision: str | None = None
    template: str | None = None
    """Chat template in place of the model's own: a .jinja file, or `plain` (bare text, for base models)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; null takes transformers' choice. On CPU, eager is faster for small models."""
    trust_remote_code: bool = False


class SystemContext(Section):
    """The teacher reads a system prompt that the student does not (context distillation)."""

    type: Literal["system"] = "system"
    text: str = Field(min_length=1)


class TemplateContext(Section):
    """The teacher's question is this jinja template over question, answer and the example's fields."""

    type: Literal["template"] = "template"
    template: str = Field(min_length=1)


class ImageContext(Section):
    """The teacher sees the picture(s) of another field, or the crop [x0, y0, x1, y1] that the field gives."""

    type: Literal["image"] = "image"
    column: str = Field(min_length=1)


class CaptionContext(Section):
    """The teacher reads this field in place of the pictures: what a text-only teacher needs."""

    type: Literal["caption"] = "caption"
    column: str = Field(min_length=1)


ContextConfig = Annotated[
    SystemContext | TemplateContext | ImageContext | CaptionContext, Field(discriminator="type")
]


class TeacherConfig(ModelConfig):
    """A teacher, and what it is shown beside what the student sees.

    `model = "student"` is the student's own initial weights or, with `ema`, their moving average.
    """

    type: Literal["model"] = "model"
    context: ContextConfig | None = None
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay a step of the average of the student's weights, for `model = "student"`; null keeps them fixed."""

    @model_validator(mode="after")
    def check_ema(self) -> TeacherConfig:
        if self.ema is not None and not self.is_student:
            raise ValueError('ema averages the student\'s own weights; it needs model = "student"')
        return self

    @property
    def is_student(self) -> bool:
        return self.model == "student"


Named = dict[str, Annotated[TeacherConfig, BeforeValidator(as_table)]]


class RoutedTeachers(Section):
    """Several teachers: each example is graded by the one that its field names."""

    type: Literal["routed"] = "routed"
    field: str
    teachers: Named = Field(min_length=1)


class MixedTeachers(Section):
    """Several teachers as one: log p = sum_k w_k log p_k + const (a geometric mean of distributions)."""

    type: Literal["mixed"] = "mixed"
    teachers: Named = Field(min_length=1)
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """By teacher, relative to each other; equal unless given."""

    @model_validator(mode="after")
    def check_weights(self) -> MixedTeachers:
        if self.weights and self.weights.keys() != self.teachers.keys():
            raise ValueError(
                f"weights are for {sorted(self.weights)}, teachers are {sorted(self.teachers)}"
            )
        return self


def as_teacher(value: Any) -> Any:
    value = as_table(value)
    return {"type": "model", **value} if isinstance(value, Mapping) else value


TeachersConfig = Annotated[
    Annotated[TeacherConfig | RoutedTeachers | MixedTeachers, Field(discriminator="type")],
    BeforeValidator(as_teacher),
]


class PrecisionConfig(Section):
    """What counts as an update depends on these, so every artifact records them."""

    compute: Literal["fp32", "bf16"] = "bf16"
    """Weights and activations in rollout, forward and backward. Trained values are always kept in fp32."""
    stored: Literal["source", "fp32", "bf16"] = "source"
    """Checkpoints: `source` stores each tensor as the student's own checkpoint does."""


# ------------------------------------------------------------------------------------------ the data


class ShapesData(Section):
    """The built-in visual world; `modality = "text"` gives the scene in words."""

    type: Literal["shapes"] = "shapes"
    modality: Literal["image", "text"] = "image"
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return self.modality == "image"


class FileData(Section):
    """A JSONL or parquet file, a folder, or a hub data set, through `datasets`; columns by name."""

    type: Literal["file"] = "file"
    path: str
    """A .jsonl, .json or .parquet file (relative to the working directory), or a hub data set id."""
    split: str = "train"
    subset: str | None = None
    question: str = "question"
    answer: str | None = None
    image: str | None = None
    """Column with an image, a list of images, or file names relative to the data file's folder."""
    image_mark: str | None = Field(None, min_length=1)
    """What stands in the question where an image goes (`<image>` in many data sets), as often as the row has
    images; null puts images before the text and takes the text as it is."""
    id: str | None = None
    system: str | None = None
    """A system prompt put before every question."""

    @property
    def has_images(self) -> bool:
        return self.image is not None


class CapitalsData(Section):
    """Questions on the capitals of the world's countries, split by country."""

    type: Literal["capitals"] = "capitals"
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return False


DataConfig = Annotated[ShapesData | FileData | CapitalsData, Field(discriminator="type")]


# ------------------------------------------------------------------------------------------ training


class RolloutConfig(Section):
    """How the student samples its completions."""

    max_new_tokens: int = Field(16, gt=0)
    temperature: float = Field(1.0, gt=0)


class ReverseKL(Section):
    """KL(student || teacher) over the full shared vocabulary, summed exactly at every completion token."""

    type: Literal["reverse_kl"] = "reverse_kl"
    chunk_tokens: int = Field(1024, gt=0)
    """Completion tokens whose [*, V] logits are held at once, forward and backward."""


class ForwardKL(Section):
    """KL(teacher || student) over the full shared vocabulary."""

    type: Literal["forward_kl"] = "forward_kl"
    chunk_tokens: int = Field(1024, gt=0)


LossConfig = Annotated[ReverseKL | ForwardKL, Field(discriminator="type")]


class AdamW(Section):
    """torch.optim.AdamW on the fp32 values of the trained coordinates."""

    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clips the norm over trained coordinates; null for none."""
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"


class TrainConfig(Section):
    steps: int = Field(gt=0)
    prompts_per_step: int = Field(gt=0)
    """Prompts of one optimizer step over all processes, one completion each."""
    micro_batch: int | None = Field(None, gt=0)
    """Prompts of one forward and backward; null for all of the process's at once."""
    freeze: tuple[Literal["vision", "projector", "language", "embedding", "head"], ...] = ()
    """Components of the student that do not train."""
    save_every: int = Field(50, gt=0)
    """Steps between resumable states; a killed run goes on from the last."""
    sample_every: int = Field(25, gt=0)
    """Steps between sample generations written to samples.jsonl."""


# ------------------------------------------------------------------------------------- masks and arms


class VisibleMask(Section):
    """Coordinates whose stored value changed: |delta| > atol, read in the stored precision."""

    type: Literal["visible"] = "visible"
    of: str = "full"
    atol: float = Field(0.0, ge=0)


class TopFractionMask(Section):
    """The fraction of coordinates with the largest |delta|, of each tensor or of the whole model."""

    type: Literal["top_fraction"] = "top_fraction"
    of: str = "full"
    fraction: float = Field(gt=0, le=1)
    scope: Literal["tensor", "global"] = "tensor"


class RandomMask(Section):
    """Uniformly drawn coordinates, in each tensor exactly as many as the mask `like` has there."""

    type: Literal["random"] = "random"
    like: str
    seed: int


MaskConfig = Annotated[VisibleMask | TopFractionMask | RandomMask, Field(discriminator="type")]


class SourceArm(Section):
    """The student before any training."""

    type: Literal["source"] = "source"


class TeacherArm(Section):
    """A teacher as it is, without its context."""

    type: Literal["teacher"] = "teacher"
    teacher: str | None = None
    """Which, where there are several."""


class DistillArm(Section):
    """On-policy distillation from the source; with a mask, only its coordinates train."""

    type: Literal["distill"] = "distill"
    seed: int
    """Seeds the data and the sampling."""
    mask: str | None = None


class TransplantArm(Section):
    """The source plus another arm's delta on the mask; no training."""

    type: Literal["transplant"] = "transplant"
    of: str = "full"
    mask: str


ArmConfig = Annotated[
    SourceArm | TeacherArm | DistillArm | TransplantArm, Field(discriminator="type")
]


# ------------------------------------------------------------------------------ geometry, evaluation


class GeometryConfig(Section):
    arms: tuple[str, ...] = ("full",)
    null_draws: int = Field(3, ge=0)
    """Draws of the i.i.d. null: Gaussian noise of the same norm, tensor by tensor, in the stored precision."""
    seed: int = 0
    ratios: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    """Fractions for principal subspaces, magnitude masks and energy shares."""


class EvalConfig(Section):
    tasks: tuple[str, ...] = ("shapes",)
    """lm-eval task names: ours (evals/tasks/) and any that lm-eval knows."""
    limit: int | None = Field(None, gt=0)
    """Questions a task; null for all."""
    batch_size: int = Field(64, gt=0)
    confidence: float = Field(0.95, gt=0, lt=1)
    bootstrap_draws: int = Field(10_000, gt=0)
    keep_images: int = Field(32, ge=0)
    """Pictures of the first questions that are kept for the report's examples."""


class ExperimentConfig(Section):
    """One experiment: everything that decides its numbers."""

    name: str = Field(pattern=NAME)
    title: str = ""
    student: Annotated[ModelConfig, BeforeValidator(as_table)]
    teacher: TeachersConfig
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = ReverseKL()
    optim: AdamW = AdamW()
    train: TrainConfig
    masks: dict[str, MaskConfig] = {}
    arms: dict[str, ArmConfig]
    geometry: GeometryConfig = GeometryConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; a single one is called "teacher"."""
        if isinstance(self.teacher, TeacherConfig):
            return {"teacher": self.teacher}
        return self.teacher.teachers

    @model_validator(mode="after")
    def check_references(self) -> ExperimentConfig:
        """Every mask and arm that is named exists, and what it is made from comes before it."""

        def need(names: Mapping[str, Any], name: str, where: str) -> None:
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not among {sorted(names)}")

        for name, mask in self.masks.items():
            if isinstance(mask, RandomMask):
                need(self.masks, mask.like, f"masks.{name}.like")
            else:
                need(self.arms, mask.of, f"masks.{name}.of")
        for name, arm in self.arms.items():
            if isinstance(arm, TeacherArm):
                if arm.teacher is None and len(self.teachers) > 1:
                    raise ValueError(
                        f"arms.{name}.teacher must say which of {sorted(self.teachers)} it is"
                    )
                need(
                    self.teachers, arm.teacher or next(iter(self.teachers)), f"arms.{name}.teacher"
                )
            if isinstance(arm, TransplantArm):
                need(self.arms, arm.of, f"arms.{name}.of")
            if isinstance(arm, (DistillArm, TransplantArm)) and arm.mask is not None:
                need(self.masks, arm.mask, f"arms.{name}.mask")
                self._refuse_cycle(name)
        for name in self.geometry.arms:
            need(self.arms, name, "geometry.arms")
        return self

    def _refuse_cycle(self, arm: str) -> None:
        seen: list[str] = []
        for name in self.ancestors(arm):
            if name == arm:
                raise ValueError(f"arms.{arm} needs itself: {' <- '.join([arm, *seen, arm])}")
            seen.append(name)

    def ancestors(self, arm: str) -> list[str]:
        """The arms whose deltas `arm` is made from, nearest first (at most one visit each)."""
        found: list[str] = []
        queue = [arm]
        while queue:
            config = self.arms[queue.pop(0)]
            parents = []
            if isinstance(config, TransplantArm):
                parents.append(config.of)
            if isinstance(config, (DistillArm, TransplantArm)) and config.mask is not None:
                mask = self.masks[config.mask]
                hops = 0
                while isinstance(mask, RandomMask) and hops <= len(self.masks):
                    mask, hops = self.masks[mask.like], hops + 1
                if isinstance(mask, RandomMask):
                    raise ValueError(f"masks.{config.mask}: `like` leads back to itself")
                parents.append(mask.of)
            for parent in parents:
                if parent not in found:
                    found.append(parent)
                    queue.append(parent)
        return found


# ---------------------------------------------------------------------------------------------- input


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a TOML file and applies overrides, each a TOML line.

    Raises ConfigError with the file, the key and the nearest known key.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for line in overrides:
        merge(tree, parse_override(line))
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(map(explain, error.errors()))) from None


def parse_override(line: str) -> dict[str, Any]:
    """`optim.learning_rate=2e-4` -> {"optim": {"learning_rate": 2e-4}}; a bare word is taken as a string."""
    key, equals, value = line.partition("=")
    if not equals:
        raise ConfigError(f"override {line!r} has no '='; write key=value, as in train.steps=20")
    for text in (line, f'{key}="{value}"'):
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError(f"override {line!r} is not a TOML line")


def merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Merges `change` into `tree` in place, table by table; a table of another `type` replaces the old one."""
    for key, value in change.items():
        old = tree.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and value.get("type", old.get("type")) == old.get("type")
        ):
            merge(old, value)
        else:
            tree[key] = value


def explain(error: ErrorDetails) -> str:
    """One pydantic error as one line, with the nearest known key where a key is unknown."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}" if where else error["msg"]
    known = known_keys(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    return f"unknown key {where!r}{hint}"


def known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys of the config class at a location of pydantic's error path."""
    classes: list[Any] = [ExperimentConfig]
    for part in location:
        following: list[Any] = []
        for cls in classes:
            if cls.model_fields.get(str(part)) is not None:
                following += sections_in(cls.model_fields[str(part)].annotation)
        # union tags and dict keys appear in the path too: they narrow nothing but the variants
        tagged = [c for c in classes if part in variant_tags(c)]
        classes = following or tagged or classes
    return sorted({key for cls in classes for key in cls.model_fields})


def variant_tags(cls: type[BaseModel]) -> tuple[str, ...]:
    field = cls.model_fields.get("type")
    return get_args(field.annotation) if field is not None else ()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in sections_in(part)]
