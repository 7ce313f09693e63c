"""Partial results of a measurement: one file of arrays per stored tensor, so that a killed measurement goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from vlopd.digests import digest_json
from vlopd.distributed import exchanged
from vlopd.errors import RunError
from vlopd.files import read_json, whole_file, write_json

PARTIAL = "partial"
"""Folder of the partial results of one update's measures."""
OVERLAP = "overlap.partial"
"""Folder of those of several updates' overlap."""


@dataclass(frozen=True)
class Partial:
    """A folder of partial results; removed by `remove` when the tables are written."""

    folder: Path

    def path(self, index: int) -> Path:
        """The file of the tensor with this place in the order of names; absent if it is still to be measured."""
        return self.folder / f"{index:06}.npz"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def open_partial(
    folder: Path, about: Mapping[str, Any], processes: Accelerator | None = None
) -> Partial:
    """Opens a folder of partial results; removes those of a measurement with other inputs and settings than `about`.

    Of several processes, within `in_step`, the first opens it for all.
    """
    if processes is None or processes.is_main_process:
        _open(folder, about)
    if processes is not None:
        exchanged(processes, None)
    return Partial(folder)


def _open(folder: Path, about: Mapping[str, Any]) -> None:
    digest, note = digest_json(about), folder / "about.json"
    if folder.exists() and not _is_of(note, digest):
        shutil.rmtree(folder)
    if not note.exists():
        write_json(note, {"digest": digest, **about})


def _is_of(note: Path, digest: str) -> bool:
    """Whether partial results are of these inputs; a missing or damaged note is of none."""
    try:
        return bool(read_json(note)["digest"] == digest)
    except (RunError, LookupError, TypeError):
        return False


def save_partial(path: Path, arrays: Mapping[str, np.ndarray], about: Any) -> None:
    """Writes arrays and a JSON value; the file is whole or absent."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)


def load_partial(path: Path) -> tuple[dict[str, np.ndarray], Any] | None:
    """Reads what `save_partial` wrote: (arrays, JSON value); None where it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return arrays, json.loads(str(arrays.pop("about")))
    except Exception:  # zipfile has an error for each part of a file, and checks the sums of all
        return None
