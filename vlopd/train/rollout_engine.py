"""Rollouts elsewhere: a copy of the student in another process, brought up to date after every optimizer step."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator
from torch import Tensor

from vlopd import distributed
from vlopd.config.engines import ServedEngine
from vlopd.config.models import ModelConfig
from vlopd.config.objective import RolloutConfig
from vlopd.engines.client import Client, EngineError, refuse_other_precision
from vlopd.engines.process import started
from vlopd.engines.sampler import LostWeights, Sampler
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.train.pair import ModelPair
from vlopd.train.sparse import Trainable
from vlopd.train.weight_updates import WeightUpdates
from vlopd.types import Completions, Prompts

T = TypeVar("T")


@dataclass
class RolloutEngine:
    """Samples with the weights of `version`, the number of optimizer steps that they have had.

    An engine that lost its weights (it was started again, or took a damaged update) gets all of them once more.
    """

    student: LoadedModel
    columns: int | Tensor
    sampler: Sampler
    updates: WeightUpdates

    def follow(self, version: int, sends: bool = True) -> int:
        """Sends what changed; returns the bytes of the update. Of several processes one `sends`. Raises EngineError."""
        if not sends:
            self.sampler.version = version
            return 0
        try:
            self._send(version, first=self.sampler.version < 0)
        except LostWeights:
            self._restore(version)
        return self.updates.bytes

    def sample(
        self,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
    ) -> Completions:
        """The student's completions, as of `ModelPair.sample`. Raises EngineError."""
        try:
            return self.ask(prompts, rollout, uniforms, rows)
        except LostWeights:
            self.restore()
        return self._or_error(lambda: self.ask(prompts, rollout, uniforms, rows))

    def ask(
        self,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
    ) -> Completions:
        """As `sample`, but raises LostWeights where the engine does not hold the version."""
        settings = (
            *(rollout.max_new_tokens, rollout.temperature, uniforms, self.columns),
            *(rollout.top_k, rollout.top_p, (), rows, rollout.decode),
        )

        return self.sampler.sample(prompts, *settings, device=self.student.device)

    def restore(self) -> None:
        """Sends all weights of the version again. Raises EngineError."""
        self._restore(self.sampler.version)

    def _send(self, version: int, first: bool) -> None:
        if first:
            self.updates.forget()
        update = self.updates.next()
        self.sampler.send(version, update, self.updates.checksum(), first)

    def _restore(self, version: int) -> None:
        self._or_error(lambda: self._send(version, first=True))

    def _or_error(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except LostWeights:
            raise EngineError(
                f"{self.sampler.client.url} does not hold the weights that it was just sent; see its messages, start "
                "it again, and run this again: it goes on from the last saved state"
            ) from None


def rollout_engine(
    pair: ModelPair, engine: str | ServedEngine, trainable: Trainable, accelerator: Accelerator
) -> RolloutEngine | None:
    """The engine of a configuration, started or joined; None where this process samples.

    Raises EngineError, and ConfigError where the student is in memory alone.
    """
    if isinstance(engine, str):
        return None
    student = pair.student
    about: tuple[str, str] | None = None
    server = None
    if accelerator.is_main_process:
        if engine.url is None:
            if student.folder is None:
                raise ConfigError(
                    "rollout.engine: the student has no folder; save it and load that"
                )
            attention = student.model.config._attn_implementation
            config = ModelConfig(model=str(student.folder), attention=attention)
            server = started(config, engine.device, student.model.dtype, engine.timeout_seconds)
        about = (engine.url or server.url, secrets.token_hex(8))  # type: ignore[union-attr]
    url, session = next(each for each in distributed.gathered(accelerator, about) if each)
    client = Client(url, engine.timeout_seconds, engine.attempts)
    client.expected = client.about()
    refuse_other_precision(client, student.model.dtype)
    updates = WeightUpdates(trainable, student.model)
    return RolloutEngine(
        student, pair.vocabulary.student, Sampler(client, session, server), updates
    )
