"""What is measured of an arm: the geometry of its update, and its scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlopd.config.base import (
    Count,
    Number,
    Part,
    PartOrZero,
    Section,
    Seed,
    Share,
    Temperature,
    Unique,
    between,
)


class GaussianNull(Section):
    """I.i.d. Gaussian noise."""

    type: Literal["gaussian"] = "gaussian"


class RowColumnNull(Section):
    """Gaussian noise with the r.m.s. profile of the observed rows and columns."""

    type: Literal["row_column"] = "row_column"


class PermutedNull(Section):
    """The observed update's own entries, in random places of the same tensor among weights of one binade."""

    type: Literal["permuted"] = "permuted"


class SignFlippedNull(Section):
    """The observed update with random signs."""

    type: Literal["sign_flipped"] = "sign_flipped"


class LowRankNull(Section):
    """The product of two Gaussian matrices of this rank."""

    type: Literal["low_rank"] = "low_rank"
    rank: Count = 8


class UlpNull(Section):
    """Gaussian noise in proportion to |w|: in a stored precision, one ulp here and there."""

    type: Literal["ulp"] = "ulp"


NullConfig = Annotated[
    GaussianNull | RowColumnNull | PermutedNull | SignFlippedNull | LowRankNull | UlpNull,
    Field(discriminator="type"),
]


class GeometryConfig(Section):
    arms: Annotated[tuple[str, ...], Unique] = ("full",)
    nulls: tuple[NullConfig, ...] = (GaussianNull(),)
    """Each has the observed norm, tensor by tensor, after rounding to the stored precision."""
    null_draws: Number = 3
    """Draws of each null."""
    seed: Seed = 0
    ratios: Annotated[tuple[Part, ...], Unique] = Field(
        (0.01, 0.05, 0.1, 0.2), min_length=1, max_length=7
    )
    """Fractions for principal subspaces, magnitude masks and energy shares."""
    factorisation: Literal["gram", "svd"] = "gram"
    """`gram`: singular values down to 1e-7 of the largest; `svd`: all of them, several times slower."""
    max_exact_side: Count = 4096
    max_exact_cost: Annotated[float, between(1, 1e30)] = 1e12
    """Matrices with a longer shorter side, or m n min(m, n) above this, are factorised approximately."""
    max_left_out: PartOrZero = 0.01
    """The largest part of either checkpoint that may have no partner in the other; more is refused."""


class HeldOutConfig(Section):
    """Scores a small fixed set every so many steps, by the code of the final evaluation (heldout.jsonl)."""

    every: Count
    """Steps; the base and the last step are scored too."""
    tasks: Annotated[tuple[str, ...], Unique] = Field(min_length=1)
    """lm-eval task names. Use a validation task: what is looked at while training is no longer held out."""
    limit: Count = 200
    """The first so many questions of each task."""


class SampledConfig(Section):
    """Several sampled answers a question in place of a greedy one: scores are means over them (mean@n), and
    pass@k stands beside them."""

    n: int = Field(8, gt=1, lt=2**31)
    temperature: Temperature = 1.0
    top_p: Share = 1.0
    top_k: Count | None = None


class EvalConfig(Section):
    tasks: Annotated[tuple[str, ...], Unique] = Field(("shapes",), min_length=1)
    """lm-eval task names: ours (evals/tasks/), any that lm-eval knows, and those in `include`."""
    include: str | None = None
    """A folder with more task files, as lm-eval's --include_path."""
    limit: Count | None = None
    """Questions a task; null for all."""
    batch_size: Count = 64
    fewshot: Number | None = None
    """Solved examples before each question, with their pictures; null for what the task says."""
    chat_template: bool | None = None
    """Whether prompts go through the model's chat template; null: where it has one."""
    sampled: SampledConfig | None = None
    """Null: greedy, or what the task says."""
    confidence: Part = 0.95
    bootstrap_draws: Count = 10_000
    margin: Part = 0.02
    """How much worse than full, in units of the score, a subnetwork may be and still count as no worse."""
    contrasts: Annotated[tuple[str, ...], Unique, Field(min_length=1)] | None = None
    """The contrasts that the experiment is about, between any two arms, "arm - arm", or an arm and the mean of its
    random controls, "subnetwork - random". They are the family of Holm's correction; those that follow from the arms'
    roles stand beside them, uncorrected. Null: the family is all that follow from the roles."""
    keep_images: Number = 32
    """Pictures of the first questions that are kept for the report's examples."""
    during: HeldOutConfig | None = None
    """A look at held-out questions while an arm trains; it decides nothing."""
