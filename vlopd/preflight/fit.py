"""Settings with which a training fits a device, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vlopd.config.recipe import RecipeSections
from vlopd.config.training import Muon
from vlopd.preflight.memory import DeviceSpeed, Estimate, Forward, Reader, estimate

SMALLEST_CHUNK = 64
"""Tokens of a loss chunk below which nothing is gained."""

Changes = dict[str, int | bool]
"""Settings of a recipe by key: {"train.micro_batch": 4}."""


class Fit(NamedTuple):
    """A recipe's settings that fit, with the estimate under them."""

    changes: Changes
    estimate: Estimate

    def __str__(self) -> str:
        return ", ".join(f"{key} = {str(value).lower()}" for key, value in self.changes.items())


def settings_that_fit(
    recipe: RecipeSections,
    student: Reader,
    teachers: Sequence[Reader],
    speed: DeviceSpeed,
    dtype: torch.dtype,
    trained_fraction: float = 1.0,
    costs: Sequence[Forward] | None = None,
) -> Fit | None:
    """The least costly changes of a recipe with which its peak fits `speed.memory_bytes`; none if it fits as it is.

    A smaller rollout.batch, then smaller micro-batches, then smaller loss chunks; only where these do not suffice
    activation checkpointing, then teachers, then the optimizer in host memory, each with the largest batches that fit
    beside it. Returns None where nothing suffices.
    """

    def tried(changes: Changes) -> Estimate:
        own = changed(recipe, changes)
        return estimate(own, student, teachers, speed, dtype, trained_fraction, costs)

    def fits(changes: Changes) -> bool:
        return tried(changes).peak_bytes <= speed.memory_bytes

    length = student.prompt_tokens + recipe.rollout.max_new_tokens
    by_tokens = recipe.train.micro_tokens is not None
    for level in _levels(recipe, len(teachers)):
        for changes in _batches(recipe, tried(level), speed.memory_bytes, length, by_tokens):
            if fits({**level, **changes}):
                found = {**changes, **level}
                for key in level:  # what the next one made unnecessary
                    if fits(fewer := {k: v for k, v in found.items() if k != key}):
                        found = fewer
                return Fit(found, tried(found))
    return None


def _levels(recipe: RecipeSections, teachers: int) -> Iterator[Changes]:
    """Changes that cost time in every step, one more at a time."""
    on: Changes = {}
    yield dict(on)
    for key, is_open in (
        ("activation_checkpointing", not recipe.train.activation_checkpointing),
        ("offload_teacher", teachers > 0 and not recipe.train.offload_teacher),
        (
            "offload_optimizer",
            not recipe.train.offload_optimizer and not isinstance(recipe.optim, Muon),
        ),
    ):
        if is_open:
            on[f"train.{key}"] = True
            yield dict(on)


def _batches(
    recipe: RecipeSections, found: Estimate, free_bytes: int, length: int, by_tokens: bool
) -> Iterator[Changes]:
    """Smaller batches and chunks than the estimate's, the largest first: rollout, then training, then the chunk."""
    rollout: Changes = {}
    if found.rollout_bytes > free_bytes and found.rollout_batch > 1:
        over = found.rollout_bytes - free_bytes
        each = max(1, (found.memory.kv_cache + found.memory.sampling) // found.rollout_batch)
        rollout = {"rollout.batch": max(1, found.rollout_batch - -(-over // each))}
    yield rollout
    micro = rollout
    for rows in _halves(found.micro_batch):
        own = {"train.micro_tokens": rows * length} if by_tokens else {"train.micro_batch": rows}
        micro = {**rollout, **own}
        yield micro
    for tokens in _halves(recipe.loss.chunk_tokens):
        if tokens >= SMALLEST_CHUNK:
            yield {**micro, "loss.chunk_tokens": tokens}


def _halves(n: int) -> Iterator[int]:
    """Powers of two below n, the largest first."""
    power = 1 << max(0, (n - 1).bit_length() - 1)
    while power >= 1 and n > 1:
        yield power
        power //= 2


def changed(recipe: RecipeSections, changes: Mapping[str, int | bool]) -> RecipeSections:
    """The recipe with other settings, which are not validated again."""
    sections: dict[str, Any] = {
        "rollout": recipe.rollout,
        "train": recipe.train,
        "loss": recipe.loss,
    }
    for key, value in changes.items():
        section, name = key.split(".")
        sections[section] = sections[section].model_copy(update={name: value})
    return recipe.model_copy(update=sections)
