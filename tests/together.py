"""What test_processes.py has two processes do, one thing after another: `-m tests.together MODELS OUT`, by itself or
under a launcher.

They run the command line on OUT/mini.toml into OUT/two, and again after a change; OUT/before has the run in between.
Then each writes what it raised to OUT/process-<k>.json. That it gets to the end at all shows that after a failure the
processes are still in step.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from tests import forked
from tests.conftest import pair_of, recipe_of
from vlopd import distributed
from vlopd.cli import main as command_line
from vlopd.config.experiment import ExperimentConfig
from vlopd.data.shapes import ShapesDataset
from vlopd.errors import DataError, UserError
from vlopd.loop import Hooks, distill
from vlopd.types import Example

SEED = 7
NAN = float("nan")


def examples(kind: str, n: int) -> list[Example]:
    return list(ShapesDataset("train", n, seed=3, modality="image" if kind == "vlm" else "text"))


def without_picture(example: Example) -> Example:
    return replace(Example.ask(example.id, example.question, answer=example.answer))


def every_other_with_picture() -> list[Example]:
    """Of 4 rows the first and the last have a picture: of two a step, both have one, or one, or none."""
    return [e if k in (0, 3) else without_picture(e) for k, e in enumerate(examples("vlm", 4))]


def make_config(models: Path, kind: str, **sections) -> ExperimentConfig:
    base = {
        "name": "mini",
        "student": str(models / f"{kind}-student"),
        "teacher": str(models / f"{kind}-teacher"),
        "precision": {"compute": "fp32"},
        "data": {"type": "shapes", "modality": "image" if kind == "vlm" else "text"},
        "rollout": {"max_new_tokens": 4},
        "train": {"steps": 2, "prompts_per_step": 2, "save_every": 10},
        "arms": {"full": {"type": "distill", "seed": 1}},
    }
    return ExperimentConfig.model_validate({**base, **sections})


def words(example: Example, completion: str) -> int:
    """A metric of the user's own, which each process imports."""
    return len(completion.split()) + len(example.images)


def train_with_few_pictures(models: Path, folder: Path, which: str) -> dict[str, torch.Tensor]:
    """The student's weights after 6 steps with decay and momentum; "both" trains all, "eyes" the tower alone."""
    freeze = ["language", "embedding", "head", "projector"] if which == "eyes" else []
    config = make_config(
        models,
        "vlm",
        optim={"learning_rate": 1e-2, "weight_decay": 0.5, "eps": 1e-3},
        train={
            "steps": 6,
            "prompts_per_step": 2,
            "freeze": freeze,
            "metrics": ["tests.together:words"],
        },
    )
    pair = pair_of(config)
    distill(pair, every_other_with_picture(), recipe_of(config), folder, SEED)
    return {name: p.detach().clone() for name, p in pair.student.model.named_parameters()}


def fail(models: Path, folder: Path, what: str, kind: str) -> None:
    """Trains where one process alone meets something that it cannot go on from."""
    first = distributed.accelerator().is_main_process
    sections, rows, hooks = {}, examples(kind, 2), Hooks()
    if what == "row":
        rows = [replace(rows[0], answer=None), rows[1]]
        sections["rollout"] = {"source": "data"}
    if what == "disk":
        sections["train"] = {"steps": 2, "prompts_per_step": 2, "save_every": 1}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").write_text("where a folder should be")
    if what == "held-out":
        hooks = Hooks(evaluate=lambda student: {} if first else 1 / 0, evaluate_every=1)
    config = make_config(models, kind, **sections)
    pair = pair_of(config)

    def spoil(module, inputs, output):
        if what == "loss" or not torch.is_grad_enabled():  # sampling has no gradients
            output[0] = NAN

    if what in ("loss", "sampler") and not first:
        loaded = pair.teachers[0].loaded if what == "loss" else pair.student
        loaded.model.get_output_embeddings().register_forward_hook(spoil)
    distill(pair, rows, recipe_of(config), folder, SEED, hooks=hooks, identity=what)


def fail_sharing(what: str) -> None:
    """Process 1 alone fails at work that both share, or before it."""
    state = distributed.accelerator()
    with distributed.in_step(state):
        if what == "before" and not state.is_main_process:
            raise OSError("no such disk")
        with suppress(Exception):  # as of a library that tries again
            distributed.exchanged(state, 0)
        places = [3, 1, 4, 0, 5, 0]

        def work(place: int) -> float:
            if what == "row" and place == 1:
                raise DataError("row 1 is empty")
            return 1 / place

        distributed.share(state, work, places[:3] if what == "before" else places)


FAILURES = [
    ("row", "llm"),
    ("row", "vlm"),
    ("loss", "llm"),
    ("loss", "vlm"),
    ("sampler", "llm"),
    ("disk", "llm"),
    ("held-out", "llm"),
]


WORDS = (
    "precision.compute=fp32",
    "eval.limit=4",
    "eval.batch_size=2",
    'eval.tasks=["shapes", "shapes_choice"]',
    "train.keep_steps=[1, 2]",
    'geometry.arms=["full", "moved"]',
    'geometry.nulls=[{type="gaussian"}]',
    'masks.leading={type="principal", fraction=0.1, rank=2}',
    'arms.moved={type="transplant", of="full", mask="leading"}',
    *("--arm", "full", "--arm", "subnetwork", "--arm", "moved"),
)
"""Words for mini.toml: fp32 to compare closely, two kinds of tasks, an early checkpoint, and a mask by spectra."""


def run(config: Path, out: Path, *words: str) -> None:
    """`vlopd run CONFIG --out OUT WORDS`."""
    sys.argv = ["vlopd", "run", str(config), *WORDS, "--out", str(out), *words]
    try:
        command_line.main()
    except SystemExit as stop:
        assert not stop.code, stop.code
    gc.collect()  # the run folder's lock goes with its last reference


def main(models: Path, out: Path) -> None:
    run(out / "mini.toml", out / "two")
    state = distributed.accelerator()
    if state.is_main_process:
        shutil.copytree(out / "two", out / "before")
    run(out / "mini.toml", out / "two", "train.steps=2", "--until", "arms")
    raised = {}
    for what, kind in FAILURES:
        try:
            fail(models, out / f"{what}-{kind}", what, kind)
            raised[f"{what} {kind}"] = None
        except (UserError, OSError, ZeroDivisionError) as error:
            raised[f"{what} {kind}"] = f"{type(error).__name__}: {error}"
    for what in ("before", "row", "zero"):
        try:
            fail_sharing(what)
            raised[f"sharing {what}"] = None
        except (UserError, OSError, ZeroDivisionError) as error:
            raised[f"sharing {what}"] = f"{type(error).__name__}: {error}"
    for which in ("both", "eyes"):
        trained = train_with_few_pictures(models, out / which, which)
        torch.save(trained, out / f"{which}-{state.process_index}.pt")
    (out / f"process-{state.process_index}.json").write_text(json.dumps(raised))


if __name__ == "__main__":
    folders = tuple(map(Path, sys.argv[1:]))
    if "RANK" in os.environ:
        main(*folders)
    else:
        forked.run(2, lambda: main(*folders))
