"""A student and its teacher or teachers, which share a vocabulary and nothing else.

Each model renders its own prompt, with its own template, processor and image resolution; what they share
is the completion's tokens. The loss sees logits over the shared vocabulary at the completion's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlopd.config.experiment import ExperimentConfig
from vlopd.config.models import (
    CaptionContext,
    MixedTeachers,
    ModelConfig,
    RoutedTeachers,
    TeacherConfig,
)
from vlopd.config.objective import LossConfig, RewardConfig, RolloutConfig
from vlopd.data.literals import cell_text, nested_value
from vlopd.errors import ConfigError, DataError, UserError
from vlopd.models import families
from vlopd.models.load import (
    DTYPES,
    load_configured,
    load_generation_config,
    load_model_config,
    load_processor,
)
from vlopd.models.loaded import LoadedModel
from vlopd.models.meta import meta_model
from vlopd.models.vocabulary import SharedVocabulary, read_vocabulary, share_vocabulary
from vlopd.train.losses import Sampled, TokenDivergence, chunked_divergence, logprobs_at
from vlopd.train.sampler import sample
from vlopd.train.teacher import Grader, Mixture, Teacher
from vlopd.types import Completions, Example, Prompts


class Graded(NamedTuple):
    """A grader with the rows of a batch that are its own, and its hidden states [N_k, H'] at their tokens."""

    grader: Grader
    rows: list[int]
    hidden: Tensor


@dataclass(frozen=True)
class ModelPair:
    """Student and teachers, ready to sample and to score.

    `field` names the example's field that chooses among `graders`; None where there is one grader only.
    """

    student: LoadedModel
    graders: Mapping[str, Grader]
    vocabulary: SharedVocabulary
    field: str | None = None

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(member for grader in self.graders.values() for member in grader.members)

    def sample(self, prompts: Prompts, rollout: RolloutConfig, uniforms: Tensor) -> Completions:
        """The student's completions, of shared tokens only. `uniforms` [B, max_new_tokens]."""
        return sample(
            self.student,
            prompts,
            rollout.max_new_tokens,
            rollout.temperature,
            uniforms,
            self.vocabulary.student,
            rollout.top_k,
            rollout.top_p,
        )

    def teacher_sample(
        self, examples: Sequence[Example], rollout: RolloutConfig, uniforms: Tensor
    ) -> Completions:
        """Each example's own teacher's completion, in its context, as the student's ids.

        Of shared tokens only, and none that either model takes for an image's placeholder.
        """
        parts = []
        unsampleable = torch.tensor(self.student.unsampleable_ids, dtype=torch.long)
        banned = unsampleable[self.vocabulary.contains(unsampleable)]
        for grader, rows in self.assign(examples):
            assert isinstance(grader, Teacher), "the config refuses to sample from a mixture"
            asked = [examples[i] for i in rows]
            prompts = grader.render(asked)
            grader.loaded.refuse_too_long(asked, prompts, rollout.max_new_tokens)
            theirs = sample(
                grader.loaded,
                prompts,
                rollout.max_new_tokens,
                rollout.temperature,
                uniforms[rows],
                self.vocabulary.teachers[grader.index],
                rollout.top_k,
                rollout.top_p,
                self.vocabulary.in_teacher(banned, grader.index).tolist(),
            )
            pad = self.student.pad_id
            parts.append((rows, self.vocabulary.translate_back(theirs, grader.index, pad)))
        return Completions.joined(parts, self.student.pad_id)

    def grade(self, examples: Sequence[Example], completions: Completions) -> list[Graded]:
        """What the teachers make of the completions: the costly, gradient-free half of the loss."""
        return [
            Graded(grader, rows, grader.hidden([examples[i] for i in rows], completions.take(rows)))
            for grader, rows in self.assign(examples)
        ]

    def divergence(
        self,
        loss: LossConfig,
        examples: Sequence[Example],
        prompts: Prompts,
        completions: Completions,
    ) -> TokenDivergence:
        """The loss at every completion token, [N]; gradients flow to the student only.

        `prompts` are the examples as the student reads them; teachers render their own.
        """
        return self.loss_of(loss, self.grade(examples, completions), prompts, completions)

    def loss_of(
        self,
        loss: LossConfig,
        graded: Sequence[Graded],
        prompts: Prompts,
        completions: Completions,
        reward: RewardConfig | None = None,
        advantages: Tensor | None = None,
    ) -> TokenDivergence:
        """As `divergence`, of completions that are graded, and with a reward's `advantages` [B] mixed in."""
        student_hidden = self.student.completion_hidden(prompts, completions)
        per_token = None if advantages is None else spread(advantages, completions.mask)
        pieces, order = [], []
        for grader, rows, teacher_hidden in graded:
            tokens, mine = tokens_of_rows(completions, rows), completions.take(rows)
            sampled = Sampled(self.vocabulary.targets(mine), mine.logprobs[mine.mask])
            if per_token is not None:
                sampled = sampled._replace(
                    advantages=per_token if tokens is None else per_token[tokens]
                )
            pieces.append(
                chunked_divergence(
                    loss,
                    student_hidden if tokens is None else student_hidden[tokens],
                    lambda hidden: self.student.logits(hidden, self.vocabulary.student),
                    teacher_hidden,
                    grader.logits,
                    sampled,
                    reward,
                )
            )
            order.append(tokens)
        return TokenDivergence(*(in_order(column, order) for column in zip(*pieces, strict=True)))

    def assign(self, examples: Sequence[Example]) -> list[tuple[Grader, list[int]]]:
        """Each grader with the rows of the batch that are its own.

        Raises UserError with the example's id where its field names no teacher.
        """
        if self.field is None:
            return [(next(iter(self.graders.values())), list(range(len(examples))))]
        rows: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            try:
                name = cell_text(nested_value(example.fields, self.field))
            except DataError as error:
                raise UserError(
                    f"example {example.id!r}: field {self.field!r} (teacher.field) {error}"
                ) from None
            if name is None or name not in self.graders:
                raise UserError(
                    f"example {example.id!r}: field {self.field!r} is {name!r}, which is not among the "
                    f"teachers {', '.join(self.graders)} (teacher.teachers)"
                )
            rows.setdefault(name, []).append(i)
        return [(self.graders[name], mine) for name, mine in rows.items()]

    def check_teachers_prompt(self, examples: Sequence[Example]) -> None:
        """Raises UserError where a teacher cannot read these: no eyes for the image, no such field."""
        for grader, rows in self.assign(examples):
            for teacher in grader.members:
                teacher.render([examples[i] for i in rows])

    @torch.no_grad()
    def student_logprobs(
        self, prompts: Prompts, completions: Completions, chunk: int | None = None
    ) -> Tensor:
        """The student's log-probability of every completion token, [N] nats; logits of `chunk` tokens at once."""
        hidden = self.student.completion_hidden(prompts, completions)
        targets, size = self.vocabulary.targets(completions), chunk or len(hidden)
        pieces = [
            logprobs_at(self.student.logits(part, self.vocabulary.student), at)
            for part, at in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def teacher_logits(self, examples: Sequence[Example], completions: Completions) -> Tensor:
        """The grading teacher's logits at every completion token, [N, V], unchunked."""
        pieces, order = [], []
        for grader, rows in self.assign(examples):
            hidden = grader.hidden([examples[i] for i in rows], completions.take(rows))
            pieces.append(grader.logits(hidden))
            order.append(tokens_of_rows(completions, rows))
        return in_order(pieces, order)

    def teacher_logprobs(self, examples: Sequence[Example], completions: Completions) -> Tensor:
        """The grading teacher's log-probability of every completion token, [N] nats."""
        logits = self.teacher_logits(examples, completions)
        return logprobs_at(logits, self.vocabulary.targets(completions))


def in_order(pieces: Sequence[Tensor], order: Sequence[Tensor | None]) -> Tensor:
    """Pieces [N_k, ...] for the flat tokens `order` [N_k] of a batch, as one [N, ...]."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces))[torch.cat([o for o in order if o is not None]).argsort()]


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """[B] values, [B, C] mask -> [N]: each row's value at all of its tokens."""
    return per_row[:, None].expand(mask.shape)[mask]


def tokens_of_rows(completions: Completions, rows: Sequence[int]) -> Tensor | None:
    """Indices of the rows' tokens among the batch's flat completion tokens; None where it is all of them."""
    if list(rows) == list(range(len(completions.ids))):
        return None
    flat = torch.full_like(completions.ids, -1)
    flat[completions.mask] = torch.arange(completions.n_tokens, device=flat.device)
    part = torch.tensor(rows, device=flat.device)
    return flat[part][completions.mask[part]]


def shared_vocabulary(config: ExperimentConfig) -> SharedVocabulary:
    """Lines up all vocabularies of an experiment; no weights are read. Raises ConfigError."""
    student = read_vocabulary(config.student)
    others = [
        student if teacher.is_student else read_vocabulary(teacher)
        for teacher in config.teachers.values()
    ]
    return share_vocabulary(student, others)


def refuse_blind_models(
    config: ExperimentConfig, about: Mapping[str, PretrainedConfig] | None = None
) -> None:
    """Raises ConfigError where the data has pictures and a model can neither see nor read them.

    `about` gives the models' configurations by name (student, teachers); they are read where it does not.
    """
    if not config.data.has_images:
        return
    for name, model in {"student": config.student, **config.teachers}.items():
        if isinstance(model, TeacherConfig):
            if isinstance(model.context, CaptionContext) or model.is_student:
                continue
            remedy = f'give it a text view: {name}.context = {{type = "caption", column = ...}}'
        else:
            remedy = "use a vision-language model, or data without images"
        own = (about or {}).get(name)
        if own is None:
            own = load_model_config(model.model, model.revision, model.trust_remote_code)
        if not families.sees_images(own):
            raise ConfigError(
                f"the data has images, but {name} {model.model} is text-only; {remedy}"
            )


def without_weights(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: Any = "meta",
    folder: Path | str | None = None,
) -> LoadedModel:
    """A model's tokenizer or processor with its parameters' names and shapes, in the place of `load_configured`."""
    name, revision = str(folder or config.model), None if folder else config.revision
    about = load_model_config(name, revision, config.trust_remote_code)
    model = meta_model(about)
    model.generation_config = load_generation_config(name, about, revision)
    arguments = config.template_arguments
    processor = load_processor(name, revision, config.trust_remote_code, config.template, arguments)
    return LoadedModel(name, model, processor, arguments)


def load_pair(
    config: ExperimentConfig,
    device: torch.device | str,
    student_folder: Path | str | None = None,
    load: Callable[..., LoadedModel] = load_configured,
) -> ModelPair:
    """Loads all models in the compute precision; `student_folder` takes the place of the configured student.

    Raises ConfigError, before any weights are read, when the vocabularies disagree or a model cannot see
    the data's images.
    """
    dtype = DTYPES[config.precision.compute]
    refuse_blind_models(config)
    vocabulary = shared_vocabulary(config)

    def teacher(index: int, about: TeacherConfig) -> Teacher:
        folder = student_folder if about.is_student else None
        loaded = load(config.loaded_as(about), dtype, device, folder)
        loaded.model.requires_grad_(False)
        return Teacher(loaded, vocabulary, index, about.context, about.ema)

    teachers = {
        name: teacher(index, about) for index, (name, about) in enumerate(config.teachers.items())
    }
    student = load(config.student, dtype, device, student_folder)
    plan = config.teacher
    if isinstance(plan, RoutedTeachers):
        return ModelPair(student, teachers, vocabulary, plan.field)
    if isinstance(plan, MixedTeachers):
        weights = [plan.weights.get(name, 1.0) for name in teachers]
        total = sum(weights)
        mixture = Mixture(tuple(teachers.values()), tuple(weight / total for weight in weights))
        return ModelPair(student, {"mixture": mixture}, vocabulary)
    return ModelPair(student, teachers, vocabulary)
