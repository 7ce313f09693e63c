"""Devices and processes, through accelerate.

Processes run in lockstep: each makes the same collective calls in the same order, or they deadlock. So operations
that may fail in a single process (an unreadable row, a full disk) run inside `together`, which raises in all
processes if one failed. Measurements and evaluations, which `share` their parts, run inside `in_step`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from vlopd.errors import ConfigError, Interrupted, UserError, first_line

S = TypeVar("S")
T = TypeVar("T")

Compute = Literal["auto", "fp32", "bf16"]
"""Settings of the compute precision."""

LONGEST_WAIT = timedelta(days=7)
"""Timeout while one process works alone (a large checkpoint) or waits for another job's arm; NCCL's default is 10
minutes. If a process dies, the launcher terminates the others at once."""


class OtherProcessFailed(UserError):
    """Another process failed, so this one stops too."""


class _Left(BaseException):
    """Another process has left `in_step` with an error; nothing within may take it for an error of its own."""


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
        asked = isinstance(error, Interrupted)
        errors = gathered(state, None if error is None else (_one_line(error), asked))
        if error is None:
            (text, asked), first = next((its, k) for k, its in enumerate(errors) if its)
            kind = Interrupted if asked else OtherProcessFailed
            error = kind(text if asked else f"process {first} stopped: {text}")
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


@contextmanager
def in_step(state: Accelerator) -> Iterator[None]:
    """A context at whose end all processes raise if one of them did, as that of `together`.

    May contain collective calls, but no other than `exchanged` and those made of it.
    """
    if state.num_processes == 1:
        yield
        return
    try:
        try:
            yield
        except Exception as error:
            _meet(state, None, error)
            raise
        _meet(state, None)
    except _Left as left:
        raise OtherProcessFailed(str(left)) from None


def exchanged(state: Accelerator, value: T) -> list[T]:
    """Gathers each process's value, which is pickled, by process index; within `in_step`."""
    return [value] if state.num_processes == 1 else _meet(state, value)


def _meet(state: Accelerator, value: T, error: Exception | None = None) -> list[T]:
    """The one collective call within `in_step`: values, or the error with which a process leaves.

    Raises _Left where another process leaves, unless this one does too.
    """
    found = gathered(state, (value, None if error is None else _one_line(error)))
    for k, (_, text) in enumerate(found):
        if text is not None and error is None:
            raise _Left(f"process {k} stopped: {text}")
    return [each for each, _ in found]


def share(state: Accelerator | None, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`work` of all items, in their order; each process does every n-th item and gets all results.

    Within `in_step`. Raises the error that one process would: that of the first item that fails. Without a state this
    process does all.
    """
    if state is None or state.num_processes == 1:
        return [work(item) for item in items]
    own: list[T] = []
    raised: Exception | None = None
    for item in share_of(state, items):
        try:
            own.append(work(item))
        except Exception as error:
            raised = error
            break
    place = state.process_index + len(own) * state.num_processes
    about = (place, isinstance(raised, UserError), _one_line(raised)) if raised else None
    every = exchanged(state, (own, about))
    if failed := [about for _, about in every if about is not None]:
        first, is_users, text = min(failed)
        if raised is not None and first == place:
            raise raised
        told = f"process {first % state.num_processes} stopped: {text}"
        raise UserError(text) if is_users else OtherProcessFailed(told)
    return [every[k % state.num_processes][0][k // state.num_processes] for k in range(len(items))]


def share_of(state: Accelerator | None, items: Sequence[S]) -> Sequence[S]:
    """Every n-th of the items, from this process's index on; all without a state."""
    return items if state is None else items[state.process_index :: state.num_processes]


def cores() -> int:
    """CPU cores for each process of this machine."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        available = os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
