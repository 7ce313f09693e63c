"""Single odd values in the records and rows of a run that somebody sent: refused in one line, or shown as they are."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import call
from tests.faults.test_damage import Finished, experiment_of, finished  # noqa: F401

REMOVED = object()
ODD = (
    *(None, "x", "", [], {}, 5, -1, 0.5, True, 10**400),
    *(float("nan"), float("inf"), [None], [[1]], {"x": 1}, "\x1b[31m", REMOVED),
)
VERBS = {
    "compare.json": ("report RUN --out OUT", "paper RUN", "show RUN"),
    "evals": (
        "compare RUN/evals/base RUN/evals/full --out OUT --set bootstrap_draws=50",
        *("report RUN --out OUT", "compare RUN", "push RUN --arm full --repo me/mine --dry-run"),
    ),
    "arms": ("report RUN --out OUT", "paper RUN", "show RUN", "compare RUN", "verify RUN"),
    "geometry": ("report RUN --out OUT", "paper RUN", "show RUN"),
    "masks": ("report RUN --out OUT", "show RUN", "mask show RUN/masks/top.safetensors"),
    "run.json": ("report RUN --out OUT", "show RUN", "eval RUN"),
}
"""What reads the files of a stage."""
CELLS = 400


@dataclass(frozen=True)
class Cell:
    """A place in a file, what is put there, and the command that then reads it."""

    file: str
    place: tuple[str | int, ...]
    value: Any
    verb: str

    def spoil(self, run: Path) -> None:
        path = run / self.file
        lines = path.read_text().splitlines(True) if self.is_log else [path.read_text()]
        lines[0] = json.dumps(put(json.loads(lines[0]), self.place, self.value)) + "\n"
        path.unlink()  # perhaps a link
        path.write_text("".join(lines))
        for sums in (run / "checksums").glob("*.sha256"):  # nothing vouches for it
            if f"  {self.file}\n" in sums.read_text():
                sums.unlink()

    @property
    def is_log(self) -> bool:
        return self.file.endswith(".jsonl")

    def __str__(self) -> str:
        what = "removed" if self.value is REMOVED else repr(self.value)[:20]
        return f"{self.file} {'.'.join(map(str, self.place))}: {what}: {self.verb}"


def put(tree: Any, place: tuple[str | int, ...], value: Any) -> Any:
    if not place:
        return {} if value is REMOVED else value
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return tree


def places(value: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every entry, of lists the first."""
    yield where
    if isinstance(value, dict):
        for key, its in value.items():
            yield from places(its, (*where, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*where, 0))


def cells_of(run: Path, kinds: list[str], n: int) -> list[Cell]:
    """Cells by chance: a kind of file, then one of its places, a value and a verb."""
    draws = random.Random(0)
    read = [k for k in kinds if re.search(r"\.jsonl?$", k) and k.split("/")[0] in VERBS]
    read = [k for k in read if "/checkpoint" not in k]
    found = []
    while len(found) < n:
        file = draws.choice(read)
        text = (run / file).read_text()
        tree = json.loads(text.splitlines()[0] if file.endswith(".jsonl") else text)
        # of the deep trees of settings, which nothing reads, few
        every = [p for p in places(tree) if "inputs" not in p[:1] or draws.random() < 0.1]
        value, place = draws.choice(ODD), draws.choice(every)
        if value is REMOVED and place and isinstance(place[-1], int):
            continue
        found.append(Cell(file, place, value, draws.choice(VERBS[file.split("/")[0]])))
    return found


def judge(finished: Finished, k: int, cell: Cell) -> tuple[str, str]:  # noqa: F811
    experiment = finished.experiment
    run = experiment.folder / (name := f"odd-{k:04}")
    shutil.copytree(experiment.folder / finished.run, run, copy_function=os.link)
    cell.spoil(run)
    words = cell.verb.replace("RUN", name).replace("OUT", f"{name}-out").split()
    code, command = call(
        words,
        experiment.folder,
        experiment.folder / f"{name}-log",
        environment=experiment.environment,
    )
    said, printed = command.said, command.printed
    lines = [line for line in command.lines if "making it again" not in line]
    finished.remove(name)
    if "Traceback" in said or "Traceback" in printed:
        return "TRACEBACK", said[-1500:]
    if "\x1b[31m" in said + printed:
        return "ESCAPES", printed[-500:]
    if code == 0 or (code == 1 and cell.verb.startswith("verify")):
        return "shown", ""
    if code == 2 and len(lines) == 1 and lines[0].startswith("vlopd: "):
        return "refused", ""
    return "NOT ONE LINE", said[-1500:]


@pytest.mark.slow
def test_odd_values(finished, record_property):  # noqa: F811
    """A record or row with one odd value is refused in one line, or shown: never a traceback."""
    run = finished.experiment.folder / finished.run
    cells = cells_of(run, finished.kinds, CELLS)
    outcomes = [judge(finished, k, cell) for k, cell in enumerate(cells)]
    counts = Counter(outcome for outcome, _ in outcomes)
    record_property(
        "figures",
        f"odd values: {len(cells)} in {len({c.file for c in cells})} files: {dict(counts)}",
    )
    faults = [
        f"{outcome}: {cell}\n    {said}"
        for cell, (outcome, said) in zip(cells, outcomes, strict=True)
        if not outcome.islower()
    ]
    assert not faults, "\n".join(faults)
