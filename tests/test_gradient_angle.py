"""Angles between gradients of prompts with and without their pictures: gradients, cosines, intervals, correction."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tests.conftest import pair_of, recipe_of
from vlopd.data.shapes import ShapesDataset
from vlopd.train.gradient_angle import (
    COMPARED,
    CORRECTED,
    corrected,
    cosines,
    gradient_of,
    gradients_of_halves,
    interval,
    summary,
    without_pictures,
)
from vlopd.train.rollouts import collect

UP, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def test_cosines_of_known_gradients():
    """By module, component and whole model; what one gradient lacks is zero in it, a group of zeros has no cosine."""
    a = {UP: torch.tensor([3.0, 4.0]), Q: torch.tensor([1.0, 0.0])}
    b = {UP: torch.tensor([4.0, 3.0]), Q: torch.tensor([0.0, 2.0])}
    found = cosines(a, b)
    assert found["language", "up"] == pytest.approx(24 / 25)
    assert found["language", "q"] == 0
    assert found["all", "all"] == found["language", "all"] == pytest.approx(24 / math.sqrt(26 * 29))
    alone = cosines(a, {Q: b[Q]})
    assert ("language", "up") not in alone and alone["all", "all"] == 0


def test_intervals_are_students_over_batches():
    """The interval is scipy's of one sample; a single batch has a mean alone."""
    values = [0.1, 0.3, 0.2, 0.6]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((0.3, low, high))
    assert interval([0.5])[0] == 0.5 and all(map(math.isnan, interval([0.5])[1:]))


@pytest.mark.parametrize("angle", [30, 90])
def test_the_correction_finds_the_angle_behind_the_noise(angle):
    """Two directions at a known angle, seen with noise that makes every raw cosine small: the corrected one is right,
    and the raw one is not; where a kind is noise alone there is none."""
    draws, truth = np.random.default_rng(angle), math.cos(math.radians(angle))
    size = 400
    a, b = np.eye(2, size)
    b = truth * a + math.sqrt(1 - truth**2) * b

    def cosine(x, y):
        x, y = (each + 0.1 * draws.normal(size=size) for each in (x, y))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    columns = [[cosine(*each) for _ in range(200)] for each in ((a, b), (a, a), (b, b))]
    _, low, high = corrected(*columns)
    assert low < truth < high and high - low < 0.4
    assert angle == 90 or interval(columns[0])[2] < truth / 2
    assert corrected([0.0, 0.1], [-0.1, 0.05], [0.5, 0.5]) is None


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_gradients_with_and_without_pictures(kind, make_config):
    """A batch's gradient is that of the mean loss by autograd; without pictures the tower has none, the text's differs,
    and the completions are the same; random signs change it, and are drawn from their stream alone."""
    config = make_config(
        kind, rollout={"max_new_tokens": 3}, train={"steps": 1, "prompts_per_step": 4}
    )
    pair, recipe = pair_of(config), recipe_of(config)
    pair.student.model.requires_grad_(True)
    examples = list(ShapesDataset("train", 4, seed=3))
    assert without_pictures(examples[0]).question == examples[0].question
    assert without_pictures(examples[0]).images == ()
    (batch,) = collect(pair, recipe, pair.render(examples), range(4), 1, 0)
    halves = {"A": batch.take(range(2)), "B": batch.take(range(2, 4))}
    found = gradients_of_halves(pair, recipe, halves, torch.Generator().manual_seed(1))

    half = halves["A"]
    tokens = pair.divergence(recipe.loss, half.examples, half.prompts, half.completions)
    tokens.loss.mean().backward()
    own = {n: p.grad for n, p in pair.student.model.named_parameters() if p.grad is not None}
    assert own.keys() == found["picture", "A"].keys()
    assert all(torch.allclose(own[n], found["picture", "A"][n], atol=1e-5) for n in own)
    assert any("vision" in n for n in own) and not any("vision" in n for n in found["removed", "A"])
    again = gradient_of(pair, recipe, half, torch.Generator().manual_seed(1))
    assert all(torch.equal(again[n], found["signs", "A"][n]) for n in again)
    assert cosines(again, own)["all", "all"] < 0.99

    rows = summary([{kinds: cosines(found[a], found[b]) for kinds, (a, b) in COMPARED.items()}] * 2)
    kinds = {row["gradients"] for row in rows if row["component"] == "vision"}
    assert kinds == {"picture, picture", "signs, signs", "picture, signs"}
    whole = {row["gradients"]: row for row in rows if row["component"] == "all"}
    assert set(COMPARED) <= set(whole) <= {*COMPARED, CORRECTED}
    one = whole["picture, removed"]
    assert one["batches"] == 2 and math.cos(math.radians(one["degrees"])) == pytest.approx(
        one["cosine"]
    )
