"""Rows of published benchmarks, written by us in their schema: pictures, and files as on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features
from lm_eval.api.model import LM
from PIL import Image


def picture(colour: str) -> dict[str, Any]:
    """A stored picture, as parquet files of the hub have it."""
    stream = BytesIO()
    Image.new("RGB", (40, 32), colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def save(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    split: str,
    features: Features | None = None,
) -> Path:
    """Writes a local copy of a split as parquet, `name/split-00000-of-00001.parquet`, with the hub's column types."""
    path = folder / name / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([dict(row) for row in rows], features=features).to_parquet(path)
    return path


@contextmanager
def local_copies(
    folder: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    write: Callable[[Path, str, Sequence[Mapping[str, Any]]], Any],
) -> Iterator[Path]:
    """Writes local copies of benchmarks, {name: rows}, where VLOPD_BENCHMARKS says they are meanwhile."""
    for name, own in rows.items():
        write(folder, name, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLOPD_BENCHMARKS", str(folder))
        yield folder


class Said(LM):
    """Gives the prepared answers, {benchmark: [answer of each row]}, and keeps the requests by (benchmark, row)."""

    MULTIMODAL = True

    def __init__(self, answers: Mapping[str, Sequence[str]]):
        super().__init__()
        self.answers = answers
        self.asked: dict[tuple[str, int], Any] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        keys = [(r.task_name.removeprefix("vlopd_"), r.doc_id) for r in requests]
        self.asked |= dict(zip(keys, requests, strict=True))
        return [self.answers[name][row] for name, row in keys]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError
