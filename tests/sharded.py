"""What test_sharding.py has several processes do: `-m tests.sharded MODELS OUT CASES`; see `train`.

A case is "KIND WHAT SHARDING", KIND llm or vlm, WHAT dense or mask, SHARDING state or full.

Each case trains on the completions of recorded-KIND beside MODELS, so that every number of processes sees the same.
The first process writes the student's weights to OUT/CASE-<processes>.pt. (Imports little: every process starts anew.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vlopd import distributed
from vlopd.config.recipe import Recipe
from vlopd.data.shapes import ShapesDataset
from vlopd.loop import Trained, distill
from vlopd.train.pair import ModelPair, load_pair
from vlopd.train.sharding import ShardedTrainable
from vlopd.types import Example

STEPS, SEED = 5, 7


def pair_of(models: Path, kind: str) -> ModelPair:
    student, teacher = (str(models / f"{kind}-{role}") for role in ("student", "teacher"))
    return load_pair(student, teacher, compute="fp32", device="cpu")


def rows(kind: str) -> list[Example]:
    """Eight rows; with eyes, the first and the last of four have a picture."""
    modality = "image" if kind == "vlm" else "text"
    found = list(ShapesDataset("train", 8, seed=3, modality=modality))
    for k, its in enumerate(found):
        if kind == "vlm" and k % 4 in (1, 2):
            found[k] = Example.ask(its.id, its.question, answer=its.answer)
    return found


def fifth(pair: ModelPair) -> dict[str, torch.Tensor]:
    """A mask of every fifth coordinate."""
    found = {}
    for k, (name, p) in enumerate(pair.student.model.named_parameters()):
        marks = torch.zeros(p.numel(), dtype=torch.bool)
        marks[k % 5 :: 5] = True
        found[name] = marks.view_as(p)
    return found


def recipe(sharding: str, **train) -> Recipe:
    return Recipe(
        train={
            "steps": STEPS,
            "prompts_per_step": 4,
            "micro_batch": 2,
            "sharding": sharding,
            **train,
        },
        rollout={"max_new_tokens": 4},
        optim={
            "type": "adamw",
            "learning_rate": 1e-2,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
        },
    )


def train(models: Path, out: Path, case: str, sharding: str | None = None) -> Trained:
    """One case, with a state after 3 of its 5 steps in `out`; goes on from one there."""
    kind, what, own = case.split()[:3]
    pair = pair_of(models, kind)
    return distill(
        pair,
        rows(kind),
        recipe(sharding or own, save_every=3),
        out,
        SEED,
        mask=fifth(pair) if what == "mask" else None,
        identity=f"{kind} {what}",
        replay=models.parent / f"recorded-{kind}",
    )


def main(models: Path, out: Path, cases: list[str]) -> None:
    state = distributed.accelerator()
    n = state.num_processes
    for case in cases:
        name = case.replace(" ", "-")
        done = train(models, out / f"{name}-{n}", case)
        values = done.trainable
        assert isinstance(values, ShardedTrainable)
        own = {
            "values": sum(its.values.nbytes for its in values.slots.values()),
            "whole": 4 * values.count,
            "indices": sum(its.index_bytes for its in values.slots.values()),
        }
        (out / f"{name}-{n}-{state.process_index}.json").write_text(json.dumps(own))
        if state.is_main_process:
            torch.save(done.student.model.state_dict(), out / f"{name}-{n}.pt")
            base = pair_of(models, case.split()[0]).student.model.state_dict()
            torch.save(values.merged(base), out / f"{name}-{n}-merged.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
