"""Benchmarks of mathematics on images, from rows of ours in the hub's schema: prompt, pictures, answer and score."""

import pytest
from datasets import Features, Image, List, Value
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from evals.scoring import TASKS
from evals.tasks.benchmarks import visual_mathematics as tasks
from evals.tasks.benchmarks.visual_mathematics import BENCHMARKS, MATHVERSE
from tests.benchmark_rows import Said, local_copies, picture, save
from vlopd.errors import ConfigError, DataError

RED, BLUE = picture("red"), picture("blue")
TEXT, NUMBER = Value("string"), Value("int64")


def typed(**types):
    """Features of text columns, but for those given."""
    return Features({name: types[name] or TEXT for name in types})


VERSE = dict.fromkeys(
    ("sample_index", "problem_index", "problem_version", "question", "image", "answer", "question_type",
     "metadata", "query_wo", "query_cot", "question_for_eval")
)  # fmt: skip
VERSE |= {"metadata": {part: TEXT for part in ("split", "source", "subject", "subfield")}}
VISION = typed(id=None, question=None, options=List(TEXT), image=None, decoded_image=Image(), answer=None,
               solution=None, level=NUMBER, subject=None)  # fmt: skip
FEATURES = {
    **{name: typed(**VERSE | {"image": None if name.endswith("text_only") else Image()}) for name in MATHVERSE},
    "mathvision": VISION,
    "mathvision_testmini": VISION,
    "wemath": Features(
        {"ID": TEXT, "split": TEXT, "knowledge concept": TEXT, "question": TEXT, "option": TEXT, "answer": TEXT,
         "image_path": Image(), "key": TEXT, "question number": NUMBER, "knowledge concept description": TEXT}
    ),
    "dynamath": typed(id=None, question=None, image=None, decoded_image=Image(), ground_truth=None,
                      answer_type=None, subject=None, knowledge_level=None, question_id=NUMBER),
    "logicvista": typed(id=None, question=None, answer=None, reasoning=None, image=Image(), skill=List(TEXT),
                        broad_capability=List(TEXT), specific_capability=List(TEXT), imagesource=None,
                        sourcelink=None, liscenced=None),
    "mmk12": typed(id=None, question=None, answer=None, subject=None, image=Image()),
}  # fmt: skip


def mathverse(version):
    """Four problems in one of the versions; Vision Only has no question, Text Only no picture."""
    problems = [
        (
            "Angle A is 50. What is angle B?\nChoices:\nA:40°\nB:50°\nC:130°\nD:140°",
            "C",
            "multi-choice",
        ),
        ("A rectangle is 5 by 2.5. Find its area.", r"Area $=12.5 \mathrm{~cm}^{2}$", "free-form"),
        ("Which two are equal?\nChoices:\nA. x\nB. 2x\nC. x/1", "A\nC", "multi-choice"),
        ("True or false: it is a square.\nChoice:\nA. True\nB. False", "False", "multi-choice"),
    ]
    return [
        {"sample_index": str(k), "problem_index": str(k), "problem_version": version,
         "question": "" if version == "Vision Only" else asked,
         "image": "" if version == "Text Only" else (RED, BLUE)[k % 2],
         "answer": answer, "question_type": kind,
         "metadata": {"split": "testmini", "source": "ours", "subject": "Plane Geometry", "subfield": "Angle"},
         "query_wo": "", "query_cot": "", "question_for_eval": asked}
        for k, (asked, answer, kind) in enumerate(problems)
    ]  # fmt: skip


def vision(number, question, options, answer):
    return {"id": str(number), "question": f"{question}\n<image1>", "options": options, "answer": answer,
            "image": f"images/{number}.jpg", "decoded_image": RED, "solution": None, "level": 3,
            "subject": "algebra"}  # fmt: skip


def step(problem, key, answer, option="A. 12;B. 14; C. 16; D. No correct answer"):
    return {"ID": problem, "split": "testmini", "knowledge concept": "Area of Circles", "key": key,
            "question": f"What is the result of {key}?", "option": option, "answer": answer, "image_path": BLUE,
            "question number": 7, "knowledge concept description": "Area of Circles: pi r^2"}  # fmt: skip


def variant(seed, number, question, answer, kind):
    return {"id": seed, "question": question, "image": "images/1.png", "decoded_image": RED, "ground_truth": answer,
            "answer_type": kind, "subject": "statistics", "knowledge_level": "high school",
            "question_id": number}  # fmt: skip


def puzzle(number, question, answer, skill="inductive"):
    return {"id": f"v1_{number}", "question": question, "answer": answer, "reasoning": "", "image": RED,
            "skill": [skill], "broad_capability": ["diagram"], "specific_capability": ["sequence pattern"],
            "imagesource": "ours", "sourcelink": "", "liscenced": "false"}  # fmt: skip


VISION_ROWS = [
    vision(1, "How much is a third?", [r"$\frac{1}{2}$", r"$\frac{1}{3}$", "$3$"], "B"),
    vision(2, "Which figure is next?", ["A", "B", "C", "D", "E"], "D"),
    vision(3, "What is the share?", [], r"$\boxed{\frac{36}{13}}$"),
    vision(4, "How many cubes?", [], "60"),
]
SCHOOL = {"id": "1f2e", "subject": "physics", "image": BLUE}
ROWS = {
    **{name: mathverse(version) for name, version in MATHVERSE.items()},
    "mathvision": VISION_ROWS,
    "mathvision_testmini": VISION_ROWS,
    "wemath": [
        step("2steps_1", "2steps_1", "A"),
        step("3steps_9", "3steps_1", "A", "A. 1; B. 2"),
        step("2steps_1", "2steps_2", "B"),
        step("2steps_1", "2steps_multi", "C"),
        step("3steps_9", "3steps_2", "B", "A. 1; B. 2"),
        step("3steps_9", "3steps_3", "A", "A. 1; B. 2"),
        step("3steps_9", "3steps_multi", "B", "A. 1; B. 2"),
        step("2steps_2", "2steps_1", "A"),
        step("2steps_2", "2steps_2", "B"),
        step("2steps_2", "2steps_multi", "C"),
    ],
    "dynamath": [
        variant("1", 0, "What is the period of this function?", "2.094", "float"),
        variant("1", 501, "What is the period of this function?", "6.283", "float"),
        variant("2", 1, "Is it even? choice: (A) Yes (B) No", "B", "multiple choice"),
        variant("2", 502, "Is it even? choice: (A) Yes (B) No", "A", "multiple choice"),
        variant("3", 2, "Which date is it?", "12/12/2011", "text"),
        variant("3", 503, "Where is the point?", "(0.886, -0.465)", "text"),
    ],
    "logicvista": [
        puzzle(0, "How many are next? Select from A, B and C. (A) 10 (B) 12 (C) 14", "C"),
        puzzle(1, "Which choices (A-E) belong to the green category?", "A, C"),
        puzzle(2, "Which is correct? Select from 1-5", "3", "deductive"),
        puzzle(3, "", ""),
        puzzle(4, "Which figure is a rotation of the object?", "B", "spatial"),
    ],
    "mmk12": [
        {**SCHOOL, "question": "The current is ( ).\nA. $$1$$ A\nB. $$2$$ A\nC. $$3$$ A\nD. $$4$$ A", "answer": "B"},
        {**SCHOOL, "question": "Which gas is it?\nA. oxygen\nB. neon\nC. argon\nD. helium", "answer": "D"},
        {**SCHOOL, "question": "What moves?\nA. the cart\nB. the wall\nC. both\nD. neither", "answer": "A"},
    ],
}  # fmt: skip
"""Written for these tests, with all columns that the hub's data sets have."""

VERSE_SAID = [r"It is $\boxed{\text{C}}$.", "The answer is 12.4", r"\boxed{A, C}", "hard to tell"]
VISION_SAID = [r"\boxed{\frac13}", "**Answer:** D", r"about \boxed{2.77}", "no idea"]
SAID = {
    **dict.fromkeys(MATHVERSE, VERSE_SAID),
    "mathvision": VISION_SAID,
    "mathvision_testmini": VISION_SAID,
    "wemath": ["A", "A", "B", "D", "A", "A", "B", "C", "B", "A"],
    "dynamath": [r"\boxed{2.0943}", r"\boxed{2\pi}", "(B)", "No", "12", r"\boxed{(0.886,-0.465)}"],
    "logicvista": ["The answer is 14.", "Answer: A and C", r"\boxed{2}", "It is hard to see"],
    "mmk12": ["So the answer is B.", "argon", "both move, or neither"],
}
EXPECTED = {
    **dict.fromkeys(MATHVERSE, ([1, 0, 1, 0], [0, 0, 0, 1])),
    "mathvision": ([1, 1, 1, 0], [0, 0, 0, 1]),
    "mathvision_testmini": ([1, 1, 1, 0], [0, 0, 0, 1]),
    "wemath": ([1, 1, 1, 0, 0, 1, 1, 0, 1, 0], [0] * 10),
    "dynamath": ([1, 1, 1, 0, 1, 0], [0] * 6),
    "logicvista": ([1, 1, 0, 0], [0, 0, 0, 1]),
    "mmk12": ([1, 0, 0], [0, 0, 1]),
}
"""Right, and without an answer, question by question."""
ANSWERS = {
    **{name: ["C", r"Area $=12.5 \mathrm{~cm}^{2}$", "A, C", "B"] for name in MATHVERSE},
    "mathvision": ["B", "D", r"\frac{36}{13}", "60"],
    "mathvision_testmini": ["B", "D", r"\frac{36}{13}", "60"],
    "wemath": ["A", "A", "B", "C", "B", "A", "B", "A", "B", "C"],
    "dynamath": ["2.094", "6.283", "B", "A", "12/12/2011", "(0.886, -0.465)"],
    "logicvista": ["C", "A, C", "C", "B"],
    "mmk12": ["B", "D", "A"],
}


def copy(folder, name, rows, features=None):
    """A local copy of a benchmark under the hub's file names."""
    start = BENCHMARKS[name].files or BENCHMARKS[name].split
    return save(folder, name, rows, start, features or FEATURES[name])


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of all benchmarks, where VLOPD_BENCHMARKS says they are."""
    with local_copies(tmp_path_factory.mktemp("benchmarks"), ROWS, copy) as folder:
        yield folder


@pytest.fixture(scope="module")
def scored(copies):
    """lm-eval's results of the prepared answers on every benchmark, MathVerse as a group, and the model."""
    lm = Said(SAID)
    alone = [f"vlopd_{name}" for name in BENCHMARKS if name not in MATHVERSE]
    names = ["vlopd_mathverse", "vlopd_mathverse_text_only", *alone]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0), lm


def documents_of(scored, name):
    rows = scored[0]["samples"][f"vlopd_{name}"]
    return [row["doc"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_every_benchmark_has_rows_answers_and_a_task():
    """No benchmark of the module is left out here."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    names = {*BENCHMARKS}
    assert names == {*ROWS} == {*SAID} == {*EXPECTED} == {*ANSWERS} == {*FEATURES}
    assert {f"vlopd_{name}" for name in names} <= set(manager.all_tasks)


@pytest.mark.parametrize("name", SAID)
def test_right_wrong_and_missing_answers(name, scored):
    """Through lm-eval, accuracy per row comes first, and a response without an answer is an extraction failure."""
    results, _ = scored
    task = f"vlopd_{name}"
    samples = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    primary, *_ = results["higher_is_better"][task]
    right, missing = EXPECTED[name]
    assert primary == "acc"
    assert [row["acc"] for row in samples] == right
    assert [row["extraction_failure"] for row in samples] == missing
    assert [row["doc"]["answer"] for row in samples] == ANSWERS[name]
    assert results["results"][task]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_the_official_score_is_first_and_a_careful_one_second(scored):
    """2.77 is 36/13 to two decimals, "12" is within the reference of DynaMath, and spaces in a point are neither."""
    for name, careful in (("mathvision", [1, 1, 0, 0]), ("dynamath", [1, 1, 1, 0, 0, 1])):
        samples = sorted(scored[0]["samples"][f"vlopd_{name}"], key=lambda row: row["doc_id"])
        assert [row["careful"] for row in samples] == careful


def test_a_dynamath_question_counts_in_the_worst_case_if_every_variant_is_right(scored):
    """One of three questions has all of its variants right."""
    results = scored[0]["results"]["vlopd_dynamath"]
    assert results["worst_case_acc,none"] == pytest.approx(1 / 3)
    assert results["acc,none"] == pytest.approx(4 / 6)
    assert tasks.worst_case_acc([["a", 1.0], ["b", 1.0], ["a", 0.5]]) == 0.75


def test_the_four_dimensions_of_wemath(scored):
    """2steps_1: steps right, problem wrong (IG). 3steps_9: right with a wrong step (RM). 2steps_2: both wrong (IK)."""
    results = scored[0]["results"]["vlopd_wemath"]
    expected = {
        "score_strict": 1 / 6,
        "score_loose": 1 / 2,
        "insufficient_knowledge": 1 / 3,
        "inadequate_generalization": 1 / 3,
        "complete_mastery": 0,
        "complete_mastery_loose": 1 / 3,
        "rote_memorization": 1,
        "rote_memorization_loose": 0,
    }
    assert {metric: results[f"{metric},none"] for metric in expected} == pytest.approx(expected)
    assert {*expected} == {*tasks.WEMATH}
    incomplete = [("2steps_1", "2steps_1", 1.0), ("2steps_1", "2steps_multi", 1.0)]
    assert tasks.score_strict(incomplete) == tasks.rote_memorization(incomplete) == 0.0


def test_groups_of_mathverse_are_means_over_their_questions(scored):
    """All pictured versions, of which the Vision versions are the vision-dependent part."""
    group = scored[0]["results"]["vlopd_mathverse"]
    assert group["acc,none"] == pytest.approx(0.5) and group["sample_len"] == 20
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    members = manager.task_index["vlopd_mathverse_vision_dependent"].cfg["task"]
    assert members == [f"vlopd_{name}" for name in MATHVERSE if "_vision_" in name]


def test_prompts_hold_as_many_marks_as_pictures(scored):
    """Questions are as published, choices listed once, and nothing of a question that is only in the picture."""
    lm = scored[1]
    for (name, _), request in lm.asked.items():
        prompt, shown = request.args[0], (request.args[2:] or ({"visual": []},))[0]["visual"]
        assert prompt.count("<image>") == len(shown) == (name != "mathverse_text_only"), name
        assert all(image.size == (40, 32) for image in shown)
        assert r"\boxed{}" in prompt
    asked = {key: request.args[0] for key, request in lm.asked.items()}
    assert asked["mathverse_vision_only", 0].startswith("<image>The question is in the image.\n\n")
    assert "Angle" not in asked["mathverse_vision_only", 0]
    assert asked["mathverse_text_lite", 0].startswith("<image>Angle A is 50.")
    assert asked["mathvision", 0].startswith(
        "<image>How much is a third?\n<image1>\nA. $\\frac{1}{2}$\nB. $\\frac{1}{3}$\nC. $3$\n\n"
    )
    assert "\nA. A" not in asked["mathvision", 1]
    assert "\nA. 12;B. 14; C. 16; D. No correct answer\n" in asked["wemath", 0]
    assert asked["mmk12", 0].count("A. $$1$$ A") == 1
    assert asked["logicvista", 3].startswith("<image>Which figure is a rotation")


def test_clusters_kinds_and_chance(scored):
    """Rows of one problem are a cluster; the choices are counted where the question or the picture names them."""
    samples = {name: documents_of(scored, name) for name in BENCHMARKS}
    for name in MATHVERSE:
        assert [doc["cluster"] for doc in samples[name]] == [f"problem {k}" for k in range(4)]
    assert [doc["cluster"] for doc in samples["dynamath"]] == ["1", "1", "2", "2", "3", "3"]
    assert [doc["cluster"] for doc in samples["wemath"]][:3] == ["2steps_1", "3steps_9", "2steps_1"]
    assert [doc["kind"] for doc in samples["wemath"]][2:7] == [
        "one step", "two steps", "one step", "one step", "three steps",
    ]  # fmt: skip
    assert len({doc["cluster"] for doc in samples["mathvision"]}) == 1  # the same picture
    assert [doc["kind"] for doc in samples["logicvista"]] == [
        "inductive", "inductive", "deductive", "spatial",
    ]  # fmt: skip
    assert [len(doc["choices"]) for doc in samples["logicvista"]] == [3, 5, 5, 4]
    assert tasks.chance(samples["mathverse_text_lite"])["all"] == pytest.approx(
        (1 / 4 + 0 + 1 / 3 + 1 / 2) / 4
    )


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which? choice: (A) Yes (B) No", ["Yes", "No"]),
        ("What is it at point A. Here?\nChoices:\nA:4\nB:5\nC:6", ["4", "5", "6"]),
        ("A. 4 B. 3 C. 2 ;D. 1; E. No correct answer", ["4", "3", "2", "1", "No correct answer"]),
        ("(If equal, mark C.) Select from A, B, and C  (A)  A  (B)  B (C) C", ["A", "B", "C"]),
        ("Which figure is a rotation of the object?", []),
    ],
)
def test_options_are_read_from_a_question(question, options):
    """In the notations of We-Math, MathVerse, DynaMath, LogicVista and MMK12."""
    assert tasks.options_in(question) == options


@pytest.mark.parametrize(
    ("gold", "read"),
    [
        ("\x0crac{36}{13}", r"\frac{36}{13}"),
        (r"\frac{360}7", r"\frac{360}{7}"),
        (r"8\sqrt{3}{squareinches}", r"8\sqrt{3}"),
        (r"$\frac{90}{23}^{\circ}$", r"\frac{90}{23}"),
        ("11 ", "11"),
    ],
)
def test_slips_in_mathvisions_answers_are_read(gold, read):
    """Answers of the published file that are not LaTeX as they stand."""
    assert tasks.published_math(gold) == read and tasks.value_of(read) is not None


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        ("A and C", "A, C"),
        (r"\boxed{\text{(C), (A)}}", "A, C"),
        ("Answer: B, since A and C are equal", "B"),
        ("a triangle, as in A and a square as in B", None),
        (r"so it is \boxed{\frac{2}{4}}", "B"),
        ("<think>A, C</think>B", "B"),
    ],
)
def test_letters_of_a_response(said, letters):
    """Several letters only where they are the whole answer; an article is no choice; a value is its option."""
    assert tasks.letters_of(said, ["A", "$\\frac12$", "C"]) == letters


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mathverse_text_lite", {"problem_version": "Vision Only"}, "'problem_version' is 'Vision Only'; this task"),
        ("mathverse_text_lite", {"question": ""}, "column 'question' holds '' in place of text"),
        ("mathverse_vision_only", {"image": None}, "column 'image' has no picture"),
        ("mathvision", {"answer": "four"}, "answer 'four' is neither a letter nor among the choices"),
        ("wemath", {"key": "4steps_1"}, "column 'key' is '4steps_1'; it is one of 2steps_1"),
        ("dynamath", {"ground_truth": "two"}, "column 'ground_truth' is 'two' in place of a number"),
        ("dynamath", {"answer_type": "essay"}, "column 'answer_type' is 'essay'; it is one of float"),
        ("logicvista", {"answer": ""}, "column 'answer' holds '' in place of text"),
        ("mmk12", {"answer": "none"}, "answer 'none' is neither a letter nor among the choices"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(name, change, message, tmp_path, monkeypatch):
    """One line with the file, the row and the column."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    rows = [{**ROWS[name][0], **change}, *ROWS[name][1:]]
    copy(tmp_path, name, rows)
    with pytest.raises(DataError, match=rf"row 0 \(from 0\): .*{message}") as error:
        tasks.dataset(name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_column_is_named(name, tmp_path, monkeypatch):
    """The column, the file and what columns it has, in one line."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    column = BENCHMARKS[name].columns[-1]
    rows = [{c: v for c, v in row.items() if c != column} for row in ROWS[name]]
    features = Features({c: kind for c, kind in FEATURES[name].items() if c != column})
    copy(tmp_path, name, rows, features)
    with pytest.raises(ConfigError, match=f"has no column '{column}'; it has") as error:
        tasks.dataset(name)
    assert f"{tmp_path / name}" in str(error.value)


def test_a_split_is_not_another_whose_name_begins_alike(tmp_path, monkeypatch):
    """MathVision's folder on the hub holds test and testmini."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    for split in ("test", "testmini"):
        save(tmp_path, "mathvision", VISION_ROWS, split, VISION)
    assert len(tasks.dataset("mathvision")["test"]) == len(VISION_ROWS)


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("12.5", r"Area $=12.5 \mathrm{~cm}^{2}$", 1),
        (r"Area $= 12.5 \text{ cm}^2$", r"Area $=12.5 \mathrm{~cm}^{2}$", 1),
        ("452.389", "Volume $=452.389$ cubic units", 1),
        ("113.097", "Area $=113.097$ units $^{2}$", 1),
        (r"118^\circ", "118°T", 1),
        ("-4.9", "-4.9\n-4.9", 1),
        ("Even", "even", 1),
        ("(-2, 1)", "(-2,1]", 0),
        ("113", "Area $=113.097$ units $^{2}$", 0),
    ],
)
def test_the_value_of_mathverses_answers_counts(said, gold, right):
    """Its free answers have labels and units, with which or without a response is right."""
    doc = {"choices": [], "answer": gold}
    assert tasks.score_mathverse(doc, [rf"So it is \boxed{{{said}}}."])["acc"] == right
