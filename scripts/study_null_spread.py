"""How much one signal null tells: random-sign trainings of the built-in pair beside one of OPD (docs/geometry.md).

    python scripts/study_null_spread.py                # 5 runs: a minute and a half on one core
    python scripts/study_null_spread.py --runs 30      # the numbers of docs/geometry.md: six minutes

Each run is 40 steps of 24 prompts on the built-in vision-language pair. Prints the cosine of the on-policy `rademacher`
runs with an OPD run of another seed, the change of KL to the teacher from the first five steps to the last, and the
fraction of the energy of the first step's token gradients that is along their mean.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vlopd import Recipe, distill, load_data, load_pair
from vlopd.data.load import pick
from vlopd.progress import progress
from vlopd.train.pair import ModelPair
from vlopd.train.rollouts import collect

STUDENT, TEACHER = (
    {"model": f"builtin:shapes-{side}", "attention": "eager"} for side in ("student", "teacher")
)
OPD_SEED = 101
"""Not among those of the nulls, 1, 2, ...: other prompts, other samples."""
RECIPE = Recipe(
    rollout={"max_new_tokens": 14, "temperature": 1.0},
    optim={
        "type": "adamw", "learning_rate": 3e-4, "betas": [0.9, 0.98], "weight_decay": 0.0, "max_grad_norm": 1.0,
        "warmup_steps": 5, "schedule": "linear",
    },
    train={"steps": 40, "prompts_per_step": 24},
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="random-sign runs, with seeds 1, 2, ..."
    )
    args = parser.parse_args()
    data = load_data("shapes")
    opd, _ = update(data, OPD_SEED, None)
    found = []
    for seed in progress(range(1, args.runs + 1), title="random signs", unit="run"):
        delta, kl = update(data, seed, "rademacher")
        found.append((float(delta @ opd / (delta.norm() * opd.norm())), kl))
    cosines, changes = np.array(found).T
    describe("cosine with OPD", cosines)
    describe("change of KL, nats", changes)
    print(f"energy of token gradients along their mean: {energy_along_mean(data):.1%}")


def update(data, seed: int, null: str | None) -> tuple[Tensor, float]:
    """The change of all weights in one vector, and the change of KL to the teacher in nats."""
    pair = load_pair(STUDENT, TEACHER)
    before = weights_of(pair)
    kl = distill(pair, data, RECIPE, seed=seed, null=null).metrics.kl
    return weights_of(pair) - before, kl[-5:].mean() - kl[:5].mean()


def weights_of(pair: ModelPair) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in pair.student.model.parameters()])


def describe(name: str, values: np.ndarray) -> None:
    print(
        f"{name}: n {len(values)}, mean {values.mean():.3f} ± {stats.sem(values):.3f}, sd {values.std(ddof=1):.3f}, "
        f"from {values.min():.2f} to {values.max():.2f}, {(values > 0).sum()} positive"
    )


def energy_along_mean(data) -> float:
    """Of the gradients g of the first step's token losses, sum (g . u)^2 / sum |g|^2 with u their mean's direction."""
    pair = load_pair(STUDENT, TEACHER)
    pair.student.model.requires_grad_(True)
    prompts = RECIPE.train.prompts_per_step
    rendered = pair.render(pick(data, 0, prompts, OPD_SEED))
    (batch,) = collect(pair, RECIPE, rendered, range(prompts), OPD_SEED, 0)
    loss = pair.divergence(RECIPE.loss, batch.examples, batch.prompts, batch.completions).loss
    weights = [p for p in pair.student.model.parameters() if p.requires_grad]

    def gradient(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
        return torch.cat([its.flatten() for its in found])

    direction = torch.nn.functional.normalize(gradient(loss.sum()), dim=0)
    along = whole = 0.0
    for value in loss:
        its = gradient(value)
        along += float(its @ direction) ** 2
        whole += float(its @ its)
    return along / whole


if __name__ == "__main__":
    main()
