"""Signal nulls: training on a signal that carries nothing, everything else as in the real arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from vlopd.config.base import Section, as_type
from vlopd.config.recipe import Recipe

NullType = Literal[
    "rademacher",
    "sequence_sign",
    "shuffled_teacher",
    "permuted_vocabulary",
    "random_gradient",
    "random_reward",
]

OF_TEACHER = ("shuffled_teacher", "permuted_vocabulary")
"""Nulls of what a teacher says."""


class SignalNull(Section):
    """A signal without information in place of the objective's; nothing else differs from the real arm."""

    type: NullType
    """`rademacher` multiplies each token's loss by a random sign, `sequence_sign` each completion's;
    `shuffled_teacher` permutes the teacher's predictions over the step's tokens; `permuted_vocabulary` its logits over
    tokens, once an arm; `random_gradient` takes normal gradients of the real arm's norm and no teacher;
    `random_reward` shuffles a reward's advantages among the completions of a prompt."""
    replay: str | None = None
    """The real arm whose completions are replayed; null samples its own, which drift from the real arm's."""

    @property
    def label(self) -> str:
        """The null's name in tables: `rademacher`, or `rademacher, replayed`."""
        return self.type if self.replay is None else f"{self.type}, replayed"

    def refuse_other_recipes(self, recipe: Recipe) -> None:
        """Raises ValueError where the recipe has nothing that this null could replace."""
        if self.type in OF_TEACHER and not recipe.learns_from_teacher:
            raise ValueError(
                f'null {self.type}: nothing is learned from a teacher ({recipe.objective}); use null = "rademacher"'
            )
        if self.type == "random_reward" and recipe.reward is None:
            raise ValueError(
                f'null random_reward: there is no reward ({recipe.objective}); use null = "rademacher", or set reward'
            )
        writes = "teacher" in recipe.rollout.source.shares
        if self.type == "random_gradient" and writes and self.replay is None:
            raise ValueError(
                "null random_gradient takes no teacher, and this one writes the completions (rollout.source); "
                "replay those of the real arm: null.replay"
            )


SignalNullConfig = Annotated[SignalNull, BeforeValidator(as_type)]
"""`null = "rademacher"` is short for `null = {type = "rademacher"}`."""


def replayed_by(table: Any) -> str | None:
    """The arm that an arm's table replays, before it is validated."""
    null = table.get("null") if isinstance(table, Mapping) else None
    replay = null.get("replay") if isinstance(null, Mapping) else None
    return replay if isinstance(replay, str) else None
