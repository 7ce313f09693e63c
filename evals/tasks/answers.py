"""The answer that a generated text gives, and whether it is the right one; rules alone, no model judges.

Extraction returns None where the text gives no answer, which tasks report as their `extraction_failure`. A
mathematical answer is compared as a string, then as an exact number, then by its value at fixed points. Our own
evaluator does that, and no parser of sympy: those hand a model's text to Python's `eval`, or work out
9^9^9^9 for ever.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from string import ascii_uppercase
from typing import Any

NUMBER = r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+"
MARK = r"(?:\b(?:{words})\b(?:[^.,?:=\n]{{0,40}}?\bis\b|\W{{0,4}}?[:=])|####)[\s:*]*"
"""What announces an answer: `Answer:`, `the answer to this is`, `**Answer**:`, and the #### of GSM8K."""


# --------------------------------------------------------------------------------------- extraction


def conclusion(text: str) -> str:
    """What comes after a reasoning model's thoughts; nothing where they were cut off."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    "\frac{1}{2}"
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place].strip() or None
    return None


def marked(text: str, words: str = "answer") -> str | None:
    """The rest of the line after the last mark of an answer.

    >>> marked("Thus the final answer is **12**.")
    "12"
    """
    found = re.findall(MARK.format(words=words) + r"([^\n]*)", text, re.IGNORECASE)
    if not found:
        return None
    return found[-1].strip().strip("*`").rstrip(".").strip().strip("*") or None


def math_answer(text: str) -> str | None:
    """Boxed, else marked, else the last number."""
    text = conclusion(text)
    return boxed(text) or marked(text) or last_number(text)


def number_answer(text: str) -> str | None:
    """A number: what is boxed (without units), else the first after a mark, else the last of all."""
    text = conclusion(text)
    if (inside := boxed(text)) is not None:
        found = re.findall(NUMBER, inside)
        return found[0] if len(found) == 1 else inside
    if (after := marked(text)) is not None and (found := re.findall(NUMBER, after)):
        return found[0]
    return last_number(text)


def last_number(text: str) -> str | None:
    found = re.findall(NUMBER, text)
    return found[-1] if found else None


def short_answer(text: str) -> str | None:
    """A word or phrase: boxed, else marked, else the last line."""
    text = conclusion(text)
    lines = [line for line in text.splitlines() if line.strip()]
    said = boxed(text) or marked(text) or (lines[-1] if lines else "")
    return said.strip().strip("*`\"'").rstrip(".").strip() or None


def yes_or_no(text: str) -> str | None:
    """The first "yes" or "no" of the answer."""
    text = conclusion(text)
    said = boxed(text) or marked(text) or text
    found = re.search(r"\b(yes|no)\b", said.lower())
    return found[1] if found else None


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a text takes: A for the first.

    In order: a letter that is boxed, that follows a mark, or that begins the text; a choice's own text, nothing
    else; the only letter in brackets; the only choice whose text is said. Otherwise there is no answer.
    """
    text = conclusion(text)
    letters = ascii_uppercase[: len(choices)]
    own = {plain_words(choice): letter for letter, choice in zip(letters, choices, strict=True)}
    # a letter set off from what follows; not the article of "A dog" nor the pronoun of "I think"
    leading = rf"(?:option|choice)?[\s(*\[]*([{letters}])(?![\w'])(?!(?<=[AI])\s+[a-z])"
    for said in (boxed(text), marked(text, "answer|option|choice"), text):
        if said is None:
            continue
        lead = re.match(leading, text_of(said))
        if lead:
            return lead[1]
        if plain_words(said) in own:
            return own[plain_words(said)]
    bracketed = set(re.findall(rf"\(([{letters}])\)", text))
    if len(bracketed) == 1:
        return bracketed.pop()
    spoken = f" {plain_words(text)} "
    named = [letter for words, letter in own.items() if words and f" {words} " in spoken]
    return named[0] if len(named) == 1 else None


def text_of(latex: str) -> str:
    r"""`\text{B}` as B."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", latex).strip()


def plain_words(text: str) -> str:
    """Lower-case words and numbers, single spaces."""
    return " ".join(re.findall(r"[^\W_]+(?:\.\d+)?", text.lower()))


# ----------------------------------------------------------------------------------------- equality


def same_number(said: str, right: str, decimals: int | None = None) -> bool:
    """Equal as exact numbers or, with `decimals`, when rounded to so many."""
    a, b = number(said), number(right)
    if a is None or b is None:
        return False
    return a == b if decimals is None else round(a, decimals) == round(b, decimals)


def number(text: str) -> Fraction | None:
    """A plain number: 1,234.5, -3/4, $12, 50%."""
    bare = re.sub(r"[\s$%°]|\\[$%]|(?<=\d),(?=\d{3}(?!\d))", "", text)
    if not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:/\d+)?", bare):
        return None
    above, _, below = bare.partition("/")
    return None if below and int(below) == 0 else Fraction(above) / int(below or 1)


def relaxed_match(said: str, right: str, tolerance: float = 0.05) -> bool:
    """ChartQA's measure (arXiv 2203.10244, section 5.1): numbers within 5 %, other answers word for word.

    A percent sign counts for nothing, on either side.
    """
    a, b = number(said), number(right)
    if a is not None and b is not None:
        return abs(a - b) <= Fraction(tolerance) * abs(b)
    return plain_words(said) == plain_words(right)


def same_math(said: str, right: str) -> bool:
    r"""Equal as mathematics: `\frac12` is 0.5, `2\sqrt{2}` is `\sqrt8`, `(x+1)^2` is `x^2+2x+1`.

    Lists without brackets are equal in any order, lists in equal brackets part by part.
    """
    a, b = tidy_latex(said), tidy_latex(right)
    if a == b:
        return a != ""
    parts_a, parts_b = parts_of(a), parts_of(b)
    if len(parts_a) != len(parts_b):
        return False
    if len(parts_a) == 1:
        return same_value(a, b)
    if a[0] in "([{" or b[0] in "([{":  # a point, an interval, a set written in order
        if (a[0], a[-1]) != (b[0], b[-1]):
            return False
        return all(same_math(x, y) for x, y in zip(parts_a, parts_b, strict=True))
    left = list(parts_b)
    for part in parts_a:
        match = next((other for other in left if same_math(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def tidy_latex(text: str) -> str:
    """One spelling of what has many: spacing, sizes, units, `x =` before a value, thousands' commas."""
    text = text.strip().strip("$").rstrip(".")
    text = re.sub(r"\\(?:left|right|big|Big|displaystyle|,|;|:|!|quad|\s)|~", " ", text)
    text = re.sub(r"(?<=\d)\s*\\(?:text|mathrm|mbox)\{[^{}\d]*\}(?:\^\{?\d\}?)?$", "", text)
    text = text_of(text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    for macro, sign in (("cdot|times", "*"), ("div", "/"), ("pi", "(pi)")):
        text = re.sub(rf"\\(?:{macro})(?![a-zA-Z])", sign, text)
    text = re.sub(r"\^\{?\s*\\circ\s*\}?|°|\\degree|\\?%|\\\$|\\\(|\\\)", "", text)
    text = re.sub(r"^\s*[a-zA-Z]\s*(?:=|\\in)\s*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+degrees?$", "", text)
    return re.sub(r"\s+", "", text)


def parts_of(text: str) -> list[str]:
    """What stands between commas outside inner brackets; the outer brackets are taken off."""
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}"):
        text = text[1:-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def same_value(a: str, b: str) -> bool:
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y
    trees = [tree for text in (a, b) if (tree := tree_of(text)) is not None]
    if len(trees) < 2:
        return False
    letters = {n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)}
    try:
        for shift in (
            0.0,
            0.37,
            0.71,
        ):  # two expressions that agree at three such points are the same
            at = {c: 1 + math.sqrt(ord(c)) % 1 + shift for c in letters - {"pi"}} | {"pi": math.pi}
            u, v = (value_of(tree, at) for tree in trees)
            if not abs(u - v) <= 1e-9 * max(1.0, abs(u), abs(v)):
                return False
    except (ArithmeticError, ValueError):
        return False
    return True


MACROS = (
    (r"(\d)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),  # a mixed number
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\frac(\d)(\d)", r"(\1/\2)"),
    (r"\\frac\{([^{}]*)\}(\d)", r"((\1)/\2)"),
    (r"\\frac(\d)\{([^{}]*)\}", r"(\1/(\2))"),
    (r"\\sqrt\[([^\[\]{}]*)\]\{([^{}]*)\}", r"((\2)^(1/(\1)))"),
    (r"\\sqrt\{([^{}]*)\}", r"((\1)^(1/2))"),
    (r"\\sqrt(\d)", r"(\1^(1/2))"),
    (r"\^\{([^{}]*)\}", r"^(\1)"),
)
TOKEN = r"\d+\.?\d*|\.\d+|pi|[a-zA-Z]|[-+*/^()]"
LONGEST = 200


def tree_of(latex: str) -> ast.expr | None:
    """Numbers, letters, pi, + - * / ^, fractions and roots in LaTeX as a Python expression; None for all else."""
    text, before = latex, ""
    while text != before and len(text) <= 4 * LONGEST:
        before = text
        for pattern, replacement in MACROS:
            text = re.sub(pattern, replacement, text)
    tokens = re.findall(TOKEN, text)
    words = re.findall(r"[a-zA-Z]+", text)
    is_words = any(len(word) > 2 for word in words) or text.isalpha()
    if not tokens or len(text) > 4 * LONGEST or "".join(tokens) != text or is_words:
        return None
    python = ""
    for k, token in enumerate(tokens):
        if k and token not in "+-*/^)" and tokens[k - 1] not in "+-*/^(":
            python += "*"  # 2x, (a)(b)
        python += "**" if token == "^" else token.lstrip("0") or "0" if token.isdigit() else token
    try:
        return ast.parse(python, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None


OPERATIONS: Mapping[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def value_of(tree: ast.expr, at: Mapping[str, float]) -> complex:
    """The tree's value in complex floats, so that no power takes long. Raises ArithmeticError, ValueError."""
    match tree:
        case ast.Constant():
            return complex(tree.value)  # type: ignore[arg-type]
        case ast.Name():
            return complex(at[tree.id])
        case ast.UnaryOp():
            return OPERATIONS[type(tree.op)](value_of(tree.operand, at))
        case ast.BinOp():
            return OPERATIONS[type(tree.op)](value_of(tree.left, at), value_of(tree.right, at))
    raise ValueError(ast.dump(tree))
