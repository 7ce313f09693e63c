"""The loop: what a step computes does not depend on how it is split, and a killed run goes on as if it had not been."""

import json

import pytest
import torch

from vlopd.checkpoint import RunError
from vlopd.config import ConfigError, DistillArm
from vlopd.data import open_data, pick
from vlopd.distill import TrainingError, distill
from vlopd.models.atlas import classify

ARM = DistillArm(seed=1)


def run(pair, config, folder, mask=None, identity="x"):
    size = config.train.steps * config.train.prompts_per_step
    data = open_data(config, size, ARM.seed)
    return distill(pair, data, config, ARM, folder, "test", mask, identity)


def weights(pair):
    return {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_do_not_change_the_step(kind, make_pair, make_config, tmp_path):
    """One step split into 1, 2 or 4 micro-batches has the same loss and gradient norm, for the same samples."""
    rows = []
    for micro_batch in (4, 2, 1):
        config = make_config(
            kind, train={"steps": 1, "prompts_per_step": 4, "micro_batch": micro_batch}
        )
        # one end token everywhere would hide a wrong denominator: greedy rollouts, so that all splits sample alike
        config = config.model_copy(
            update={"rollout": config.rollout.model_copy(update={"temperature": 1e-6})}
        )
        folder = tmp_path / str(micro_batch)
        run(make_pair(kind), config, folder)
        rows.append(metrics(folder)[0])
    for row in rows[1:]:
        assert row["completion_tokens"] == rows[0]["completion_tokens"]
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("how", "optimizer"),
    [
        ("dense", {"type": "adamw"}),
        ("masked", {"type": "adamw"}),
        ("averaged teacher", {"type": "adamw"}),
        ("masked", {"type": "sgd", "nesterov": True}),
        ("masked", {"type": "rmsprop", "momentum": 0.5}),
        ("masked", {"type": "lion", "component_rates": {"language": 3.0}}),
        ("dense", {"type": "muon", "component_rates": {"language": 3.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_a_resumed_run_is_bit_exact(kind, how, optimizer, make_pair, make_config, tmp_path):
    """Killed after step 4 of 6 and gone on with, a run ends with the uninterrupted run's bits and metrics,
    under every optimizer, also where the teacher is a moving average of the student."""
    sections = {
        "train": {"steps": 6, "prompts_per_step": 3, "save_every": 2, "sample_every": 2},
        "optim": {"learning_rate": 1e-3, "schedule": "linear", **optimizer},
    }
    if how == "averaged teacher":
        context = {"type": "template", "template": "{{ answer }} {{ question }}"}
        sections["teacher"] = {"model": "student", "ema": 0.5, "context": context}
    config = make_config(kind, **sections)

    def fresh():
        return make_pair(kind, **sections)

    whole = fresh()
    mask = None
    if how == "masked":
        draws = torch.Generator().manual_seed(0)
        mask = {
            n: torch.rand(p.shape, generator=draws) < 0.2
            for n, p in whole.student.model.named_parameters()
        }
    run(whole, config, tmp_path / "whole", mask)

    class Killed(Exception):
        pass

    import vlopd.distill as module

    original, calls = module.save_state, []

    def kill_after_second(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    module.save_state = kill_after_second
    try:
        with pytest.raises(Killed):
            run(fresh(), config, tmp_path / "cut", mask)
    finally:
        module.save_state = original
    resumed = fresh()
    run(resumed, config, tmp_path / "cut", mask)
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {
            k: v for k, v in b.items() if "second" not in k
        }


def test_an_averaged_teacher_follows_the_student(kind, make_pair, make_config, tmp_path):
    """After two steps the teacher's trained coordinates are d^2 w0 + d (1 - d) w1 + (1 - d) w2; a fixed one stays."""
    context = {"type": "template", "template": "{{ answer }} {{ question }}"}
    after = {}
    for steps in (1, 2):  # the same examples in the same order
        sections = {
            "train": {"steps": steps, "prompts_per_step": 2},
            "teacher": {"model": "student", "ema": 0.9, "context": context},
        }
        pair, config = make_pair(kind, **sections), make_config(kind, **sections)
        start = weights(pair)
        distill(pair, open_data(config, 4, 1), config, ARM, tmp_path / str(steps), "test")
        after[steps] = weights(pair)
    teacher = dict(pair.teachers[0].loaded.model.named_parameters())
    assert any(not torch.equal(start[n], after[1][n]) for n in start)
    for name, got in teacher.items():
        expected = 0.81 * start[name] + 0.09 * after[1][name] + 0.1 * after[2][name]
        torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=1e-6)
    fixed = make_pair(kind, teacher={"model": "student", "context": context})
    run(fixed, make_config(kind), tmp_path / "fixed")
    for name, got in fixed.teachers[0].loaded.model.named_parameters():
        assert torch.equal(got, start[name])


def test_frozen_components_do_not_move(make_pair, make_config, tmp_path):
    """`train.freeze` leaves the named components' weights as they were, and the others train."""
    config = make_config(
        "vlm", train={"steps": 2, "prompts_per_step": 2, "freeze": ["vision", "embedding"]}
    )
    pair = make_pair("vlm")
    before = weights(pair)
    run(pair, config, tmp_path)
    moved = {n for n, after in weights(pair).items() if not torch.equal(before[n], after)}
    components = {classify(name).component for name in moved}
    assert components == {"projector", "language", "head"}
    with pytest.raises(ConfigError, match=r"freeze 'vision'.*language"):
        run(make_pair("llm"), config, tmp_path / "llm")


def test_damaged_or_foreign_state_is_refused(make_pair, make_config, tmp_path):
    """A truncated state, or one of another configuration, raises one line that names the file."""
    config = make_config("llm", train={"steps": 2, "prompts_per_step": 2, "save_every": 1})
    run(make_pair("llm"), config, tmp_path)
    with pytest.raises(RunError, match="another configuration"):
        run(make_pair("llm"), config, tmp_path, identity="y")
    path = tmp_path / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
        run(make_pair("llm"), config, tmp_path)


def test_kl_goes_down_on_one_batch(kind, make_pair, make_config, tmp_path):
    """Enough steps on the same few prompts bring the KL to the teacher below 40 % of its start."""
    config = make_config(
        kind,
        optim={"learning_rate": 1e-2, "schedule": "linear"},
        train={"steps": 150, "prompts_per_step": 4},
    )
    pair = make_pair(kind)
    data = open_data(config, 4, 5)
    distill(pair, data, config, ARM, tmp_path, "test")
    kl = [row["kl"] for row in metrics(tmp_path)]
    assert sum(kl[-10:]) / 10 < 0.4 * kl[0]


def test_loss_that_is_not_finite_stops_the_run(make_pair, make_config, tmp_path):
    """NaN weights end in one line with the step and the examples, before anything is saved."""
    pair = make_pair("llm")
    with torch.no_grad():
        next(pair.student.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0"):
        run(pair, make_config("llm"), tmp_path)
    assert not (tmp_path / "state").exists()


def test_samples_hold_both_models_logprobs(kind, make_pair, make_config, tmp_path):
    """samples.jsonl has as many log-probs as tokens, and a picture where the example has one."""
    run(make_pair(kind), make_config(kind), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 2}
    for row in rows:
        assert (
            len(row["tokens"]) == len(row["student_logprobs"]) == len(row["teacher_logprobs"]) > 0
        )
        assert (kind == "vlm") == bool(row["image"] and (tmp_path / row["image"]).exists())


def test_every_epoch_sees_every_example_once():
    """The endless stream is a permutation an epoch, another each epoch, and any part of it can be asked for."""
    data = list(range(10))
    stream = pick(data, 0, 30, seed=0)
    assert all(sorted(stream[i : i + 10]) == data for i in (0, 10, 20))
    assert stream[:10] != stream[10:20]
    assert pick(data, 7, 9, seed=0) == stream[7:16]
