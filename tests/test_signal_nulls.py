"""Training on nothing: a null arm differs from its real arm in the signal alone, and its signal carries nothing."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import recipe_of
from vlopd import distributed, seeding
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.signal_nulls import SignalNull
from vlopd.data.load import load_data, pick
from vlopd.errors import ConfigError, RunError
from vlopd.files import read_json, read_jsonl
from vlopd.loop import backward, distill, teacher_forwards
from vlopd.preflight.record import predicted_memory
from vlopd.run.arms import ArmOptions
from vlopd.run.dependencies import arm_inputs
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm
from vlopd.train.log import Stopwatch
from vlopd.train.rollouts import collect
from vlopd.train.signal_nulls import NullSignal, NullUpdate
from vlopd.train.sparse import Trainable
from vlopd.types import Example

OPD = {"train": {"steps": 2, "prompts_per_step": 4, "save_every": 1, "keep_completions": True}}
STEP = {"train": {**OPD["train"], "steps": 1}}
RLVR = {
    "train": {"steps": 1, "prompts_per_step": 8, "keep_completions": True},
    "rollout": {"max_new_tokens": 6, "completions_per_prompt": 4},
    "reward": {"rule": "answer_named"},
}
SFT = {**STEP, "loss": {"type": "nll"}, "rollout": {"max_new_tokens": 6, "source": "data"}}
TYPES = (
    "rademacher",
    "sequence_sign",
    "shuffled_teacher",
    "permuted_vocabulary",
    "random_gradient",
)


@pytest.fixture
def train(make_pair, make_config, tmp_path):
    """(kind, sections, name, null, real arm to replay) -> the trained student's values."""

    def run(kind, sections, name, null=None, replay=None, prepare=lambda pair: None):
        pair, config = make_pair(kind, **sections), make_config(kind, **sections)
        prepare(pair)
        recipe = recipe_of(config)
        rows = load_data(recipe.data, recipe.prompts)
        if recipe.reward is not None:
            # an answer that random models say now and then, so that rewards differ
            pair.student.model.get_output_embeddings().weight.data[
                pair.student.tokenizer.convert_tokens_to_ids("red")
            ] *= 2
            rows = [Example(e.id, e.messages, e.images, "red", e.fields) for e in rows]
        where = None if replay is None else tmp_path / replay
        trained = distill(
            pair, rows, recipe, tmp_path / name, 1, null=null, replay=where, identity="it"
        )
        return {n: v.clone() for n, v in trained.trainable.state().items()}

    return run


def completions(folder):
    return {path.name: load_file(path) for path in sorted((folder / "completions").iterdir())}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(folder):
    return read_jsonl(folder / "metrics.jsonl")


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("sections", [STEP, SFT, RLVR], ids=["OPD", "SFT", "RLVR"])
def test_a_null_arm_differs_in_its_signal_alone(sections, kind, train, tmp_path):
    """The first step's completions are the real arm's to the bit, and so are its logged numbers but the gradient's
    norm, which is in the same range; the weights differ from the real arm's and among nulls."""
    found = {"real": train(kind, sections, "real")}
    nulls = {"OPD": TYPES, "SFT": ("rademacher", "sequence_sign", "random_gradient")}
    nulls["RLVR"] = ("rademacher", "sequence_sign", "random_reward")
    which = "RLVR" if "reward" in sections else "SFT" if "loss" in sections else "OPD"
    first = next(iter(completions(tmp_path / "real").values()))
    real = metrics(tmp_path / "real")[0]
    for null in nulls[which]:
        found[null] = train(kind, sections, null, null)
        assert same(next(iter(completions(tmp_path / null).values())), first)
        own = metrics(tmp_path / null)[0]
        differs = {key for key in real if "second" not in key and own[key] != real[key]}
        about_teacher = {
            k for k in real if k.startswith(("kl", "teacher", "top_", "student_shared"))
        }
        allowed = {"grad_norm"}
        if null == "random_gradient":
            allowed |= about_teacher | ({"loss"} if which == "OPD" else set())
            assert own["kl"] is None and own["grad_norm"] == pytest.approx(1.0, rel=1e-5)
        else:
            allowed |= {"loss"} if null == "random_reward" else set()
            assert 0.2 < own["grad_norm"] / real["grad_norm"] < 5
        assert differs <= allowed
    values = [torch.cat([v.flatten() for v in its.values()]) for its in found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_a_replay_repeats_the_completions_to_the_bit(kind, train, tmp_path):
    """Replayed, a training is the real one bit for bit; a null's completions are the real arm's at every step, where
    its own would drift, and normal gradients have the real arm's norms. Neither a teacher nor its sampling is called
    for these."""
    real = train(kind, OPD, "real")
    assert same(train(kind, OPD, "again", replay="real"), real)

    def refuse(pair):
        for teacher in pair.teachers:
            teacher.loaded.model.register_forward_pre_hook(lambda *_: pytest.fail("a teacher ran"))

    train(kind, OPD, "normal", "random_gradient", "real", prepare=refuse)
    train(kind, OPD, "signs", "rademacher", "real")
    train(kind, OPD, "drifting", {"type": "rademacher"})
    wanted = completions(tmp_path / "real")
    assert len(wanted) == 2
    for name in ("again", "normal", "signs", "drifting"):
        its = completions(tmp_path / name)
        assert its.keys() == wanted.keys()
        is_same = [same(its[step], wanted[step]) for step in wanted]
        assert is_same == [True, name != "drifting"]
    norms = [[row["grad_norm"] for row in metrics(tmp_path / name)] for name in ("normal", "real")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("null", ["rademacher", "sequence_sign"])
def test_opposite_signs_give_the_opposite_update(null, make_pair, train, monkeypatch):
    """Given the past, an update and its negative are equally likely: weights, clipping and AdamW keep the symmetry."""
    sections = {**OPD, "train": {"steps": 1, "prompts_per_step": 4}}
    sections["optim"] = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.01}
    base = make_pair("llm", **sections).student.model.state_dict()
    one = train("llm", sections, "one", null)
    original = seeding.uniforms

    def reflected(rows, tokens, *names):
        draws = original(rows, tokens, *names)
        return 1 - 2**-53 - draws if names[0] == "null" else draws

    monkeypatch.setattr(seeding, "uniforms", reflected)
    other = train("llm", sections, "other", null)
    deltas = [{n: its[n].double() - base[n].double() for n in one} for its in (one, other)]
    sizes = [torch.cat([d.flatten() for d in its.values()]) for its in deltas]
    assert sizes[0].norm() > 0
    assert (sizes[0] + sizes[1]).norm() < 1e-3 * sizes[0].norm()


def test_a_killed_null_resumes_to_the_bit(kind, train, monkeypatch, tmp_path):
    """Killed after its first step and gone on with, a null arm has the uninterrupted one's values and completions."""
    import vlopd.loop as module

    original = module.save_state

    def kill(*arguments):
        original(*arguments[:-1])
        raise KeyboardInterrupt

    null, replay = {"llm": ("rademacher", "real"), "vlm": ("shuffled_teacher", None)}[kind]
    if replay is not None:
        train(kind, OPD, replay)
    whole = train(kind, OPD, f"whole-{null}", null, replay)
    with monkeypatch.context() as patched:
        patched.setattr(module, "save_state", kill)
        with pytest.raises(KeyboardInterrupt):
            train(kind, OPD, f"cut-{null}", null, replay)
    assert len(metrics(tmp_path / f"cut-{null}")) == 1
    assert same(train(kind, OPD, f"cut-{null}", null, replay), whole)
    cut, uncut = (completions(tmp_path / n) for n in (f"cut-{null}", f"whole-{null}"))
    assert cut.keys() == uncut.keys() and all(same(cut[step], uncut[step]) for step in uncut)


# ----------------------------------------------------------------------------------------- gradients


@pytest.fixture
def step(make_pair, make_config):
    """(kind, sections) -> a pair's recipe, the micro-batches of a step, and their gradient under a NullUpdate."""

    def make(kind, sections):
        pair, config = make_pair(kind, **sections), make_config(kind, **sections)
        recipe, n = recipe_of(config), config.train.prompts_per_step
        examples = pick(load_data(recipe.data, n, 1), 0, n, 1)
        batches = collect(pair, recipe, pair.render(examples), range(n), 1, 0)
        trainable = Trainable(pair.student.model)
        accelerator = distributed.accelerator()

        def gradient(drawn, batches=batches):
            trainable.zero_grad()
            forwards = teacher_forwards(pair, batches)
            backward(pair, recipe, batches, accelerator, Stopwatch(), forwards, None, drawn)
            values = [v.grad.flatten() for v in trainable.parameters() if v.grad is not None]
            return torch.cat(values).double()

        return pair, recipe, batches, gradient

    return make


def assert_nothing_expected(coefficients, parts, real):
    """The mean of 2,000 gradients sum_i c_i g_i of zero-mean factors is zero within its error.

    Its squared norm is at most 2.5 times its expectation E |mean|^2 = tr(G^T Cov(c) G) / 2000, where the real
    gradient's is beyond 20 times; along the real gradient it is within 4 standard errors of 0.
    """
    draws = len(coefficients)
    assert draws == 2000
    gram = parts @ parts.T
    mean = coefficients.mean(0)
    expected = float((coefficients.T @ coefficients / draws * gram).sum()) / draws
    assert float(mean @ gram @ mean) < 2.5 * expected
    assert float(real.square().sum()) > 20 * expected
    along = coefficients @ (parts @ real)
    assert abs(float(along.mean())) < 4 * float(along.std()) / math.sqrt(draws)


@pytest.mark.parametrize("null", ["rademacher", "sequence_sign"])
def test_random_signs_have_no_expected_gradient(null, kind, step):
    """Over 2,000 draws the gradient averages to zero within its standard error; a draw's gradient is the sum of the
    tokens' gradients with its signs."""
    sections = {"train": {"steps": 1, "prompts_per_step": 3}, "rollout": {"max_new_tokens": 4}}
    pair, recipe, (batch,), gradient = step(kind, sections)
    signal = NullSignal.of(SignalNull(type=null), pair, recipe, 1, range(3))
    mask = batch.completions.mask.cpu()
    places = mask.nonzero().tolist()

    def one(row, column):
        return (
            torch.zeros(3, 4)
            .double()
            .index_put_((torch.tensor(row), torch.tensor(column)), torch.tensor(1.0).double())
        )

    parts = torch.stack([gradient(NullUpdate(signs=one(*place))) for place in places])
    drawn = [signal.update(draw, 0, [batch], None).signs for draw in range(2000)]
    signs = torch.stack([its.expand(3, 4)[:, : mask.shape[1]][mask] for its in drawn])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    a_draw = gradient(signal.update(7, 0, [batch], None))
    assert float((signs[7] @ parts - a_draw).norm() / a_draw.norm()) < 1e-5
    assert_nothing_expected(signs, parts, gradient(None))


def test_a_random_reward_has_no_expected_gradient(kind, step):
    """Over 2,000 draws, given the completions, the policy gradient averages to zero within its standard error; each
    prompt keeps its advantages, and the rewards that are logged stay."""
    sections = {**RLVR, "train": {"steps": 1, "prompts_per_step": 3}}
    pair, recipe, (batch,), gradient = step(kind, sections)
    n = len(batch.examples)
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1])
    groups = rewards.view(3, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()
    batch = replace(batch, rewards=rewards, advantages=advantages)
    signal = NullSignal.of(SignalNull(type="random_reward"), pair, recipe, 1, range(3))
    parts = torch.stack([gradient(None, [replace(batch, advantages=row)]) for row in torch.eye(n)])
    drawn = [signal.rewarded(draw, [batch])[0] for draw in range(2000)]
    shuffled = torch.stack([its.advantages for its in drawn]).double()
    assert torch.equal(drawn[0].rewards, rewards)
    for its in shuffled[:5]:
        assert torch.equal(its.view(3, 4).sort(1)[0], advantages.double().view(3, 4).sort(1)[0])
    assert not torch.equal(shuffled[0], shuffled[1])
    a_draw = gradient(None, [drawn[7]])
    assert float((shuffled[7] @ parts - a_draw).norm() / a_draw.norm()) < 1e-5
    centred = torch.zeros_like(
        parts[0]
    )  # no draw has a direction, so the real one's is that of its advantages
    assert_nothing_expected(shuffled, parts, gradient(None, [batch]) + centred)


@pytest.mark.parametrize(
    "null", ["rademacher", "sequence_sign", "shuffled_teacher", "permuted_vocabulary"]
)
def test_a_nulls_gradient_does_not_depend_on_micro_batches(null, kind, step):
    """In one or in four micro-batches, a null's random numbers are the same, and the gradient up to rounding."""
    found = []
    for how in ({}, {"micro_batch": 1}):
        sections = {"train": {"steps": 1, "prompts_per_step": 4, **how}}
        pair, recipe, batches, gradient = step(kind, sections)
        assert len(batches) == (4 if how else 1)
        signal = NullSignal.of(SignalNull(type=null), pair, recipe, 1, range(4))
        forwards = teacher_forwards(pair, batches)
        found.append(gradient(signal.update(0, 0, batches, forwards)))
        found.append(gradient(None))
    assert float((found[0] - found[2]).norm() / found[0].norm()) < 1e-5
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 0.1


def test_a_permuted_vocabulary_is_one_permutation_of_what_may_be_given(kind, step):
    """An arm's order of columns is the same at every step, another for another seed, and fixes placeholders."""
    pair, recipe, batches, _ = step(kind, {"train": {"steps": 1, "prompts_per_step": 2}})
    null = SignalNull(type="permuted_vocabulary")
    signals = [NullSignal.of(null, pair, recipe, seed, range(2)) for seed in (1, 2)]
    orders = [its.update(step, 0, batches, None).order for its in signals for step in (0, 5)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert torch.equal(orders[0].sort()[0], torch.arange(pair.vocabulary.size))
    fixed = [i for i in pair.student.unsampleable_ids if i < pair.vocabulary.size]
    assert fixed and orders[0][fixed].tolist() == fixed
    moved = float((orders[0] != torch.arange(len(orders[0]))).float().mean())
    assert moved > 0.7


# ------------------------------------------------------------------------------------ config, run folder


ARMS = {
    "base": {"type": "base"},
    "full": {"type": "distill", "seeds": [1, 2]},
    "signs": {"type": "distill", "seeds": [1, 2], "null": {"type": "rademacher", "replay": "full"}},
    "drift": {"type": "distill", "seeds": [2, 1], "null": "rademacher"},
    "top": {"type": "distill", "seed": 3, "mask": "top"},
    "top-null": {"type": "distill", "seed": 3, "mask": "of-null"},
    "other-null": {"type": "distill", "seed": 3, "mask": "other"},
}
MASKS = {
    "top": {"type": "top_fraction", "of": "full-0", "fraction": 0.1},
    "of-null": {"type": "top_fraction", "of": "signs-0", "fraction": 0.1},
    "other": {"type": "top_fraction", "of": "signs-1", "fraction": 0.2},
}


def test_roles_of_null_arms(make_config):
    """A null arm belongs to the real arms that differ in nothing but signal and seed; it takes the completions of the
    same index; a mask that its update chooses, by the same rule, makes a control."""
    config = make_config("llm", arms=ARMS, masks=MASKS)
    assert [config.arms[f"signs-{k}"].null.replay for k in (0, 1)] == ["full-0", "full-1"]
    roles = config.roles
    assert roles.first("full") == "full-0" and roles.arms("replicate") == ["full-1"]
    assert roles.arms("null") == ["signs-0", "signs-1", "drift-0", "drift-1"]
    assert [tuple(its) for its in roles.nulls] == [
        ("rademacher, replayed", ("full-0", "full-1"), ("signs-0", "signs-1")),
        ("rademacher", ("full-0", "full-1"), ("drift-1", "drift-0")),
    ]
    assert roles.of["top"] == "subnetwork" and roles.of["top-null"] == "control"
    (control,) = roles.controls
    assert (control.arm, control.kind, control.arms) == (
        "top",
        "rademacher, replayed",
        ("top-null",),
    )
    again = ExperimentConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


@pytest.mark.parametrize(
    ("arm", "sections", "why"),
    [
        ({"null": "noise"}, {}, "null.type"),
        ({"null": "random_reward"}, {}, r"arms\.x: null random_reward: there is no reward"),
        ({"null": "shuffled_teacher"}, SFT, "nothing is learned from a teacher .*use null = "),
        ({"null": "permuted_vocabulary"}, RLVR, "nothing is learned from a teacher"),
        ({"null": "random_gradient", "rollout": {"source": "teacher"}}, {}, "replay those of the"),
        ({"null": "rademacher", "role": "replicate"}, {}, 'role = "replicate" is not of an arm'),
        ({"role": "null"}, {}, "give it null = TYPE"),
        (
            {"null": {"type": "rademacher", "replay": "none"}},
            {},
            "names 'none', which is not among",
        ),
        (
            {"seed": 5, "null": {"type": "rademacher", "replay": "full"}},
            {},
            "another seed; a replay",
        ),
        (
            {"null": {"type": "rademacher", "replay": "full"}, "train": {"steps": 1}},
            {},
            "another train",
        ),
        ({"null": {"type": "rademacher", "replay": "b"}}, {}, "b replays full; name that"),
        ({"null": {"type": "rademacher", "replay": "base"}}, {}, "'base', which is not trained"),
        ({"null": {"type": "rademacher", "replay": "f"}}, {}, "which has 2 seeds; give x the same"),
    ],
)
def test_a_null_that_cannot_be_is_one_clear_line(arm, sections, why, make_config):
    """A null without what it replaces, and a replay of other prompts, name the arm and the remedy."""
    arms = {
        "base": {"type": "base"},
        "full": {"type": "distill", "seed": 1, "role": "full"},
        "f": {"type": "distill", "seeds": [7, 8], "loss": {"chunk_tokens": 7}},
        "b": {"type": "distill", "seed": 1, "null": {"type": "rademacher", "replay": "full"}},
        "x": {"type": "distill", "seed": 1, **arm},
    }
    with pytest.raises(ValueError, match=why):
        make_config("llm", arms=arms, **sections)


def test_a_run_makes_null_arms_after_those_that_they_replay(kind, make_config, tmp_path):
    """A replaying arm is made after the real one, whose completions are then kept, without being an input of it; both
    stay up to date. The memory of one without a teacher is predicted. Of a real arm that is finished without
    completions an error says what to do."""
    sections = {"train": {"steps": 1, "prompts_per_step": 2}}
    null = {"type": "random_gradient", "replay": "full"}
    arms = {
        "full": {"type": "distill", "seed": 1},
        "x": {"type": "distill", "seed": 1, "null": null},
    }
    alone = make_config(kind, **sections, arms={"full": arms["full"]})
    config = make_config(kind, **sections, arms=arms)
    plain = RunFolder.create(tmp_path / "plain", alone)
    make_arm(plain, alone, "full")
    plain.unlock()
    run = RunFolder.create(tmp_path / "run", config)
    options = ArmOptions(predict=predicted_memory)
    assert make_arm(run, config, "x", options) and not make_arm(run, config, "full")
    assert (
        read_json(run.arm("x") / "memory.json")["predicted"]["parts_bytes"]["teacher_weights"] == 0
    )
    records = {name: read_json(run.arm_record(name)) for name in arms}
    before = read_json(plain.arm_record("full"))
    assert records["full"]["checkpoint_digest"] == before["checkpoint_digest"]
    assert records["full"]["inputs"] == before["inputs"]
    assert records["x"]["inputs"]["replayed"] == before["checkpoint_digest"]
    assert records["x"]["inputs"] == arm_inputs(run, config, "x")
    assert records["x"]["discovery_seeds"] is None
    assert (run.arm("full") / "completions").is_dir()
    assert not (run.arm("x") / "completions").exists()
    assert not (plain.arm("full") / "completions").exists()
    plain = RunFolder.create(tmp_path / "plain", config)
    with pytest.raises(
        RunError, match=r"did not keep its completions; delete .*full and run again"
    ):
        make_arm(plain, config, "x")


def test_distill_refuses_a_null_without_what_it_replaces(make_pair, make_config, tmp_path):
    """`distill` says so as a config does, and takes a folder for completions rather than a name."""
    pair, config = make_pair("llm"), make_config("llm")
    rows = load_data(config.data, 4)
    for null, why in (
        ("random_reward", "there is no reward"),
        ("noise", "null: type"),
        ({"type": "rademacher", "replay": "full"}, "give distill the folder"),
    ):
        with pytest.raises(ConfigError, match=why):
            distill(pair, rows, recipe_of(config), tmp_path / "x", null=null)
