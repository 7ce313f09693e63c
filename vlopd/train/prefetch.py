"""Reads a training run's examples ahead: while a step trains, a thread decodes and renders those of the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from vlopd.data.load import pick
from vlopd.train.pair import ModelPair, Rendered
from vlopd.types import Example

T = TypeVar("T")


def read_ahead(
    pair: ModelPair,
    data: Sequence[Example],
    share: range,
    prompts_per_step: int,
    seed: int,
    steps: range,
) -> Generator[list[Rendered], None, None]:
    """The rendered examples of each of `steps`: the indices `share` of its prompts. Raises at a step what it raises."""
    try:
        reader = pair.with_own_processors()
    except Exception:  # a processor that cannot be copied has one thread
        reader = None

    def read(step: int) -> list[Rendered]:
        examples = pick(data, step * prompts_per_step + share.start, len(share), seed)
        return (reader or pair).render(examples)

    yield from map(read, steps) if reader is None else ahead(read, steps)


def ahead(make: Callable[[int], T], steps: range) -> Generator[T, None, None]:
    """`make(step)` of each step, computed in one worker thread while the step before is in use.

    What `make` raises is raised at its step. Closing the iterator waits for the step in work, at most one.
    """
    if not steps:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="vlopd-data") as pool:
        threads = torch.get_num_threads()
        pool.submit(torch.set_num_threads, 1).result()  # of the worker, beside a training step
        torch.set_num_threads(threads)  # which is also the default of threads to come
        coming = pool.submit(make, steps[0])
        for step in steps:
            made = coming.result()
            if step + 1 in steps:
                coming = pool.submit(make, step + 1)
            yield made
            del made
