"""Benchmarks the predictions of `vlopd check`: memory by part and phase, predicted beside measured.

    python scripts/bench_check.py            # peaks that were measured on an H100 with earlier code
    python scripts/bench_check.py --count    # and a step of the built-in pairs here, counted allocation by allocation

The H100's runs (one each): models of published architectures with random weights, prompts of 139 tokens and, with a
picture of 448 x 448, 397; what they report is `torch.cuda.max_memory_allocated`. Predicted seconds are of a described
card and of the present code.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from vlopd import distributed, loop
from vlopd.config.recipe import Recipe
from vlopd.data.shapes import ShapesDataset
from vlopd.models.load import load_model_config
from vlopd.models.meta import meta_model
from vlopd.preflight.memory import (
    DeviceSpeed,
    Estimate,
    Reader,
    described_device,
    estimate,
)
from vlopd.train.allocations import Allocations
from vlopd.train.log import Stopwatch
from vlopd.train.optimizers import build_optimizer
from vlopd.train.pair import load_pair
from vlopd.train.rollouts import collect
from vlopd.train.sparse import Trainable

ARCHITECTURES = Path(__file__).parents[1] / "configs" / "pairs" / "architectures"


def reader(name: str, prompt_tokens: int, patches: int = 0) -> Reader:
    """A published architecture on the meta device."""
    return Reader(
        meta_model(load_model_config(str(ARCHITECTURES / name))), prompt_tokens, patches=patches
    )


def show(title: str, found: Estimate, measured: Mapping[str, float], unit: float = 1e9) -> None:
    """Prints parts, then phases with what was measured of them, in units of `unit` bytes."""
    print(f"\n{title}")
    parts = found.memory._asdict().items()
    print("  " + ", ".join(f"{part} {size / unit:.2f}" for part, size in parts if size))
    for phase in ("rollout", "teacher", "gradient", "update", "peak"):
        predicted = {
            "rollout": found.rollout_bytes,
            "teacher": found.teacher_bytes,
            "gradient": found.gradient_bytes,
            "update": found.update_bytes,
            "peak": found.peak_bytes,
        }[phase]
        row = f"  {phase:9} predicted {predicted / unit:8.2f}"
        if phase in measured:
            row += (
                f"  measured {measured[phase]:8.2f}  ratio {predicted / unit / measured[phase]:.3f}"
            )
        print(row)


def published() -> None:
    """The runs on an H100."""
    card = described_device("h100")
    train = {"steps": 2, "prompts_per_step": 16, "micro_batch": 32}
    text = Recipe(
        train=train, rollout={"max_new_tokens": 256, "completions_per_prompt": 2, "batch": 32}
    )
    small = reader("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 139)
    found = estimate(text, small, [small], card, torch.bfloat16)
    show("1.78 B from itself, 16 x 2 x 256, GB", found, {"peak": 73.6})
    print(
        f"  seconds {found.seconds}; measured rollout 7.0, teacher 0.19, student 2.76, update 0.09"
    )
    images = Recipe(
        train={"steps": 2, "prompts_per_step": 8, "micro_batch": 4},
        rollout={"max_new_tokens": 128, "batch": 4},
    )
    student = reader("Qwen/Qwen2.5-VL-3B-Instruct", 397, 1024)
    teacher = reader("xyliu6/NoisyRollout-Geo3K-7B", 397, 1024)
    found = estimate(images, student, [teacher], card, torch.bfloat16, 0.2)
    show("3.75 B from 8.29 B with pictures, mask of 20 %, 8 x 128, GB", found, {"peak": 59.9})
    print(
        f"  seconds {found.seconds}; measured rollout 10.5, teacher 0.60, student 3.65, update 0.64"
    )
    found = estimate(images, student, [teacher], card, torch.bfloat16)
    show("the same, dense (measured: out of memory at 79 GB, in the update), GB", found, {})


def counted(kind: str, density: float, micro: int, compute: str) -> None:
    """The second of two steps of a built-in pair, on the CPU."""
    name = "shapes" if kind == "image" else "shapes-text"
    pair = load_pair(
        f"builtin:{name}-student",
        f"builtin:{name}-teacher",
        compute=compute,  # type: ignore[arg-type]
        device="cpu",
    )
    rendered = pair.render(list(ShapesDataset("train", 8, seed=3, modality=kind)))  # type: ignore[arg-type]
    train = {"steps": 2, "prompts_per_step": 8, "micro_batch": micro}
    recipe = Recipe(train=train, rollout={"max_new_tokens": 8, "batch": micro})
    mask = None
    if density < 1:
        draws = torch.Generator().manual_seed(0)
        named = pair.student.model.named_parameters()
        mask = {n: torch.rand(p.shape, generator=draws) < density for n, p in named}
    models = [pair.student.model, pair.teachers[0].loaded.model]
    trainable = Trainable(pair.student.model, mask)
    optimizer = build_optimizer(recipe.optim, trainable)
    before = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    before |= {slot.values.data_ptr(): slot.values.nbytes for slot in trainable.slots.values()}
    held, peaks = sum(before.values()), {}
    with Allocations() as allocations:
        for step in range(2):
            trainable.zero_grad()
            allocations.peak = allocations.now
            batches = collect(pair, recipe, rendered, range(8), 1, step)
            peaks["rollout"] = (held + allocations.peak) / 1e6
            allocations.peak = allocations.now
            loop.backward(pair, recipe, batches, distributed.accelerator(), Stopwatch())
            peaks["gradient"] = (held + allocations.peak) / 1e6
            allocations.peak = allocations.now
            optimizer.step(1e-4)
            peaks["update"] = (held + allocations.peak) / 1e6
    longest = max(batch.completions.ids.shape[1] for batch in batches)
    prompt = max(batch.prompts.input_ids.shape[1] for batch in batches)
    recipe = Recipe(train=train, rollout={"max_new_tokens": longest, "batch": micro})
    student, teacher = (Reader(model, prompt) for model in models)
    speed = DeviceSpeed(1e12, 1e11, 1 << 40, 1e-5)
    found = estimate(recipe, student, [teacher], speed, pair.student.model.dtype, density)
    show(
        f"built-in {kind} pair, {compute}, density {density}, micro-batch {micro}, MB",
        found,
        peaks,
        1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", action="store_true", help="also count a step of built-in pairs")
    asked = parser.parse_args()
    published()
    if asked.count:
        for compute in ("fp32", "bf16"):
            for kind, density, micro in (("text", 1.0, 8), ("image", 1.0, 8), ("image", 0.2, 4)):
                counted(kind, density, micro, compute)


if __name__ == "__main__":
    main()
