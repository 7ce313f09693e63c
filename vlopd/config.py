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


class FullSupport(Section):
    """All of the shared vocabulary."""

    type: Literal["full"] = "full"


class TopK(Section):
    """The likeliest tokens at each position; which they are is not differentiated."""

    k: int = Field(64, gt=0)
    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """Of the tokens outside: `bucket` counts them together as one more token (a divergence again), `renormalise`
    divides by the mass inside, `none` leaves them out (no divergence: the KLs can be negative)."""


class TeacherTopK(TopK):
    """The teacher's k likeliest tokens."""

    type: Literal["teacher_top_k"] = "teacher_top_k"


class StudentTopK(TopK):
    """The student's k likeliest tokens."""

    type: Literal["student_top_k"] = "student_top_k"


class UnionTopK(TopK):
    """Tokens among the k likeliest of either, k to 2k of them."""

    type: Literal["union"] = "union"


class IntersectionTopK(TopK):
    """Tokens among the k likeliest of both, 0 to k of them."""

    type: Literal["intersection"] = "intersection"


SupportConfig = Annotated[
    FullSupport | TeacherTopK | StudentTopK | UnionTopK | IntersectionTopK,
    Field(discriminator="type"),
]


class Chunked(Section):
    """Computed in chunks of tokens; the result does not depend on them."""

    chunk_tokens: int = Field(1024, gt=0)
    """Completion tokens whose [*, V] logits are held at once, forward and backward."""


class Divergence(Chunked):
    """A sum over a support at every completion token. Below, q is the student and p the teacher."""

    support: SupportConfig = FullSupport()
    student_temperature: float = Field(1.0, gt=0)
    """Divides the student's logits in the loss (the sampling has its own, rollout.temperature)."""
    teacher_temperature: float = Field(1.0, gt=0)
    """Divides the teacher's logits in the loss. The loss is not multiplied by its square."""

    @model_validator(mode="after")
    def check_support(self) -> Divergence:
        support = self.support
        if (
            isinstance(support, (TeacherTopK, StudentTopK, IntersectionTopK))
            and support.k == 1
            and support.tail == "renormalise"
        ):
            raise ValueError(
                "one token, renormalised, has probability 1 in both models and the loss is always 0; "
                'use support.k >= 2 or support.tail = "bucket"'
            )
        return self


class ReverseKL(Divergence):
    """KL(q || p) = sum_v q_v log(q_v / p_v): that of on-policy distillation, mode-seeking."""

    type: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Divergence):
    """KL(p || q) = sum_v p_v log(p_v / q_v): that of knowledge distillation, mass-covering."""

    type: Literal["forward_kl"] = "forward_kl"


class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649)."""

    type: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0, le=1)
    normalised: bool = False
    """Divides by beta (1 - beta): forward KL at 0, reverse KL at 1, continuous, and as steep near p for all beta."""

    @model_validator(mode="after")
    def check_ends(self) -> JSD:
        if self.beta in (0, 1) and not self.normalised:
            raise ValueError(
                f"with beta = {self.beta:g} this JSD is always 0; set normalised = true, which makes it the "
                f"{'reverse' if self.beta else 'forward'} KL, or 0 < beta < 1"
            )
        return self


class SkewReverseKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p), at most -log(alpha) (DistiLLM, arXiv 2402.03898)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(0.1, ge=0, lt=1)


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), at most -log(alpha) (DistiLLM, arXiv 2402.03898)."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(0.1, ge=0, lt=1)


class Estimator(Chunked):
    """The reverse KL from the sampled token alone, d = log q - log p there, both at temperature 1.

    What is said of their means holds for completions that the student sampled at rollout.temperature 1.
    """


class K1(Estimator):
    """Policy gradient with the advantage -d: its mean is the reverse KL's gradient."""

    type: Literal["k1"] = "k1"
    clip: float | None = Field(0.2, gt=0, lt=1)
    """PPO's bound on how far the ratio of the student's to the sampler's probability pays; null for none."""


class K2(Estimator):
    """d^2 / 2: its gradient's mean is the reverse KL's."""

    type: Literal["k2"] = "k2"


class K3(Estimator):
    """1 / e^d - 1 + d: its mean is the reverse KL, its gradient's mean the forward KL's."""

    type: Literal["k3"] = "k3"


LossConfig = Annotated[
    ReverseKL | ForwardKL | JSD | SkewReverseKL | SkewForwardKL | K1 | K2 | K3,
    Field(discriminator="type"),
]


class ComponentRates(Section):
    """Factors of the learning rate by component; what the atlas calls "other" has the rate itself."""

    vision: float = Field(1.0, gt=0)
    projector: float = Field(1.0, gt=0)
    language: float = Field(1.0, gt=0)
    embedding: float = Field(1.0, gt=0)
    """A head that is tied to the embedding counts as embedding."""
    head: float = Field(1.0, gt=0)


Decay = Annotated[float, Field(ge=0, lt=1)]
"""What a running average keeps of itself a step."""


class OptimizerBase(Section):
    """What all optimizers share. They move the fp32 values of the trained coordinates and nothing else."""

    learning_rate: float = Field(1e-6, gt=0)
    component_rates: ComponentRates = ComponentRates()
    """`{vision = 0.1}` trains the vision tower at a tenth of the rate. To not train it at all: train.freeze."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW, Lion and Muon: values *= 1 - rate * decay. SGD and RMSProp add decay * values to the gradient."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clips the norm over trained coordinates; null for none."""
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"


class AdamW(OptimizerBase):
    """torch.optim.AdamW (arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)


class SGD(OptimizerBase):
    """torch.optim.SGD: b = momentum * b + g (b = g at first), values -= rate * b; without dampening."""

    type: Literal["sgd"] = "sgd"
    momentum: Decay = 0.9
    nesterov: bool = False
    """Steps along g + momentum * b."""

    @model_validator(mode="after")
    def check_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class RMSProp(OptimizerBase):
    """torch.optim.RMSprop: AdamW's second moment alone, without bias correction."""

    type: Literal["rmsprop"] = "rmsprop"
    alpha: Decay = 0.99
    """Of the average of squared gradients."""
    eps: float = Field(1e-8, ge=0)
    momentum: Decay = 0.0


class Lion(OptimizerBase):
    """timm's Lion (arXiv 2302.06675): the sign of a moving average; rates of a third to a tenth of AdamW's."""

    type: Literal["lion"] = "lion"
    betas: tuple[Decay, Decay] = (0.9, 0.99)


class Muon(OptimizerBase):
    """torch.optim.Muon: hidden matrices move along their orthogonalised momentum.

    AdamW moves the rest: embeddings, positions, head, norms, biases, and what is not two-dimensional. Fused
    matrices are taken as they are stored. A mask must take each hidden matrix whole or not at all.
    """

    type: Literal["muon"] = "muon"
    momentum: Decay = 0.95
    nesterov: bool = True
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's rate: 0.2 sqrt(max(m, n)), so that AdamW's rates serve (arXiv 2502.16982), or
    sqrt(max(1, m / n)), its first author's."""
    adamw_learning_rate: float | None = Field(None, gt=0)
    """Of what AdamW moves; null for `learning_rate`."""
    adamw_betas: tuple[Decay, Decay] = (0.9, 0.999)
    adamw_eps: float = Field(1e-8, ge=0)


def as_optimizer(value: Any) -> Any:
    """AdamW where no `type` is given."""
    return {"type": "adamw", **value} if isinstance(value, Mapping) else value


OptimConfig = Annotated[
    Annotated[AdamW | SGD | RMSProp | Lion | Muon, Field(discriminator="type")],
    BeforeValidator(as_optimizer),
]


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


class GaussianNull(Section):
    """I.i.d. Gaussian noise."""

    type: Literal["gaussian"] = "gaussian"


class RowColumnNull(Section):
    """Gaussian noise with the r.m.s. profile of the observed rows and columns."""

    type: Literal["row_column"] = "row_column"


class PermutedNull(Section):
    """The observed update's own entries, in random places of the same tensor."""

    type: Literal["permuted"] = "permuted"


class SignFlippedNull(Section):
    """The observed update with random signs."""

    type: Literal["sign_flipped"] = "sign_flipped"


class LowRankNull(Section):
    """The product of two Gaussian matrices of this rank."""

    type: Literal["low_rank"] = "low_rank"
    rank: int = Field(8, gt=0)


class UlpNull(Section):
    """Gaussian noise in proportion to |w|: in a stored precision, one ulp here and there."""

    type: Literal["ulp"] = "ulp"


NullConfig = Annotated[
    GaussianNull | RowColumnNull | PermutedNull | SignFlippedNull | LowRankNull | UlpNull,
    Field(discriminator="type"),
]


class GeometryConfig(Section):
    arms: tuple[str, ...] = ("full",)
    nulls: tuple[NullConfig, ...] = (GaussianNull(),)
    """Each has the observed norm, tensor by tensor, after rounding to the stored precision."""
    null_draws: int = Field(3, ge=0)
    """Draws of each null."""
    seed: int = 0
    ratios: tuple[float, ...] = Field((0.01, 0.05, 0.1, 0.2), min_length=1, max_length=7)
    """Fractions for principal subspaces, magnitude masks and energy shares."""
    factorisation: Literal["gram", "svd"] = "gram"
    """`gram`: singular values down to 1e-7 of the largest; `svd`: all of them, several times slower."""
    max_exact_side: int = Field(4096, gt=0)
    max_exact_cost: float = Field(1e12, gt=0)
    """Matrices with a longer shorter side, or m n min(m, n) above this, are factorised approximately."""


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
    optim: OptimConfig = AdamW()
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

    def teacher_of(self, arm: TeacherArm) -> TeacherConfig:
        """The teacher that an arm is: the one it names, or the only one."""
        return self.teachers[arm.teacher or next(iter(self.teachers))]

    def loaded_as(self, teacher: TeacherConfig) -> ModelConfig:
        """Where a teacher's weights and processor come from: its own, or the student's."""
        return self.student if teacher.is_student else teacher

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
            if isinstance(self.optim, Muon) and isinstance(arm, DistillArm) and arm.mask:
                self._refuse_cut_matrices(name, arm.mask)
        for name in self.geometry.arms:
            need(self.arms, name, "geometry.arms")
        return self

    def _refuse_cut_matrices(self, arm: str, mask: str) -> None:
        """Before the first arm trains; the mask itself is looked at again before this one does."""
        rule = self.masks[mask]
        while isinstance(rule, RandomMask):
            rule = self.masks[rule.like]
        if not (isinstance(rule, TopFractionMask) and rule.fraction == 1):
            raise ValueError(
                f"arms.{arm}: Muon orthogonalises whole matrices, and the mask {mask!r} takes coordinates out "
                'of them; train all arms with another optimizer, such as optim.type = "adamw"'
            )

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
