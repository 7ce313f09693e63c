"""What test_sharding.py has several processes do: `-m tests.sharded MODELS OUT PROCESSES=CASES...`; see `train`.

A case is "KIND WHAT SHARDING", KIND llm or vlm, SHARDING state or full; WHAT is dense, mask, projected (gradients),
average (the teacher is one of the student), recomputed (activations), own (the student samples), engine (a copy does),
null (a random gradient) or failing (the second process's loss, at the third step). One that ends in "resumed" gets what
two processes left of the same case.

Each case trains on the completions of recorded-KIND beside MODELS, so that every number of processes sees the same.
The first process writes the student's weights to OUT/CASE-<processes>.pt.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tests import forked
from vlopd import distributed
from vlopd.config.recipe import Recipe
from vlopd.data.shapes import ShapesDataset
from vlopd.errors import UserError
from vlopd.loop import Trained, distill
from vlopd.train.fsdp import FullyShardedTrainable
from vlopd.train.pair import ModelPair, load_pair
from vlopd.train.sharding import ShardedTrainable
from vlopd.types import Example
from vlopd.weights.subspace import Projection

STEPS, SEED = 5, 7


AVERAGE = {
    "model": "student",
    "ema": 0.5,
    "context": {"type": "system", "text": "the answer is one word"},
}


def pair_of(models: Path, kind: str, what: str = "dense", sharded: bool = False) -> ModelPair:
    student, teacher = (str(models / f"{kind}-{role}") for role in ("student", "teacher"))
    theirs = AVERAGE if what == "average" else teacher
    return load_pair(student, theirs, compute="fp32", device="cpu", sharded=sharded)


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


def projections(pair: ModelPair) -> dict[str, Projection]:
    """Of every matrix onto four columns."""
    source = torch.Generator().manual_seed(0)
    found = {}
    for name, p in pair.student.model.named_parameters():
        if p.ndim == 2:
            random = torch.randn(p.shape[1], 4, generator=source)
            found[name] = Projection(None, torch.linalg.qr(random).Q)
    return found


def recipe(sharding: str, what: str = "dense", **train) -> Recipe:
    more: dict[str, Any] = {"teacher": AVERAGE} if what == "average" else {}
    rollout: dict[str, Any] = {"engine": {"type": "vlopd"}} if what == "engine" else {}
    return Recipe(
        **more,
        train={
            "steps": STEPS,
            "prompts_per_step": 4,
            "micro_batch": 2,
            "sharding": sharding,
            **train,
        },
        rollout={"max_new_tokens": 4, **rollout},
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
    pair, replay = pair_of(models, kind, what, own == "full"), models.parent / f"recorded-{kind}"
    if what == "failing":
        pair = failing(pair)
    settings = {"save_every": 3, "activation_checkpointing": what == "recomputed"}
    return distill(
        pair,
        rows(kind),
        recipe(sharding or own, what, **settings),
        out,
        SEED,
        mask=fifth(pair) if what == "mask" else None,
        projections=projections(pair) if what == "projected" else None,
        identity=f"{kind} {what}",
        null="random_gradient" if what == "null" else None,
        replay=None if what in ("own", "engine", "average", "failing") else replay,
    )


class Failing(ModelPair):
    """A pair whose third loss cannot be computed in the second process."""

    calls = 0

    def loss_of(self, *arguments, **named):
        Failing.calls += 1
        if Failing.calls == 3 and distributed.accelerator().process_index == 1:
            raise UserError("this loss failed")
        return super().loss_of(*arguments, **named)


def failing(pair: ModelPair) -> ModelPair:
    return Failing(**{each.name: getattr(pair, each.name) for each in fields(pair)})


def train_all(models: Path, out: Path, cases: list[str]) -> None:
    state = distributed.accelerator()
    n = state.num_processes
    for case in cases:
        name = case.replace(" ", "-")
        done = train(models, out / f"{name}-{n}", case)
        values = done.trainable
        assert isinstance(values, ShardedTrainable)
        slots = values.sharded.values()
        own = {
            "values": sum(its.values.nbytes for its in slots),
            "whole": 4 * values.count,
            "indices": sum(its.index_bytes for its in slots),
        }
        if isinstance(values, FullyShardedTrainable):
            values.part_again()
            own["weights"] = sum(its.local.nbytes for its in values.rows.values())
            own["all_weights"] = sum(its.parameter.nbytes for its in values.rows.values())
            values.assemble()
        (out / f"{name}-{n}-{state.process_index}.json").write_text(json.dumps(own))
        if state.is_main_process:
            torch.save(done.student.model.state_dict(), out / f"{name}-{n}.pt")
            base = pair_of(models, case.split()[0]).student.model.state_dict()
            torch.save(values.merged(base), out / f"{name}-{n}-merged.pt")
            assert values.moved_off_mask(base) == 0


def main(models: Path, out: Path, launches: list[str]) -> None:
    for launch in launches:
        n, _, cases = launch.partition("=")
        for case in cases.split(","):
            if case.endswith("resumed"):
                before = folder_of(out, case.removesuffix(" resumed"), 2)
                shutil.copytree(before, folder_of(out, case, int(n)))
        forked.run(int(n), lambda cases=cases: train_all(models, out, cases.split(",")))


def folder_of(out: Path, case: str, n: int) -> Path:
    """Where n processes train a case."""
    return out / f"{case.replace(' ', '-')}-{n}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
