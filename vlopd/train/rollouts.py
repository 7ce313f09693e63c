"""A step's completions: sampled by the student (OPD) or the teacher (sequence-level KD), or the data's answers (SFT).

Whoever wrote them, the result is the same: micro-batches of prompts with completions in the student's ids and,
with a reward, an advantage each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor

from vlopd import seeding
from vlopd.config.engines import VllmRollout
from vlopd.config.objective import RolloutConfig, Writer
from vlopd.config.recipe import Recipe
from vlopd.errors import DataError
from vlopd.models.cache_size import sequence_bytes
from vlopd.models.loaded import LoadedModel
from vlopd.train.packing import Fits, micro_batches, packed
from vlopd.train.pair import Draw, ModelPair, Rendered
from vlopd.train.rewards import answer_of, group_advantages, reward, scores
from vlopd.train.teacher import Teacher
from vlopd.types import Completions, Example, Prompts

OnSampled = Callable[[LoadedModel, Prompts, Completions], object]
"""Called with each sampling batch: the model, its prompts, each once, and their completions."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: completions, each with its prompt, its writer and its place among the process's completions.

    Places are prompt-major: completion k of n of prompt i has place i n + k.
    """

    student: LoadedModel
    rendered: Sequence[Rendered]  # B
    completions: Completions
    writers: tuple[Writer, ...]  # B
    places: tuple[int, ...]  # B
    rewards: Tensor | None = None  # [B]
    advantages: Tensor | None = None  # [B]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [B] each, of train.metrics

    @property
    def examples(self) -> list[Example]:
        return [each.example for each in self.rendered]

    @property
    def prompts(self) -> Prompts:
        """As the student reads them; collated and moved to its device at each access."""
        return self.student.collate([each.student for each in self.rendered])

    def take(self, rows: Sequence[int]) -> Batch:
        """Selects completions, without the padding that only others need."""

        def of(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[torch.tensor(rows, device=column.device)]

        return Batch(
            self.student,
            [self.rendered[i] for i in rows],
            self.completions.take(rows).trimmed(),
            tuple(self.writers[i] for i in rows),
            tuple(self.places[i] for i in rows),
            of(self.rewards),
            of(self.advantages),
            {name: values[list(rows)] for name, values in self.metrics.items()},
        )


def by_place(batches: Sequence[Batch], columns: Sequence[Tensor]) -> Tensor:
    """Values [B] of each micro-batch as one tensor in the order of places."""
    places = torch.tensor([place for batch in batches for place in batch.places])
    values = torch.cat(list(columns))
    return values[places.argsort().to(values.device)]


def collect(
    pair: ModelPair,
    recipe: Recipe,
    rendered: Sequence[Rendered],
    share: range,
    seed: int,
    step: int,
    sampling_bytes: int | None = None,
    on_sampled: OnSampled | None = None,
    replayed: Completions | None = None,
) -> list[Batch]:
    """This process's completions of a step: rollout.completions_per_prompt for each of its `rendered` examples.

    `share` are the examples' indices among the step's prompts. Random numbers belong to an index, so completions do
    not depend on how the step is split: into processes, sampling batches (rollout.batch, or what fits in
    `sampling_bytes`) and micro-batches of the training (train.micro_batch or micro_tokens), by length. `replayed`
    completions, by place, are taken instead of new ones.
    """
    n, mine = recipe.rollout.completions_per_prompt, writers_of(recipe, share, seed, step)
    completions = replayed
    if completions is None:
        where = (share, seed, step, sampling_bytes)
        completions = completions_of(pair, recipe, rendered, *where, on_sampled)
    repeated = [each for each in rendered for _ in range(n)]
    whole = Batch(pair.student, repeated, completions, mine, tuple(range(len(mine))))
    whole = scored(pair, recipe, whole)
    lengths = completions.mask.sum(1).tolist()
    sizes = [(each.student.n_tokens, own) for each, own in zip(repeated, lengths, strict=True)]
    parts = micro_batches(recipe.train, sizes)
    return [whole] if len(parts) == 1 else [whole.take(part) for part in parts]


def writers_of(recipe: Recipe, share: range, seed: int, step: int) -> tuple[Writer, ...]:
    """The writers of this process's completions, by place."""
    n = recipe.rollout.completions_per_prompt
    shares, prompts = recipe.rollout.source.shares, recipe.train.prompts_per_step
    return tuple(choose_writers(shares, prompts, n, seed, step)[share.start * n : share.stop * n])


def completions_of(
    pair: ModelPair,
    recipe: Recipe,
    rendered: Sequence[Rendered],
    share: range,
    seed: int,
    step: int,
    sampling_bytes: int | None = None,
    on_sampled: OnSampled | None = None,
) -> Completions:
    """This process's completions of a step, by place; arguments as of `collect`."""
    rollout, prompts = recipe.rollout, recipe.train.prompts_per_step
    everyones = [
        seeding.uniforms(prompts, rollout.max_new_tokens, "rollout", seed, step, k)
        for k in range(rollout.completions_per_prompt)
    ]
    uniforms = torch.stack(everyones, 1)[share.start : share.stop].flatten(0, 1)  # [B, C]
    writers = writers_of(recipe, share, seed, step)
    return write(pair, rollout, rendered, writers, uniforms, sampling_bytes, on_sampled)


def choose_writers(
    shares: dict[Writer, float], prompts: int, n: int, seed: int, step: int
) -> list[Writer]:
    """The writer of each of the step's completions, prompt by prompt, drawn with probabilities `shares`."""
    names = list(shares)
    if len(names) == 1:
        return names * (prompts * n)
    edges = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    draws = seeding.uniforms(prompts, n, "writer", seed, step).flatten()
    picked = torch.searchsorted(edges, draws * edges[-1], right=True).clamp(max=len(names) - 1)
    return [names[i] for i in picked.tolist()]


def write(
    pair: ModelPair,
    rollout: RolloutConfig,
    rendered: Sequence[Rendered],
    writers: Sequence[Writer],
    uniforms: Tensor,
    sampling_bytes: int | None = None,
    on_sampled: OnSampled | None = None,
) -> Completions:
    """The completions, prompt-major, of the `rendered` examples by `writers` [B] with random numbers `uniforms` [B, C].

    A sampling batch has prompts of like length, each once, whose completions share its prefill.
    """
    student, new_tokens = pair.student, rollout.max_new_tokens
    examples = [each.example for each in rendered]
    texts = student.collate([each.student.text for each in rendered])
    if set(writers) != {"data"}:
        student.refuse_too_long(examples, texts, new_tokens)
    n = len(writers) // len(rendered)
    parts: list[tuple[Sequence[int], Completions]] = []
    for writer in sorted(set(writers)):
        places = [place for place, each in enumerate(writers) if each == writer]
        asked = [examples[place // n] for place in places]
        if writer == "data":
            parts.append((places, from_data(pair, asked, new_tokens)))
        elif writer == "student":
            prompts = {place: rendered[place // n].student for place in places}
            fits = fits_in(student, rollout, sampling_bytes)
            more = (n, rollout, uniforms, fits, pair.sample, examples, on_sampled)
            parts += sampled(student, prompts, *more)
        else:
            for teacher, rows in pair.assign(asked):
                assert isinstance(teacher, Teacher), "Recipe refuses to sample from a mixture"
                own = [places[i] for i in rows]
                prompts = {place: rendered[place // n].teachers[teacher.index] for place in own}
                theirs = teacher.loaded.collate([each.text for each in prompts.values()])
                teacher.loaded.refuse_too_long([asked[i] for i in rows], theirs, new_tokens)
                fits = fits_in(teacher.loaded, rollout, sampling_bytes)
                draw = partial(pair.teacher_sample, teacher)
                more = (n, rollout, uniforms, fits, draw, examples, on_sampled)
                parts += sampled(teacher.loaded, prompts, *more)
    completions = Completions.joined(parts, student.pad_id)
    student.refuse_too_long(examples, texts, completions.ids.shape[1])
    return completions


def sampled(
    loaded: LoadedModel,
    prompts: Mapping[int, Prompts],
    n: int,
    rollout: RolloutConfig,
    uniforms: Tensor,
    fits: Fits,
    draw: Draw,
    examples: Sequence[Example],
    on_sampled: OnSampled | None = None,
) -> Iterator[tuple[list[int], Completions]]:
    """Samples the completions at the places of `prompts`, of which `n` adjacent ones share one of `examples`."""
    lengths = {place: (each.n_tokens, rollout.max_new_tokens) for place, each in prompts.items()}
    for places in packed(lengths, fits):
        asked = {place // n: prompts[place] for place in places}
        where = {prompt: row for row, prompt in enumerate(asked)}
        rows = [where[place // n] for place in places] if len(asked) < len(places) else None
        batch = loaded.collate(list(asked.values()))
        own = [examples[prompt] for prompt in asked]
        completions = draw(batch, rollout, uniforms[places], rows, own)
        if on_sampled is not None:
            on_sampled(loaded, batch, completions)
        yield places, completions


def fits_in(loaded: LoadedModel, rollout: RolloutConfig, sampling_bytes: int | None) -> Fits:
    """Whether completions are sampled at once: rollout.batch, or all that `sampling_bytes` hold."""
    needed = cache(partial(sequence_bytes, loaded, rollout))

    def fits(rows: int, prompt: int, completion: int) -> bool:
        if rollout.batch is not None:
            return rows <= rollout.batch
        if isinstance(rollout.engine, VllmRollout):  # which queues what does not fit
            return True
        return sampling_bytes is None or rows * needed(prompt) <= sampling_bytes

    return fits


def sampling_notes(
    pair: ModelPair, recipe: Recipe, rendered: Sequence[Rendered], sampling_bytes: int
) -> list[str]:
    """Which engine decodes where one is asked for, and how many completions are sampled at once where `sampling_bytes`
    do not hold all of a step's."""
    rollout, writers = recipe.rollout, set(recipe.rollout.source.shares)
    own = [(pair.student, each.student) for each in rendered if "student" in writers]
    theirs = [
        (teacher.loaded, each.teachers[teacher.index])
        for teacher in pair.teachers
        for each in rendered
        if "teacher" in writers and teacher.index in each.teachers
    ]
    most = min(
        (
            max(1, sampling_bytes // sequence_bytes(loaded, rollout, prompt.n_tokens))
            for loaded, prompt in own + theirs
        ),
        default=math.inf,
    )
    asked = len(rendered) * rollout.completions_per_prompt
    found = pair.engine_notes(rollout)
    if rollout.batch is None and most < asked:
        found.append(
            f"of {asked} completions at least {most} are sampled at once, in {sampling_bytes / 1e9:.1f} GB of free "
            "memory; rollout.batch sets another number"
        )
    return found


def from_data(pair: ModelPair, examples: Sequence[Example], longest: int) -> Completions:
    """The data's answers as completions: their tokens and an end token, truncated at `longest`; log-probs are 0.

    Raises DataError with the example's id for an answer that is missing, or that has an image placeholder or a
    token that the teacher lacks.
    """
    student = pair.student
    own_end = student.tokenizer.eos_token_id
    end = own_end if own_end in student.end_ids else student.end_ids[0]
    rows = []
    for example in examples:
        answer = student.tokenizer(answer_of(example), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*answer, end])
        forbidden = torch.isin(ids, torch.tensor(student.unsampleable_ids, dtype=torch.long))
        forbidden |= ~pair.vocabulary.contains(ids)
        if bool(forbidden.any()):
            word = student.tokenizer.convert_ids_to_tokens(int(ids[forbidden][0]))
            raise DataError(
                f"example {example.id!r}: its answer has the token {word!r}, which is an image placeholder or not in "
                "both models' vocabularies; change the answer, or leave the row out"
            )
        rows.append(ids)
    width = min(longest, max(map(len, rows)))
    ids = torch.full((len(rows), width), student.pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for k, row in enumerate(rows):
        kept = row[:width]
        ids[k, : len(kept)], mask[k, : len(kept)] = kept, True
    ended = torch.tensor([len(row) <= longest for row in rows])
    return Completions(
        ids.to(student.device),
        mask.to(student.device),
        torch.zeros(ids.shape, device=student.device),
        ended.to(student.device),
    )


def scored(pair: ModelPair, recipe: Recipe, whole: Batch) -> Batch:
    """The process's completions, prompt-major, with rewards, advantages and the values of plug-in metrics."""
    config, metrics = recipe.reward, recipe.train.metrics
    if config is None and not metrics:
        return whole
    prompts = pair.student.collate([each.student.text for each in whole.rendered])
    texts = pair.student.decode(whole.completions, prompts)
    found = {metric.label: scores(metric, whole.examples, texts) for metric in metrics}
    whole = replace(whole, metrics=found)
    if config is None:
        return whole
    rewards = reward(config, whole.examples, texts)
    advantages = group_advantages(rewards, recipe.rollout.completions_per_prompt, config.scale)
    advantages = advantages.to(pair.student.device, torch.float32)
    return replace(whole, rewards=rewards, advantages=advantages)
