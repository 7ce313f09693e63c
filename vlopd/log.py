"""What a training run leaves to read: metrics.jsonl, samples.jsonl with pictures, a progress bar, trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from vlopd.checkpoint import write_jsonl
from vlopd.config import ConfigError, ExperimentConfig
from vlopd.types import Example

FIRST_STALE = {"metrics.jsonl": 0, "samples.jsonl": 0, "optimizer.jsonl": 0, "heldout.jsonl": 1}
"""What grows while an arm trains, and the first step after the resumed one that is not to be in it. Held-out
scores are of the weights after `step` steps; everything else is of what step `step` did."""


class TrainingLog:
    """Appends one line a step; on resume, lines after the resumed step are dropped first.

    Only one of several processes is `active`; the others' logs do nothing. `trackers` get the same numbers.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        steps: int,
        start: int,
        active: bool = True,
        trackers: Sequence[GeneralTracker] = (),
    ):
        self.folder, self.active, self.trackers = folder, active, trackers
        self.bar = tqdm(
            total=steps, initial=start, desc=title, unit="step", disable=not active, smoothing=0.1
        )
        if active:
            for name, first in FIRST_STALE.items():
                if (folder / name).exists() or name == "metrics.jsonl":
                    write_jsonl(folder / name, rows_before(folder / name, start + first))

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()

    def note(self, text: str) -> None:
        """A line beside the progress bar."""
        if self.active:
            self.bar.write(f"{self.bar.desc}: {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """One step's numbers: to metrics.jsonl and, the telling ones, to the progress bar."""
        if not self.active:
            return
        self.append("metrics.jsonl", [row])
        self.track(row["step"], row)
        kl = "" if row["kl"] is None else f"  KL {row['kl']:.3f}"
        reward = f"  reward {row['reward']:.3f}" if "reward" in row else ""
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}{kl}{reward}  {row['tokens_per_second']:.0f} tok/s"
        )
        self.bar.update()

    def held_out(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Scores after `step` steps, by task and metric."""
        if not self.active:
            return
        self.append(
            "heldout.jsonl", [{"step": step, "task": task, **each} for task, each in scores.items()]
        )
        flat = {f"{task}/{name}": x for task, each in scores.items() for name, x in each.items()}
        self.track(step, flat)
        self.note(f"step {step}: " + ", ".join(f"{name} {x:.3f}" for name, x in flat.items()))

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines at the end of one of the arm's files."""
        if self.active:
            with (self.folder / name).open("a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def track(self, step: int, row: Mapping[str, Any]) -> None:
        numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def samples(
        self, step: int, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Sample generations, each with its picture under samples/."""
        if not self.active:
            return
        lines = []
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
            lines.append({**about, **row})
        self.append("samples.jsonl", lines)


def rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of earlier steps. A last line that a kill cut short is of a later one, and goes too."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < step]


def open_trackers(config: ExperimentConfig, folder: Path, arm: str) -> list[GeneralTracker]:
    """The configured trackers of accelerate, started, with the resolved config.

    Raises ConfigError for one that is not installed.
    """
    refuse_missing_trackers(config)
    trackers: list[GeneralTracker] = []
    for name in config.tracking.trackers:
        if name == "wandb":
            (folder / "trackers").mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("WANDB_MODE", "offline")
            os.environ.setdefault("WANDB_DIR", str(folder / "trackers"))
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = [str(folder / "trackers")] if kind.requires_logging_directory else []
        trackers.append(kind(f"{config.name}-{arm}", *where))
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration(flat(config.model_dump(mode="json")))
    return trackers


def refuse_missing_trackers(config: ExperimentConfig) -> None:
    """Raises ConfigError for a configured tracker that is not installed."""
    available = {str(name) for name in get_available_trackers()}
    for name in config.tracking.trackers:
        if name not in available:
            raise ConfigError(
                f"tracking.trackers names {name!r}, which is not installed: pip install {name}"
            )


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, str | int | float | bool]:
    """Nested tables as dotted keys; what is no number or truth value as text.

    >>> flat({"optim": {"betas": [0.9, 0.99]}})
    {"optim.betas": "[0.9, 0.99]"}
    """
    found: dict[str, str | int | float | bool] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{where}{key}.")
        else:
            found[where + key] = value if isinstance(value, (int, float)) else str(value)
    return found
