"""The visual world: deterministic, split by content, answerable, and the shipped pair does what its cards say."""

import dataclasses
import hashlib
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from scripts import build_builtin
from vlopd.data import shapes
from vlopd.models.load import BUILTIN


def test_example_depends_on_split_seed_and_index_alone():
    """The same index gives the same question and the same pixels; another seed does not."""
    a, b, c = (shapes.ShapesDataset("train", 5, seed)[3] for seed in (0, 0, 1))
    assert a.fields == b.fields and a.images[0].tobytes() == b.images[0].tobytes()
    assert a.fields != c.fields


def test_splits_share_no_scene():
    """No scene of the test or validation split occurs in training, whatever the seed."""
    scenes = {
        split: {
            shapes.ShapesDataset(split, 500, seed).row(i)["scene"]
            for seed in (0, 1)
            for i in range(500)
        }
        for split in ("train", "validation", "test")
    }
    assert not scenes["train"] & scenes["test"]
    assert not scenes["train"] & scenes["validation"]
    assert not scenes["validation"] & scenes["test"]


def test_answers_are_true():
    """Answers of every kind agree with a second look at the scene, over 400 questions."""
    world = shapes.ShapesDataset("train", 400)
    for i in range(400):
        row = world.row(i)
        objects = json.loads(row["scene"])
        words, answer = row["question"].split(), row["answer"]
        if row["kind"] == "count":
            cells = [cell for cell, pair in objects.items() if words[-1] in pair]
            assert answer == f"{' '.join(cells) or 'none'} : {len(cells)}"
        elif row["kind"] == "exist":
            assert answer.endswith("yes" if words[1:] in objects.values() else "no")
        elif row["kind"] == "attribute":
            assert answer == " ".join(objects.get(words[-1], ["nothing"]))
        elif row["kind"] == "compare":
            n = {c: sum(pair[0] == c for pair in objects.values()) for c in (words[1], words[3])}
            assert answer.split()[1::2][:2] == [str(n[words[1]]), str(n[words[3]])]
            more = max(n, key=n.get) if len(set(n.values())) > 1 else "equal"
            assert answer.endswith(f" : {more}")
        elif row["kind"] == "row":
            cells = [cell for cell in shapes.CELLS if words[1] in cell.split("-")]
            assert answer == " , ".join(" ".join(objects.get(cell, ["nothing"])) for cell in cells)
        elif row["kind"] == "relation":
            a, b = (
                next(c for c in objects if objects[c] == pair) for pair in (words[1:3], words[4:])
            )
            i, j = shapes.CELLS.index(a), shapes.CELLS.index(b)
            held = {"left-of": i % 3 < j % 3, "right-of": i % 3 > j % 3}
            held |= {"above": i // 3 < j // 3, "below": i // 3 > j // 3}
            assert answer == f"{a} {b} : {'yes' if held[words[3]] else 'no'}"


def test_every_word_is_in_the_vocabulary():
    """Questions, answers and scenes in words use known words only."""
    known = set(shapes.vocabulary())
    world = shapes.ShapesDataset("test", 300, modality="text")
    assert all(set(f"{e.question} {e.answer}".split()) <= known for e in world)


def test_a_picture_is_96_pixels_and_differs_with_jitter():
    """Rendering is exact for a seed and varies with it."""
    scene = {0: ("red", "circle"), 8: ("blue", "cross")}
    one, same, other = (shapes.render(scene, jitter) for jitter in (1, 1, 2))
    assert one.size == (96, 96)
    assert one.tobytes() == same.tobytes() != other.tobytes()


STREAM = {
    "image": "5d8e8acdf86a9591fdfae8063412bbd2cc49f4fd4cf517c2cd74f4cc3de5db50",
    "text": "e522561ec63d8391ff1f20dd87dfa82428f745135f24158927139f4631eaf04c",
}
"""Digests of 50 examples, taken before examples had captions."""


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_stream_of_examples_stays_as_it_was(modality):
    """Ids, messages, answers, fields but the caption, and pixels of a seed are those of earlier versions."""
    digest = hashlib.sha256()
    for e in shapes.ShapesDataset("train", 50, 7, modality):
        fields = sorted((key, value) for key, value in e.fields.items() if key != "caption")
        digest.update(repr((e.id, e.messages, e.answer, fields)).encode())
        for image in e.images:
            digest.update(image.tobytes())
    assert digest.hexdigest() == STREAM[modality]


def test_a_caption_says_what_the_text_modality_says():
    """A picture's caption before its question is the text example of the same index, word for word."""
    seen, told = (shapes.ShapesDataset("train", 50, 2, modality) for modality in ("image", "text"))
    for a, b in zip(seen, told, strict=True):
        assert f"{a.fields['caption']} {a.question}" == b.question
        assert "caption" not in b.fields


@pytest.mark.parametrize(
    "path", sorted(BUILTIN.glob("*/*")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_builtin_files_are_the_shipped_ones(path):
    """Every file of the built-in models has its recorded digest."""
    digests = json.loads((BUILTIN / "digests.json").read_text())
    assert (
        digests[f"{path.parent.name}/{path.name}"] == hashlib.sha256(path.read_bytes()).hexdigest()
    )


def test_builtin_models_stay_small():
    """All built-in models together take at most 16 MB."""
    assert sum(p.stat().st_size for p in BUILTIN.glob("*/*")) <= 16_000_000


def test_the_harder_student_is_built_the_same_twice_and_scored_on_validation(tmp_path):
    """Two small steps of its recipe give the same bits twice, a folder that loads, and no test score."""
    name = "shapes-early-student"
    whole = build_builtin.UNSHIPPED[name]
    recipe = dataclasses.replace(whole, steps=2, images_per_step=2)
    (model, processor), (again, _) = (
        build_builtin.train(name, recipe, build_builtin.build_tokenizer()) for _ in range(2)
    )
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    build_builtin.save(name, recipe, model, processor, tmp_path, n=8)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))
    card = (tmp_path / name / "README.md").read_text()
    assert "validation split" in card and "test split" not in card
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing unfinished
    assert whole.palette == shapes.STUDENTS_COLOURS  # the teacher's are what it has to learn
