"""The source of completions and the training objective: rollout, loss, reward."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from vlopd.config.base import (
    Count,
    Part,
    PartOrZero,
    Section,
    Share,
    Signed,
    Size,
    Temperature,
    Weight,
    as_type,
    later,
)
from vlopd.config.engines import RolloutEngineConfig
from vlopd.config.functions import IS_BUILT_IN, IS_OWN, KIND, Function
from vlopd.plugins import Plugin

Writer = Literal["student", "teacher", "data"]
"""The source of one completion."""


class OneSource(Section):
    """All completions are the student's samples (OPD), the teacher's (sequence-level KD), or the data's (SFT)."""

    type: Writer = "student"

    @property
    def shares(self) -> dict[Writer, float]:
        return {self.type: 1.0}


class MixedSource(Section):
    """Each completion is drawn from one of several (GKD, arXiv 2306.13649: lambda is the student's share)."""

    type: Literal["mixture"] = "mixture"
    student: Weight = 0.0
    """Relative weight of the student's samples."""
    teacher: Weight = 0.0
    """Relative weight of the teacher's samples."""
    data: Weight = 0.0
    """Relative weight of the data's answers."""

    @property
    def shares(self) -> dict[Writer, float]:
        """Unnormalised probabilities of the writers, those above 0."""
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


SourceConfig = Annotated[
    Annotated[OneSource | MixedSource, Field(discriminator="type")], BeforeValidator(as_type)
]


class RolloutConfig(Section):
    """Where completions come from, and how they are sampled."""

    source: SourceConfig = OneSource()
    """Where completions come from: `student` (OPD), `teacher`, `data`, or a mixture."""
    max_new_tokens: Size = 16
    """Largest number of completion tokens; longer answers of the data are truncated."""
    completions_per_prompt: Size = 1
    """Completions sampled per prompt; a reward compares them and needs at least 2."""
    batch: Count | None = None
    """Completions sampled at once in a process, whatever train.micro_batch is; null: all of the step's, or as many as
    fit in the memory that is free before the first step."""
    temperature: Temperature = 1.0
    """Sampling temperature; a loss has its own temperatures."""
    top_k: Count | None = None
    """Top-k sampling: keep the k most likely tokens, after the temperature; null for all."""
    top_p: Share = 1.0
    """Nucleus sampling: keep the smallest set of most likely tokens with this mass, after top_k."""
    engine: RolloutEngineConfig = "eager"
    """Decode steps: `eager`, `static` (a cache of fixed shape) or `graphs` (that and a captured CUDA graph; not yet
    measured on a GPU); a family that fails the conformance test, and a device without CUDA, falls back to `eager`. A
    table such as {type = "vlopd"} or {type = "vllm"}: in another process (docs/engines.md)."""

    max_lag: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps that the weights of completions may be behind those that train on them: 0, or 1 with an engine, which then
    samples the next step's while a step trains. k1 and rewards correct for it by probability ratios."""

    @model_validator(mode="after")
    def check_lag(self) -> RolloutConfig:
        if self.max_lag and (isinstance(self.engine, str) or not self.is_on_policy):
            raise ValueError(
                "max_lag = 1 samples in another process, the student's completions alone: it needs "
                'engine = {type = "vlopd"} and source = "student"'
            )
        return self

    @property
    def decode(self) -> Literal["eager", "static", "graphs"]:
        """The engine of the decode steps, wherever they run."""
        return self.engine if isinstance(self.engine, str) else self.engine.decode

    @property
    def is_on_policy(self) -> bool:
        """Whether the student writes every completion."""
        return set(self.source.shares) == {"student"}

    @property
    def is_students_distribution(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, at temperature 1, untruncated."""
        return self.temperature == 1 and self.top_k is None and self.top_p == 1


class FullSupport(Section):
    """The whole shared vocabulary."""

    type: Literal["full"] = "full"


class TopK(Section):
    """The k most likely tokens at each position; the selection is not differentiated."""

    k: Count = 64
    """Tokens kept, per model."""
    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """Treatment of the other tokens: `bucket` merges them into one token (a divergence again), `renormalise` divides by
    the mass inside (0 where one model bans all tokens inside), `none` omits them (not a divergence: the KLs can be
    negative)."""


class TeacherTopK(TopK):
    """The teacher's k most likely tokens."""

    type: Literal["teacher_top_k"] = "teacher_top_k"


class StudentTopK(TopK):
    """The student's k most likely tokens."""

    type: Literal["student_top_k"] = "student_top_k"


class UnionTopK(TopK):
    """Tokens among the k most likely of either model, k to 2k of them."""

    type: Literal["union"] = "union"


class IntersectionTopK(TopK):
    """Tokens among the k most likely of both models, 0 to k of them."""

    type: Literal["intersection"] = "intersection"


SupportConfig = Annotated[
    FullSupport | TeacherTopK | StudentTopK | UnionTopK | IntersectionTopK,
    Field(discriminator="type"),
]


class TokenSelection(Section):
    """The tokens of each completion that have a loss, a fixed number by its length; the others' is 0.

    Means are over the selected tokens: `token_mean` and `sequence_mean` divide by their number in the step and in the
    completion, `fixed_length` by completions times the number selected of rollout.max_new_tokens. Ties go to the
    earlier token. Diagnostics are of all tokens.
    """

    by: Literal["student_entropy", "divergence", "position", "least_likely"]
    """The highest entropy of the student (TIP, arXiv 2604.14084), the highest reverse KL from the teacher, the first
    ones, or those of the lowest probability under the sampler (the student itself at the data's tokens, of which there
    is no sampler)."""
    fraction: Share
    """Fraction of a completion's tokens, rounded up to a whole number, so at least one."""


class Loss(Section):
    """Settings of all losses. Computed in chunks of tokens; the result does not depend on their size."""

    chunk_tokens: Count = 1024
    """Completion tokens whose [*, V] logits are in memory at once, forward and backward."""
    normalisation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Reduction of a step's token losses, over all micro-batches and processes. `token_mean` divides the sum by the
    step's completion tokens; `sequence_mean` averages the completions' means, so that short ones weigh as much as
    long ones; `fixed_length` divides the sum by completions times rollout.max_new_tokens."""
    tokens: TokenSelection | None = later(None)
    """The tokens that have a loss, as in `{by = "student_entropy", fraction = 0.3}`; null for all."""


class Divergence(Loss):
    """A sum over a support at every completion token. Below, q is the student and p the teacher."""

    support: SupportConfig = FullSupport()
    """The tokens over which the divergence is summed."""
    student_temperature: Temperature = 1.0
    """Divides the student's logits in the loss (the sampling has its own, rollout.temperature)."""
    teacher_temperature: Temperature = 1.0
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
    """KL(q || p) = sum_v q_v log(q_v / p_v): on-policy distillation, mode-seeking."""

    type: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Divergence):
    """KL(p || q) = sum_v p_v log(p_v / q_v): knowledge distillation, mass-covering."""

    type: Literal["forward_kl"] = "forward_kl"


class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649)."""

    type: Literal["jsd"] = "jsd"
    beta: Weight = Field(0.5, le=1)
    """Teacher's weight in the mixture m, a fraction."""
    normalised: bool = False
    """Divides by beta (1 - beta): forward KL at 0, reverse KL at 1, continuous, and of equal curvature at q = p."""

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
    alpha: PartOrZero = 0.1
    """Student's weight in the mixture, a fraction."""


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), at most -log(alpha) (DistiLLM, arXiv 2402.03898)."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: PartOrZero = 0.1
    """Teacher's weight in the mixture, a fraction."""


class FunctionLoss(Function, Divergence):
    """A function (student_logprobs [N, V], teacher_logprobs [N, V], **arguments) -> [N] nats (docs/plugins.md)."""

    model_config = ConfigDict(extra="allow")
    takes: ClassVar[tuple[str, ...]] = ("student_logprobs", "teacher_logprobs")


class SampledToken(Loss):
    """A loss of the sampled tokens' log-probs alone, at temperature 1."""


class NLL(SampledToken):
    """-log q: supervised fine-tuning on the data (no teacher needed), sequence-level KD on the teacher's samples."""

    type: Literal["nll"] = "nll"


class Estimator(SampledToken):
    """The reverse KL from the sampled token alone, d = log q - log p there, both at temperature 1.

    Expectations below are over completions that the student sampled at rollout.temperature 1.
    """


class K1(Estimator):
    """Policy gradient with the advantage -d: its mean is the reverse KL's gradient."""

    type: Literal["k1"] = "k1"
    clip: Part | None = 0.2
    """Largest deviation from 1 of the student's to the sampler's probability ratio (PPO's clip); null for none."""


class ConstantAdvantage(SampledToken):
    """Policy gradient with one advantage for every token, of the student's own samples: no teacher, no reward.

    With advantage -1 at the least likely tokens (`tokens = {by = "least_likely", fraction = 0.2}`) it is the control
    of arXiv 2608.31046; at all tokens its expected gradient is 0.
    """

    type: Literal["constant_advantage"] = "constant_advantage"
    advantage: Signed = -1.0
    """Advantage of every token, in units of the loss; below 0 it makes the sampled tokens less likely."""
    clip: Part | None = 0.2
    """Largest deviation from 1 of the student's to the sampler's probability ratio (PPO's clip); null for none."""


class K2(Estimator):
    """d^2 / 2: its gradient's mean is the reverse KL's."""

    type: Literal["k2"] = "k2"


class K3(Estimator):
    """1 / e^d - 1 + d: its mean is the reverse KL, its gradient's mean the forward KL's."""

    type: Literal["k3"] = "k3"


BuiltInLoss = Annotated[
    ReverseKL
    | ForwardKL
    | JSD
    | SkewReverseKL
    | SkewForwardKL
    | NLL
    | K1
    | K2
    | K3
    | ConstantAdvantage,
    Field(discriminator="type"),
]

LossConfig = Annotated[Annotated[BuiltInLoss, IS_BUILT_IN] | Annotated[FunctionLoss, IS_OWN], KIND]


def whole_teacher_need(loss: LossConfig) -> str | None:
    """What in a loss needs the teacher's whole distribution; None where its log-probs of the completion's token and of
    its own k most likely tokens decide the loss."""
    if loss.tokens is not None and loss.tokens.by == "divergence":
        return 'loss.tokens.by = "divergence"'
    if isinstance(loss, SampledToken):
        return None
    if not isinstance(loss.support, TeacherTopK):
        return f"loss {loss.type} with support {loss.support.type!r}"
    return None if loss.teacher_temperature == 1 else "loss.teacher_temperature"


SCORES_ALONE = (
    "needs the teacher's whole distribution, and vLLM gives log-probs of the sampled token and of its k most likely "
    'ones alone; set loss.support = {type = "teacher_top_k", k = 64} or loss.type = "k1", or teacher.engine = '
    '{type = "vlopd"}'
)


BuiltInRule = Literal[
    "exact_match",
    "verdict_match",
    "answer_named",
    "capital_named",
    "mathematics",
    "number",
    "choice",
    "yes_no",
]


class RewardConfig(Section):
    """Verifiable rewards of whole completions, as group-normalised advantages (GRPO, arXiv 2402.03300).

    The objective is alpha * loss + (1 - alpha) * policy gradient. Under k1, which is a policy gradient too, the
    advantages are mixed: alpha * (log p - log q) + (1 - alpha) * the reward's, clipped together.
    """

    rule: Annotated[Annotated[BuiltInRule, IS_BUILT_IN] | Annotated[Plugin, IS_OWN], KIND]
    """1 for a right completion, 0 for another, by a rule of vlopd/train/rewards.py ("mathematics", "number", "choice"
    and "yes_no" grade as the benchmarks do); or "module:function", a function (example, completion text) -> any finite
    number (docs/plugins.md)."""
    alpha: PartOrZero = 0.0
    """Weight of the loss; 0 is reinforcement learning alone (RLVR), where a teacher, if any, is a diagnostic."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by their group's standard deviation (GRPO) or left (arXiv 2503.20783)."""
    clip: Part | None = 0.2
    """Largest deviation from 1 of the importance ratio (PPO's clip), also of k1's part; null for none."""
