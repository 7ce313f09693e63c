"""Plain words of a text, for comparison."""

from __future__ import annotations

import re


def text_of(latex: str) -> str:
    r"""`\text{B}` as B."""
    return re.sub(
        r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boldsymbol)\s?\{([^{}]*)\}", r"\1", latex
    ).strip()


def plain_words(text: str) -> str:
    """Lower-case words and numbers, separated by single spaces."""
    return " ".join(re.findall(r"[^\W_]+(?:\.\d+)?", text.lower()))


SIGNS = {
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": "/", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u2208": r"\in ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ",
    "\u03bb": r"\lambda ", "\u03a9": r"\Omega ", "\u2126": r"\Omega ", "\u2205": r"\emptyset ", "\u2212": "-",
    "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}", "\u2044": "/", "\u2032": "'",
}  # fmt: skip
RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f"
LOWERED = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"


def in_latex(text: str) -> str:
    r"""LaTeX for signs of Unicode: `2\sqrt{3}` of a root sign before 3, `x^{2}` of a raised 2."""
    if text.isascii():
        return text
    plain = str.maketrans(RAISED + LOWERED, "0123456789-n0123456789")
    text = re.sub(rf"[{RAISED}]+", lambda match: "^{" + match[0].translate(plain) + "}", text)
    text = re.sub(rf"[{LOWERED}]+", lambda match: "_{" + match[0].translate(plain) + "}", text)
    root = "\u221a"
    text = re.sub(
        r"\u221b ?(\(([^()]*)\)|[\d.]+|\w)", lambda m: rf"\sqrt[3]{{{m[2] or m[1]}}}", text
    )
    text = re.sub(
        rf"{root} ?(\(([^()]*)\)|\{{([^{{}}]*)\}}|[\d.]+|\w)",
        lambda match: rf"\sqrt{{{match[2] or match[3] or match[1]}}}",
        text,
    )
    return "".join(SIGNS.get(letter, letter) for letter in text)
