"""A model in vLLM: rendered here, scored there; of its distributions a few log-probs come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlopd.config.engines import VllmEngine
from vlopd.config.models import ModelConfig
from vlopd.engines.process import Server, started_vllm
from vlopd.engines.served import Elsewhere
from vlopd.engines.vllm import VllmClient, connected, raw_prompts, score
from vlopd.models.loaded import LoadedModel
from vlopd.types import Completions, Example, Prompts


@dataclass(frozen=True, repr=False)
class ScoredModel(LoadedModel):
    """A model behind vLLM; `model` is an Elsewhere. server: the process that was started for it, if any."""

    client: VllmClient = field(kw_only=True)
    server: Server | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return f"{super().__repr__()} in vLLM at {self.client.url}"

    def completion_scores(
        self, examples: Sequence[Example], prompts: Prompts, completions: Completions, k: int
    ) -> Tensor:
        """[N, 2 (1 + k)]: ids of each completion token and of the k likeliest, then their log-probs.

        prompts: the examples as this model reads them. Raises EngineError.
        """
        raw = raw_prompts(self, prompts, examples)
        ids = [
            row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)
        ]
        return score(self.client, raw, ids, k, self.vocabulary_rows).to(self.device)


def scored_model(
    loaded: LoadedModel,
    config: ModelConfig,
    engine: VllmEngine,
    dtype: torch.dtype,
    device: torch.device,
) -> ScoredModel:
    """A model that vLLM holds. loaded: the same on the meta device, with its processor. Raises EngineError."""
    server, url, token, log = None, engine.url, None, None
    if url is None:
        words = ["--revision", config.revision] if config.revision and not loaded.folder else []
        words += ["--trust-remote-code"] if config.trust_remote_code else []
        server = started_vllm(engine, str(loaded.folder or config.model), dtype, words)
        url, token, log = server.url, server.token, server.log
    return ScoredModel(
        loaded.name,
        cast(PreTrainedModel, Elsewhere(loaded.model, device, dtype)),
        loaded.processor,
        loaded.template_arguments,
        loaded.folder,
        client=connected(engine, url, token, log),
        server=server,
    )
