"""Angles between the gradients of prompts with and without their pictures, beside the angles that noise alone gives.

arXiv 2606.00564 splits the distillation loss of a vision-language model into a language prior (the prompt without its
picture) and visual grounding (the rest), and finds their gradients nearly orthogonal. But two gradients of one loss on
different prompts are far from parallel too, since both are mostly sampling noise. An angle means something only beside
that of two halves of the same kind, and beside that of losses whose tokens have random signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from vlopd.config.recipe import Recipe
from vlopd.models.parameter_names import classify
from vlopd.train.pair import ModelPair
from vlopd.train.rollouts import Batch
from vlopd.train.token_selection import token_weights
from vlopd.types import Example

Gradient = Mapping[str, Tensor]
"""By parameter; one that a forward pass does not use is missing."""
Group = tuple[str, str]
"""Component and module; "all" for every one of them."""

COMPARED = {
    "picture, picture": (("picture", "A"), ("picture", "B")),
    "removed, removed": (("removed", "A"), ("removed", "B")),
    "picture, removed": (("picture", "A"), ("removed", "B")),
    "picture, removed, same prompts": (("picture", "A"), ("removed", "A")),
    "grounding, removed": (("grounding", "A"), ("removed", "B")),
    "signs, signs": (("signs", "A"), ("signs", "B")),
    "picture, signs": (("picture", "A"), ("signs", "B")),
}
"""The compared gradients: kind, and half of the batch. A and B have no prompt in common."""
CORRECTED = "picture, removed, without sampling noise"


def without_pictures(example: Example) -> Example:
    """The example with its images and their parts of the turns removed; the text stays."""
    turns = []
    for turn in example.messages:
        content = turn["content"]
        if not isinstance(content, str):
            content = [part for part in content if part["type"] != "image"]
        turns.append({**turn, "content": content})
    return replace(example, messages=tuple(turns), images=())


def gradient_of(
    pair: ModelPair, recipe: Recipe, batch: Batch, signs: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The gradient of the recipe's loss over a batch, for each of the student's parameters, fp32.

    signs: a stream of random signs, by which each token's loss is multiplied.
    """
    model, completions = pair.student.model, batch.completions
    model.zero_grad(set_to_none=True)
    forwards = pair.teacher_forward(batch.examples, completions, batch.rendered)
    counts = completions.n_tokens, len(completions)
    weights = token_weights(recipe.loss, completions.mask, *counts, recipe.rollout.max_new_tokens)
    if signs is not None:
        drawn = torch.randint(0, 2, weights.shape, generator=signs) * 2 - 1
        weights = weights * drawn.to(weights)
    pair.loss_of(
        recipe.loss,
        forwards,
        batch.prompts,
        completions,
        recipe.reward,
        batch.advantages,
        weights,
        diagnostics=False,
    )
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients_of_halves(
    pair: ModelPair, recipe: Recipe, halves: Mapping[str, Batch], signs: torch.Generator
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The gradients of `COMPARED`, by kind and half: with pictures, the same completions without, their difference
    (visual grounding), and with pictures and random signs of tokens."""
    found = {}
    for half, batch in halves.items():
        bare = pair.render([without_pictures(example) for example in batch.examples])
        picture = gradient_of(pair, recipe, batch)
        removed = gradient_of(pair, recipe, replace(batch, rendered=bare))
        found["picture", half], found["removed", half] = picture, removed
        found["grounding", half] = {
            name: value - removed.get(name, 0.0) for name, value in picture.items()
        }
        found["signs", half] = gradient_of(pair, recipe, batch, signs)
    return found


def cosines(a: Gradient, b: Gradient) -> dict[Group, float]:
    """The cosine of two gradients over the whole model, each component, and each module of one, in float64.

    Parameters that one lacks count as zero in it; groups where either gradient is zero are left out.
    """
    sums: dict[Group, np.ndarray] = {}
    for name in {**a, **b}:
        where = classify(name)
        x, y = (side.get(name) for side in (a, b))
        own = np.array([_dot(x, y), _dot(x, x), _dot(y, y)])
        for group in (("all", "all"), (where.component, "all"), (where.component, where.module)):
            sums[group] = sums.get(group, 0.0) + own
    return {
        group: float(xy / math.sqrt(xx * yy)) for group, (xy, xx, yy) in sums.items() if xx * yy > 0
    }


def _dot(x: Tensor | None, y: Tensor | None) -> float:
    if x is None or y is None:
        return 0.0
    return float((x.double() * y.double()).sum())


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values, one a batch, and Student's interval for it; without width for one value alone."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = student_t.ppf(0.5 + confidence / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def corrected(
    between: Sequence[float], first: Sequence[float], second: Sequence[float]
) -> tuple[float, float, float] | None:
    """The cosine of two kinds' expected gradients, with an interval: mean(between) / sqrt(mean(first) mean(second)).

    Sampling noise shortens the cosine of independent gradients by the root of either kind's cosine with itself
    (Spearman's correction for attenuation); the interval is of the jackknife over batches. Not clipped to [-1, 1]. None
    where a kind's own cosine, with any batch left out, is not positive: its gradient is noise.
    """
    columns = np.array([between, first, second])
    n = columns.shape[1]
    left_out = [np.delete(columns, i, axis=1).mean(1) for i in range(n)] if n > 1 else []
    means = [columns.mean(1), *left_out]
    if any(own[1] <= 0 or own[2] <= 0 for own in means):
        return None
    whole, *others = (float(own[0] / math.sqrt(own[1] * own[2])) for own in means)
    return interval([n * whole - (n - 1) * other for other in others] or [whole])


def summary(batches: Sequence[Mapping[str, Mapping[Group, float]]]) -> list[dict[str, object]]:
    """Rows by group and compared kinds: mean cosine over batches, its interval, the mean's angle in degrees.

    batches: of each the cosines by kinds (`COMPARED`) and group.
    """
    groups = dict.fromkeys(group for each in batches for own in each.values() for group in own)
    rows: list[dict[str, object]] = []
    for component, module in sorted(groups):
        columns = {
            kinds: [
                own for each in batches if (own := each[kinds].get((component, module))) is not None
            ]
            for kinds in COMPARED
        }
        found = {kinds: (interval(own), len(own)) for kinds, own in columns.items() if own}
        parts = [
            columns[kinds] for kinds in ("picture, removed", "picture, picture", "removed, removed")
        ]
        if all(len(own) == len(batches) for own in parts) and (fixed := corrected(*parts)):
            found[CORRECTED] = (fixed, len(batches))
        for kinds, ((mean, low, high), n) in found.items():
            angle = math.degrees(math.acos(min(1.0, max(-1.0, mean))))
            row = {"component": component, "module": module, "gradients": kinds, "cosine": mean}
            rows.append({**row, "low": low, "high": high, "degrees": angle, "batches": n})
    return rows
