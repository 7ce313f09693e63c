"""Student and teachers each read their own prompt; only the completion is shared."""

import dataclasses

import pytest
import torch
from PIL import Image

from tests.conftest import sampled
from vlopd.config.objective import K1, K2, ReverseKL
from vlopd.errors import ConfigError, UserError
from vlopd.preflight.pair import preflight
from vlopd.train.pair import load_pair

KL = ReverseKL()


def by_hand(model, example, completion: list[int]) -> torch.Tensor:
    """Log-softmax at the completion's positions by one plain, unpadded forward pass. [C, V]"""
    text = model.render_text(example)
    if example.images:
        inputs = model.processor(text=[text], images=[list(example.images)], return_tensors="pt")
    else:
        inputs = model.tokenizer([text], return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([inputs["input_ids"], torch.tensor([completion])], 1)
    extra = {"pixel_values": inputs["pixel_values"]} if example.images else {}
    with torch.no_grad():
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    return logits[0, -len(completion) - 1 : -1].log_softmax(-1)


def kl_by_hand(pair, examples, completions, teacher_logprobs) -> torch.Tensor:
    """Reverse KL of every token, [N], from plain forward passes; `teacher_logprobs(example, tokens)`."""
    expected = []
    for k, example in enumerate(examples):
        tokens = completions.ids[k][completions.mask[k]].tolist()
        q, p = by_hand(pair.student, example, tokens), teacher_logprobs(example, tokens)
        expected.append((q.exp() * (q - p)).sum(-1))
    return torch.cat(expected)


def rollout(pair, examples, seed=0):
    prompts = pair.student.render(examples)
    return prompts, sampled(pair, prompts, 6, seed)


def test_token_kl_equals_two_separate_forward_passes(kind, make_pair, make_data):
    """With different prompts, resolutions and image-token counts, the pair's KL is the one worked out by hand."""
    pair, examples = make_pair(kind), make_data(kind)
    prompts, completions = rollout(pair, examples)
    (teacher,) = pair.teachers
    if kind == "vlm":
        theirs = teacher.render(examples)
        assert prompts.per_image["pixel_values"].shape != theirs.per_image["pixel_values"].shape
        assert prompts.input_ids.shape != theirs.input_ids.shape
    ours = pair.divergence(ReverseKL(chunk_tokens=3), examples, prompts, completions).loss
    expected = kl_by_hand(pair, examples, completions, lambda e, t: by_hand(teacher.loaded, e, t))
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_logprobs(kind, make_pair, make_data):
    """Completion log-probs are the same alone and in a padded batch, for both models."""
    pair, examples = make_pair(kind), make_data(kind)
    prompts, completions = rollout(pair, examples, seed=1)
    for model, together in (
        (pair.student, pair.student_logprobs(prompts, completions)),
        (pair.teachers[0].loaded, pair.teacher_logprobs(examples, completions)),
    ):
        for k, part in enumerate(together.split(completions.mask.sum(1).tolist())):
            tokens = completions.ids[k][completions.mask[k]]
            alone = by_hand(model, examples[k], tokens.tolist()).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(part, alone, rtol=0, atol=1e-5)


def test_both_models_see_the_image(make_pair, make_data):
    """Blanking the picture changes student's and teacher's log-probs of the same completion."""
    pair, examples = make_pair("vlm"), make_data("vlm")
    prompts, completions = rollout(pair, examples)
    blank = [dataclasses.replace(e, images=(Image.new("RGB", (96, 96)),)) for e in examples]
    for seen, blind in (
        (
            pair.student_logprobs(prompts, completions),
            pair.student_logprobs(pair.student.render(blank), completions),
        ),
        (
            pair.teacher_logprobs(examples, completions),
            pair.teacher_logprobs(blank, completions),
        ),
    ):
        assert float((seen - blind).abs().max()) > 1e-3


def test_the_teacher_gets_no_gradient(kind, make_pair, make_data):
    """Back-propagation reaches the student's parameters and none of the teacher's."""
    pair, examples = make_pair(kind), make_data(kind)
    prompts, completions = rollout(pair, examples)
    pair.divergence(KL, examples, prompts, completions).loss.sum().backward()
    assert all(p.grad is None for p in pair.teachers[0].loaded.model.parameters())
    assert any(p.grad is not None for p in pair.student.model.parameters())


# ------------------------------------------------------------------------- context, self, several


def test_a_text_only_teacher_needs_a_caption(make_pair, make_data, folders):
    """A language model teaches a student with eyes through a field in words, and is refused without it."""
    examples = make_data("vlm")
    teacher = str(folders["llm", "teacher"])
    with pytest.raises(ConfigError, match=r"teacher .*text-only.*teacher.context.*caption"):
        make_pair("vlm", teacher=teacher)
    blind = make_pair("vlm", teacher=teacher, data={"type": "shapes", "modality": "text"})
    with pytest.raises(UserError, match=r"text-only.*caption"):
        blind.check_teachers_prompt(examples[:1])
    told = make_pair(
        "vlm", teacher={"model": teacher, "context": {"type": "caption", "column": "caption"}}
    )
    prompts, completions = rollout(told, examples)
    ours = told.divergence(KL, examples, prompts, completions).loss

    def read(example, tokens):
        (part,) = [p for p in example.messages[-1]["content"] if p["type"] == "text"]
        assert example.fields["caption"] not in part["text"]
        text = told.teachers[0].loaded.render_text(told.teachers[0].view(example))
        assert example.fields["caption"] in text and part["text"] in text
        ids = told.student.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([ids["input_ids"], torch.tensor([tokens])], 1)
        logits = told.teachers[0].loaded.model(input_ids=ids).logits
        return logits[0, -len(tokens) - 1 : -1].log_softmax(-1)

    expected = kl_by_hand(told, examples, completions, read)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_context_reaches_the_teacher_alone(kind, make_pair, make_data):
    """Privileged text changes the teacher's log-probs and prompt; the student's stay."""
    examples = make_data(kind)
    plain = make_pair(kind)
    told = make_pair(
        kind,
        teacher={
            "model": plain.teachers[0].loaded.name,
            "context": {"type": "template", "template": "{{ answer }} {{ question }}"},
        },
    )
    prompts, completions = rollout(plain, examples)
    again, same = rollout(told, examples)
    assert torch.equal(prompts.input_ids, again.input_ids)
    assert torch.equal(completions.ids, same.ids)
    change = plain.teacher_logprobs(examples, completions) - told.teacher_logprobs(
        examples, completions
    )
    assert float(change.abs().max()) > 1e-3


def test_the_student_as_its_own_teacher_starts_at_zero(kind, make_pair, make_data):
    """`teacher = "student"` grades with the initial weights: KL 0 before training, and not after."""
    pair, examples = make_pair(kind, teacher="student"), make_data(kind)
    prompts, completions = rollout(pair, examples)
    before = pair.divergence(KL, examples, prompts, completions).loss.detach()
    assert float(before.abs().max()) < 1e-6
    with torch.no_grad():
        for p in pair.student.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    after = pair.divergence(KL, examples, prompts, completions).loss.detach()
    assert float(after.mean()) > 1e-4


def test_routed_teachers_grade_their_own_examples(kind, make_pair, make_data, folders):
    """Each example's loss, the sampled token's too, is against the teacher that its field names, in any order."""
    examples = [
        dataclasses.replace(e, fields={**e.fields, "domain": "ab"[k % 2]})
        for k, e in enumerate(make_data(kind))
    ]
    plan = {
        "type": "routed",
        "field": "domain",
        "teachers": {"a": str(folders[kind, "teacher"]), "b": str(folders[kind, "student"])},
    }
    pair = make_pair(kind, teacher=plan)
    prompts, completions = rollout(pair, examples)
    ours = pair.divergence(ReverseKL(chunk_tokens=4), examples, prompts, completions).loss

    def graded(example, tokens):
        return by_hand(pair.teachers["ab".index(example.fields["domain"])].loaded, example, tokens)

    expected = kl_by_hand(pair, examples, completions, graded)
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-5)
    at_tokens = pair.student_logprobs(prompts, completions)
    at_tokens = at_tokens - pair.teacher_logprobs(examples, completions)
    for loss, expected in ((K1(chunk_tokens=4), at_tokens), (K2(), at_tokens**2 / 2)):
        ours = pair.divergence(loss, examples, prompts, completions).loss.detach()
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    lost = dataclasses.replace(examples[0], fields={"domain": "c"})
    with pytest.raises(UserError, match=f"{lost.id}.*'c'.*a, b"):
        pair.divergence(ReverseKL(chunk_tokens=4), [lost, *examples[1:]], prompts, completions)


def test_mixed_teachers_are_a_geometric_mean(kind, make_pair, make_data, folders):
    """log p of a mixture is the weighted mean of the members' log-probs, normalised; chunks do not matter."""
    plan = {
        "type": "mixed",
        "teachers": {"a": str(folders[kind, "teacher"]), "b": str(folders[kind, "student"])},
        "weights": {"a": 3.0, "b": 1.0},
    }
    pair, examples = make_pair(kind, teacher=plan), make_data(kind)
    prompts, completions = rollout(pair, examples)
    first, second = (teacher.loaded for teacher in pair.teachers)

    def graded(example, tokens):
        mixed = 0.75 * by_hand(first, example, tokens) + 0.25 * by_hand(second, example, tokens)
        return mixed.log_softmax(-1)

    expected = kl_by_hand(pair, examples, completions, graded)
    for chunk in (3, 1000):
        ours = pair.divergence(ReverseKL(chunk_tokens=chunk), examples, prompts, completions).loss
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-5)


def test_arms_must_say_which_of_several_teachers(kind, make_config, folders):
    """With two teachers, a teacher arm without a name is refused, and so is a name that there is not."""
    teachers = {"a": str(folders[kind, "teacher"]), "b": str(folders[kind, "student"])}
    plan = {"type": "mixed", "teachers": teachers}
    with pytest.raises(ValueError, match=r"arms\.teacher\.teacher.*'a', 'b'"):
        make_config(kind, teacher=plan, arms={"teacher": {"type": "teacher"}})
    with pytest.raises(ValueError, match=r"names 'c'"):
        make_config(kind, teacher=plan, arms={"teacher": {"type": "teacher", "teacher": "c"}})


# ---------------------------------------------------------------------------------------- pre-flight


def test_preflight_passes_on_a_good_pair(kind, make_pair, make_config, make_data):
    """The pre-flight finds nothing wrong with a sound pair, and asks about sight where there are images."""
    rows = preflight(make_pair(kind), make_config(kind), make_data(kind))
    assert not [row.what for row in rows if row.ok is False]
    assert ("sees the image" in [row.what for row in rows]) == (kind == "vlm")


def test_preflight_catches_a_blind_teacher(make_pair, make_config, make_data):
    """A teacher whose projector passes nothing on fails the sight row, with a remedy."""
    pair = make_pair("vlm")
    with torch.no_grad():
        for name, p in pair.teachers[0].loaded.model.named_parameters():
            if "projector.linear_2" in name:
                p.zero_()
    (row,) = [
        row
        for row in preflight(pair, make_config("vlm"), make_data("vlm"))
        if row.what == "sees the image"
    ]
    assert row.ok is False and row.remedy


def test_an_image_for_a_text_only_model_is_refused(make_pair, make_data):
    """A language model given a picture raises, naming the model."""
    with pytest.raises(ConfigError, match="text-only"):
        make_pair("llm").student.render(make_data("vlm"))


def test_fixed_teachers_are_kept_and_others_are_not(kind, folders):
    """`load_pair(kept=...)` reuses the same teacher at the same precision, frees it for another, loads the student
    anew, and never keeps a moving average of the student."""
    student, teacher = (str(folders[kind, role]) for role in ("student", "teacher"))
    kept = {}
    first, again = (load_pair(student, teacher, compute="fp32", kept=kept) for _ in range(2))
    assert first.teachers[0].loaded.model is again.teachers[0].loaded.model
    assert first.student.model is not again.student.model
    other = load_pair(student, teacher, compute="bf16", kept=kept).teachers[0].loaded.model
    assert other is not again.teachers[0].loaded.model
    assert [loaded.model for loaded in kept.values()] == [other]
    context = {"type": "template", "template": "{{ answer }} {{ question }}"}
    itself = {"model": "student", "context": context}
    for ema in (None, 0.9):
        pair = load_pair(student, {**itself, **({"ema": ema} if ema else {})}, kept=kept)
        assert len(kept) == (ema is None)
        assert pair.teachers[0].loaded.model is not pair.student.model
