"""Optimizers of the trained coordinates, and the loop's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from vlopd.config.base import (
    SMALLEST,
    Count,
    Number,
    PartOrZero,
    Positive,
    Section,
    Size,
    Unique,
    between,
    later,
)
from vlopd.plugins import Plugin

Factor = Annotated[float, between(SMALLEST, 1e6)]
WeightDecay = Annotated[float, between(SMALLEST, 1e6, or_zero=True)]


class ComponentRates(Section):
    """Factors of the learning rate by component (models/parameter_names.py); component "other" has factor 1."""

    vision: Factor = 1.0
    """Factor of the vision tower's learning rate."""
    projector: Factor = 1.0
    """Factor of the projector's learning rate."""
    language: Factor = 1.0
    """Factor of the language model's learning rate, embedding and head excepted."""
    embedding: Factor = 1.0
    """Factor of the embedding's learning rate; a head tied to the embedding counts as embedding."""
    head: Factor = 1.0
    """Factor of the output layer's learning rate."""


Decay = PartOrZero
"""Decay of a running average per step."""

Epsilon = Annotated[float, between(1e-30, 1)]
"""Added to the root of a second moment: with 0, a coordinate without gradients is 0 / 0."""


class OptimizerBase(Section):
    """Settings of all optimizers. They update the fp32 values of the trained coordinates and nothing else."""

    learning_rate: Positive = 1e-6
    """Peak learning rate: the factor of the optimizer's step, in units of the weights."""
    component_rates: ComponentRates = ComponentRates()
    """`{vision = 0.1}` trains the vision tower at a tenth of the rate; to freeze it: train.freeze."""
    weight_decay: WeightDecay = 0.0
    """Decay of the trained values towards 0. AdamW, Lion and Muon: values *= 1 - rate * decay. SGD and RMSProp add
    decay * values to the gradient. A parameter unused in a step (a vision tower, without a picture) is skipped, decay
    and momentum included."""
    max_grad_norm: Positive | None = 1.0
    """Largest norm of the gradient over trained coordinates, in units of the gradient; null for no clipping."""
    warmup_steps: Number = 0
    """Steps of linear warm-up from near 0 to the learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up: none, or linear or cosine to 0 after the last step."""


class AdamW(OptimizerBase):
    """torch.optim.AdamW (arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay per step of the averages of gradients and of squared gradients."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment, in units of the gradient."""
    state_bits: Literal[32, 8] = later(32)
    """Bits of each stored moment: fp32, or 8 with a scale for each 256 (arXiv 2110.02861), decoded for a step alone."""


class SGD(OptimizerBase):
    """torch.optim.SGD: b = momentum * b + g (b = g at first), values -= rate * b; without dampening."""

    type: Literal["sgd"] = "sgd"
    momentum: Decay = 0.9
    """Decay of the momentum per step."""
    nesterov: bool = False
    """Whether the update is along g + momentum * b."""

    @model_validator(mode="after")
    def check_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class RMSProp(OptimizerBase):
    """torch.optim.RMSprop: AdamW's second moment alone, without bias correction."""

    type: Literal["rmsprop"] = "rmsprop"
    alpha: Decay = 0.99
    """Decay of the average of squared gradients."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment, in units of the gradient."""
    momentum: Decay = 0.0
    """Decay of the momentum per step; 0 for none."""


class Lion(OptimizerBase):
    """timm's Lion (arXiv 2302.06675): the sign of a moving average; rates of a third to a tenth of AdamW's."""

    type: Literal["lion"] = "lion"
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay per step of the average in the sign, and of the average that is kept."""


class Muon(OptimizerBase):
    """torch.optim.Muon: updates hidden matrices along their orthogonalised momentum.

    AdamW updates the rest: embeddings, positions, head, norms, biases, and tensors that are not two-dimensional. Fused
    matrices are orthogonalised as stored. A mask must contain each hidden matrix whole or not at all.
    """

    type: Literal["muon"] = "muon"
    momentum: Decay = 0.95
    """Decay of the momentum per step."""
    nesterov: bool = True
    """Whether the update is along g + momentum * b."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's rate: 0.2 sqrt(max(m, n)), for which AdamW's rates suit (arXiv 2502.16982), or the original
    sqrt(max(1, m / n))."""
    adamw_learning_rate: Positive | None = None
    """Learning rate of AdamW's part, in units of the weights; null for `learning_rate`."""
    adamw_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay per step of AdamW's averages of gradients and of squared gradients."""
    adamw_eps: Epsilon = 1e-8
    """Added to the root of AdamW's second moment, in units of the gradient."""


def as_optimizer(value: Any) -> Any:
    """AdamW where no `type` is given."""
    return {"type": "adamw", **value} if isinstance(value, Mapping) else value


OptimConfig = Annotated[
    Annotated[AdamW | SGD | RMSProp | Lion | Muon, Field(discriminator="type")],
    BeforeValidator(as_optimizer),
]


Component = Literal["vision", "projector", "language", "embedding", "head"]


COLUMNS = frozenset(
    {
        *("step", "loss", "kl", "kl_quarter_1", "kl_quarter_2", "kl_quarter_3", "kl_quarter_4"),
        *("student_entropy", "teacher_entropy", "top_overlap_fraction", "logprob_gap"),
        *("student_shared_mass_fraction", "teacher_shared_mass_fraction", "logprob_gap_max"),
        *("truncated_fraction", "repeated_fraction", "reward", "mixed_group_fraction"),
        *("completion_tokens", "mean_completion_tokens", "grad_norm", "learning_rate"),
        *("data_seconds", "rollout_seconds", "teacher_seconds", "student_seconds"),
        *("synchronise_seconds", "sent_bytes", "engine_gap", "rollout_lag"),
        *("update_seconds", "seconds", "tokens_per_second"),
    }
)
"""Columns of metrics.jsonl that the name of a plug-in must not take."""


class TrainConfig(Section):
    """Settings of the training loop."""

    steps: Count
    """Rollouts, each with `updates_per_rollout` optimizer updates."""
    prompts_per_step: Size
    """Prompts of one step over all processes, each with rollout.completions_per_prompt completions."""
    updates_per_rollout: Count = 1
    """Optimizer updates on the same completions, at the step's rate; above 1, k1 and rewards use importance ratios.
    Teachers run one forward pass for all of them; a moving-average teacher is updated once a step, after the last."""
    micro_batch: Count | None = None
    """Completions of one forward and backward pass, sorted by length; null for all of the process's at once."""
    micro_tokens: Count | None = None
    """Tokens of one forward and backward pass instead of `micro_batch`: completions times the longest prompt and the
    longest completion among them, padding included. A longer completion has a pass of its own."""
    activation_checkpointing: bool = False
    """Whether the student's layers keep their inputs alone and run again in the backward pass: less memory, for a third
    more arithmetic. Gradients do not change."""
    teacher_cache_gb: Annotated[float, between(1e-6, 1e6)] | None = None
    """Size of the teachers' hidden states that are kept on disk, so that completions that come again (the data's, a
    teacher's, recorded ones) are read by a teacher once, for all arms of a run; null for none."""
    sharding: Literal["none", "state", "full"] = "none"
    """Of several processes: `state` splits fp32 values, gradients and optimizer state among them, one part each; the
    student's weights stay whole. `full` splits these too, but while it samples or is evaluated. `none`: every process
    has all."""
    master: Literal["fp32", "bf16", "bf16_stochastic"] = later("fp32")
    """Values that the optimizer updates: kept in fp32, or rounded to bf16 after every optimizer step, to the nearest
    (updates below half a unit in the last place are lost) or stochastically (they are kept on average)."""
    offload_optimizer: bool = False
    """Whether fp32 values, gradients and optimizer state are in host memory, where the optimizer then runs; copies
    overlap with computation. Not with Muon."""
    offload_teacher: bool = False
    """Whether teachers' weights are in host memory but for their phase, once a step, and after the training. Output
    layers stay."""
    freeze: Annotated[tuple[Component, ...], Unique] = ()
    """Components of the student that are not trained."""
    save_every: Count = 50
    """Steps between saved states; a killed run resumes from the last."""
    sample_every: Count = 25
    """Steps between sample generations written to samples.jsonl."""
    evidence_every: Count | None = None
    """Steps between optimizer statistics (optimizer.jsonl), which copy the trained values once; null for none."""
    keep_steps: Annotated[tuple[Count, ...], Unique] = ()
    """Steps after which each trained arm keeps a checkpoint, which masks and arms name as in `full@12`."""
    keep_completions: bool = False
    """Whether every step's completions are kept (arms/NAME/completions/) for a signal null that may replay them later;
    those that an arm of the config replays are kept anyway."""
    metrics: Annotated[tuple[Plugin, ...], Unique] = ()
    """Functions "module:function" (example, completion text) -> a number, whose means over a step's completions become
    columns of metrics.jsonl under the functions' names (docs/plugins.md)."""

    @model_validator(mode="after")
    def check_micro_batches(self) -> TrainConfig:
        if self.micro_batch is not None and self.micro_tokens is not None:
            raise ValueError(
                f"micro_batch = {self.micro_batch} and micro_tokens = {self.micro_tokens}: give one of the two"
            )
        return self

    @model_validator(mode="after")
    def check_metrics(self) -> TrainConfig:
        labels = [metric.label for metric in self.metrics]
        for metric, label in zip(self.metrics, labels, strict=True):
            if label in COLUMNS or not label.isidentifier() or labels.count(label) > 1:
                why = "is no name" if not label.isidentifier() else "is taken"
                raise ValueError(
                    f"metrics: {metric}: the column {label!r} of metrics.jsonl {why}; rename the function"
                )
        return self

    @model_validator(mode="after")
    def check_anything_trains(self) -> TrainConfig:
        if set(self.freeze) == set(get_args(Component)):
            raise ValueError(
                f"freeze names all of {', '.join(self.freeze)}: nothing is left to train; leave one out"
            )
        prompts = self.steps * self.prompts_per_step
        if prompts >= 2**31:
            raise ValueError(
                f"steps times prompts_per_step are {prompts} prompts; at most 2**31 - 1"
            )
        late = [step for step in self.keep_steps if step > self.steps]
        if late:
            raise ValueError(
                f"keep_steps has {late[0]}, but there are steps = {self.steps}; keep an earlier step"
            )
        return self
