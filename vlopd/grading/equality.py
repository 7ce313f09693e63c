r"""Equality of answers: as numbers, as expressions, or within a tolerance; no model as judge.

Mathematics is compared as a string, then as an exact number, then by value at fixed points. Values are computed by
our own evaluator in floats: sympy's expression parser executes the model's text as Python, and its LaTeX parser needs
another package.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from vlopd.grading.words import plain_words, text_of

LONGEST = 200
"""Maximum characters of a number or expression; longer ones are compared only as strings."""


def same_number(answer: str, target: str, decimals: int | None = None) -> bool:
    """Whether two numbers are equal exactly or, with `decimals`, after rounding."""
    a, b = number(answer), number(target)
    if a is None or b is None:
        return False
    return a == b if decimals is None else round(a, decimals) == round(b, decimals)


def number(text: str) -> Fraction | None:
    """Parses a number: 1,234.5, -3/4, $12, 50%; None for other text."""
    bare = re.sub(r"[\s$%°]|\\[$%]|(?<=\d),(?=\d{3}(?!\d))", "", text)
    if len(bare) > LONGEST or not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:/\d+)?", bare):
        return None
    above, _, below = bare.partition("/")
    return None if below and int(below) == 0 else Fraction(above) / int(below or 1)


def relaxed_match(answer: str, target: str, tolerance: float = 0.05) -> bool:
    """ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers within 5 %, other answers word for word.

    Percent signs are ignored.
    """
    a, b = number(answer), number(target)
    if a is not None and b is not None:
        return abs(a - b) <= Fraction(tolerance) * abs(b)
    return plain_words(answer) == plain_words(target)


def same_math(answer: str, target: str) -> bool:
    r"""Whether two LaTeX answers are mathematically equal: `\frac12` and 0.5, `(x+1)^2` and `x^2+2x+1`.

    Lists without brackets match in any order, lists in equal brackets element by element.
    """
    a, b = tidy_latex(answer), tidy_latex(target)
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
    """Normalises LaTeX: spacing, sizes, units, `x =` before a value, thousands separators."""
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
    """Splits at commas outside inner brackets, after removing the outer brackets."""
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
        ):  # agreement at three such points is taken as equality
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


def tree_of(latex: str) -> ast.expr | None:
    """Parses LaTeX of numbers, letters, pi, + - * / ^, fractions and roots to a Python AST; None for all else."""
    if len(latex) > LONGEST:
        return None
    text, before = latex, ""
    while text != before:
        before = text
        for pattern, replacement in MACROS:
            text = re.sub(pattern, replacement, text)
    tokens = re.findall(TOKEN, text)
    words = re.findall(r"[a-zA-Z]+", text)
    is_words = any(len(word) > 2 for word in words) or text.isalpha()
    if not tokens or "".join(tokens) != text or is_words:
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
    """Evaluates an expression in complex floats, which bounds the cost. Raises ArithmeticError, ValueError."""
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
