"""Student and teacher each read their own prompt; only the completion is shared."""

import json
import shutil

import pytest
import torch
from PIL import Image

from vlopd.config import ConfigError, PairConfig
from vlopd.pair import check_vocabularies, preflight, token_logprobs
from vlopd.rollout import sample
from vlopd.types import Example


def by_hand(model, example: Example, completion: list[int]) -> torch.Tensor:
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


def test_token_kl_equals_two_separate_forward_passes(kind, make_pair, make_data):
    """With different prompts, resolutions and image-token counts, the pair's KL is the one worked out by hand."""
    pair, examples = make_pair(kind), make_data(kind)
    student_prompts, teacher_prompts = pair.student.render(examples), pair.teacher.render(examples)
    if kind == "vlm":
        assert (
            student_prompts.per_image["pixel_values"].shape
            != teacher_prompts.per_image["pixel_values"].shape
        )
        assert student_prompts.input_ids.shape != teacher_prompts.input_ids.shape
    completions = sample(pair.student, student_prompts, 6, 1.0, torch.Generator().manual_seed(0))
    ours = pair.divergence("reverse_kl", student_prompts, teacher_prompts, completions, 3).loss
    expected = []
    for k, example in enumerate(examples):
        tokens = completions.ids[k][completions.mask[k]].tolist()
        q, p = (by_hand(model, example, tokens) for model in (pair.student, pair.teacher))
        expected.append((q.exp() * (q - p)).sum(-1))
    torch.testing.assert_close(ours.detach(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_logprobs(kind, make_pair, make_data):
    """Completion log-probs are the same alone and in a padded batch, for both models."""
    pair, examples = make_pair(kind), make_data(kind)
    completions = sample(
        pair.student, pair.student.render(examples), 6, 1.0, torch.Generator().manual_seed(1)
    )
    for model in (pair.student, pair.teacher):
        together = token_logprobs(model, model.render(examples), completions, pair.shared_rows)
        for k, part in enumerate(together.split(completions.mask.sum(1).tolist())):
            tokens = completions.ids[k][completions.mask[k]]
            alone = by_hand(model, examples[k], tokens.tolist()).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(part, alone, rtol=0, atol=1e-5)


def test_both_models_see_the_image(make_pair, make_data):
    """Blanking the picture changes student's and teacher's log-probs of the same completion."""
    pair, examples = make_pair("vlm"), make_data("vlm")
    completions = sample(
        pair.student, pair.student.render(examples), 6, 1.0, torch.Generator().manual_seed(0)
    )
    blank = [Example(e.id, e.messages, (Image.new("RGB", (96, 96)),)) for e in examples]
    for model in (pair.student, pair.teacher):
        seen, blind = (
            token_logprobs(model, model.render(each), completions, pair.shared_rows)
            for each in (examples, blank)
        )
        assert float((seen - blind).abs().max()) > 1e-3


def test_the_teacher_gets_no_gradient(kind, make_pair, make_data):
    """Back-propagation reaches the student's parameters and none of the teacher's."""
    pair, examples = make_pair(kind), make_data(kind)
    prompts = pair.student.render(examples)
    completions = sample(pair.student, prompts, 4, 0.0)
    pair.divergence(
        "reverse_kl", prompts, pair.teacher.render(examples), completions, 64
    ).loss.sum().backward()
    assert all(p.grad is None for p in pair.teacher.model.parameters())
    assert any(p.grad is not None for p in pair.student.model.parameters())


def test_disagreeing_vocabularies_are_refused_before_weights_are_read(folders, tmp_path):
    """A teacher whose tokenizer gives other ids is refused with the words, though its weights are gone."""
    for role in ("student", "teacher"):
        shutil.copytree(folders["llm", role], tmp_path / role)
        (tmp_path / role / "model.safetensors").unlink()
    path = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(tokenizer))
    pair = PairConfig(student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match=r"disagree on 2 of .*'(red|blue)'"):
        check_vocabularies(pair)


def test_preflight_passes_on_a_good_pair(kind, make_pair, make_config, make_data):
    """The pre-flight finds nothing wrong with a sound pair, and asks about sight where there are images."""
    rows = preflight(make_pair(kind), make_config(kind), make_data(kind))
    assert not [row.what for row in rows if row.ok is False]
    assert ("sees the image" in [row.what for row in rows]) == (kind == "vlm")


def test_an_image_for_a_text_only_model_is_refused(make_pair, make_data):
    """A language model given a picture raises, naming the model."""
    with pytest.raises(ValueError, match="text-only"):
        make_pair("llm").student.render(make_data("vlm"))
