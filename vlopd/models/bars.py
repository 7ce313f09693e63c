"""transformers' own progress bars, which it draws into files and pipes too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from vlopd.progress import are_drawn


@contextmanager
def bars_where_drawn() -> Iterator[None]:
    """Turns transformers' bars off where stderr is neither a terminal nor a notebook's widget."""
    if are_drawn() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
