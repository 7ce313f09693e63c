"""How an arm is trained: the sections that an arm may have of its own."""

from __future__ import annotations

from pydantic import model_validator

from vlopd.config.base import Section
from vlopd.config.data import DataConfig
from vlopd.config.models import MixedTeachers, TeachersConfig
from vlopd.config.objective import (
    NLL,
    Estimator,
    LossConfig,
    ReverseKL,
    RewardConfig,
    RolloutConfig,
)
from vlopd.config.training import AdamW, OptimConfig, TrainConfig


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
        warmup, steps = self.optim.warmup_steps, self.train.steps
        if warmup >= steps:
            found.append(
                f"optim.warmup_steps = {warmup} of train.steps = {steps}: the rate is still rising when training "
                "ends and never reaches optim.learning_rate"
            )
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


def training_of(recipe: Recipe) -> str:
    """What the field calls such training; distillation on-policy only where the student writes every completion."""
    writers, reward = set(recipe.rollout.source.shares), recipe.reward
    if reward is not None:
        return "RLVR" if reward.alpha == 0 else "on-policy distillation with verifiable rewards"
    if recipe.rollout.is_on_policy:
        return "on-policy distillation"
    if "student" in writers:
        return "mixed on- and off-policy distillation"
    if not isinstance(recipe.loss, NLL):
        return "off-policy distillation"
    return "supervised fine-tuning" if writers == {"data"} else "sequence-level distillation"
