"""The context of a stage: whether its artifact is up to date, its lock and its record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlopd import interrupts
from vlopd.files import is_first_process
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record

if TYPE_CHECKING:  # torch loads with it, which what reads results alone does not need
    from accelerate import Accelerator

Inputs = Mapping[str, Any]


@dataclass
class Stage:
    """The state of one artifact while it is made; see `stage`."""

    run: RunFolder
    artifact: str
    inputs: dict[str, Any] = field(default_factory=dict)
    """The artifact's inputs, with every file read."""
    before: dict[str, Any] = field(default_factory=dict)
    """The record being replaced, empty if there was none."""
    vouched: bool = False
    """Whether the files of the record being replaced had checksums, and matched them."""
    made: bool = False
    """Whether the artifact was made by this process."""

    @property
    def reusable(self) -> dict[str, Any]:
        """The record being replaced, of whose files some may be kept; empty where nothing vouches for them."""
        return self.before if self.vouched else {}

    def is_due(self, inputs: Callable[[bool], Inputs]) -> bool:
        """Whether the artifact must be made; if so, deletes its old record.

        inputs(whole) returns its inputs as digests; with `whole`, every file is read, as is required before it is
        used (digests.file_digest). Raises RunError where a file of the artifact was changed.
        """
        sums, first = self.run.checksums, is_first_process()
        why = sums.outdated(self.artifact, inputs(False))
        if why is None:
            return False
        if first and why != "new" and self.artifact not in self.run.planned:
            print(f"vlopd: {self.artifact}: {why}; making it again", file=sys.stderr)
        self.inputs = dict(inputs(first))
        if first:  # others must not read what this one withdraws
            self.before = {} if why == "new" else read_record(sums.record(self.artifact))
            self.vouched = sums.path(self.artifact).exists()  # `outdated` has checked them
            sums.start(self.artifact)
        self.made = True
        return True

    def is_due_in_all(self, state: Accelerator, inputs: Callable[[bool], Inputs]) -> bool:
        """`is_due`, as the first process finds it, in all processes that make the artifact together.

        A collective call, within `distributed.in_step`.
        """
        from vlopd.distributed import exchanged

        if state.is_main_process:
            self.is_due(inputs)
        own = (self.made, self.inputs, self.before, self.vouched)
        self.made, self.inputs, self.before, self.vouched = exchanged(state, own)[0]
        return self.made

    def finish(self, content: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Writes the files' checksums, then the record (`content` and the inputs), which marks the artifact done."""
        self.run.checksums.finish(self.artifact, {**content, "inputs": self.inputs}, files)


@contextmanager
def stage(run: RunFolder, artifact: str, derived: bool = False) -> Iterator[Stage]:
    """Locks an artifact while it is checked and made; other processes that need it wait.

    with stage(run, "masks/top") as its:
        if its.is_due(inputs):
            ...  # make it
            its.finish(content, files)
    return its.made

    A signal that comes meanwhile stops the command at the end (errors.Interrupted). A `derived` artifact, made in
    seconds from results alone, is remade where its files were changed, or are of another version, not refused.
    """
    with run.lock_artifact(artifact):
        if derived and not run.checksums.is_sound(artifact):
            run.checksums.start(artifact)
        with interrupts.held(artifact):
            yield Stage(run, artifact)
