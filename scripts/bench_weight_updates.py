"""Bytes that a sampling copy of the student gets after each step, dense and under a mask, beside the whole model's.

    python scripts/bench_weight_updates.py                       # the built-in text pair, bf16, a minute
    python scripts/bench_weight_updates.py --density 0.2 --rate 1e-5 --steps 20 --pair STUDENT TEACHER

Of a mask: at most 1.2 x density x dense (its coordinates go with the first update). Of a dense arm: index and value of
what changed in the compute precision, which at small rates is little of bf16 weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch

import vlopd
from vlopd.seeding import generator
from vlopd.train.pair import load_pair


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pair = ["builtin:shapes-text-student", "builtin:shapes-text-teacher"]
    parser.add_argument("--pair", nargs=2, default=pair, metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(words)
    student, teacher = given.pair
    data = vlopd.load_data({"type": "shapes", "modality": "text"}, size=16 * given.steps)
    recipe = vlopd.Recipe(
        train={"steps": given.steps, "prompts_per_step": 16},
        optim={"learning_rate": given.rate},
        rollout={"engine": {"type": "vlopd"}},
    )
    print("arm      of the model   bytes a step: median, largest   share of the whole   bound")
    for name in ("dense", "masked"):
        loaded = load_pair(student, teacher, compute="bf16")
        own = None
        if name == "masked":
            draws = generator("cpu", "bench", "mask")
            own = {
                n: torch.rand(p.shape, generator=draws) < given.density
                for n, p in loaded.student.model.named_parameters()
            }
        with TemporaryDirectory() as out:
            done = vlopd.distill(loaded, data, recipe, out, mask=own)
            sent = done.metrics.sent_bytes.dropna()
        whole = sum(parameter.nbytes for parameter in done.student.model.parameters())
        density = done.trainable.count / done.trainable.total
        bound = "" if own is None else f"{1.2 * density:.4f}"
        print(
            f"{name:8} {density:12.4f} {sent.median():17,.0f} {sent.max():14,.0f} "
            f"{sent.max() / whole:17.4f} {bound:>9}"
        )


if __name__ == "__main__":
    main()
