"""The one place that asks accelerate for the device and for the processes of a launcher.

Processes run in lockstep: each makes the same collective calls in the same order, or they wait for each other
for ever. So what one of them may fail at alone (a row that cannot be read, a full disk) is done inside
`together`, at whose end they all learn of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from vlopd.errors import ConfigError, UserError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""For what the first process does alone while the others wait: held-out scores, a large checkpoint. NCCL's own
limit is 10 minutes. A process that dies is the launcher's to notice; it ends the others at once."""


class StoppedElsewhere(UserError):
    """Another process cannot go on, so neither can this one."""


def accelerator() -> Accelerator:
    """This process's accelerator: a GPU where there is one, else the CPU (gloo between processes).

    Raises ConfigError where the processes of a launcher do not know of each other: each would do
    everything, over the others.
    """
    state = Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ConfigError(
            f"{started} processes were started but accelerate sees {state.num_processes}; start them "
            "with `accelerate launch`"
        )
    return state


@contextmanager
def together(state: Accelerator) -> Iterator[None]:
    """A context at whose end no process goes on if one of them raised: each raises, and none is waited for.

    Nothing inside may wait for other processes. A process raises its own error where it has one, else
    StoppedElsewhere with the first process that has, and its error.
    """
    if state.num_processes == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if on_any(state, error is not None):
        told = gathered(state, None if error is None else one_line(error))
        if error is None:
            first = next(k for k, text in enumerate(told) if text is not None)
            error = StoppedElsewhere(f"process {first} stopped: {told[first]}")
        raise error


def one_line(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def on_any(state: Accelerator, fact: bool) -> bool:
    """Whether it is so on any of the processes. All of them ask, and get the same answer."""
    if state.num_processes == 1:
        return fact
    return bool(state.reduce(torch.tensor(float(fact), device=state.device), "sum") > 0)


def gathered(state: Accelerator, value: T) -> list[T]:
    """What each process has, by its index; for small things, which are pickled."""
    return [value] if state.num_processes == 1 else gather_object([value])


@contextmanager
def main_process_first() -> Iterator[None]:
    """A context: of several processes one does the work; the others wait, and then find it done.

    Where one fails, all do.
    """
    state = accelerator()
    for mains_turn in (True, False):
        with together(state):
            if mains_turn == state.is_main_process:
                yield


def main_process_alone(state: Accelerator, work: Callable[[], None]) -> None:
    """Has the first process do it, while the others wait; where it fails, all do."""
    with together(state):
        if state.is_main_process:
            work()
