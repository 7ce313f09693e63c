"""Malformed inputs beside valid twins: what a case is, its workspace, and what is checked of a call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

from evals.task_index import STOCK, index_of
from tests.conftest import build
from vlopd.cli import main
from vlopd.config.input import load_config
from vlopd.errors import UserError

Edit = Callable[[Path], None]
"""Changes files of a workspace."""
LONGEST_LINE = 2020
"""Characters of an error line."""
SECONDS, PATIENCE = 10, 120
"""Within which a malformed input is refused: of computation, and at all, where others share the machine."""
NOTICE = "; making it again"
"""Ends a line on what is under way, before the error."""
SHOWN = "vlopd: task code: "
"""Begins a line on a file of the user's that is run."""
LOAD = "load"
"""In place of a command: reads the config alone."""


@dataclass(frozen=True)
class Put:
    """Writes a file; a `bytes` content as it is."""

    path: str
    content: str | bytes

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@dataclass(frozen=True)
class Set:
    """Sets entries of a JSON file, by keys joined with dots; None removes one."""

    path: str
    entries: tuple[tuple[str, Any], ...]

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        tree = json.loads(path.read_text())
        for dotted, value in self.entries:
            *outer, last = dotted.split(".")
            inner = tree
            for key in outer:
                inner = inner[key]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        path.write_text(json.dumps(tree))


@dataclass(frozen=True)
class Cut:
    """Truncates a file to a share of its bytes."""

    path: str
    share: float

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * self.share)])


@dataclass(frozen=True)
class Remove:
    """Removes files or folders, by a pattern."""

    pattern: str

    def __call__(self, folder: Path) -> None:
        found = list(folder.glob(self.pattern))
        assert found, self.pattern
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class All:
    """Several edits, one after another."""

    edits: tuple[Edit, ...]

    def __call__(self, folder: Path) -> None:
        for edit in self.edits:
            edit(folder)


def edits(*several: Edit) -> All:
    return All(several)


def sets(path: str, entries: Mapping[str, Any]) -> Set:
    return Set(path, tuple((key, _frozen(value)) for key, value in entries.items()))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Case:
    """One malformed input and its valid twin."""

    words: tuple[str, ...]
    """The command line."""
    says: str
    """What the error line names."""
    spoil: Edit | None = None
    """Makes the malformed input; None where the words themselves are malformed."""
    twin: tuple[str, ...] | None = None
    """The command line of the valid twin; None: the same."""
    mend: Edit | None = None
    """Makes the valid input; None: the workspace as it is."""
    parts: tuple[str, ...] = ("c.toml", "rows.jsonl", "student", "teacher")
    """What its workspace holds, as patterns of the seed's files and folders."""
    late: bool = False
    """Whether it is found only where values are read: the run has begun, and a bar may stand before the line."""
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name or " ".join(self.words)


CONFIG = """
name = "mine"
student = {model = "student"}
teacher = {model = "teacher"}
loss = {type = "reverse_kl"}
data = {type = "file", path = "rows.jsonl", answer = "answer"}
rollout = {max_new_tokens = 4}
optim = {learning_rate = 1e-3}
train = {steps = 1, prompts_per_step = 2}
precision = {compute = "fp32"}
geometry = {arms = ["full"], null_draws = 0}
eval = {tasks = ["shapes_text"], limit = 4, bootstrap_draws = 100}
[masks]
top = {type = "top_fraction", fraction = 0.05}
[arms]
base = {type = "base"}
full = {type = "distill"}
sub = {type = "distill", mask = "top", seed = 2}
"""
ROWS = "".join(f'{{"question": "how many red", "answer": "{i}"}}\n' for i in range(1, 7))


def make_models(folder: Path) -> Path:
    """Makes models, data and configs."""
    datasets.disable_progress_bars()  # as the command line has it, where they are not yet loaded
    for role in ("student", "teacher"):
        build("llm", role, folder / role, torch.float32)
        build("vlm", role, folder / f"vlm-{role}", torch.float32)
    (folder / "c.toml").write_text(CONFIG)
    (folder / "rows.jsonl").write_text(ROWS)
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.effect_noise((20, 20), 90).convert("RGB").save(pictures / "a.png")
    row = '{"question": "how many red", "answer": "1", "image": "a.png"}\n'
    (pictures / "rows.jsonl").write_text(4 * row)
    vlm = CONFIG.replace('model = "', 'model = "vlm-')
    vlm = vlm.replace('path = "rows.jsonl"', 'path = "pictures/rows.jsonl", image = "image"')
    (folder / "vlm.toml").write_text(vlm)
    return folder


def make_seed(folder: Path) -> Path:
    """Makes what workspaces are copied from: models, data, a finished run, masks, an adapter, measurements."""
    make_models(folder)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(folder / "adapter")
    index_of(STOCK)  # once per installation, ten seconds
    here = os.getcwd()
    os.chdir(folder)
    try:
        for words in (
            "run c.toml --out run",
            "geometry student run/arms/full --set null_draws=0 --out geometry",
            "compare run/evals/base run/evals/full --out compared",
            "run vlm.toml --out vlm-run --until arms --arm base",
            "mask make student run/arms/full --out visible.safetensors --rule {type='visible'}",
            "mask export run/masks/top.safetensors --format booleans --out booleans.safetensors",
            "mask export run/masks/top.safetensors --format indices --out indices.safetensors",
        ):
            assert call(tuple(words.split())) == 0, words
    finally:
        os.chdir(here)
    return folder


def copy_seed(seed: Path, folder: Path, parts: tuple[str, ...]) -> None:
    """A workspace: a copy of parts of the seed, times included, by which unchanged files are known."""
    for part in parts:
        found = list(seed.glob(part))
        assert found, part
        for path in found:
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy2(path, folder / path.name)


def call(words: tuple[str, ...]) -> int:
    """The exit code of `vlopd WORDS` in this process; anything but SystemExit passes through."""
    if words[0] == LOAD:
        try:
            load_config(words[1], words[2:])
        except UserError as error:
            print(f"vlopd: {error}", file=sys.stderr)
            return 2
        return 0
    before, sys.argv = sys.argv, ["vlopd", *words]
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("main returns by SystemExit")


def files_of(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(path, size, time) of every file, locks left out: they hold nothing."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock" and path.parent.name != ".locks":
            about = path.stat()
            yield str(path.relative_to(folder)), about.st_size, about.st_mtime_ns


def faults_of(case: Case, code: int, said: str, seconds: float) -> list[str]:
    """What is wrong with the refusal of a malformed input; empty where all is well."""
    lines = said.rstrip("\n").split("\n") if said.strip() else []
    lines = [line for line in lines if not (line.endswith(NOTICE) or line.startswith(SHOWN))]
    if case.late:
        lines = [line for line in lines if "%" not in line]
    said = "\n".join(lines)
    found = []
    if code != 2:
        found.append(f"exit code {code}")
    if len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr")
    if not said.startswith("vlopd: "):
        found.append("not of vlopd")
    if case.says not in said:
        found.append(f"does not name {case.says!r}")
    if "Traceback" in said:
        found.append("a traceback")
    if max(map(len, lines), default=0) > LONGEST_LINE:
        found.append(f"a line of {max(map(len, lines))} characters")
    if any(not (c.isprintable() or c == "\n") for c in said):
        found.append("unprintable characters")
    if seconds > SECONDS:
        found.append(f"{seconds:.1f} seconds")
    return found


class Late(BaseException):
    """A call that took too long; no Exception, which the code under test may catch."""


def timed(words: tuple[str, ...]) -> tuple[int, float]:
    """(exit code, seconds of computation, which others do not prolong) of a call. Raises Late after a while."""

    def stop(*_: object) -> NoReturn:
        raise Late(f"more than {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    start = time.process_time()
    try:
        return call(words), time.process_time() - start
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
