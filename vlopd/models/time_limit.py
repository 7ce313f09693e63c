"""A bound of the time that a model's own code may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from vlopd.errors import UserError


@contextmanager
def time_limit(seconds: float, error: UserError) -> Iterator[None]:
    """Raises `error` in what takes longer; no limit outside the main thread, where there are no signals.

    For checks before a run, not within it: the clock runs on while a process is stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise error

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        rest = max(left - (time.monotonic() - start), 0.001) if left else 0  # of an outer limit
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)
