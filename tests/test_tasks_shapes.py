"""Multiple choice in the visual world: true answers, held-out scenes, and nothing to be had without looking."""

from collections import Counter

import pytest
import torch
from lm_eval.api.instance import Instance

from evals.harness import evaluate_arm
from evals.lm import ArmLM
from evals.scoring import Tasks, score_task
from evals.tasks import shapes_choice as task
from vlopd.config.analysis import EvalConfig
from vlopd.data import shapes, shapes_choice
from vlopd.data.shapes import ShapesDataset, scene_caption, scene_from_json
from vlopd.files import read_json, read_jsonl
from vlopd.models.load import load
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm

ROWS = shapes_choice.choice_rows(1200, 7, "test")


def test_an_ambiguous_relation_has_no_answer():
    """Of two red circles none can be named; with one of them gone it can."""
    scene = {0: ("red", "circle"), 2: ("red", "circle"), 8: ("blue", "cross")}
    question = "is red circle left-of blue cross"
    assert shapes.answer(scene, question) is None
    del scene[2]
    assert shapes.answer(scene, question) == "top-left bottom-right : yes"


def test_the_questions_are_those_of_shapes():
    """Nothing but the choices is added to the rows of the task shapes."""
    world = ShapesDataset("test", 1200, 7)
    for i in (0, 1, 500, 1199):
        assert {k: v for k, v in ROWS[i].items() if k != "choices"} == world.row(i)


def test_four_choices_one_of_them_right():
    """The choices differ, the right one is at every place alike, and none begins another, which would favour it."""
    places = Counter()
    for row in ROWS:
        choices = row["choices"]
        assert len(set(choices)) == 4
        assert not any(a != b and b.startswith(a) for a in choices for b in choices)
        places[choices.index(row["answer"])] += 1
    assert all(abs(n - 300) < 75 for n in places.values())  # five standard deviations of a binomial


def alike(choices: list[str]) -> list[int]:
    """How many words each choice shares with the others, at the same places."""
    words = [set(enumerate(choice.split())) for choice in choices]
    return [sum(len(a & b) for b in words) for a in words]


GUESSERS = {
    "resembles the others most": lambda choices: max(zip(alike(choices), choices, strict=True))[1],
    "resembles the others least": lambda choices: min(zip(alike(choices), choices, strict=True))[1],
    "longest": lambda choices: max(choices, key=len),
    "shortest": lambda choices: min(choices, key=len),
}


@pytest.mark.parametrize("name", GUESSERS)
def test_the_form_of_the_choices_does_not_tell_the_right_one(name):
    """A guesser by resemblance or length is right a quarter of the time, within five standard errors."""
    hits = sum(GUESSERS[name](row["choices"]) == row["answer"] for row in ROWS) / len(ROWS)
    assert abs(hits - 0.25) < 5 * (0.25 * 0.75 / len(ROWS)) ** 0.5


def test_chance_is_what_training_answers_are_worth():
    """Who knows the training answers but does not look gets between a quarter and a third; of colours a quarter."""
    levels = task.chance(ROWS)
    assert levels.keys() == {"all", *shapes.KINDS}
    assert 0.25 < levels["all"] < 0.33
    colours = task.chance(shapes_choice.colour_rows(600, 7, "test"))
    assert colours["all"] == pytest.approx(0.25, abs=0.05)


def test_a_colour_question_leaves_the_colour_open_alone():
    """All four colours of the shape that stands at the named place."""
    for row in shapes_choice.colour_rows(100, 7, "test"):
        colour, shape = row["answer"].split()
        cell = row["question"].split()[-1]
        assert scene_from_json(row["scene"])[shapes.CELLS.index(cell)] == (colour, shape)
        assert sorted(row["choices"]) == sorted(f"{c} {shape}" for c in shapes.COLOURS)
        assert row["kind"] == shape


def test_held_out_scenes_are_in_no_training_set():
    """No test or validation scene, in picture or in words, is drawn for training, whatever the seed; every object
    in every cell is."""
    held_out = {
        scene_caption(scene_from_json(row["scene"]))
        for split in ("test", "validation")
        for row in shapes_choice.choice_rows(300, 7, split)
    }
    seen, objects = set(), set()
    for seed in range(4):
        world = ShapesDataset("train", 800, seed)
        for i in range(800):
            scene = scene_from_json(world.row(i)["scene"])
            seen.add(scene_caption(scene))
            objects |= {(cell, *its) for cell, its in scene.items()}
    assert not held_out & seen
    assert len(objects) == 9 * len(shapes.COLOURS) * len(shapes.SHAPES)


@pytest.mark.parametrize(
    ("model", "tasks"),
    [
        ("builtin:shapes-teacher", ("shapes_choice", "shapes_colour")),
        ("builtin:shapes-text-teacher", ("shapes_choice_text",)),
    ],
)
def test_the_teachers_can_do_it(model, tasks):
    """Through lm-eval, the built-in teachers choose right nine times out of ten, from pictures and from words."""
    lm = ArmLM(load(model, torch.float32), 40, quiet=True)
    for name in tasks:
        results = score_task(lm, name, Tasks.of([name]), EvalConfig(), 20, model)
        assert results["results"][name]["acc,none"] >= 0.9
        for row in results["samples"][name]:
            assert len(row["filtered_resps"]) == 4 and row["target"] == row["doc"]["answer"]


def test_the_picture_decides():
    """The right choice is far likelier after its picture than after an empty one, and wins only there."""
    row = next(row for row in ROWS if row["kind"] == "count" and not row["answer"].endswith("0"))
    lm = ArmLM(load("builtin:shapes-teacher", torch.float32), 8, quiet=True)
    prompt = lm.apply_chat_template([{"role": "user", "content": f"<image>{row['question']}"}])
    pictures = [shapes.render(scene_from_json(row["scene"]), row["jitter"]), shapes.render({}, 0)]
    requests = [
        Instance("loglikelihood", {}, (prompt, choice, {"visual": [picture]}), 0)
        for picture in pictures
        for choice in row["choices"]
    ]
    scores = [logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    seen, blind = scores[:4], scores[4:]
    right = row["choices"].index(row["answer"])
    assert max(seen) == seen[right] > blind[right] + 1


def test_a_task_declares_its_chance_and_pictures(make_config, tmp_path):
    """An arm's results hold the chance level that the YAML names and the first pictures, and are plain JSON."""
    tasks = ("shapes_choice", "capitals")
    config = make_config(
        "vlm",
        arms={"base": {"type": "base"}},
        eval={"tasks": tasks, "limit": 3, "keep_images": 2},
    )
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "base")
    evaluate_arm(run, config, "base")
    results = read_json(run.eval("base") / "results.json")
    assert results["primary_metric"] == {"shapes_choice": "acc", "capitals": "capital_named"}
    assert 0 < results["chance"]["shapes_choice"]["all"] < 1
    assert 0 < results["chance"]["capitals"]["all"] < 0.02
    assert results["configs"]["capitals"]["metadata"].keys() >= {"version", "split"}
    assert "function" not in str(results["configs"]["shapes_choice"]["metadata"])
    kept = [row["images"] for row in read_jsonl(run.eval("base") / "samples_shapes_choice.jsonl")]
    assert [len(images) for images in kept] == [1, 1, 0]
    assert all((run.root / image).exists() for images in kept for image in images)
