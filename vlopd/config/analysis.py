"""Settings of the analyses of an arm: geometry of its update, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlopd.config.base import (
    Count,
    Draws,
    Number,
    Part,
    PartOrZero,
    Section,
    Seed,
    Share,
    Size,
    Temperature,
    Unique,
    between,
)


class Null(Section):
    """A model of random updates."""

    type: str

    @property
    def name(self) -> str:
        """The name in the `null` column: its type, with the rank of a `low_rank`."""
        return self.type


class GaussianNull(Null):
    """I.i.d. Gaussian noise. Its p rejects the update of any optimizer, also on gradients of noise."""

    type: Literal["gaussian"] = "gaussian"


class AdamNull(Null):
    """AdamW on gradients of i.i.d. Gaussian noise: per coordinate a sum of bounded, correlated steps."""

    type: Literal["adam"] = "adam"
    steps: Count = 100
    """Number of steps; best those of the training."""
    betas: tuple[PartOrZero, PartOrZero] = (0.9, 0.999)
    """Decay per step of AdamW's averages of gradients and of squared gradients."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate: none, or linear or cosine to 0 after the last step."""


class WalkNull(Null):
    """Gaussian steps of equal size, with the weights rounded to bf16 after each."""

    steps: Count = 40
    """Number of steps; best those of the training."""


class Bf16WalkNull(WalkNull):
    """Gaussian steps of equal size, with the weights rounded to the nearest bf16 after each."""

    type: Literal["bf16_walk"] = "bf16_walk"


class StochasticBf16WalkNull(WalkNull):
    """Gaussian steps of equal size, with the weights rounded stochastically to bf16 after each."""

    type: Literal["bf16_walk_stochastic"] = "bf16_walk_stochastic"


class RowColumnNull(Null):
    """Gaussian noise with the observed r.m.s. of rows and columns."""

    type: Literal["row_column"] = "row_column"


class PermutedNull(Null):
    """The observed update's entries, permuted within each tensor and binade of |w|."""

    type: Literal["permuted"] = "permuted"


class SignFlippedNull(Null):
    """The observed update with random signs."""

    type: Literal["sign_flipped"] = "sign_flipped"


class LowRankNull(Null):
    """The product of two Gaussian matrices of this rank."""

    type: Literal["low_rank"] = "low_rank"
    rank: Count = 8
    """Rank of the product."""

    @property
    def name(self) -> str:
        return f"low_rank:{self.rank}"


class UlpNull(Null):
    """Gaussian noise proportional to |w|: single-ulp changes in a stored precision."""

    type: Literal["ulp"] = "ulp"


NullConfig = Annotated[
    GaussianNull
    | AdamNull
    | Bf16WalkNull
    | StochasticBf16WalkNull
    | RowColumnNull
    | PermutedNull
    | SignFlippedNull
    | LowRankNull
    | UlpNull,
    Field(discriminator="type"),
]


class GeometryConfig(Section):
    """Geometry of the updates of some arms, compared with nulls."""

    arms: Annotated[tuple[str, ...], Unique] = ("full",)
    """Arms whose update from the base is measured."""
    nulls: tuple[NullConfig, ...] = (GaussianNull(), AdamNull())
    """Null models; each draw has the observed norm of each tensor after rounding to the stored precision."""
    null_draws: Annotated[int, Field(ge=0, le=10_000)] = 5
    """Draws of each null; with fewer than 5 there is no p."""
    seed: Seed = 0
    """Seed of the null draws and of randomised factorisations."""
    ratios: Annotated[tuple[Part, ...], Unique] = Field(
        (0.01, 0.05, 0.1, 0.2), min_length=1, max_length=7
    )
    """Fractions for principal subspaces, magnitude masks and energy shares."""
    factorisation: Literal["gram", "svd"] = "gram"
    """`gram`: resolves singular values down to 1e-7 of the largest; `svd`: all, several times slower."""
    max_exact_side: Count = 4096
    """Largest min(m, n) of a matrix that is factorised exactly, in rows; others are `approximate`."""
    max_exact_cost: Annotated[float, between(1, 1e30)] = 1e12
    """Largest m n min(m, n) of a matrix that is factorised exactly, in multiplications; others are `approximate`."""
    max_left_out: PartOrZero = 0.01
    """The largest fraction of either checkpoint's parameters that may be unpaired; more is refused."""
    equal_ratio: Annotated[float, between(1 + 1e-6, 1e6)] = 1.25
    """Two groups of arms are equivalent in a positive measure where the ratio of their means is shown to be below this,
    either way."""
    equal_difference: Part = 0.05
    """The same of shares and cosines: where the difference of their means is shown to be below this, either way."""

    @property
    def of_update(self) -> dict[str, Any]:
        """The settings that the measures of one update, or of a pair of updates, depend on."""
        return self.model_dump(mode="json", exclude={"arms", "equal_ratio", "equal_difference"})

    @model_validator(mode="after")
    def check_nulls(self) -> GeometryConfig:
        names = [null.name for null in self.nulls]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"nulls: two are named {twice}, and rows name their null; keep one")
        return self


class HeldOutConfig(Section):
    """Evaluates a small fixed set during training, with the code of the final evaluation (heldout.jsonl)."""

    every: Count
    """Interval in steps; the base and the last step are evaluated too."""
    tasks: Annotated[tuple[str, ...], Unique] = Field(min_length=1)
    """lm-eval task names. Use a validation task: a test set monitored during training is no longer held out."""
    limit: Count = 200
    """Number of questions per task, from the first."""


class SampledConfig(Section):
    """Samples several answers per question instead of one greedy answer: scores are means over them (mean@n), with
    pass@k."""

    n: int = Field(8, gt=1, le=10_000)
    """Answers per question."""
    temperature: Temperature = 1.0
    """Sampling temperature; divides the logits."""
    top_p: Share = 1.0
    """Nucleus sampling: keep the smallest set of most likely tokens with this probability mass, a fraction."""
    top_k: Count | None = None
    """Top-k sampling: keep the k most likely tokens; null for all."""


class GenerationConfig(Section):
    """Overrides of a task's generation settings; null keeps the task's own."""

    max_tokens: Size | None = None
    """Largest number of tokens of an answer, thought included."""
    temperature: Annotated[float, between(0, 100)] | None = None
    """Sampling temperature, which divides the logits; 0 is greedy, one answer also under `sampled`."""
    top_p: Share | None = None
    """Nucleus sampling: keep the smallest set of most likely tokens with this probability mass, a fraction."""
    top_k: Count | None = None
    """Top-k sampling: keep the k most likely tokens."""
    stops: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that end an answer and are no part of it; an empty list for none."""

    def over(self, other: GenerationConfig) -> GenerationConfig:
        """These settings, and those of `other` where these are null."""
        own = self.model_dump(exclude_none=True)
        return other.model_copy(update=own)


class ValidationConfig(Section):
    """The split on which tuned arms (`sweep`) choose their settings, with the settings of `eval`."""

    tasks: Annotated[tuple[str, ...], Unique] = Field(min_length=1)
    """lm-eval task names, none of which is in eval.tasks."""
    limit: Count | None = None
    """Number of questions per task, from the first; null for all."""
    generation: dict[str, GenerationConfig] = Field(default_factory=dict)
    """As eval.generation, for these tasks; the "*" of eval.generation holds here too."""
    metric: dict[str, str] = Field(default_factory=dict)
    """As eval.metric, for these tasks."""


class EvalConfig(Section):
    """Evaluation of the arms on lm-eval tasks, and their comparison."""

    tasks: Annotated[tuple[str, ...], Unique] = Field(("shapes",), min_length=1)
    """lm-eval task names: built-in (evals/tasks/), lm-eval's own, and those in `include`; of an image task also
    `TASK@no_picture` and `TASK@other_picture`."""
    include: str | None = None
    """A folder with more task files, as lm-eval's --include_path."""
    limit: Count | None = None
    """Number of questions per task; null for all."""
    batch_size: Count = 64
    """Prompts, or choices to score, of one forward pass."""
    fewshot: Number | None = None
    """Number of few-shot examples, with their images; null for the task's default."""
    chat_template: bool | None = None
    """Whether to apply the model's chat template; null: if it has one."""
    sampled: SampledConfig | None = None
    """Sampling of several answers per question; null: greedy decoding, or the task's settings."""
    generation: dict[str, GenerationConfig] = Field(default_factory=dict)
    """Overrides of generation settings by task, group or member of a group, "*" for all; a task's own count more than
    its group's, those more than "*"."""
    metric: dict[str, str] = Field(default_factory=dict)
    """The metric on which a task or group is compared, in place of the first that it reports; `metric,filter` for that
    of another filter."""
    max_pixels: Count | None = None
    """Largest area of a picture in pixels: larger ones are downscaled in their shape before the model's processor; null
    for none."""
    confidence: Part = 0.95
    """Confidence level of all intervals, a fraction."""
    bootstrap_draws: Draws = 10_000
    """Bootstrap resamples per interval."""
    margin: Part = 0.02
    """Non-inferiority margin of a subnetwork against the full arm, in units of the score."""
    contrasts: Annotated[tuple[str, ...], Unique, Field(min_length=1)] | None = None
    """The contrasts that the experiment is about, between any two arms, "arm - arm", or an arm and the mean of its
    random controls, "subnetwork - random". They are the family of Holm's correction; those that follow from the arms'
    roles stand beside them, uncorrected. Null: the family is all that follow from the roles."""
    keep_images: Number = 32
    """Questions, from the first, whose images are kept for the report's examples."""
    during: HeldOutConfig | None = None
    """Periodic held-out evaluation during training; never affects training."""
    validation: ValidationConfig | None = None
    """The split on which tuned arms choose their settings; these are not evaluated on eval.tasks before the choice."""

    @property
    def of_task(self) -> dict[str, Any]:
        """The settings that the results of every task depend on."""
        asked = {"limit", "batch_size", "fewshot", "chat_template", "sampled"}
        return self.model_dump(mode="json", include=asked)

    @property
    def for_validation(self) -> EvalConfig:
        """The settings of the evaluation on the validation split."""
        assert self.validation is not None
        its = dict(self.validation)
        its["generation"] = {k: v for k, v in self.generation.items() if k == "*"} | its[
            "generation"
        ]
        nothing = {"keep_images": 0, "during": None, "contrasts": None}
        return self.model_copy(update={**its, **nothing})

    @model_validator(mode="after")
    def check_validation(self) -> EvalConfig:
        """No task is in both splits, also not as a variant without its pictures."""
        tested = {task.partition("@")[0] for task in self.tasks}
        for task in self.validation.tasks if self.validation else ():
            if task.partition("@")[0] in tested:
                raise ValueError(
                    f"validation.tasks: {task!r} is in eval.tasks too, which chosen settings are tested on; use "
                    "another split"
                )
        return self
