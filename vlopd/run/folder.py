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
from vlopd.files import TEMPORARY, is_first_process, read_json
from vlopd.run.checksums import Checksums, differences
from vlopd.run.provenance import provenance

WRITTEN = ("arms", "masks", "geometry", "evals", "report", "checksums")
"""Folders of a run that stages write into."""


LOCK = ".lock"
"""What marks a run folder that processes work in."""


class RunFolder:
    """Paths of one run. See docs/run-folder.md for the contract."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.checksums = Checksums(self.root)
        self._lock: Any = None
        self._making: set[Path] = set()

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
        """Makes the folder for `config`, or opens it if it already is this config's.

        Raises ConfigError with the difference when the folder holds another config.
        """
        run = cls(root)
        run.root.mkdir(parents=True, exist_ok=True)
        run.lock()
        resolved = json.loads(config.model_dump_json())
        path = run.root / "run.json"
        with run.making(path):
            if path.exists():
                if run.checksums.path("run").exists():
                    run.checksums.check("run")
                lines = differences(with_defaults(read_json(path)["config"]), resolved)
                if lines:
                    raise ConfigError(
                        f"{run.root} already holds another config; choose another --out, or delete it. "
                        f"Theirs -> yours: {'; '.join(lines)}"
                    )
            elif is_first_process():
                seeds = {n: arm["seed"] for n, arm in resolved["arms"].items() if "seed" in arm}
                record = {"config": resolved, "seeds": seeds, "precision": resolved["precision"]}
                run.checksums.finish("run", path, {**record, **provenance()}, ())
        return run

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
        if run.checksums.path("run").exists():
            run.checksums.check("run")
        return run, config_of(read_json(path).get("config"), path)

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
    def making(self, artifact: Path) -> Iterator[None]:
        """Holds one artifact for this process while it is made; where another makes it, waits until it is done.

        So several jobs can make different arms of one run at once, and what they share is made once: look
        whether it is up to date inside. Of the processes that a launcher started together, the first holds
        it for all. The holder's name is in .locks/, and a killed holder holds nothing.
        """
        if not is_first_process():
            yield
            return
        assert artifact not in self._making, f"{artifact} is being made by this very process"
        name = artifact.relative_to(self.root).as_posix().replace("/", "--")
        path = self.root / ".locks" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                print(f"vlopd: waiting for {artifact}, which {holder} makes", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}")
            lock.flush()
            self._making.add(artifact)
            try:
                yield
            finally:
                self._making.remove(artifact)


def with_defaults(resolved: Any) -> Any:
    """A run's config with the defaults of settings that came after it was written, if it is a config still."""
    try:
        return json.loads(ExperimentConfig.model_validate(resolved).model_dump_json())
    except ValidationError:
        return resolved


def up_to_date(record: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage's record exists and was made from just these inputs."""
    return record.exists() and read_json(record).get("inputs") == dict(inputs)
