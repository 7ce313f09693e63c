"""Masked training is dense training of fewer coordinates: the identities that the comparison rests on."""

import pytest
import torch

from tests.conftest import sampled
from vlopd.bits import rounded_to_bf16
from vlopd.config.objective import ReverseKL
from vlopd.train.checkpointing import recomputed
from vlopd.train.generation import sample
from vlopd.train.optimizers import build_optimizer
from vlopd.train.sparse import CompactSlot, DenseSlot, Trainable, cheapest
from vlopd.weights.subspace import update_projection

COMPUTE = ("fp32", "bf16")


def train(pair, examples, config, mask, steps=5, accumulation=1, choose=cheapest):
    """Some steps on fixed completions; returns the parameters and the Trainable."""
    size = len(examples) // accumulation
    batches = [examples[k : k + size] for k in range(0, len(examples), size)]
    rollouts = []
    for k, batch in enumerate(batches):
        prompts = pair.student.render(batch)
        rollouts.append((batch, prompts, sampled(pair, prompts, 6, k)))
    trainable = Trainable(pair.student.model, mask, choose=choose)
    optimizer = build_optimizer(config.optim, trainable)
    clip = config.optim.max_grad_norm or float("inf")
    for _ in range(steps):
        trainable.zero_grad()
        for rollout in rollouts:
            pair.divergence(ReverseKL(), *rollout).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.parameters()), clip)
        optimizer.step(config.optim.learning_rate)
        trainable.write_back()
    return {n: p.detach().clone() for n, p in pair.student.model.named_parameters()}, trainable


def always(storage):
    """Keeps every parameter in one storage; `dense` only where it is defined, else packed."""
    return lambda n, count, shared: "packed" if storage == "dense" and not shared else storage


def random_mask(model, share=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("compute", COMPUTE)
def test_all_true_mask_is_dense_training_bit_for_bit(
    kind, compute, accumulation, make_pair, make_config, make_data
):
    """A mask of all ones gives the dense run's weights exactly over 8 steps, with the storage it gets by itself
    and with compact ones forced on it: gathering and scattering change nothing."""
    config = make_config(
        kind, optim={"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    )
    data = make_data(kind, 4)
    dense, _ = train(make_pair(kind, compute), data, config, None, 8, accumulation)
    chosen = [cheapest, always("packed")]
    if accumulation == 4:
        chosen = [always("listed" if compute == "bf16" else "dense")]
    for choose in chosen:
        pair = make_pair(kind, compute)
        ones = {
            n: torch.ones_like(p, dtype=torch.bool)
            for n, p in pair.student.model.named_parameters()
        }
        masked, trainable = train(pair, data, config, ones, 8, accumulation, choose)
        assert trainable.count == trainable.total
        assert all(torch.equal(dense[n], masked[n]) for n in dense)


@pytest.mark.parametrize("storage", ["listed", "packed", "dense"])
@pytest.mark.parametrize("compute", COMPUTE)
def test_frozen_coordinates_do_not_move(kind, compute, storage, make_pair, make_config, make_data):
    """Off the mask every bit stays, under weight decay, momentum, clipping, accumulation and tied weights (one
    mask for both uses); on it, weights move."""
    config = make_config(
        kind, optim={"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.1}
    )
    pair = make_pair(kind, compute)
    model = pair.student.model
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = random_mask(model)
    after, trainable = train(pair, make_data(kind, 4), config, mask, 5, 2, always(storage))
    for name in before:
        assert torch.equal(before[name][~mask[name]], after[name][~mask[name]]), name
    assert any(bool((before[n][mask[n]] != after[n][mask[n]]).any()) for n in before)
    assert trainable.count == sum(int(m.sum()) for m in mask.values())
    assert trainable.moved_off_mask(before) == 0
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    head = model.get_output_embeddings().weight
    head.data.view(-1)[int((~mask[name]).flatten().nonzero()[0])] += (
        1  # a bit that training never touches
    )
    assert trainable.moved_off_mask(before) == 1


@pytest.mark.parametrize("compute", COMPUTE)
def test_every_storage_trains_alike(kind, compute, make_pair, make_config, make_data):
    """Under one mask the storages give the same weights; the norm that clips is over trained coordinates."""
    config = make_config(
        kind, optim={"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.1}
    )
    mask = random_mask(make_pair(kind).student.model, 0.7)
    found = [
        train(make_pair(kind, compute), make_data(kind, 4), config, mask, 3, 2, always(storage))[0]
        for storage in ("listed", "packed", "dense")
    ]
    for other in found[1:]:
        for name, values in found[0].items():
            # bf16 rounds values that differ in the last bit of fp32 to neighbours, rarely
            close = torch.isclose(
                values.float(),
                other[name].float(),
                rtol=1e-2 if compute == "bf16" else 1e-6,
                atol=1e-7,
            )
            assert bool(close.all()), name


def test_the_storage_chosen_holds_the_fewest_bytes():
    """Of indices, values, gradients and AdamW's moments, as tensors really hold them, at every density."""
    torch.manual_seed(0)
    chosen = set()
    for density in (0.01, 0.03, 0.035, 0.2, 0.75, 0.85, 0.999, 1.0):
        for dtype in (torch.float32, torch.bfloat16):
            marked = torch.zeros(64, 1000, dtype=torch.bool)
            marked.view(-1)[: int(density * 64000)] = True
            marked = marked.view(-1)[torch.randperm(64000)].view(64, 1000)
            held = {}
            for storage in ("listed", "packed", "dense", "whole"):
                usable = {"dense": dtype == torch.float32, "whole": bool(marked.all())}
                if usable.get(storage, True):
                    held[storage] = bytes_held(torch.randn(64, 1000).to(dtype), marked, storage)
            best = cheapest(64000, int(marked.sum()), dtype == torch.float32)
            assert held[best] == min(held.values()), (density, dtype, held)
            chosen.add(best)
    assert chosen == {"listed", "packed", "dense", "whole"}


def bytes_held(weight, marked, storage):
    """Beside the parameter itself, after a step."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight)
    trainable = Trainable(model, {"weight": marked}, choose=lambda *_: storage)
    (slot,) = trainable.slots.values()
    optimizer = torch.optim.AdamW(trainable.parameters())
    model.weight.square().sum().backward()
    optimizer.step()
    assert model.weight.grad is None
    shared = slot.values.data_ptr() == model.weight.data_ptr()
    held = [slot.values.grad, *(t for t in optimizer.state[slot.values].values() if t.ndim)]
    held += [] if shared else [slot.values.data]
    held += [slot.frozen] if isinstance(slot, DenseSlot) else []
    places = {CompactSlot: lambda: slot.where.nbytes, DenseSlot: lambda: slot.off.nbytes}
    return sum(t.nbytes for t in held) + places.get(type(slot), lambda: 0)()


def test_empty_mask_leaves_the_base(kind, make_pair):
    """A mask of zeros trains nothing, and `merged` gives the base back."""
    model = make_pair(kind).student.model
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = Trainable(
        model, {n: torch.zeros_like(p, dtype=torch.bool) for n, p in base.items()}
    )
    assert trainable.count == 0
    assert not any(p.requires_grad for p in model.parameters())
    merged = trainable.merged(base)
    assert all(torch.equal(merged[n], base[n]) for n in base)


def test_compact_gradients_are_the_dense_ones_gathered(kind, make_pair, make_config, make_data):
    """The compact gradient is the dense gradient at the mask, summed over micro-batches; none stays dense."""

    def gradients(mask):
        pair = make_pair(kind)
        trainable = Trainable(pair.student.model, mask)
        held = []  # after each hook of ours, the dense gradients that exist
        for p in pair.student.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(
                    lambda _: held.extend(
                        n for n, p in pair.student.model.named_parameters() if p.grad is not None
                    )
                )
        for part in (make_data(kind)[:3], make_data(kind)[3:]):
            prompts = pair.student.render(part)
            completions = sample(pair.student, prompts, 5, 0.0, columns=pair.vocabulary.student)
            tokens = pair.divergence(ReverseKL(), part, prompts, completions)
            tokens.loss.sum().backward()
        assert not held
        return {n: s.values.grad for n, s in trainable.slots.items()}

    mask = random_mask(make_pair(kind).student.model)
    dense, compact = gradients(None), gradients(mask)
    assert any(gradient is not None for gradient in compact.values())
    for name, gradient in compact.items():
        if dense[name] is None:  # LLaVA leaves its tower's last norm out
            assert gradient is None
            continue
        torch.testing.assert_close(gradient, dense[name][mask[name]], rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["listed", "packed", "dense"])
def test_masked_steps_are_dense_steps_masked_by_hand_in_float64(
    kind, storage, make_pair, make_config, make_data
):
    """Three steps from real gradients over two micro-batches equal dense AdamW in float64 whose gradient, norm,
    decay and step were multiplied by the mask."""
    config = make_config(
        kind, optim={"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    )
    optim, data = config.optim, make_data(kind, 4)
    pair = make_pair(kind)
    model = pair.student.model
    mask = random_mask(model, 0.3)
    w = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m, v = ({n: torch.zeros_like(x) for n, x in w.items()} for _ in range(2))
    trainable = Trainable(model, mask, choose=always(storage))
    optimizer = build_optimizer(optim, trainable)
    reference = make_pair(kind)  # its dense gradients at the masked run's weights
    rollouts = []
    for k in (0, 2):
        prompts = pair.student.render(data[k : k + 2])
        rollouts.append((data[k : k + 2], prompts, sampled(pair, prompts, 6, k)))
    for step in range(1, 4):
        reference.student.model.load_state_dict(model.state_dict())
        reference.student.model.zero_grad()
        trainable.zero_grad()
        for rollout in rollouts:
            pair.divergence(ReverseKL(), *rollout).loss.mean().backward()
            reference.divergence(ReverseKL(), *rollout).loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trainable.parameters()), optim.max_grad_norm)
        optimizer.step(optim.learning_rate)
        trainable.write_back()

        g = {n: torch.zeros_like(x) if (d := p.grad) is None else d.double() * mask[n]
             for (n, p), x in zip(reference.student.model.named_parameters(), w.values(), strict=True)}  # fmt: skip
        length = torch.stack([x.norm() for x in g.values()]).norm()
        assert float(norm) == pytest.approx(float(length), rel=1e-5)
        for n in w:
            if trainable.slots[n].values.grad is None:
                continue  # LLaVA leaves its tower's last norm out: torch does not step it at all
            scaled = g[n] * min(1.0, optim.max_grad_norm / float(length))
            m[n] = optim.betas[0] * m[n] + (1 - optim.betas[0]) * scaled
            v[n] = optim.betas[1] * v[n] + (1 - optim.betas[1]) * scaled**2
            adam = m[n] / (1 - optim.betas[0] ** step)
            adam = adam / ((v[n] / (1 - optim.betas[1] ** step)).sqrt() + optim.eps)
            w[n] -= optim.learning_rate * mask[n] * (optim.weight_decay * w[n] + adam)
        for n, p in model.named_parameters():
            # where a gradient is near eps, Adam's quotient magnifies the rounding of fp32
            assert float((p.detach() - w[n]).abs().max()) < 1e-3 * optim.learning_rate, n


@pytest.mark.parametrize("compute", COMPUTE)
def test_activation_checkpointing_gives_the_same_gradients(kind, compute, make_pair, make_data):
    """Recomputing the forward pass in the backward one changes no bit of a compact gradient."""
    found = []
    for recompute in (False, True):
        pair = make_pair(kind, compute)
        trainable = Trainable(pair.student.model, random_mask(pair.student.model))
        prompts = pair.student.render(make_data(kind, 2))
        completions = sampled(pair, prompts, 5)
        with recomputed(pair.student.model, recompute):
            tokens = pair.divergence(ReverseKL(), make_data(kind, 2), prompts, completions)
        tokens.loss.sum().backward()
        found.append({n: s.values.grad for n, s in trainable.slots.items()})
    for name, gradient in found[0].items():
        other = found[1][name]
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_projected_gradients_are_the_formula(side):
    """G V V^T, U U^T G, or both, with the leading singular vectors of an SVD in float64; then the mask."""
    torch.manual_seed(0)
    for shape in ((6, 9), (9, 6), (5, 2, 3)):
        early = torch.randn(shape)
        u, _, vt = torch.linalg.svd(early.flatten(1).double(), full_matrices=False)
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.randn(shape))
        factor = torch.randn(shape)
        mask = torch.rand(shape) < 0.5
        trainable = Trainable(
            model, {"weight": mask}, {"weight": update_projection(early, 2, side)}
        )
        (model.weight * factor).sum().backward()
        expected = factor.flatten(1).double()
        if side != "right":
            expected = u[:, :2] @ u[:, :2].T @ expected
        if side != "left":
            expected = expected @ vt[:2].T @ vt[:2]
        got = trainable.slots["weight"].values.grad.double()
        torch.testing.assert_close(got, expected.view(shape)[mask], rtol=1e-5, atol=1e-5)
    assert update_projection(torch.randn(4), 2, side) is None
    assert not update_projection(torch.zeros(4, 5), 2, side)(torch.randn(4, 5)).any()


def test_a_mask_of_another_model_is_refused(make_pair):
    """A foreign name or shape raises with the tensor's name."""
    model = make_pair("llm").student.model
    with pytest.raises(ValueError, match=r"nowhere\.weight"):
        Trainable(model, {"nowhere.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"lm_head\.weight.*shape"):
        Trainable(model, {"lm_head.weight": torch.ones(2, dtype=torch.bool)})


def test_merged_keeps_the_bases_bits_off_the_mask(kind, make_pair, make_config, make_data, folders):
    """Computed in bf16 and stored in fp32, frozen coordinates are still the base's fp32 bits."""
    fp32 = make_pair(kind, "fp32").student.model
    base = {n: p.detach() + 1e-4 * torch.randn_like(p) for n, p in fp32.named_parameters()}
    pair = make_pair(kind, "bf16")
    mask = random_mask(pair.student.model)
    _, trainable = train(pair, make_data(kind), make_config(kind), mask)
    merged = trainable.merged(base)
    for name in base:
        off = ~mask[name]
        assert torch.equal(merged[name][off], base[name][off])


def test_rounding_to_bf16_is_to_a_neighbour():
    """To the nearest it is torch's; at random each value goes to one of its two neighbours in bf16, to the nearer more
    often, on average to itself (4 errors over 4,000 draws); what bf16 holds stays, and the stream decides."""
    draws = torch.Generator().manual_seed(0)
    values = torch.tensor([1.001, -1.001, 3e-5, 0.3, -70000.0, 0.0, 1.5])
    assert torch.equal(rounded_to_bf16(values), values.bfloat16())
    many = rounded_to_bf16(values.repeat(4000, 1), draws).double()
    low, high = many.amin(0), many.amax(0)
    assert bool(((many == low) | (many == high)).all())
    held = values.bfloat16() == values
    assert bool((low[held] == high[held]).all()) and held.tolist() == [False] * 5 + [True] * 2
    assert bool(((low < values) & (values < high))[~held].all())
    up = low.float().bfloat16().view(torch.int16) - high.float().bfloat16().view(torch.int16)
    assert bool((up[~held].abs() == 1).all())  # no bf16 number between them
    error = many.std(0) / 4000**0.5
    assert bool(((many.mean(0) - values.double()).abs() <= 4 * error + 1e-12).all())


@pytest.mark.parametrize("density", [0.1, 0.95])
def test_values_in_bf16_lose_small_updates(density, kind, make_pair):
    """After updates of one to two hundredths of each value's last place, values rounded to the nearest are as before;
    of those rounded at random about as many have moved. Frozen coordinates keep their bits, in any storage."""
    moved = []
    for stochastic in (False, True):
        model = make_pair(kind).student.model
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with Trainable(model, random_mask(model, density)) as trainable:
            for slot in trainable.slots.values():
                slot.values.data *= 1 + 0.02 * 2**-8
            trainable.round_to_bf16("test", 1, stochastic=stochastic)
            trainable.write_back()
            assert trainable.moved_off_mask(before) == 0
            for slot in trainable.slots.values():
                assert torch.equal(slot.values.data, slot.values.data.bfloat16().float())
        changed = sum(int((before[n] != p).sum()) for n, p in model.named_parameters())
        moved.append(changed / trainable.count)
    assert moved[0] == 0 and 0.01 < moved[1] < 0.02, moved
