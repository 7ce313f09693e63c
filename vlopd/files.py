"""Atomic writes of files and folders (temporary name, fsync, rename), and JSON reading."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlopd.errors import CannotWrite, ConfigError, RunError, first_line, system_code

TEMPORARY = re.compile(r"\.unfinished-[0-9a-f]{16}")
"""Names of files and folders being written; a killed process may leave some behind."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure.

    Raises CannotWrite where the disk is full, say.
    """
    temporary = _temporary_beside(path)
    with writing(path, temporary):
        temporary.touch(exist_ok=False)
        permissions = temporary.stat().st_mode  # of the umask; some writers set their own
        try:
            with _being_written(temporary):
                yield temporary
            temporary.chmod(permissions)
            flush(temporary)
            temporary.rename(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it replaces `path`. Raises as `whole_file`."""
    temporary, replaced = _temporary_beside(path), _temporary_beside(path)
    with writing(path, temporary, replaced):
        temporary.mkdir()
        permissions = temporary.stat().st_mode & 0o777
        try:
            with _being_written(temporary):
                yield temporary
            for inside in temporary.rglob("*"):
                inside.chmod(permissions if inside.is_dir() else permissions & 0o666)
                flush(inside)
            flush(temporary)
            if path.exists():
                path.rename(replaced)
            try:
                temporary.rename(path)
            except OSError:
                if replaced.exists():
                    replaced.rename(path)
                raise
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, *temporary: Path) -> Iterator[None]:
    """Raises CannotWrite, with the name `path`, for an error of the system that names another file of its making or
    none, as errors of writing do and libraries' own. Errors that name other files pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CannotWrite) or system_code(error) is None:
            raise
        named = error.filename if isinstance(error, OSError) else None
        if named is not None:
            its = Path(named)
            if its not in (path, path.parent) and not {its, *its.parents}.intersection(temporary):
                raise
        raise CannotWrite(path, error) from None


def _temporary_beside(path: Path) -> Path:
    """A new temporary name in the folder of `path`, which is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:  # once, since a folder may hold many files
        _swept.add(path.parent)
        remove_abandoned(path.parent.glob(".unfinished-*"), at_least=60)
    return path.parent / f".unfinished-{secrets.token_hex(8)}"


@contextlib.contextmanager
def _being_written(temporary: Path) -> Iterator[None]:
    """Holds a shared lock on a temporary file or folder, by which `is_abandoned` knows that its writer lives."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def is_abandoned(path: Path) -> bool:
    """Whether a path is a temporary file or folder of this user whose writer was killed."""
    if not TEMPORARY.fullmatch(path.name) or path.is_symlink():
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # gone, or not ours to read
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_uid == os.getuid()
    except OSError:
        return False
    finally:
        os.close(handle)


_swept: set[Path] = set()
"""Folders in which this process has removed what killed ones left."""


def remove_abandoned(paths: Iterable[Path], at_least: float = 0) -> None:
    """Removes those of the paths that `is_abandoned` names and that are `at_least` so many seconds old.

    A new one may not be locked yet where others write into the folder at the same time.
    """
    for path in filter(is_abandoned, paths):
        with contextlib.suppress(OSError):  # another process is as fast
            if time.time() - path.stat().st_mtime < at_least:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems do not support syncing a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def json_text(value: Any) -> str:
    """Standard JSON: NaN raises ValueError."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def without_nan(value: Any) -> Any:
    """Converts a value for JSON: keys to strings, non-finite numbers to null."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: list[Any]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


LONGEST_LINE = 2**28
"""Bytes of a line of JSON lines."""
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


def parse_json(text: str | bytes) -> Any:
    """Parses JSON within bounds. Raises ValueError for anything else: deep nesting, integers of thousands of digits."""
    try:
        value = json.loads(text)
        deep = depth(value) > DEEPEST
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run. Raises RunError where it is missing or not JSON."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"no {path}; run the stage that writes it first") from None
    except ValueError as error:
        raise RunError(
            f"{path} is not JSON ({first_line(error)}); delete it and run its stage again"
        ) from None


def read_settings(path: Path) -> Any:
    """Reads a JSON file of a model folder. Raises RunError where it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is not JSON ({first_line(error)}); copy it again from the model"
        ) from None


def is_endless(path: Path) -> bool:
    """Whether a path is a pipe, a device or a socket, whose reading may not end; links are followed."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a JSON-lines file, with their numbers (from 1) and line ends.

    Only a line feed ends a line. U+2028, U+0085 and others, at which `str.splitlines` splits, may occur
    inside a JSON string. Raises RunError for a line of more than LONGEST_LINE bytes.
    """
    with path.open("rb") as file:
        lines = iter(partial(file.readline, LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > LONGEST_LINE:
                raise RunError(
                    f"{path} line {number} has more than {LONGEST_LINE:,} bytes; save one row per line"
                )
            yield number, line


def read_jsonl(path: Path, needs: str | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file, an object each, with an entry `needs`.

    Raises RunError with the line's number.
    """
    if not path.exists():
        raise RunError(f"no {path}; run the stage that writes it first")
    rows = []
    for number, line in json_lines(path):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or (needs is not None and needs not in row):
            what = f" with {needs!r}" if needs is not None else ""
            raise RunError(
                f"{path} line {number} is not a JSON object{what}; delete the file and run again"
            )
        rows.append(row)
    return rows


def is_inside(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path, with all links and `..` followed, is in one of the folders."""
    whole = path.resolve()
    return any(whole.is_relative_to(folder.resolve()) for folder in folders)


def shortest_distinct_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """The shortest distinct names of paths, given as parts: the last part, or as many as needed.

    >>> shortest_distinct_names([("runs", "a", "full"), ("runs", "b", "full")])
    ["a-full", "b-full"]

    Raises ConfigError for a duplicate path.
    """
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{'/'.join(paths[0])} is given twice")


def is_first_process() -> bool:
    """Whether this is the first process of a launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"
