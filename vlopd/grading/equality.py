r"""Equality of answers: as numbers, as mathematics, or within a tolerance; no model as judge.

Mathematics is compared as written, as exact numbers and as words, lists element by element; what is left is
math-verify's (mathematics.py).
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from vlopd.grading import mathematics
from vlopd.grading.words import in_latex, plain_words, text_of

LONGEST = 300
"""Maximum characters of a number or expression; longer ones are compared only as strings."""
MOST_PARTS = 24
"""Maximum elements of a list that is compared in any order."""


def same_number(answer: str, target: str, decimals: int | None = None) -> bool:
    """Whether two numbers are equal exactly or, with `decimals`, after rounding."""
    a, b = number(answer), number(target)
    if a is None or b is None:
        return False
    return a == b if decimals is None else round(a, decimals) == round(b, decimals)


def number(text: str) -> Fraction | None:
    r"""Parses a number: 1,234.5, -3/4, $12, 50%, 90^\circ, \frac{3}{4}, 1 1/2, 0.\overline{3}; None for other text."""
    if len(text) > 2 * LONGEST:
        return None
    bare = re.sub(r"\\[dtc]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4", text)
    bare = re.sub(r"(?<!\\)\\[!,;:]|(?<=\d)\{,\}(?=\d{3})", ",", bare)
    bare = re.sub(rf"[$%°€£]|\\[$%]|{DEGREES}", "", bare).replace("\u2212", "-").strip()
    bare = re.sub(r"(?<=\d)[, ]{1,2}(?=\d{3}(?!\d))", "", bare)
    bare = re.sub(r"^([-+]?)\s+|\s*(/)\s*", r"\1\2", bare)
    if len(bare) > LONGEST:
        return None
    if mixed := re.fullmatch(r"([-+]?)(\d+)\s+(\d+)/(\d+)", bare):
        sign, whole, above, below = mixed.groups()
        found = None if int(below) == 0 else int(whole) + Fraction(int(above), int(below))
    elif again := re.fullmatch(r"([-+]?)(\d*)\.(\d*)\\overline\{(\d+)\}", bare):
        sign, whole, start, period = again.groups()
        found = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(start)
        found += Fraction(f"{whole or 0}.{start or 0}")
    elif plain := re.fullmatch(r"([-+]?)(\d+\.?\d*|\.\d+)(?:/(\d+))?", bare):
        sign, above, below = plain.groups(default="1")
        found = None if int(below) == 0 else Fraction(above) / int(below)
        sign = plain[1]
    else:
        return None
    return -found if found is not None and sign == "-" else found


DEGREES = r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"


def unreadable(gold: str) -> str | None:
    """Why no answer can equal a reference answer of mathematics; None where one can."""
    if not tidy(gold):
        return "nothing in it is an answer"
    if len(gold) > LONGEST:
        return f"it has more than {LONGEST} characters"
    depths = [0]
    for sign in re.findall(r"(?<!\\)[{}]", gold):
        depths.append(depths[-1] + (1 if sign == "{" else -1))
    return "its braces are not balanced" if min(depths) < 0 or depths[-1] else None


@lru_cache(maxsize=1 << 16)
def same_math(answer: str, target: str) -> bool:
    r"""Whether two LaTeX answers are mathematically equal: `\frac12` and 0.5, `(x+1)^2` and `x^2+2x+1`.

    Lists without brackets and sets match in any order, points and intervals element by element in equal brackets.
    Units, currencies, degrees and the name before an equals sign are ignored; a number in another base equals only the
    same number in that base.
    """
    if max(len(answer), len(target)) > LONGEST:
        return answer.strip() == target.strip() != ""
    if ("%" in answer) != ("%" in target):
        x, y = number(answer), number(target)
        if x is not None and y is not None and (x / 100 == y if "%" in answer else x == y / 100):
            return True
    return _same(answer, target)


def _same(answer: str, target: str) -> bool:
    a, b = _sides(tidy(answer), tidy(target))
    if not a or not b:
        return False
    if _compact(a) == _compact(b):
        return True
    x, y = number(a), number(b)
    if x is not None and y is not None and (x == y or "," not in a + b):
        return x == y
    if _in_base(a) or _in_base(b):
        return _in_base(a) == _in_base(b)
    words = _words(a), _words(b)
    if any(words):
        return words[0] == words[1]
    (kind_a, parts_a), (kind_b, parts_b) = _parts(a), _parts(b)
    if kind_a == kind_b == "one":
        return mathematics.equal(*_distinct(a, b))
    kinds = {kind_a, kind_b}
    if "one" in kinds:  # an interval may be written as an inequality
        return "list" not in kinds and mathematics.equal(*_distinct(a, b))
    if len(parts_a) != len(parts_b):
        return False
    if kinds == {"list"} and len(parts_a) <= MOST_PARTS:
        left = list(parts_b)
        for part in parts_a:
            match = next((other for other in left if same_math(part, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    named = all("=" in part for part in (parts_a if kind_a == "list" else parts_b))
    if kind_a != kind_b and not ("list" in kinds and named):  # x = 1, y = 2 is the point (1, 2)
        return False
    return all(same_math(p, q) for p, q in zip(parts_a, parts_b, strict=True))


def tidy(text: str) -> str:
    r"""Normalises LaTeX: dollars, spacing, sizes, thousands separators, currencies, units, degrees, percent, text."""
    text = in_latex(text.strip())
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[!,])+(?=\d{3}(?!\d))", "", text)  # 10{,}080
    text = re.sub(r"(?<!\\)\\[()\[\]]|\\?[$%]|[€£]|°|" + DEGREES, "", text)
    text = re.sub(r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?", "", text)
    text = re.sub(r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-zA-Z]))|~|\s", " ", text)
    text = text.strip().rstrip(".").rstrip()
    text = re.sub(r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r"\\binom\s*(\w)\s*(\w)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\log_\{?e\}?(?![a-zA-Z])", r"\\ln", text)
    text = re.sub(r"\s*,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", ", ", text)
    text = re.sub(
        r"(?<![a-zA-Z\\])(pi|sqrt|infty|sin|cos|tan|log|ln|alpha|beta|theta|phi)(?![a-zA-Z])",
        r"\\\1",
        text,
    )
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<=[\w}})])\s*(?:{TEXT_UNIT})+$", "", text)
    text = re.sub(rf"^((?:\\[a-zA-Z]+|[^a-zA-Z])*[\d}})])(?:{PLAIN_UNIT})$", r"\1", text)
    text = text_of(text)
    if inside := re.fullmatch(r"\(([a-zA-Z])\)", text):  # a choice
        return inside[1]
    return text


TEXT_UNIT = (
    r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{(?!\s*[ei]\s*\})[^{}\d()]*\}"
    r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?\s*/?\s*"
)
PLAIN_UNIT = (
    r"\s*(?:[ckm]?m|kg|ft|in|mph)|\s+(?:[mgshL]|mg|hr|lb|oz|[a-zA-Z]{3,})"
    r"(?:(?:\s*/\s*|\s+)[a-zA-Z]+)*"
)
PLAIN_UNIT = rf"(?:{PLAIN_UNIT})(?:\s*/\s*[a-z]+)?(?:\^\{{?[23]\}}?|[\u00b2\u00b3])?"
"""Units after a number: of text macros, and as plain words, of which any long one is a unit."""


def _compact(text: str) -> str:
    """Without spaces, except the one that ends a macro's name."""
    return re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|\s", lambda m: m[1] + " " if m[1] else "", text)


NAME = r"[a-zA-Z\\\s]+(?:_\{?\w+\}?)?\s*(?:\(\w(?:,\s*\w)*\)|\\?\{[\w\s]+\})?"


def _sides(a: str, b: str) -> tuple[str, str]:
    r"""Without what is before an equals sign (or \in), if it is a name, or if only the first text has one."""
    equals = r"(?<![<>!\\:])=(?!=)|\\in(?![a-zA-Z])"
    cut = []
    for text, other in ((a, b), (b, a)):
        left, *right = re.split(equals, text)
        if right and ("," not in text or re.fullmatch(r"\([^()]*\)\s*", left)):
            alone = not re.search(equals, other)
            name = re.fullmatch(NAME, left.strip()) or re.fullmatch(r"\([^()]*\)\s*", left)
            if alone and (name or text is a or not re.search("[a-zA-Z]", left)):
                text = right[-1].strip()
        cut.append(text)
    return cut[0], cut[1]


def _in_base(text: str) -> tuple[str, int] | None:
    r"""The digits and the base of `52_8`, `1A_{16}`; None for other text, and in base ten."""
    found = re.fullmatch(r"(\d[\dA-Z]*)_\{?(\d+)\}?", _compact(text))
    return (found[1].lstrip("0"), int(found[2])) if found and found[2] != "10" else None


def _words(text: str) -> str:
    """The words of text that is no mathematics (three letters in a row, no sign); empty for mathematics."""
    if re.search(r"[\\^_={}<>+*/|]", text) or not re.search(r"[^\W\d_]{3}", text):
        return ""
    return plain_words(text)


def _parts(text: str) -> tuple[str, list[str]]:
    r"""The kind of a list, and its elements: "list" (any order, sets too), its brackets, or "one".

    >>> _parts("(1, 2]")
    ("(]", ["1", "2"])
    """
    first, last, inside = text[:1], text[-1:], text[1:-1]
    if text.startswith("\\{") and text.endswith("\\}"):
        first, last, inside = "{", "}", text[2:-2]
    pairs = {"(": ")]", "[": ")]", "{": "}"}
    if last in pairs.get(first, "") and last and (parts := _split(inside)) is not None:
        if first == "{":
            return "list", _signs(parts)
        return (first + last, parts) if len(parts) > 1 else ("one", parts)
    parts = _signs(_split(text) or [text])
    return ("list", parts) if len(parts) > 1 else ("one", parts)


def _split(text: str) -> list[str] | None:
    """Splits at commas and semicolons outside brackets; None where a bracket closes that was not opened."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if ", " in text else text
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _signs(parts: list[str]) -> list[str]:
    r"""Elements with \pm as two elements."""
    made = []
    for part in parts:
        both = ((r"\pm", "+"), (r"\mp", "-")), ((r"\pm", "-"), (r"\mp", "+"))
        for (plus, one), (minus, other) in both if r"\pm" in part else ():
            made.append(part.replace(plus, one).replace(minus, other).lstrip("+ "))
        made += [] if r"\pm" in part else [part]
    return made


def _distinct(a: str, b: str) -> tuple[str, str]:
    """The texts as math-verify reads them, which lowers letters: R beside r gets an index."""
    letters = re.sub(r"\\[a-zA-Z]+", "", f"{a} {b}")
    for letter in sorted({c for c in letters if c.isupper() and c.lower() in letters}):
        if any(
            letter in text and letter.lower() in re.sub(r"\\[a-zA-Z]+", "", text) for text in (a, b)
        ):
            a, b = (
                re.sub(rf"(?<![\\a-zA-Z]){letter}", f"{letter.lower()}_{{9}}", t) for t in (a, b)
            )
    return _compact(a), _compact(b)
