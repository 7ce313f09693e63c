"""Files that are written whole (temporary name, fsync, rename) or not at all, and read as JSON, never as pickles."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlopd.errors import ConfigError, RunError

TEMPORARY = re.compile(r"\.unfinished-[0-9a-f]{16}")
"""Names of files and folders that are still being written; a killed process leaves some behind."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure."""
    temporary = temporary_beside(path)
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode  # the umask's; some writers bring their own
    try:
        yield temporary
        temporary.chmod(permissions)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`."""
    temporary = temporary_beside(path)
    temporary.mkdir()
    permissions = temporary.stat().st_mode & 0o777
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            inside.chmod(permissions if inside.is_dir() else permissions & 0o666)
            flush(inside)
        flush(temporary)
        replaced = temporary_beside(path)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".unfinished-{secrets.token_hex(8)}"


def flush(path: Path) -> None:
    """Puts a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems cannot sync a folder, and need not
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def json_text(value: Any) -> str:
    """JSON with NaN refused, so that any reader can parse it."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def without_nan(value: Any) -> Any:
    """The same value, as JSON has it: keys as strings, null for every number that is not finite."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: list[Any]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises RunError when the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"no {path}; run the stage that writes it first") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); delete it and run its stage again") from None


def read_settings(path: Path) -> Any:
    """A JSON file that came with a model. Raises RunError where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not JSON ({error}); copy it again from the model") from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON-lines file, with their numbers and line ends.

    Only a line feed ends one. U+2028, U+0085 and others, at which `str.splitlines` divides a text, may stand
    inside a JSON string.
    """
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON-lines file. Raises RunError with the line's number."""
    if not path.exists():
        raise RunError(f"no {path}; run the stage that writes it first")
    rows = []
    for number, line in json_lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RunError(
                f"{path} line {number} is not JSON; delete the file and run again"
            ) from None
    return rows


def names_apart(paths: Sequence[Sequence[str]]) -> list[str]:
    """A name for each path, given by its parts: the last, or as many as tell it from the others.

    >>> names_apart([("runs", "a", "full"), ("runs", "b", "full")])
    ["a-full", "b-full"]

    Raises ConfigError where one comes twice.
    """
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{'/'.join(paths[0])} is named twice")


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
