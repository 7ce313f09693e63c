"""What the files of a run held when they were written, and whether an artifact is up to date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlopd.digests import digest_text, file_digest
from vlopd.errors import RunError
from vlopd.files import flush, json_text, read_json, write_text

SINGLE = {
    "run": "run.json",
    "compare": "compare.json",
    "report": "report/record.json",
    "geometry/overlap": "geometry/overlap.json",
    "evals/vision": "evals/vision.json",
}
RECORDS = {
    "arms": "arms/{}/record.json",
    "masks": "masks/{}.json",
    "geometry": "geometry/{}/summary.json",
    "evals": "evals/{}/results.json",
    "tokens": "evals/{}/tokens.json",
}
"""The record of an artifact, by its name or the name's first part: written last, it says that the artifact is done."""


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

    def record(self, artifact: str) -> Path:
        """Where an artifact's record is, whether it exists or not."""
        kind, _, name = artifact.partition("/")
        return self.root / (SINGLE.get(artifact) or RECORDS[kind].format(name))

    def is_recorded(self, artifact: str) -> bool:
        """Whether artifacts of this kind have a record; the pictures of a task's questions have none."""
        return artifact in SINGLE or artifact.partition("/")[0] in RECORDS

    def records(self) -> list[str]:
        """The artifacts whose records exist."""
        found = [artifact for artifact, path in SINGLE.items() if (self.root / path).exists()]
        for kind, pattern in RECORDS.items():
            before, after = pattern.split("{}")
            for path in sorted(self.root.glob(pattern.format("*"))):
                name = self.name(path)
                if name not in SINGLE.values():
                    found.append(f"{kind}/{name.removeprefix(before).removesuffix(after)}")
        return found

    def start(self, artifact: str) -> None:
        """Withdraws an artifact's record and checksums before it is made again: a kill then leaves no false claim."""
        self.record(artifact).unlink(missing_ok=True)
        self.path(artifact).unlink(missing_ok=True)

    def finish(self, artifact: str, content: Any, files: Iterable[Path]) -> None:
        """Ends a stage: writes the files' checksums, and then the record, which says that the artifact is done."""
        text, record = json_text(content), self.record(artifact)
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
            "report": ["report"],
        }
        single = [SINGLE[artifact]] if artifact in SINGLE else [artifact]
        named = " and ".join(str(self.root / part) for part in parts.get(kind, single))
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

    def outdated(self, artifact: str, inputs: Mapping[str, Any]) -> str | None:
        """Why an artifact is to be made: "new", or what of its inputs changed; None where it is up to date.

        Raises RunError where it exists and its files are not as they were written.
        """
        record = self.record(artifact)
        if not record.exists():
            return "new"
        try:
            if self.path(artifact).exists():
                self.check(artifact, whole=False)
            before = read_json(record).get("inputs")
        except RunError:
            if not record.exists():  # another process has begun to make it again
                return "new"
            raise
        if before != dict(inputs):
            changed = [shorter(line) for line in differences(before, dict(inputs))]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"made from another {'; '.join(changed[:3])}{more}"
        return None if self.path(artifact).exists() else "without checksums"

    def artifacts(self) -> list[str]:
        """All that have checksums."""
        found = (self.root / "checksums").glob("*.sha256")
        return sorted(path.stem.replace("--", "/", 1) for path in found)


def shorter(difference: str) -> str:
    """A difference without its values where those are digests or long."""
    key, _, values = difference.partition(": ")
    return key if len(values) > 60 else difference


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Leaves that differ, as `key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            dotted = f"{where}.{key}" if where else key
            lines += differences(old.get(key), new.get(key), dotted)
        return lines
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
