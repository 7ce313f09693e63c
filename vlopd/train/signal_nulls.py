"""Signal nulls: what an update's gradient is computed from where the signal is to carry nothing.

Random numbers come from streams named by the null, the seed, the step and the update, and belong to a completion's
place among the step's and to a token's position in it, so they do not depend on how the step is split. (The teacher's
predictions alone are shuffled among the tokens of one process.) What is logged remains of the real signal, but for the
`loss` of `random_reward`, with the shuffled advantages, and of `random_gradient` where the objective needs a teacher:
the tokens' -log q (its `kl` is null).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlopd import seeding
from vlopd.config.objective import NLL, SCORES_ALONE
from vlopd.config.recipe import Recipe
from vlopd.config.signal_nulls import SignalNull
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.train.pair import ModelPair, TeacherForward
from vlopd.train.rollouts import Batch, by_place
from vlopd.train.sparse import Trainable
from vlopd.train.teacher import PermutedTeacher

Forwards = dict[int, list[TeacherForward]]
"""The teachers' forward passes over a step's micro-batches, by index."""


@dataclass(frozen=True)
class NullUpdate:
    """What one update learns from instead of the signal; by default from the signal."""

    is_measured_alone: bool = False  # nothing is back-propagated: gradients are drawn
    signs: Tensor | None = (
        None  # [B, C] or [B, 1], of the token losses of the process's completions, by place
    )
    order: Tensor | None = None  # [V], of the teachers' columns
    shuffled: Forwards | None = None

    def weighted(self, batch: Batch, weights: Tensor) -> Tensor | None:
        """The weights [N] of a micro-batch's token losses, with their signs; None for no backward pass."""
        if self.is_measured_alone:
            return None
        if self.signs is None:
            return weights
        mask = batch.completions.mask
        rows = self.signs[list(batch.places), : mask.shape[1]].to(mask.device)
        return weights * rows.expand(mask.shape)[mask]

    def learned(self, k: int, theirs: Sequence[TeacherForward]) -> list[TeacherForward] | None:
        """The forward passes that micro-batch `k` learns from; None where these are `theirs`."""
        if self.shuffled is not None:
            device = theirs[0].hidden.device
            return [each.to(device) for each in self.shuffled[k]]
        if self.order is None:
            return None
        return [f._replace(teacher=PermutedTeacher(f.teacher, self.order)) for f in theirs]


@dataclass(frozen=True)
class NullSignal:
    """A signal null of one training, in one process, whose prompts are `share` of each step's."""

    null: SignalNull
    recipe: Recipe
    seed: int
    share: range
    order: Tensor | None = None

    @staticmethod
    def of(
        null: SignalNull, pair: ModelPair, recipe: Recipe, seed: int, share: range
    ) -> NullSignal:
        is_permuted = null.type == "permuted_vocabulary"
        if null.type in ("permuted_vocabulary", "shuffled_teacher") and not pair.has_whole_teachers:
            raise ConfigError(f"null {null.type} {SCORES_ALONE}")
        order = permuted_columns(pair, "null", null.type, seed) if is_permuted else None
        return NullSignal(null, recipe, seed, share, order)

    @property
    def is_gradient(self) -> bool:
        """Whether gradients are drawn, and no teacher is needed."""
        return self.null.type == "random_gradient"

    @property
    def needs_forwards(self) -> bool:
        """Whether an update needs the teachers' forward passes over all of the step's micro-batches first."""
        return self.null.type == "shuffled_teacher"

    def update(
        self, step: int, update: int, batches: Sequence[Batch], forwards: Forwards | None
    ) -> NullUpdate:
        """What an update learns from."""
        stream = ("null", self.null.type, self.seed, step, update)
        if self.null.type in ("rademacher", "sequence_sign"):
            rollout, prompts = self.recipe.rollout, self.recipe.train.prompts_per_step
            n = rollout.completions_per_prompt
            width = rollout.max_new_tokens if self.null.type == "rademacher" else 1
            draws = seeding.uniforms(prompts * n, width, *stream)
            mine = draws[self.share.start * n : self.share.stop * n]
            return NullUpdate(signs=torch.where(mine < 0.5, -1.0, 1.0).double())
        if self.null.type == "shuffled_teacher":
            assert forwards is not None
            return NullUpdate(shuffled=shuffled(forwards, batches, *stream, self.share.start))
        return NullUpdate(is_measured_alone=self.is_gradient, order=self.order)

    def rewarded(self, step: int, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches; of `random_reward` with each prompt's advantages shuffled among its completions.

        A completion has any of its group's advantages with equal probability, and these sum to 0: given the
        completions, the expected policy gradient is 0. The rewards that are logged stay.
        """
        advantages = [batch.advantages for batch in batches if batch.advantages is not None]
        if self.null.type != "random_reward" or not advantages:
            return list(batches)
        n, prompts = self.recipe.rollout.completions_per_prompt, self.recipe.train.prompts_per_step
        draws = seeding.uniforms(prompts, n, "null", self.null.type, self.seed, step)
        order = draws[self.share.start : self.share.stop].argsort(1)
        groups = by_place(batches, advantages).view(-1, n)
        mixed = groups.gather(1, order.to(groups.device)).flatten()
        return [replace(batch, advantages=mixed[list(batch.places)]) for batch in batches]

    @property
    def measured(self) -> Recipe:
        """The recipe whose loss is logged: where one needs the teacher that there is not, of the tokens' -log q."""
        return without_teacher(self.recipe) if self.is_gradient else self.recipe

    def draw_gradients(
        self, trainable: Trainable, step: int, update: int, norm: float | None
    ) -> None:
        """Sets i.i.d. normal gradients in the trained coordinates, scaled to the norm over all of them.

        Without a norm, to optim.max_grad_norm, or 1. The same in every process.
        """
        names = ("null", self.null.type, self.seed, step, update)
        drawn = []
        for name in trainable.slots:
            source = seeding.generator("cpu", *names, name)
            drawn.append(torch.randn(trainable.shape(name), generator=source))
        total = math.sqrt(sum(float(each.double().square().sum()) for each in drawn))
        wanted = norm if norm is not None else self.recipe.optim.max_grad_norm or 1.0
        for (name, slot), each in zip(trainable.slots.items(), drawn, strict=True):
            gradient = trainable.part(name, each * (wanted / total))
            slot.values.grad = gradient.to(slot.values.device, slot.values.dtype)


def without_teacher(recipe: Recipe) -> Recipe:
    """The recipe whose loss can be computed without a teacher: the tokens' -log q where its own needs one."""
    if not recipe.learns_from_teacher:
        return recipe
    plain = NLL(chunk_tokens=recipe.loss.chunk_tokens, normalisation=recipe.loss.normalisation)
    return recipe.model_copy(update={"loss": plain, "reward": None})


def shuffled(forwards: Forwards, batches: Sequence[Batch], *stream: str | int) -> Forwards:
    """The forward passes with each teacher's hidden states permuted over all tokens that it scores.

    A teacher's hidden states fit its own output layer, so several teachers' are shuffled apart. The order before is by
    place and position, so the result does not depend on micro-batches.
    """
    found = {k: list(theirs) for k, theirs in forwards.items()}
    by_teacher: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for k, theirs in forwards.items():
        lengths = batches[k].completions.mask.sum(1).tolist()
        for j, forward in enumerate(theirs):
            start = 0
            for row in forward.rows:
                part = (batches[k].places[row], k, j, start, start + lengths[row])
                by_teacher.setdefault(id(forward.teacher), []).append(part)
                start = part[-1]
    for parts in by_teacher.values():
        parts.sort()
        hidden = torch.cat([forwards[k][j].hidden[a:b] for _, k, j, a, b in parts])
        source = seeding.generator("cpu", *stream, parts[0][0])
        mixed = hidden[torch.randperm(len(hidden), generator=source).to(hidden.device)]
        for k, j in dict.fromkeys((k, j) for _, k, j, _, _ in parts):
            found[k][j] = found[k][j]._replace(hidden=torch.empty_like(forwards[k][j].hidden))
        done = 0
        for _, k, j, a, b in parts:
            found[k][j].hidden[a:b] = mixed[done : done + b - a]
            done += b - a
    return found


def permuted_columns(pair: ModelPair, *stream: str | int) -> Tensor:
    """A random order [V] of the shared columns; those of tokens that a model may not give stay where they are."""
    vocabulary = pair.vocabulary
    is_fixed = _unsampleable(pair.student, vocabulary.student, vocabulary.size)
    for teacher in pair.teachers:
        columns = vocabulary.teachers[teacher.index]
        is_fixed |= _unsampleable(teacher.loaded, columns, vocabulary.size)
    free = (~is_fixed).nonzero()[:, 0]
    order = torch.arange(vocabulary.size)
    order[free] = free[torch.randperm(len(free), generator=seeding.generator("cpu", *stream))]
    return order


def _unsampleable(loaded: LoadedModel, columns: int | Tensor, size: int) -> Tensor:
    """Whether each shared column is of a token that the model may not give, [V]."""
    ids = torch.arange(size) if isinstance(columns, int) else columns.cpu()
    return torch.isin(ids, torch.tensor(loaded.unsampleable_ids, dtype=torch.long))
