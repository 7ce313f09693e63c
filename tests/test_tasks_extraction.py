"""Extraction and comparison of answers: rules with known outcomes, and no text that costs time or runs code."""

import random
import time

import pytest

from evals.tasks.benchmarks.official_rules import relaxed_accuracy
from tests.styles import choices, short_answers, values, yes_no
from vlopd.grading import extraction
from vlopd.grading.equality import same_math, same_number
from vlopd.grading.values import numbers


def read_choices():
    return [
        (said, extraction.choice_letter(said, of), right) for said, of, right in choices.outputs()
    ]


def read_yes_no():
    return [(said, extraction.yes_or_no(said), right) for said, right in yes_no.outputs()]


def read_short_answers():
    return [(said, extraction.short_answer(said), right) for said, right in short_answers.outputs()]


@pytest.mark.parametrize(
    ("read", "accepted"),
    [
        (read_choices, choices.EXPECTED_MISSES),
        (read_yes_no, yes_no.EXPECTED_MISSES),
        (read_short_answers, short_answers.EXPECTED_MISSES),
    ],
    ids=["choices", "yes or no", "short answers"],
)
def test_outputs_are_read_as_a_careful_reader_does(read, accepted):
    """Of hundreds of outputs in the styles of real models, only the misses that are listed beside them."""
    rows = read()
    misses = [(said, found, right) for said, found, right in rows if found != right]
    assert len(rows) >= 300
    assert {said for said, _, _ in misses} == accepted, "\n".join(map(str, misses))


@pytest.mark.parametrize(("text", "expression", "number"), values.CASES)
def test_expressions_and_numbers(text, expression, number):
    """Statements, equations and conclusions give their value; a number within an expression is none by itself."""
    for found, right in (
        (extraction.math_answer(text), expression),
        (extraction.number_answer(text), number),
    ):
        assert right == "*" or found == right or found in (right or "").split("|"), (found, right)


@pytest.mark.parametrize(
    ("read", "text", "question", "answer"),
    [
        ("number", "So the speed is 12 m/s.", "", "12"),
        (
            "number",
            "It lasts 2 hours and 30 minutes, i.e. 150 minutes.",
            "How many minutes?",
            "150",
        ),
        ("number", "It rose from 20 to 35, an increase of 15.", "By how much did it rise?", "15"),
        ("number", "The total number of bolts is three.", "", "3"),
        ("number", "To simulate:\n```python\nprint(simulate(36))\n```", "", None),
        ("math", "So x = 7 or x = -3.", "", "x = 7, x = -3"),
        ("math", "It is zero at $t = 1$ and $t = 4$.", "", "t = 1, t = 4"),
        ("math", "The sum is convergent.", "Is it convergent or divergent?", "convergent"),
        ("math", "There are 5 apples.", "How many apples or pears are there?", "5"),
        ("math", "So the shape is a rhombus.", "", "rhombus"),
        ("math", "$(2+i)(1-i) = 2 - i + 1 = 3 - i$", "", "3 - i"),
        (
            "short",
            "The limit is 55. This is a common limit on such roads.",
            "What is the limit?",
            "55",
        ),
    ],
)
def test_last_sentences_conclude(read, text, question, answer):
    """Several roots, one of two that the question offers, units, and results after others of their kind."""
    name = "short_answer" if read == "short" else f"{read}_answer"
    assert getattr(extraction, name)(text, question) == answer


@pytest.mark.parametrize("text", ["", "<think>so 5", "Okay, 5</think>", "5 or B or yes</think>\n"])
def test_without_an_answer_nothing_is_read(text):
    """An empty answer, as of a thought that was cut off, gives none of any type."""
    assert extraction.strip_reasoning(text) == ""
    readers = (
        extraction.math_answer,
        extraction.number_answer,
        extraction.short_answer,
        extraction.yes_or_no,
    )
    assert [read(text) for read in readers] == [None] * 4
    assert extraction.choice_letter(text, ["5", "B"]) is None


def test_what_stands_in_boxes():
    r"""Balanced, nested, joined in a list, and with \boxed's other spellings; one that is cut off is none."""
    assert extraction.boxed(r"\boxed{3}, no: \boxed{\sqrt{\frac{2}{3}}}.") == r"\sqrt{\frac{2}{3}}"
    assert extraction.boxed(r"\boxed{1} and \boxed{2}") == "1, 2"
    assert extraction.boxed(r"\boxed{1} and then we get \boxed{2}") == "2"
    assert extraction.boxed(r"\fbox{\boxed{5}}") == "5" == extraction.boxed(r"\boxed 5")
    assert extraction.boxed(r"so \boxed{12") is None
    assert extraction.marked("Thus the final answer is **12**.") == "12"
    assert numbers("from 10 to -4.5")[-1] == "-4.5"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\frac12", "0.5"),
        (r"1\frac{1}{2}", "1.5"),
        (r"2\sqrt{2}", r"\sqrt8"),
        (r"\sqrt[3]{8}", "2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("x^{-2}", r"\frac{1}{x^2}"),
        (r"2\pi r", r"2 r \pi"),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("073", "73"),
        ("1,234", "1234"),
        (r"90^\circ", "90"),
        (r"10\%", "10"),
        (r"\$32,000", "32000"),
        (r"12\text{ cm}^2", "12"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x = 5", "5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        ("1, 2", "2,1"),
        (r"[0, \infty)", r"[0,\infty)"),
        ("3+4i", "4i+3"),
    ],
)
def test_equal_as_mathematics(a, b):
    """What has several spellings is the same, whichever of the two the model used."""
    assert same_math(a, b) and same_math(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/3", "0.33"),
        ("12345678901", "12345678902"),
        (r"\pi", "3.14"),
        ("east", "seat"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("2", "2,3"),
        ("x", "y"),
        ("(1+2)*3", "(1+3)*2"),
        ("1/0", "2/0"),
        ("", ""),
        ("9^9^9^9^9", "1"),
        ("(" * 150 + "1" + ")" * 150, "2"),
        ("__import__('os').getcwd()", "1"),
    ],
)
def test_unequal_as_mathematics(a, b):
    """Close is not equal, order counts in brackets; towers of powers and code are read in no time, and as nothing."""
    start = time.process_time()
    assert not same_math(a, b) and not same_math(b, a)
    assert time.process_time() - start < 0.5


def test_numbers_and_tolerance():
    """Exact, rounded to decimals, or within five per cent of the right one."""
    assert same_number("1,000", "1000.0") and not same_number("1.01", "1")
    assert same_number("2.346", "2.35", 2) and not same_number("2.36", "2.35", 2)
    assert not same_number("two", "2") and not same_number("1/0", "1")
    assert relaxed_accuracy("104", "100") and relaxed_accuracy("96%", "1")
    assert not relaxed_accuracy("106", "100") and not relaxed_accuracy("0.1", "0")
    assert relaxed_accuracy("Light Blue", "light blue") and not relaxed_accuracy(
        "blue", "light blue"
    )


HARD = (r"\boxed{", "}", "{", "(", ")", "[", "]", "answer is", "Answer:", "####", "</think>", "<think>", "$", "%", "^",
        "_", "/", ",", ".", "-", r"\frac", r"\sqrt", r"\pi", r"\text{", "pi", "x", "B", "(A)", "0", "7", "1,234", " ",
        "\n", "\u0663", "\u00b2", "i", "*", "=", "yes", "no", r"\infty", r"\left(")  # fmt: skip


def test_no_text_breaks_the_rules():
    """Fifteen hundred random strings of what the rules look for: something or nothing is found, and compared."""
    rng = random.Random(0)
    for _ in range(1_500):
        text = "".join(rng.choices(HARD, k=rng.randint(0, 14)))
        assert extraction.choice_letter(text, ["7", "x", "A"]) in (None, "A", "B", "C")
        assert extraction.yes_or_no(text) in (None, "yes", "no")
        for said in (
            extraction.math_answer(text),
            extraction.number_answer(text),
            extraction.short_answer(text),
        ):
            if said is not None:
                assert said
                assert not same_math(said, r"\text{neither}")
                same_number(said, "7", 1)
                relaxed_accuracy(said, "7")


LONG = (
    *(
        "1",
        "1,",
        "111,",
        "answer ",
        "\\boxed{",
        " ",
        "(",
        "the answer is ",
        "A ",
        "**B** ",
        "A is ",
        "<answer>",
    ),
    *(
        "$$ a",
        "wait, ",
        "\nAnswer: A",
        "- A: no\n",
        "\\[ ",
        "\nQuestion: 1",
        "there is ",
        "\\boxed{1} ",
        "x = ",
    ),
    *("option A ", "{", "\n"),
)


@pytest.mark.parametrize(
    "piece",
    [pytest.param(its, marks=pytest.mark.slow if k % 6 else ()) for k, its in enumerate(LONG)],
    ids=repr,
)
def test_the_time_grows_with_the_length(piece):
    """100,000 characters of what a model that repeats itself writes are read in seconds at most, by every rule."""
    text = "Hm " + piece * (100_000 // len(piece))  # no loop from its start, which would be cut
    start = time.process_time()
    for said in (
        extraction.math_answer(text, "How many dogs?"),
        extraction.number_answer(text, "How many dogs?"),
        extraction.short_answer(text, "How many dogs?"),
    ):
        if said is not None:
            assert not same_number(said, "12") and not same_math(said, "12")
    extraction.states(text, "12", "How many dogs?")
    extraction.yes_or_no(text, "Is there a dog?")
    extraction.choice_letter(text, ["a cat", "a dog", "x", "A"])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" + "1" * 50_000 + "}",
        r"\boxed{" + "x^" * 5_000 + "}",
        r"\boxed{" + "1 " * 20_000 + "}",
    ],
    ids=lambda text: text[:12],
)
def test_long_boxes_take_no_time(text):
    """A long box is read, and equal to nothing."""
    start = time.process_time()
    for said in (extraction.math_answer(text), extraction.number_answer(text)):
        assert said is None or (not same_number(said, "12") and not same_math(said, "12"))
    assert time.process_time() - start < 1
