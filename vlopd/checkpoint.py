"""Run folders: where every artifact lives, atomic writes, digests, provenance, and what need not run again.

A stage writes its files whole (temporary name, fsync, rename) and its record last. The record holds the
digests of what it was made from (`inputs`); a stage whose record matches its inputs is not run again.
Only safetensors and JSON are read back; pickles never are.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlopd.config import ConfigError, ExperimentConfig, UserError, config_of

PACKAGES = [
    "vlopd",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "lm_eval",
    "open_clip_torch",
    "numpy",
    "pillow",
]


TEMPORARY = ".unfinished-"
"""How names of files that are still being written begin; a killed process leaves some behind."""


class RunError(UserError):
    """Something on disk is not what the run needs; the message names the file and the remedy."""


# -------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """JSON with NaN refused, so that any reader can parse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same value, as JSON has it: keys as strings, null for every number that is not finite."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: list[Any]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises RunError when the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"no {path}; run the stage that writes it first") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); delete it and run its stage again") from None


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON-lines file. Raises RunError with the line's number."""
    if not path.exists():
        raise RunError(f"no {path}; run the stage that writes it first")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RunError(
                f"{path} line {number} is not JSON; delete the file and run again"
            ) from None
    return rows


# ------------------------------------------------------------------------------------------- digests


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_json(value: Any) -> str:
    return digest_text(json.dumps(value, sort_keys=True))


def digest_files(paths: list[Path]) -> str:
    """One sha256 over names and contents."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def digest_checkpoint(folder: Path) -> str:
    """Digest of a checkpoint's weights (its safetensors files).

    Raises RunError where there are none, or only pickles, which are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        raise RunError(f"{folder} holds {why}; a checkpoint needs *.safetensors")
    return digest_files(files)


def provenance() -> dict[str, Any]:
    """Versions, git state of this source tree if it is one, host and time."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git": git_state(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def git_state() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------- run folder


class RunFolder:
    """Paths of one run. See docs/run-folder.md for the contract."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
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
                lines = differences(with_defaults(read_json(path)["config"]), resolved)
                if lines:
                    raise ConfigError(
                        f"{run.root} already holds another config; choose another --out, or delete it. "
                        f"Theirs -> yours: {'; '.join(lines)}"
                    )
            elif is_first_process():
                seeds = {n: arm["seed"] for n, arm in resolved["arms"].items() if "seed" in arm}
                record = {"config": resolved, "seeds": seeds, "precision": resolved["precision"]}
                write_json(path, {**record, **provenance()})
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
        return run, config_of(read_json(path).get("config"), path)

    def lock(self) -> None:
        """Notes that this process works in the folder, beside any others, until it ends.

        A process that finds itself alone removes what killed ones left unfinished.
        """
        if not is_first_process():
            return
        self._lock = (self.root / ".lock").open("a+")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _sweep(self) -> None:
        for path in list(self.root.rglob(f"{TEMPORARY}*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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


def names_apart(paths: Sequence[Sequence[str]]) -> list[str]:
    """A name for each path, given by its parts: the last, or as many as tell it from the others.

    >>> names_apart([("runs", "a", "full"), ("runs", "b", "full")])
    ["a-full", "b-full"]

    Raises ConfigError where one comes twice.
    """
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{'/'.join(paths[0])} is named twice")


def with_defaults(resolved: Any) -> Any:
    """A run's config with the defaults of settings that came after it was written, if it is a config still."""
    try:
        return json.loads(ExperimentConfig.model_validate(resolved).model_dump_json())
    except ValidationError:
        return resolved


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def up_to_date(record: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage's record exists and was made from just these inputs."""
    return record.exists() and read_json(record).get("inputs") == dict(inputs)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Leaves that differ, as `key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{where}.{key}" if where else key
            lines += differences(old.get(key), new.get(key), dotted)
        return lines
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
