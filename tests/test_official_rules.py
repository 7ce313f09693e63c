"""Official rules of ChartQA, MMMU and POPE, by cases worked out from their published definitions, quirks included."""

import pytest

from evals.tasks.benchmarks import vision
from evals.tasks.benchmarks.official_rules import mmmu_choice, mmmu_open, pope, relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("57%", "0.57", True),
        ("57", "57%", False),
        ("57%", "57%", True),
        ("104", "100", True),
        ("106", "100", False),
        ("-95", "-100", True),
        ("0", "0", True),
        ("0.0", "0", False),  # a target of 0 is compared as text
        ("1,000", "1000", False),
        ("Light Blue", "light blue", True),
        ("blue", "light blue", False),
        ("12 cm", "12", False),
    ],
)
def test_chartqas_relaxed_accuracy(prediction, target, right):
    """A trailing % divides by 100, numbers may be 5 % off, all else is equal as text in lower case."""
    assert relaxed_accuracy(prediction, target) is right


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(A) is wrong, (C) is right", "C"),
        ("The answer is B.", "B"),
        ("A or B then ", "B"),
        ("B.a leaf", "B"),
        ("I think that it must be a leaf", "B"),
        ("a leaf", None),  # five words or fewer are not searched for texts
        ("many words here but no option among them", None),
        ("", None),
    ],
)
def test_mmmus_choice(response, letter):
    """The last bracketed letter, else the last separate one, else the last option named; no random letter."""
    assert mmmu_choice(response, ["a cell", "a leaf", "a root"]) == letter


@pytest.mark.parametrize(
    ("response", "accepted", "right"),
    [
        ("The area is 12.50 cm", ["12.5"], True),
        ("12.504", ["12.5"], True),
        ("12.4", ["12.5"], False),
        ("So the total is 1,234", ["1234"], True),
        ("It is classicism", ["neo classical", "classicism"], True),
        ("It is Neo-Classical", ["neo classical"], False),
        ("It is a style of its own", ["A"], True),  # the article
        ("B", ["A"], False),
        ("2 + 2 = 5", ["5"], True),
    ],
)
def test_mmmus_open_answers(response, accepted, right):
    """Numbers to two decimals, or a phrase within the part after a key word; one letter matches the article."""
    assert mmmu_open(response, accepted) is right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Yes", "yes"),
        ("No, there is none", "no"),
        ("There is not a dog. Yes", "no"),
        ("There is a dog. No cat", "yes"),
        ("There isn't", "yes"),
        ("a wall, perhaps", "yes"),
        ("", None),
    ],
)
def test_popes_answer(response, answer):
    """No where the first sentence has No, no or not as a word, else yes; nothing at all is neither."""
    assert pope(response) == answer


@pytest.mark.parametrize(
    ("said", "answer", "question", "official", "careful"),
    [
        ("57%", "0.57", "What share?", 1, 1),
        ("57", "57%", "What share?", 0, 1),
        ("The total is 1,000.", "1000", "How many?", 0, 1),
        ("2015", "2016", "In which year was it highest?", 1, 0),
        ("The leading colour is light blue.", "Light blue", "Which colour leads?", 1, 1),
        ("red", "Light blue", "Which colour leads?", 0, 0),
        ("960 visitors", "1000", "How many?", 0, 1),
    ],
)
def test_chartqa_by_both_rules(said, answer, question, official, careful):
    """Percents, units and separators are read by the careful rule alone, to which years are exact."""
    scores = vision.score_chartqa({"answer": answer, "question": question}, [said])
    assert scores == {"relaxed_accuracy": official, "careful": careful, "extraction_failure": 0}


@pytest.mark.parametrize(
    ("said", "choices", "accepted", "official", "careful", "unread"),
    [
        ("It is a style of its own.", [], ["A"], 1, 0, 0),
        ("The answer is A.", [], ["A"], 1, 1, 0),
        ("It is Neo-Classical", [], ["neo classical"], 0, 1, 0),
        ("The area is 12.50 square cm.", [], ["12.5"], 1, 1, 0),
        ("", [], [""], 0, 0, 1),
        ("B. a leaf", ["a cell", "a leaf"], [], 1, 1, 0),
        ("Answer: B\n\nOption (A) is wrong.", ["a cell", "a leaf"], [], 0, 1, 0),
        ("both", ["a cell", "a leaf"], [], 0, 0, 1),
        ("<think>it is B, I", ["a cell", "a leaf"], [], 0, 0, 1),
    ],
)
def test_mmmu_by_both_rules(said, choices, accepted, official, careful, unread):
    """The article is no answer to a careful reader, nor is a rejected option; nothing is drawn at random."""
    doc = {"choices": choices, "answer": "a leaf" if choices else "", "accepted": accepted}
    scores = vision.score_mmmu(doc, [said])
    assert scores == {"acc": official, "careful": careful, "extraction_failure": unread}


@pytest.mark.parametrize(
    ("said", "answer", "scores"),
    [
        ("There is a dog", "yes", {"acc": 1, "careful": 1, "yes_rate": 1, "f1": 1}),
        ("There isn't a dog.", "no", {"acc": 0, "careful": 1, "yes_rate": 1, "f1": 0}),
        ("There is no doubt: yes", "yes", {"acc": 0, "careful": 1, "yes_rate": 0, "f1": 0}),
        ("No.", "no", {"acc": 1, "careful": 1, "yes_rate": 0, "f1": -1}),
        ("", "yes", {"acc": 0, "careful": 0, "yes_rate": 0, "f1": 0, "extraction_failure": 1}),
        ("<think>yes", "yes", {"acc": 0, "careful": 0, "yes_rate": 0, "f1": 0, "extraction_failure": 1}),
    ],
)  # fmt: skip
def test_pope_by_both_rules(said, answer, scores):
    """Accuracy, F1 and the rate of yes are the official reading's; an unfinished thought is no yes."""
    assert vision.score_pope({"answer": answer}, [said]) == {"extraction_failure": 0, **scores}
