"""A training's completions, kept to be replayed: one safetensors file a step.

Resuming writes the files of repeated steps again, with the same content.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlopd import distributed
from vlopd.errors import RunError
from vlopd.files import read_jsonl, whole_file
from vlopd.train.rollouts import Batch
from vlopd.types import Completions

COLUMNS = ("ids", "mask", "logprobs", "ended")


@dataclass(frozen=True)
class Replay:
    """The folder of a training, with completions/ and metrics.jsonl."""

    folder: Path

    def path(self, step: int) -> Path:
        return self.folder / "completions" / f"step-{step:06d}.safetensors"

    def clear(self) -> None:
        """Removes the completions of an earlier training."""
        shutil.rmtree(self.folder / "completions", ignore_errors=True)

    def write(self, step: int, batches: Sequence[Batch], accelerator: Accelerator) -> None:
        """Writes the step's completions of all processes, in the order of places, with their examples' ids."""
        pad = batches[0].student.pad_id
        whole = Completions.joined([(b.places, b.completions) for b in batches], pad)
        named = [(p, e.id) for b in batches for p, e in zip(b.places, b.examples, strict=True)]
        columns = {name: column.cpu() for name, column in _columns(whole).items()}
        every = distributed.gathered(accelerator, (columns, [name for _, name in sorted(named)]))
        with distributed.together(accelerator):
            if accelerator.is_main_process:
                parts, start = [], 0
                for part, _ in every:
                    rows = range(start, start + len(part["ids"]))
                    parts.append((rows, Completions(**part)))
                    start = rows.stop
                about = {"examples": json.dumps([name for _, names in every for name in names])}
                with whole_file(self.path(step)) as temporary:
                    save_file(_columns(Completions.joined(parts, pad)), temporary, about)

    def read(
        self, step: int, places: range, examples: Sequence[str], device: torch.device
    ) -> Completions:
        """The completions at `places` among the step's, of the examples with these ids.

        Raises RunError where they were not kept, are damaged, or are of other examples.
        """
        path = self.path(step)
        if not path.exists():
            raise RunError(
                f"no {path}: this training did not keep its completions; delete {self.folder} and run again, "
                "which keeps them where an arm of the config replays them, or leave null.replay out"
            )
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                columns = {name: file.get_tensor(name) for name in COLUMNS}
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path} is damaged ({error}); delete {self.folder} and run again"
            ) from None
        kept = json.loads(about.get("examples", "[]"))[places.start : places.stop]
        if kept != list(examples):
            raise RunError(
                f"{path} has completions of other prompts; replay needs the same data, seed and train.prompts_per_step"
            )
        part = slice(places.start, places.stop)
        return Completions(**{name: columns[name][part].to(device) for name in COLUMNS})

    @cached_property
    def norms(self) -> dict[int, float]:
        """The gradient's norm of each step, before clipping. Raises RunError where there is none."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return {row["step"]: row["grad_norm"] for row in rows}

    def norm(self, step: int) -> float:
        if step not in self.norms:
            raise RunError(f"{self.folder / 'metrics.jsonl'} has no step {step}; replay needs it")
        return self.norms[step]


def _columns(completions: Completions) -> dict[str, torch.Tensor]:
    return {
        "ids": completions.ids.contiguous(),
        "mask": completions.mask.contiguous(),
        "logprobs": completions.logprobs.contiguous(),
        "ended": completions.ended.contiguous(),
    }
