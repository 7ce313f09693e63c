"""Every kind of file in a run folder, damaged in every way, under every verb: refused, made again, or unused."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.faults.commands import Fault, call
from tests.faults.experiment import Experiment, experiment_of, results_of  # noqa: F401
from vlopd.errors import RunError
from vlopd.run.folder import RunFolder
from vlopd.run.verify import verify_run

MORE = """
[arms.lora]
type = "distill"
seed = 2
lora = {rank = 2}
[arms.null]
type = "distill"
seed = 3
null = "rademacher"
[eval.during]
tasks = ["TASK"]
every = 2
limit = 2
"""
"""What a run folder can hold besides: an adapter, held-out scores, a signal null and its groups."""

VERBS = {
    "run": "run mini.toml --out RUN",
    "retrain": "retrain RUN",
    "mask make": "mask make RUN",
    "mask show": "mask show RUN/masks/top.safetensors",
    "geometry": "geometry RUN",
    "geometry of checkpoints": "geometry RUN/arms/base RUN/arms/full --out OUT --set null_draws=0",
    "eval": "eval RUN",
    "compare": "compare RUN",
    "compare of evaluations": "compare RUN/evals/base RUN/evals/full --out OUT",
    "paper": "paper RUN",
    "report": "report RUN",
    "report elsewhere": "report RUN --out OUT",
    "show": "show RUN",
    "verify": "verify RUN",
    "push": "push RUN --arm full --repo me/mine --dry-run",
}


ARM = re.compile(
    r"((?:^|/)(?:arms|geometry|evals|tokens|base_kl)(?:/|--))(?:base|full|lora|null|subnetwork|teacher|transplant)"
)


def flip(content: bytes, draws: random.Random) -> bytes:
    changed = bytearray(content)
    place = draws.randrange(8 * len(content))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a flipped bit": flip,
    "cut in half": lambda content, _: content[: len(content) // 2],
    "emptied": lambda content, _: b"",
}
SHAPES = {text: lambda _, __, text=text: text.encode() for text in ("{}", "[]", "null", '"x"')}
"""Of JSON files alone."""


@dataclass(frozen=True)
class Cell:
    """One kind of file, by an example, one damage and one verb; `again` follows the remedy that is printed."""

    file: str
    damage: str
    verb: str
    again: bool = False

    def __str__(self) -> str:
        return f"{self.file}, {self.damage}: {self.verb}"


@dataclass(frozen=True)
class Finished:
    """A run, finished or stopped, that is copied for each cell."""

    experiment: Experiment
    run: str

    def call(self, verb: str, name: str):
        words = VERBS[verb].replace("RUN", name).replace("OUT", f"{name}-out").split()
        its = self.experiment
        return call(words, its.folder, its.folder / f"{name}-log", environment=its.environment)

    def copy(self, name: str) -> Path:
        where = self.experiment.folder / name
        shutil.copytree(self.experiment.folder / self.run, where)
        return where

    def remove(self, name: str) -> None:
        for path in self.experiment.folder.glob(f"{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @cached_property
    def undamaged(self) -> Mapping[str, tuple[str, dict[str, str], dict[str, str]]]:
        """{verb: what it prints, the run and the other folder that it leaves} without damage."""
        found = {}
        for k, verb in enumerate(VERBS):
            run = self.copy(name := f"fine-{k:03}")
            code, command = self.call(verb, name)
            assert code == 0, (verb, command.said)
            found[verb] = (self.printed(command, name), results_of(run), self.elsewhere(name))
            self.remove(name)
        return found

    def printed(self, command, name: str) -> str:
        return re.sub(r"\d+(\.\d+)? seconds|\s+", " ", command.printed.replace(name, "RUN"))

    def elsewhere(self, name: str) -> dict[str, str]:
        out = self.experiment.folder / f"{name}-out"
        found = results_of(out) if out.exists() else {}
        return {name: its for name, its in found.items() if name.endswith((".csv", ".jsonl"))}

    @cached_property
    def kinds(self) -> list[str]:
        """One file of each kind: of its folder, names of arms and numbers left out, and its own name."""
        root, found = self.experiment.folder / self.run, {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and path.stat().st_size and not name.startswith(".lock"):
                kind = ARM.sub(
                    r"\1*", re.sub(r"report/(figures|tables)/[^.]*", r"report/\1/", name)
                )
                kind = re.sub(r"\d+", "N", kind)
                found[kind] = name  # of arms the last, whose files are the most
        return list(found.values())

    def judge(self, k: int, cell: Cell) -> tuple[str, str]:
        """(outcome, what was said): refused, told, healed, unused, or a fault in capitals."""
        run = self.copy(name := f"{self.run}-cell-{k:03}")
        path, draws = run / cell.file, random.Random(str(cell))
        path.write_bytes({**DAMAGES, **SHAPES}[cell.damage](path.read_bytes(), draws))
        code, command = self.call(cell.verb, name)
        outcome = self.outcome(cell, code, command, run)
        said = command.said[-2000:]
        if cell.again and outcome == "refused":
            outcome = self.follow(command.lines[0], run)
        if outcome.islower():
            self.remove(name)
        return outcome, said

    def outcome(self, cell: Cell, code: int, command, run: Path) -> str:
        name, file = run.name, run / cell.file
        if "Traceback" in command.said or "Traceback" in command.printed:
            return "TRACEBACK"
        whole, flat = f"{name}/{cell.file}", command.printed.replace("\n", "")
        if code:
            if cell.verb == "verify" and whole in flat:
                return "refused"
            if code != 2 or len(command.lines) != 1:
                return "NOT ONE LINE"
            if whole not in command.lines[0]:
                return "UNNAMED"
            return (
                "refused"
                if re.search(r"delete|restore|run|copy|make", command.lines[0])
                else "NO REMEDY"
            )
        printed, left, elsewhere = self.undamaged[cell.verb]
        if is_sound(run):
            return "healed" if results_of(run) == left else "MADE OTHERWISE"
        if f"altered: {whole}" in flat or whole in command.said:
            return "refused"
        same = {n: x for n, x in results_of(run).items() if n != cell.file}
        if same != {n: x for n, x in left.items() if n != cell.file}:
            return "LEFT OTHERWISE"
        if self.elsewhere(name) != elsewhere:
            return "SILENT"
        assert file.exists()
        return "unused" if self.printed(command, name) == printed else "SILENT"

    def follow(self, line: str, run: Path) -> str:
        """Does what the line says, and runs again: all is then as without damage."""
        deleted = re.search(r"delete (.*?)(?: and run| to train|;|$)", line)
        if deleted is None:
            return "NO REMEDY TO FOLLOW"
        named = line.split()[1]  # vlopd: FILE is damaged
        for word in deleted[1].split(" and "):
            word = named if word == "it" else word
            path = self.experiment.folder / word
            if not path.exists():
                return "REMEDY NAMES NO FILE"
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        code, command = self.call("run", run.name)
        if code or "Traceback" in command.said:
            return f"REMEDY FAILS: {command.said[-1000:]}"
        whole = is_sound(run) and results_of(run) == self.undamaged["run"][1]
        return "refused" if whole else "REMEDY DOES NOT MEND"


def is_sound(run: Path) -> bool:
    try:
        return not verify_run(RunFolder(run)).problems
    except (RunError, ValueError):
        return False


@pytest.fixture(scope="session")
def finished(experiment_of) -> Finished:  # noqa: F811
    """A finished image experiment with every kind of file."""
    experiment = experiment_of("vlm", 1, MORE.replace("TASK", "shapes"))
    return Finished(experiment, "first")


def cells_of(files: list[str], most: int) -> list[Cell]:
    """Of each file and damage `most` verbs, `run` among them, and once the remedy that it prints."""
    found, verbs = [], [verb for verb in VERBS if verb != "run"]
    for k, file in enumerate(files):
        damages = [*DAMAGES, *(SHAPES if file.endswith(".json") else ())]
        for j, damage in enumerate(damages):
            found.append(Cell(file, damage, "run", again=True))
            # another part of the verbs for each damage
            found += [
                Cell(file, damage, verbs[(k + (most - 1) * j + i) % len(verbs)])
                for i in range(most - 1)
            ]
    return found


def judge_all(finished: Finished, cells: list[Cell], record_property) -> None:
    finished.undamaged  # noqa: B018 - once, before the threads
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(finished.judge, range(len(cells)), cells))
    counts = Counter(outcome for outcome, _ in outcomes)
    faults = [
        f"{outcome}: cell-{k}: {cell}\n    {said}"
        for k, (cell, (outcome, said)) in enumerate(zip(cells, outcomes, strict=True))
        if not outcome.islower()
    ]
    kinds, damages = len({cell.file for cell in cells}), len({cell.damage for cell in cells})
    of = f"{kinds} kinds of files, {damages} damages and {len(VERBS)} verbs"
    record_property("figures", f"damage: {len(cells)} cells of {of}: {dict(counts)}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_damage(finished, record_property):
    """No damaged file of a finished run is used silently or ends in a traceback, and printed remedies work."""
    cells = cells_of(finished.kinds, 3)
    assert len(cells) >= 120
    judge_all(finished, cells, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    "match",
    [r"rename arms/subnetwork/state/state.safetensors 2", r"rename geometry/full/partial/N.npz 2"],
    ids=["state", "partial"],
)
def test_damage_of_what_a_kill_leaves(match, finished, record_property):
    """The same of a saved state and of partial results."""
    experiment, name = finished.experiment, f"stopped-{match[7:11]}"
    fault = Fault(experiment.folder / name, experiment.folder / f"{name}-seen", match=match)
    (command,) = experiment.start(name, fault=fault)
    assert command.end() == -9
    files = [
        path.relative_to(experiment.folder / name).as_posix()
        for folder in ("state", "partial")
        for path in sorted((experiment.folder / name).rglob(f"{folder}/*"))
    ]
    assert files
    stopped = Finished(experiment, name)
    stopped.__dict__["undamaged"] = {"run": finished.undamaged["run"]}
    damages = [(f, d) for f in files for d in (*DAMAGES, *(SHAPES if f.endswith(".json") else ()))]
    cells = [Cell(file, damage, "run", again=True) for file, damage in damages]
    judge_all(stopped, cells, record_property)
