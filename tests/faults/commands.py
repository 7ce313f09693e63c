"""Commands in processes that are forked with everything imported, and faults at chosen moments of them.

A process of its own is what may be killed; forked from a server that has the imports, it starts in milliseconds.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import lm_eval.api.task  # noqa: F401 - with the libraries that it needs
import psutil
import safetensors.torch
import torch

from tests import conftest  # noqa: F401 - without the cost of printing configs
from vlopd import files
from vlopd.cli import main
from vlopd.data import shapes

shapes.blind_guesser()  # chance level, of 20,000 questions

for module in (
    *("evals.compare", "evals.harness", "evals.report.build", "evals.token_kl"),
    *("vlopd.preflight.record", "vlopd.run.geometry", "vlopd.run.make", "vlopd.run.verify"),
):
    import_module(module)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.truncate": 0,
}
"""Audited calls that change a folder, and which of their arguments names the path."""
REMOVALS = ("os.remove", "os.rmdir", "os.truncate")
MOST = 2
"""Occurrences of one call in one process that are told apart."""


@dataclass(frozen=True)
class Fault:
    """What happens at the first write in a folder that is not named in `seen`, a file beside it; or at every one."""

    root: Path
    seen: Path
    what: Literal["kill", "error", "delay"] = "kill"
    code: int = errno.EIO
    match: str = ""
    """A pattern of the writes in question: what is done, to which file, for which time in this process."""

    def names(self) -> set[str]:
        return set(self.seen.read_text().splitlines()) if self.seen.exists() else set()


class Injected:
    """Counts a process's writes in a folder, by what they do and to which file, and has a fault happen at one."""

    def __init__(self, fault: Fault):
        self.fault, self.seen = fault, fault.names()
        self.counts: dict[str, int] = {}
        self.final: dict[str, str] = {}
        """The names that temporary ones will have."""
        self.inside = False
        before, serialize, sync = (
            files._temporary_beside,
            safetensors.torch.serialize_file,
            os.fsync,
        )

        def temporary_beside(path: Path) -> Path:
            temporary = before(path)
            self.final[os.path.abspath(temporary)] = os.path.abspath(path)
            return temporary

        def serialize_file(tensors: Any, path: Any, *words: Any, **named: Any) -> Any:
            self.event("serialize", path)
            return serialize(tensors, path, *words, **named)

        def fsync(handle: int) -> None:
            self.event("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        files._temporary_beside = temporary_beside
        safetensors.torch.serialize_file, os.fsync = serialize_file, fsync
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(path, (str, bytes, os.PathLike))
                and isinstance(flags, int)
                and flags & WRITES
            ):
                self.event("open", path)
        elif event in CHANGES:
            self.event(event, arguments[CHANGES[event]])

    def event(self, kind: str, path: Any) -> None:
        if self.inside or not isinstance(path, (str, bytes, os.PathLike)):
            return
        where = os.path.abspath(os.fsdecode(path))
        for temporary, final in list(self.final.items()):  # other threads write too
            if where == temporary or where.startswith(f"{temporary}/"):
                where = f"{final}{where[len(temporary) :]}"
        root = os.path.abspath(self.fault.root)
        if not where.startswith(f"{root}/"):
            return
        if self.fault.what == "error" and kind in REMOVALS:
            return
        if kind == "os.mkdir" and os.path.isdir(path):  # which then does nothing
            return
        name = re.sub(r"\d{6}", "N", os.path.relpath(where, root))
        label = f"{kind.removeprefix('os.')} {name}"
        count = self.counts[label] = self.counts.get(label, 0) + 1
        label = f"{label} {count}"
        if self.fault.what == "delay":
            if kind == "os.rename":
                time.sleep(0.05)
        elif count <= MOST and label not in self.seen and re.search(self.fault.match, label):
            self.inside = True  # neither the note nor what follows an error is a moment of its own
            with self.fault.seen.open("a") as note:
                note.write(f"{label}\n")
            self.inside = False
            self.seen = _Everything()
            if self.fault.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(
                self.fault.code,
                os.strerror(self.fault.code),
                *([] if kind == "fsync" else [os.fspath(path)]),
            )


class _Everything(set):
    def __contains__(self, _: object) -> bool:
        return True


@dataclass
class Command:
    """`vlopd WORDS` under way in a process of its own, its output in files."""

    process: ForkServerProcess
    log: Path
    used: float = 0.0
    """Seconds of processor time, as far as `kill_at` saw."""

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill_at(self, seconds: float, number: int = signal.SIGKILL) -> bool:
        """Sends a signal once the process has used so much processor time; returns whether it still ran."""
        try:
            process = psutil.Process(self.pid)
            while self.process.is_alive():
                its = process.cpu_times()
                self.used = its.user + its.system
                if self.used >= seconds:
                    os.kill(self.pid, number)
                    return True
                time.sleep(0.005)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
        return False

    def end(self, seconds: float = 300) -> int:
        """The exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self.process.name} did not end\n{self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        """What it wrote to stderr, nothing before it starts."""
        log = self.log.with_suffix(".err")
        return log.read_text() if log.exists() else ""

    @property
    def printed(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that are the command's own, bars and waits left out."""
        return [line for line in self.said.splitlines() if line.startswith("vlopd: ")]


def start(
    words: Sequence[object],
    folder: Path,
    log: Path,
    fault: Fault | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Command:
    """Starts `vlopd WORDS` in a working directory; `before` runs first in its process."""
    arguments = (list(map(str, words)), folder, log, fault, dict(environment or {}), before)
    process = FORKS.Process(target=_execute, args=arguments, name=" ".join(map(str, words)))
    process.start()
    return Command(process, log)


def call(words: Sequence[object], folder: Path, log: Path, **more: Any) -> tuple[int, Command]:
    """(exit code, the command) of `vlopd WORDS`."""
    command = start(words, folder, log, **more)
    return command.end(), command


def launch(
    words: Sequence[object],
    folder: Path,
    log: Path,
    port: int,
    environment: Mapping[str, str],
    **more: Any,
) -> list[Command]:
    """Starts `vlopd WORDS` in two processes, with what torchrun tells its workers."""
    return [
        start(
            words,
            folder,
            log.with_name(f"{log.name}-{rank}"),
            environment={
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            **more,
        )
        for rank in (0, 1)
    ]


def _execute(
    words: list[str],
    folder: Path,
    log: Path,
    fault: Fault | None,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        handle = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(folder)
    if before is not None:
        before()
    if fault is not None:
        Injected(fault)
    sys.argv = ["vlopd", *words]
    main.main()
