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
