"""Questions of reasoning-gym: split by their text, asked once, scored by our own rules; the package is an extra."""

import sys

import pytest
from lm_eval.tasks import TaskManager, get_task_dict

from evals.scoring import TASKS
from evals.tasks import reasoning as task
from vlopd.data import reasoning
from vlopd.data.reasoning import SUBJECTS, ReasoningDataset, split_of, unique_questions
from vlopd.errors import ConfigError


@pytest.fixture
def package():
    """Tests of questions themselves need the extra `reasoning`."""
    return pytest.importorskip("reasoning_gym")


def test_a_missing_package_is_one_line(monkeypatch):
    """Without the extra, data and task say what to install."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning.generator.cache_clear()
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for ask in (
        lambda: ReasoningDataset("train", 3)[0],
        lambda: get_task_dict(["reasoning_sorting"], manager),
    ):
        with pytest.raises(
            ConfigError, match=r"need the package reasoning-gym .*\[reasoning\]"
        ) as error:
            ask()
        assert "\n" not in str(error.value)


def test_the_split_is_the_texts_alone():
    """Fixed by the words of the question, in shares of eight, one and one tenths."""
    assert split_of("What is 1 + 1?") == "train"
    shares = [split_of(f"question {i}") for i in range(4000)]
    assert shares.count("test") == pytest.approx(400, abs=100)
    assert shares.count("validation") == pytest.approx(400, abs=100)
    assert split_of("question 7") == shares[7]


@pytest.mark.parametrize(
    ("kind", "answer", "said", "expected"),
    [
        ("arithmetic", "-103", "The answer is -103.", (1, 0)),
        ("arithmetic", "3", "4 - 1 = 3", (1, 0)),
        ("arithmetic", "3", "4", (0, 0)),
        ("arithmetic", "3", "three", (1, 0)),
        ("arithmetic", "3", "many", (0, 1)),
        ("sorting", "ash, bee, cat", "Sorted: ash, bee, cat", (1, 0)),
        ("sorting", "ash, bee, cat", "Ash\nash, bee, cat.", (1, 0)),
        ("sorting", "ash, bee, cat", "ash, cat, bee", (0, 0)),
        ("sorting", "ash, bee, cat", "ash, bee, cat, dog", (0, 0)),
        ("sorting", "ash, bee, cat", "...", (0, 1)),
        ("spelling", "nus", "Spelt backwards it is nus", (1, 0)),
        ("spelling", "nus", "The answer is **NUS**.", (1, 0)),
        ("spelling", "nus", "sun", (0, 0)),
        ("spelling", "nus", "", (0, 1)),
    ],
)
def test_scoring(kind, answer, said, expected):
    """Right, wrong, and no answer at all."""
    scores = task.process_results({"kind": kind, "answer": answer}, [said])
    assert (scores["exact_match"], scores["extraction_failure"]) == expected


def test_no_test_question_is_in_training(package):
    """Of 400 questions of each split and subject, drawn with several seeds, no two splits share one."""
    asked = {
        (split, subject): {
            row["question"]
            for seed in (0, 7)
            for row in unique_questions(subject, split, 200, seed)
        }
        for split in ("train", "validation", "test")
        for subject in SUBJECTS
    }
    trained = {e.question for seed in (0, 1) for e in ReasoningDataset("train", 400, seed)}
    for subject in SUBJECTS:
        splits = [asked[split, subject] for split in ("train", "validation", "test")]
        assert len(set.union(*splits)) == sum(map(len, splits))
        assert not trained & (splits[1] | splits[2])


def test_every_question_is_asked_once_and_is_answered_right(package):
    """The tasks' documents are different questions, and their own answers score 1."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for subject in SUBJECTS:
        loaded = get_task_dict([f"reasoning_{subject}"], manager)[f"reasoning_{subject}"]
        docs = list(loaded.test_docs())
        assert len({doc["question"] for doc in docs}) == len(docs) == 1000
        assert all(loaded.process_results(doc, [doc["answer"]])["exact_match"] == 1 for doc in docs)
        assert all(split_of(doc["question"]) == "test" for doc in docs)


def test_sums_are_what_they_say(package):
    """The package's answers, checked: sums add up, words are sorted, spellings are reversed."""
    for row in unique_questions("arithmetic", "test", 50, 1):
        expression = row["question"].partition(": ")[2].partition(" =")[0]
        total, sign = 0, 1
        for part in expression.split():
            sign = {"+": 1, "-": -1}.get(part, sign)
            total += 0 if part in "+-" else sign * int(part)
        assert str(total) == row["answer"]
    for row in unique_questions("sorting", "test", 50, 1):
        words = row["answer"].split(", ")
        assert words == sorted(words, reverse="descending order (" in row["question"])
    for row in unique_questions("spelling", "test", 50, 1):
        assert f": {row['answer'][::-1]}\n" in row["question"]


def test_examples_depend_on_split_seed_and_index_alone(package):
    """The same index is the same question whatever was asked before; kinds come at equal rates."""
    long, short = ReasoningDataset("train", 90, 3), ReasoningDataset("train", 5, 3)
    assert [e.question for e in short] == [long[i].question for i in range(5)]
    assert [e.question for e in short] != [
        ReasoningDataset("train", 5, 4)[i].question for i in range(5)
    ]
    kinds = [e.fields["kind"] for e in long]
    assert all(15 <= kinds.count(subject) <= 45 for subject in SUBJECTS)
    only = ReasoningDataset("train", 20, 3, ("spelling",))
    assert {e.fields["kind"] for e in only} == {"spelling"}


def test_too_few_questions_are_said(package):
    """More questions than a split has is one line with both numbers."""
    with pytest.raises(
        ConfigError, match=r"too few different questions in split 'test': .* 10000 asked"
    ):
        unique_questions("spelling", "test", 10_000, 0)
