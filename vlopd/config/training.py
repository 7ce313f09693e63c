"""Optimizers of the trained coordinates, and the loop's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vlopd.config.base import Section


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
    """AdamW, Lion and Muon: values *= 1 - rate * decay. SGD and RMSProp add decay * values to the gradient. A step
    whose rows do not reach a parameter (a tower, without a picture) leaves it as it is, decay and momentum too."""
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
    """Optimizer updates on the same completions, at the step's rate; above 1, k1 and rewards weigh them by importance
    ratios. Teachers grade them once; one that averages the student moves once a step, after the last."""
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
