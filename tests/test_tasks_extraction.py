"""Extraction and comparison of answers: rules with known outcomes, and no text that costs time or runs code."""

import random
import time

import pytest

from vlopd.grading import extraction
from vlopd.grading.equality import relaxed_match, same_math, same_number


@pytest.mark.parametrize(
    ("text", "expression", "number"),
    [
        ("The answer is 12.", "12", "12"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (
            r"\boxed{3}, no: \boxed{\sqrt{\frac{2}{3}}}.",
            r"\sqrt{\frac{2}{3}}",
            r"\sqrt{\frac{2}{3}}",
        ),
        (r"\boxed{12 \text{ apples}}", r"12 \text{ apples}", "12"),
        ("**Answer:** 7", "7", "7"),
        ("**Answer**: 7", "7", "7"),
        ("The answer to this question is:\n$x = 3$", "$x = 3$", "3"),
        ("12 + 3 = 15 apples\n#### 1,234", "1,234", "1,234"),
        ("To answer it, we add. I got 3, then 5-3 gives 2", "2", "2"),
        ("from 10 to -4.5", "-4.5", "-4.5"),
        ("<think>perhaps 5</think>The answer is 9", "9", "9"),
        ("<think>perhaps 5, or 6", None, None),
        ("I do not know", None, None),
        ("", None, None),
        (r"\boxed{12", "12", "12"),
        (r"\boxed{}", None, ""),
    ],
)
def test_extraction(text, expression, number):
    """Boxed, else marked, else the last number; thoughts do not count, and neither does what was cut off."""
    assert extraction.math_answer(text) == expression
    assert extraction.number_answer(text) == (number or None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a cat", "B"),
        ("**B**", "B"),
        ("option B", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("The answer is B", "B"),
        ("The correct option is B because of its ears", "B"),
        ("a is wrong.\nAnswer: (C)", "C"),
        ("a cat", "B"),
        ("The answer is a cat.", "B"),
        ("It is a cat, clearly", "B"),
        ("I am sure it is (D)", "D"),
        ("A blue one, I would say", None),  # an article, a colour that is no choice
        ("a cat or a dog", None),
        ("E", None),
        ("<think>B", None),
    ],
)
def test_a_letter_is_read(text, letter):
    """Letters set off from what follows, or a choice in its own words; two choices at once are no answer."""
    assert extraction.choice_letter(text, ["a dog", "a cat", "I think", "red circle"]) == letter


def test_yes_or_no_and_short_answers():
    """The first yes or no of the answer; the last line, without its dressing."""
    assert extraction.yes_or_no("Yes, there is no doubt") == "yes"
    assert extraction.yes_or_no("Looking... Answer: no") == "no"
    assert extraction.yes_or_no("there is nothing known of it") is None
    assert extraction.short_answer("Let me see.\n**Blue whale.**") == "Blue whale"
    assert extraction.short_answer(" \n") is None


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
    assert relaxed_match("104", "100") and relaxed_match("95%", "100")
    assert not relaxed_match("106", "100") and not relaxed_match("0.1", "0")
    assert relaxed_match("Light Blue", "light blue") and not relaxed_match("blue", "light blue")


HARD = (r"\boxed{", "}", "{", "(", ")", "[", "]", "answer is", "Answer:", "####", "</think>", "<think>", "$", "%", "^",
        "_", "/", ",", ".", "-", r"\frac", r"\sqrt", r"\pi", r"\text{", "pi", "x", "B", "(A)", "0", "7", "1,234", " ",
        "\n", "\u0663", "\u00b2", "i", "*", "=", "yes", "no", r"\infty", r"\left(")  # fmt: skip


def test_no_text_breaks_the_rules():
    """Four thousand random strings of what the rules look for: something or nothing is found, and compared."""
    rng = random.Random(0)
    for _ in range(4_000):
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
                relaxed_match(said, "7")


@pytest.mark.parametrize(
    "text",
    ["1" * 50_000, "1," * 20_000, "111," * 5_000, "answer " * 10_000, r"\boxed{" * 5_000, " " * 50_000,
     "(" * 50_000, "the answer is " * 5_000, r"\boxed{" + "1" * 50_000 + "}", r"\boxed{" + "x^" * 5_000 + "}",
     r"\boxed{" + "1 " * 20_000 + "}"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_long_repetitions_take_no_time(text):
    """What a model that repeats itself writes is read in less than a second of the processor."""
    start = time.process_time()
    for said in (
        extraction.math_answer(text),
        extraction.number_answer(text),
        extraction.short_answer(text),
    ):
        if said is not None:
            assert not same_number(said, "12") and not same_math(said, "12")
    extraction.choice_letter(text, ["a cat", "a dog"])
    assert time.process_time() - start < 1
