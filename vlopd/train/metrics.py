"""A step's metrics: its row of metrics.jsonl, from tensors that the loss has computed anyway.

Means are over the step's completion tokens (log-probs in nats) or completions, over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlopd.train.losses import TokenDivergence
from vlopd.train.pair import spread
from vlopd.train.rollouts import Batch, by_place

QUARTERS = 4
GRAM = 4
"""Tokens of an n-gram that counts as a repetition when it recurs."""

Sums = dict[str, tuple[float, float]]
"""By metric: the sum of the averaged values, and their count."""


def summarise(
    step: int,
    loss: float,
    norm: float,
    batches: Sequence[Batch],
    tokens: Sequence[TokenDivergence],
    group: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The step's metrics, from its micro-batches and their `tokens`.

    `loss` is this process's part of the step's loss, `norm` the gradient's. A metric without values is null (of a
    teacher, where there is none; of the student's own completions or the fourth quarter, where there are none), and
    so is one that is infinite (the KL where the teacher bans a token).
    """
    parts = [measure(batch, each) for batch, each in zip(batches, tokens, strict=True)]
    rewards = [batch.rewards for batch in batches if batch.rewards is not None]
    if rewards:
        parts.append(measure_groups(by_place(batches, rewards).view(-1, group)))
    sums = reduced(add(parts), accelerator)
    gaps = [own_gaps(batch, each) for batch, each in zip(batches, tokens, strict=True)]
    gap = max(float(each.max()) if len(each) else 0.0 for each in gaps)
    if accelerator.num_processes > 1:
        own = torch.tensor([loss, gap], dtype=torch.float64, device=accelerator.device)
        every = accelerator.gather(own).view(-1, 2)
        loss, gap = float(every[:, 0].sum()), float(every[:, 1].max())
    n_tokens, n_completions = sums["student_entropy"][1], sums["truncated_fraction"][1]
    means = {name: total / count if count else None for name, (total, count) in sums.items()}
    return {
        "step": step,
        "loss": loss,
        **{name: value if finite(value) else None for name, value in means.items()},
        "logprob_gap_max": gap if sums["logprob_gap"][1] and finite(gap) else None,
        "completion_tokens": int(n_tokens),
        "mean_completion_tokens": n_tokens / n_completions,
        "grad_norm": norm,
    }


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def measure(batch: Batch, tokens: TokenDivergence) -> Sums:
    """Sums and counts of one micro-batch.

    kl                      KL(student || teacher), whatever the loss; by quarter of a completion as kl_quarter_1 to 4
    *_entropy               of either model, full vocabulary, temperature 1
    top_overlap_fraction    of either model's top 16 tokens, those that both have in common
    *_shared_mass_fraction  either model's probability of these
    logprob_gap             |sampler's - trainer's log-prob| of the student's own completions, temperature 1
    truncated_fraction      completions that reached the length limit
    repeated_fraction       4-grams of a completion that occurred in it before
    the functions of train.metrics, by name, over completions
    """
    mask = batch.completions.mask
    quarter, kl = quarters(mask), tokens.reverse_kl
    repeats, grams = repeated(batch.completions.ids, mask)
    return {
        "kl": total(kl),
        **{
            f"kl_quarter_{k + 1}": total(kl if kl is None else kl[quarter == k])
            for k in range(QUARTERS)
        },
        "student_entropy": total(tokens.student_entropy),
        "teacher_entropy": total(tokens.teacher_entropy),
        "top_overlap_fraction": total(tokens.top_overlap),
        "student_shared_mass_fraction": total(tokens.student_shared_mass),
        "teacher_shared_mass_fraction": total(tokens.teacher_shared_mass),
        "logprob_gap": total(own_gaps(batch, tokens)),
        "truncated_fraction": total(~batch.completions.ended),
        "repeated_fraction": (repeats, grams),
        **{name: total(values) for name, values in batch.metrics.items()},
    }


def total(values: Tensor | None) -> tuple[float, float]:
    """(sum, count); nothing of None."""
    if values is None:
        return 0.0, 0.0
    return float(values.double().sum()), float(values.numel())


def own_gaps(batch: Batch, tokens: TokenDivergence) -> Tensor:
    """|sampler's - trainer's log-prob| at every token of the completions that the student wrote."""
    mask = batch.completions.mask
    own = torch.tensor([writer == "student" for writer in batch.writers], device=mask.device)
    gaps = (batch.completions.logprobs[mask] - tokens.student_logprobs).abs()
    return gaps[spread(own, mask)]


def quarters(mask: Tensor) -> Tensor:
    """[B, C] mask -> [N]: which quarter of its completion each token is in, 0 to 3."""
    lengths = mask.sum(1, keepdim=True)
    position = mask.cumsum(1) - 1
    return (QUARTERS * position // lengths.clamp(min=1))[mask]


def repeated(ids: Tensor, mask: Tensor) -> tuple[float, float]:
    """(4-grams of the completions that occurred before in the same completion, all 4-grams)."""
    repeats, grams = 0, 0
    for row, keep in zip(ids.cpu(), mask.cpu(), strict=True):
        windows = (
            row[keep].unfold(0, GRAM, 1) if int(keep.sum()) >= GRAM else row.new_empty(0, GRAM)
        )
        grams += len(windows)
        repeats += len(windows) - len(windows.unique(dim=0))
    return float(repeats), float(grams)


def measure_groups(rewards: Tensor) -> Sums:
    """[prompts, group] rewards: their mean, and the groups with a learning signal, whose rewards are not all equal."""
    mixed = (rewards != rewards[:, :1]).any(1)
    return {"reward": total(rewards), "mixed_group_fraction": total(mixed)}


def add(parts: Sequence[Sums]) -> Sums:
    sums: Sums = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + count)
    return sums


def reduced(sums: Mapping[str, tuple[float, float]], accelerator: Accelerator) -> Sums:
    """The sums over all processes."""
    if accelerator.num_processes == 1:
        return dict(sums)
    flat = torch.tensor(list(sums.values()), dtype=torch.float64, device=accelerator.device)
    rows = accelerator.reduce(flat, "sum").tolist()
    return {name: (row[0], row[1]) for name, row in zip(sums, rows, strict=True)}
