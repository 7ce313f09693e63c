"""One artifact of a run while a process holds it: is it up to date, who makes it, and its record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlopd.files import is_first_process, read_json
from vlopd.run.folder import RunFolder

Inputs = Mapping[str, Any]


@dataclass
class Stage:
    """What a stage's function needs beside its science; see `stage`."""

    run: RunFolder
    artifact: str
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the artifact is made from, with every file read."""
    before: dict[str, Any] = field(default_factory=dict)
    """The record that is replaced, empty where there was none: part of the artifact may be kept."""
    made: bool = False
    """Whether there was anything to do."""

    def is_due(self, inputs: Callable[[bool], Inputs]) -> bool:
        """Whether the artifact is to be made; if so, withdraws the old one's record.

        inputs(whole): the digests of what it is made from; with `whole`, after reading every file, as is due before
        work on what they say (digests.file_digest). Raises RunError where its files are not as they were written.
        """
        sums, first = self.run.checksums, is_first_process()
        why = sums.outdated(self.artifact, inputs(False))
        if why is None:
            return False
        if first and why != "new" and self.artifact not in self.run.planned:
            print(f"vlopd: {self.artifact} is {why}: making it again", file=sys.stderr)
        self.inputs = dict(inputs(first))
        if first:  # others must not read what this one withdraws
            self.before = {} if why == "new" else read_json(sums.record(self.artifact))
            sums.start(self.artifact)
        self.made = True
        return True

    def finish(self, content: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Writes the files' checksums and the record: `content` with the inputs. The artifact is done."""
        self.run.checksums.finish(self.artifact, {**content, "inputs": self.inputs}, files)


@contextmanager
def stage(run: RunFolder, artifact: str, derived: bool = False) -> Iterator[Stage]:
    """Holds an artifact for this process while it is looked up or made; other processes that need it wait.

    with stage(run, "masks/top") as its:
        if its.is_due(inputs):
            ...  # the science
            its.finish(content, files)
    return its.made

    One that is `derived`, in seconds and from results alone, is made again where it was altered, not refused.
    """
    with run.making(artifact):
        if derived and any(run.checksums.problems(artifact, whole=False)):
            run.checksums.start(artifact)
        yield Stage(run, artifact)
