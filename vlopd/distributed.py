"""Devices and processes, through accelerate.

Processes run in lockstep: each makes the same collective calls in the same order, or they deadlock. So operations
that may fail in a single process (an unreadable row, a full disk) run inside `together`, which raises in all
processes if one failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from vlopd.errors import ConfigError, UserError, first_line

T = TypeVar("T")

Compute = Literal["auto", "fp32", "bf16"]
"""Settings of the compute precision."""

LONGEST_WAIT = timedelta(days=1)
"""Timeout while the first process works alone (held-out evaluation, a large checkpoint); NCCL's default is 10 minutes.
If a process dies, the launcher terminates the others at once."""


class OtherProcessFailed(UserError):
    """Another process failed, so this one stops too."""


def accelerator() -> Accelerator:
    """This process's accelerator: a GPU if available, else the CPU (gloo between processes).

    Raises ConfigError where a launcher's processes are not connected: each would do all the work and overwrite the
    others' files.
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


def resolve_compute(setting: Compute, device: torch.device | str) -> Literal["fp32", "bf16"]:
    """The compute precision of a setting: `auto` is bf16 on accelerators and on CPUs with AMX, fp32 elsewhere.

    Raises ConfigError for another setting.
    """
    if setting not in get_args(Compute):
        raise ConfigError(f"compute {setting}: must be {', '.join(get_args(Compute))}")
    if setting != "auto":
        return setting
    if torch.device(device).type != "cpu":
        return "bf16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def refuse_missing_device(device: torch.device | str) -> None:
    """Raises ConfigError for a device that torch does not know or this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device}: {first_line(error)}; cpu is always there") from None


@contextmanager
def together(state: Accelerator) -> Iterator[None]:
    """A context at whose end all processes raise if one of them did.

    Must contain no collective calls. A process raises its own error if it has one, else OtherProcessFailed with the
    first failed process and its error.
    """
    if state.num_processes == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if error is not None and _alone:
        raise error
    if on_any(state, error is not None):
        errors = gathered(state, None if error is None else _one_line(error))
        if error is None:
            first = next(k for k, text in enumerate(errors) if text is not None)
            error = OtherProcessFailed(f"process {first} stopped: {errors[first]}")
        raise error


_alone = False
"""Whether this process stopped inside of collective calls, so that no other will answer one of its own."""


@contextmanager
def inseparable(state: Accelerator) -> Iterator[None]:
    """A context of collective calls between which a process may fail: it stops alone, and the launcher ends the others.

    Around it may be `together`s, which then do not wait for others.
    """
    global _alone
    try:
        yield
    except Exception as error:
        _alone = state.num_processes > 1
        if isinstance(error, torch.distributed.DistError) or "Connection" in str(error):
            raise OtherProcessFailed("another process stopped; see its message") from None
        raise


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def on_any(state: Accelerator, fact: bool) -> bool:
    """Whether `fact` holds in any process; a collective call with the same result in all of them."""
    if state.num_processes == 1:
        return fact
    return bool(state.reduce(torch.tensor(float(fact), device=state.device), "sum") > 0)


def gathered(state: Accelerator, value: T) -> list[T]:
    """Gathers each process's value, by process index; for small values, which are pickled."""
    return [value] if state.num_processes == 1 else gather_object([value])


@contextmanager
def main_process_first() -> Iterator[None]:
    """A context that the main process runs first; the others wait, then run it too. If one fails, all raise."""
    state = accelerator()
    for mains_turn in (True, False):
        with together(state):
            if mains_turn == state.is_main_process:
                yield


def main_process_alone(state: Accelerator, work: Callable[[], None]) -> None:
    """Runs `work` in the main process while the others wait; if it fails, all raise."""
    with together(state):
        if state.is_main_process:
            work()
