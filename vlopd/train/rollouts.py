"""A step's completions: sampled by the student (OPD) or the teacher (sequence-level KD), or the data's answers (SFT).

Whoever wrote them, the result is the same: micro-batches of prompts with completions in the student's ids and,
with a reward, an advantage each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlopd import seeding
from vlopd.config.objective import RewardConfig, RolloutConfig, Writer
from vlopd.config.recipe import Recipe
from vlopd.errors import DataError
from vlopd.plugins import Plugin
from vlopd.train.pair import ModelPair
from vlopd.train.rewards import answer_of, group_advantages, reward, scores
from vlopd.types import Completions, Example, Prompts


@dataclass(frozen=True)
class Batch:
    """A micro-batch: completions, each with its example, its prompt and its writer.

    Completions of one prompt are adjacent; a group may continue in the next micro-batch.
    """

    examples: Sequence[Example]  # B
    prompts: Prompts  # as the student reads them
    completions: Completions
    writers: tuple[Writer, ...]  # B
    rewards: Tensor | None = None  # [B]
    advantages: Tensor | None = None  # [B]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [B] each, of train.metrics


def collect(
    pair: ModelPair,
    recipe: Recipe,
    examples: Sequence[Example],
    share: range,
    seed: int,
    step: int,
) -> list[Batch]:
    """This process's completions of a step: rollout.completions_per_prompt for each of its examples.

    `share` are the examples' indices among the step's prompts. Random numbers belong to an index, so completions do
    not depend on how the step is split into micro-batches and processes.
    """
    rollout, n = recipe.rollout, recipe.rollout.completions_per_prompt
    prompts = recipe.train.prompts_per_step
    everyones = [
        seeding.uniforms(prompts, rollout.max_new_tokens, "rollout", seed, step, k)
        for k in range(n)
    ]
    uniforms = torch.stack(everyones, 1)[share.start : share.stop].flatten(0, 1)  # [B, C]
    writers = choose_writers(rollout.source.shares, prompts, n, seed, step)
    mine = writers[share.start * n : share.stop * n]
    repeated = [example for example in examples for _ in range(n)]
    size = recipe.train.micro_batch or len(repeated)
    batches = [
        write(
            pair,
            rollout,
            repeated[i : i + size],
            tuple(mine[i : i + size]),
            uniforms[i : i + size],
        )
        for i in range(0, len(repeated), size)
    ]
    if recipe.train.metrics:
        batches = [measured(pair, recipe.train.metrics, batch) for batch in batches]
    return batches if recipe.reward is None else rewarded(pair, recipe.reward, batches, n)


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
    examples: Sequence[Example],
    writers: tuple[Writer, ...],
    uniforms: Tensor,
) -> Batch:
    """One micro-batch. Its prompts are those that the student reads, whoever writes the completions."""
    prompts = pair.student.render(examples)
    if set(writers) != {"data"}:
        pair.student.refuse_too_long(examples, prompts, rollout.max_new_tokens)
    parts: list[tuple[Sequence[int], Completions]] = []
    for writer in sorted(set(writers)):
        rows = [i for i, each in enumerate(writers) if each == writer]
        asked = [examples[i] for i in rows]
        if writer == "data":
            part = from_data(pair, asked, rollout.max_new_tokens)
        elif writer == "teacher":
            part = pair.teacher_sample(asked, rollout, uniforms[rows])
        else:
            own = prompts if len(rows) == len(examples) else pair.student.render(asked)
            part = pair.sample(own, rollout, uniforms[rows])
        parts.append((rows, part))
    completions = Completions.joined(parts, pair.student.pad_id)
    pair.student.refuse_too_long(examples, prompts, completions.ids.shape[1])
    return Batch(examples, prompts, completions, writers)


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


def measured(pair: ModelPair, metrics: Sequence[Plugin], batch: Batch) -> Batch:
    """The batch with the values of plug-in metrics for each completion."""
    texts = pair.student.decode(batch.completions, batch.prompts)
    found = {metric.label: scores(metric, batch.examples, texts) for metric in metrics}
    return replace(batch, metrics=found)


def rewarded(
    pair: ModelPair, config: RewardConfig, batches: Sequence[Batch], group: int
) -> list[Batch]:
    """The batches with each completion's reward and its advantage within its prompt's group of `group`."""
    scores = [
        reward(config, batch.examples, pair.student.decode(batch.completions, batch.prompts))
        for batch in batches
    ]
    advantages = group_advantages(torch.cat(scores), group, config.scale)
    sizes = [len(batch.examples) for batch in batches]
    device = pair.student.device
    return [
        replace(batch, rewards=own, advantages=each.to(device, torch.float32))
        for batch, own, each in zip(batches, scores, advantages.split(sizes), strict=True)
    ]
