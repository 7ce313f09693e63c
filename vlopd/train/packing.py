"""Splits a step's completions into batches: for sampling, as many as fit in memory; for training, by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import psutil
import torch
from accelerate import Accelerator

from vlopd import distributed
from vlopd.config.recipe import Recipe
from vlopd.config.training import TrainConfig
from vlopd.train.optimizers import moments

Fits = Callable[[int, int, int], bool]
"""Whether (rows, the longest prompt among them, the longest completion) may be one batch."""

SAMPLING_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Part of the free memory that sampling may use; the rest is for allocator fragmentation and other programs."""


def packed(lengths: Mapping[int, tuple[int, int]], fits: Fits) -> list[list[int]]:
    """Splits places into batches that fit: all in their order, or sorted by length, the longest first.

    `lengths` are the tokens of prompt and completion, by place. Places of equal length stay in order. One that does not
    fit is a batch of its own.
    """
    if fits(len(lengths), *map(max, zip(*lengths.values(), strict=True))):
        return [list(lengths)]
    batches: list[list[int]] = []
    longest = (0, 0)
    for place in sorted(lengths, key=lambda each: -sum(lengths[each])):
        own = lengths[place]
        together = (max(longest[0], own[0]), max(longest[1], own[1]))
        if batches and fits(len(batches[-1]) + 1, *together):
            batches[-1].append(place)
            longest = together
        else:
            batches.append([place])
            longest = own
    return batches


def micro_batches(train: TrainConfig, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The completions of each forward and backward pass, by train.micro_batch or train.micro_tokens."""

    def fits(rows: int, prompt: int, completion: int) -> bool:
        if train.micro_tokens is not None:
            return rows * (prompt + completion) <= train.micro_tokens
        return train.micro_batch is None or rows <= train.micro_batch

    return packed(dict(enumerate(lengths)), fits)


def sampling_budget(accelerator: Accelerator, recipe: Recipe, trained: int) -> int:
    """Bytes that sampling may use in each process, before the first update of `trained` values.

    The optimizer's state is allocated in that update and then kept; gradients are freed before each rollout.
    """
    device, state = accelerator.device, round(4 * moments(recipe.optim) * trained)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        free -= 0 if recipe.train.offload_optimizer else state
    else:
        free = psutil.virtual_memory().available // accelerator.num_processes - state
    own = SAMPLING_SHARE["cuda" if device.type == "cuda" else "cpu"] * free
    return max(0, int(min(distributed.gathered(accelerator, own))))
