"""Where a step's completions come from: the student (OPD), the teacher (sequence-level KD), the data (SFT).

Whoever wrote them, what the loop gets is the same: micro-batches of prompts with completions in the
student's ids and, with a reward, an advantage each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlopd import seeding
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.objective import Writer
from vlopd.errors import DataError
from vlopd.train.pair import ModelPair
from vlopd.train.rewards import answer_of, group_advantages, reward
from vlopd.types import Completions, Example, Prompts


@dataclass(frozen=True)
class Batch:
    """Completions of one forward and backward, each with its example, its prompt and who wrote it.

    Completions of one prompt follow each other; a group may go on in the next batch.
    """

    examples: Sequence[Example]  # B
    prompts: Prompts  # as the student reads them
    completions: Completions
    writers: tuple[Writer, ...]  # B
    rewards: Tensor | None = None  # [B]
    advantages: Tensor | None = None  # [B]


def collect(
    pair: ModelPair,
    config: ExperimentConfig,
    examples: Sequence[Example],
    share: range,
    seed: int,
    step: int,
) -> list[Batch]:
    """This process's completions of a step: rollout.completions_per_prompt for each of its examples.

    `share` are the examples' places among the step's prompts. What is written does not depend on how the
    step is split into micro-batches and processes: random numbers belong to the prompt's place.
    """
    rollout, n = config.rollout, config.rollout.completions_per_prompt
    prompts = config.train.prompts_per_step
    everyones = [
        seeding.uniforms(prompts, rollout.max_new_tokens, "rollout", seed, step, k)
        for k in range(n)
    ]
    uniforms = torch.stack(everyones, 1)[share.start : share.stop].flatten(0, 1)  # [B, C]
    writers = choose_writers(rollout.source.shares, prompts, n, seed, step)
    mine = writers[share.start * n : share.stop * n]
    repeated = [example for example in examples for _ in range(n)]
    size = config.train.micro_batch or len(repeated)
    batches = [
        write(
            pair,
            config,
            repeated[i : i + size],
            tuple(mine[i : i + size]),
            uniforms[i : i + size],
        )
        for i in range(0, len(repeated), size)
    ]
    return batches if config.reward is None else rewarded(pair, config, batches)


def choose_writers(
    shares: dict[Writer, float], prompts: int, n: int, seed: int, step: int
) -> list[Writer]:
    """Who writes each of the step's completions, prompt by prompt, drawn by their shares."""
    names = list(shares)
    if len(names) == 1:
        return names * (prompts * n)
    edges = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    draws = seeding.uniforms(prompts, n, "writer", seed, step).flatten()
    picked = torch.searchsorted(edges, draws * edges[-1], right=True).clamp(max=len(names) - 1)
    return [names[i] for i in picked.tolist()]


def write(
    pair: ModelPair,
    config: ExperimentConfig,
    examples: Sequence[Example],
    writers: tuple[Writer, ...],
    uniforms: Tensor,
) -> Batch:
    """One micro-batch. Its prompts are the student's view of all its examples, whoever writes."""
    prompts = pair.student.render(examples)
    if set(writers) != {"data"}:
        pair.student.refuse_too_long(examples, prompts, config.rollout.max_new_tokens)
    parts: list[tuple[Sequence[int], Completions]] = []
    for writer in sorted(set(writers)):
        rows = [i for i, each in enumerate(writers) if each == writer]
        asked = [examples[i] for i in rows]
        if writer == "data":
            part = from_data(pair, asked, config.rollout.max_new_tokens)
        elif writer == "teacher":
            part = pair.teacher_sample(asked, config.rollout, uniforms[rows])
        else:
            own = prompts if len(rows) == len(examples) else pair.student.render(asked)
            part = pair.sample(own, config.rollout, uniforms[rows])
        parts.append((rows, part))
    completions = Completions.joined(parts, pair.student.pad_id)
    pair.student.refuse_too_long(examples, prompts, completions.ids.shape[1])
    return Batch(examples, prompts, completions, writers)


def from_data(pair: ModelPair, examples: Sequence[Example], longest: int) -> Completions:
    """The data's answers as completions: their tokens and an end token, cut at `longest`; log-probs are 0.

    Raises DataError with the example's id for an answer that is missing, or that has a token which the
    teacher lacks or which stands for an image.
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
                f"example {example.id!r}: its answer has the token {word!r}, which is not one that both "
                "models can write; mend the answer, or leave the row out"
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


def rewarded(pair: ModelPair, config: ExperimentConfig, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with each completion's reward and its advantage within its prompt's group."""
    assert config.reward is not None
    scores = [
        reward(config.reward, batch.examples, pair.student.decode(batch.completions, batch.prompts))
        for batch in batches
    ]
    group = config.rollout.completions_per_prompt
    advantages = group_advantages(torch.cat(scores), group, config.reward.scale)
    sizes = [len(batch.examples) for batch in batches]
    device = pair.student.device
    return [
        replace(batch, rewards=own, advantages=each.to(device, torch.float32))
        for batch, own, each in zip(batches, scores, advantages.split(sizes), strict=True)
    ]
