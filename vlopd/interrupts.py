"""SIGTERM and SIGINT as requests: training ends its step and saves its state, a stage ends its artifact.

Only the command line listens (`heeded`); elsewhere, as in a notebook, Ctrl-C is Python's KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vlopd.errors import Interrupted

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Exit codes after these signals: EX_TEMPFAIL, upon which schedulers run a job again, and the shell's after Ctrl-C."""

_listening = False
_received: int | None = None
_holds = 0


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return _listening and _received is not None


def exit_code(otherwise: signal.Signals = signal.SIGTERM) -> int:
    """The exit code after the signal; without one, as where a process stopped for another's, that of `otherwise`."""
    return CODES[signal.Signals(_received or otherwise)]


@contextmanager
def heeded() -> Iterator[None]:
    """Listens to SIGTERM and SIGINT. Within `held` one is a request; elsewhere it raises KeyboardInterrupt at once.

    A second signal ends the process at once.
    """
    global _received, _listening
    if threading.current_thread() is not threading.main_thread():  # which alone may listen
        yield
        return
    _listening, _received = True, None
    before = {number: signal.signal(number, _on_signal) for number in CODES}
    try:
        yield
    finally:
        _listening = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _received = number
    if not _holds:
        raise KeyboardInterrupt
    name = signal.Signals(number).name
    # not by sys.stderr, in whose write it may have come
    os.write(
        2,
        f"\nvlopd: {name}: stops at the next step or artifact; a second one ends at once\n".encode(),
    )


@contextmanager
def held(what: str) -> Iterator[None]:
    """Work that a signal lets come to its end, upon which Interrupted is raised with `what` was done."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
    if not _holds:
        stop_after(what)


def stop_after(what: str) -> None:
    """Raises Interrupted where a signal has asked to stop: `what` was done, and is kept."""
    if asked():
        raise Interrupted(f"stopped after {what}; run the same command again to go on")
