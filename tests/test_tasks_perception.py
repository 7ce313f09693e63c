"""Perception benchmarks from local copies: rows of ours in the hub's schema, answers right, wrong and unreadable."""

import base64

import pytest
from datasets import Features, Image, List, Value
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from evals.preflight import TaskCheck
from evals.scoring import TASKS, Tasks, load_task
from evals.task_list import list_tasks
from evals.tasks.benchmarks import documents, perception
from evals.tasks.benchmarks.registry import BENCHMARKS
from tests.benchmark_rows import Said, local_copies, picture, save
from vlopd.config.analysis import EvalConfig
from vlopd.errors import ConfigError, DataError

RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")
WORDS = Value("string")
PRO_COLUMNS = (
    "id",
    "question",
    "options",
    "explanation",
    "img_type",
    "answer",
    "topic_difficulty",
    "subject",
)
PRO = Features(
    {**dict.fromkeys(PRO_COLUMNS, WORDS), **{f"image_{k}": Image() for k in range(1, 8)}}
)
HALLUSION = Features(
    {
        **dict.fromkeys(
            (
                "category",
                "subcategory",
                "visual_input",
                "set_id",
                "figure_id",
                "sample_note",
                "question_id",
                "question",
                "gt_answer_details",
                "gt_answer",
                "filename",
            ),
            WORDS,
        ),
        "image": Image(),
    }
)
BLINK = Features(
    {
        "idx": WORDS,
        "question": WORDS,
        "sub_task": WORDS,
        **{f"image_{k}": Image() for k in range(1, 5)},
        "choices": List(WORDS),
        "answer": WORDS,
        "prompt": WORDS,
        "explanation": WORDS,
    }
)
HR = Features(
    {
        "index": Value("int64"),
        **dict.fromkeys(
            ("question", "image", "answer", "category", "A", "B", "C", "D", "cycle_category"), WORDS
        ),
    }
)
FEATURES = {
    "mmmu_pro_10": PRO,
    "mmmu_pro_4": PRO,
    "mmmu_pro_vision": Features({"id": WORDS, "image": Image(), "options": WORDS, "answer": WORDS, "subject": WORDS}),
    "mmstar": Features({
        "index": Value("int64"), "question": WORDS, "image": Image(), "answer": WORDS, "category": WORDS,
        "l2_category": WORDS, "meta_info": {"source": WORDS, "split": WORDS, "image_path": WORDS},
    }),
    "hallusion_bench": HALLUSION,
    "ocrbench": Features({"dataset": WORDS, "question": WORDS, "question_type": WORDS, "answer": List(WORDS),
                          "image": Image()}),
    "blink": BLINK,
    "cv_bench": Features({
        "idx": Value("int64"), "type": WORDS, "task": WORDS, "image": Image(), "question": WORDS,
        "choices": List(WORDS), "answer": WORDS, "prompt": WORDS, "filename": WORDS, "source": WORDS,
        "source_dataset": WORDS, "source_filename": WORDS, "target_class": WORDS, "target_size": Value("int64"),
        "bbox": List(List(Value("float64"))),
    }),
    "vstar": Features({"image": Image(), "text": WORDS, "category": WORDS, "label": WORDS, "question_id": WORDS}),
    "hrbench_4k": HR,
    "hrbench_8k": HR,
}  # fmt: skip
"""The columns and their types on the hub, as far as public sources state them."""

TEN = [f"{k} cm" for k in range(10)]


def pro(number, question, options, answer, **images):
    return {"id": f"test_Physics_{number}", "question": question, "options": repr(options), "explanation": "",
            "img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Hard", "subject": "Physics",
            **dict.fromkeys(f"image_{k}" for k in range(1, 8)), **images}  # fmt: skip


def star(index, question, answer, category):
    return {"index": index, "question": question, "image": (RED, BLUE)[index % 2], "answer": answer,
            "category": category, "l2_category": "recognition",
            "meta_info": {"source": "ours", "split": "val", "image_path": f"images/{index}.jpg"}}  # fmt: skip


def figure(number, question_id, question, yes, image):
    return {"category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0", "figure_id": str(number),
            "sample_note": "circle", "question_id": str(question_id), "question": question,
            "gt_answer_details": "The circles are equal.", "gt_answer": str(int(yes)),
            "filename": f"./VD/illusion/0_{number}.png", "image": image}  # fmt: skip


def seen(kind, number, choices, answer, *images):
    listed = " ".join(f"({'ABCD'[k]}) {choice}" for k, choice in enumerate(choices))
    return {"idx": f"val_{kind}_{number}", "question": "Which is it?", "sub_task": kind,
            **{f"image_{k + 1}": image for k, image in enumerate((*images, None, None, None)[:4])},
            "choices": choices, "answer": f"({answer})", "explanation": "",
            "prompt": f"Look closely.\nWhich is it?\nSelect from the following choices.\n{listed}"}  # fmt: skip


def cambrian(index, part, task, source, choices, answer):
    listed = " ".join(f"({'ABCD'[k]}) {choice}" for k, choice in enumerate(choices))
    return {"idx": index, "type": part, "task": task, "image": RED, "question": "How many?", "choices": choices,
            "answer": f"({answer})", "prompt": f"How many? Select from the following choices.\n{listed}",
            "filename": f"{index}.png", "source": source, "source_dataset": f"{source} Dataset",
            "source_filename": "1.jpg", "target_class": None, "target_size": None,
            "bbox": [[0.0, 1.0, 2.0, 3.0]]}  # fmt: skip


def rotated(index, answer, order, question="What is on the sign?", image=RED):
    return {"index": index, "question": question, "image": base64.b64encode(image["bytes"]).decode(), "answer": answer,
            "category": "single", **dict(zip("ABCD", order, strict=True)),
            "cycle_category": str(index % 4)}  # fmt: skip


STREETS = ["Oak", "Elm", "Ash", "Fir"]
ROTATIONS = [rotated(k, "ADCB"[k], STREETS[k:] + STREETS[:k]) for k in range(4)]
HR_ROWS = [*ROTATIONS, rotated(4, "B", ["1", "2", "3", "4"], "How many?", BLUE)]
ROWS = {
    "mmmu_pro_10": [
        pro(1, "How long is <image 1>, seen in <image 2>?", TEN, "J", image_1=RED, image_2=BLUE),
        pro(2, "Choose. <image 1>", ["<image 1>", "a leaf", "vitamin A"], "C", image_1=GREEN),
        pro(3, "How long is <image 1>?", TEN, "B", image_1=RED),
        pro(4, "How long is <image 1>?", TEN, "B", image_1=RED),
    ],
    "mmmu_pro_4": [pro(1, "How long is <image 1>?", TEN[:4], "D", image_1=RED)] * 3,
    "mmmu_pro_vision": [
        {"id": f"test_Art_{k}", "image": RED, "options": repr(TEN), "answer": "H", "subject": "Art"} for k in range(3)
    ],
    "mmstar": [
        star(0, "What is it?\nOptions: A: a cat, B: a dog., C: a cow, D: an eel", "B", "instance reasoning"),
        star(1, "Hint: choose. Question: Which?\nChoices:\n(A) 1\n(B) 2\n(C) 3\n(D) 4", "C", "math"),
        star(2, "Which of the four is drawn at the top?", "A", "math"),
        star(3, "What is it?\nOptions: A: a cat, B: a dog, C: a cow, D: an eel", "D", "instance reasoning"),
    ],
    "hallusion_bench": [
        figure(0, 0, "Is the right circle the same size as the left one?", True, RED),
        figure(0, 1, "Is the right circle larger than the left one?", False, RED),
        figure(1, 0, "Is the right circle the same size as the left one?", False, BLUE),
        figure(1, 1, "Is the right circle larger than the left one?", True, BLUE),
    ],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "what is written in the image?", "answer": ["CENTRE"], "image": RED,
         "question_type": "Regular Text Recognition"},
        {"dataset": "docVQA", "question": "what is the total?", "answer": ["1", "1.0"], "image": RED,
         "question_type": "Doc-oriented VQA"},
        {"dataset": "HME100k", "question": "Please write out the expression of the formula in the image using LaTeX.",
         "answer": ["\\frac { 1 } { 2 } X"], "image": BLUE,
         "question_type": "Handwritten Mathematical Expression Recognition"},
        {"dataset": "ReCTS", "question": "what is written in the image?", "answer": ["茶馆"], "image": GREEN,
         "question_type": "Irregular Text Recognition"},
        {"dataset": "IIIT5K", "question": "what is written in the image?", "answer": ["open"], "image": RED,
         "question_type": "Regular Text Recognition"},
    ],
    "blink": [
        *(seen(kind, 1, ["the first", "the second"], "B", RED, BLUE) for kind in perception.BLINK),
        seen("Counting", 2, ["0", "3", "2", "1"], "D", RED),
        seen("Counting", 3, ["0", "3", "2", "1"], "D", RED, BLUE, GREEN, RED),
    ],
    "cv_bench": [
        cambrian(0, "2D", "Count", "ADE20K", ["3", "2", "1", "0"], "C"),
        cambrian(1, "2D", "Relation", "COCO", ["left", "right"], "A"),
        cambrian(2, "2D", "Relation", "COCO", ["left", "right"], "A"),
        cambrian(3, "3D", "Depth", "Omni3D", ["chair", "lamp"], "B"),
    ],
    "vstar": [
        {"image": RED, "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
         "Answer with the option's letter from the given choices directly.", "category": "direct_attributes",
         "label": "A", "question_id": "0"},
        {"image": BLUE, "text": "Is the dog left of the cat?\n(A) left\n(B) right\nAnswer with the option's letter "
         "from the given choices directly.", "category": "relative_position", "label": "B", "question_id": "1"},
        {"image": BLUE, "text": "Is the cat left of the dog?\n(A) left\n(B) right\nAnswer with the option's letter "
         "from the given choices directly.", "category": "relative_position", "label": "B", "question_id": "2"},
    ],
    "hrbench_4k": HR_ROWS,
    "hrbench_8k": HR_ROWS,
}  # fmt: skip

SAID = {
    "mmmu_pro_10": [
        "Answer: J",
        "I think (C).",
        "We weigh A and C. Final answer: **B**",
        "no idea",
    ],
    "mmmu_pro_4": ["D", "The answer is A.", "..."],
    "mmmu_pro_vision": ["H. 7 cm", "(B)", "unclear"],
    "mmstar": ["B", "So it is 3, hence the answer is C.", "A", "perhaps"],
    "hallusion_bench": ["Yes.", "No, it is not.", "no", "I cannot tell"],
    "ocrbench": ["The word is Centre.", "10", "$\\frac{1}{2}X$", "写着茶馆两个字", ""],
    "blink": [*["(B)"] * 14, "1", "neither"],
    "cv_bench": ["C", "right", "(A) left", "unsure"],
    "vstar": ["A", "(A)", "it is hidden"],
    "hrbench_4k": ["A", "(D) Oak", "Oak", "B", "A"],
    "hrbench_8k": ["A", "B", "Oak", "none", "B. 2"],
}
EXPECTED = {
    "mmmu_pro_10": ([1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]),
    "mmmu_pro_4": ([1, 0, 0], [1, 0, 0], [0, 0, 1]),
    "mmmu_pro_vision": ([1, 0, 0], [1, 0, 0], [0, 0, 1]),
    "mmstar": ([1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]),
    "hallusion_bench": ([1, 1, 1, 0], None, [0, 0, 0, 1]),
    "ocrbench": ([1, 1, 1, 1, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 1]),
    "blink": ([1] * 15 + [0], None, [0] * 15 + [1]),
    "cv_bench": ([1, 0, 1, 0], None, [0, 0, 0, 1]),
    "vstar": ([1, 0, 0], None, [0, 0, 1]),
    "hrbench_4k": ([1, 1, 1, 1, 0], None, [0] * 5),
    "hrbench_8k": ([1, 0, 1, 0, 1], None, [0, 0, 0, 1, 0]),
}
"""Right by the first metric, right by `careful`, and without an answer, question by question."""
PRIMARY = {"hallusion_bench": "aAcc", "ocrbench": "ocrbench_accuracy"}
WHOLE = {
    ("hallusion_bench", "fAcc"): 0.5,  # the first figure's two questions
    ("hallusion_bench", "qAcc"): 0.5,  # the first question on both figures
    ("ocrbench", "final_score"): 800.0,
    ("blink", "total"): (13 + 2 / 3) / 14,
    ("cv_bench", "cv_bench"): ((1 + 0.5) / 2 + 0) / 2,
    ("hrbench_4k", "all_rotations"): 0.5,
    ("hrbench_8k", "all_rotations"): 0.5,
}


def copy(folder, name, rows, without=None):
    """A local copy of a benchmark under the hub's file names; BLINK has a folder for each subtask."""
    columns = {c: t for c, t in FEATURES[name].items() if c != without}
    rows = [{c: row[c] for c in columns} for row in rows]
    start = BENCHMARKS[name].files or BENCHMARKS[name].split
    if name != "blink":
        return save(folder, name, rows, start, Features(columns))
    for kind in perception.BLINK:
        own = [row for row in rows if row.get("sub_task", kind) == kind]
        save(folder, f"blink/{kind}", own, start, Features(columns))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of all benchmarks, where VLOPD_BENCHMARKS says they are."""
    with local_copies(tmp_path_factory.mktemp("benchmarks"), ROWS, copy) as folder:
        yield folder


@pytest.fixture(scope="module")
def scored(copies):
    """lm-eval's results of the prepared answers on every benchmark, and the model that gave them."""
    # in the order of the rows as read: BLINK's by subtask
    order = [SAID["blink"][ROWS["blink"].index(row)] for kind in perception.BLINK
             for row in ROWS["blink"] if row["sub_task"] == kind]  # fmt: skip
    lm = Said({**SAID, "blink": order})
    tasks = [f"vlopd_{name}" for name in SAID]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0), lm


def test_every_benchmark_is_tested():
    """Rows with all columns, answers and a task for each; every module's benchmarks are in the registry."""
    assert ROWS.keys() == SAID.keys() == FEATURES.keys() == perception.BENCHMARKS.keys()
    assert perception.BENCHMARKS.items() <= BENCHMARKS.items()
    for name, rows in ROWS.items():
        assert all(row.keys() == FEATURES[name].keys() for row in rows), name
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert {f"vlopd_{name}" for name in BENCHMARKS} <= set(manager.all_tasks)


@pytest.mark.parametrize("name", SAID)
def test_right_wrong_and_missing_answers(name, scored):
    """A right answer scores 1, a wrong one 0, and none at all is an extraction failure; the official rule is first."""
    samples = sorted(scored[0]["samples"][f"vlopd_{name}"], key=lambda row: row["doc_id"])
    right, careful, missing = EXPECTED[name]
    primary = PRIMARY.get(name, "acc")
    assert all(row["metrics"][0] == primary for row in samples)
    if name == "blink":  # two more questions of its second subtask
        right, missing = [1, 1, 1, 0, *[1] * 12], [0, 0, 0, 1, *[0] * 12]
    assert [row[primary] for row in samples] == right
    assert [row["extraction_failure"] for row in samples] == missing
    if careful is not None:
        assert [row["careful"] for row in samples] == careful
    mean = scored[0]["results"][f"vlopd_{name}"][f"{primary},none"]
    assert mean == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(("name", "metric"), WHOLE)
def test_metrics_of_groups(name, metric, scored):
    """A figure, a question pair, a subtask, a source and a question's rotations count as one."""
    assert scored[0]["results"][f"vlopd_{name}"][f"{metric},none"] == pytest.approx(
        WHOLE[name, metric]
    )


def test_pictures_and_prompts(scored):
    """Pictures come in the order of their marks, from columns or base64; questions and choices are as stored."""
    asked = scored[1].asked
    counts = {}
    for (name, _), request in asked.items():
        shown = request.args[2]["visual"]
        assert request.args[0].count("<image>") == len(shown)
        assert all(image.mode == "RGB" and image.size == (40, 32) for image in shown)
        counts.setdefault(name, []).append(len(shown))
    assert counts.pop("mmmu_pro_10") == [2, 2, 1, 1]
    assert counts.pop("blink") == [2, 2, 1, 4, *[2] * 12]
    assert {n for each in counts.values() for n in each} == {1}

    def colours(name, k):
        return [image.getpixel((0, 0)) for image in asked[name, k].args[2]["visual"]]

    assert colours("mmmu_pro_10", 0) == [(255, 0, 0), (0, 0, 255)]
    assert colours("mmmu_pro_10", 1) == [(0, 128, 0)] * 2
    assert colours("hrbench_4k", 4) == [(0, 0, 255)]
    pro = asked["mmmu_pro_10", 0].args[0]
    assert pro.startswith("How long is <image>, seen in <image>?\nA. 0 cm\n") and "J. 9 cm\n" in pro
    assert asked["mmstar", 0].args[0].startswith("<image>What is it?\nOptions: A: a cat, B: a dog.")
    assert asked["mmmu_pro_vision", 0].args[0].startswith("<image>Answer the question in the image")
    assert "\n(A) chair (B) lamp\n" in asked["cv_bench", 3].args[0]
    assert "Ash\nB. Fir\nC. Oak\nD. Elm" in asked["hrbench_4k", 2].args[0]


def test_gold_kind_and_cluster(scored):
    """Targets name letter and choice; kinds are subjects, subtasks, types; a set of figures is one cluster."""
    docs = {name: [row["doc"] for row in scored[0]["samples"][f"vlopd_{name}"]] for name in SAID}
    assert [doc["target"] for doc in docs["mmstar"]] == [
        "B. a dog.",
        "C. 3",
        "A. option A",
        "D. an eel",
    ]
    assert [doc["kind"] for doc in docs["cv_bench"]] == [
        "2D Count",
        "2D Relation",
        "2D Relation",
        "3D Depth",
    ]
    assert {doc["cluster"] for doc in docs["hallusion_bench"]} == {"VD_illusion_0"}
    assert len({doc["cluster"] for doc in docs["hrbench_4k"]}) == 2
    levels = documents.chance(docs["vstar"])
    assert levels["direct_attributes"] == 0.25 and levels["relative_position"] == 0.5
    assert documents.chance(docs["mmmu_pro_vision"])["all"] == pytest.approx(0.1)  # fmt: skip


def test_targets_are_right_answers(copies):
    """Checks before training find nothing: every target, as an answer, scores 1; the group has both members."""
    tasks = [f"vlopd_{name}" for name in ROWS]
    manager = Tasks.of([*tasks, "vlopd_mmmu_pro"])
    for task in tasks:
        its = load_task(manager, task, None)["tasks"][task]
        check = TaskCheck(task, its, EvalConfig(), None, manager.task_index[task].yaml_path)
        assert check.refuse_bad_rows(), task
    group = load_task(manager, "vlopd_mmmu_pro", None)
    assert group["group_map"] == {"vlopd_mmmu_pro": ["vlopd_mmmu_pro_10", "vlopd_mmmu_pro_vision"]}


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("What?\nOptions: A: on it., B: by a cat., C: x, y, D: z.", ["on it.", "by a cat.", "x, y", "z."]),
        ("Hint: A. is Ann. Choose\n(A) 1.5\n(B) grade B. or so\n(C) 3\nThank you", ["1.5", "grade B. or so", "3"]),
        ("Which? A. left B. right", ["left", "right"]),
        ("Which vitamin, A: or D: then?", []),
        ("What is it?", []),
    ],
)  # fmt: skip
def test_options_within_a_question(question, options):
    """By hand: after letters with a colon, a full stop or in brackets, in order; a letter in an option is no mark."""
    assert perception.options_within(question) == options


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("(A) or (B)? I take (B)", "B"),
        ("Answer: (C) kevlar", "C"),
        ("the leaf is the right one here, surely", "B"),
        ("D.", "D"),
        ("it is a leaf", None),
        ("", None),
    ],
)
def test_mmmu_pro_official_letter(said, found):
    """The authors' parser by hand: marks in brackets first, the last of several, and long answers by content."""
    assert perception.mmmu_pro_letter(said, ["a cell", "leaf", "kevlar", "dust"]) == found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mmmu_pro_10",
            {"answer": "K"},
            "column 'answer' is 'K'; its choices are A B C D E F G H I J",
        ),
        ("mmmu_pro_10", {"options": "none"}, "column 'options' holds 'none' in place of a list"),
        ("mmmu_pro_10", {"image_2": None}, "column 'image_2' has no picture"),
        ("mmmu_pro_vision", {"subject": None}, "column 'subject' holds None"),
        ("mmstar", {"answer": "E"}, "column 'answer' is 'E'; its choices are A B C D"),
        (
            "hallusion_bench",
            {"gt_answer": "2"},
            r"column 'gt_answer' is '2'; it is 1 \(yes\) or 0 \(no\)",
        ),
        ("ocrbench", {"answer": []}, r"column 'answer' holds \[\] in place of a list of answers"),
        ("blink", {"answer": "(C)"}, "column 'answer' is 'C'; its choices are A B"),
        ("cv_bench", {"image": None}, "column 'image' has no picture"),
        ("vstar", {"text": "What?"}, "column 'text' has no options"),
        ("vstar", {"label": ""}, "column 'label' holds ''"),
        ("hrbench_4k", {"image": "a picture"}, "column 'image' is not a picture in base64"),
        ("hrbench_8k", {"C": None}, "column 'C' holds None"),
    ],
)
def test_a_broken_row_is_named(name, change, message, tmp_path, monkeypatch):
    """One line with the file, the row and the column."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    copy(tmp_path, name, [{**ROWS[name][0], **change}, *ROWS[name][1:]])
    with pytest.raises(DataError, match=rf"row 0 \(from 0\): {message}") as error:
        perception.dataset(name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("mmmu_pro_4", "hrbench_8k")])
def test_a_missing_column_is_named(name, tmp_path, monkeypatch):
    """Of every column that a benchmark needs: the column, the file and what columns it has, in one line."""
    columns = BENCHMARKS[name].columns[: 1 if name == "blink" else None]  # fourteen files each
    for k, column in enumerate(columns):
        monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path / str(k)))
        copy(tmp_path / str(k), name, ROWS[name][: None if name == "blink" else 1], without=column)
        with pytest.raises(ConfigError, match=f"has no column '{column}'; it has"):
            perception.dataset(name)


def test_a_missing_subtask_is_named(tmp_path, monkeypatch):
    """A copy of BLINK without one of its fourteen folders is refused rather than scored on thirteen."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    copy(tmp_path, "blink", ROWS["blink"])
    next((tmp_path / "blink" / "Jigsaw").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"Jigsaw has no val\*\.parquet .* BLINK-Benchmark/BLINK"):
        perception.dataset("blink")


def test_the_earlier_hub_name_is_used_where_only_it_is_cached(tmp_path, monkeypatch):
    """lmms-lab's data sets moved to lmms-lab-encoder; a cached copy under either name is found and listed."""
    monkeypatch.setattr(documents.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("VLOPD_BENCHMARKS", raising=False)

    def listed():
        return {row.task: row for row in list_tasks("vlopd_*")}["vlopd_pope"]

    assert listed().source == "lmms-lab-encoder/POPE" and listed().reachable.startswith("no: not")
    (tmp_path / "datasets--lmms-lab--POPE" / "snapshots" / "1").mkdir(parents=True)
    assert (listed().source, listed().reachable) == ("lmms-lab/POPE", "yes")
    (tmp_path / "datasets--lmms-lab-encoder--POPE" / "snapshots" / "1").mkdir(parents=True)
    assert listed().source == "lmms-lab-encoder/POPE"
