"""Errors that a user can fix: one line with the name and the remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
T = TypeVar("T")


class UserError(ValueError):
    """An error that the user can fix; the message is one line with the name and the remedy."""


class ConfigError(UserError):
    """An invalid configuration; the message names the key and the remedy."""


class DataError(UserError):
    """An invalid row of the user's data; the message names the row and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, to append to a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    # a KeyError's text is the key alone
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text


def shown(value: object, longest: int = 100) -> str:
    """A value as Python writes it, of a user's input and so of any size: cut at `longest` characters."""
    if isinstance(value, int) and value.bit_length() > 4 * longest:
        return f"an integer of {value.bit_length():,} bits"  # its digits may be too many to write
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


LONGEST_LINE = 2000
"""Characters of an error line."""


def one_line(error: object) -> str:
    """An error's message in one printable line: line breaks are spaces, other control characters are escaped."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 3]}..."
    return printable(text)


def printable(text: str) -> str:
    """A text with the characters escaped that control a terminal, line breaks too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that control a terminal or the direction of text; line breaks and tabs are none of them."""


def without_controls(text: str) -> str:
    """A text of several lines with its CONTROLS escaped."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class RunError(UserError):
    """An invalid or missing file of a run; the message names the file and the remedy."""


class Interrupted(UserError):
    """Work was stopped at a signal's request; the same command goes on with it."""


class CannotWrite(RunError, OSError):
    """A file could not be written; the message names it, what the system says, and the remedy."""

    def __init__(self, path: object, error: BaseException):
        code = system_code(error) or errno.EIO
        super().__init__(f"cannot write {path} ({os.strerror(code)}); {remedy_of(code)}")


_CODE = re.compile(r"\(os error (\d+)\)")
"""As libraries in Rust (safetensors, tokenizers) end the message of an error of the system."""


def system_code(error: BaseException) -> int | None:
    """The `errno` of an error of the operating system; None of any other."""
    if isinstance(error, OSError):
        return error.errno
    found = _CODE.search(str(error))
    return None if found is None else int(found[1])


def remedy_of(code: int | None) -> str:
    """What to do about an error of the operating system, by its `errno`."""
    first = _REMEDIES.get(code or 0)
    again = "run the same command again; what was written before is intact"
    return f"{first} and {again}" if first else again


_ROOM, _RIGHTS = "make room", "make its folder writable, or choose another,"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "make room for larger files (ulimit -f)",
    errno.EIO: "check the disk",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: "put back the folder, if it was removed,",
}


class PluginError(UserError):
    """A plug-in that cannot be used; the message names it ("module:function") and what is wrong."""


class OutOfMemory(UserError):
    """Memory of the device or the host did not suffice; the message says for what, and what would need less.

    `phase` is what was under way, `wanted_bytes` the allocation that failed and `free_bytes` what was left (None where
    the allocator does not say), `held` the bytes of each part that was in memory.
    """

    def __init__(
        self,
        phase: str,
        wanted_bytes: int | None = None,
        held: Mapping[str, int] | None = None,
        free_bytes: int | None = None,
        remedy: str = "",
    ):
        self.phase, self.wanted_bytes, self.free_bytes = phase, wanted_bytes, free_bytes
        self.held, self.remedy = dict(held or {}), remedy
        text = f"out of memory ({phase})"
        if wanted_bytes is not None:
            text += f": {as_size(wanted_bytes)} more were wanted"
            text += "" if free_bytes is None else f", {as_size(free_bytes)} are free"
        if shown := [f"{name} {as_size(n)}" for name, n in self.held.items() if n]:
            text += f"; held are {', '.join(shown)}"
        super().__init__(f"{text}; {remedy}" if remedy else text)


_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|unable to allocate",
    re.IGNORECASE,
)
_WANTED = re.compile(r"(?:tried to|unable to) allocate ([\d.]+) *(bytes|[KMGT]iB)", re.IGNORECASE)
_FREE = re.compile(r"([\d.]+) *(bytes|[KMGT]iB) is free", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, for any device, or Python failed to allocate memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def wanted_and_free(error: BaseException) -> tuple[int | None, int | None]:
    """Bytes that an allocator's message says were asked for, and were free; None where it does not."""
    found = []
    for pattern in (_WANTED, _FREE):
        match = pattern.search(str(error))
        found.append(match and round(float(match[1]) * _UNITS[match[2].lower()]))
    return found[0], found[1]


def as_size(n: int) -> str:
    """Bytes in the largest unit of which there is one: `3.2 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n} bytes"


REMEDIES = {
    "data": "smaller pictures and a smaller train.prompts_per_step need less: a step's examples are read at once, "
    "those of the next beside them",
    "rollout": "a smaller rollout.batch or rollout.max_new_tokens needs less",
    "teacher": "a smaller train.micro_batch needs less, and so does train.offload_optimizer = true",
    "student": "a smaller train.micro_batch or loss.chunk_tokens needs less, and so do a mask, "
    "train.activation_checkpointing = true and train.offload_teacher = true",
    "update": "train.offload_optimizer = true, train.offload_teacher = true, train.freeze and a mask need less",
    "evaluation": "a smaller eval.batch_size needs less",
}
"""What would need less memory, by phase."""

REMEDY = 'a smaller model needs less, and so does precision.compute = "bf16"'
"""Of all other phases."""


def one_line_out_of_memory(phase: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: a failed allocation in the function becomes OutOfMemory, in this phase unless it has its own.

    The error has no traceback into the function, whose tensors are then free.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except (OutOfMemory, MemoryError, RuntimeError) as error:
                if isinstance(error, OutOfMemory):
                    failed = error.with_traceback(None)
                elif is_out_of_memory(error):
                    failed = out_of_memory(phase, error)
                else:
                    raise
                failed.__context__ = failed.__cause__ = None
            try:
                raise failed
            finally:
                del failed  # which its traceback would own through this frame

        return call

    return decorate


def out_of_memory(
    phase: str, error: BaseException, held: Mapping[str, int] | None = None
) -> OutOfMemory:
    """The error for a failed allocation in a phase, with the bytes held by part."""
    wanted, free = wanted_and_free(error)
    if isinstance(error, MemoryError) or "CPUAllocator" in str(error):
        free = psutil.virtual_memory().available
    return OutOfMemory(phase, wanted, held, free, REMEDIES.get(phase, REMEDY))
