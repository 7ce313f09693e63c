"""The loop: what a step computes does not depend on how it is split, and a killed run goes on as if it had not been."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from evals.harness import held_out_scores
from vlopd import processes
from vlopd.checkpoint import RunError
from vlopd.config import ConfigError, DistillArm
from vlopd.data import open_data, pick
from vlopd.distill import Stopwatch, TrainingError, backward, distill
from vlopd.models.atlas import classify
from vlopd.sources import collect
from vlopd.trainable import Trainable

ARM = DistillArm(seed=1)


def run(pair, config, folder, mask=None, identity="x"):
    size = config.train.steps * config.train.prompts_per_step
    data = open_data(config, size, ARM.seed)
    return distill(pair, data, config, ARM, folder, "test", mask, identity)


def weights(pair):
    return {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


GRADED = [
    {"loss": {"type": "reverse_kl"}, "rollout": {"max_new_tokens": 6, "source": "data"}},
    {
        "loss": {"type": "forward_kl", "normalisation": "sequence_mean"},
        "rollout": {"max_new_tokens": 6, "source": "data"},
    },
    {"loss": {"type": "k1", "normalisation": "fixed_length"}},
    {
        "loss": {"type": "k1"},
        "reward": {"rule": "answer_named", "alpha": 0.5},
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
    },
]


@pytest.mark.parametrize("sections", GRADED, ids=["token", "sequence", "length", "reward"])
@pytest.mark.parametrize(("activations", "bound"), [("float64", 3e-7), ("fp32", 2e-6)])
def test_splitting_or_permuting_a_step_changes_no_gradient(
    kind, sections, activations, bound, make_pair, make_config
):
    """In 1, 2, 4 or 8 micro-batches, or in another order, the fp32 gradient differs by rounding alone.

    By 3e-7 of its norm where the models compute in float64, so that nothing else is rounded, and by at most
    1e-6 in fp32 where this was written; other processors add up in other orders, so the test allows twice that.
    (Of the whole gradient's norm: that of an attention's key bias is zero but for rounding.)
    """

    def fresh():
        pair = make_pair(kind, **sections, train=train)
        if activations == "float64":
            for model in (pair.student.model, pair.teachers[0].loaded.model):
                model.double()
        return pair

    def gradient(pair, batches):
        trainable = Trainable(pair.student.model)
        backward(pair, config, batches, processes.accelerator(), Stopwatch())
        found = [v.grad.flatten() for v in trainable.parameters() if v.grad is not None]
        return torch.cat(found).double()

    found = []
    for size in (8, 4, 2, 1):
        train = {"steps": 1, "prompts_per_step": 4, "micro_batch": size}
        if "reward" not in sections:
            train["prompts_per_step"] = 8
        config = make_config(kind, **sections, train=train)
        pair = fresh()
        n = train["prompts_per_step"]
        examples = pick(open_data(config, 8, 1), 0, n, 1)
        batches = collect(pair, config, examples, range(n), 1, 0)
        assert len(batches) == 8 // size
        found.append(gradient(pair, batches))
        if size == 8:
            (whole,) = batches
            lengths = whole.completions.mask.sum(1)
            order = [3, 1, 0, 7, 6, 2, 5, 4]
            asked = [whole.examples[i] for i in order]
            other = fresh()
            permuted = replace(
                whole,
                examples=asked,
                prompts=other.student.render(asked),
                completions=whole.completions.take(order),
                advantages=None if whole.advantages is None else whole.advantages[order],
            )
            found.append(gradient(other, [permuted]))
    if config.rollout.source.type == "data":
        assert len(lengths.unique()) > 1  # so that a wrong denominator shows
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < bound


@pytest.mark.parametrize(
    ("how", "optimizer"),
    [
        ("dense", {"type": "adamw"}),
        ("masked", {"type": "adamw"}),
        ("mostly unmasked", {"type": "adamw", "weight_decay": 0.1}),
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
    density = {"masked": 0.2, "mostly unmasked": 0.95}.get(how)
    if density is not None:  # the one is kept in compact storage, the other in dense
        draws = torch.Generator().manual_seed(0)
        mask = {
            n: torch.rand(p.shape, generator=draws) < density
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
        train={"steps": 130, "prompts_per_step": 4},
    )
    pair = make_pair(kind)
    data = open_data(config, 4, 5)
    distill(pair, data, config, ARM, tmp_path, "test")
    kl = [row["kl"] for row in metrics(tmp_path)]
    assert sum(kl[-10:]) / 10 < 0.4 * kl[0]


@pytest.mark.parametrize("what", ["weights", "one example", "gradient"])
def test_what_is_not_finite_stops_the_run(what, make_pair, make_config, tmp_path):
    """NaN weights, an infinite loss of one example, or a NaN gradient alone end in one line with the step and
    the examples; the batch is saved, and the last good state intact and gone on from."""
    config = make_config("llm", train={"steps": 4, "prompts_per_step": 3, "save_every": 1})
    pair = make_pair("llm")
    good = make_config("llm", train={"steps": 2, "prompts_per_step": 3, "save_every": 1})
    run(pair, good, tmp_path)
    state = (tmp_path / "state" / "state.safetensors").read_bytes()

    broken = make_pair("llm")
    if what == "weights":
        names, message = 3, "not finite are the tokens of shapes-train-1-"
        head = broken.teachers[0].loaded.model.get_output_embeddings()
        head.weight.data.fill_(float("nan"))
    elif what == "one example":
        names, message = 1, "not finite are the tokens of shapes-train-1-"
        original, calls = broken.teachers[0].loaded.model.get_output_embeddings(), []

        def ban(module, inputs, output):
            calls.append(1)
            output[0] = float("-inf")  # the first token of the first example

        original.register_forward_hook(ban)
    else:
        names, message = 0, "no example among shapes-train-1-.* gradient alone"
        parameter = next(broken.student.model.parameters())
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=rf"at step 2 .*{message}"):
        run(broken, config, tmp_path)
    assert (tmp_path / "state" / "state.safetensors").read_bytes() == state
    saved = tmp_path / "not-finite" / "process-0"
    about = json.loads((saved / "examples.json").read_text())
    assert (about["step"], len(about["not_finite"]), len(about["examples"])) == (2, names, 3)
    tensors = load_file(saved / "batch-0.safetensors")
    assert tensors["ids"].shape[0] == 3
    assert bool(tensors["loss"].isfinite().all()) == (what == "gradient")
    assert len(metrics(tmp_path)) == 2


def test_looking_at_held_out_questions_changes_nothing(kind, make_pair, make_config, tmp_path):
    """With held-out scores and optimizer evidence on the way, weights and metrics are the same bits; scores are
    of the source, every second step and the last, by the code of the final evaluation."""
    task = "shapes_validation" if kind == "vlm" else "shapes_text_validation"
    train = {"steps": 3, "prompts_per_step": 3}
    ends = []
    for looks in (False, True):
        during = {"every": 2, "tasks": [task], "limit": 5}
        config = make_config(
            kind,
            train={**train, "evidence_every": 2 if looks else None},
            eval={"during": during if looks else None},
        )
        pair, folder = make_pair(kind), tmp_path / str(looks)
        data = open_data(config, 9, 1)
        evaluate = held_out_scores(config) if looks else None
        distill(pair, data, config, ARM, folder, "test", evaluate=evaluate)
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in metrics(folder)]
        ends.append((weights(pair), rows))
    (before, a), (after, b) = ends
    assert a == b
    assert all(torch.equal(before[n], after[n]) for n in before)
    scored = [json.loads(x) for x in (folder / "heldout.jsonl").read_text().splitlines()]
    assert [(row["step"], row["task"]) for row in scored] == [(0, task), (2, task), (3, task)]
    (final,) = evaluate(pair.student).values()
    assert {k: scored[-1][k] for k in final} == final
    evidence = [json.loads(x) for x in (folder / "optimizer.jsonl").read_text().splitlines()]
    assert {row["step"] for row in evidence} == {0, 2}


def test_updates_on_the_same_completions(kind, make_pair, make_config, tmp_path):
    """Two updates a rollout are two optimizer steps on the same completions: on one step's worth of data, with
    SGD, they move the weights as two steps on these completions by hand."""
    sections = {
        "loss": {"type": "k1"},
        "optim": {"type": "sgd", "learning_rate": 0.05, "momentum": 0.0, "max_grad_norm": None},
        "train": {"steps": 1, "prompts_per_step": 4, "updates_per_rollout": 2},
    }
    config, pair = make_config(kind, **sections), make_pair(kind, **sections)
    run(pair, config, tmp_path)
    other = make_pair(kind, **sections)
    trainable = Trainable(other.student.model)
    examples = pick(open_data(config, 4, ARM.seed), 0, 4, ARM.seed)
    batches = collect(other, config, examples, range(4), ARM.seed, 0)
    losses = []
    for _ in range(2):
        trainable.zero_grad()
        losses.append(backward(other, config, batches, processes.accelerator(), Stopwatch())[0])
        for value in trainable.parameters():
            if value.grad is not None:
                value.data -= 0.05 * value.grad
        trainable.write_back()
    assert losses[0] == pytest.approx(metrics(tmp_path)[0]["loss"])
    assert losses[1] < losses[0]
    expected = weights(other)
    for name, got in weights(pair).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-6, atol=1e-7)


def test_curves_go_to_tensorboard(make_pair, make_config, tmp_path):
    """With tracking.trackers the numbers of metrics.jsonl are in the tracker's own files; an absent one is named."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("llm", tracking={"trackers": ["tensorboard"]})
    run(make_pair("llm"), config, tmp_path)
    (folder,) = (tmp_path / "trackers").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    told = [round(event.value, 5) for event in events.Scalars("kl")]
    assert told == [pytest.approx(row["kl"], rel=1e-4) for row in metrics(tmp_path)]
    with pytest.raises(ConfigError, match="names 'wandb', which is not installed: pip install"):
        run(
            make_pair("llm"),
            make_config("llm", tracking={"trackers": ["wandb"]}),
            tmp_path / "other",
        )


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
