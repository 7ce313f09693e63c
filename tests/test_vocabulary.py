"""Vocabularies are lined up by token strings, before any weights are read."""

import json
import shutil

import pytest
import torch

from tests.conftest import pair_of, sampled
from vlopd.config.objective import ReverseKL, RolloutConfig
from vlopd.errors import ConfigError
from vlopd.models.load import load
from vlopd.models.vocabulary import Vocabulary, share_vocabulary
from vlopd.seeding import uniforms
from vlopd.train.pair import shared_vocabulary

WORDS = ("<s>", "</s>", "red", "blue", "left", "right")


def vocabulary(words=WORDS, added=("<s>", "</s>"), ends=("</s>",), rows=None, name="m"):
    ids = {word: i for i, word in enumerate(words)}
    return Vocabulary(name, ids, frozenset(added), tuple(ends), rows or len(words))


def test_padded_rows_of_different_size_share_the_smaller():
    """Same tokens, output layers padded to 151,936 and 152,064 rows: the loss is over the common rows."""
    shared = share_vocabulary(vocabulary(rows=151_936), [vocabulary(rows=152_064)])
    assert (shared.size, shared.student, shared.teachers) == (151_936, 151_936, (151_936,))
    assert not shared.notes


def test_same_strings_under_other_ids_are_remapped():
    """The teacher's columns come in the student's order, and the notes say how many moved."""
    other = ("<s>", "</s>", "blue", "red", "left", "right")
    shared = share_vocabulary(vocabulary(), [vocabulary(other)])
    assert shared.student == 6
    assert shared.teachers[0].tolist() == [0, 1, 3, 2, 4, 5]
    assert "2 tokens have other ids" in shared.notes[0]


def test_added_tokens_of_one_model_are_left_out():
    """A placeholder that only the student has is out of the loss and cannot be sampled; others line up."""
    student = vocabulary((*WORDS[:3], "<image>", *WORDS[3:]), ("<s>", "</s>", "<image>"))
    shared = share_vocabulary(student, [vocabulary()])
    assert shared.size == 6
    assert shared.student.tolist() == [0, 1, 2, 4, 5, 6]
    assert shared.teachers == (6,)
    assert "'<image>'" in shared.notes[-1]


def test_different_ends_of_turn_are_mapped_and_said():
    """The student's end token is read by the teacher as its own, the two exchanged, no column used twice."""
    words = (*WORDS, "<|im_end|>")
    student = vocabulary(words, ("<s>", "</s>", "<|im_end|>"), ends=("<|im_end|>",))
    teacher = vocabulary(words, ("<s>", "</s>", "<|im_end|>"), ends=("</s>",))
    shared = share_vocabulary(student, [teacher])
    assert shared.teachers[0].tolist() == [0, 6, 2, 3, 4, 5, 1]
    assert "'<|im_end|>'" in shared.notes[0] and "'</s>'" in shared.notes[0]
    unknown = share_vocabulary(student, [vocabulary()])  # the teacher has no such token at all
    pairs = dict(zip(unknown.student.tolist(), [0, 2, 3, 4, 5, 1], strict=True))
    assert unknown.student.tolist() == [0, 2, 3, 4, 5, 6] and pairs[6] == 1
    columns = unknown.teachers[0]
    assert columns.tolist() == [0, 2, 3, 4, 5, 1]


def test_a_common_end_is_not_mapped():
    """Where one of the ends is common, nothing is mapped."""
    both = vocabulary(ends=("right", "</s>"))
    assert (
        share_vocabulary(both, [vocabulary()]).student == 6
        and not share_vocabulary(both, [vocabulary()]).notes
    )


def test_other_words_are_refused_with_the_first_ten():
    """Twelve ordinary tokens that only one model has: refused, the first ten by id with both ids."""
    ours = vocabulary((*WORDS, *(f"s{i}" for i in range(12))), name="ours")
    theirs = vocabulary((*WORDS, *(f"t{i}" for i in range(12))), name="theirs")
    with pytest.raises(ConfigError) as refusal:
        share_vocabulary(ours, [theirs])
    message = str(refusal.value)
    assert "disagree on 24 of 30 tokens" in message and "'s0': 6 / -" in message
    assert message.count(" / ") - 1 == 10  # one is in the words "student / teacher"


def rewrite_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer))


def test_disagreeing_vocabularies_are_refused_before_weights_are_read(
    kind, folders, make_config, tmp_path
):
    """A teacher with another word is refused with the word, though no weights are there at all."""
    for role in ("student", "teacher"):
        shutil.copytree(folders[kind, role], tmp_path / role)
        (tmp_path / role / "model.safetensors").unlink()
    rewrite_tokenizer(tmp_path / "teacher", lambda v: v.update(crimson=v.pop("red")))
    config = make_config(kind, student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match=r"disagree on 2 of .*'(red|crimson)'"):
        pair_of(config)


def permute(vocabulary):
    """Exchanges the ids of two words, and of two others."""
    for a, b in (("red", "blue"), ("how", "many")):
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def test_a_remapped_teacher_grades_as_the_unmapped_one(
    kind, folders, make_config, make_pair, make_data, tmp_path
):
    """A teacher whose ids (and embedding rows) are permuted gives the same KL, token by token."""
    other = tmp_path / "teacher"
    shutil.copytree(folders[kind, "teacher"], other)
    before = load(str(folders[kind, "teacher"]), torch.float32)
    rewrite_tokenizer(other, permute)
    after = load(str(other), torch.float32)
    ids = {w: (i, after.tokenizer.get_vocab()[w]) for w, i in before.tokenizer.get_vocab().items()}
    with torch.no_grad():
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            old, new = (getattr(m.model, layer)().weight for m in (before, after))
            for was, now in ids.values():
                new[now] = old[was].clone()
    after.model.save_pretrained(other)
    plain, mapped = make_pair(kind), pair_of(make_config(kind, teacher=str(other)))
    assert mapped.vocabulary.notes and not plain.vocabulary.notes
    examples = make_data(kind)
    results = []
    for pair in (plain, mapped):
        prompts = pair.student.render(examples)
        completions = sampled(pair, prompts, 6, 0)
        tokens = pair.divergence(ReverseKL(), examples, prompts, completions)
        (teacher,) = pair.teachers
        written = pair.teacher_sample(
            teacher,
            teacher.render(examples),
            RolloutConfig(max_new_tokens=6),
            uniforms(len(examples), 6, 1),
        )
        assert not torch.equal(written.ids, completions.ids)
        results.append(
            (
                completions.ids,
                written.ids,
                tokens.loss,
                pair.teacher_logprobs(examples, completions),
            )
        )
    (ids_a, written_a, kl_a, logprobs_a), (ids_b, written_b, kl_b, logprobs_b) = results
    assert torch.equal(ids_a, ids_b)
    assert torch.equal(written_a, written_b)  # the teacher writes the same words in other ids
    torch.testing.assert_close(kl_a, kl_b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs_a, logprobs_b, rtol=1e-4, atol=1e-5)


def test_a_student_with_a_token_more_never_samples_it(
    kind, folders, make_config, make_data, tmp_path
):
    """A token that the student alone has is not sampled, however likely, and the log-probs agree."""
    student = tmp_path / "student"
    shutil.copytree(folders[kind, "student"], student)
    loaded = load(str(student), torch.float32)
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<box>"]})
    new = loaded.tokenizer.convert_tokens_to_ids("<box>")
    loaded.model.resize_token_embeddings(new + 1)
    with torch.no_grad():
        head = loaded.model.get_output_embeddings().weight
        head[new] = 50 * head[:new].mean(0)
    loaded.model.save_pretrained(student)
    loaded.processor.save_pretrained(student)
    pair = pair_of(make_config(kind, student=str(student)))
    assert "'<box>'" in pair.vocabulary.notes[-1] and pair.vocabulary.size == new
    prompts = pair.student.render(make_data(kind))
    completions = sampled(pair, prompts, 12, 0)
    assert not bool((completions.ids == new).any())
    rescored = pair.student_logprobs(prompts, completions)
    torch.testing.assert_close(rescored, completions.logprobs[completions.mask], rtol=0, atol=1e-4)


def test_shared_vocabulary_of_the_built_in_pairs(make_config):
    """The built-in text teacher and image student share all their words: cross-modal pairs need no mapping."""
    config = make_config(
        "vlm",
        student="builtin:shapes-student",
        teacher={
            "model": "builtin:shapes-text-teacher",
            "context": {"type": "caption", "column": "caption"},
        },
    )
    shared = shared_vocabulary(config.student, config.teachers.values())
    assert isinstance(shared.student, int) and not shared.notes
