"""What a training run leaves to read: metrics.jsonl, samples.jsonl with pictures, a progress bar, trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from vlopd.checkpoint import write_jsonl
from vlopd.types import Example


class TrainingLog:
    """Appends one line a step; on resume, lines after the resumed step are dropped first.

    Only one of several processes is `active`; the others' logs do nothing.
    """

    def __init__(self, folder: Path, title: str, steps: int, start: int, active: bool = True):
        self.folder, self.active = folder, active
        self.bar = tqdm(
            total=steps, initial=start, desc=title, unit="step", disable=not active, smoothing=0.1
        )
        if active:
            for name in ("metrics.jsonl", "samples.jsonl"):
                write_jsonl(folder / name, rows_before(folder / name, start))

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """One step's numbers: to metrics.jsonl and, the telling ones, to the progress bar."""
        if not self.active:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}  KL {row['kl']:.3f}  {row['tokens_per_second']:.0f} tok/s"
        )
        self.bar.update()

    def samples(
        self, step: int, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Sample generations, each with its picture under samples/."""
        if not self.active:
            return
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


def rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of earlier steps. A last line that a kill cut short is of a later one, and goes too."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < step]
