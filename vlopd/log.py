"""What a training run leaves to read: metrics.jsonl, samples.jsonl with pictures, a progress bar, trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from vlopd.checkpoint import read_jsonl, write_jsonl
from vlopd.types import Example


class TrainingLog:
    """Appends one line a step; on resume, lines after the resumed step are dropped first."""

    def __init__(self, folder: Path, title: str, steps: int, start: int, quiet: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = folder / name
            kept = [row for row in read_jsonl(path) if row["step"] < start] if path.exists() else []
            write_jsonl(path, kept)
        self.metrics_file = (folder / "metrics.jsonl").open("a")
        self.bar = tqdm(
            total=steps, initial=start, desc=title, unit="step", disable=quiet, smoothing=0.1
        )

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.metrics_file.close()
        self.bar.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """One step's numbers: to metrics.jsonl and, the telling ones, to the progress bar."""
        self.metrics_file.write(json.dumps(row, allow_nan=False) + "\n")
        self.metrics_file.flush()
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}  KL {row['kl']:.3f}  {row['tokens_per_second']:.0f} tok/s"
        )
        self.bar.update()

    def samples(
        self, step: int, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Sample generations, each with its picture under samples/."""
        with (self.folder / "samples.jsonl").open("a") as file:
            for k, (example, row) in enumerate(zip(examples, rows, strict=True)):
                image = None
                if example.images:
                    image = f"samples/{step}-{k}.png"
                    (self.folder / "samples").mkdir(exist_ok=True)
                    example.images[0].save(self.folder / image)
                about = {
                    "step": step,
                    "id": example.id,
                    "question": example.question,
                    "reference": example.answer,
                    "image": image,
                }
                file.write(json.dumps({**about, **row}, allow_nan=False) + "\n")
