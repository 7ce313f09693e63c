"""Published benchmarks from local copies: rows of ours in their schema, answers right, wrong and missing."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict

from evals.lm import ArmLM
from evals.preflight import TaskCheck
from evals.scoring import TASKS, Tasks, load_task
from evals.tasks.benchmarks import documents, mathematics, vision
from tests.benchmark_rows import Said, local_copies, picture
from vlopd.config.analysis import EvalConfig
from vlopd.errors import ConfigError, DataError
from vlopd.models.load import load

BENCHMARKS = {**mathematics.BENCHMARKS, **vision.BENCHMARKS}


RED, BLUE = picture("red"), picture("blue")
MMMU = {"explanation": "", "img_type": "['Diagrams']", "topic_difficulty": "Easy", "subfield": "Cells",
        **{f"image_{k}": None for k in range(2, 8)}, "image_1": RED}  # fmt: skip
VISTA = {"image": "images/1.jpg", "decoded_image": BLUE, "choices": None, "unit": None, "precision": None,
         "query": "", "metadata": {"task": "figure question answering", "source": "ours"}}  # fmt: skip

ROWS = {
    "aime24": [
        {"ID": "2024-I-1", "Problem": "What is 60 + 13?", "Solution": "Add.", "Answer": 73},
        {"ID": "2024-I-2", "Problem": "What is 5?", "Solution": "Five.", "Answer": 5},
        {"ID": "2024-II-1", "Problem": "What is 6?", "Solution": "Six.", "Answer": 6},
    ],
    "aime25": [{"problem": "Find $2^{10}-24$.", "answer": "1000", "id": "0"}] * 3,
    "math500": [
        {"problem": "Half of $x$?", "solution": "", "answer": r"\frac{x}{2}", "subject": "Algebra",
         "level": 1, "unique_id": "test/algebra/1.json"},
        {"problem": "Where is it?", "solution": "", "answer": r"\left( 3, \frac{\pi}{2} \right)",
         "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/2.json"},
        {"problem": "Who won?", "solution": "", "answer": r"\text{Evelyn}", "subject": "Algebra",
         "level": 1, "unique_id": "test/algebra/3.json"},
    ],
    "gsm8k": [
        {"question": "Ann has 3 bags of 400 nuts and gets 34. How many?",
         "answer": "3 x 400 = <<3*400=1200>>1200\n1200 + 34 = 1234\n#### 1,234"},
        {"question": "And 2 more than 5?", "answer": "#### 7"},
        {"question": "And 1 less?", "answer": "#### 6"},
    ],
    "geometry3k": [
        {"images": [RED], "problem": "<image>Find $x$.", "answer": r"2 \sqrt { 2 }"},
        {"images": [BLUE], "problem": "<image>Find $y$.", "answer": "45"},
        {"images": [RED], "problem": "<image>Find $z$.", "answer": "12.5"},
    ],
    "mathvista": [
        {**VISTA, "pid": "1", "question": "Which is the tallest?", "choices": ["the left", "the right"],
         "question_type": "multi_choice", "answer_type": "text", "answer": "the right"},
        {**VISTA, "pid": "2", "question": "How many gaps?", "question_type": "free_form",
         "answer_type": "integer", "answer": "4"},
        {**VISTA, "pid": "3", "question": "How heavy?", "question_type": "free_form", "unit": "kg",
         "answer_type": "float", "precision": 1.0, "answer": "1.4"},
        {**VISTA, "pid": "4", "question": "Which two?", "question_type": "free_form",
         "answer_type": "list", "answer": "[2, 5]"},
        {**VISTA, "pid": "5", "question": "How long?", "question_type": "free_form",
         "answer_type": "integer", "answer": "9"},
    ],
    "mmmu": [
        {**MMMU, "id": "validation_Biology_1", "question": "What is <image 1>, beside <image 2>?",
         "options": "['a cell', 'a <image 1>', 'a leaf']", "answer": "C", "image_2": BLUE,
         "question_type": "multiple-choice"},
        {**MMMU, "id": "validation_Art_Theory_2", "question": "Find the area in <image 1>.",
         "options": "[]", "answer": "12.504", "question_type": "open"},
        {**MMMU, "id": "validation_Art_Theory_3", "question": "Name the style. <image 1>",
         "options": "[]", "answer": "['neo classical', 'classicism']", "question_type": "open"},
        {**MMMU, "id": "validation_Biology_4", "question": "What is it? <image 1>",
         "options": "['a cell', 'a leaf']", "answer": "A", "question_type": "multiple-choice"},
    ],
    "scienceqa_img": [
        {"image": RED, "question": "Which is warmer?", "choices": ["this one", "that one"], "answer": k % 2,
         "hint": "Look at the colours." if k else "", "task": "closed choice", "grade": "grade2",
         "subject": "natural science", "topic": "physics", "category": "Heat", "skill": "Compare",
         "lecture": "", "solution": ""}
        for k in range(3)
    ],
    "chartqa": [
        {"image": RED, "query": "How many in 2019?", "label": ["1,000"], "human_or_machine": 0},
        {"image": RED, "query": "And in 2020?", "label": ["50%"], "human_or_machine": 1},
        {"image": BLUE, "query": "Which colour leads?", "label": ["Light blue"], "human_or_machine": 0},
    ],
    "pope": [
        {"id": str(k), "question_id": str(k), "question": f"Is there a {thing} in the image?",
         "answer": answer, "image_source": "ours_1", "image": RED if k < 3 else BLUE,
         "category": ("random", "adversarial")[k % 2]}
        for k, (thing, answer) in enumerate(
            [("wall", "yes"), ("dog", "no"), ("wall", "yes"), ("cat", "no"), ("wall", "yes")]
        )
    ],
    "ai2d": [
        {"question": "What does the arrow show?", "options": ["sun", "rain", "wind", "snow"],
         "answer": str(k), "image": RED}
        for k in range(3)
    ],
}  # fmt: skip
"""Written for these tests, with the columns that the hub's data sets have."""

SAID = {
    "aime24": [r"It is \boxed{073}.", "The answer is 6", "I cannot say."],
    "aime25": ["1000", "24", "..."],
    "math500": [r"\boxed{0.5x}", r"The answer is $(3, \pi/3)$.", "<think>Evelyn, it"],
    "gsm8k": ["So she has 1234 nuts.", "#### 8", "many"],
    "geometry3k": [r"$x = \boxed{\sqrt{8}}$", "Answer: 44", "it is the other side"],
    "mathvista": ["(B)", "Answer: 4", "Answer: 1.43 kg", "Answer: [2, 6]", "rather long"],
    "mmmu": ["C. a leaf", "12.5", "It is Neo-Classical", "both"],
    "scienceqa_img": ["A", "The answer is A.", "neither"],
    "chartqa": ["960", "Answer: 60", ""],
    "pope": ["Yes.", "No, there is none", "no", "yes", "a wall, perhaps"],
    "ai2d": ["A", "wind", "all of it"],
}
EXPECTED = {
    **dict.fromkeys(SAID, ([1, 0, 0], [0, 0, 1])),
    "mathvista": ([1, 1, 1, 0, 0], [0, 0, 0, 0, 1]),
    "mmmu": ([1, 1, 0, 0], [0, 0, 0, 1]),
    "chartqa": ([0, 0, 0], [0, 0, 1]),
    "pope": ([1, 1, 0, 0, 1], [0, 0, 0, 0, 1]),
}
"""Right by the primary rule, and without an answer to a careful reader, question by question."""
CAREFUL = {"mmmu": [1, 1, 1, 0], "chartqa": [1, 0, 0], "pope": [1, 1, 0, 0, 0]}
"""Right to a careful reader, where the official rule differs."""

TEXT_ONLY = ("aime24", "aime25", "math500", "gsm8k")
PICTURES = {"image": Image(), "decoded_image": Image(), "images": List(Image())}
PICTURES |= {f"image_{k}": Image() for k in range(1, 8)}


def save(folder, name, rows):
    """Text benchmarks as JSONL, the others as parquet, named after their split."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / name / f"{BENCHMARKS[name].split}-00000-of-00001"
    if name in TEXT_ONLY:
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    inferred = Dataset.from_list(rows).features
    known = {
        c: PICTURES[c] for c in inferred if c in PICTURES and (c, name) != ("image", "mathvista")
    }
    for column, feature in {"choices": List(Value("string")), "unit": Value("string")}.items():
        if column in inferred:  # null in the first rows
            known[column] = feature
    features = Features({**inferred, **known})
    Dataset.from_list(rows, features=features).to_parquet(path.with_suffix(".parquet"))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of all benchmarks, and where VLOPD_BENCHMARKS says they are."""
    with local_copies(tmp_path_factory.mktemp("benchmarks"), ROWS, save) as folder:
        yield folder


@pytest.fixture(scope="module")
def scored(copies):
    """lm-eval's results of the prepared answers on every benchmark, and the model that gave them."""
    lm = Said(SAID)
    tasks = [f"vlopd_{name}" for name in SAID]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=1), lm


def test_every_benchmark_is_tested():
    """Rows, answers and a task for each."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert ROWS.keys() == SAID.keys() == BENCHMARKS.keys()
    assert {f"vlopd_{name}" for name in BENCHMARKS} <= set(manager.all_tasks)


@pytest.mark.parametrize("name", SAID)
def test_right_wrong_and_missing_answers(name, scored):
    """Through lm-eval, a right answer scores 1, a wrong one 0, and none at all is an extraction failure."""
    results, _ = scored
    task = f"vlopd_{name}"
    samples = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    primary, *_ = metrics = list(results["higher_is_better"][task])
    right, missing = EXPECTED[name]
    assert [row[primary] for row in samples] == right
    assert [row["extraction_failure"] for row in samples] == missing
    assert all(isinstance(row[metric], float) for row in samples for metric in metrics)
    assert [row.get("careful") for row in samples] == CAREFUL.get(name, [None] * len(right))
    mean = results["results"][task][f"{primary},none"]
    assert mean == pytest.approx(sum(right) / len(right))


def test_pope_reports_f1_and_how_often_yes_is_said(scored):
    """Two true yes, one false, one missed: precision 2/3, recall 2/3, F1 2/3; yes in three answers of five."""
    results = scored[0]["results"]["vlopd_pope"]
    assert results["f1,none"] == pytest.approx(2 / 3)
    assert results["yes_rate,none"] == pytest.approx(3 / 5)
    assert vision.f1([-1.0]) == 0.0


def test_prompts_hold_the_question_and_as_many_marks_as_pictures(scored):
    """Choices are lettered, hints come first, and pictures stand where the question has them."""
    _, lm = scored
    for (task, _), request in lm.asked.items():
        prompt, visual = request.args[0], (request.args[2:] or ({"visual": []},))[0]["visual"]
        assert prompt.count("<image>") == len(visual), task
        assert all(image.mode == "RGB" and image.size == (40, 32) for image in visual)
    mmmu = lm.asked["mmmu", 0]
    assert mmmu.args[0].startswith(
        "What is <image>, beside <image>?\nA. a cell\nB. a <image>\nC. a leaf"
    )
    pope = [lm.asked["pope", k].args[2]["visual"][0] for k in range(5)]
    assert pope[0] is pope[1] is pope[2] and pope[3] is pope[4]  # decoded once
    colours = [image.getpixel((0, 0)) for image in mmmu.args[2]["visual"]]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert lm.asked["geometry3k", 0].args[0].startswith("<image>Find $x$.")
    assert "Look at the colours.\nWhich" in lm.asked["scienceqa_img", 1].args[0]


def test_groups_clusters_and_chance(scored):
    """Kinds group the questions, a picture's questions are a cluster, and guessing among choices is chance."""
    samples = {name: [row["doc"] for row in scored[0]["samples"][f"vlopd_{name}"]] for name in SAID}
    assert [doc["kind"] for doc in samples["mmmu"]] == [
        "Biology", "Art_Theory", "Art_Theory", "Biology",
    ]  # fmt: skip
    assert [doc["kind"] for doc in samples["chartqa"]] == ["human", "machine", "human"]
    clusters = [doc["cluster"] for doc in samples["pope"]]
    assert len(set(clusters[:3])) == len(set(clusters[3:])) == 1 and len(set(clusters)) == 2
    assert samples["gsm8k"][0]["cluster"] is None
    assert documents.chance(samples["pope"])["all"] == 0.5
    levels = documents.chance(samples["mmmu"])
    assert levels["all"] == pytest.approx((1 / 3 + 1 / 2) / 4) and levels["Art_Theory"] == 0


def test_a_documents_digest_is_that_of_its_picture(copies, tmp_path, monkeypatch):
    """The same rows with another picture are other documents; pictures themselves are not in them."""
    before = vision.dataset("ai2d")["test"]
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    save(tmp_path, "ai2d", [{**row, "image": BLUE} for row in ROWS["ai2d"]])
    after = vision.dataset("ai2d")["test"]
    assert before[0]["digests"] != after[0]["digests"]
    assert {k: v for k, v in before[0].items() if k not in ("digests", "cluster")} == {
        k: v for k, v in after[0].items() if k not in ("digests", "cluster")
    }
    assert len(json.dumps(after[0])) < 2000


def test_pictures_may_be_files_beside_the_rows(tmp_path, monkeypatch):
    """In a JSONL a picture is a file name relative to it; one that is not there is named with its row."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    (tmp_path / "ai2d").mkdir()
    (tmp_path / "ai2d" / "red.png").write_bytes(RED["bytes"])
    rows = tmp_path / "ai2d" / "test.jsonl"
    row = {**ROWS["ai2d"][0], "image": "red.png"}
    rows.write_text(json.dumps(row) + "\n")
    (doc,) = vision.dataset("ai2d")["test"]
    assert vision.doc_to_image(doc)[0].size == (40, 32)
    documents.read.cache_clear()
    rows.write_text(json.dumps({**row, "image": "gone.png"}) + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl, row 0 .* 'image' names 'gone.png'"):
        vision.dataset("ai2d")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gsm8k", {"question": None}, r"row 0 \(from 0\): column 'question' holds None"),
        ("gsm8k", {"answer": "12"}, "column 'answer' has no ####"),
        (
            "gsm8k",
            {"answer": "#### many"},
            "column 'answer' holds 'many', which cannot be read as a",
        ),
        (
            "aime25",
            {"answer": "n+1"},
            "column 'answer' holds 'n.1', which cannot be read as a number",
        ),
        ("math500", {"answer": r"\frac{1}{2"}, "column 'answer' holds .* braces are not balanced"),
        ("geometry3k", {"images": []}, "column 'images' has no picture"),
        ("mathvista", {"answer": "the middle"}, "'the middle' is not among the choices"),
        ("mmmu", {"answer": "D"}, "column 'answer' is 'D'; its choices are A B C"),
        ("mmmu", {"options": "A, B"}, "column 'options' holds 'A, B' in place of a list"),
        ("mmmu", {"image_2": None}, "column 'image_2' has no picture"),
        ("scienceqa_img", {"answer": 7}, "column 'answer' is 7; its choices are 0 to 1"),
        ("pope", {"answer": "maybe"}, "'maybe' is not among the choices"),
    ],
)
def test_a_broken_row_is_named(name, change, message, tmp_path, monkeypatch):
    """One line with the file, the row and the column."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    save(tmp_path, name, [{**ROWS[name][0], **change}, *ROWS[name][1:]])
    with pytest.raises(DataError, match=message) as error:
        (mathematics if name in mathematics.BENCHMARKS else vision).dataset(name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_column_is_named(name, tmp_path, monkeypatch):
    """Of every column that a benchmark needs: the column, the file and what columns it has, in one line."""
    module = mathematics if name in mathematics.BENCHMARKS else vision
    for k, column in enumerate(BENCHMARKS[name].columns):
        monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path / str(k)))
        rows = [{c: v for c, v in row.items() if c != column} for row in ROWS[name]]
        save(tmp_path / str(k), name, rows)
        with pytest.raises(ConfigError, match=f"has no column '{column}'; it has") as error:
            module.dataset(name)
        assert f"{tmp_path / str(k) / name}" in str(error.value)


def test_an_empty_split_and_a_missing_one(tmp_path, monkeypatch):
    """No rows, no file of the split, no copy and no hub: one line each, with the split and the remedy."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(ConfigError, match=r"gsm8k has no test\*\.parquet and no test\*\.jsonl"):
        mathematics.dataset("gsm8k")
    documents.read.cache_clear()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"vlopd_gsm8k, split test: .*test\.jsonl has no rows"):
        mathematics.dataset("gsm8k")
    features = Features({"image": Image(), "question": Value("string"), "options": List(Value("string")),
                         "answer": Value("string")})  # fmt: skip
    (tmp_path / "ai2d").mkdir()
    empty = Dataset.from_dict({c: [] for c in features}, features=features)
    empty.to_parquet(tmp_path / "ai2d" / "test.parquet")
    with pytest.raises(ConfigError, match=r"vlopd_ai2d, split test: .*test\.parquet has no rows"):
        vision.dataset("ai2d")
    with pytest.raises(ConfigError) as error:
        mathematics.dataset("math500")
    assert "HuggingFaceH4/MATH-500" in str(error.value) and "VLOPD_BENCHMARKS" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vision_language_model_takes_a_benchmark(copies, folders):
    """A tiny model answers questions with one and with three pictures in one call, through our model class."""
    lm = ArmLM(load(str(folders["vlm", "student"]), torch.float32), 3, quiet=True)
    tasks = ["vlopd_pope", "vlopd_mmmu"]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        limit=2,
        gen_kwargs="max_gen_toks=4",
        apply_chat_template=True,
        bootstrap_iters=1,
    )
    for task in tasks:
        rows = results["samples"][task]
        assert len(rows) == 2 and all(isinstance(row["filtered_resps"][0], str) for row in rows)


def test_documents_are_read_as_lm_eval_reads_them(copies):
    """LaTeX and braces in a question reach the prompt as they are."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    task = get_task_dict(["vlopd_aime25"], manager)["vlopd_aime25"]
    doc = next(iter(task.test_docs()))
    assert (
        task.doc_to_text(doc).startswith("Find $2^{10}-24$.\n")
        and task.doc_to_target(doc) == "1000"
    )


def test_targets_are_right_answers(copies):
    """Checks before training find nothing: every target, as an answer, scores 1 by the first metric."""
    tasks = [f"vlopd_{name}" for name in ROWS]
    manager = Tasks.of(tasks)
    for task in tasks:
        its = load_task(manager, task, None)["tasks"][task]
        check = TaskCheck(task, its, EvalConfig(), None, manager.task_index[task].yaml_path)
        assert check.refuse_bad_rows(), task
