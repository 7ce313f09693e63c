"""The recipe: everything that decides how a student is trained, but for the seed and the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from vlopd.config.base import Section
from vlopd.config.data import DataConfig, MixtureData
from vlopd.config.engines import VllmEngine, VllmRollout
from vlopd.config.functions import Function
from vlopd.config.models import MixedTeachers, TeacherConfig, TeachersConfig, teachers_by_name
from vlopd.config.objective import (
    K1,
    NLL,
    SCORES_ALONE,
    ConstantAdvantage,
    Estimator,
    FunctionLoss,
    LossConfig,
    ReverseKL,
    RewardConfig,
    RolloutConfig,
    whole_teacher_need,
)
from vlopd.config.training import AdamW, Muon, OptimConfig, TrainConfig
from vlopd.plugins import Plugin, Use

OF_A_COMPLETION = ("example", "completion")
"""What rewards and metrics are called with."""


EXECUTION = {
    "train": {
        *("micro_batch", "micro_tokens", "activation_checkpointing"),
        *("offload_optimizer", "offload_teacher", "sharding", "teacher_cache_gb"),
    },
    "rollout": {"batch", "engine"},
    "loss": {"chunk_tokens"},
}
"""Settings of how a step is split and where tensors are kept. They are no inputs, since they change no more than
rounding (which may flip a sampled token): a training that ran out of memory resumes with other ones."""


class RecipeSections(Section):
    """The sections of a recipe. A run has them, and an arm may have its own over them (`ExperimentConfig.recipe_of`).

    They need not fit together: an arm's own may be what makes them a Recipe.
    """

    teacher: TeachersConfig | None = None
    """The model or models that score completions. Null where nothing is learned from one: supervised fine-tuning on the
    data, or a reward with alpha = 0."""
    rollout: RolloutConfig = RolloutConfig()
    """Where completions come from and how they are sampled."""
    loss: LossConfig = ReverseKL()
    """The objective at the completion's tokens."""
    reward: RewardConfig | None = None
    """Verifiable reward of whole completions; null for none."""
    optim: OptimConfig = AdamW()
    """The optimizer and its schedule."""
    train: TrainConfig
    """Length and batch sizes of the training."""

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; a single one is called "teacher"."""
        return teachers_by_name(self.teacher)

    @property
    def plugins(self) -> list[Use]:
        """The plug-ins in it, each at its key."""
        sections: dict[str, Section | None] = {"loss": self.loss}
        for name, its in self.teachers.items():
            where = "teacher" if its is self.teacher else f"teacher.teachers.{name}"
            sections[f"{where}.context"] = its.context
        found = [own.use(key) for key, own in sections.items() if isinstance(own, Function)]
        if self.reward is not None and isinstance(self.reward.rule, Plugin):
            found.append(Use("reward.rule", self.reward.rule, OF_A_COMPLETION))
        for k, metric in enumerate(self.train.metrics):
            found.append(Use(f"train.metrics.{k}", metric, OF_A_COMPLETION))
        return found


class Recipe(RecipeSections):
    """How a student is trained: where completions come from, the objective, the optimizer, the loop's settings.

    Sections are tables, as in a config file, or section objects. Only `train` is required: rollout.source is the
    student, loss is the reverse KL, optim AdamW. `teacher` may stay out where the pair that is trained has one.

    Raises ConfigError that names the key, the nearest known one, and the value.

    >>> Recipe(train={"steps": 20, "prompts_per_step": 8}, optim={"learning_rate": 1e-4})
    """

    @model_validator(mode="before")
    @classmethod
    def refuse_data(cls, sections: Any) -> Any:
        """The data of a recipe outside of a run is an argument of `distill`."""
        if isinstance(sections, Mapping) and "data" in sections.keys() - cls.model_fields.keys():
            raise ValueError("data is not a section of a recipe; give load_data(...) to distill")
        return sections

    @model_validator(mode="after")
    def check_writers(self) -> Recipe:
        """The loss and the reward can be computed from the completions of the configured source."""
        rollout, writers = self.rollout, set(self.rollout.source.shares)
        if isinstance(self.loss, NLL) and "student" in writers:
            raise ValueError(
                "loss nll on the student's own samples only repeats them; set rollout.source to "
                '"data" or "teacher"'
            )
        if isinstance(self.loss, Estimator | ConstantAdvantage) and not rollout.is_on_policy:
            raise ValueError(
                f"loss {self.loss.type} is a mean over the student's own samples; set rollout.source = "
                '"student", or a loss over the vocabulary'
            )
        chosen = self.loss.tokens
        if chosen is not None and chosen.by == "least_likely" and "data" in writers:
            raise ValueError(
                'loss.tokens.by = "least_likely" is by the sampler, which the data\'s answers lack; set '
                'loss.tokens.by = "student_entropy", say'
            )
        if "teacher" in writers and isinstance(self.teacher, MixedTeachers):
            raise ValueError(
                "rollout.source: mixed teachers score completions together, but cannot sample"
            )
        if self.reward is not None and not rollout.is_on_policy:
            raise ValueError(
                'reward needs the student\'s own samples: rollout.source = "student"; where only some arms have a '
                "reward, give it to these (arms.NAME.reward) instead of to all"
            )
        if self.reward is not None and rollout.completions_per_prompt < 2:
            raise ValueError(
                "reward compares completions of one prompt; set rollout.completions_per_prompt = 8, say"
            )
        return self

    @model_validator(mode="after")
    def check_scores(self) -> Recipe:
        """What a teacher in vLLM gives is enough for the loss."""
        if not any(isinstance(its.engine, VllmEngine) for its in self.teachers.values()):
            return self
        if "teacher" in self.rollout.source.shares:
            raise ValueError(
                "rollout.source: a teacher in vLLM scores completions, but does not write them here; set "
                'teacher.engine = {type = "vlopd"}'
            )
        need = whole_teacher_need(self.loss)
        if need is not None and self.needs_teacher is not None:
            raise ValueError(f"{need} {SCORES_ALONE}")
        return self

    @model_validator(mode="after")
    def check_offload(self) -> Recipe:
        """The optimizer can run on the host."""
        if self.train.offload_optimizer and isinstance(self.optim, Muon):
            raise ValueError(
                "train.offload_optimizer: Muon's matrix products would take minutes a step on the host; set it to "
                'false, or another optimizer, such as optim.type = "adamw"'
            )
        return self

    @property
    def needs_teacher(self) -> str | None:
        """The setting that needs a teacher; None where a teacher would be a diagnostic alone."""
        if "teacher" in self.rollout.source.shares:
            return f"rollout.source = {self.rollout.source.type!r}"
        if self.loss.tokens is not None and self.loss.tokens.by == "divergence":
            return 'loss.tokens.by = "divergence"'
        return f"loss {self.loss.type}" if self.learns_from_teacher else None

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the loss compares with a teacher's probabilities."""
        is_trained = self.reward is None or self.reward.alpha > 0
        return is_trained and not isinstance(self.loss, NLL | ConstantAdvantage)

    @property
    def prompts(self) -> int:
        """Prompts of the whole training."""
        return self.train.steps * self.train.prompts_per_step

    @property
    def objective(self) -> str:
        """What the student is trained on, in a few words: `loss reverse_kl from TEACHER`, `reward exact_match`."""
        parts = []
        if self.reward is None or self.reward.alpha > 0:
            writes = "teacher" in self.rollout.source.shares
            free = isinstance(self.loss, NLL | ConstantAdvantage)
            models = ", ".join(teacher.model for teacher in self.teachers.values())
            source = "the data" if isinstance(self.loss, NLL) else "the student's samples"
            learns = bool(self.teachers) and (writes or not free)
            parts.append(f"loss {self.loss.type} {f'from {models}' if learns else f'on {source}'}")
        if self.reward is not None:
            parts.append(f"reward {self.reward.rule}")
        return " and ".join(parts)

    @property
    def notes(self) -> list[str]:
        """Warnings of settings that bias a loss or have no effect, for the log and the arm's record."""
        found = []
        warmup, steps = self.optim.warmup_steps, self.train.steps
        if warmup >= steps:
            found.append(
                f"optim.warmup_steps = {warmup} of train.steps = {steps}: the rate is still rising when training "
                "ends and never reaches optim.learning_rate"
            )
        sampled = isinstance(self.loss, Estimator | ConstantAdvantage)
        if sampled and not self.rollout.is_students_distribution:
            found.append(
                f"loss {self.loss.type} is no longer unbiased: rollout.temperature, top_k or top_p sample "
                "another distribution than the student's own"
            )
        if self.reward is not None and not self.rollout.is_students_distribution:
            found.append(
                "the reward's policy gradient is biased: rollout.temperature, top_k or top_p sample another "
                "distribution than the student's own"
            )
        if isinstance(self.rollout.engine, VllmRollout):
            found.append(
                "vLLM samples with random numbers of its own, so completions are not those of this process; "
                "logprob_gap is between its log-probs and the training's"
            )
        found += self._without_effect()
        if not self.rollout.is_on_policy:
            found.append(
                "logprob_gap is of the completions that the student itself wrote, if there are any"
            )
        return found

    def _without_effect(self) -> list[str]:
        """Settings other than their defaults that nothing reads in this combination, one line each."""
        found = []
        rollout, loss, optim, train = self.rollout, self.loss, self.optim, self.train
        if set(rollout.source.shares) == {"data"}:
            sampling = ("temperature", "top_k", "top_p")
            found += [
                f"rollout.{key}: no effect on the data's answers"
                for key in sampling
                if dict(rollout)[key] != RolloutConfig.model_fields[key].default
            ]
        if self.reward is not None:
            fields = ("chunk_tokens", "normalisation", "tokens")  # of the policy gradient too
            own = {} if isinstance(loss, FunctionLoss) else dict(type(loss)())
            changed = [k for k, value in loss if k not in fields and value != own.get(k)]
            if self.reward.alpha == 0 and (changed or not isinstance(loss, ReverseKL)):
                found.append(f"loss {loss.type}: no effect on training with reward.alpha = 0")
            elif isinstance(loss, K1) and "clip" in changed:
                found.append("loss.clip: no effect with a reward; reward.clip is of both parts")
        found += [
            f"optim.component_rates.{name}: no effect on a component in train.freeze"
            for name, factor in optim.component_rates
            if factor != 1 and name in train.freeze
        ]
        for name, teacher in self.teachers.items():
            default = dict(TeacherConfig(model="student"))
            ignored = ("revision", "template", "attention", "trust_remote_code")
            if teacher.is_student:
                found += [
                    f"{name}.{key}: no effect on a teacher that is the student; set student.{key}"
                    for key in ignored
                    if dict(teacher)[key] != default[key]
                ]
        return found


class ArmRecipe(Recipe):
    """How an arm of a run is trained: with its data and, where it needs one, its teacher."""

    data: DataConfig
    """The prompts, with answers where a reward or supervised training needs them."""

    @property
    def plugins(self) -> list[Use]:
        sections: dict[str, Section] = {"data": self.data}
        if isinstance(self.data, MixtureData):
            sections = {f"data.sources.{name}": its for name, its in self.data.sources.items()}
        own = [its.use(key) for key, its in sections.items() if isinstance(its, Function)]
        return own + super().plugins

    @model_validator(mode="after")
    def check_teacher(self) -> ArmRecipe:
        """There is a teacher where the rollout or the objective needs one."""
        if self.teacher is None and self.needs_teacher:
            raise ValueError(
                f"{self.needs_teacher} needs a teacher: set teacher = MODEL, or train without one, on the data alone "
                '(loss.type = "nll", rollout.source = "data") or on a reward alone (reward.alpha = 0)'
            )
        return self


def training_of(recipe: Recipe) -> str:
    """What the field calls such training; distillation on-policy only where the student writes every completion."""
    writers, reward = set(recipe.rollout.source.shares), recipe.reward
    if reward is not None:
        return "RLVR" if reward.alpha == 0 else "on-policy distillation with verifiable rewards"
    if isinstance(recipe.loss, ConstantAdvantage):
        return "policy gradient with a constant advantage"
    if recipe.rollout.is_on_policy:
        return "on-policy distillation"
    if "student" in writers:
        return "mixed on- and off-policy distillation"
    if not isinstance(recipe.loss, NLL):
        return "off-policy distillation"
    return "supervised fine-tuning" if writers == {"data"} else "sequence-level distillation"
