"""Angle between the gradients of prompts with and without their pictures, beside its nulls (docs/geometry.md).

    python scripts/gradient_angle.py configs/quickstart.toml --out angles.csv     # two minutes on two cores
    python scripts/gradient_angle.py configs/quickstart.toml --batches 4 loss='{type="forward_kl"}'

The student samples completions of the config's prompts, with their pictures; its gradient of the config's loss on them
is compared with that on the same completions after the prompts without the pictures. For every component and module
the mean cosine over batches with a 95 % interval: of two halves of one kind (what sampling noise alone gives), of one
half with pictures and the other without, of visual grounding (with minus without) and without, and of losses whose
tokens have random signs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from vlopd import seeding
from vlopd.config.arms import DistillArm
from vlopd.config.input import load_config
from vlopd.data.load import load_data, pick
from vlopd.errors import ConfigError
from vlopd.train.gradient_angle import COMPARED, cosines, gradients_of_halves, summary
from vlopd.train.pair import load_pair
from vlopd.train.rollouts import collect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings, as of `vlopd run`")
    parser.add_argument(
        "--student", help="another checkpoint of the student, such as runs/x/arms/full/checkpoint"
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of each half of a batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the table as CSV")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if not config.data.has_images:
        raise ConfigError(f"{args.config}: its prompts have no pictures; give data with images")
    table = measure(config, args)
    whole = table[table.module == "all"]
    print(whole.drop(columns="module").to_string(index=False, float_format="%.3f"))
    if args.out is not None:
        table.to_csv(args.out, index=False)


def measure(config, args: argparse.Namespace) -> pd.DataFrame:
    """The table of angles: a row for each component, module and pair of gradients."""
    student = config.student
    if args.student is not None:
        student = student.model_copy(update={"model": args.student})
    pair = load_pair(student, config.teacher, compute="fp32", device=args.device, images=True)
    pair.student.model.requires_grad_(True)
    # one micro-batch a batch, which is then halved
    size = {"prompts_per_step": 2 * args.prompts, "micro_batch": None, "micro_tokens": None}
    recipe = config.recipe_of(DistillArm(train=size))
    prompts, n = 2 * args.prompts, recipe.rollout.completions_per_prompt
    data = load_data(config.data, prompts * args.batches, args.seed, config.teachers.values())
    found = []
    for step in range(args.batches):
        rendered = pair.render(pick(data, step * prompts, prompts, args.seed))
        (batch,) = collect(pair, recipe, rendered, range(prompts), args.seed, step)
        half = args.prompts * n
        halves = {"A": batch.take(range(half)), "B": batch.take(range(half, 2 * half))}
        signs = seeding.generator("cpu", "signs", args.seed, step)
        gradients = gradients_of_halves(pair, recipe, halves, signs)
        found.append(
            {kinds: cosines(gradients[a], gradients[b]) for kinds, (a, b) in COMPARED.items()}
        )
    return pd.DataFrame(summary(found))


if __name__ == "__main__":
    main()
