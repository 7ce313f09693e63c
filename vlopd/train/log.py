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

from vlopd.config.experiment import ExperimentConfig
from vlopd.errors import ConfigError
from vlopd.files import json_lines, without_nan, write_jsonl
from vlopd.types import Example

GROWING = ("metrics.jsonl", "samples.jsonl", "optimizer.jsonl", "heldout.jsonl")
"""What grows while an arm trains."""


def first_stale(name: str, start: int) -> int:
    """The first step that is not to be in a file where training goes on from `start`, as it comes again.

    Held-out scores are of the weights after `step` steps, so those of the state that is gone on from are there
    already; those of the base come again where there is no state. All else is of what step `step` did.
    """
    return start + 1 if name == "heldout.jsonl" and start > 0 else start


class TrainingLog:
    """Appends one line a step; on resume, lines after the resumed step are dropped first.

    Only one of several processes is `active`; the others' logs do nothing. `trackers` get the same numbers, those
    of earlier steps too.
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
            kept: dict[str, list[dict[str, Any]]] = {}
            for name in GROWING:
                if (folder / name).exists() or name == "metrics.jsonl":
                    kept[name] = rows_before(folder / name, first_stale(name, start))
                    write_jsonl(folder / name, kept[name])
            again = [(row["step"], by_task(row)) for row in kept.get("heldout.jsonl", ())]
            again += [(row["step"], row) for row in kept["metrics.jsonl"]]
            for step, numbers in sorted(again, key=lambda pair: pair[0]):
                self.track(step, numbers)

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
        """Scores after `step` steps, by task and metric; null for one that is no number."""
        if not self.active:
            return
        rows = [{"step": step, "task": task, **without_nan(each)} for task, each in scores.items()]
        self.append("heldout.jsonl", rows)
        flat = {name: x for row in rows for name, x in by_task(row).items()}
        self.track(step, flat)
        told = (f"{name} {'none' if x is None else format(x, '.3f')}" for name, x in flat.items())
        self.note(f"step {step}: {', '.join(told)}")

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


def by_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of heldout.jsonl as trackers name its scores, {task/metric: score}."""
    return {f"{row['task']}/{name}": x for name, x in row.items() if name not in ("step", "task")}


def rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of earlier steps. A last line that a kill cut short is of a later one, and goes too."""
    rows = []
    for _, line in json_lines(path) if path.exists() else ():
        with suppress(ValueError):
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
        # what a killed run left is logged again; tensorboard is told that it no longer counts
        again = {"purge_step": 0} if name == "tensorboard" else {}
        trackers.append(kind(f"{config.name}-{arm}", *where, **again))
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
