"""The run folder: paths of artifacts, its config and history, and locks between processes.

A stage writes its files atomically (temporary name, fsync, rename), then their checksums, and its record last. The
record holds the digests of its `inputs`; a stage whose record matches its inputs and whose files are unchanged is
skipped. Only safetensors and JSON are read back, never pickles.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of
from vlopd.errors import ConfigError, RunError
from vlopd.files import TEMPORARY, is_first_process, read_json, remove_abandoned, write_json
from vlopd.run.checksums import Checksums, differences
from vlopd.run.provenance import provenance
from vlopd.run.schemas.read import read_record
from vlopd.trust import grant, withhold

WRITTEN = (
    *("arms", "masks", "geometry", "evals", "validation", "sweeps", "report", "checksums"),
    "teacher-cache",
)
"""Folders of a run that stages write into."""
NO_RESULTS = ("state", "trackers")
"""Folders of an arm without checksums: its saved state, and logs of trackers, which write on after its end."""
FORMAT = 2
"""Version of run.json; increased where files of an earlier version would be misread."""
FIXED = ("student", "precision.stored")
"""Config sections that all arms depend on and that a run cannot change."""
LOCK = ".lock"
"""File that processes working in a run folder hold a lock on."""


class RunFolder:
    """Paths of one run. See docs/run-folder.md for the contract."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.checksums = Checksums(self.root)
        self._lock: Any = None
        self._held: set[str] = set()
        self.planned: set[str] = set()
        """Artifacts already announced as to be made."""
        self._found: Any = None
        """The run's config as `prepare` found it; None for a new run."""
        self.changes: list[str] = []
        """Differences of the config from the run's previous one, one line per setting."""

    # ---- paths

    def arm(self, name: str) -> Path:
        return self.root / "arms" / name

    def checkpoint(self, arm: str) -> Path:
        return self.arm(arm) / "checkpoint"

    def step_checkpoint(self, arm: str, step: int) -> Path:
        """The checkpoint of an arm after `step` optimizer steps (train.keep_steps)."""
        return self.arm(arm) / "checkpoints" / f"step-{step}"

    def arm_record(self, arm: str) -> Path:
        return self.checksums.record(f"arms/{arm}")

    def mask(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.safetensors"

    def mask_record(self, name: str) -> Path:
        return self.checksums.record(f"masks/{name}")

    def geometry(self, arm: str) -> Path:
        return self.root / "geometry" / arm

    def eval(self, arm: str) -> Path:
        return self.root / "evals" / arm

    def sweep(self, group: str) -> Path:
        """The curve and choice of a group of tuned arms."""
        return self.checksums.record(f"sweeps/{group}")

    @property
    def compare(self) -> Path:
        return self.checksums.record("compare")

    @property
    def report(self) -> Path:
        return self.root / "report"

    # ---- opening

    @classmethod
    def create(cls, root: Path | str, config: ExperimentConfig) -> RunFolder:
        """Creates or opens the folder of a run and sets its config: `prepare`, then `save_config`."""
        run = cls.prepare(root, config)
        run.save_config(config)
        return run

    @classmethod
    def prepare(cls, root: Path | str, config: ExperimentConfig, trust: bool = False) -> RunFolder:
        """Opens the folder of a run, new or existing, for `config`; `changes` lists the differences from its config.

        Writes no part of the run. Raises ConfigError where the configs differ in FIXED sections, and without `trust`
        RunError for a link in the folder that leads out of it.
        """
        run = cls(root)
        run.root.mkdir(parents=True, exist_ok=True)
        if not trust:
            run.refuse_foreign_files()
        run.lock()
        if (run.root / "run.json").exists():
            run._found = run.read()["config"]
            run.changes = differences(_with_defaults(run._found), _resolved_config(config))
        fixed = [line for line in run.changes if line.startswith(FIXED)]
        if fixed:
            raise ConfigError(
                f"{run.root} is a run of another student, from which all of its arms start; choose another --out. "
                f"Its config -> yours: {'; '.join(fixed)}"
            )
        return run

    def save_config(self, config: ExperimentConfig) -> None:
        """Writes `config`, its precision resolved, to run.json and appends the previous one to the history there.

        Raises ConfigError where another job has given the run another config since `prepare`.
        """
        assert config.precision.compute != "auto"
        if not is_first_process():
            return
        wanted, history = _resolved_config(config), []
        with self.lock_artifact("run"):
            if (self.root / "run.json").exists():
                before = self.read()
                history = before.pop("history")
                if changes := differences(_with_defaults(before["config"]), wanted):
                    if before["config"] != self._found:
                        raise ConfigError(
                            f"{self.root} has got another config by another job just now ({changes[0]}); run again"
                        )
                    history.append(before)
                elif self.checksums.path("run").exists():
                    return
            seeds = {n: arm["seed"] for n, arm in wanted["arms"].items() if "seed" in arm}
            about = {"format": FORMAT, "config": wanted, "seeds": seeds}
            about |= {"precision": wanted["precision"], **provenance(), "history": history}
            # a kill in between leaves a valid run.json, with or without a checksum
            self.checksums.path("run").unlink(missing_ok=True)
            write_json(self.root / "run.json", about)
            self.checksums.write("run", [self.root / "run.json"])

    @classmethod
    def open(
        cls, root: Path | str, locked: bool = True, altered: bool = False, trust: bool = False
    ) -> tuple[RunFolder, ExperimentConfig]:
        """Opens an existing run and returns it with its config; the code that this names runs only with `trust`.

        Without a lock nothing is written. Raises RunError where run.json is missing or, unless `altered`, was altered,
        and without `trust` for a link in the folder that leads out of it.
        """
        run = cls(root)
        path = run.root / "run.json"
        if not path.exists():
            raise RunError(
                f"{root} is not a run folder (no run.json); make one with `vlopd run CONFIG`"
            )
        if not trust:
            run.refuse_foreign_files()
        if locked:
            run.lock()
        stored = run.read(altered)["config"]
        (grant if trust else withhold)(stored, path)
        return run, config_of(stored, path)

    def read(self, altered: bool = False) -> dict[str, Any]:
        """Reads run.json. Raises RunError where it has another format version or, unless `altered`, was altered."""
        path = self.root / "run.json"
        if not altered and self.checksums.path("run").exists():
            self.checksums.check("run")
        about = read_json(path)
        its = about.get("format", 1) if isinstance(about, dict) else None
        if its != FORMAT or not isinstance(about.get("config"), dict):
            raise RunError(
                f"{path} was written by another version of vlopd (format {its}; this version reads {FORMAT}); run "
                "again in another folder, or use the version that run.json names"
            )
        return about

    def with_choice(self, config: ExperimentConfig, name: str) -> ExperimentConfig:
        """The config with an arm that takes a group's choice (`ExperimentConfig.follows`) at the chosen point."""
        group = config.follows(name)
        if group is None:
            return config
        return config.with_points({name: read_record(self.sweep(group))["chosen"]})

    def foreign_files(self) -> Iterator[Path]:
        """Links out of the run, and what is neither file nor folder, in the stages' folders and the locks'."""
        inside = self.root.resolve()
        for folder, folders, files in os.walk(self.root):
            if folder == str(self.root):
                folders[:] = [name for name in folders if name in (*WRITTEN, ".locks")]
            if Path(folder).match("arms/*/trackers/*/*"):  # ended; wandb links to its own log there
                folders.clear()
                continue
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                try:
                    mode = os.lstat(path).st_mode
                except FileNotFoundError:  # of another process, at work
                    continue
                if stat.S_ISLNK(mode):
                    if not Path(path).resolve().is_relative_to(inside):
                        yield Path(path)
                elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    yield Path(path)

    def refuse_foreign_files(self) -> None:
        """Raises RunError for a file that is not the run's: it would be measured, shown in the report, uploaded or
        overwritten as if it were."""
        for path in self.foreign_files():
            what = (
                f"a link out of the run folder, to {path.readlink()}" if path.is_symlink() else ""
            )
            raise RunError(
                f"{path} is {what or 'no plain file'}; put a file there, or pass --trust (in Python trust=True) if "
                "it is your own"
            )

    def lock(self) -> None:
        """Takes a shared lock on the folder until the process ends.

        A process that can take it exclusively first removes unfinished files of killed processes.
        """
        if not is_first_process():
            return
        self._lock = (self.root / LOCK).open("a+")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
            for path in (self.root / ".locks").glob("*"):
                if not path.is_symlink():
                    os.truncate(path, 0)  # which names a process that was killed
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _sweep(self) -> None:
        """Removes unfinished files of killed processes in the stages' folders; not in a nested run, and none whose
        writer lives, as of a command that writes into this folder without being a stage of the run."""
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            if here != self.root and LOCK in files:
                folders.clear()
                continue
            remove_abandoned(here / name for name in (*folders, *files))
            ours = WRITTEN if here == self.root else folders
            folders[:] = [n for n in folders if n in ours and not TEMPORARY.fullmatch(n)]

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def lock_artifact(self, artifact: str) -> Iterator[None]:
        """Holds an exclusive lock on one artifact; waits while another process makes it.

        Lets several jobs make different arms of one run concurrently, and shared artifacts once: check within the
        context whether it is up to date. Of the processes of one launcher, the first holds it for all. The holder is
        named in .locks/; a killed holder releases it.
        """
        if not is_first_process():
            yield
            return
        assert artifact not in self._held, f"{artifact} is already held by this process"
        path = self.root / ".locks" / artifact.replace("/", "--")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().decode().strip() or "another process"
                print(
                    f"vlopd: waiting for {self.root / artifact}, locked by {holder}",
                    file=sys.stderr,
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            with contextlib.suppress(OSError):  # a full disk: the lock is held without a name
                lock.write(f"process {os.getpid()} on {platform.node()}".encode())
            self._held.add(artifact)
            try:
                yield
            finally:
                self._held.remove(artifact)
                lock.truncate(0)  # a run that is passed on names no machine


def with_precision_of_run(root: Path | str, config: ExperimentConfig) -> ExperimentConfig:
    """The config with `precision.compute = "auto"` replaced by the run's precision, or by this device's for a new run.

    All arms and evaluations of a run thus share one precision, also where it is continued on another machine.
    """
    if config.precision.compute != "auto":
        return config
    run = RunFolder(root)
    if (run.root / "run.json").exists():
        return config.with_compute(run.read()["config"]["precision"]["compute"])
    # loads torch, which a finished run does not need
    from vlopd.distributed import accelerator, resolve_compute

    return config.with_compute(resolve_compute("auto", accelerator().device))


def _resolved_config(config: ExperimentConfig) -> dict[str, Any]:
    """A config as stored in run.json."""
    return json.loads(config.model_dump_json())


def _with_defaults(stored: Any) -> Any:
    """A stored config with the defaults of settings added since; unchanged where it is no longer valid."""
    try:
        return _resolved_config(ExperimentConfig.model_validate(stored))
    except ValidationError:
        return stored


def up_to_date(record: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a record exists and has exactly these inputs."""
    return record.exists() and read_record(record).get("inputs") == dict(inputs)
