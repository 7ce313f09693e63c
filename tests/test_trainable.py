"""Masked training is dense training of fewer coordinates: the identities that the comparison rests on."""

import pytest
import torch

from vlopd.config import ReverseKL
from vlopd.optimizers import build_optimizer
from vlopd.trainable import Trainable

COMPUTE = ("fp32", "bf16")


def train(pair, examples, config, mask, steps=5):
    """Some steps on fixed completions; returns the parameters and the Trainable."""
    prompts = pair.student.render(examples)
    completions = pair.sample(prompts, 6, 1.0, torch.Generator().manual_seed(0))
    trainable = Trainable(pair.student.model, mask)
    optimizer = build_optimizer(config.optim, trainable)
    clip = config.optim.max_grad_norm or float("inf")
    for _ in range(steps):
        trainable.zero_grad()
        pair.divergence(ReverseKL(), examples, prompts, completions).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.parameters()), clip)
        optimizer.step(config.optim.learning_rate)
        trainable.write_back()
    return {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}, trainable


def random_mask(model, share=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("compute", COMPUTE)
def test_all_true_mask_is_dense_training_bit_for_bit(
    kind, compute, make_pair, make_config, make_data
):
    """A mask of all ones gives the dense run's weights exactly, in fp32 and bf16 compute."""
    config = make_config(kind, optim={"learning_rate": 1e-3, "weight_decay": 0.1})
    dense, _ = train(make_pair(kind, compute), make_data(kind), config, None, steps=20)
    pair = make_pair(kind, compute)
    ones = {
        n: torch.ones_like(p, dtype=torch.bool) for n, p in pair.student.model.named_parameters()
    }
    masked, trainable = train(pair, make_data(kind), config, ones, steps=20)
    assert trainable.count == trainable.total
    assert all(torch.equal(dense[n], masked[n]) for n in dense)


@pytest.mark.parametrize("compute", COMPUTE)
def test_compact_storage_of_all_but_one_coordinate_follows_dense(
    kind, compute, make_pair, make_config, make_data
):
    """Where all coordinates but one bias-like entry train, compact storage gives the dense values exactly
    in every other tensor, without clipping (clipping alone couples tensors)."""
    config = make_config(kind, optim={"learning_rate": 1e-3, "max_grad_norm": None})
    pair = make_pair(kind, compute)
    names = [n for n, p in pair.student.model.named_parameters() if p.ndim == 2]
    mask = {
        n: torch.ones_like(p, dtype=torch.bool) for n, p in pair.student.model.named_parameters()
    }
    mask[names[-1]].view(-1)[0] = False
    compact, trainable = train(pair, make_data(kind), config, mask, steps=1)
    assert trainable.slots[names[-1]].count == mask[names[-1]].numel() - 1
    dense, _ = train(make_pair(kind, compute), make_data(kind), config, None, steps=1)
    for name in dense:
        same = dense[name] == compact[name]
        assert bool(same[mask[name]].all()), name


@pytest.mark.parametrize("compute", COMPUTE)
def test_frozen_coordinates_do_not_move(kind, compute, make_pair, make_config, make_data):
    """Off the mask every bit stays, under weight decay, momentum and clipping; on it, weights move."""
    config = make_config(
        kind, optim={"learning_rate": 1e-2, "weight_decay": 0.5, "max_grad_norm": 0.1}
    )
    pair = make_pair(kind, compute)
    before = {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}
    mask = random_mask(pair.student.model)
    after, trainable = train(pair, make_data(kind), config, mask, steps=10)
    for name in before:
        assert torch.equal(before[name][~mask[name]], after[name][~mask[name]]), name
    assert any(bool((before[n][mask[n]] != after[n][mask[n]]).any()) for n in before)
    assert trainable.count == sum(int(m.sum()) for m in mask.values())
    state = sum(v.numel() for v in trainable.parameters())
    assert state == trainable.count  # what the optimizer holds state for


def test_empty_mask_leaves_the_source(kind, make_pair):
    """A mask of zeros trains nothing, and `merged` gives the source back."""
    model = make_pair(kind).student.model
    source = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = Trainable(
        model, {n: torch.zeros_like(p, dtype=torch.bool) for n, p in source.items()}
    )
    assert trainable.count == 0
    assert not any(p.requires_grad for p in model.parameters())
    merged = trainable.merged(source)
    assert all(torch.equal(merged[n], source[n]) for n in source)


def test_compact_gradients_are_the_dense_ones_gathered(kind, make_pair, make_config, make_data):
    """The compact gradient is the dense gradient at the mask, summed over micro-batches; none stays dense."""

    def gradients(mask):
        pair = make_pair(kind)
        trainable = Trainable(pair.student.model, mask)
        for part in (make_data(kind)[:3], make_data(kind)[3:]):
            prompts = pair.student.render(part)
            completions = pair.sample(prompts, 5, 0.0)
            tokens = pair.divergence(ReverseKL(), part, prompts, completions)
            tokens.loss.sum().backward()
        assert all(
            p.grad is None or p is s.values for s in trainable.slots.values() for p in [s.parameter]
        )
        return {n: s.values.grad for n, s in trainable.slots.items()}

    mask = random_mask(make_pair(kind).student.model)
    dense, compact = gradients(None), gradients(mask)
    assert any(gradient is not None for gradient in compact.values())
    for name, gradient in compact.items():
        if dense[name] is None:  # LLaVA leaves its tower's last norm out
            assert gradient is None
            continue
        torch.testing.assert_close(gradient, dense[name][mask[name]], rtol=0, atol=0)


def test_masked_adamw_step_matches_float64_by_hand(make_pair, make_config):
    """One AdamW step on the mask equals the formula in float64: decay, moments, bias correction."""
    model = make_pair("llm").student.model
    config = make_config("llm", optim={"learning_rate": 1e-2, "weight_decay": 0.1}).optim
    mask = random_mask(model, 0.3)
    trainable = Trainable(model, mask)
    optimizer = build_optimizer(config, trainable)
    before = {n: s.values.detach().double().clone() for n, s in trainable.slots.items()}
    for slot in trainable.slots.values():
        slot.values.grad = torch.randn_like(slot.values)
    optimizer.step(config.learning_rate)
    for name, slot in trainable.slots.items():
        g = slot.values.grad.double()
        m, v = (1 - config.betas[0]) * g, (1 - config.betas[1]) * g**2
        m, v = m / (1 - config.betas[0]), v / (1 - config.betas[1])
        lr = config.learning_rate
        expected = before[name] * (1 - lr * config.weight_decay) - lr * m / (v.sqrt() + config.eps)
        torch.testing.assert_close(slot.values.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_a_mask_of_another_model_is_refused(make_pair):
    """A foreign name or shape raises with the tensor's name."""
    model = make_pair("llm").student.model
    with pytest.raises(ValueError, match=r"nowhere\.weight"):
        Trainable(model, {"nowhere.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"lm_head\.weight.*shape"):
        Trainable(model, {"lm_head.weight": torch.ones(2, dtype=torch.bool)})


def test_merged_keeps_the_sources_bits_off_the_mask(
    kind, make_pair, make_config, make_data, folders
):
    """Computed in bf16 and stored in fp32, frozen coordinates are still the source's fp32 bits."""
    fp32 = make_pair(kind, "fp32").student.model
    source = {n: p.detach() + 1e-4 * torch.randn_like(p) for n, p in fp32.named_parameters()}
    pair = make_pair(kind, "bf16")
    mask = random_mask(pair.student.model)
    _, trainable = train(pair, make_data(kind), make_config(kind), mask)
    merged = trainable.merged(source)
    for name in source:
        off = ~mask[name]
        assert torch.equal(merged[name][off], source[name][off])
