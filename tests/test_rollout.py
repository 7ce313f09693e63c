"""The sampler: what it says of its samples is true, and nothing but the model and the seed decides them."""

import pytest
import torch

from tests.conftest import sampled
from vlopd.config.objective import RolloutConfig
from vlopd.models.load import load
from vlopd.seeding import uniforms
from vlopd.train.draws import draw
from vlopd.train.generation import sample


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
