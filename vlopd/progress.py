"""Progress bars: in a terminal and in a notebook as tqdm draws them, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from tqdm.std import tqdm as plain_tqdm

SECONDS_BETWEEN_LINES = 30
"""Where stderr is a file or a pipe."""


class _Lines(plain_tqdm):
    """A bar for log files: a line every half minute and one at the end, without carriage returns."""

    printed = 0.0
    disable: bool

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.printed = time.monotonic()
        super().__init__(*args, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Prints a line if the last one is half a minute old."""
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self._print()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: a printed line stays."""

    def close(self) -> None:
        """Prints the last line of a bar that is not nested in another (`leave`)."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # what tqdm's own does besides drawing
        if self.leave and self.n > self.initial and self._time() >= self.start_t + self.delay:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        values = {**self.format_dict, "ncols": 0}
        self.fp.write(f"{self.format_meter(**values).strip()}\n")
        self.fp.flush()


def _bars() -> type[plain_tqdm]:
    """The kind of bar for this process's stderr, or for a notebook."""
    return tqdm if issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty() else _Lines


def are_drawn() -> bool:
    """Whether bars are drawn: in a terminal or as a notebook's widgets, rather than printed as lines."""
    return _bars() is not _Lines


def progress(iterable: Iterable[Any] | None = None, *, title: str, **settings: Any) -> Any:
    """A tqdm bar with a title, over an iterable or with `total`; `settings` are tqdm's.

    >>> for task in progress(tasks, title="full: tasks", unit="task"): ...
    """
    return _bars()(iterable, desc=title, **settings)


def downloads(title: str) -> type[plain_tqdm]:
    """A class of bars for huggingface_hub; they appear after two seconds, so not for files that are there already."""

    class Download(_bars()):  # type: ignore[misc]
        def __init__(self, *args: Any, desc: str = "", **settings: Any) -> None:
            super().__init__(*args, desc=f"{title}: {desc}", delay=2, **settings)

    return Download


class Repeated:
    """An iterable that shows a bar each time it is iterated."""

    def __init__(self, items: Iterable[Any], title: str, unit: str):
        self.items, self.title, self.unit = items, title, unit

    def __len__(self) -> int:
        return len(self.items) if isinstance(self.items, Sized) else sum(1 for _ in self.items)

    def __iter__(self) -> Iterator[Any]:
        total = len(self.items) if isinstance(self.items, Sized) else None
        yield from progress(
            self.items, title=self.title, unit=self.unit, total=total, delay=1, leave=False
        )
