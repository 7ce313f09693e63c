"""Rollouts elsewhere: a copy of the student in another process, brought up to date after every optimizer step."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator
from torch import Tensor

from vlopd import distributed
from vlopd.config.engines import ServedRollout, VllmRollout
from vlopd.config.models import ModelConfig
from vlopd.config.objective import RolloutConfig
from vlopd.engines.client import Client, EngineError, LostWeights, refuse_other_precision
from vlopd.engines.process import started, started_vllm
from vlopd.engines.sampler import Sampler
from vlopd.engines.vllm import connected
from vlopd.engines.vllm_sampler import VllmSampler
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.train.fingerprint import Fingerprint
from vlopd.train.pair import ModelPair
from vlopd.train.sparse import Trainable
from vlopd.train.weight_updates import WeightUpdates
from vlopd.types import Completions, Example, Prompts

T = TypeVar("T")


@dataclass
class RolloutEngine:
    """Samples with the weights of `version`, the number of optimizer steps that they have had.

    An engine that lost its weights (it was started again, or took a damaged update) gets all of them once more.
    """

    student: LoadedModel
    columns: int | Tensor
    sampler: Sampler | VllmSampler
    updates: WeightUpdates
    fingerprint: Fingerprint | None = None
    """Compared after every update, of an engine that computes by other means."""

    def follow(self, version: int, sends: bool = True) -> dict[str, float]:
        """Sends what changed; returns metrics of it. Of several processes one `sends`. Raises EngineError."""
        if not sends:
            self.sampler.version = version
            return {}
        try:
            return self._send(version, first=self.sampler.version < 0)
        except LostWeights:
            return self._restore(version)

    def sample(
        self,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """The student's completions, as of `ModelPair.sample`. Raises EngineError."""
        asked = (prompts, rollout, uniforms, rows, examples)
        try:
            return self.ask(*asked)
        except LostWeights:
            self.restore()
        return self._or_error(lambda: self.ask(*asked))

    def ask(
        self,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """As `sample`, but raises LostWeights where the engine does not hold the version."""
        settings = (
            *(rollout.max_new_tokens, rollout.temperature, uniforms, self.columns),
            *(rollout.top_k, rollout.top_p, (), rows, rollout.decode),
        )
        return self.sampler.sample(
            prompts, *settings, device=self.student.device, examples=examples
        )

    def restore(self) -> None:
        """Sends all weights of the version again. Raises EngineError."""
        self._restore(self.sampler.version)

    def _send(self, version: int, first: bool) -> dict[str, float]:
        found: dict[str, float] = {"sent_bytes": self.sampler.send(version, self.updates, first)}
        if self.fingerprint is not None:
            assert isinstance(self.sampler, VllmSampler)
            found["engine_gap"] = self.fingerprint.gap(self.sampler)
        return found

    def _restore(self, version: int) -> dict[str, float]:
        return self._or_error(lambda: self._send(version, first=True))

    def _or_error(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except LostWeights as error:
            why = f" ({error})" if str(error) else ""
            raise EngineError(
                f"{self.sampler.client.url} does not hold the weights that it was just sent{why}; see its messages, "
                "start it again, and run this again: it goes on from the last saved state"
            ) from None


def rollout_engine(
    pair: ModelPair,
    engine: str | ServedRollout | VllmRollout,
    trainable: Trainable,
    accelerator: Accelerator,
    examples: Callable[[], Sequence[Example]],
) -> RolloutEngine | None:
    """The engine of a configuration, started or joined; None where this process samples.

    examples: gives some of the data, for a fingerprint.

    Raises EngineError, and ConfigError where the student is in memory alone, or an engine cannot sample what it shares
    with its teachers.
    """
    if isinstance(engine, str):
        return None
    student = pair.student
    if isinstance(engine, VllmRollout) and pair.vocabulary.size != student.vocabulary_rows:
        raise ConfigError(
            f"rollout.engine: {student.name} has {student.vocabulary_rows} tokens, of which {pair.vocabulary.size} are "
            'shared, and vLLM\'s log-probs are over all; set rollout.engine = {type = "vlopd"}'
        )
    about: tuple[str, str | None, str] | None = None
    server = None
    if accelerator.is_main_process:
        if engine.url is None:
            if student.folder is None:
                raise ConfigError(
                    "rollout.engine: the student has no folder; save it and load that"
                )
            if isinstance(engine, VllmRollout):
                words = ["--worker-extension-cls", "vlopd_worker.Extension"]
                server = started_vllm(engine, str(student.folder), student.model.dtype, words)
            else:
                attention = student.model.config._attn_implementation
                config = ModelConfig(model=str(student.folder), attention=attention)
                server = started(config, engine.device, student.model.dtype, engine.timeout_seconds)
        url, token = engine.url or "", None
        if server is not None:
            url, token = server.url, server.token
        about = (url, token, secrets.token_hex(8))
    url, token, session = next(each for each in distributed.gathered(accelerator, about) if each)
    updates = WeightUpdates(trainable, student.model)
    columns = pair.vocabulary.student
    if isinstance(engine, VllmRollout):
        its = connected(engine, url, token, None if server is None else server.log)
        sampler = VllmSampler(its, session, student, engine.weights, engine.folder, server)
        fingerprint = Fingerprint.of(student, examples(), engine.tolerance)
        return RolloutEngine(student, columns, sampler, updates, fingerprint)
    client = Client(url, engine.timeout_seconds, engine.attempts)
    client.expected = client.about()
    refuse_other_precision(client, student.model.dtype)
    return RolloutEngine(student, columns, Sampler(client, session, server), updates)
