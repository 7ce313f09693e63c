"""Run folders: where every artifact lives, atomic writes, provenance, and what need not run again.

A stage writes its files whole (temporary name, fsync, rename), then their checksums, and its record last. The
record holds the digests of what it was made from (`inputs`); a stage whose record matches its inputs, and whose
files are as they were written, is not run again. Only safetensors and JSON are read back; pickles never are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from vlopd.config import ConfigError, ExperimentConfig, UserError, config_of
from vlopd.digests import file_digest

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


TEMPORARY = re.compile(r"\.unfinished-[0-9a-f]{16}")
"""Names of files and folders that are still being written; a killed process leaves some behind."""


WRITTEN = ("arms", "masks", "geometry", "evals", "report", "checksums")
"""Folders of a run that stages write into."""
LOCK = ".lock"
"""What marks a run folder that processes work in."""


class RunError(UserError):
    """Something on disk is not what the run needs; the message names the file and the remedy."""


# -------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure."""
    temporary = temporary_beside(path)
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode  # the umask's; some writers bring their own
    try:
        yield temporary
        temporary.chmod(permissions)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`."""
    temporary = temporary_beside(path)
    temporary.mkdir()
    permissions = temporary.stat().st_mode & 0o777
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            inside.chmod(permissions if inside.is_dir() else permissions & 0o666)
            flush(inside)
        flush(temporary)
        replaced = temporary_beside(path)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".unfinished-{secrets.token_hex(8)}"


def flush(path: Path) -> None:
    """Puts a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems cannot sync a folder, and need not
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def json_text(value: Any) -> str:
    """JSON with NaN refused, so that any reader can parse it."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


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


def read_settings(path: Path) -> Any:
    """A JSON file that came with a model. Raises RunError where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not JSON ({error}); copy it again from the model") from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON-lines file, with their numbers and line ends.

    Only a line feed ends one. U+2028, U+0085 and others, at which `str.splitlines` divides a text, may stand
    inside a JSON string.
    """
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON-lines file. Raises RunError with the line's number."""
    if not path.exists():
        raise RunError(f"no {path}; run the stage that writes it first")
    rows = []
    for number, line in json_lines(path):
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


def digest_files(paths: list[Path], whole: bool = False) -> str:
    """One sha256 over names and contents; `whole` as in digests.file_digest."""
    return digest_content({path.name: file_digest(path, whole) for path in paths})


def digest_content(content: Mapping[str, str]) -> str:
    """One sha256 over {file: sha256}."""
    return digest_text("".join(f"{name} {content[name]}\n" for name in sorted(content)))


def digest_weights(content: Mapping[str, str]) -> str:
    """`digest_checkpoint` of a folder whose {file: sha256} are known."""
    return digest_content({n: its for n, its in content.items() if is_weights(n)})


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint folder holds weights, or says how an adapter's are merged."""
    return "/" not in name and (name.endswith(".safetensors") or name == "adapter_config.json")


def digest_checkpoint(folder: Path, whole: bool = False) -> str:
    """Digest of a checkpoint's weights (its safetensors files, and what says how an adapter's are merged).

    Raises RunError where there are none, or only pickles, which are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        raise RunError(f"{folder} holds {why}; a checkpoint needs *.safetensors")
    return digest_files([*files, *folder.glob("adapter_config.json")], whole)


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


# ----------------------------------------------------------------------------------------- checksums


class Problem(NamedTuple):
    """A file that is not as it was written."""

    file: Path
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}; {self.remedy}"


class Checksums:
    """What the files of a folder held when they were written: checksums/<artifact>.sha256.

    The files are as `sha256sum` writes them, with paths relative to the folder and a comment at the end, the digest of
    the lines above it: `sha256sum --check checksums/*` there does what `vlopd verify` does. An artifact is named by
    its place, as in `arms/full`.
    """

    def __init__(self, root: Path):
        self.root = root

    def path(self, artifact: str) -> Path:
        return self.root / "checksums" / f"{artifact.replace('/', '--')}.sha256"

    def write(self, artifact: str, files: Iterable[Path], last: Mapping[Path, str] = {}) -> None:
        """Notes what the files hold; `last` are texts that will be written after this, by path."""
        sums = {}
        for path in files:
            if path not in last:
                flush(path)
                sums[self.name(path)] = file_digest(path, whole=True)
        sums |= {self.name(path): digest_text(text) for path, text in last.items()}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_text(self.path(artifact), f"{lines}# {digest_text(lines)}\n")

    def start(self, artifact: str, record: Path) -> None:
        """Before an artifact is made again: what vouched for the old one goes first, so that a kill leaves no claim."""
        record.unlink(missing_ok=True)
        self.path(artifact).unlink(missing_ok=True)

    def finish(self, artifact: str, record: Path, content: Any, files: Iterable[Path]) -> None:
        """The end of a stage: the files' checksums, and then its record, which says that it is done."""
        text = json_text(content)
        record.unlink(missing_ok=True)  # an old record must not vouch for new files
        self.write(artifact, files, {record: text})
        write_text(record, text)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def read(self, artifact: str) -> dict[str, str]:
        """{file: sha256}. Raises RunError where the file of checksums is damaged."""
        lines, _, own = self.path(artifact).read_bytes().rpartition(b"# ")
        if own != f"{hashlib.sha256(lines).hexdigest()}\n".encode():
            raise RunError(str(self.damaged(artifact)))
        parts = (line.split("  ", 1) for line in lines.decode().split("\n")[:-1])
        return {name: digest for digest, name in parts}

    def damaged(self, artifact: str) -> Problem:
        return Problem(self.path(artifact), "is damaged", self.remedy(artifact))

    def remedy(self, artifact: str) -> str:
        """How to get an artifact anew."""
        kind, _, name = artifact.partition("/")
        parts = {
            "masks": [f"masks/{name}.safetensors", f"masks/{name}.json"],
            "tokens": [f"evals/{name}/tokens.json"],
            "images": [f"evals/images/{name}"],
            "run": ["run.json"],
            "compare": ["compare.json"],
        }
        if artifact in ("geometry/overlap", "evals/vision"):
            parts[kind] = [f"{artifact}.json"]
        named = " and ".join(str(self.root / part) for part in parts.get(kind, [artifact]))
        return f"restore it, or delete {named} and run again"

    def problems(self, artifact: str, whole: bool = True) -> Iterator[Problem]:
        """The files of an artifact that are not as they were written, or not there."""
        try:
            sums = self.read(artifact)
        except FileNotFoundError:
            yield Problem(self.path(artifact), "is missing", self.remedy(artifact))
            return
        except RunError:
            yield self.damaged(artifact)
            return
        for name, digest in sums.items():
            path = self.root / name
            try:
                # what is remembered may itself be damaged: only the content convicts
                if file_digest(path, whole) == digest or file_digest(path, True) == digest:
                    continue
                what = "is not as it was written"
            except OSError as error:
                what = "is missing" if not path.exists() else f"cannot be read ({error.strerror})"
            yield Problem(path, what, self.remedy(artifact))

    def check(self, artifact: str, whole: bool = True) -> None:
        """Raises RunError with the first file that is not as it was written.

        `whole` reads all of it, as is due before anything is made from it; else size and times decide what is read.
        """
        for problem in self.problems(artifact, whole):
            raise RunError(str(problem))

    def is_done(self, artifact: str, record: Path, inputs: Mapping[str, Any]) -> bool:
        """Whether an artifact was made from just these inputs; says what changed where it was made from others.

        Raises RunError where it is there and not as it was written.
        """
        if not record.exists():
            return False
        if self.path(artifact).exists():
            self.check(artifact, whole=False)
        before = read_json(record).get("inputs")
        if before != dict(inputs):
            changed = [shorter(line) for line in differences(before, dict(inputs))]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            why = f"made from another {'; '.join(changed[:3])}{more}"
        elif not self.path(artifact).exists():
            why = "without checksums"
        else:
            return True
        if is_first_process():
            print(f"vlopd: {artifact} is {why}: making it again", file=sys.stderr)
        return False

    def artifacts(self) -> list[str]:
        """All that have checksums."""
        found = (self.root / "checksums").glob("*.sha256")
        return sorted(path.stem.replace("--", "/", 1) for path in found)


def shorter(difference: str) -> str:
    """A difference without its values where those are digests or long."""
    key, _, values = difference.partition(": ")
    return key if len(values) > 60 else difference


# ---------------------------------------------------------------------------------------- run folder


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
