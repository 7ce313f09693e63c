"""Variants of image tasks without their pictures, and the suite of tasks that distillation may lower."""

from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import Features, Image, Value

from evals.harness import Subject, evaluate
from evals.lm import ArmLM
from evals.preflight import find_problems
from evals.scoring import Tasks, load_task, score_task
from evals.task_list import list_tasks
from tests.benchmark_rows import picture, save
from vlopd.config.analysis import EvalConfig
from vlopd.errors import ConfigError
from vlopd.files import read_json, read_jsonl
from vlopd.models.load import load
from vlopd.run.folder import RunFolder

OURS = ["shapes", "shapes@no_picture", "shapes@other_picture"]


@pytest.fixture(scope="module")
def student(folders):
    return load(str(folders["vlm", "student"]), torch.float32)


@pytest.fixture
def own(tmp_path):
    """A folder with a task of one's own: (its folder, a function that writes its rows of pictures by colour)."""

    def write(rows, marks="<image>"):
        columns = [f"image_{k}" for k in range(max(map(len, rows)))]
        rows = [{"question": f"which {i}", "answer": "red",
                 **dict(zip(columns, [*map(picture, row), *[None] * 9], strict=False))}
                for i, row in enumerate(rows)]  # fmt: skip
        path = save(tmp_path, "mine", rows, "test")
        (tmp_path / "mine.py").write_text(
            "from io import BytesIO\nfrom PIL import Image\nfrom datasets import load_dataset\n\n\n"
            f"def dataset(**_):\n    return load_dataset('parquet', data_files={{'test': {str(path)!r}}})\n\n\n"
            "def images(doc):\n    found = [v for k, v in sorted(doc.items()) if k.startswith('image_') and v]\n"
            "    return [Image.open(BytesIO(v['bytes'])) for v in found]\n\n\n"
            "def ask(doc):\n    return '<image>' * len(images(doc)) + '\\n' + doc['question']\n"
        )
        (tmp_path / "mine.yaml").write_text(
            "task: mine\ncustom_dataset: !function mine.dataset\ntest_split: test\noutput_type: generate_until\n"
            "doc_to_image: !function mine.images\ndoc_to_text: !function mine.ask\ndoc_to_target: answer\n"
            "metadata: {version: 1.0}\n"
        )
        return str(tmp_path)

    return write


def variant(task, include=None, fewshot=None):
    """A loaded variant, whose questions and pictures can be asked for."""
    return load_task(Tasks.of([task], include), task, fewshot)["tasks"][task]


def colours(images):
    return [image.convert("RGB").getpixel((0, 0)) for image in images]


def asked_of(lm):
    """The requests that a model gets, kept when it answers."""
    kept = {}
    answer = lm.generate_until

    def keeping(requests, **settings):
        kept.update({r.doc_id: r for r in requests})
        return answer(requests, **settings)

    lm.generate_until = keeping
    return kept


def test_a_model_answers_the_variants_of_the_built_in_task(student):
    """Through our model class: no picture and no mark in the prompt, or another picture for every question."""
    seen, config = {}, EvalConfig(tasks=tuple(OURS))
    for task in OURS:
        lm = ArmLM(student, 4, quiet=True)
        kept = asked_of(lm)
        results = score_task(lm, task, Tasks.of(OURS), config, 6, "student")
        seen[task] = [kept[k] for k in range(6)]
        assert len(results["samples"][task]) == 6
        assert all(
            {"exact_match", "verdict_match"} <= row["numbers"].keys()
            for row in results["samples"][task]
        )
    for plain, blind, other in zip(*seen.values(), strict=True):
        assert "<image>" in plain.args[0] and "<image>" not in blind.args[0]
        assert blind.args[0].replace(" ", "") == plain.args[0].replace("<image>", "").replace(
            " ", ""
        )
        assert len(blind.args) == 2 or not blind.args[2].get("visual")
        assert other.args[0] == plain.args[0]
        (own,), (theirs,) = plain.args[2]["visual"], other.args[2]["visual"]
        assert own.size == theirs.size and own.tobytes() != theirs.tobytes()


def test_rows_and_results_are_under_the_full_name(student, tmp_path):
    """Files, chance levels and saved pictures of a variant are its own; questions, targets and groups the task's."""
    run = RunFolder(tmp_path)
    config = EvalConfig(tasks=tuple(OURS), limit=3, keep_images=2)
    subject = Subject("base", lambda whole: {"m": "1"}, "fp32", lambda: student, {})
    assert evaluate(run, subject, config) and not evaluate(run, subject, config)
    rows = {task: read_jsonl(run.eval("base") / f"samples_{task}.jsonl") for task in OURS}
    for column in ("question", "target", "group", "cluster", "doc_hash"):
        plain, *others = ([row[column] for row in rows[task]] for task in OURS)
        assert all(each == plain for each in others), column
    results = read_json(run.eval("base") / "results.json")
    assert set(OURS) <= results["results"].keys()
    assert results["chance"]["shapes@no_picture"] == results["chance"]["shapes"]
    saved = {path.parent.name for path in tmp_path.rglob("*.png")}
    assert saved == {"shapes", "shapes@other_picture"}


def test_a_benchmarks_questions_on_a_picture_share_another(tmp_path, monkeypatch):
    """Rows of POPE: no question gets an equal picture, whatever its row, and clusters stay together."""
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    shown = ("red", "red", "blue", "lime", "red", "blue")
    save(tmp_path, "pope", [
        {"id": str(k), "question_id": str(k), "question": f"Is there a dog, {k}?", "answer": ("yes", "no")[k % 2],
         "image_source": "ours", "image": picture(colour), "category": "random"} for k, colour in enumerate(shown)
    ], "test")  # fmt: skip
    task = variant("vlopd_pope@other_picture")
    docs = list(task.eval_docs)
    others = [colours(task.doc_to_image(doc)) for doc in docs]
    own = [colours(task.own_image.own(doc)) for doc in docs]
    assert all(a != b for a, b in zip(own, others, strict=True))
    assert (
        len({tuple(a + b) for a, b in zip(own, others, strict=True)}) == 3
    )  # one other picture for each
    assert others == [
        colours(variant("vlopd_pope@other_picture").doc_to_image(doc)) for doc in docs
    ]
    blind = variant("vlopd_pope@no_picture")
    assert blind.doc_to_text(docs[0]) == "Is there a dog, 0?\nAnswer yes or no."
    assert blind.config.doc_to_image is None and blind.doc_to_target(docs[0]) == "yes"


def test_as_many_pictures_as_the_question_marks(own):
    """From a question with as many; where there is none, from several, which the task's metadata count."""
    rows = [["red"], ["blue"], ["red", "blue"], ["lime", "pink"], ["gold", "red", "tan"]]
    task = variant("mine@other_picture", own(rows))
    shown = [colours(task.doc_to_image(doc)) for doc in task.eval_docs]
    before = [colours(task.own_image.own(doc)) for doc in task.eval_docs]
    assert [len(each) for each in shown] == [len(each) for each in before] == [1, 1, 2, 2, 3]
    assert all({*a}.isdisjoint(b) for a, b in zip(before, shown, strict=True))
    assert shown[0] == before[1] and shown[1] == before[0]
    assert shown[2] == before[3] and shown[3] == before[2]
    assert task.config.metadata["pictures_of_several"] == 1


def test_pictures_in_a_column_that_the_task_names(student, tmp_path):
    """`doc_to_image: [image]`, as lm-eval's tasks have it, with its variants: one picture each, or none."""
    columns = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    rows = [
        {"question": f"which {c}", "answer": c, "image": picture(c)}
        for c in ("red", "blue", "lime")
    ]
    path = save(tmp_path, "named", rows, "test", columns)
    (tmp_path / "named.yaml").write_text(
        f"task: named\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_image: [image]\ndoc_to_text: '<image>{{question}}'\n"
        "doc_to_target: answer\ngeneration_kwargs: {max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    config = EvalConfig(
        tasks=("named", "named@no_picture", "named@other_picture"), include=str(tmp_path)
    )
    assert find_problems(config, {"student": student}) == []
    task = variant("named", str(tmp_path))
    shown = [colours(task.doc_to_image(row)) for row in task.eval_docs]
    task = variant("named@other_picture", str(tmp_path))
    others = [colours(task.doc_to_image(row)) for row in task.eval_docs]
    assert shown == [[(255, 0, 0)], [(0, 0, 255)], [(0, 255, 0)]]
    assert sorted(others) == sorted(shown) and all(
        a != b for a, b in zip(shown, others, strict=True)
    )


def test_the_same_picture_everywhere_is_refused(own):
    """One line: there is no other picture to show."""
    task = variant("mine@other_picture", own([["red"], ["red"]]))
    with pytest.raises(ConfigError, match="mine@other_picture: its questions all show the same"):
        task.doc_to_image(task.eval_docs[0])


def test_examples_keep_their_pictures_or_lose_them_too(own):
    """With few-shot examples only the question's picture is another's; without pictures nothing is marked."""
    include = own([["red"], ["blue"], ["lime"], ["gold"]])
    for name, count in (("mine@other_picture", 2), ("mine@no_picture", 0)):
        task = variant(name, include, 1)
        doc = task.eval_docs[0]
        prompt = task.fewshot_context(doc, num_fewshot=1, gen_prefix=None)
        assert prompt.count("<image>") == count and prompt.rstrip().endswith("which 0")
        if count:
            example, own_ = task.doc_to_image(doc)
            assert colours([own_]) != [(255, 0, 0)] and colours([example]) != [(255, 0, 0)]


def test_variants_of_a_group_and_within_one(own, tmp_path):
    """All members of a group's variant are blind; a group of one's own may name a task beside its variants."""
    include = own([["red"], ["blue"]])
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [mine, mine@no_picture]\n"
        "aggregate_metric_list: [{metric: exact_match, aggregation: mean}]\n"
    )
    (tmp_path / "one.yaml").write_text("group: one\ntask: [mine]\nmetadata: {version: 1.0}\n")
    tasks = Tasks.of(["both", "one@no_picture"], include)
    both = load_task(tasks, "both", None)["tasks"]
    assert [both[n].config.doc_to_image is None for n in ("mine", "mine@no_picture")] == [
        False,
        True,
    ]
    loaded = load_task(tasks, "one@no_picture", None)
    assert list(loaded["tasks"]) == ["mine@no_picture"]
    assert loaded["group_map"] == {"one@no_picture": ["mine@no_picture"]}
    assert tasks.digest("one@no_picture") != tasks.digest("one")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("capitals@no_picture", "capitals has no pictures; name it without @no_picture"),
        ("shapes_text@other_picture", "shapes_text has no pictures"),
        ("shapes@no_picture@other_picture", "a variant of a variant; name 'shapes@no_picture'"),
        (
            "shapes@blind",
            "no variant 'blind'; there are shapes@no_picture and shapes@other_picture",
        ),
    ],
)
def test_what_cannot_be_blind_is_refused(task, message):
    """A task without pictures and an unknown variant: one line."""
    with pytest.raises(ConfigError, match=message) as error:
        variant(task)
    assert "\n" not in str(error.value)


def test_checked_before_training(student, folders):
    """Without pictures a text-only student is fine too; with another's it is refused as with its own."""
    config = EvalConfig(tasks=("shapes@no_picture", "shapes_choice@other_picture"), limit=3)
    assert find_problems(config, {"student": student}) == []
    text = {"student": load(str(folders["llm", "student"]), torch.float32)}
    (problem,) = find_problems(config, text)
    assert problem.startswith("task shapes_choice@other_picture has pictures, but student")
    for task, said in (
        ("forgetting", "choose forgetting_text"),
        ("forgetting@other_picture", "choose forgetting_text"),
    ):
        (problem,) = find_problems(EvalConfig(tasks=(task,)), text)
        assert said in problem and f"task {task} has pictures" in problem


def test_variants_are_listed_when_asked_for():
    """With @ in the pattern; the variant without pictures is a text task."""
    rows = {row.task: row for row in list_tasks("shapes@*")}
    assert [row.modality for row in rows.values()] == ["text", "image"]
    assert rows["shapes@no_picture"].chance == "measured"
    assert not any("@" in row.task for row in list_tasks("shapes*"))


def test_the_forgetting_suites(monkeypatch):
    """The image suite is of our tasks alone; the text suite names tasks that lm-eval has, which are looked up once."""
    ours = Tasks.of(["forgetting"])
    assert ours.has_members("forgetting") and not ours.has_members("forgetting_text")
    assert ours.task_index["forgetting"].cfg["task"] == [
        "vlopd_hallusion_bench", "vlopd_ai2d", "vlopd_ocrbench",
    ]  # fmt: skip
    stock = Path(lm_eval.__file__).parent / "tasks"
    named = {path.stem for place in ("arc", "hellaswag", "winogrande", "truthfulqa")
             for path in (stock / place).rglob("*.yaml")} | {"winogrande"}  # fmt: skip
    assert set(ours.task_index["forgetting_text"].cfg["task"]) <= named
    scans = []
    monkeypatch.setattr("evals.scoring.all_tasks", lambda include: scans.append(include) or ours)
    assert Tasks.of(["forgetting_text", "shapes"]) is ours and scans == [None]
