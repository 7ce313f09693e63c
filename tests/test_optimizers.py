"""Every optimizer is its formula, on the trained coordinates alone, at the rate that the config gives."""

import math

import pytest
import torch

from tests.conftest import sampled
from tests.test_config import QUICKSTART
from tests.test_trainable import random_mask, train
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import load_config
from vlopd.config.objective import ReverseKL
from vlopd.errors import ConfigError
from vlopd.models.parameter_names import classify
from vlopd.train.eight_bits import decoded, encoded, levels
from vlopd.train.optimizers import build_optimizer, is_hidden_matrix, learning_rate, moments
from vlopd.train.resume import resume, save_state
from vlopd.train.sparse import Trainable

RATE = 1e-2
ADAMW = {"type": "adamw"}
COORDINATE_WISE = {
    "adamw": ADAMW,
    "sgd": {"type": "sgd", "momentum": 0.8},
    "plain sgd": {"type": "sgd", "momentum": 0.0},
    "nesterov": {"type": "sgd", "momentum": 0.8, "nesterov": True},
    "rmsprop": {"type": "rmsprop", "eps": 1e-3},
    "rmsprop with momentum": {"type": "rmsprop", "eps": 1e-3, "momentum": 0.5},
    "lion": {"type": "lion"},
}
MUON = {
    "muon": {"type": "muon", "adamw_learning_rate": 3e-3},
    "first author's muon": {"type": "muon", "scale": "original", "nesterov": False},
}
EVERY = {**COORDINATE_WISE, **MUON}
EIGHT_BITS = {"adamw in 8 bits": {"type": "adamw", "state_bits": 8}}
by_name = pytest.mark.parametrize("name", EVERY)
ONE_OF_EACH = ("adamw", "nesterov", "rmsprop with momentum", "lion", "muon")
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)


def settings(name, **more):
    return {"learning_rate": RATE, **(EVERY | EIGHT_BITS)[name], **more}


def updated(config, model, mask=None, steps=3):
    """Values after some steps on gradients that are the same for every mask, the gradients, and the optimizer."""
    trainable = Trainable(model, mask)
    optimizer = build_optimizer(config, trainable)
    draws, gradients = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        dense = {n: torch.randn(p.shape, generator=draws) for n, p in model.named_parameters()}
        gradients.append(dense)
        for n, slot in trainable.slots.items():
            slot.values.grad = slot.gather(dense[n])
        optimizer.step(config.learning_rate)
    return {n: s.values.detach().clone() for n, s in trainable.slots.items()}, gradients, optimizer


# ------------------------------------------------------------------------------------------ formulas


def by_hand(config, w, gradients, rate, hidden):
    """The values after steps on these gradients, in float64, from the formulas."""
    m, v, b = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    decay = config.weight_decay
    kind = "adamw" if config.type == "muon" and not hidden else config.type
    for t, g in enumerate(gradients, 1):
        if kind == "adamw":
            (b1, b2), eps = (0.9, 0.999), 1e-8
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            direction = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            w = w * (1 - rate * decay) - rate * direction
        elif kind == "sgd":
            g = g + decay * w
            b = config.momentum * b + g
            w = w - rate * (g + config.momentum * b if config.nesterov else b)
        elif kind == "rmsprop":
            g = g + decay * w
            v = config.alpha * v + (1 - config.alpha) * g**2
            b = config.momentum * b + g / (v.sqrt() + config.eps)
            w = w - rate * b
        elif kind == "lion":
            b1, b2 = config.betas
            w = w * (1 - rate * decay) - rate * (b1 * m + (1 - b1) * g).sign()
            m = b2 * m + (1 - b2) * g
        else:
            mu = config.momentum
            b = mu * b + (1 - mu) * g
            rows, columns = w.shape
            size = (
                math.sqrt(max(1, rows / columns))
                if config.scale == "original"
                else 0.2 * math.sqrt(max(rows, columns))
            )
            direction = quintic(mu * b + (1 - mu) * g if config.nesterov else b)
            w = w * (1 - rate * decay) - rate * size * direction
    return w


def quintic(matrix):
    """Muon's five Newton-Schulz steps as what they do to singular values: s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@by_name
def test_three_steps_are_the_formula(name, kind, make_pair, make_config):
    """Values after three steps equal the formula in float64, weight decay included (Muon's matrices to the
    bf16 in which torch orthogonalises)."""
    config = make_config(kind, optim=settings(name, weight_decay=0.1)).optim
    model = make_pair(kind).student.model
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    after, gradients, _ = updated(config, model)
    for n, got in after.items():
        hidden = config.type == "muon" and is_hidden_matrix(before[n], n)
        rate = RATE
        if config.type == "muon" and not hidden:
            rate = config.adamw_learning_rate or RATE
        expected = by_hand(config, before[n], [g[n].double() for g in gradients], rate, hidden)
        if hidden:
            distance = (got.double() - expected).norm() / (expected - before[n]).norm()
            assert distance < 0.03, (n, float(distance))
        else:
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_muon_moves_matrices_and_adamw_the_rest(kind, make_pair, make_config):
    """Muon gets the linear maps between hidden features; tables, head, norms, biases and patches are AdamW's."""
    model = make_pair(kind).student.model
    config = make_config(kind, optim=settings("muon")).optim
    muon, adamw = build_optimizer(config, Trainable(model)).parts
    names = [
        {n for group in part.param_groups for n in group["param_names"]} for part in (muon, adamw)
    ]
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    assert {classify(n).module for n in names[0]} >= {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(n.endswith(".weight") and "embed" not in n and "norm" not in n for n in names[0])
    left = {classify(n).module for n in names[1] if n.endswith(".weight")}
    vision = {"patch", "position"} if kind == "vlm" else set()
    assert left == {"embedding", "head", "norm"} | vision


# --------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", COORDINATE_WISE)
def test_a_masked_step_is_the_dense_step_on_the_mask(name, kind, make_pair, make_config):
    """Coordinate by coordinate, some steps under a mask give the dense steps' values, up to rounding."""
    config = make_config(kind, optim=settings(name, weight_decay=0.1)).optim
    dense, _, _ = updated(config, make_pair(kind).student.model)
    model = make_pair(kind).student.model
    mask = random_mask(model, 0.3)
    masked, _, _ = updated(config, model, mask)
    for n, got in masked.items():
        torch.testing.assert_close(got, dense[n][mask[n]], rtol=1e-6, atol=1e-7)


@one_of_each
def test_all_true_mask_is_dense_training_bit_for_bit(name, kind, make_pair, make_config, make_data):
    """Under every optimizer a mask of all ones gives the dense run's bits."""
    config = make_config(kind, optim=settings(name, weight_decay=0.1))
    dense, _ = train(make_pair(kind, "bf16"), make_data(kind), config, None, steps=3)
    pair = make_pair(kind, "bf16")
    ones = {n: torch.ones_like(w, dtype=torch.bool) for n, w in dense.items()}
    masked, _ = train(pair, make_data(kind), config, ones, steps=3)
    assert all(torch.equal(dense[n], masked[n]) for n in dense)


@pytest.mark.parametrize(
    ("name", "compute"),
    [("adamw", "fp32"), *((name, "bf16") for name in ONE_OF_EACH)],
)
def test_frozen_coordinates_do_not_move(name, compute, kind, make_pair, make_config, make_data):
    """Off the mask every bit stays, under decay, momentum and clipping; on it, weights move. Muon's matrices
    are taken whole or not at all."""
    config = make_config(kind, optim=settings(name, weight_decay=0.5, max_grad_norm=0.1))
    pair = make_pair(kind, compute)
    before = {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}
    mask = random_mask(pair.student.model)
    if config.optim.type == "muon":
        for k, (n, p) in enumerate(before.items()):
            if is_hidden_matrix(p, n):
                mask[n] = torch.full(p.shape, k % 2 == 0)
    after, _ = train(pair, make_data(kind), config, mask, steps=4)
    for n in before:
        assert torch.equal(before[n][~mask[n]], after[n][~mask[n]]), n
    assert any(bool((before[n][mask[n]] != after[n][mask[n]]).any()) for n in before)


def test_muon_refuses_a_mask_that_cuts_a_matrix(kind, make_pair, make_config):
    """One coordinate short of a whole matrix is refused with its name and the remedy; a cut table is AdamW's."""
    config = make_config(kind, optim=settings("muon")).optim
    model = make_pair(kind).student.model
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    table = next(n for n in mask if classify(n).component == "embedding")
    mask[table][0] = False
    build_optimizer(config, Trainable(model, mask))
    matrix = next(n for n in mask if n.endswith("q_proj.weight"))
    mask[matrix][0, 0] = False
    with pytest.raises(ConfigError, match=rf"1023 of the 1024 coordinates of {matrix}.*adamw"):
        build_optimizer(config, Trainable(model, mask))


def test_muon_with_cut_masks_is_refused_before_the_first_arm_trains():
    """The config names the first arm under a mask that cuts matrices; without such arms it stands."""
    with pytest.raises(ConfigError, match=r"arms\.subnetwork: Muon.*whole matrices") as error:
        load_config(QUICKSTART, ["optim.type=muon"])
    assert "\n" not in str(error.value)
    tree = load_config(QUICKSTART).model_dump(exclude={"arms", "masks", "geometry", "optim"})
    full = {"type": "distill", "seed": 0}
    whole = {"type": "top_fraction", "fraction": 1.0}
    cut = {**whole, "fraction": 0.5}
    for masks, arm in [({}, None), ({"all": whole}, "all")]:
        arms = {"full": full, **({"again": {**full, "mask": arm}} if arm else {})}
        ExperimentConfig.model_validate(
            {**tree, "optim": {"type": "muon"}, "masks": masks, "arms": arms}
        )
    moved = {"type": "transplant", "mask": "cut"}  # nothing trains
    ExperimentConfig.model_validate(
        {
            **tree,
            "optim": {"type": "muon"},
            "masks": {"cut": cut},
            "arms": {"full": full, "moved": moved},
        }
    )


# --------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
@one_of_each
def test_schedules(name, schedule, expected, make_config):
    """Every optimizer has every schedule, with a linear warm-up times it."""
    config = make_config("llm", optim=settings(name, schedule=schedule)).optim
    assert [learning_rate(config, k, 4) / RATE for k in range(4)] == pytest.approx(expected)
    warm = make_config("llm", optim=settings(name, schedule=schedule, warmup_steps=3)).optim
    shares = [share * up for share, up in zip(expected, [0.25, 0.5, 0.75, 1], strict=True)]
    assert [learning_rate(warm, k, 4) / RATE for k in range(4)] == pytest.approx(shares)


@by_name
def test_components_keep_their_factor_through_the_schedule(name, kind, make_pair, make_config):
    """Each parameter's rate is the step's times its component's factor (and Muon's AdamW has its own)."""
    rates = {"language": 10.0, "embedding": 0.5}
    if kind == "vlm":
        rates |= {"vision": 0.1, "projector": 4.0}
    optim = settings(name, schedule="linear", warmup_steps=1, component_rates=rates)
    config = make_config(kind, optim=optim).optim
    trainable = Trainable(make_pair(kind).student.model)
    optimizer = build_optimizer(config, trainable)
    for step in range(4):
        rate = learning_rate(config, step, 4)
        optimizer.step(rate)
        seen = set()
        for part in optimizer.parts:
            rest = config.type == "muon" and isinstance(part, torch.optim.AdamW)
            own = (config.adamw_learning_rate or RATE) / RATE if rest else 1.0
            for group in part.param_groups:
                for n in group["param_names"]:
                    factor = rates.get(classify(n).component, 1.0)
                    assert group["lr"] == pytest.approx(rate * factor * own), n
                    seen.add(n)
        assert seen == trainable.slots.keys()


def test_component_rates_reach_the_values(make_pair, make_config):
    """With plain SGD, a component at a tenth of the rate moves a tenth as far on the same gradient."""
    rates = {"vision": 0.1, "projector": 10.0}
    config = make_config("vlm", optim=settings("plain sgd", component_rates=rates)).optim
    model = make_pair("vlm").student.model
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    after, gradients, _ = updated(config, model, steps=1)
    for n, got in after.items():
        factor = rates.get(classify(n).component, 1.0)
        expected = before[n] - RATE * factor * gradients[0][n].double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_rate_of_a_missing_component_is_refused(make_pair, make_config):
    """A language model has no vision; a component that a mask merely leaves out is no mistake."""
    config = make_config("llm", optim=settings("sgd", component_rates={"vision": 0.1})).optim
    with pytest.raises(ConfigError, match=r"component_rates\.vision = 0\.1.*no 'vision'.*language"):
        build_optimizer(config, Trainable(make_pair("llm").student.model))
    model = make_pair("vlm").student.model
    language = {
        n: torch.ones_like(p, dtype=torch.bool)
        for n, p in model.named_parameters()
        if classify(n).component == "language"
    }
    build_optimizer(config, Trainable(model, language))


# --------------------------------------------------------------------------------- state and settings


@pytest.mark.parametrize("name", [*EVERY, *EIGHT_BITS])
def test_state_survives_a_file(name, kind, make_pair, make_config, tmp_path):
    """Tensors, numbers and None come back as they were, and the next step has the same bits."""
    config = make_config(kind, optim=settings(name)).optim

    def start():
        trainable = Trainable(make_pair(kind).student.model)
        return trainable, build_optimizer(config, trainable)

    def step(trainable, optimizer, seed):
        draws = torch.Generator().manual_seed(seed)
        for k, slot in enumerate(trainable.slots.values()):
            if k:  # the forward pass never touches the first
                slot.values.grad = torch.randn(slot.values.shape, generator=draws)
        optimizer.step(RATE)

    trainable, optimizer = start()
    step(trainable, optimizer, 0)
    last = list(trainable.slots.values())[-1].values
    optimizer.parts[-1].state[last] |= {"nothing": None, "count": 3, "share": 0.1}
    save_state(tmp_path, 1, trainable, optimizer, [], "x")
    again, restored = start()
    assert resume(tmp_path, again, restored, [], "x") == 1
    before, after = optimizer.state(), restored.state()
    assert before.keys() == after.keys() == trainable.slots.keys()
    for n in before:
        assert before[n].keys() == after[n].keys()
        for key, value in before[n].items():
            got = after[n][key]
            same = torch.equal(value, got) if isinstance(value, torch.Tensor) else value == got
            assert same and type(value) is type(got), (n, key)
    step(trainable, optimizer, 1)
    step(again, restored, 1)
    for n, slot in trainable.slots.items():
        assert torch.equal(slot.values, again.slots[n].values), n


@one_of_each
def test_every_optimizer_lowers_the_loss(name, kind, make_pair, make_config, make_data):
    """Twelve steps on the same completions bring the divergence down by a tenth at least."""
    losses = descent(name, kind, make_pair, make_config, make_data)
    assert losses[-1] < 0.9 * losses[0], losses


def test_eight_bits_descend_as_32_do(kind, make_pair, make_config, make_data):
    """Over twelve steps the losses with 8-bit moments are those with 32-bit ones, within 5 % of the descent."""
    wide, narrow = (
        descent(name, kind, make_pair, make_config, make_data)
        for name in ("adamw", "adamw in 8 bits")
    )
    assert (
        narrow[1] == wide[1] and narrow[-1] != wide[-1]
    )  # the first update is not yet of stored moments
    gaps = [abs(a - b) for a, b in zip(wide, narrow, strict=True)]
    assert max(gaps) < 0.05 * (wide[0] - wide[-1]), (wide, narrow)


@pytest.mark.parametrize("signed", [True, False], ids=["first moment", "second moment"])
def test_moments_in_eight_bits_are_near(signed):
    """Of the largest of their block, values are off by at most 0.7 % (signed; 0.36 % not), those of three decades by a
    few percent of themselves on average; an outlier costs only its own block digits; only zeros become 0, of second
    moments."""
    table = levels(signed)
    assert len(table.unique()) == 256 and table[-1] == 1 and 0 in table
    draws = torch.Generator().manual_seed(0)
    values = 10 ** (-3 * torch.rand(70, 11, generator=draws))
    values[0, 0] = 1e4
    if signed:
        values *= torch.rand(values.shape, generator=draws).sub(0.5).sign()
    values[5] = 0.0
    codes, scales = encoded(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape and scales.shape == (4,)
    again = decoded(codes, scales, signed)
    assert bool((again[5] == 0).all()) and again[0, 0] == 1e4
    step = 0.9 / (64 if signed else 128) / 2
    block = scales.repeat_interleave(256)[: values.numel()].view(values.shape)
    assert bool(((again - values).abs() <= 1.01 * step * block).all())
    far = values.flatten()[256:]  # not of the outlier's block
    kept = far != 0
    errors = (again.flatten()[256:] - far)[kept] / far[kept]
    assert float(errors.abs().mean()) < (0.04 if signed else 0.02)
    assert torch.equal(encoded(again, signed)[0], codes)
    small = torch.tensor([1.0, 1e-30])
    assert bool((decoded(*encoded(small, False), False) > 0).all())


def test_state_in_eight_bits_is_a_quarter(make_pair, make_config):
    """1.02 bytes for each of a value's two moments are held, as `moments` predicts; 4 in fp32."""
    model = make_pair("llm").student.model
    found = {}
    for name in ("adamw", "adamw in 8 bits"):
        config = make_config("llm", optim=settings(name)).optim
        *_, optimizer = updated(config, model, steps=1)
        state = [x for its in optimizer.state().values() for x in its.values() if x.ndim]
        found[name] = sum(x.nbytes for x in state)
        count = sum(p.numel() for p in model.parameters())
        assert found[name] == pytest.approx(4 * moments(config) * count, rel=0.02)
    assert found["adamw in 8 bits"] < 0.26 * found["adamw"]


def descent(name, kind, make_pair, make_config, make_data):
    """The divergence before each of twelve steps on the same completions, and after the last."""
    config = make_config(kind, optim=settings(name)).optim
    pair, examples = make_pair(kind), make_data(kind)
    prompts = pair.student.render(examples)
    completions = sampled(pair, prompts, 6, 0)
    trainable = Trainable(pair.student.model)
    optimizer = build_optimizer(config, trainable)
    losses = []
    for _ in range(13):
        trainable.zero_grad()
        loss = pair.divergence(ReverseKL(), examples, prompts, completions).loss.mean()
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(list(trainable.parameters()), 1.0)
        optimizer.step(config.learning_rate)
        trainable.write_back()
    return losses


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim={type='sgd', momentun=0.5}", "did you mean 'momentum'"),
        ("optim={type='rmsprop', alfa=0.5}", "did you mean 'alpha'"),
        ("optim={type='lion', beta=[0.9, 0.99]}", "did you mean 'betas'"),
        ("optim={type='muon', adam_learning_rate=1e-3}", "did you mean 'adamw_learning_rate'"),
        ("optim.component_rates.visoin=0.1", "did you mean 'vision'"),
        ("optim.component_rates.vision=0", r"optim\.component_rates\.vision: must be between"),
        ("optim.type=adamv", "'adamw', 'sgd', 'rmsprop', 'lion', 'muon'"),
        ("optim.state_bits=16", r"optim\.state_bits"),
        ("optim={type='sgd', momentum=0, nesterov=true}", "nesterov needs a momentum"),
        ("optim.betas=[0.9, 1.0]", r"optim\.betas\.1: must be 0 or between"),
    ],
)
def test_wrong_settings_are_one_clear_line(override, message):
    """Unknown keys name the nearest of that optimizer's; values out of range are refused."""
    with pytest.raises(ConfigError, match=message) as error:
        load_config(QUICKSTART, [override])
    assert "\n" not in str(error.value)
