"""Each step's numbers against what a reader would work out by hand, and the optimizer's evidence likewise."""

import math

import numpy as np
import pytest
import torch

from tests.conftest import recipe_of
from vlopd import distributed
from vlopd.config.objective import ReverseKL
from vlopd.config.training import AdamW, RMSProp
from vlopd.data.load import load_data, pick
from vlopd.train.metrics import quarters, repeated, summarise
from vlopd.train.optimizer_statistics import UpdateStatistics
from vlopd.train.optimizers import build_optimizer
from vlopd.train.rollouts import collect
from vlopd.train.sparse import Trainable


def test_quarters_are_of_each_completion():
    """Of 8 tokens two are in each quarter; a completion of one token has a first quarter only."""
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0], mask[1, :1], mask[2, :5] = True, True, True
    assert quarters(mask).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 0, 1, 2, 3]


def test_repetition_counts_grams_that_came_before():
    """a b c d a b c d has one repeated 4-gram of five; padding does not count, nor do other completions."""
    ids = torch.tensor(
        [[1, 2, 3, 4, 1, 2, 3, 4], [5, 5, 5, 5, 5, 5, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    )
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5]).bool()
    assert repeated(ids[:1], mask[:1]) == (1, 5)
    assert repeated(ids, mask) == (1 + 2, 5 + 3 + 0)


@pytest.mark.parametrize("writer", ["student", "data"])
def test_a_steps_numbers(writer, kind, make_pair, make_config):
    """Split into micro-batches or not, the row holds the means over all completion tokens, worked out here from
    both models' logits; the gap between sampler and trainer is rounding, and null where the data wrote."""
    sections = {"rollout": {"max_new_tokens": 6, "source": writer}}
    rows = []
    for size in (None, 2):
        train = {"steps": 1, "prompts_per_step": 5, "micro_batch": size}
        config, pair = make_config(kind, **sections, train=train), make_pair(kind, **sections)
        examples = pick(load_data(config.data, 5, 1), 0, 5, 1)
        batches = collect(pair, recipe_of(config), pair.render(examples), range(5), 1, 0)
        with torch.no_grad():
            tokens = [
                pair.divergence(ReverseKL(), b.examples, b.prompts, b.completions) for b in batches
            ]
        rows.append(summarise(7, 0.5, 2.0, batches, tokens, 1, distributed.accelerator()))
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        close = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
        assert rows[1][key] == close, key
    row = rows[0]
    whole = make_config(kind, **sections, train={"steps": 1, "prompts_per_step": 5})
    (batch,) = collect(pair, recipe_of(whole), pair.render(examples), range(5), 1, 0)
    hidden = pair.student.completion_hidden(batch.prompts, batch.completions)
    with torch.no_grad():
        q = pair.student.logits(hidden, pair.vocabulary.student).double().log_softmax(-1)
    p = pair.teacher_logits(batch.examples, batch.completions).double().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    lengths = batch.completions.mask.sum(1).tolist()
    assert (row["step"], row["loss"], row["grad_norm"]) == (7, 0.5, 2.0)
    assert row["completion_tokens"] == sum(lengths)
    assert row["mean_completion_tokens"] == pytest.approx(sum(lengths) / 5)
    assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert row["student_entropy"] == pytest.approx(float(-(q.exp() * q).sum(-1).mean()), rel=1e-4)
    assert row["teacher_entropy"] == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), rel=1e-4)
    last = [
        x
        for each in kl.split(lengths)
        for i, x in enumerate(each.tolist())
        if 4 * i // len(each) == 3
    ]
    assert row["kl_quarter_4"] == pytest.approx(sum(last) / len(last), rel=1e-4)
    cut = sum(not ended for ended in batch.completions.ended.tolist())
    assert row["truncated_fraction"] == cut / 5
    if writer == "student":
        assert 0 <= row["logprob_gap"] <= row["logprob_gap_max"] < 1e-4
    else:
        assert row["logprob_gap"] is row["logprob_gap_max"] is None


def test_what_is_infinite_where_the_loss_does_not_look_is_null(make_pair, make_config):
    """A token that the teacher bans makes the KL infinite: the row has null for it, and stays valid JSON."""
    config, pair = make_config("llm"), make_pair("llm")
    examples = pick(load_data(config.data, 4, 1), 0, 4, 1)
    batches = collect(pair, recipe_of(config), pair.render(examples), range(4), 1, 0)
    head = pair.teachers[0].loaded.model.get_output_embeddings()
    banned = torch.tensor([7])
    head.register_forward_hook(lambda _, inputs, output: output.index_fill(-1, banned, -math.inf))
    with torch.no_grad():
        tokens = [
            pair.divergence(ReverseKL(), b.examples, b.prompts, b.completions) for b in batches
        ]
    row = summarise(0, 1.0, 1.0, batches, tokens, 1, distributed.accelerator())
    assert row["kl"] is None
    assert row["student_entropy"] > 0


# ----------------------------------------------------------------------------------------- evidence


@pytest.mark.parametrize(
    "config", [AdamW(learning_rate=1e-3), RMSProp(learning_rate=1e-3)], ids=lambda c: c.type
)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.95])
def test_evidence_is_what_numpy_says(config, density, kind, make_pair):
    """Alignment, variation of sqrt(v), unmoved fractions and update size of a module, against numpy in float64:
    of the trained coordinates alone, also where most train and are kept with the others."""
    model = make_pair(kind).student.model
    draws = torch.Generator().manual_seed(0)
    mask = None
    if density < 1:
        mask = {
            n: torch.rand(p.shape, generator=draws) < density for n, p in model.named_parameters()
        }
    trainable = Trainable(model, mask)
    optimizer = build_optimizer(config, trainable)
    for step in range(3):
        for value in trainable.parameters():
            value.grad = torch.randn(value.shape, generator=draws) * 10.0 ** (-step)
        statistics = UpdateStatistics(trainable)
        optimizer.step(1e-3)
        rows = statistics.rows(step, trainable, optimizer)
        trainable.write_back()
    chosen = {
        n: s for n, s in trainable.slots.items() if n.endswith("mlp.up_proj.weight")
    }  # both layers' are one row
    (row,) = [r for r in rows if (r["component"], r["module"]) == ("language", "up")]

    def every(get) -> np.ndarray:
        found = []
        for n, s in chosen.items():
            x = get(n, s)
            if density < 1 and x.shape == mask[n].shape:
                x = x[mask[n]]
            found.append(x.double().flatten().numpy())
        return np.concatenate(found)

    state = optimizer.state()
    v = every(lambda n, s: state[n]["exp_avg_sq" if config.type == "adamw" else "square_avg"])
    before, after = every(lambda n, s: statistics.before[n]), every(lambda n, s: s.values.data)
    assert row["coordinates"] == len(before)
    assert row["sqrt_v_variation"] == pytest.approx(np.sqrt(v).std() / np.sqrt(v).mean(), rel=1e-9)
    assert row["update_rms"] == pytest.approx(np.sqrt(((after - before) ** 2).mean()), rel=1e-5)
    assert row["unmoved_fp32_fraction"] == pytest.approx((after == before).mean())
    old = every(lambda n, s: statistics.before[n].bfloat16())
    new = every(lambda n, s: s.values.data.bfloat16())
    assert row["unmoved_bf16_fraction"] == pytest.approx((old == new).mean())
    assert row["unmoved_bf16_fraction"] > row["unmoved_fp32_fraction"]
    if config.type == "adamw":
        m, g = every(lambda n, s: state[n]["exp_avg"]), every(lambda n, s: s.values.grad)
        expected = m @ g / np.linalg.norm(m) / np.linalg.norm(g)
        assert row["momentum_alignment"] == pytest.approx(expected, rel=1e-9)
        assert row["momentum_alignment"] < 0.9
    else:
        assert row["momentum_alignment"] is None
    whole = [r for r in rows if r["component"] == "all"]
    assert [r["coordinates"] for r in whole] == [trainable.count]
