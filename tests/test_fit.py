"""Settings that fit a device are computed: the least costly first, and none where nothing suffices."""

import re

import pytest
import torch
from transformers import LlamaConfig

from vlopd.config.recipe import Recipe
from vlopd.errors import OutOfMemory
from vlopd.models.meta import meta_model
from vlopd.pipeline import with_remedy
from vlopd.preflight.fit import changed, settings_that_fit
from vlopd.preflight.memory import DeviceSpeed, Reader, estimate, forward_cost, trace
from vlopd.run.folder import RunFolder

MODEL = LlamaConfig(
    vocab_size=4000, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
RECIPE = Recipe(
    train={"steps": 1, "prompts_per_step": 16},
    rollout={"max_new_tokens": 100, "completions_per_prompt": 2, "batch": 32},
)
READER = Reader(meta_model(MODEL), 60)
COSTS = [forward_cost(READER, torch.bfloat16, trace(READER, 100))] * 2
BIGGER = Reader(meta_model(LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": 40})), 60)
"""A teacher, with the student's costs: only its weights count here."""


def fitting(memory_bytes, recipe=RECIPE, teacher=READER):
    speed = DeviceSpeed(1e12, 1e11, round(memory_bytes), 1e-5)
    return settings_that_fit(recipe, READER, [teacher], speed, torch.bfloat16, 1.0, COSTS)


def peak(recipe, teacher=READER):
    speed = DeviceSpeed(1e12, 1e11, 10**12, 1e-5)
    return estimate(recipe, READER, [teacher], speed, torch.bfloat16, 1.0, COSTS).peak_bytes


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.3, 0.25])
def test_what_is_found_fits_and_is_no_more_than_needed(share):
    """The peak under the changes is at most the device's memory; twice the micro-batch would not fit."""
    limit = share * peak(RECIPE)
    found = fitting(limit)
    assert found.estimate.peak_bytes == peak(changed(RECIPE, found.changes)) <= limit
    assert bool(found.changes) == (share < 1)
    if size := found.changes.get("train.micro_batch"):
        assert peak(changed(RECIPE, {**found.changes, "train.micro_batch": 2 * size})) > limit


def test_changes_come_in_the_order_of_their_cost():
    """Micro-batches, then the chunk, then checkpointing, then teachers and the optimizer in host memory; with
    micro_tokens these are lowered instead."""
    assert fitting(0.5 * peak(RECIPE)).changes.keys() == {"train.micro_batch"}
    small = Recipe(**{**RECIPE.model_dump(), "train": {**dict(RECIPE.train), "micro_tokens": 3200}})
    assert fitting(0.8 * peak(small), small).changes == {"train.micro_tokens": 16 * 160 // 2}
    least = changed(RECIPE, {"train.micro_batch": 1, "rollout.batch": 1})
    assert "loss.chunk_tokens" in fitting(0.97 * peak(least), least).changes
    lesser = changed(least, {"loss.chunk_tokens": 64})
    assert str(fitting(0.99 * peak(lesser), lesser)) == "train.activation_checkpointing = true"
    big = peak(lesser, BIGGER) - READER.model.num_parameters()
    assert fitting(0.9 * big, lesser, BIGGER).changes == {"train.offload_teacher": True}
    on_host = fitting(0.45 * big, lesser, BIGGER)
    assert on_host.changes["train.offload_optimizer"] is True
    assert on_host.estimate.on_host == ("values", "gradients", "moments", "teacher_weights")


def test_nothing_suffices():
    """A device that does not hold the student's weights gives None, and so does a Muon that needs its state there."""
    assert fitting(READER.model.num_parameters()) is None
    muon = Recipe(**{**RECIPE.model_dump(), "optim": {"type": "muon"}})
    assert fitting(12 * READER.model.num_parameters(), muon) is None
    assert fitting(12 * READER.model.num_parameters()).changes["train.offload_optimizer"] is True


def test_an_arm_without_memory_ends_in_settings_that_would_fit(kind, make_config, tmp_path):
    """The line has the phase and what was wanted, and computed settings in place of the general remedy."""
    config = make_config(kind, arms={"base": {"type": "base"}, "full": {"type": "distill"}})
    run = RunFolder.create(tmp_path / "run", config)
    error = OutOfMemory("student", 3 << 30, {"gradients": 1 << 30}, remedy="a smaller model")
    text = str(with_remedy(run, config, "full", error))
    assert text.startswith("out of memory (student): 3.0 GiB more were wanted")
    assert "gradients 1.0 GiB" in text and "smaller model" not in text and "\n" not in text
    found = re.search(r"; would fit, as predicted: train.micro_batch = (\d) \((\S+) [MkG]B\)", text)
    assert found and int(found[1]) < 4
