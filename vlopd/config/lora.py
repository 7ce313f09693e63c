"""LoRA of a student: which linear layers get low-rank updates, and of which rank."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vlopd.config.base import Count, Section, Weight

ALL_LINEAR = "all-linear"


class Lora(Section):
    """Trains low-rank updates (alpha / rank) B A of linear layers in place of their weights (LoRA, arXiv 2106.09685).

    PEFT makes, runs and saves them. Training starts from the base, since B is 0.
    """

    rank: Count | None = None
    """Rank of each update. Give this, `like` or `parameters`."""
    like: str | None = None
    """A mask with as many coordinates as the factors shall have numbers, as nearly as a rank allows."""
    parameters: Count | None = None
    """The number of trained parameters, as nearly as a rank allows."""
    alpha: Annotated[Weight, Field(gt=0)] | None = None
    """Factor of the update, over its rank; null for twice the rank."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """PEFT's `target_modules`: `all-linear` (of the vision tower too, without the output layer), a regular expression
    of modules' whole names, or a list of the ends of names. Components in train.freeze get none."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Draw of A, seeded by the arm's seed: uniform in +-1/sqrt(inputs), or normal with standard deviation 1/rank."""

    @field_validator("targets")
    @classmethod
    def check_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError(f'an empty list adapts nothing; name modules, or "{ALL_LINEAR}"')
        if isinstance(targets, str) and targets != ALL_LINEAR:
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"{targets!r} is no regular expression: {error}") from None
        return targets

    @model_validator(mode="after")
    def check_size(self) -> Lora:
        if [self.rank, self.like, self.parameters].count(None) != 2:
            raise ValueError("give one of rank, like (a mask's name) and parameters")
        return self

    def with_parameters(self, parameters: int) -> Lora:
        """The same without `like`, of a mask with so many coordinates."""
        return self.model_copy(update={"like": None, "parameters": parameters})
