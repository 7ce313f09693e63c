"""What would have fitted, for an arm that ran out of memory."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import psutil
import torch
from rich.filesize import decimal

from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.distributed import accelerator
from vlopd.errors import OutOfMemory, UserError
from vlopd.models.load import DTYPES, load_model_config
from vlopd.models.meta import meta_model
from vlopd.preflight.fit import Fit, settings_that_fit
from vlopd.preflight.memory import DeviceSpeed, Reader, estimate, forward_cost, trace
from vlopd.preflight.pair import meta_prompts

MARGIN = 0.95
"""Part of a device's memory that a prediction may fill, or of the prediction that proved too much."""


def with_settings_that_fit(
    error: OutOfMemory, config: ExperimentConfig, arm: DistillArm, density: float = 1.0
) -> OutOfMemory:
    """The error with settings that would fit in place of a general remedy, where they can be computed."""
    with suppress(UserError):
        device = accelerator().device
        kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
        speed = DeviceSpeed(1.0, 1.0, _memory_of(device), 0.0, kind)
        fit = _fit(config, arm, density, speed)
        if fit is None:
            remedy = "no settings would fit: a mask, train.freeze, a smaller model or a larger device would"
        else:
            remedy = f"would fit, as predicted: {fit} ({decimal(fit.estimate.peak_bytes)})"
        return OutOfMemory(error.phase, error.wanted_bytes, error.held, error.free_bytes, remedy)
    return error


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def _fit(
    config: ExperimentConfig, arm: DistillArm, density: float, speed: DeviceSpeed
) -> Fit | None:
    """Settings under which the arm's predicted peak is below the device's memory, and below today's prediction."""
    recipe = config.recipe_of(arm)
    sections = {name: section for name, section in recipe if name in type(config).model_fields}
    config = config.model_copy(update=sections)
    wanted = (config.student, *(t.loaded_from(config.student) for t in config.teachers.values()))
    models = [
        meta_model(load_model_config(each.model, each.revision, each.trust_remote_code))
        for each in wanted
    ]
    lengths, _ = meta_prompts(config, wanted, models)
    readers = [
        Reader(model, length, each.attention or "sdpa")
        for model, length, each in zip(models, lengths, wanted, strict=True)
    ]
    dtype = DTYPES[config.precision.resolved]
    new = config.rollout.max_new_tokens
    costs = [forward_cost(each, dtype, trace(each, new)) for each in readers]
    args = (config, readers[0], readers[1:])
    peak = estimate(*args, speed, dtype, density, costs).peak_bytes
    limit = speed._replace(memory_bytes=round(MARGIN * min(speed.memory_bytes, peak)))
    return settings_that_fit(*args, limit, dtype, density, costs)
