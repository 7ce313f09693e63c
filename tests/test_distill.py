"""The loop: what a step computes does not depend on how it is split, and a killed run goes on as if it had not been."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evals.harness import held_out_scores
from tests.conftest import recipe_of
from vlopd import distributed
from vlopd.config.tracking import TrackingConfig
from vlopd.data.load import load_data, pick
from vlopd.errors import ConfigError, RunError
from vlopd.loop import Hooks, backward, distill
from vlopd.models.parameter_names import classify
from vlopd.train import log as training_log
from vlopd.train.checks import TrainingError, refuse_overflow
from vlopd.train.log import Stopwatch, TrainingLog, open_trackers
from vlopd.train.optimizers import build_optimizer
from vlopd.train.rollouts import collect
from vlopd.train.sparse import Trainable
from vlopd.types import Example

SEED = 1


def run(pair, config, folder, mask=None, identity="x", lora=None, **hooks):
    recipe = recipe_of(config)
    data = load_data(recipe.data, recipe.prompts, SEED)
    more = {"identity": identity, "title": "test", "lora": lora}
    return distill(pair, data, recipe, folder, SEED, mask, Hooks(**hooks), **more)


def weights(pair):
    return {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


GRADED = {
    "token": {"loss": {"type": "reverse_kl"}, "rollout": {"max_new_tokens": 6, "source": "data"}},
    "sequence": {
        "loss": {"type": "forward_kl", "normalisation": "sequence_mean"},
        "rollout": {"max_new_tokens": 6, "source": "data"},
    },
    "length": {"loss": {"type": "k1", "normalisation": "fixed_length"}},
    "reward": {
        "loss": {"type": "k1"},
        "reward": {"rule": "answer_named", "alpha": 0.5},
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
    },
    "chosen": {
        "loss": {"type": "jsd", "tokens": {"by": "student_entropy", "fraction": 0.4}},
        "rollout": {"max_new_tokens": 6, "source": "data"},
    },
}


@pytest.mark.parametrize(
    ("sections", "activations", "bound"),
    [(GRADED["token"], "fp32", 2e-6), *((its, "float64", 3e-7) for its in GRADED.values())],
    ids=["token in fp32", *GRADED],
)
def test_splitting_or_permuting_a_step_changes_no_gradient(
    kind, sections, activations, bound, make_pair, make_config
):
    """In one, a few or 8 micro-batches, or in another order, the fp32 gradient differs by rounding alone.

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
        backward(pair, recipe_of(config), batches, distributed.accelerator(), Stopwatch())
        found = [v.grad.flatten() for v in trainable.parameters() if v.grad is not None]
        return torch.cat(found).double()

    found = []
    for how, count in (({}, 1), ({"micro_tokens": 80}, None), ({"micro_batch": 1}, 8)):
        train = {"steps": 1, "prompts_per_step": 4, **how}
        if "reward" not in sections:
            train["prompts_per_step"] = 8
        config = make_config(kind, **sections, train=train)
        pair = fresh()
        n = train["prompts_per_step"]
        examples = pick(load_data(config.data, 8, 1), 0, n, 1)
        batches = collect(pair, recipe_of(config), pair.render(examples), range(n), 1, 0)
        assert len(batches) == count if count else 1 < len(batches) < 8
        found.append(gradient(pair, batches))
        if not how:
            (whole,) = batches
            lengths = whole.completions.mask.sum(1)
            order = [3, 1, 0, 7, 6, 2, 5, 4]
            other = fresh()
            permuted = replace(
                whole,
                rendered=[whole.rendered[i] for i in order],
                completions=whole.completions.take(order),
                advantages=None if whole.advantages is None else whole.advantages[order],
            )
            found.append(gradient(other, [permuted]))
    if config.rollout.source.type == "data":
        assert len(lengths.unique()) > 1  # so that a wrong denominator shows
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < bound


RESUMED: list[tuple[str, dict]] = [
    ("dense", {"type": "adamw"}),
    ("masked", {"type": "adamw"}),
    ("lora", {"type": "adamw"}),
    ("mostly unmasked", {"type": "adamw", "weight_decay": 0.1}),
    ("averaged teacher", {"type": "adamw"}),
    ("rounded", {"type": "adamw", "state_bits": 8}),
    ("masked", {"type": "sgd", "nesterov": True}),
    ("masked", {"type": "rmsprop", "momentum": 0.5}),
    ("masked", {"type": "lion", "component_rates": {"language": 3.0}}),
    ("dense", {"type": "muon", "component_rates": {"language": 3.0}}),
]


@pytest.mark.parametrize(
    ("kind", "how", "optimizer"),
    [
        pytest.param(kind, *its, marks=pytest.mark.slow if kind == "vlm" and k >= 3 else ())
        for kind in ("llm", "vlm")
        for k, its in enumerate(RESUMED)
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_a_resumed_run_is_bit_exact(kind, how, optimizer, make_pair, make_config, tmp_path):
    """Killed after step 2 of 3 and gone on with, a run ends with the uninterrupted run's bits and metrics,
    under every optimizer, also where the teacher is a moving average of the student, a LoRA trains, or values are
    rounded at random and moments stored in 8 bits."""
    lora = {"rank": 2} if how == "lora" else None
    sections = {
        "train": {"steps": 3, "prompts_per_step": 3, "save_every": 1, "sample_every": 2},
        "optim": {"learning_rate": 1e-3, "schedule": "linear", **optimizer},
    }
    if how == "averaged teacher":
        context = {"type": "template", "template": "{{ answer }} {{ question }}"}
        sections["teacher"] = {"model": "student", "ema": 0.5, "context": context}
    if how == "rounded":
        sections["train"]["master"] = "bf16_stochastic"
    config = make_config(kind, **sections)

    def fresh():
        return make_pair(kind, **sections)

    whole = fresh()
    mask = None
    density = {"masked": 0.2, "rounded": 0.2, "mostly unmasked": 0.95}.get(how)
    if density is not None:  # the one is kept in compact storage, the other in dense
        draws = torch.Generator().manual_seed(0)
        mask = {
            n: torch.rand(p.shape, generator=draws) < density
            for n, p in whole.student.model.named_parameters()
        }
    run(whole, config, tmp_path / "whole", mask, lora=lora)

    class Killed(Exception):
        pass

    import vlopd.loop as module

    original, calls = module.save_state, []

    def kill_after_second(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    module.save_state = kill_after_second
    try:
        with pytest.raises(Killed):
            run(fresh(), config, tmp_path / "cut", mask, lora=lora)
    finally:
        module.save_state = original
    resumed = fresh()
    run(resumed, config, tmp_path / "cut", mask, lora=lora)
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {
            k: v for k, v in b.items() if "second" not in k
        }


@pytest.mark.parametrize("updates", [1, 2])
def test_an_averaged_teacher_follows_the_student(updates, kind, make_pair, make_config, tmp_path):
    """After two steps the teacher's trained coordinates are d^2 w0 + d (1 - d) w1 + (1 - d) w2, however many
    updates a step makes; a fixed one stays."""
    context = {"type": "template", "template": "{{ answer }} {{ question }}"}
    after = {}
    for steps in (1, 2):  # the same examples in the same order
        sections = {
            "train": {"steps": steps, "prompts_per_step": 2, "updates_per_rollout": updates},
            "teacher": {"model": "student", "ema": 0.9, "context": context},
        }
        pair, config = make_pair(kind, **sections), make_config(kind, **sections)
        start = weights(pair)
        distill(pair, load_data(config.data, 4, 1), recipe_of(config), tmp_path / str(steps), SEED)
        after[steps] = weights(pair)
    teacher = dict(pair.teachers[0].loaded.model.named_parameters())
    assert any(not torch.equal(start[n], after[1][n]) for n in start)
    for name, got in teacher.items():
        expected = 0.81 * start[name] + 0.09 * after[1][name] + 0.1 * after[2][name]
        torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=1e-6)
    teacher_of_start = {"model": "student", "context": context}
    fixed = make_pair(kind, teacher=teacher_of_start)
    run(fixed, make_config(kind, teacher=teacher_of_start), tmp_path / "fixed")
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


def test_an_arm_that_nothing_trains_is_refused(make_pair, make_config, tmp_path):
    """Where the tower alone trains and no row has a picture, the arm would be the base: refused, with the cause."""
    freeze = ["projector", "language", "embedding", "head"]
    config = make_config("vlm", train={"steps": 2, "prompts_per_step": 2, "freeze": freeze})
    rows = [
        replace(Example.ask(e.id, e.question, answer=e.answer), fields=e.fields)
        for e in load_data(config.data, 4, 1)
    ]
    with pytest.raises(
        TrainingError, match=r"in 2 steps no trained parameter got a gradient.*vision"
    ):
        distill(make_pair("vlm"), rows, recipe_of(config), tmp_path, SEED)


def test_a_foreign_state_is_ignored_and_a_damaged_one_refused(
    make_pair, make_config, tmp_path, capsys
):
    """A state of another identity is not resumed, with a warning, nor is any without an identity; a truncated one is
    an error."""
    config = make_config("llm", train={"steps": 2, "prompts_per_step": 2, "save_every": 1})
    run(make_pair("llm"), config, tmp_path)
    run(make_pair("llm"), config, tmp_path, identity="y")
    assert "made from other inputs" in capsys.readouterr().err
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1]
    path = tmp_path / "state" / "state.safetensors"
    saved = path.read_bytes()
    run(make_pair("llm"), config, tmp_path, identity=None)
    assert len(metrics(tmp_path)) == 2 and path.read_bytes() == saved
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
        run(make_pair("llm"), config, tmp_path, identity="y")


def test_kl_goes_down_on_one_batch(kind, make_pair, make_config, tmp_path):
    """Eighty steps on the same few prompts bring the KL to the teacher below half of its start."""
    config = make_config(
        kind,
        optim={"learning_rate": 2e-2, "schedule": "linear"},
        train={"steps": 80, "prompts_per_step": 4},
    )
    pair = make_pair(kind)
    data = load_data(config.data, 4, 5)
    distill(pair, data, recipe_of(config), tmp_path, SEED)
    kl = [row["kl"] for row in metrics(tmp_path)]
    assert sum(kl[-10:]) / 10 < 0.5 * kl[0]


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
    of the base, every second step and the last, by the code of the final evaluation."""
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
        data = load_data(config.data, 9, 1)
        evaluate = held_out_scores(config) if looks else None
        hooks = Hooks(evaluate=evaluate, evaluate_every=2)
        distill(pair, data, recipe_of(config), folder, SEED, hooks=hooks)
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
    examples = pick(load_data(config.data, 4, SEED), 0, 4, SEED)
    batches = collect(other, recipe_of(config), other.render(examples), range(4), SEED, 0)
    losses = []
    for _ in range(2):
        trainable.zero_grad()
        losses.append(
            backward(other, recipe_of(config), batches, distributed.accelerator(), Stopwatch())[0]
        )
        for value in trainable.parameters():
            if value.grad is not None:
                value.data -= 0.05 * value.grad
        trainable.write_back()
    assert losses[0] == pytest.approx(metrics(tmp_path)[0]["loss"])
    assert losses[1] < losses[0]
    expected = weights(other)
    for name, got in weights(pair).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-6, atol=1e-7)


TEMPLATE = {"type": "template", "template": "{{ answer }} {{ question }}"}


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [
        ("llm", "fixed"),
        ("vlm", "fixed"),
        ("llm", "averaged"),
        ("vlm", "averaged"),
        ("vlm", "mixed"),
        ("llm", "routed"),
    ],
)
def test_teachers_grade_a_rollout_once(
    teacher, kind, make_pair, make_config, folders, tmp_path, monkeypatch
):
    """Of 2 steps in 2 micro-batches with 3 updates each, teachers read the completions 4 times, not 12; the updates
    move the weights by the bits that grading each time anew would."""
    own = str(folders[kind, "teacher"])
    sections = {
        "train": {
            "steps": 2,
            "prompts_per_step": 3,
            "updates_per_rollout": 3,
            "micro_batch": 2,
        },
        "optim": {"learning_rate": 1e-2, "schedule": "linear", "warmup_steps": 1},
        "teacher": {
            "fixed": own,
            "averaged": {"model": "student", "ema": 0.5, "context": TEMPLATE},
            "mixed": {"type": "mixed", "teachers": {"a": own, "b": own}},
            "routed": {"type": "routed", "field": "kind", "teachers": {"count": own, "where": own}},
        }[teacher],
    }
    if teacher == "routed":
        config = make_config(kind, **sections)
        names = {str(e.fields["kind"]) for e in pick(load_data(config.data, 6, 1), 0, 6, 1)}
        sections["teacher"]["teachers"] = dict.fromkeys(sorted(names), own)
    config = make_config(kind, **sections)
    ends, reads = [], []
    for anew in (False, True):
        pair = make_pair(kind, **sections)
        calls = []
        for each in pair.teachers:
            body = each.loaded.model.model
            body.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(1))
        if anew:
            monkeypatch.setattr("vlopd.loop.backward", lambda *arguments: backward(*arguments[:5]))
        run(pair, config, tmp_path / str(anew))
        ends.append(weights(pair))
        reads.append(len(calls))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert reads[1] == 3 * reads[0]
    if teacher in ("fixed", "averaged"):
        assert reads[0] == 4


def logs(folder):
    """All that training writes beside the weights, without times."""
    found = {}
    for name in ("metrics", "samples", "optimizer", "heldout"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{k: v for k, v in r.items() if "second" not in k} for r in rows]
    found["pictures"] = {p.name: p.read_bytes() for p in folder.glob("samples/*")}
    return found


MOMENTS = [
    ("collect", 1, "before"),  # the base is scored, nothing is trained
    ("evaluate_held_out", 3, "after"),  # step 2 is scored, its state not yet saved
    ("save_state", 1, "before"),
    ("save_state", 1, "after"),
    ("evaluate_held_out", 6, "after"),  # the last step, of which no state is saved
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: "-".join(map(str, m)))
def test_what_grows_has_each_step_once_after_kills(
    moment, make_pair, make_config, tmp_path, monkeypatch
):
    """Killed twice at a moment, the second time with lines half written, a run ends with the files of one that was
    not: held-out scores, metrics, samples and their pictures, evidence, kept steps, updates included."""
    name, nth, when = moment
    kind = "vlm" if name == "save_state" else "llm"
    train = {"steps": 5, "prompts_per_step": 2, "save_every": 2, "sample_every": 1}
    train |= {"evidence_every": 1, "keep_steps": [2, 3], "updates_per_rollout": 2}
    sections = {"train": train, "rollout": {"max_new_tokens": 3}}
    config = make_config(kind, **sections)

    def score(student):
        sums = [float(p.detach().double().sum()) for p in student.model.parameters()]
        return {"first": {"sum": sum(sums)}, "second": {"largest": max(sums), "none": float("nan")}}

    def train_into(folder):
        kept = {}

        def keep(step, trainable):
            kept[step] = {name: x.clone() for name, x in trainable.state().items()}

        pair = make_pair(kind, **sections)
        data = load_data(config.data, 10, SEED)
        hooks = Hooks(keep, score, evaluate_every=1)
        distill(pair, data, recipe_of(config), folder, SEED, hooks=hooks, identity="x")
        return weights(pair), kept

    class Killed(BaseException):
        pass

    import vlopd.loop as module

    whole, kept = train_into(tmp_path / "whole")
    original, calls = getattr(module, name), []

    def kill(*words, **named):
        calls.append(1)
        if len(calls) == nth and when == "before":
            raise Killed
        result = original(*words, **named)
        if len(calls) == nth:
            raise Killed
        return result

    cut, killed = tmp_path / "cut", 0
    monkeypatch.setattr(module, name, kill)
    for _ in range(2):
        try:
            train_into(cut)
        except Killed:
            killed += 1
        calls.clear()
    monkeypatch.undo()
    assert killed >= 1  # from a late state there may be fewer calls to come
    for each in cut.glob("*.jsonl"):
        with each.open("a") as file:
            file.write('{"step": 1, "tas')
    resumed, kept_later = train_into(cut)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    for step, values in kept_later.items():
        assert all(torch.equal(values[n], kept[step][n]) for n in values)
    assert logs(cut) == logs(tmp_path / "whole")
    scored = [(row["step"], row["task"]) for row in logs(cut)["heldout"]]
    assert scored == [(step, task) for step in range(6) for task in ("first", "second")]
    assert logs(cut)["heldout"][1]["none"] is None


@pytest.mark.parametrize(
    ("kind", "optim", "steps", "message"),
    [
        (
            "llm",
            {"learning_rate": 1e38},
            1,
            r"at learning rate 1e\+38, left \d+ of \d+ .*values of ",
        ),
        ("vlm", {"learning_rate": 1e38}, 2, r"update of step 0, .* left \d+ of \d+ .*values of "),
        (
            "vlm",
            {"learning_rate": 1e30},
            1,
            "after 1 steps the student's log-probs of shapes-train-1-",
        ),
        ("llm", {"type": "rmsprop", "learning_rate": 1e38}, 1, "left .* of .* in the values of"),
        ("vlm", {"type": "sgd", "learning_rate": 1e37}, 1, "after 1 steps"),
        ("llm", {"type": "lion", "learning_rate": 1e30}, 1, "after 1 steps"),
        ("vlm", {"type": "muon", "learning_rate": 1e38}, 1, "step 0"),
    ],
)
def test_the_last_update_is_checked_as_the_others_are(
    kind, optim, steps, message, make_pair, make_config, tmp_path
):
    """Values that the last update leaves infinite, or so large that the student says nothing finite, are refused by
    the step and the parameter or the example; no later state, score or kept step is written."""
    train = {"prompts_per_step": 2, "save_every": 1, "keep_steps": [1]}
    config = make_config(kind, train={**train, "steps": steps}, optim=optim)
    pair, data = make_pair(kind), load_data(config.data, 4, 1)
    kept = []
    with pytest.raises(TrainingError, match=message):
        hooks = Hooks(keep=lambda step, trainable: kept.append(step))
        distill(pair, data, recipe_of(config), tmp_path, SEED, hooks=hooks, identity="x")
    assert not kept
    assert not (tmp_path / "state").exists()
    assert metrics(tmp_path) == []


def test_a_moment_that_overflows_is_named(make_pair, make_config, tmp_path):
    """A second moment that is infinite, whose coordinate would never move again, is refused by its name."""
    pair, config = make_pair("llm"), make_config("llm")
    trainable = Trainable(pair.student.model)
    optimizer = build_optimizer(config.optim, trainable)
    for value in trainable.parameters():
        value.grad = torch.ones_like(value)
    name, slot = list(trainable.slots.items())[3]
    slot.values.grad.view(-1)[7] = 1e25
    before = slot.values.detach().clone()
    optimizer.step(1e-3)
    assert bool(slot.values.isfinite().all())
    after = slot.values.detach().view(-1)
    assert float(after[7]) == float(before.view(-1)[7])  # it did not move, silently
    with pytest.raises(
        TrainingError, match=rf"1 of {before.numel()} numbers in exp_avg_sq of {name}"
    ):
        refuse_overflow(0, 1e-3, trainable, optimizer, tmp_path, "test")


def test_a_single_bit_of_a_state_is_noticed(make_pair, make_config, tmp_path):
    """A bit that flips anywhere in a state, header or tensors, is one line that names the file."""
    config = make_config("llm", train={"steps": 2, "prompts_per_step": 2, "save_every": 1})
    run(make_pair("llm"), config, tmp_path)
    path = tmp_path / "state" / "state.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    step = whole.index(b'"step":"2"') + 8
    places = [0, 3, 9, step, header - 3, header, header + 1001, len(whole) // 2, len(whole) - 1]
    places += [whole.index(b'"optimizer":"') + 14, whole.index(b'"digest":"') + 12]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
            run(make_pair("llm"), config, tmp_path)


def test_curves_go_to_tensorboard(make_pair, make_config, tmp_path):
    """With tracking.trackers the numbers of metrics.jsonl are in the tracker's own files; an absent one is named."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("llm")

    def opened():
        tracking = TrackingConfig(trackers=("tensorboard",))
        settings = config.model_dump(mode="json")
        return open_trackers(tracking, "test", "run", "full", tmp_path, settings)

    run(make_pair("llm"), config, tmp_path, trackers=opened())
    (folder,) = (tmp_path / "trackers").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    told = [round(event.value, 5) for event in events.Scalars("kl")]
    assert told == [pytest.approx(row["kl"], rel=1e-4) for row in metrics(tmp_path)]
    # gone on with from step 2, as after a kill: each step is there once still
    before = {e.step: e.value for e in events.Scalars("kl")}
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in metrics(tmp_path)[:2])
    )
    with TrainingLog(tmp_path, "test", 4, 2, True, opened()) as log:
        log.track(2, {"kl": 7.0})
    again = {e.step: e.value for e in EventAccumulator(str(folder)).Reload().Scalars("kl")}
    assert again == {0: before[0], 1: before[1], 2: 7.0}
    with pytest.raises(ConfigError, match="names 'wandb', which is not installed: pip install"):
        open_trackers(TrackingConfig(trackers=("wandb",)), "test", "run", "full", tmp_path, {})


def test_wandb_starts_in_the_arms_folder_without_names(tmp_path, monkeypatch):
    """Each arm of a process has its own folder for wandb, which is offline and records no machine unless told to."""
    started = []

    class Recorded:
        requires_logging_directory = False

        def __init__(self, project: str, **arguments: str):
            started.append((project, arguments["name"], arguments["dir"], dict(os.environ)))

        def start(self) -> None:
            assert Path(started[-1][2]).is_dir()

        def store_init_configuration(self, values: dict) -> None:
            pass

    monkeypatch.setattr(training_log, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(training_log.LOGGER_TYPE_TO_CLASS, "wandb", Recorded)
    for key in training_log.WANDB:
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for arm in ("full", "other"):
        open_trackers(TrackingConfig(trackers=("wandb",)), "test", "run", arm, tmp_path / arm, {})
    folders = [(arm, str(tmp_path / arm / "trackers")) for arm in ("full", "other")]
    assert [its[1:3] for its in started] == folders
    assert started[0][3].items() >= training_log.WANDB.items()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    open_trackers(TrackingConfig(trackers=("wandb",)), "test", "run", "full", tmp_path, {})
    assert started[-1][2] == str(tmp_path) and started[-1][3]["WANDB_MODE"] == "online"


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
