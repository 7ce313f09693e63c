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
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

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


Writer = Literal["student", "teacher", "data"]
"""Who wrote a completion."""


class OneSource(Section):
    """All completions are the student's samples (OPD), the teacher's (sequence-level KD), or the data's answers."""

    type: Writer = "student"

    @property
    def shares(self) -> dict[Writer, float]:
        return {self.type: 1.0}


class MixedSource(Section):
    """Each completion is drawn from one of several (GKD, arXiv 2306.13649: lambda is the student's share)."""

    type: Literal["mixture"] = "mixture"
    student: float = Field(0.0, ge=0)
    teacher: float = Field(0.0, ge=0)
    data: float = Field(0.0, ge=0)

    @property
    def shares(self) -> dict[Writer, float]:
        """Relative to each other, those above 0."""
        every: dict[Writer, float] = {
            "student": self.student,
            "teacher": self.teacher,
            "data": self.data,
        }
        return {writer: share for writer, share in every.items() if share > 0}

    @model_validator(mode="after")
    def check_shares(self) -> MixedSource:
        if not self.shares:
            raise ValueError("a mixture needs a share above 0, such as student = 0.5, data = 0.5")
        return self


def as_source(value: Any) -> Any:
    """`source = "data"` is short for `source = {type = "data"}`."""
    return {"type": value} if isinstance(value, str) else value


SourceConfig = Annotated[
    Annotated[OneSource | MixedSource, Field(discriminator="type")], BeforeValidator(as_source)
]


class RolloutConfig(Section):
    """Where completions come from, and how the models that write them sample."""

    source: SourceConfig = OneSource()
    max_new_tokens: int = Field(16, gt=0)
    """Longer answers of the data are cut there."""
    completions_per_prompt: int = Field(1, gt=0)
    temperature: float = Field(1.0, gt=0)
    """Of the sampling alone; the loss has temperatures of its own."""
    top_k: int | None = Field(None, gt=0)
    """Samples among the likeliest so many tokens, after the temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples among the fewest likeliest tokens whose probabilities reach this, after top_k."""

    @property
    def is_on_policy(self) -> bool:
        """Whether the student writes every completion."""
        return set(self.source.shares) == {"student"}

    @property
    def is_students_distribution(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, at temperature 1, nothing cut."""
        return self.temperature == 1 and self.top_k is None and self.top_p == 1


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


class Loss(Section):
    """What all losses share. Computed in chunks of tokens; the result does not depend on them."""

    chunk_tokens: int = Field(1024, gt=0)
    """Completion tokens whose [*, V] logits are held at once, forward and backward."""
    normalisation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Of a step's summed token losses, over all micro-batches and processes. `token_mean` divides by the step's
    completion tokens; `sequence_mean` averages each completion's own mean, so that short ones weigh as much as
    long ones; `fixed_length` divides by completions times rollout.max_new_tokens."""


class Divergence(Loss):
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


class SampledToken(Loss):
    """A loss of the completion's own tokens alone, at temperature 1."""


class NLL(SampledToken):
    """-log q: supervised fine-tuning on the data's answers, sequence-level KD on the teacher's samples."""

    type: Literal["nll"] = "nll"


class Estimator(SampledToken):
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
    ReverseKL | ForwardKL | JSD | SkewReverseKL | SkewForwardKL | NLL | K1 | K2 | K3,
    Field(discriminator="type"),
]


class RewardConfig(Section):
    """Verifiable rewards of whole completions, as group-normalised advantages (GRPO, arXiv 2402.03300).

    The objective is alpha * loss + (1 - alpha) * policy gradient. Under k1, which is a policy gradient too, the
    advantages are what is mixed: alpha * (log p - log q) + (1 - alpha) * the reward's, clipped together.
    """

    rule: Literal["exact_match", "verdict_match", "answer_named", "capital_named"]
    """1 for a right completion, 0 for another, by a rule of vlopd/rewards.py."""
    alpha: float = Field(0.0, ge=0, lt=1)
    """The teacher's share; 0 is reinforcement learning alone (RLVR), with the teacher only looking on."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by their group's standard deviation (GRPO) or left (arXiv 2503.20783)."""
    clip: float | None = Field(0.2, gt=0, lt=1)
    """PPO's bound on how far the importance ratio pays, also of k1's part; null for none."""


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
    """Prompts of one step over all processes, each with rollout.completions_per_prompt completions."""
    updates_per_rollout: int = Field(1, gt=0)
    """Optimizer updates on the same completions; above 1, k1 and rewards weigh them by importance ratios."""
    micro_batch: int | None = Field(None, gt=0)
    """Completions of one forward and backward; null for all of the process's at once."""
    freeze: tuple[Literal["vision", "projector", "language", "embedding", "head"], ...] = ()
    """Components of the student that do not train."""
    save_every: int = Field(50, gt=0)
    """Steps between resumable states; a killed run goes on from the last."""
    sample_every: int = Field(25, gt=0)
    """Steps between sample generations written to samples.jsonl."""
    evidence_every: int | None = Field(None, gt=0)
    """Steps between looks at the optimizer (optimizer.jsonl), which copy the trained values once; null for none."""
    keep_steps: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Steps after which every trained arm keeps a checkpoint, for masks and arms to name, as in `full@12`."""


# ------------------------------------------------------------------------------------- masks and arms


class Reference(NamedTuple):
    """A checkpoint that a rule or an arm reads: of an arm of this run, or of a folder elsewhere.

    >>> Reference.parse("full@12"), Reference.parse("runs/other/arms/full")
    (Reference("full", None, 12), Reference(None, "runs/other/arms/full", None))
    """

    arm: str | None
    path: str | None
    """An arm's folder in another run, or a checkpoint folder; whatever has a slash."""
    step: int | None
    """An early checkpoint, of those that train.keep_steps kept; null for the last."""

    @staticmethod
    def parse(text: str) -> Reference:
        name, at, step = text.rpartition("@") if "@" in text else (text, "", "")
        if at and not step.isdecimal():
            raise ValueError(f"{text!r}: after @ comes the number of a step, as in 'full@12'")
        is_path = "/" in name
        return Reference(
            None if is_path else name, name if is_path else None, int(step) if at else None
        )


class MaskRule(Section):
    """Which coordinates may train. Ties go to the lowest flat index; counts are exact."""

    @property
    def reads(self) -> str | None:
        """The trained checkpoint that the rule looks at, as a `Reference`."""
        return None

    @property
    def combines(self) -> tuple[str, ...]:
        """The masks that the rule is made from."""
        return ()


class DeltaRule(MaskRule):
    """Chosen by what training changed."""

    of: str = "full"
    """An arm; an early checkpoint of it, `full@12`; or a folder: another run's `runs/other/arms/full`."""

    @property
    def reads(self) -> str | None:
        return self.of


Scope = Literal["tensor", "global"]
"""Whether a share is taken of every tensor, or of the whole model."""
Share = Annotated[float, Field(gt=0, le=1)]


class VisibleMask(DeltaRule):
    """Coordinates whose value changed by more than a tolerance, in the stated precision.

    |delta| > atol + rtol |w|, and, where `ulps` is given, more than so many steps of that precision (0: any).
    """

    type: Literal["visible"] = "visible"
    atol: float = Field(0.0, ge=0)
    rtol: float = Field(0.0, ge=0)
    ulps: int | None = Field(None, ge=0)
    precision: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """Both values are rounded to it first."""


class TopFractionMask(DeltaRule):
    """The fraction of coordinates with the largest |delta|, or the largest |delta| / |w|."""

    type: Literal["top_fraction"] = "top_fraction"
    fraction: Share
    by: Literal["delta", "relative_delta"] = "delta"
    scope: Scope = "tensor"


class EnergyMask(DeltaRule):
    """The fewest coordinates, largest |delta| first, that hold this share of the sum of delta^2."""

    type: Literal["energy"] = "energy"
    share: Share
    scope: Scope = "tensor"


class MagnitudeMask(MaskRule):
    """The fraction of coordinates with the smallest or largest |w| of the source."""

    type: Literal["magnitude"] = "magnitude"
    which: Literal["low", "high"] = "low"
    fraction: Share
    scope: Scope = "tensor"


class PrincipalMask(MaskRule):
    """The fraction of each tensor where the source's rank-k approximation is largest, or smallest, in size.

    Vectors are their own approximation. Rank and fraction are set apart (arXiv 2511.08567).
    """

    type: Literal["principal"] = "principal"
    which: Literal["principal", "off_principal"] = "principal"
    fraction: Share
    rank: int | None = Field(None, gt=0)
    rank_fraction: float | None = Field(None, gt=0, le=1)
    """Of the smaller side, rounded down, at least 1."""

    @model_validator(mode="after")
    def check_rank(self) -> PrincipalMask:
        if (self.rank is None) == (self.rank_fraction is None):
            raise ValueError("give either rank or rank_fraction")
        return self


class RandomMask(MaskRule):
    """Uniformly drawn coordinates, exactly as many as the mask `like` has in every class of `match`."""

    type: Literal["random"] = "random"
    like: str
    seed: int
    match: Literal["global", "module", "tensor", "magnitude", "visibility"] = "tensor"
    """The classes: the whole model; the tensors of one component and module; each tensor; in each tensor the
    sixteen quantiles of |w|, or the binades of |w|, within which every step of a float (ulp) is equally long,
    so that an update of a given size is as visible."""

    @property
    def combines(self) -> tuple[str, ...]:
        return (self.like,)


class WholeMask(MaskRule):
    """All coordinates of the parameters that match every list given, by the names `vlopd mask show` prints.

    `{components = ["language"], modules = ["ffn"]}` is the language model's feed-forward layers.
    """

    type: Literal["whole"] = "whole"
    components: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    """`ffn` and `attention` stand for their matrices."""

    @model_validator(mode="after")
    def check_any(self) -> WholeMask:
        if not (self.components or self.layers or self.modules):
            raise ValueError("give components, layers or modules")
        return self


class Combination(MaskRule):
    masks: tuple[str, ...] = Field(min_length=2)

    @property
    def combines(self) -> tuple[str, ...]:
        return self.masks


class UnionMask(Combination):
    """What is in any of the masks."""

    type: Literal["union"] = "union"


class IntersectionMask(Combination):
    """What is in all of the masks."""

    type: Literal["intersection"] = "intersection"


class DifferenceMask(Combination):
    """What is in the first mask and in none of the others."""

    type: Literal["difference"] = "difference"


class ComplementMask(MaskRule):
    """What is not in the mask."""

    type: Literal["complement"] = "complement"
    mask: str

    @property
    def combines(self) -> tuple[str, ...]:
        return (self.mask,)


class FileMask(MaskRule):
    """A mask file made elsewhere, such as another run's masks/top.safetensors."""

    type: Literal["file"] = "file"
    path: str


MaskConfig = Annotated[
    VisibleMask
    | TopFractionMask
    | EnergyMask
    | MagnitudeMask
    | PrincipalMask
    | RandomMask
    | WholeMask
    | UnionMask
    | IntersectionMask
    | DifferenceMask
    | ComplementMask
    | FileMask,
    Field(discriminator="type"),
]


class SourceArm(Section):
    """The student before any training."""

    type: Literal["source"] = "source"


class TeacherArm(Section):
    """A teacher as it is, without its context."""

    type: Literal["teacher"] = "teacher"
    teacher: str | None = None
    """Which, where there are several."""


Table = dict[str, Any]
"""A part of a section, put over the run's own as an override would be."""


class Subspace(Section):
    """The subspace that an early update spans, matrix by matrix ("subspace locking", arXiv 2606.07082).

    Each matrix's gradient is projected on it before clipping and the optimizer. Matrices that the early
    checkpoint had not moved stay; vectors train as they are.
    """

    of: str
    """The checkpoint whose delta from the source gives the subspace, e.g. `full@12`; see masks."""
    rank: int = Field(16, gt=0)
    side: Literal["right", "left", "both"] = "right"
    """G V V^T, U U^T G, or both."""


class DistillArm(Section):
    """On-policy distillation from the source; with a mask, only its coordinates train.

    Sections given here hold for this arm alone: `loss = {type = "forward_kl"}` varies one factor.
    """

    type: Literal["distill"] = "distill"
    seed: int
    """Seeds the data and the sampling. 1 unless given, and 2 under a mask: one that is tested on the data that
    chose it flatters itself."""
    mask: str | None = None
    teacher: Table | None = None
    data: Table | None = None
    rollout: Table | None = None
    loss: Table | None = None
    reward: Table | None = None
    optim: Table | None = None
    train: Table | None = None
    subspace: Subspace | None = None

    @property
    def own(self) -> dict[str, Table]:
        """The sections that are this arm's own, by name."""
        tables = self.model_dump(include=set(Recipe.model_fields))
        return {name: table for name, table in tables.items() if table is not None}

    @model_validator(mode="before")
    @classmethod
    def fill_seed(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {"seed": 2 if value.get("mask") or value.get("subspace") else 1, **value}
        return value


class TransplantArm(Section):
    """The source plus another arm's delta on the mask; no training."""

    type: Literal["transplant"] = "transplant"
    of: str = "full"
    mask: str


class ExtrapolateArm(Section):
    """The source plus a multiple of an early delta, on the mask where there is one; no training.

    EffOPD (arXiv 2605.11739). The early checkpoint is read as stored: precision.stored = "fp32" keeps all of it.
    """

    type: Literal["extrapolate"] = "extrapolate"
    of: str
    """The early checkpoint, e.g. `full@12`; see masks."""
    factor: float | None = Field(None, gt=0)
    """Of the early delta."""
    norm_of: str | None = None
    """In place of a factor: the arm whose delta's norm, over the whole model, is taken on."""
    mask: str | None = None

    @model_validator(mode="after")
    def check_length(self) -> ExtrapolateArm:
        if (self.factor is None) == (self.norm_of is None):
            raise ValueError("give either factor or norm_of")
        return self


class CheckpointArm(Section):
    """Any model as it is, to be scored beside the others."""

    type: Literal["checkpoint"] = "checkpoint"
    model: str
    """A folder, a hub id or `builtin:NAME`."""


class ImportedArm(Section):
    """Scores that lm-eval gave elsewhere: no model, only answers to the same questions."""

    type: Literal["imported"] = "imported"
    results: str
    """lm-eval's output folder: results_*.json and samples_*.jsonl (its --log_samples)."""


ArmConfig = Annotated[
    SourceArm
    | TeacherArm
    | DistillArm
    | TransplantArm
    | ExtrapolateArm
    | CheckpointArm
    | ImportedArm,
    Field(discriminator="type"),
]


def expand_seeds(tree: Any) -> Any:
    """A mask or arm with `seeds = [7, 8]` is two of them, name-0 and name-1; so is an arm under such a mask."""
    if not isinstance(tree, Mapping):
        return tree
    masks, drawn = expanded(tree.get("masks", {}), {})
    arms, _ = expanded(tree.get("arms", {}), drawn)
    return {**tree, **({"masks": masks} if "masks" in tree else {}), "arms": arms}


def expanded(
    tables: Mapping[str, Any], masks: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tables with those of many seeds written out, and how many each of these became."""
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, table in tables.items():
        is_table = isinstance(table, Mapping)
        seeds = table.get("seeds") if is_table else None
        mask = table.get("mask") if is_table else None
        count = masks.get(mask) if isinstance(mask, str) else None
        if seeds is None and count is None:
            copies = {name: table}
        else:
            if seeds is not None and (not isinstance(seeds, list | tuple) or not seeds):
                raise ValueError(f"{name}.seeds = {seeds!r} must be a list of seeds")
            if seeds is not None and count is not None and len(seeds) != count:
                raise ValueError(
                    f"{name} has {len(seeds)} seeds, and its mask {mask!r} has {count}; give as many"
                )
            copies = {}
            for k in range(count or len(seeds or ())):
                own = {key: value for key, value in table.items() if key != "seeds"}
                own |= {"seed": seeds[k]} if seeds is not None else {}
                own |= {"mask": f"{mask}-{k}"} if count is not None else {}
                copies[f"{name}-{k}"] = own
            counts[name] = len(copies)
        for copy in copies:
            if copy in found:
                raise ValueError(f"{copy!r} is given twice: as itself and by the seeds of another")
        found |= copies
    return found, counts


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


class HeldOutConfig(Section):
    """Scores a small fixed set every so many steps, by the code of the final evaluation (heldout.jsonl)."""

    every: int = Field(gt=0)
    """Steps; the source and the last step are scored too."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """lm-eval task names. Use a validation task: what is looked at while training is no longer held out."""
    limit: int = Field(200, gt=0)
    """The first so many questions of each task."""


class SampledConfig(Section):
    """Several sampled answers a question in place of a greedy one: scores are means over them (mean@n), and
    pass@k stands beside them."""

    n: int = Field(8, gt=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, gt=0)


class EvalConfig(Section):
    tasks: tuple[str, ...] = Field(("shapes",), min_length=1)
    """lm-eval task names: ours (evals/tasks/) and any that lm-eval knows."""
    limit: int | None = Field(None, gt=0)
    """Questions a task; null for all."""
    batch_size: int = Field(64, gt=0)
    fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question, with their pictures; null for what the task says."""
    chat_template: bool | None = None
    """Whether prompts go through the model's chat template; null: where it has one."""
    sampled: SampledConfig | None = None
    """Null: greedy, or what the task says."""
    confidence: float = Field(0.95, gt=0, lt=1)
    bootstrap_draws: int = Field(10_000, gt=0)
    margin: float = Field(0.02, gt=0, lt=1)
    """How much worse than full, in units of the score, a subnetwork may be and still count as no worse."""
    contrasts: tuple[str, ...] | None = None
    """The contrasts that the experiment is about, each "arm - arm" ("subnetwork - random" is the mean of its random
    controls): Holm's adjustment is over these. Null: over all that are reported."""
    keep_images: int = Field(32, ge=0)
    """Pictures of the first questions that are kept for the report's examples."""
    during: HeldOutConfig | None = None
    """A look at held-out questions while an arm trains; it decides nothing."""


class Recipe(Section):
    """How an arm is trained: the sections that an arm may have of its own."""

    teacher: TeachersConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = ReverseKL()
    reward: RewardConfig | None = None
    optim: OptimConfig = AdamW()
    train: TrainConfig

    @model_validator(mode="after")
    def check_recipe(self) -> Recipe:
        """The loss and the reward can be had from the completions that there are."""
        rollout, writers = self.rollout, set(self.rollout.source.shares)
        if isinstance(self.loss, NLL) and "student" in writers:
            raise ValueError(
                "loss nll on the student's own samples only repeats them; set rollout.source to "
                '"data" or "teacher"'
            )
        if isinstance(self.loss, Estimator) and not rollout.is_on_policy:
            raise ValueError(
                f"loss {self.loss.type} is a mean over the student's own samples; set rollout.source = "
                '"student", or a loss over the vocabulary'
            )
        if "teacher" in writers and isinstance(self.teacher, MixedTeachers):
            raise ValueError("rollout.source: mixed teachers grade together, but cannot sample")
        if self.reward is not None and not rollout.is_on_policy:
            raise ValueError('reward needs the student\'s own samples: rollout.source = "student"')
        if self.reward is not None and rollout.completions_per_prompt < 2:
            raise ValueError(
                "reward compares completions of one prompt; set rollout.completions_per_prompt = 8, say"
            )
        return self

    @property
    def notes(self) -> list[str]:
        """What the settings make untrue or meaningless, for the log and the arm's record."""
        found = []
        if isinstance(self.loss, Estimator) and not self.rollout.is_students_distribution:
            found.append(
                f"loss {self.loss.type} is no longer unbiased: rollout.temperature, top_k or top_p sample "
                "another distribution than the student's own"
            )
        if self.reward is not None and not self.rollout.is_students_distribution:
            found.append(
                "the reward's policy gradient is biased: rollout.temperature, top_k or top_p sample another "
                "distribution than the student's own"
            )
        if not self.rollout.is_on_policy:
            found.append(
                "logprob_gap is of the completions that the student itself wrote, if there are any"
            )
        return found


class TrackingConfig(Section):
    """Where the training curves go besides metrics.jsonl, through accelerate."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """wandb runs offline unless WANDB_MODE says otherwise."""


Name = Annotated[str, Field(pattern=NAME)]


class ExperimentConfig(Recipe):
    """One experiment: everything that decides its numbers."""

    name: str = Field(pattern=NAME)
    title: str = ""
    student: Annotated[ModelConfig, BeforeValidator(as_table)]
    precision: PrecisionConfig = PrecisionConfig()
    masks: dict[Name, MaskConfig] = {}
    """A random one with `seeds = [7, 8]` is two, NAME-0 and NAME-1; so is an arm under it."""
    arms: dict[Name, ArmConfig]
    geometry: GeometryConfig = GeometryConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    def of_arm(self, arm: DistillArm) -> ExperimentConfig:
        """The experiment as this arm sees it: its own sections put over the run's.

        Raises ConfigError where they do not fit.
        """
        if not arm.own:
            return self
        tree = self.model_dump(mode="json", include=set(Recipe.model_fields), exclude_none=True)
        merge(tree, arm.own)
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(map(explain, error.errors()))) from None
        return self.model_copy(update={k: v for k, v in recipe if k in arm.own})

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

    @model_validator(mode="before")
    @classmethod
    def expand(cls, tree: Any) -> Any:
        return expand_seeds(tree)

    @model_validator(mode="after")
    def check_references(self) -> ExperimentConfig:
        """Every mask and arm that is named exists, and what it is made from comes before it."""

        def need(names: Mapping[str, Any], name: str, where: str) -> None:
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not among {sorted(names)}")

        for name, mask in self.masks.items():
            for other in mask.combines:
                key = "like" if isinstance(mask, RandomMask) else "mask(s)"
                need(self.masks, other, f"masks.{name}.{key}")
            if mask.reads is not None:
                self._check_checkpoint(mask.reads, f"masks.{name}.of")
        for name, arm in self.arms.items():
            if isinstance(arm, DistillArm):
                try:
                    self.of_arm(arm)
                except ConfigError as error:
                    raise ValueError(f"arms.{name}: {error}") from None
            if isinstance(arm, TeacherArm):
                if arm.teacher is None and len(self.teachers) > 1:
                    raise ValueError(
                        f"arms.{name}.teacher must say which of {sorted(self.teachers)} it is"
                    )
                need(
                    self.teachers, arm.teacher or next(iter(self.teachers)), f"arms.{name}.teacher"
                )
            for where, checkpoint in checkpoints_of(arm).items():
                self._check_checkpoint(checkpoint, f"arms.{name}.{where}")
            mask_name = mask_of(arm)
            if mask_name is not None:
                need(self.masks, mask_name, f"arms.{name}.mask")
            self._refuse_cycle(name)
            if (
                isinstance(arm, DistillArm)
                and arm.mask
                and isinstance(self.of_arm(arm).optim, Muon)
            ):
                self._refuse_cut_matrices(name, arm.mask)
        for name in self.geometry.arms:
            need(self.arms, name, "geometry.arms")
            if isinstance(self.arms[name], (ImportedArm, CheckpointArm)):
                raise ValueError(
                    f"geometry.arms: {name} is no arm of this student; use `vlopd geometry SOURCE TRAINED`"
                )
        for contrast in self.eval.contrasts or ():
            a, dash, b = contrast.partition(" - ")
            if not dash:
                raise ValueError(f'eval.contrasts: {contrast!r} is not "arm - arm"')
            need(self.arms, a, "eval.contrasts")
            need({**self.arms, RANDOM: None}, b, "eval.contrasts")
        return self

    def _check_checkpoint(self, text: str, where: str) -> None:
        reference = Reference.parse(text)
        if reference.path is not None:
            return
        if reference.arm not in self.arms:
            raise ValueError(f"{where} names {text!r}, which is not among {sorted(self.arms)}")
        if reference.step is None:
            return
        arm = self.arms[reference.arm]
        if not isinstance(arm, DistillArm):
            raise ValueError(f"{where} names {text!r}, but {reference.arm} is not trained")
        train = self.of_arm(arm).train
        if reference.step not in train.keep_steps or reference.step > train.steps:
            raise ValueError(
                f"{where} names {text!r}, but of {train.steps} steps train.keep_steps keeps "
                f"{list(train.keep_steps)}; put {reference.step} there"
            )

    def _refuse_cut_matrices(self, arm: str, mask: str) -> None:
        """Before the first arm trains; the mask itself is looked at again before this one does."""
        if not self._takes_whole_matrices(mask):
            raise ValueError(
                f"arms.{arm}: Muon orthogonalises whole matrices, and the mask {mask!r} takes coordinates out "
                'of them; train all arms with another optimizer, such as optim.type = "adamw"'
            )

    def _takes_whole_matrices(self, mask: str) -> bool:
        """As far as the rule tells; what a file holds is seen when it is read."""
        rule = self.masks[mask]
        if isinstance(rule, RandomMask) and rule.match in ("global", "module"):
            return False
        if rule.combines:
            return all(self._takes_whole_matrices(other) for other in rule.combines)
        whole = isinstance(rule, TopFractionMask) and rule.fraction == 1
        return whole or isinstance(rule, (WholeMask, FileMask))

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
            parents = [Reference.parse(text).arm for text in checkpoints_of(config).values()]
            mask = mask_of(config)
            if mask is not None:
                parents += [Reference.parse(text).arm for text in self.read_by(mask)]
            for parent in parents:
                if parent is not None and parent not in found:
                    found.append(parent)
                    queue.append(parent)
        return found

    def read_by(self, mask: str, above: tuple[str, ...] = ()) -> list[str]:
        """The checkpoints that a mask is made from, through all masks that it is made from."""
        if mask in above:
            raise ValueError(f"masks.{mask}: leads back to itself by {' <- '.join(above)}")
        rule = self.masks[mask]
        found = [] if rule.reads is None else [rule.reads]
        for other in rule.combines:
            if other in self.masks:
                found += self.read_by(other, (*above, mask))
        return list(dict.fromkeys(found))


RANDOM = "random"
"""In eval.contrasts, the mean of an arm's random controls."""


def checkpoints_of(arm: ArmConfig) -> dict[str, str]:
    """The checkpoints that an arm reads, by the key that names them."""
    if isinstance(arm, DistillArm) and arm.subspace is not None:
        return {"subspace.of": arm.subspace.of}
    if isinstance(arm, ExtrapolateArm):
        return {"of": arm.of} | ({} if arm.norm_of is None else {"norm_of": arm.norm_of})
    return {"of": arm.of} if isinstance(arm, TransplantArm) else {}


def mask_of(arm: ArmConfig) -> str | None:
    return arm.mask if isinstance(arm, (DistillArm, TransplantArm, ExtrapolateArm)) else None


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


AnySection = TypeVar("AnySection", bound=Section)


def section_of(cls: type[AnySection], tree: dict[str, Any], settings: Sequence[str]) -> AnySection:
    """One section of a config by itself, with TOML lines over it. Raises ConfigError as load_config does."""
    for line in settings:
        merge(tree, parse_override(line))
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("--set: " + "; ".join(map(explain, error.errors()))) from None


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
