"""A model whose weights are in another process: rendered here, read there, its output layer applied here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlopd.config.engines import ServedEngine
from vlopd.config.models import ModelConfig
from vlopd.digests import digest_checkpoint
from vlopd.engines.client import Client, Doubtful, EngineError, finite, refuse_other_precision
from vlopd.engines.process import Server, started
from vlopd.engines.sampler import ask_for_completions
from vlopd.engines.wire import pack_completions, pack_prompts
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.types import Completions, Prompts


class Elsewhere(nn.Module):
    """Stands for a model whose weights are elsewhere: its configuration, and the shapes of embedding and output layer.

    model: on the meta device. device, dtype: of what is used here with it.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        self.parameters_elsewhere = model.num_parameters()
        self.device, self.dtype = device, dtype
        # of the meta device: not ours
        self.layers = (model.get_input_embeddings(), model.get_output_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, [H] -> [rows of the vocabulary]."""
        return self.layers[1]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding without its values."""
        return self.layers[0]

    def num_parameters(self) -> int:
        """Parameters of the whole model, wherever they are."""
        return self.parameters_elsewhere


class OutputLayer(Elsewhere):
    """A model elsewhere whose output layer is here.

    head: the output layer's tensors.
    """

    def __init__(self, model: PreTrainedModel, head: Mapping[str, Tensor]):
        weight = head["weight"]
        super().__init__(model, weight.device, weight.dtype)
        self.head = model.get_output_embeddings()
        self.head.load_state_dict(dict(head), strict=True, assign=True)
        self.requires_grad_(False).eval()


@dataclass(frozen=True, repr=False)
class ServedModel(LoadedModel):
    """A model behind `vlopd serve`; `model` is an OutputLayer. server: the process that was started for it, if any."""

    client: Client = field(kw_only=True)
    server: Server | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return f"{super().__repr__()} at {self.client.url}"

    def completion_hidden(self, prompts: Prompts, completions: Completions) -> Tensor:
        """[N, H] hidden states that predict each completion token. Raises EngineError."""
        shape = (completions.n_tokens, self.hidden_size)

        def check(found: dict[str, Tensor], header: dict[str, Any]) -> None:
            refuse_trained(self.client, header)
            hidden = found.get("hidden")
            if hidden is None or tuple(hidden.shape) != shape or hidden.dtype != self.model.dtype:
                raise Doubtful(f"its hidden states are not {list(shape)} of {self.model.dtype}")
            if not finite(hidden):
                raise Doubtful("its hidden states are not finite")

        tensors = {**pack_prompts(prompts), **pack_completions(completions)}
        found, _ = self.client.ask("/hidden", tensors, {}, check)
        return found["hidden"].to(self.device)

    def sample(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        temperature: float,
        uniforms: Tensor,
        columns: int | Tensor,
        top_k: int | None = None,
        top_p: float = 1.0,
        banned_ids: Sequence[int] = (),
        rows: Sequence[int] | None = None,
        engine: str = "eager",
    ) -> Completions:
        """As train.generation.sample, over there. Raises EngineError."""
        settings = (max_new_tokens, temperature, uniforms, columns, top_k, top_p, banned_ids)
        check = partial(refuse_trained, self.client)
        its = ask_for_completions(self.client, check, prompts, *settings, rows, engine)
        return its.to(self.device)


def refuse_trained(client: Client, header: Mapping[str, Any]) -> None:
    """Raises EngineError for an answer by weights that a training sent."""
    if header.get("version") is not None:
        raise EngineError(
            f"{client.url} follows a training's weights now; a teacher needs a `vlopd serve` of its own"
        )


def served_model(
    loaded: LoadedModel,
    config: ModelConfig,
    engine: ServedEngine,
    dtype: torch.dtype,
    device: torch.device,
) -> ServedModel:
    """A model that `engine` holds. loaded: the same on the meta device, with its processor.

    Raises EngineError where the engine does not answer, ConfigError where it holds another model, precision or other
    weights than are here.
    """
    server = None if engine.url else started(config, engine.device, dtype, engine.timeout_seconds)
    url = engine.url or server.url  # type: ignore[union-attr]
    client = Client(url, engine.timeout_seconds, engine.attempts)
    client.expected = about = client.about()
    refuse_other_precision(client, dtype)
    here = loaded.folder
    has_weights = here is not None and any(here.glob("*.safetensors"))
    if has_weights and about.get("weights") != digest_checkpoint(cast(Path, here)):
        raise ConfigError(
            f"{url} holds other weights ({about.get('model')}) than {config.model} has here; serve that model, or "
            "correct teacher.engine.url"
        )

    def check(found: dict[str, Tensor], header: dict[str, Any]) -> None:
        refuse_trained(client, header)
        if not all(map(finite, found.values())):
            raise Doubtful("its output layer is not finite")

    head, _ = client.ask("/head", {}, {}, check)
    try:
        model = OutputLayer(loaded.model, {name: t.to(device, dtype) for name, t in head.items()})
    except RuntimeError as error:
        raise EngineError(
            f"{url}: its output layer is not that of {config.model}: {error}"
        ) from None
    return ServedModel(
        loaded.name,
        cast(PreTrainedModel, model),
        loaded.processor,
        loaded.template_arguments,
        loaded.folder,
        client=client,
        server=server,
    )
