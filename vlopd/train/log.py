"""Logs of a training run: metrics.jsonl, samples.jsonl with pictures, held-out scores, a progress bar, trackers."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from vlopd.config.tracking import TrackingConfig
from vlopd.errors import ConfigError
from vlopd.files import json_lines, without_nan, write_jsonl, writing
from vlopd.models.loaded import LoadedModel
from vlopd.progress import progress
from vlopd.train.losses import TokenDivergence
from vlopd.train.rollouts import Batch
from vlopd.trust import account, why_withheld
from vlopd.types import Example

WANDB = {
    "WANDB_MODE": "offline",
    "WANDB_HOST": "vlopd",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
}
"""Unless the user sets otherwise, wandb sends nothing, and records no name, user, path or hardware of the machine."""
GROWING = ("metrics.jsonl", "samples.jsonl", "optimizer.jsonl", "heldout.jsonl")
"""Files that training appends to."""


def first_stale(name: str, start: int) -> int:
    """The first step whose rows a file loses when training resumes from `start`, as they are written again.

    Held-out scores are of the weights after `step` steps, so those of the resumed state stay; those of the base are
    written again where there is no state. All other rows are of step `step` itself.
    """
    return start + 1 if name == "heldout.jsonl" and start > 0 else start


class TrainingLog:
    """Appends one line a step; on resume, lines after the resumed step are dropped first.

    Only one of several processes is `active`; the others' logs do nothing. `trackers`, started, get the same numbers,
    on resume those of earlier steps too, and are finished at the end.
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
        self.title = title
        self.bar = progress(
            title=f"{title}: steps",
            total=steps,
            initial=start,
            unit="step",
            disable=not active,
            smoothing=0.1,
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
        """Prints a line above the progress bar."""
        if self.active:
            self.bar.write(f"{self.title}: {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes one step's metrics to metrics.jsonl, and a few to the progress bar."""
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
        """Writes scores after `step` steps, by task and metric; null for NaN."""
        if not self.active:
            return
        rows = [{"step": step, "task": task, **without_nan(each)} for task, each in scores.items()]
        self.append("heldout.jsonl", rows)
        flat = {name: x for row in rows for name, x in by_task(row).items()}
        self.track(step, flat)
        words = (f"{name} {'none' if x is None else format(x, '.3f')}" for name, x in flat.items())
        self.note(f"step {step}: {', '.join(words)}")

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to one of the log's files."""
        if self.active:
            path = self.folder / name
            with writing(path), path.open("a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def track(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends a row's numbers to the trackers."""
        numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def samples(
        self, step: int, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes sample generations, each with its picture under samples/."""
        if not self.active:
            return
        lines = []
        for k, (example, row) in enumerate(zip(examples, rows, strict=True)):
            image = None
            if example.images:
                image = f"samples/{step}-{k}.png"
                (self.folder / "samples").mkdir(exist_ok=True)
                with writing(self.folder / image):
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


class Stopwatch:
    """Seconds by phase; several phases of one name add up. `on_start` is called with the name of each that starts."""

    def __init__(self, on_start: Callable[[str], object] | None = None) -> None:
        self.on_start = on_start
        self.started = self.last = self.now()
        self.phase: str | None = None
        self.laps: dict[str, float] = {}

    @staticmethod
    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # kernels are still running when their calls return
        return time.perf_counter()

    def start(self, phase: str | None) -> None:
        """Ends the phase under way, and starts another; None: none."""
        now = self.now()
        if self.phase is not None:
            key = f"{self.phase}_seconds"
            self.laps[key] = self.laps.get(key, 0.0) + now - self.last
        self.last, self.phase = now, phase
        if self.on_start is not None and phase is not None:
            self.on_start(phase)

    def seconds(self, tokens: int) -> dict[str, float]:
        """Seconds by phase and in all, and tokens per second; ends the phase under way."""
        self.start(None)
        total = self.last - self.started
        return {
            **{name: round(each, 4) for name, each in self.laps.items()},
            "seconds": round(total, 4),
            "tokens_per_second": round(tokens / total, 1),
        }


def sample_rows(
    student: LoadedModel,
    batches: Sequence[Batch],
    tokens: Sequence[TokenDivergence],
    group: int,
    most: int = 4,
) -> tuple[list[Example], list[dict[str, Any]]]:
    """(examples, rows of samples.jsonl): the first completions of the first prompts, with both models' log-probs."""
    found: dict[int, tuple[Example, dict[str, Any]]] = {}
    for batch, each in zip(batches, tokens, strict=True):
        for k, place in enumerate(batch.places):
            if place % group == 0 and place // group < most:
                found[place] = (batch.examples[k], sample_row(student, batch, each, k))
    chosen = [found[place] for place in sorted(found)]
    return [example for example, _ in chosen], [row for _, row in chosen]


def sample_row(
    student: LoadedModel, batch: Batch, tokens: TokenDivergence, k: int
) -> dict[str, Any]:
    """Row `k` of a micro-batch: its completion with both models' log-probs."""
    mask = batch.completions.mask
    ids = batch.completions.ids[k][mask[k]].tolist()
    row: dict[str, Any] = {
        "writer": batch.writers[k],
        "completion": student.transcript(ids),
        "tokens": student.tokenizer.convert_ids_to_tokens(ids),
    }
    columns = {"student_logprobs": tokens.student_logprobs}
    if tokens.teacher_logprobs is not None:
        columns["teacher_logprobs"] = tokens.teacher_logprobs
    start = int(mask[:k].sum())
    for name, column in columns.items():
        row[name] = [rounded(x) for x in column[start : start + len(ids)].tolist()]
    if batch.rewards is not None:
        row["reward"] = float(batch.rewards[k])
    return row


def rounded(logprob: float) -> float | None:
    """For JSON, which has no infinity: a teacher may ban a token."""
    return round(logprob, 4) if math.isfinite(logprob) else None


def by_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of heldout.jsonl as {task/metric: score}, the names that trackers get."""
    return {f"{row['task']}/{name}": x for name, x in row.items() if name not in ("step", "task")}


def rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of earlier steps. A last line that a kill truncated is of a later one, and is dropped."""
    rows = []
    for _, line in json_lines(path) if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < step]


def open_trackers(
    tracking: TrackingConfig,
    experiment: str,
    run: str,
    arm: str,
    folder: Path,
    config: Mapping[str, Any],
) -> list[GeneralTracker]:
    """Starts trackers of accelerate for one arm, with files under `folder` and `config` as the run's settings.

    Raises ConfigError as `refuse_trackers`.
    """
    refuse_trackers(tracking)
    trackers: list[GeneralTracker] = []
    for name in tracking.trackers:
        arguments = tracking.arguments(name, experiment, run, arm)
        project = arguments.pop("project")
        if name == "tensorboard":
            _without_host_name()
        if name == "wandb":
            (folder / "trackers").mkdir(parents=True, exist_ok=True)
            # an argument, since a process trains several arms
            arguments["dir"] = os.environ.get("WANDB_DIR", str(folder / "trackers"))
            for key, value in WANDB.items():
                os.environ.setdefault(key, value)
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = [str(folder / "trackers")] if kind.requires_logging_directory else []
        # a resumed run logs its earlier steps again; tensorboard drops those of before
        again = {"purge_step": 0} if name == "tensorboard" else {}
        trackers.append(kind(project, *where, **again, **arguments))
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration(flat(config))
    return trackers


def _without_host_name() -> None:
    """Makes tensorboard name its files without the machine, which has no place in a run that is passed on."""
    from tensorboard.summary.writer import event_file_writer

    event_file_writer.socket = SimpleNamespace(gethostname=lambda: "vlopd")


def refuse_trackers(tracking: TrackingConfig) -> None:
    """Raises ConfigError for a tracker that is not installed, and for an account that a received run names."""
    available = {str(name) for name in get_available_trackers()}
    where = account(tracking.entity, tracking.mode)
    if "wandb" in tracking.trackers and where and (why := why_withheld(where)):
        raise ConfigError(why.replace("not run", "not used"))
    for name in tracking.trackers:
        if name not in available:
            raise ConfigError(
                f"tracking.trackers names {name!r}, which is not installed: pip install {name}"
            )


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, str | int | float | bool]:
    """Nested tables as dotted keys; values that are neither numbers nor booleans as text.

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
