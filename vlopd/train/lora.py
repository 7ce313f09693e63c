"""LoRA by PEFT: the factors of low-rank updates as the trained coordinates of a model.

PEFT wraps the model's layers in place, so that the same model samples, is scored and trains. Its factors are fp32 in
any compute precision, and `LoraTrainable` gives them to the loop as any other coordinates. `fold` ends this: the
updates are added to the weights, and the model is a plain one again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlopd.config.lora import Lora
from vlopd.errors import ConfigError, first_line
from vlopd.files import whole_folder
from vlopd.models import parameter_names
from vlopd.models.loaded import LoadedModel
from vlopd.seeding import generator
from vlopd.train.sparse import Trainable
from vlopd.weights.adapters import WEIGHTS, add_update

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""PEFT's name of the adapter."""


class AdapterSize(NamedTuple):
    rank: int
    parameters: int
    """Numbers in all factors."""
    layers: int
    """Adapted layers."""


class LoraTrainable(Trainable):
    """The factors of a model's LoRA, which it is given here; the model's own parameters are frozen.

    Raises ConfigError for targets that the model lacks or that PEFT cannot adapt.
    """

    def __init__(self, loaded: LoadedModel, lora: Lora, seed: int = 1, offload: bool = False):
        from peft import get_peft_model_state_dict

        total = loaded.model.num_parameters()
        self.wrapped = adapt(loaded.model, lora, seed)
        self.layers = lora_layers(loaded.model)
        self.size = size_of(self.wrapped)
        # under PEFT's names in a file; the tensors are the model's own, which training changes in place
        self.factors = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        super().__init__(loaded.model, offload=offload)
        self.total = total  # without the factors

    @property
    def alpha(self) -> float:
        return self.wrapped.peft_config[ADAPTER].lora_alpha

    def updates(self) -> dict[str, Tensor]:
        """The updates (alpha / rank) B A, in fp32 and the weights' shapes, by parameter name."""
        with torch.no_grad():
            return {f"{n}.weight": its.get_delta_weight(ADAPTER) for n, its in self.layers.items()}

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's tensors with the updates added, each rounded once to its tensor's stored precision."""
        merged = dict(base)
        for name, update in self.updates().items():
            total = add_update(base[name], update.to(base[name].device))
            merged[name] = torch.where(total == base[name], base[name], total)  # 0 and -0 are equal
        return merged

    def save_adapter(self, folder: Path, base: str) -> None:
        """Writes an adapter folder, which PEFT's `PeftModel.from_pretrained` loads onto the model named `base`."""
        config = self.wrapped.peft_config[ADAPTER]
        config.base_model_name_or_path = base
        with whole_folder(folder) as temporary:
            config.save_pretrained(str(temporary))
            save_file(
                {name: factor.cpu() for name, factor in self.factors.items()}, temporary / WEIGHTS
            )
            card = f"LoRA adapter of {base}, trained by vlopd; PEFT loads it onto that.\n"
            (temporary / "README.md").write_text(f"---\nlibrary_name: peft\n---\n{card}")

    def fold(self) -> None:
        """Adds the updates to the model's own weights and removes PEFT's layers; `merged` works as before."""
        for name, update in self.updates().items():
            weight = self.model_parameters[name.replace(".weight", ".base_layer.weight")]
            weight.data.copy_(add_update(weight.data, update))
        unwrap(self.wrapped.get_base_model())


def adapt(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Wraps the model's layers in place; A is drawn from the stream ("lora", seed), B is 0.

    Raises ConfigError for targets that the model lacks or that PEFT cannot adapt.
    """
    assert lora.like is None, "the mask's coordinates are counted before"
    left_out = [
        name
        for name, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None and not weight.requires_grad
    ]
    # torch's attention reads its output layer's weight without calling the layer
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    left_out += [f"{name}.out_proj" for name in attentions]
    rank = lora.rank
    if rank is None:
        assert lora.parameters is not None
        probe = _wrap(model, lora, 1, left_out)
        rank = max(1, int(lora.parameters / size_of(probe).parameters + 0.5))
        unwrap(model)
    with torch.random.fork_rng(devices=()):  # PEFT draws from torch's own generator, on the CPU
        torch.default_generator.manual_seed(generator("cpu", "lora", seed).initial_seed())
        return _wrap(model, lora, rank, left_out)


def _wrap(model: PreTrainedModel, lora: Lora, rank: int, left_out: Sequence[str]) -> PeftModel:
    from peft import LoraConfig, get_peft_model  # a second to import, for LoRA arms alone

    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=sorted(left_out) or None,
        init_lora_weights=True if lora.init == "kaiming" else "gaussian",
    )
    try:
        with warnings.catch_warnings():  # of a name that PEFT still looks up in transformers
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = get_peft_model(model, config)
        for name, layer in lora_layers(model).items():
            weight = layer.get_base_layer()._parameters.get("weight")
            if not isinstance(weight, Tensor):
                raise ValueError(f"{name} has no weight of its own")
            others = [use for use in uses[id(weight)] if use != f"{name}.weight"]
            if others:
                raise ValueError(
                    f"{name}.weight is also {others[0]} (tied), which its update would not reach"
                )
    except ValueError as error:
        unwrap(model)
        raise ConfigError(
            f"lora.targets = {lora.targets!r}: {first_line(error)}; list the ends of linear layers' names, such as "
            '["q_proj", "v_proj"]'
        ) from None
    if isinstance(config.target_modules, set):  # whose order changes from process to process
        config.target_modules = sorted(config.target_modules)
    if isinstance(config.exclude_modules, set):
        config.exclude_modules = sorted(config.exclude_modules)
    return wrapped


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers in a model, by the name of the module that they took the place of."""
    from peft.tuners.lora import LoraLayer

    return {name: its for name, its in model.named_modules() if isinstance(its, LoraLayer)}


def unwrap(model: nn.Module) -> None:
    """Puts the model's own layers back, without the updates."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    vars(model).pop("peft_config", None)  # else PEFT takes the next adapter for a second one


def size_of(wrapped: PeftModel) -> AdapterSize:
    config = wrapped.peft_config[ADAPTER]
    count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return AdapterSize(config.r, count, len(lora_layers(wrapped.get_base_model())))


def adapter_size(model: PreTrainedModel, lora: Lora, freeze: Sequence[str] = ()) -> AdapterSize:
    """The size of a LoRA of a model, which may be on the meta device and is left as it was. Raises as `adapt`."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        parameter_names.freeze(model, freeze)
        wrapped = adapt(model, lora, 0)
        found = size_of(wrapped)
        unwrap(model)
    finally:
        for parameter, was in trains.items():
            parameter.requires_grad_(was)
    return found


def refuse_unlike(lora: Lora, others: Mapping[str, bool]) -> None:
    """Raises ConfigError for a LoRA beside what it cannot be combined with ({what: whether there is one})."""
    for what, there in others.items():
        if there:
            raise ConfigError(f"lora cannot be combined with {what}; leave one of them out")
    if lora.like is not None:
        raise ConfigError(
            f"lora.like = {lora.like!r} is the name of a run's mask; give rank or parameters"
        )
