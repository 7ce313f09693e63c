"""Run folders: where every artifact lives, atomic writes, provenance, and what need not run again.

A stage writes its files whole (temporary name, fsync, rename), then their checksums, and its record last. The
record holds the digests of what it was made from (`inputs`); a stage whose record matches its inputs, and whose
files are as they were written, is not run again. Only safetensors and JSON are read back; pickles never are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of
from vlopd.errors import ConfigError, RunError
from vlopd.files import TEMPORARY, is_first_process, read_json, write_json
from vlopd.run.checksums import Checksums, differences
from vlopd.run.provenance import provenance

WRITTEN = ("arms", "masks", "geometry", "evals", "report", "checksums")
"""Folders of a run that stages write into."""


FORMAT = 2
"""Of run.json: raised where what an earlier version wrote would be misread."""
FIXED = ("student", "precision.stored")
"""The sections of a config that every arm stands on: a run with others is another run."""
LOCK = ".lock"
"""What marks a run folder that processes work in."""


class RunFolder:
    """Paths of one run. See docs/run-folder.md for the contract."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.checksums = Checksums(self.root)
        self._lock: Any = None
        self._making: set[str] = set()
        self.planned: set[str] = set()
        """Artifacts of which the user was told that they will be made."""
        self.changes: list[str] = []
        """How the config differs from the one that the run had before, a line a setting."""

    # ---- paths

    def arm(self, name: str) -> Path:
        return self.root / "arms" / name

    def checkpoint(self, arm: str) -> Path:
        return self.arm(arm) / "checkpoint"

    def kept(self, arm: str, step: int) -> Path:
        """An early checkpoint of an arm, after so many steps."""
        return self.arm(arm) / "checkpoints" / f"step-{step}"

    def arm_record(self, arm: str) -> Path:
        return self.arm(arm) / "record.json"

    def mask(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.safetensors"

    def mask_record(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.json"

    def geometry(self, arm: str) -> Path:
        return self.root / "geometry" / arm

    def eval(self, arm: str) -> Path:
        return self.root / "evals" / arm

    @property
    def compare(self) -> Path:
        return self.root / "compare.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    # ---- opening

    @classmethod
    def create(cls, root: Path | str, config: ExperimentConfig) -> RunFolder:
        """Makes the folder for `config`, or opens it and lets its run grow to `config`: `prepare` and `adopt`."""
        run = cls.prepare(root, config)
        run.adopt(config)
        return run

    @classmethod
    def prepare(cls, root: Path | str, config: ExperimentConfig) -> RunFolder:
        """Opens the folder of a run, or of one to be, for `config`; its `changes` say how the run's own differs.

        Writes no part of the run. Raises ConfigError where the configs differ in what every arm stands on (FIXED).
        """
        run = cls(root)
        run.root.mkdir(parents=True, exist_ok=True)
        run.lock()
        if (run.root / "run.json").exists():
            run.changes = differences(with_defaults(run.read()["config"]), resolved(config))
        fixed = [line for line in run.changes if line.startswith(FIXED)]
        if fixed:
            raise ConfigError(
                f"{run.root} is a run of another student, which all of its arms start from; choose another --out. "
                f"Theirs -> yours: {'; '.join(fixed)}"
            )
        return run

    def adopt(self, config: ExperimentConfig) -> None:
        """Makes `config` the run's, in run.json; the one before joins the history there.

        What the configs share is kept by every stage, and what differs is made by those that it concerns.
        """
        if not is_first_process():
            return
        wanted, history = resolved(config), []
        with self.making("run"):
            if (self.root / "run.json").exists():
                before = self.read()
                history = before.pop("history")
                if differences(with_defaults(before["config"]), wanted):
                    history.append(before)
                elif self.checksums.path("run").exists():
                    return
            seeds = {n: arm["seed"] for n, arm in wanted["arms"].items() if "seed" in arm}
            about = {"format": FORMAT, "config": wanted, "seeds": seeds}
            about |= {"precision": wanted["precision"], **provenance(), "history": history}
            # a kill between these leaves a run.json, with a checksum or without
            self.checksums.path("run").unlink(missing_ok=True)
            write_json(self.root / "run.json", about)
            self.checksums.write("run", [self.root / "run.json"])

    @classmethod
    def open(cls, root: Path | str) -> tuple[RunFolder, ExperimentConfig]:
        """Opens an existing run and returns it with its config."""
        run = cls(root)
        path = run.root / "run.json"
        if not path.exists():
            raise RunError(
                f"{root} is not a run folder (no run.json); make one with `vlopd run CONFIG`"
            )
        run.lock()
        return run, config_of(run.read()["config"], path)

    def read(self, altered: bool = False) -> dict[str, Any]:
        """run.json. Raises RunError where it is of another version of this program or, unless `altered`, altered."""
        path = self.root / "run.json"
        if not altered and self.checksums.path("run").exists():
            self.checksums.check("run")
        about = read_json(path)
        its = about.get("format", 1) if isinstance(about, dict) else None
        if its != FORMAT or not isinstance(about.get("config"), dict):
            raise RunError(
                f"{path} is of another version of vlopd (format {its}; this one reads {FORMAT}): make the run again in "
                "another folder, or use the version that it names"
            )
        return about

    def lock(self) -> None:
        """Notes that this process works in the folder, beside any others, until it ends.

        A process that finds itself alone removes what killed ones left unfinished.
        """
        if not is_first_process():
            return
        self._lock = (self.root / LOCK).open("a+")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _sweep(self) -> None:
        """Removes what killed processes left unfinished where stages write; not in a run of its own further down."""
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            if here != self.root and LOCK in files:
                folders.clear()
                continue
            for name in filter(TEMPORARY.fullmatch, [*folders, *files]):
                path = here / name
                if path.is_symlink():
                    continue  # we make none
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            ours = WRITTEN if here == self.root else folders
            folders[:] = [n for n in folders if n in ours and not TEMPORARY.fullmatch(n)]

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def making(self, artifact: str) -> Iterator[None]:
        """Holds one artifact for this process while it is made; where another makes it, waits until it is done.

        So several jobs can make different arms of one run at once, and what they share is made once: check
        whether it is up to date inside. Of the processes that a launcher started together, the first holds
        it for all. The holder's name is in .locks/, and a killed holder holds nothing.
        """
        if not is_first_process():
            yield
            return
        assert artifact not in self._making, f"{artifact} is being made by this very process"
        path = self.root / ".locks" / artifact.replace("/", "--")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                print(
                    f"vlopd: waiting for {self.root / artifact}, which {holder} makes",
                    file=sys.stderr,
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}")
            lock.flush()
            self._making.add(artifact)
            try:
                yield
            finally:
                self._making.remove(artifact)


def resolved(config: ExperimentConfig) -> dict[str, Any]:
    """A config as run.json has it."""
    return json.loads(config.model_dump_json())


def with_defaults(resolved: Any) -> Any:
    """A run's config with the defaults of settings that came after it was written, if it is a config still."""
    try:
        return json.loads(ExperimentConfig.model_validate(resolved).model_dump_json())
    except ValidationError:
        return resolved


def up_to_date(record: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage's record exists and was made from just these inputs."""
    return record.exists() and read_json(record).get("inputs") == dict(inputs)
