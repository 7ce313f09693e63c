"""Log-probs of fixed completions: whether an engine's weights are the training's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlopd.engines.client import LostWeights
from vlopd.engines.vllm_sampler import VllmSampler
from vlopd.models.loaded import LoadedModel
from vlopd.seeding import generator
from vlopd.train.distributions import logprobs_at
from vlopd.types import Completions, Example, Prompts

TOKENS = 16
"""Of each completion."""
TOLERANCE = {torch.float32: 1e-4}
"""Nats; in less precision LOOSE."""
LOOSE = 0.5


@dataclass(frozen=True)
class Fingerprint:
    """Examples with random completions, and the largest difference of a log-prob between training and engine."""

    student: LoadedModel
    examples: Sequence[Example]
    prompts: Prompts
    completions: Completions
    tolerance: float

    @staticmethod
    def of(
        student: LoadedModel, examples: Sequence[Example], tolerance: float | None
    ) -> Fingerprint:
        """Of some examples. tolerance: nats; None for that of the student's precision."""
        rows = torch.arange(student.vocabulary_rows)
        allowed = rows[~torch.isin(rows, torch.tensor(student.unsampleable_ids, dtype=torch.long))]
        shape = (len(examples), TOKENS)
        drawn = torch.randint(len(allowed), shape, generator=generator("cpu", "fingerprint"))
        mask = torch.ones(shape, dtype=torch.bool)
        its = Completions(allowed[drawn], mask, torch.zeros(shape), mask[:, 0])
        if tolerance is None:
            tolerance = TOLERANCE.get(student.model.dtype, LOOSE)
        return Fingerprint(
            student, examples, student.render(examples), its.to(student.device), tolerance
        )

    @torch.no_grad()
    def gap(self, engine: VllmSampler) -> float:
        """The largest difference, nats. Raises LostWeights where it is too large."""
        theirs = engine.logprobs(self.examples, self.prompts, self.completions)
        hidden = self.student.completion_hidden(self.prompts, self.completions)
        logits = self.student.logits(hidden, self.student.vocabulary_rows)
        ours = logprobs_at(logits, self.completions.ids[self.completions.mask]).cpu()
        found = float((ours - theirs).abs().max())
        if not found <= self.tolerance:
            raise LostWeights(
                f"its log-probs of fixed completions differ from the training's by up to {found:.2g} nats, more than "
                f"rollout.engine.tolerance = {self.tolerance:g}"
            )
        return found
