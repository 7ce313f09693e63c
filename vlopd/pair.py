"""A student and a teacher that share a vocabulary, and the check that they do.

Each model renders its own prompt, with its own template, processor and image resolution; what the two
share is the completion's token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from vlopd import seeding
from vlopd.config import ConfigError, ExperimentConfig, PairConfig
from vlopd.losses import DIVERGENCES, TokenDivergence, chunked_divergence
from vlopd.models import families
from vlopd.models.load import DTYPES, LoadedModel, load, load_processor
from vlopd.rollout import sample
from vlopd.types import Completions, Example, Prompts


@dataclass(frozen=True)
class ModelPair:
    """Student and teacher, ready to sample and to score."""

    student: LoadedModel
    teacher: LoadedModel

    @property
    def shared_rows(self) -> int:
        """V: vocabulary rows that both have; padded rows beyond them are left out of the loss."""
        return min(self.student.vocabulary_rows, self.teacher.vocabulary_rows)

    def divergence(
        self,
        kind: str,
        student_prompts: Prompts,
        teacher_prompts: Prompts,
        completions: Completions,
        chunk_tokens: int,
    ) -> TokenDivergence:
        """The divergence at every completion token, [N]; gradients flow to the student only.

        The two prompts come from the same examples, in the same order, each rendered by its own model.
        """
        rows = self.shared_rows
        with torch.no_grad():
            teacher_hidden = self.teacher.completion_hidden(teacher_prompts, completions)
        return chunked_divergence(
            DIVERGENCES[kind],
            self.student.completion_hidden(student_prompts, completions),
            lambda hidden: self.student.logits(hidden, rows),
            teacher_hidden,
            lambda hidden: self.teacher.logits(hidden, rows),
            chunk_tokens,
        )


def load_pair(
    config: ExperimentConfig, device: torch.device | str, student_folder: str | None = None
) -> ModelPair:
    """Loads both in the compute precision; `student_folder` takes the place of the configured student.

    Raises ConfigError, before any weights are read, when the vocabularies disagree.
    """
    pair, dtype = config.pair, DTYPES[config.precision.compute]
    check_vocabularies(pair)
    options: dict[str, Any] = dict(
        dtype=dtype,
        device=device,
        attention=pair.attention,
        trust_remote_code=pair.trust_remote_code,
    )
    revision = None if student_folder else pair.revision_student
    student = load(student_folder or pair.student, revision=revision, **options)
    teacher = load(pair.teacher, revision=pair.revision_teacher, **options)
    teacher.model.requires_grad_(False)
    return ModelPair(student, teacher)


def check_vocabularies(pair: PairConfig) -> int:
    """The number of token strings that student and teacher share; reads tokenizers only, no weights.

    Raises ConfigError with the first ten disagreements.
    """
    vocabularies = []
    for name, revision in (
        (pair.student, pair.revision_student),
        (pair.teacher, pair.revision_teacher),
    ):
        processor = load_processor(name, revision, pair.trust_remote_code)
        vocabularies.append(families.tokenizer_of(processor).get_vocab())
    student, teacher = vocabularies
    disagree = sorted(
        (
            word
            for word in student.keys() | teacher.keys()
            if student.get(word) != teacher.get(word)
        ),
        key=lambda word: student.get(word, teacher.get(word, 0)),
    )
    if disagree:
        some = ", ".join(f"{w!r}: {student.get(w)} / {teacher.get(w)}" for w in disagree[:10])
        raise ConfigError(
            f"student {pair.student} and teacher {pair.teacher} disagree on {len(disagree)} of "
            f"{len(student.keys() | teacher.keys())} tokens (id in student / teacher): {some}; "
            "use a teacher with the student's tokenizer"
        )
    return len(student)


# ----------------------------------------------------------------------------------------- pre-flight


class CheckRow(NamedTuple):
    """One line of the pre-flight table; `ok` is None where there is nothing to pass or fail."""

    what: str
    student: str
    teacher: str
    ok: bool | None = None


@torch.no_grad()
def preflight(
    pair: ModelPair, config: ExperimentConfig, examples: Sequence[Example]
) -> list[CheckRow]:
    """What to know before training: vocabularies, prompts, image tokens, whether the teacher sees, agreement."""
    student, teacher = pair.student, pair.teacher

    def row(what: str, of: Any, ok: bool | None = None) -> CheckRow:
        return CheckRow(what, str(of(student)), str(of(teacher)), ok)

    same_ends = set(student.end_ids) == set(teacher.end_ids)
    rows = [
        row("model", lambda m: f"{m.name} ({m.model.config.model_type})"),
        row("parameters", lambda m: f"{m.model.num_parameters():,}"),
        row("precision", lambda m: str(m.model.dtype).removeprefix("torch.")),
        row("vocabulary rows", lambda m: m.vocabulary_rows),
        row("end tokens", lambda m: m.tokenizer.convert_ids_to_tokens(m.end_ids), same_ends),
        row("never sampled", lambda m: m.tokenizer.convert_ids_to_tokens(m.unsampleable_ids)),
        row("prompt", lambda m: repr(m.render_text(examples[0]))),
        row("prompt tokens", lambda m: int(m.render(examples[:1]).attention_mask.sum())),
        row("image tokens", lambda m: int(torch.isin(
            m.render(examples[:1]).input_ids, torch.tensor(m.unsampleable_ids, device=m.device)
        ).sum())),
    ]  # fmt: skip
    prompts = student.render(examples)
    draws = seeding.generator(student.device, "check")
    completions = sample(
        student,
        prompts,
        config.rollout.max_new_tokens,
        config.rollout.temperature,
        draws,
        pair.shared_rows,
    )
    if any(example.images for example in examples):
        rows.append(sight_row(pair, examples, completions))
    tokens = pair.divergence("reverse_kl", prompts, teacher.render(examples), completions, 1024)
    gap = pair_logprob_gap(student, prompts, completions, pair.shared_rows)
    bound = 1e-3 if student.model.dtype == torch.float32 else 0.5
    entropies = (f"{h.mean():.4f} nats" for h in (tokens.student_entropy, tokens.teacher_entropy))
    rows += [
        CheckRow("mean reverse KL", f"{tokens.loss.mean():.4f} nats a token", ""),
        CheckRow("mean entropy", next(entropies), next(entropies)),
        CheckRow("sampler against trainer", f"{gap:.1e} nats at most", "", gap < bound),
        CheckRow(
            "completion, reference", repr(student.decode(completions)[0]), repr(examples[0].answer)
        ),
    ]
    return rows


def sight_row(pair: ModelPair, examples: Sequence[Example], completions: Completions) -> CheckRow:
    """Does each model see the image? Its mean log-prob change when every image is blanked must not be 0."""
    blank = [
        Example(
            e.id,
            e.messages,
            tuple(Image.new("RGB", im.size) for im in e.images),
            e.answer,
            e.fields,
        )
        for e in examples
    ]
    changes = []
    for model in (pair.student, pair.teacher):
        if not model.sees_images:
            changes.append(0.0)
            continue
        seen, blind = (
            token_logprobs(model, model.render(each), completions, pair.shared_rows)
            for each in (examples, blank)
        )
        changes.append(float((seen - blind).abs().mean()))
    seen_by_student, seen_by_teacher = (f"{change:.4f} nats a token" for change in changes)
    return CheckRow("sees the image", seen_by_student, seen_by_teacher, ok=min(changes) > 0)


@torch.no_grad()
def token_logprobs(
    model: LoadedModel, prompts: Prompts, completions: Completions, rows: int
) -> torch.Tensor:
    """Log-probability of every completion token, [N] nats, fp32."""
    logits = model.logits(model.completion_hidden(prompts, completions), rows).float()
    ids = completions.ids[completions.mask][:, None]
    return logits.gather(1, ids)[:, 0] - logits.logsumexp(-1)


def pair_logprob_gap(
    model: LoadedModel, prompts: Prompts, completions: Completions, rows: int
) -> float:
    """The largest difference between the sampler's log-probs and re-scored ones, nats."""
    rescored = token_logprobs(model, prompts, completions, rows)
    return float((rescored - completions.logprobs[completions.mask]).abs().max())
