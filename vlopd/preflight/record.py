"""What `vlopd check` predicts of an arm's memory, beside what its training recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlopd.config.recipe import Recipe
from vlopd.errors import UserError
from vlopd.preflight.memory import DeviceSpeed, Reader, estimate
from vlopd.train.pair import ModelPair
from vlopd.train.signal_nulls import without_teacher


def predicted_memory(
    pair: ModelPair, recipe: Recipe, trained_fraction: float, recorded: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Bytes by part and the peaks of phases, for the longest prompts and the sampling batch of a memory.json.

    Completions count at full length. None where the family cannot be traced (`trace`).
    """
    readers = [
        Reader(each.model, tokens, each.model.config._attn_implementation)
        for each, tokens in zip(
            (pair.student, *(its.loaded for its in pair.teachers)),
            recorded["prompt_tokens"],
            strict=True,
        )
    ]
    if not pair.teachers:  # a null that draws its gradients
        recipe = without_teacher(recipe)
    if (batch := recorded["sampling_batch"]) is not None:
        rollout = recipe.rollout.model_copy(update={"batch": batch["rows"]})
        recipe = recipe.model_copy(update={"rollout": rollout})
    speed = DeviceSpeed(1.0, 1.0, 1 << 62, 0.0)  # sizes alone
    try:
        found = estimate(
            recipe, readers[0], readers[1:], speed, pair.student.model.dtype, trained_fraction
        )
    except UserError:
        return None
    peaks = {"rollout": found.rollout_bytes, "teacher": found.teacher_bytes}
    peaks |= {"student": found.gradient_bytes, "update": found.update_bytes}
    return {
        "parts_bytes": found.memory._asdict(),
        "on_host": list(found.on_host),
        "peak_bytes": peaks,
    }
