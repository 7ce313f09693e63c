"""Rollouts one step ahead (rollout.max_lag = 1): while a step trains, an engine samples the completions of the next.

They are of weights that are one update older than those that train on them. k1 and rewards correct for that by the
ratios of the tokens' probabilities; a divergence at each token needs none, but its prefixes are the older student's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from vlopd import distributed
from vlopd.config.objective import Writer
from vlopd.config.recipe import Recipe
from vlopd.engines.client import LostWeights
from vlopd.train.pair import ModelPair, Rendered
from vlopd.train.replay import Replay
from vlopd.train.rollout_engine import RolloutEngine
from vlopd.train.rollouts import Batch, completions_of
from vlopd.types import Completions


class RolloutsAhead:
    """The completions of this process's steps, each begun when the one before is taken.

    read: yields the rendered examples of each of `steps`. waiting: the first step's, of a saved state.
    As a context manager, waits at its end for what is under way.
    """

    def __init__(
        self,
        pair: ModelPair,
        engine: RolloutEngine,
        recipe: Recipe,
        share: range,
        seed: int,
        steps: range,
        read: Iterator[list[Rendered]],
        sampling_bytes: int | None,
    ):
        self.pair, self.engine, self.recipe, self.share, self.seed = (
            pair,
            engine,
            recipe,
            share,
            seed,
        )
        self.steps, self.read, self.sampling_bytes = iter(steps), read, sampling_bytes
        # a tokenizer's padding is state, and the training uses its own at the same time
        self.threads_pair = replace(pair.with_own_processors(), sampler=engine.ask)
        self.pool = ThreadPoolExecutor(1, "vlopd-rollout")
        self.coming: tuple[int, list[Rendered], Future[Completions], int] | None = None
        self.kept: Path | None = None

    def __enter__(self) -> RolloutsAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pool.shutdown()

    def begin(self, saved: Replay | None = None) -> None:
        """Begins with the first step: of a saved state where it has its completions, else sampled now."""
        self._start(saved)

    def next(self) -> tuple[list[Rendered], Completions, int]:
        """The next step's examples, its completions and the updates that their weights lack; begins the one after.

        Raises what sampling raised.
        """
        step, rendered, completions, version = self._sampled()
        self._start()
        return rendered, completions, step - version

    def _sampled(self) -> tuple[int, list[Rendered], Completions, int]:
        """What was being sampled; once more where the engine had lost its weights."""
        assert self.coming is not None, "there is a step left"
        step, rendered, future, version = self.coming
        try:
            completions = future.result()
        except LostWeights:  # here, since the weights must not change while they are sent
            self.engine.restore()
            version = self.engine.sampler.version
            completions = self._sample(self.pair, step, rendered)
            future = Future()
            future.set_result(completions)
            self.coming = step, rendered, future, version
        return step, rendered, completions, version

    def wait(self) -> None:
        """Waits for the sampling under way, so that the engine's weights may change."""
        if self.coming is not None:
            self.coming[2].exception()

    def save(self, where: Replay, accelerator: Accelerator) -> None:
        """Writes the completions that wait for their step, before the state is written. Collective.

        Those of the state before stay until then.
        """
        if self.coming is None:
            return
        with distributed.together(accelerator):
            step, rendered, completions, _ = self._sampled()
            whole = batch_of(self.pair, self.recipe, rendered, completions)
        where.write(step, [whole], accelerator)
        if accelerator.is_main_process:
            for path in where.path(step).parent.glob("*.safetensors"):
                if path not in (where.path(step), self.kept):
                    path.unlink()
        self.kept = where.path(step)

    def _start(self, saved: Replay | None = None) -> None:
        step = next(self.steps, None)
        if step is None:
            self.coming = None
            return
        rendered = next(self.read)
        version = self.engine.sampler.version
        if saved is not None and saved.path(step).exists():
            self.kept = saved.path(step)
            completions = self._saved(saved, step, rendered)
            future: Future[Completions] = Future()
            future.set_result(completions)
            version = max(0, step - 1)
        else:
            future = self.pool.submit(self._sample, self.threads_pair, step, rendered)
        self.coming = step, rendered, future, version

    def _sample(self, pair: ModelPair, step: int, rendered: Sequence[Rendered]) -> Completions:
        return completions_of(
            pair, self.recipe, rendered, self.share, self.seed, step, self.sampling_bytes
        )

    def _saved(self, saved: Replay, step: int, rendered: Sequence[Rendered]) -> Completions:
        n = self.recipe.rollout.completions_per_prompt
        ids = [each.example.id for each in rendered for _ in range(n)]
        places = range(self.share.start * n, self.share.stop * n)
        return saved.read(step, places, ids, self.pair.student.device)


def batch_of(
    pair: ModelPair, recipe: Recipe, rendered: Sequence[Rendered], completions: Completions
) -> Batch:
    """A process's completions as one batch, written by the student."""
    repeated = [each for each in rendered for _ in range(recipe.rollout.completions_per_prompt)]
    writers: list[Writer] = ["student"] * len(repeated)
    places = tuple(range(len(repeated)))
    return Batch(pair.student, repeated, completions, tuple(writers), places)
