"""Values, gradients and optimizer state in parts: several processes train what one trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import sharded
from tests.sharded import folder_of
from vlopd.config.recipe import Recipe
from vlopd.errors import ConfigError
from vlopd.files import read_jsonl
from vlopd.loop import distill

CASES = [
    f"{kind} {what} {sharding}"
    for kind in ("llm", "vlm")
    for what in ("dense", "mask")
    for sharding in ("state", "full")
]
RESUMED = [f"{case} resumed" for case in CASES]
OTHER = [f"llm {what} full" for what in ("projected", "average", "null")]
OTHER += [f"vlm {what} full" for what in ("recomputed", "own", "engine")]


def launch(models: Path, out: Path, cases: dict[int, list[str]]) -> None:
    words = [f"{n}={','.join(own)}" for n, own in cases.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded", str(models), str(out), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300 + 60 * sum(map(len, cases.values())),
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-9000:]


def weights(out: Path, case: str, n: int) -> dict[str, torch.Tensor]:
    return torch.load(out / f"{case.replace(' ', '-')}-{n}.pt")


def distance(a, b) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5


SOME = {
    2: ["llm mask state", "vlm dense full"],
    4: ["vlm mask full", "vlm dense full resumed"],
}
ALL = {2: CASES + OTHER, 4: CASES + RESUMED}


@pytest.mark.parametrize(
    "cases", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
)
def test_processes_with_parts_train_what_one_trains(cases, folders, tmp_path):
    """On recorded completions, dense and under a mask, with and without pictures, in micro-batches: the losses of 2 and
    4 processes agree with one's to 1e-5 and the updates to 1e-4 of their norm; each has 1/n of the values; frozen
    coordinates keep their bits; a state that 2 saved goes on with 4 and with 1."""
    models = folders["llm", "student"].parent
    out = tmp_path / "out"
    out.mkdir()
    one = {}
    resumed = [case for case in cases[4] if case.endswith("resumed")]
    for case in {*cases[2], *cases[4]} - set(resumed):
        kind, what = case.split()[:2]
        recorded = models.parent / f"recorded-{kind}"
        if not recorded.exists():
            pair, recipe = sharded.pair_of(models, kind), sharded.recipe("none")
            train = recipe.train.model_copy(update={"keep_completions": True})
            recipe = recipe.model_copy(update={"train": train})
            distill(pair, sharded.rows(kind), recipe, recorded, sharded.SEED)
        if (kind, what) not in one:
            one[kind, what] = sharded.train(
                models, folder_of(out, f"{kind} {what}", 1), case, "none"
            )
    launch(models, out, cases)
    for case in resumed:
        whole = case.removesuffix(" resumed")
        shutil.copytree(folder_of(out, whole, 2), folder_of(out, case, 1))
        one[case] = sharded.train(models, folder_of(out, case, 1), case, "none")
    for n, own in cases.items():
        for case in own:
            check(models, out, case, n, one)


def check(models: Path, out: Path, case: str, n: int, one: dict) -> None:
    """The claims of one case with n processes."""
    kind, what, sharding = case.split()[:3]
    alone = one[kind, what]
    base = sharded.pair_of(models, kind).student.model.state_dict()
    expected = alone.student.model.state_dict()
    size = distance(expected, base)
    assert distance(weights(out, case, n), expected) <= 1e-4 * size, (case, n)
    if case.endswith("resumed"):
        assert distance(one[case].student.model.state_dict(), expected) <= 1e-4 * size
    losses = [
        [row["loss"] for row in read_jsonl(each / "metrics.jsonl")]
        for each in (folder_of(out, case, n), folder_of(out, f"{kind} {what}", 1))
    ]
    assert len(losses[0]) == sharded.STEPS and losses[0] == pytest.approx(losses[1], rel=1e-5)
    merged = torch.load(out / f"{case.replace(' ', '-')}-{n}-merged.pt")
    assert distance(merged, weights(out, case, n)) == 0
    if what == "mask":
        marks = sharded.fifth(sharded.pair_of(models, kind))
        for name, marked in marks.items():
            assert torch.equal(merged[name][~marked], base[name][~marked])
    for k in range(n):
        own = json.loads((out / f"{case.replace(' ', '-')}-{n}-{k}.json").read_text())
        assert own["values"] <= own["whole"] * (1 / n + 0.1)
        if sharding == "full":
            assert own["weights"] <= own["all_weights"] * (1 / n + 0.1)
            whole = sum(its.index_bytes for its in alone.trainable.slots.values())
            assert own["indices"] <= whole * (1 / n + 0.1)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(folders, tmp_path):
    """Where a loss fails in one process of sharded weights, none waits for it: that one tells why, the others stop."""
    models = folders["llm", "student"].parent
    with pytest.raises(AssertionError, match="UserError: this loss failed"):
        launch(models, tmp_path, {2: ["llm failing full"]})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optim": {"type": "muon", "learning_rate": 1e-3}}, "muon"),
        ({"optim": {"type": "adamw", "learning_rate": 1e-3, "state_bits": 8}}, "state_bits"),
        ({"train": {"offload_optimizer": True}}, "offload_optimizer"),
        ({"train": {"evidence_every": 1}}, "evidence_every"),
        ({"lora": {"rank": 1}}, "LoRA"),
    ],
)
def test_what_needs_whole_tensors_is_refused(sections, words, make_pair, make_data, tmp_path):
    """Settings that parts cannot serve are refused before training, whatever the number of processes."""
    lora = sections.pop("lora", None)
    train = {"steps": 1, "prompts_per_step": 2, "sharding": "state", **sections.pop("train", {})}
    recipe = Recipe(train=train, **sections)
    with pytest.raises(ConfigError, match=words):
        distill(make_pair("llm"), make_data("llm"), recipe, tmp_path, lora=lora)
