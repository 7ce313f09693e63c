"""Bounds of input that could otherwise be of any size: nesting, and the time that a user's code may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vlopd.errors import UserError

DEEPEST = 64
"""Levels of lists and tables in a config, a record, or a model's JSON files."""


def depth(value: Any) -> int:
    """Levels of lists and tables within a value, itself included; 0 of a plain one."""
    levels, inside = 0, [value]
    while inside := [each for each in inside if isinstance(each, dict | list)]:
        levels += 1
        inside = [
            item for each in inside for item in (each.values() if isinstance(each, dict) else each)
        ]
    return levels


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
