"""Equality of mathematics: a table of pairs, respellings of every kind, and no text that costs time or runs code."""

import random
import threading
import time
from fractions import Fraction

import pytest

from tests.styles.mathematics_pairs import PAIRS
from vlopd.grading import mathematics
from vlopd.grading.equality import number, same_math, unreadable


def test_pairs_are_judged_as_a_person_would():
    """All pairs of the table, of which math-verify judges at least 124 alike; a reason stands beside the others."""
    missed = [
        (answer, gold) for answer, gold, right, _ in PAIRS if same_math(answer, gold) != right
    ]
    assert not missed
    assert sum(not why for *_, why in PAIRS) >= 124
    assert len({(answer, gold) for answer, gold, *_ in PAIRS}) == len(PAIRS)


@pytest.mark.slow
def test_math_verify_disagrees_where_the_table_says_so():
    """math-verify as its documentation calls it, on the same pairs."""
    from math_verify import parse, verify

    for answer, gold, right, why in PAIRS:
        said = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
        assert (verify(*said, timeout_seconds=None) == right) == (not why), (answer, gold)


def of_number(n: int) -> list[str]:
    grouped = f"{n:,}"
    braces, thin, space = (grouped.replace(",", mark) for mark in ("{,}", r",\!", r"\,"))
    units = (
        r"\text{ m}^2",
        r" \text{ cm}",
        r"\,\mathrm{kg}",
        " apples",
        r"\%",
        r"^\circ",
        " degrees",
        r"\text{ mph}",
    )
    dressed = (
        f"${n}$",
        rf"\$ {n}",
        rf"\${braces}",
        f"x = {n}",
        f"f(x)={n}",
        rf"\({n}\)",
        f"{n}.",
        f"{n}.0",
        f"+{n}",
    )
    return [
        grouped,
        braces,
        thin,
        space,
        f"{n - 4}+4={n}",
        *(f"{n}{unit}" for unit in units),
        *dressed,
    ]


def of_fraction(n: int) -> list[str]:
    a, b = n, n + 1
    forms = (
        r"\frac{%d}{%d}",
        r"\dfrac{%d}{%d}",
        r"\tfrac {%d} {%d}",
        "%d/%d",
        "(%d)/(%d)",
        r"\left(\frac{%d}{%d}\right)",
    )
    return [
        *(form % (a, b) for form in forms),
        rf"\frac{{{2 * a}}}{{{2 * b}}}",
        rf"-\frac{{-{a}}}{{{b}}}",
    ]


def of_root(n: int) -> list[str]:
    return [rf"{n}\sqrt2", rf"{n} \sqrt{{ 2 }}", rf"\sqrt{{{2 * n * n}}}",
               rf"\sqrt{{2}} \cdot {n}", rf"{n}\sqrt{{2}}\text{{ cm}}",
            rf"{n}*sqrt(2)", rf"\frac{{{2 * n}}}{{\sqrt{{2}}}}"]  # fmt: skip


def of_roots(n: int) -> list[str]:
    one, other = rf"{n} + \sqrt{{3}}", rf"{n}-\sqrt{{3}}"
    joined = (", ", r" \text{ and } ", " or ", r",\ ")
    return [rf"{n} \pm \sqrt{{3}}", rf"x={n}\pm\sqrt3", rf"{other},{one}", rf"\{{{one}, {other}\}}",
            *(f"{one}{mark}{other}" for mark in joined), f"x = {one} or x = {other}"]  # fmt: skip


def of_point(n: int) -> list[str]:
    return [f"({n},3)", f"({n}, 3)", rf"\left({n}, 3\right)", f"$({n},3)$", f"(x, y) = ({n}, 3)", f"x = {n}, y = 3",
            rf"\left( {n}, \frac{{6}}{{2}} \right)", rf"\big({n},\, 3\big)"]  # fmt: skip


def of_interval(n: int) -> list[str]:
    return [f"[{n},\\infty)", f"[{n}, +\\infty)", rf"\left[{n},\infty\right)", rf"x \in [{n},\infty)", rf"x \ge {n}",
            rf"x\geq{n}", rf"{n} \le x"]  # fmt: skip


def of_union(n: int) -> list[str]:
    return [rf"(-\infty,0)\cup({n},{n + 1})", rf"({n}, {n + 1}) \cup (-\infty, 0)",
            rf"\left(-\infty,0\right) \cup \left({n},{n + 1}\right)"]  # fmt: skip


def of_set(n: int) -> list[str]:
    return [
        rf"\{{1,{n},{n + 7}\}}",
        rf"\{{{n + 7}, 1, {n}\}}",
        rf"\left\{{{n},{n + 7},1\right\}}",
        f"{n}, {n + 7}, 1",
    ]


def of_matrix(n: int) -> list[str]:
    rows = (rf"{n}\\-2", rf" {n} \\ -2 ", rf"{n} \\ {{-2}}", rf"{n}\\ -\frac{{4}}{{2}}")
    return [
        rf"\begin{{{kind}}}{row}\end{{{kind}}}" for row in rows for kind in ("pmatrix", "bmatrix")
    ]


def of_polynomial(n: int) -> list[str]:
    return [f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}", f"{n * n} + {2 * n}x + x^{{2}}",
               f"(x+{n})(x+{n})", f"f(x) = (x+{n})^{{2}}",
            f"y=x^2+{2 * n}x+{n * n}"]  # fmt: skip


def of_base(n: int) -> list[str]:
    return [
        f"{oct(n)[2:]}_8",
        f"{oct(n)[2:]}_{{8}}",
        f"${oct(n)[2:]}_8$",
        f"{oct(n)[2:]} _ {{ 8 }}",
    ]


def of_absolute(n: int) -> list[str]:
    return [f"|x-{n}|", rf"\left|x-{n}\right|", rf"\lvert x - {n} \rvert", f"|{n}-x|"]


def of_logarithm(n: int) -> list[str]:
    return [rf"\ln {n}", rf"\ln({n})", rf"\ln{{{n}}}", rf"\log_e {n}"]


def of_binomial(n: int) -> list[str]:
    return [
        rf"\binom{{{n}}}{{2}}",
        rf"\dbinom{{{n}}}{{2}}",
        str(n * (n - 1) // 2),
        rf"\frac{{{n}\cdot {n - 1}}}{{2}}",
    ]


def of_word(n: int) -> list[str]:
    word = ("even", "Evelyn", "no solution", "isosceles")[n % 4]
    return [
        word,
        word.title(),
        rf"\text{{{word}}}",
        rf"\textbf{{{word}}}",
        rf"\mathrm{{{word}}}",
        f"{word}.",
    ]


def of_letter(n: int) -> list[str]:
    letter = "ABCDE"[n % 5]
    return [
        letter,
        f"({letter})",
        rf"\text{{{letter}}}",
        rf"\text{{({letter})}}",
        rf"\mathrm{{({letter})}}",
        rf"(\text{{{letter}}})",
    ]


KINDS = [of_number, of_fraction, of_root, of_roots, of_point, of_interval, of_union, of_set, of_matrix, of_polynomial,
         of_base, of_absolute, of_logarithm, of_binomial, of_word, of_letter]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])
def test_respellings_are_equal_and_neighbours_are_not(kind):
    """Each spelling of a value equals the first, whichever is the gold; no spelling equals another value."""
    rng = random.Random(kind.__name__)
    for n in (7, rng.randint(20, 60), rng.randint(1001, 9999) if kind is of_number else 11):
        gold, *spellings = kind(n)
        other = kind(n + 1)
        assert not unreadable(gold)
        for spelling in spellings:
            assert same_math(spelling, gold), (spelling, gold)
            assert not same_math(spelling, other[0]), (spelling, other[0])
        assert same_math(gold, rng.choice(spellings))
        assert not same_math(rng.choice(other), gold)


def test_numbers_are_read_exactly():
    """Fractions, mixed numbers, repeating decimals, thousands and degrees; no rounding, and no two numbers as one."""
    read = {
        r"\frac{3}{4}": Fraction(3, 4), r"\dfrac34": Fraction(3, 4), r"-\frac{1}{2}": Fraction(-1,
        2), "1 1/2": Fraction(3, 2),
        r"-2\frac{1}{2}": Fraction(-5, 2), r"0.\overline{09}": Fraction(1, 11), r"1.2\overline{3}": Fraction(37, 30),
        r"336^\circ": 336, r"336^{\circ}": 336, "10{,}080": 10080, r"10,\!080": 10080, "12 000": 12000, "- 5": -5,
        "\u22125": -5, "1 2": None, "1,2": None, "1/0": None, "1 1/0": None, r"\frac{1}{0}": None, "": None, "$": None,
    }  # fmt: skip
    assert {text: number(text) for text in read} == read


ADVERSARIAL = [
    "9^{9^{9^9}}", r"\binom{10^9}{10^8}", "(x+1)^{100000}", "(" * 140 + "1" + ")" * 140,
    r"\frac{" * 40 + "1" + "}{2}" * 40,
    "1," * 140, "1" * 100_000, "a" * 100_000, " " * 100_000, "a" * 280 + "=", "\\" * 299, r"\left" * 60,
    "__import__('os').system('true')", "().__class__.__bases__[0]", "exec('1')", "lambda: 0", "0\x00", "\x00", "\ud800",
    "\u0663\u0664", "\u00b2", "\u202e12", "\U0001f600", "$$$$", "=", "==5", r"\pm", ",", "()", "[]", r"\{\}", "%",
]  # fmt: skip


def test_hostile_text_is_unequal_in_bounded_time(monkeypatch, tmp_path):
    """Towers of powers, deep nesting, long repetitions, code, NUL and broken Unicode equal nothing, and cost little."""
    monkeypatch.setattr(mathematics, "SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    code = "open('made','w')"
    start = time.monotonic()
    for text in [*ADVERSARIAL, code, rf"\text{{{code}}}", f"{{{code}}}"]:
        assert not same_math(text, r"\frac{x}{7}+\sqrt{2}"), text[:40]
        unreadable(text)
    assert not same_math("9^{9^{9^9}}", "9^{9^{9^8}}")
    assert time.monotonic() - start < 90  # a limit each, and a start after each that reached it
    assert not list(tmp_path.iterdir())
    assert same_math(r"\sqrt{18}", r"3\sqrt{2}")  # the next process answers


def test_pairs_are_judged_in_any_thread():
    """Four threads share the process and get their own answers; a process that died is started again."""
    found: dict[int, list[bool]] = {}

    def ask(k: int) -> None:
        found[k] = [same_math(rf"\sqrt{{{k * k * n}}}", rf"{k}\sqrt{{{n}}}") for n in (2, 3)]
        found[k] += [same_math(rf"\sqrt{{{k * k * 2 + 1}}}", rf"{k}\sqrt{{2}}")]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(31, 35)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [True, True, False] for k in range(31, 35)}
    assert mathematics._process is not None
    mathematics._process.kill()
    mathematics._process.wait()
    assert same_math(r"\sqrt{75}", r"5\sqrt{3}")


def test_plain_answers_need_no_process(monkeypatch):
    """Equal text, numbers, words, bases and lists of them are decided without math-verify."""
    monkeypatch.setattr(mathematics, "_running", lambda: pytest.fail("math-verify was asked"))
    for answer, gold, right in [
        ("12", "12", True), ("12", "13", False), (r"\frac{1}{3}", "1/3", True), ("5 cm", "5",
        True), (r"x^2 + 1", "x^2+1", True),
        ("even", r"\text{odd}", False), ("odd", "17", False), ("1, 2", "2,1", True), ("(1,2)",
        "(2,1)", False), ("52", "52_8", False),
    ]:  # fmt: skip
        assert same_math.__wrapped__(answer, gold) == right


@pytest.mark.parametrize("gold", ["$", "", "%", r"\frac{1}{2", "}{", "1" * 301, r"\text{}"])
def test_golds_that_nothing_can_match(gold):
    """Nothing left, unbalanced braces, or too long."""
    assert unreadable(gold)
