"""The sampler: what it says of its samples is true, and nothing but the model and the seed decides them."""

import pytest
import torch

from tests.conftest import sampled
from vlopd.config.objective import RolloutConfig
from vlopd.models import packed_linears
from vlopd.models.cache_size import sampler_bytes
from vlopd.models.load import load
from vlopd.seeding import uniforms
from vlopd.train import generation
from vlopd.train.allocations import Allocations
from vlopd.train.decoding import chosen_engine
from vlopd.train.draws import invert, pick, race, waiting_times
from vlopd.train.generation import sample
from vlopd.types import Prompts


def test_samplers_logprobs_equal_rescored_ones(kind, make_pair, make_data):
    """Log-probs noted while sampling with a cache equal those of one forward pass over the whole sequence."""
    pair = make_pair(kind)
    prompts = pair.student.render(make_data(kind))
    completions = sampled(pair, prompts, 8, 0)
    rescored = pair.student_logprobs(prompts, completions)
    assert float((rescored - completions.logprobs[completions.mask]).abs().max()) < 1e-4


def test_batch_and_padding_change_nothing(kind, make_pair, make_data):
    """A prompt's greedy answer and its log-probs are the same alone and in a padded batch."""
    model = make_pair(kind).student
    examples = make_data(kind)
    together = sample(model, model.render(examples), 8, 0.0)
    for k, example in enumerate(examples):
        alone = sample(model, model.render([example]), 8, 0.0)
        n = int(alone.mask.sum())
        assert int(together.mask[k].sum()) == n
        assert torch.equal(together.ids[k, :n], alone.ids[0, :n])
        torch.testing.assert_close(
            together.logprobs[k, :n], alone.logprobs[0, :n], rtol=0, atol=1e-5
        )


def test_the_seed_decides(kind, make_pair, make_data):
    """The same generator state gives the same sample; another seed another one."""
    model = make_pair(kind).student
    prompts = model.render(make_data(kind))
    first, again, other = (
        sample(model, prompts, 8, 1.0, uniforms(len(prompts), 8, seed)).ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_placeholders_and_padding_are_never_sampled(make_pair, make_data):
    """Image placeholders and padding do not occur in completions, however likely the model finds them."""
    model = make_pair("vlm").student
    banned = torch.tensor(model.unsampleable_ids)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[banned] *= 50
    completions = sample(model, model.render(make_data("vlm")), 30, 1.0, uniforms(6, 30, 0))
    assert not bool(torch.isin(completions.ids[completions.mask], banned).any())


def test_completion_ends_with_its_first_end_token(kind, make_pair, make_data):
    """The mask covers the first end token and nothing after it; `ended` says whether there was one."""
    model = make_pair(kind).student
    with torch.no_grad():
        model.model.get_output_embeddings().weight[model.end_ids[0]] *= 3
    completions = sample(model, model.render(make_data(kind)), 30, 1.0, uniforms(6, 30, 0))
    for ids, mask, ended in zip(completions.ids, completions.mask, completions.ended, strict=True):
        kept = ids[mask].tolist()
        assert (kept[-1] in model.end_ids) == bool(ended)
        assert not any(token in model.end_ids for token in kept[:-1])
        assert bool((ids[~mask] == model.pad_id).all())


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_rows_compaction_and_looks_change_nothing(kind, engine, make_pair, make_data, monkeypatch):
    """A completion is the same alone and among others, however many of a prompt, which end when, and looked at when."""
    model = make_pair(kind).student
    with torch.no_grad():
        model.model.get_output_embeddings().weight[model.end_ids[0]] *= 2
    examples, rows = make_data(kind), [0, 0, 1, 3, 3]
    prompts, numbers = model.render(examples), uniforms(len(rows), 16, 4)
    together = sample(model, prompts, 16, 1.0, numbers, rows=rows, engine=engine)
    assert len(set(together.mask.sum(1).tolist())) > 1
    monkeypatch.setitem(generation.LOOK_EVERY, "cpu", generation.CHECK_EVERY)
    rarely = sample(model, prompts, 16, 1.0, numbers, rows=rows, engine=engine)
    for name in ("ids", "mask", "ended"):
        assert torch.equal(getattr(rarely, name), getattr(together, name)), name
    for k, place in enumerate(rows):
        alone = sample(model, model.render([examples[place]]), 16, 1.0, numbers[k : k + 1])
        n = int(together.mask[k].sum())
        assert together.ids[k, :n].tolist() == alone.ids[0].tolist()
        torch.testing.assert_close(together.logprobs[k, :n], alone.logprobs[0], rtol=0, atol=1e-4)
        assert bool(together.ended[k]) == bool(alone.ended[0])


def test_packed_weights_change_rounding_alone(kind, make_pair, make_data, monkeypatch):
    """Decoding with packed weights gives the plain layers' tokens, and log-probs to rounding; nothing of it is left."""
    pair, data = make_pair(kind), make_data(kind)
    model = pair.student.model
    prompts, draws = pair.student.render(list(data)[:3]), uniforms(6, 8, "packed")
    asked = {"rows": [0, 0, 1, 1, 2, 2], "columns": pair.vocabulary.student}
    plain = sample(pair.student, prompts, 8, 1.0, draws, **asked)
    monkeypatch.setattr(packed_linears, "LEAST_WEIGHTS", 0)
    with torch.no_grad(), packed_linears.packed_linears(pair.student, 6, 8):
        assert any("forward" in vars(module) for module in model.modules())
    packed = sample(pair.student, prompts, 8, 1.0, draws, **asked)
    assert torch.equal(packed.ids, plain.ids)
    assert torch.allclose(packed.logprobs, plain.logprobs, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_that_have_enough_leave(kind, make_pair, make_data):
    """`enough` stops its rows after CHECK_EVERY tokens; the others go on as if nothing had been."""
    model = make_pair(kind).student
    prompts, numbers = model.render(make_data(kind)), uniforms(6, 20, 1)
    plain = sample(model, prompts, 20, 1.0, numbers)
    stopped = torch.tensor([True, False, True, True, False, True])
    some = sample(model, prompts, 20, 1.0, numbers, enough=lambda ids, mask: stopped)
    for k in range(6):
        limit = generation.CHECK_EVERY if stopped[k] else 20
        n = min(limit, int(plain.mask[k].sum()))
        assert some.ids[k][some.mask[k]].tolist() == plain.ids[k, :n].tolist()
        assert bool(some.ended[k]) == bool(stopped[k] or plain.ended[k])


def test_an_engine_that_cannot_be_used_falls_back_and_says_so(make_pair):
    """CUDA graphs without CUDA: eager, with the setting's name and the reason."""
    pair = make_pair("llm")
    assert chosen_engine(pair.student, "eager") == ("eager", None)
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    engine, why = chosen_engine(pair.student, "graphs")
    assert engine == "eager"
    assert why is not None and "rollout.engine" in why and "CUDA" in why
    assert pair.engine_notes(RolloutConfig(engine="graphs")) == [f"{pair.student.name}: {why}"]
    assert pair.engine_notes(RolloutConfig()) == []


def draw(logits, temperature, banned, numbers, top_k=None, top_p=1.0):
    """`pick`'s columns [B], from logits that it may not overwrite and banned columns as [V] bool."""
    columns = banned.nonzero()[:, 0]
    return pick(logits.clone(), temperature, columns, numbers, top_k, top_p)[0]


def reference(logits, temperature, banned, top_k, top_p):
    """[B, V] cumulative probabilities in float64, the truncation by a stable sort."""
    entries = logits.shape[1]
    logits = logits.masked_fill(banned, -torch.inf).double() / temperature
    ordered, columns = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ordered[:, entries if top_k is None else top_k :] = 0.0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0.0
    probabilities = torch.zeros_like(logits).scatter_(-1, columns, ordered)
    return (probabilities / probabilities.sum(-1, keepdim=True)).cumsum(-1)


@pytest.mark.parametrize(
    ("entries", "rows", "scale", "temperature", "top_k", "top_p"),
    [
        (5, 4000, 3.0, 1.0, None, 1.0),
        (300, 4000, 1.0, 0.7, None, 1.0),
        (4095, 200, 0.0, 1.0, None, 1.0),
        (4095, 200, 8.0, 1.0, None, 1.0),
        (300, 4000, 2.0, 1e-3, None, 1.0),
        (300, 4000, 2.0, 1.0, 7, 1.0),
        (300, 4000, 2.0, 0.8, 40, 0.77),
        (3000, 200, 1.0, 1.0, None, 0.9),
        (3000, 200, 5.0, 1.0, None, 0.9),
    ],
)
def test_draws_are_those_of_float64(entries, rows, scale, temperature, top_k, top_p):
    """The entry drawn is the one of a float64 inversion, or the draw is within rounding of its edge; none is banned.

    Logits are rounded to halves in every second row, so that many are equal where a truncation cuts.
    """
    made = torch.Generator().manual_seed(entries + rows)
    logits = scale * torch.randn(rows, entries, generator=made)
    logits[::2] = logits[::2].mul(2).round() / 2
    banned = torch.rand(entries, generator=made) < 0.2
    banned[0] = False
    numbers = uniforms(rows, 1, "draws", entries)[:, 0]
    numbers[0], numbers[-1] = 0.0, 1.0 - 2.0**-53
    before = logits.clone()
    drawn = draw(logits, temperature, banned, numbers, top_k, top_p)
    assert torch.equal(logits, before)
    assert not bool(banned[drawn].any())
    cumulative = reference(logits, temperature, banned, top_k, top_p)
    upper = cumulative.gather(1, drawn[:, None])[:, 0]
    lower = torch.where(
        drawn > 0, cumulative.gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0], 0.0
    )
    assert bool((upper > lower).all())  # of some mass
    assert bool(((lower - 1e-6 <= numbers) & (numbers <= upper + 1e-6)).all())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.5, 3, 0.9), (0.0, None, 1.0)]
)
def test_picked_logprobs_are_of_the_whole_distribution(temperature, top_k, top_p):
    """Log-probs count banned and truncated entries, also where almost all of the mass is banned."""
    made = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(50, 1000, generator=made)
    banned = torch.tensor([3, 77, 900])
    logits[:25, 77] += 200.0
    numbers = uniforms(50, 1, 2)[:, 0]
    column, logprobs = pick(logits.clone(), temperature, banned, numbers, top_k, top_p)
    expected = logits.double().log_softmax(-1).gather(1, column[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "temperature", "top_k", "top_p"),
    [(0.0, 1.0, None, 1.0), (8.0, 1.0, None, 1.0), (3.0, 0.7, 50, 0.9), (3.0, 1e-3, None, 1.0)],
)
def test_a_race_is_that_of_float64(scale, temperature, top_k, top_p):
    """Over a large vocabulary the entry of the least time over mass is drawn, in float64 too; none is banned or cut."""
    made = torch.Generator().manual_seed(5)
    logits = scale * torch.randn(8, 151_936, generator=made)
    banned = torch.rand(151_936, generator=made) < 0.2
    numbers = uniforms(8, 1, "race")[:, 0]
    numbers[0], numbers[-1] = 0.0, 1.0 - 2.0**-53
    drawn = draw(logits, temperature, banned, numbers, top_k, top_p)
    cumulative = reference(logits, temperature, banned, top_k, top_p)
    mass = cumulative.diff(dim=-1, prepend=torch.zeros(8, 1, dtype=torch.float64))
    rates = mass / waiting_times(numbers, 151_936).double()
    won = rates.gather(1, drawn[:, None])[:, 0]
    assert bool((mass.gather(1, drawn[:, None]) > 0).all())
    assert bool((won >= rates.amax(-1) * (1 - 1e-3)).all())


def test_waiting_times_are_independent_exponentials():
    """Mean, spread and distribution (Kolmogorov-Smirnov) of Exp(1), and no correlation of rows or of columns."""
    times = waiting_times(uniforms(100, 1, "times")[:, 0], 20_000).double()
    n = times.numel()
    assert abs(float(times.mean()) - 1) < 5 / n**0.5
    steps = torch.linspace(0, 1, n, dtype=torch.float64)
    assert float((1 - (-times.flatten().sort().values).exp() - steps).abs().max()) < 2 / n**0.5
    centred = times - 1
    rows = (centred @ centred.T / 20_000)[~torch.eye(100, dtype=torch.bool)]
    assert float(rows.abs().max()) < 6 / 20_000**0.5
    for lag in (1, 2, 256):
        assert abs(float((centred[:, :-lag] * centred[:, lag:]).mean())) < 5 / n**0.5


def test_a_races_draws_pass_a_chi_square_test_and_rounding_moves_none():
    """6,000 draws over 5,000 entries, 47 degrees of freedom; logits off by 1e-5 give the same ones but for a few."""
    entries, n = 5000, 6000
    made = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, entries, generator=made)
    probabilities = logits[0].double().softmax(-1)
    numbers = uniforms(n, 1, "chi")[:, 0]
    drawn = torch.cat([race(logits, part) for part in numbers.split(2000)])
    part = torch.arange(entries) * 8 // entries + 40
    part[probabilities.topk(40).indices] = torch.arange(40)
    expected = n * torch.zeros(48, dtype=torch.float64).index_add_(0, part, probabilities)
    observed = part[drawn].bincount(minlength=48).double()
    assert float(((observed - expected) ** 2 / expected).sum()) < 47 + 4 * (2 * 47) ** 0.5
    rounded = logits + 1e-5 * torch.randn(1, entries, generator=made)
    again = torch.cat([race(rounded, part) for part in numbers.split(2000)])
    assert int((again != drawn).sum()) <= 3


def test_draws_pass_a_chi_square_test():
    """30,000 draws over 2,000 peaked entries: the 40 most likely and the rest in 8 parts, 47 degrees of freedom."""
    entries, n = 2000, 30_000
    logits = 2 * torch.randn(1, entries, generator=torch.Generator().manual_seed(0))
    probabilities = logits[0].double().softmax(-1)
    drawn, _ = invert(logits.softmax(-1).expand(n, -1), uniforms(n, 1, "chi")[:, 0])
    part = torch.arange(entries) * 8 // entries + 40
    part[probabilities.topk(40).indices] = torch.arange(40)
    expected = n * torch.zeros(48, dtype=torch.float64).index_add_(0, part, probabilities)
    observed = part[drawn].bincount(minlength=48).double()
    assert float(((observed - expected) ** 2 / expected).sum()) < 47 + 4 * (2 * 47) ** 0.5


def test_draws_follow_the_distribution():
    """Inverse-CDF draws have the softmax's frequencies (within 5 standard errors) and never hit a banned id."""
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.5])
    n = 200_000
    banned = torch.tensor([0, 0, 0, 1, 0]).bool()
    drawn = draw(logits.expand(n, -1), 0.7, banned, uniforms(n, 1, 0)[:, 0])
    expected = torch.softmax(logits.masked_fill(banned, -torch.inf) / 0.7, -1)
    observed = drawn.bincount(minlength=5) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert bool(((observed - expected).abs() <= 5 * error).all())


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, 1.0, {2, 4}),
        (None, 0.6, {2, 4}),
        (None, 0.4, {2}),
        (3, 0.9, {1, 2, 4}),
        (9, 1.0, {0, 1, 2, 4}),
    ],
)
def test_a_cut_distribution_keeps_the_likeliest(top_k, top_p, kept):
    """top_k and then the nucleus keep the named tokens, in proportion, and banned ones never."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 1.5]])
    n = 50_000
    banned = torch.tensor([0, 0, 0, 1, 0]).bool()
    drawn = draw(logits.expand(n, -1), 1.0, banned, uniforms(n, 1, 3)[:, 0], top_k, top_p)
    probabilities = torch.softmax(logits[0].masked_fill(banned, -torch.inf), -1)
    outside = [v for v in range(5) if v not in kept]
    probabilities[outside] = 0
    expected = probabilities / probabilities.sum()
    observed = drawn.bincount(minlength=5) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert bool(((observed - expected).abs() <= 5 * error).all())
    assert set(drawn.unique().tolist()) == kept


def test_logprobs_are_the_models_own_however_tokens_are_drawn(kind, make_pair, make_data):
    """With a temperature, top-k and nucleus, sampled log-probs are still what re-scoring gives."""
    pair = make_pair(kind)
    prompts = pair.student.render(make_data(kind))
    rollout = RolloutConfig(max_new_tokens=8, temperature=0.5, top_k=5, top_p=0.9)
    completions = pair.sample(prompts, rollout, uniforms(len(prompts), 8, 0))
    rescored = pair.student_logprobs(prompts, completions)
    torch.testing.assert_close(rescored, completions.logprobs[completions.mask], rtol=0, atol=1e-4)
    plain = RolloutConfig(max_new_tokens=8)
    other = pair.sample(prompts, plain, uniforms(len(prompts), 8, 0))
    assert not torch.equal(other.ids, completions.ids)


def test_sampling_leaves_the_models_answers_to_generate(make_data):
    """Greedy sampling gives what transformers' own `generate` gives, on the built-in student."""
    student = load("builtin:shapes-student", torch.float32)
    prompts = student.render(make_data("vlm", 8))
    ours = sample(student, prompts, 12, 0.0)
    out = student.model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        **prompts.per_image,
        max_new_tokens=12,
        do_sample=False,
    )[:, prompts.input_ids.shape[1] :]
    assert student.decode(ours) == [
        text.strip() for text in student.tokenizer.batch_decode(out, skip_special_tokens=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.7}, {"top_k": 50}, {"temperature": 0.7, "top_p": 0.95}]
)
def test_the_samplers_bytes_are_those_it_holds(how, dtype, make_pair):
    """Over a wide vocabulary, the most bytes at once are sampler_bytes for each entry and row, within 10 %; the nucleus
    is of flat logits, whose entries are all sorted."""
    loaded = make_pair("llm").student
    loaded.model.resize_token_embeddings(50_000, mean_resizing=False)
    loaded.model.to(dtype)
    rollout = RolloutConfig(max_new_tokens=2, **how)
    prompts = Prompts(torch.full((32, 3), 7), torch.ones(32, 3, dtype=torch.long))
    with Allocations() as counted:
        sample(
            loaded,
            prompts,
            2,
            rollout.temperature,
            uniforms(32, 2, "sampler"),
            top_k=rollout.top_k,
            top_p=rollout.top_p,
        )
    assert counted.peak == pytest.approx(32 * 50_000 * sampler_bytes(rollout), rel=0.1)
