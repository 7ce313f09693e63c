"""The lm-eval model class: log-likelihoods equal those worked out by hand and lm-eval's own; batches change nothing."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import normalizers

from evals.lm import ArmLM, cut_at_stops, image_parts
from vlopd.types import Example


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def prompts_of(model, examples, kind):
    """(context, {"visual": [...]}) of each example, as lm-eval hands them over."""
    pictures = [{"visual": list(e.images)} for e in examples]
    texts = [model.render_text(e) for e in examples]
    return [(t, p) if kind == "vlm" else (t,) for t, p in zip(texts, pictures, strict=True)]


def test_loglikelihood_equals_a_log_softmax_by_hand(kind, make_pair, make_data):
    """For text and for pictures, and for any batch size, in fp32."""
    model, examples = make_pair(kind).student, make_data(kind)
    answers = [" red circle", " none : 0", " yes", " top-left center : 2", " blue", " nothing"]
    requests = [
        request("loglikelihood", context, answer, *visual)
        for (context, *visual), answer in zip(
            prompts_of(model, examples, kind), answers, strict=True
        )
    ]
    expected = []
    for example, answer in zip(examples, answers, strict=True):
        tokens = torch.tensor(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
        prompts = model.render([example])
        ids = torch.cat([prompts.input_ids, tokens[None]], 1)
        with torch.no_grad():
            logits = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), **prompts.per_image
            ).logits
        logprobs = logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
        expected.append(float(logprobs.gather(1, tokens[:, None]).sum()))
    for batch_size in (1, 4, 16):
        scored = ArmLM(model, batch_size).loglikelihood(requests, disable_tqdm=True)
        assert [total for total, _ in scored] == pytest.approx(expected, abs=1e-4)


def test_choices_after_a_picture_are_read_once_after_the_prompts_own_line_break(
    make_pair, make_data, monkeypatch
):
    """A prompt's line break is not repeated, and choices that share a forward pass score as those asked alone."""
    model, examples = make_pair("vlm").student, make_data("vlm")[:2]
    breaks = normalizers.Replace("\n", " none ")  # its tokenizer knows no line breaks
    monkeypatch.setattr(model.tokenizer.backend_tokenizer, "normalizer", breaks)
    choices, passes = ["\nyes", "\nblue", "\nred circle", "\nred cross"], []
    own = model.completion_hidden
    requests, expected = [], []
    for (context, picture), example in zip(
        prompts_of(model, examples, "vlm"), examples, strict=True
    ):
        for choice in choices:
            requests.append(request("loglikelihood", f"{context}\n", choice[1:], picture))
            tokens = torch.tensor(model.tokenizer(choice, add_special_tokens=False)["input_ids"])
            prompts = model.render([example])
            ids = torch.cat([prompts.input_ids, tokens[None]], 1)
            with torch.no_grad():
                logits = model.model(input_ids=ids, **prompts.per_image).logits
            logprobs = logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
            expected.append(float(logprobs.gather(1, tokens[:, None]).sum()))

    def counted(prompts, given):
        passes.append(len(given.ids))
        return own(prompts, given)

    monkeypatch.setattr(type(model), "completion_hidden", lambda self, *given: counted(*given))
    for batch_size in (1, 3, 16):
        scored = ArmLM(model, batch_size).loglikelihood(requests, disable_tqdm=True)
        assert [total for total, _ in scored] == pytest.approx(expected, abs=1e-4)
    assert passes[-1] == 4  # two pictures, each with the choices of one word and those of two


def test_text_loglikelihood_equals_lm_evals_own(make_pair, make_data):
    """On the same text model, lm-eval's HFLM gives the same log-likelihoods, rolling ones too."""
    model, examples = make_pair("llm").student, make_data("llm")
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=2, max_length=256)
    ours = ArmLM(model, 2)
    pairs = [request("loglikelihood", model.render_text(e), f" {e.answer}") for e in examples]
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(
        ours.loglikelihood(pairs, disable_tqdm=True), expected, strict=True
    ):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b
    whole = [request("loglikelihood_rolling", e.question) for e in examples]
    assert ours.loglikelihood_rolling(whole, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(whole, disable_tqdm=True), abs=1e-3
    )


def test_text_and_image_requests_in_one_call_keep_their_order(make_pair, make_data):
    """Answers come back in request order, equal to those of single calls, cut at their stop strings."""
    model = make_pair("vlm").student
    mixed = []
    for k, example in enumerate(make_data("vlm")):
        settings = {"until": ["red"], "max_gen_toks": 5 + k % 2}
        ((context, visual),) = prompts_of(model, [example], "vlm")
        if k % 2:
            blind = Example.ask("t", example.question)
            mixed.append(request("generate_until", model.render_text(blind), settings))
        else:
            mixed.append(request("generate_until", context, settings, visual))
    together = ArmLM(model, 3).generate_until(mixed, disable_tqdm=True)
    alone = [ArmLM(model, 1).generate_until([r], disable_tqdm=True)[0] for r in mixed]
    assert together == alone
    assert not any("red" in answer for answer in together)


def test_image_marks_become_image_parts():
    """lm-eval's <image> in a prompt becomes an image part where it stands; other text stays a string."""
    assert image_parts("how many") == "how many"
    assert image_parts("<image>how many") == [
        {"type": "image"},
        {"type": "text", "text": "how many"},
    ]
    assert [p["type"] for p in image_parts("a<image>b<image>")] == [
        "text",
        "image",
        "text",
        "image",
    ]
    assert cut_at_stops("a b. c", [".", "b"]) == "a "


def test_generation_ends_at_stop_strings(make_pair, make_data):
    """An answer whose stop string has come costs no more tokens, and is what cutting a whole one gives."""
    model = make_pair("llm").student
    words = ArmLM(model, 8)
    asked = prompts_of(model, make_data("llm"), "llm")
    whole = words.generate_until(
        [request("generate_until", c, {"until": [], "max_gen_toks": 64}) for (c,) in asked], True
    )
    stop = whole[0].split()[2]
    steps = []
    forward = model.model.base_model.forward
    model.model.base_model.forward = lambda *a, **k: (steps.append(1), forward(*a, **k))[1]
    try:
        settings = {"until": [stop], "max_gen_toks": 64}
        short = words.generate_until([request("generate_until", asked[0][0], settings)], True)
    finally:
        model.model.base_model.forward = forward
    assert short == [cut_at_stops(whole[0], [stop])]
    assert len(steps) <= 16
