"""Checksums of a run's artifacts, their records, and whether an artifact is up to date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlopd.digests import digest_text, file_digest
from vlopd.errors import RunError
from vlopd.files import flush, json_text, write_text
from vlopd.run.schemas.read import read_record

SINGLE = {
    "run": "run.json",
    "compare": "compare.json",
    "report": "report/record.json",
    "geometry/overlap": "geometry/overlap.json",
    "geometry/groups": "geometry/groups.json",
    "evals/vision": "evals/vision.json",
}
RECORDS = {
    "arms": "arms/{}/record.json",
    "masks": "masks/{}.json",
    "geometry": "geometry/{}/summary.json",
    "evals": "evals/{}/results.json",
    "tokens": "evals/{}/tokens.json",
    "base_kl": "evals/{}/base_kl.json",
    "validation": "validation/{}/results.json",
    "sweeps": "sweeps/{}.json",
}
"""Record file of an artifact, by its name or the name's first part. Written last: it marks the artifact done."""


def is_among(artifact: str, those: Collection[str]) -> bool:
    """Whether an artifact, or its kind, is one of these: `arms/full`, `arms`."""
    return artifact in those or artifact.split("/")[0] in those


class Problem(NamedTuple):
    """A file that was changed, deleted or cannot be read, and the remedy."""

    file: Path
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}; {self.remedy}"


class Checksums:
    """The checksum files of a run folder: checksums/<artifact>.sha256.

    Format of `sha256sum`, with paths relative to the folder and a final comment that holds the digest of the lines
    above it: `sha256sum --check checksums/*` in the folder is equivalent to `vlopd verify`. Artifacts are named by
    their path, e.g. `arms/full`.
    """

    def __init__(self, root: Path):
        self.root = root

    def path(self, artifact: str) -> Path:
        return self.root / "checksums" / f"{artifact.replace('/', '--')}.sha256"

    def write(self, artifact: str, files: Iterable[Path], last: Mapping[Path, str] = {}) -> None:
        """Writes the checksums of files; `last` maps paths that are written afterwards to their text."""
        sums = {}
        for path in files:
            if path not in last:
                flush(path)
                sums[self.name(path)] = file_digest(path, whole=True)
        sums |= {self.name(path): digest_text(text) for path, text in last.items()}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_text(self.path(artifact), f"{lines}# {digest_text(lines)}\n")

    def record(self, artifact: str) -> Path:
        """The path of an artifact's record, which may not exist."""
        kind, _, name = artifact.partition("/")
        return self.root / (SINGLE.get(artifact) or RECORDS[kind].format(name))

    def is_recorded(self, artifact: str) -> bool:
        """Whether artifacts of this kind have a record; the saved images of a task have none."""
        return artifact in SINGLE or artifact.partition("/")[0] in RECORDS

    def records(self) -> list[str]:
        """Artifacts whose record exists."""
        found = [artifact for artifact, path in SINGLE.items() if (self.root / path).exists()]
        for kind, pattern in RECORDS.items():
            before, after = pattern.split("{}")
            for path in sorted(self.root.glob(pattern.format("*"))):
                name = self.name(path)
                if name not in SINGLE.values():
                    found.append(f"{kind}/{name.removeprefix(before).removesuffix(after)}")
        return found

    def start(self, artifact: str) -> None:
        """Deletes an artifact's record and checksums before it is remade, so that a kill leaves none that are stale."""
        self.record(artifact).unlink(missing_ok=True)
        self.path(artifact).unlink(missing_ok=True)

    def finish(self, artifact: str, content: Any, files: Iterable[Path]) -> None:
        """Ends a stage: writes the files' checksums, then the record, which marks the artifact done."""
        text, record = json_text(content), self.record(artifact)
        record.unlink(missing_ok=True)  # a stale record must not mark new files as done
        self.write(artifact, files, {record: text})
        write_text(record, text)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def read(self, artifact: str) -> dict[str, str]:
        """{file: sha256} of an artifact. Raises RunError for a damaged checksum file."""
        lines, _, own = self.path(artifact).read_bytes().rpartition(b"# ")
        if own != f"{hashlib.sha256(lines).hexdigest()}\n".encode():
            raise RunError(str(self.damaged(artifact)))
        parts = (line.split("  ", 1) for line in lines.decode().split("\n")[:-1])
        return {name: digest for digest, name in parts}

    def damaged(self, artifact: str) -> Problem:
        return Problem(self.path(artifact), "is damaged", self.remedy(artifact))

    def remedy(self, artifact: str) -> str:
        """The advice for restoring or remaking an artifact."""
        kind, _, name = artifact.partition("/")
        parts = {
            "masks": [f"masks/{name}.safetensors", f"masks/{name}.json"],
            "tokens": [f"evals/{name}/tokens.json"],
            "base_kl": [f"evals/{name}/base_kl.json"],
            "sweeps": [f"sweeps/{name}.json"],
            "images": [f"evals/images/{name}"],
            "report": ["report"],
        }
        single = [SINGLE[artifact]] if artifact in SINGLE else [artifact]
        named = " and ".join(str(self.root / part) for part in parts.get(kind, single))
        how = "run its config file again" if artifact == "run" else "run again"
        return f"restore it, or delete {named} and {how}"

    def problems(self, artifact: str, whole: bool = True) -> Iterator[Problem]:
        """Yields the files of an artifact that were changed, deleted or cannot be read."""
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
                # a cached digest may be stale, so a mismatch is confirmed by reading the content
                if file_digest(path, whole) == digest or file_digest(path, True) == digest:
                    continue
                what = "has changed since it was written"
            except OSError as error:
                what = "is missing" if not path.exists() else f"cannot be read ({error.strerror})"
            yield Problem(path, what, self.remedy(artifact))

    def is_sound(self, artifact: str) -> bool:
        """Whether an artifact's files are as they were written, by size and time, and its record is one."""
        if any(self.problems(artifact, whole=False)):
            return False
        try:
            read_record(self.record(artifact))
        except RunError:
            return False
        return True

    def check(self, artifact: str, whole: bool = True) -> None:
        """Raises RunError for the first file that was changed or deleted.

        With `whole`, every file is read, as is required before it is used; else unchanged sizes and times suffice.
        """
        for problem in self.problems(artifact, whole):
            raise RunError(str(problem))

    def check_finished(self, *those: str) -> None:
        """Raises RunError for the first file of finished artifacts that was changed or deleted, by size and time.

        It is asked before what they hold is shown. those: artifacts or kinds of artifacts (`arms/full`, `arms`).
        """
        for artifact in self.artifacts():
            done = not self.is_recorded(artifact) or self.record(artifact).exists()
            if done and is_among(artifact, those):
                self.check(artifact, whole=False)

    def outdated(self, artifact: str, inputs: Mapping[str, Any]) -> str | None:
        """The reason to make an artifact ("new", or its changed inputs); None where it is up to date.

        Raises RunError where its files were changed.
        """
        record = self.record(artifact)
        if not record.exists():
            return "new"
        try:
            if self.path(artifact).exists():
                self.check(artifact, whole=False)
            before = read_record(record).get("inputs")
        except RunError:
            if not record.exists():  # another process has begun to make it again
                return "new"
            raise
        if before != dict(inputs):
            changed = [_without_long_values(line) for line in differences(before, dict(inputs))]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"inputs changed: {'; '.join(changed[:3])}{more}"
        return None if self.path(artifact).exists() else "no checksums"

    def artifacts(self) -> list[str]:
        """Artifacts that have checksums."""
        found = (self.root / "checksums").glob("*.sha256")
        return sorted(path.stem.replace("--", "/", 1) for path in found)


def check_within_run(path: Path) -> None:
    """Raises RunError for a file or folder within a run of whose artifact a file was changed; other paths pass."""
    for root in (*path.parents, *path.absolute().parents):  # the first as the user named it
        if (root / "run.json").is_file() and (root / "checksums").is_dir():
            kind, *rest = path.absolute().relative_to(root.absolute()).parts
            sums, artifact = Checksums(root), "/".join([kind, *rest[:1]])
            if sums.path(artifact).exists():
                sums.check(artifact, whole=False)
            return


def _without_long_values(difference: str) -> str:
    """The key of a difference alone where its values are long or digests."""
    key, _, values = difference.partition(": ")
    return key if len(values) > 60 else difference


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves that differ, as `key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{where}.{key}" if where else key
            lines += differences(old.get(key), new.get(key), dotted)
        return lines
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
