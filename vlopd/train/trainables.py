"""Which `Trainable` a recipe asks for: whole, or in parts where several processes share it (train.sharding)."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from vlopd.config.engines import VllmRollout
from vlopd.config.recipe import Recipe
from vlopd.config.training import AdamW, Muon
from vlopd.errors import ConfigError
from vlopd.train.fsdp import FullyShardedTrainable, RowAverage
from vlopd.train.sharding import ShardedTrainable
from vlopd.train.sparse import Trainable
from vlopd.weights.subspace import Projection


def refuse_unsharded(recipe: Recipe, is_lora: bool) -> None:
    """Raises ConfigError for what needs whole tensors, or is not written for parts."""
    train, optim = recipe.train, recipe.optim
    eight_bits = isinstance(optim, AdamW) and optim.state_bits == 8
    for name, is_on in {
        "optim.type = 'muon', which needs whole matrices": isinstance(optim, Muon),
        "optim.state_bits = 8": eight_bits,
        "train.offload_optimizer": train.offload_optimizer,
        "train.evidence_every": bool(train.evidence_every),
        "a LoRA": is_lora,
        'rollout.engine.type = "vllm"': train.sharding == "full"
        and isinstance(recipe.rollout.engine, VllmRollout),
    }.items():
        if is_on:
            raise ConfigError(f"train.sharding = {train.sharding!r} does not go with {name}")


def trainable_of(
    model: PreTrainedModel,
    recipe: Recipe,
    accelerator: Accelerator,
    mask: Mapping[str, Tensor] | None,
    projections: Mapping[str, Projection] | None,
    stored: Mapping[str, Tensor],
    is_average: bool = False,
) -> Trainable:
    """The trained coordinates, in parts where train.sharding says so and there are several processes.

    is_average: of a teacher, whose weights stay whole.
    """
    train = recipe.train
    if train.sharding == "none" or accelerator.num_processes == 1:
        offload = train.offload_optimizer
        return Trainable(model, mask, projections, stored=stored, offload=offload)
    place = accelerator.process_index, accelerator.num_processes
    if train.sharding == "full":
        if is_average:
            return RowAverage(model, place, (), mask, stored=stored)
        return FullyShardedTrainable(model, place, accelerator.device, mask, projections, stored)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    late = [name for name, parameter in model.named_parameters() if id(parameter) in head]
    return ShardedTrainable(model, place, late, mask, projections, stored)
