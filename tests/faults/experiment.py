"""A whole experiment of seconds, and what of its results must be the same however often it was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import build
from tests.faults.commands import Command, launch, start

CONFIG = """
name = "mini"
student = "{kind}-student"
teacher = "{kind}-teacher"
[precision]
compute = "fp32"
[data]
type = "shapes"
modality = "{modality}"
[rollout]
max_new_tokens = 4
[optim]
learning_rate = 3e-3
[train]
steps = 4
prompts_per_step = 4
save_every = 1
sample_every = 2
keep_steps = [2]
[masks]
top = {{type = "top_fraction", of = "full", fraction = 0.1}}
[arms]
base = {{type = "base"}}
teacher = {{type = "teacher"}}
full = {{type = "distill", seed = 1}}
subnetwork = {{type = "distill", seed = 2, mask = "top"}}
transplant = {{type = "transplant", of = "full", mask = "top"}}
[geometry]
arms = ["full", "subnetwork"]
null_draws = 1
ratios = [0.1]
[eval]
tasks = ["{task}"]
limit = 4
batch_size = 4
keep_images = 1
bootstrap_draws = 50
"""
TIMED = re.compile(r"memory.json|report/(record.json|report.html|report.md|tables/training.csv)")
"""Files that hold times or peaks of memory."""
TIMES = re.compile(r"second|time|date|created|peak|free|tokens_per|^git$")
"""Keys of JSON whose values are times, memory at a time, or the state of this source tree."""


PORT = 29600
"""Of the first of two processes; each pair has its own."""


@dataclass(frozen=True)
class Experiment:
    """A folder with models and mini.toml, what an undisturbed run leaves, and its processor time in seconds."""

    folder: Path
    processes: int
    results: dict[str, str]
    seconds: tuple[float, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {"VLOPD_CACHE": str(self.folder / "cache")}

    def start(self, run: str, *words: object, log: str = "log", **more: Any) -> list[Command]:
        """Starts `vlopd run` of a run folder, in each of its processes."""
        every = ("run", "mini.toml", "--out", run, *words)
        log_file = self.folder / f"{run}-{log}"
        if self.processes == 1:
            return [start(every, self.folder, log_file, environment=self.environment, **more)]
        port = PORT + zlib.crc32(str(self.folder / run).encode()) % 20000
        return launch(every, self.folder, log_file, port, environment=self.environment, **more)

    def finish(self, run: str, *words: object, **more: Any) -> None:
        """Runs to the end, and compares with what an undisturbed run leaves."""
        for command in self.start(run, *words, **more):
            assert command.end() == 0, command.said
        self.compare(run)

    def compare(self, run: str) -> None:
        found = results_of(self.folder / run)
        names = found.keys() | self.results.keys()
        other = [name for name in sorted(names) if found.get(name) != self.results.get(name)]
        assert not other, other
        assert not left_over(self.folder / run)

    def remove(self, run: str) -> None:
        shutil.rmtree(self.folder / run)


def stop_others(commands: Sequence[Command]) -> list[int]:
    """The exit codes after one process has ended: the others get SIGTERM, then SIGKILL, as by torchrun."""
    for command in commands:
        if command.process.is_alive():
            os.kill(command.pid, signal.SIGTERM)
    for command in commands:
        command.process.join(20)
        if command.process.is_alive():
            command.process.kill()
    return [command.end() for command in commands]


@pytest.fixture(scope="session")
def experiment_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    """(kind, processes, more settings) -> an experiment, run twice without faults, with the same results."""

    @cache
    def make(kind: str, processes: int = 1, more: str = "") -> Experiment:
        folder = tmp_path_factory.mktemp(f"{kind}-{processes}")
        config = write_experiment(folder, kind)
        if more:
            text = config.read_text().replace('"full", "subnetwork"]', '"full", "null"]')
            config.write_text(text + more)
        first = Experiment(folder, processes, {}, ())
        for command in first.start("first"):
            assert command.end() == 0, command.said
        experiment = Experiment(folder, processes, results_of(folder / "first"), ())
        commands = experiment.start("second")
        for command in commands:
            command.kill_at(math.inf)
            assert command.end() == 0, command.said
        experiment.compare("second")
        return replace(experiment, seconds=tuple(command.used for command in commands))

    return make


def moments(n: int, seconds: float, seed: str) -> list[float]:
    """One moment, by chance, in each n-th of the processor time."""
    draws = random.Random(seed)
    return [(k + draws.random()) / n * seconds for k in range(n)]


def wait_for(what: Callable[[], Any], seconds: float = 120) -> None:
    """Waits until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def write_experiment(folder: Path, kind: str) -> Path:
    """Writes models and mini.toml of a language or vision-language experiment into a folder."""
    for role in ("student", "teacher"):
        build(kind, role, folder / f"{kind}-{role}", torch.float32)
    modality, task = ("image", "shapes") if kind == "vlm" else ("text", "shapes_text")
    path = folder / "mini.toml"
    path.write_text(CONFIG.format(kind=kind, modality=modality, task=task))
    return path


def results_of(run: Path) -> dict[str, str]:
    """{file: digest of its content without times} of everything that a run keeps."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if (
            path.is_file()
            and not name.startswith((".lock", "checksums/"))
            and not TIMED.search(name)
        ):
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()[:16]
    return found


def left_over(run: Path) -> list[str]:
    """What a finished run must not hold: unfinished files, partial results, saved states."""
    return [
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.name.startswith(".unfinished-")
        or path.name in ("partial", "overlap.partial")
        or (path.name == "state" and path.is_dir())
    ]


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    rows = {".json": [content], ".jsonl": content.splitlines()}.get(path.suffix)
    if rows is None:
        return content
    try:
        return "\n".join(json.dumps(_without_times(json.loads(row))) for row in rows).encode()
    except ValueError:  # damaged
        return content


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(its) for key, its in value.items() if not TIMES.search(key)}
    if isinstance(value, list):
        return list(map(_without_times, value))
    return value
