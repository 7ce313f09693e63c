"""Rule-based extraction of answers from generated text; None without an answer, which tasks count as
`extraction_failure`. Reasoning is removed first (vlopd/models/thinking.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from vlopd.models.thinking import split

NUMBER = r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+"
MARK = r"(?:\b(?:{words})\b(?:[^.,?:=\n]{{0,40}}?\bis\b|\W{{0,4}}?[:=])|####)[\s:*]*"
"""Answer markers: `Answer:`, `the answer to this is`, `**Answer**:`, and GSM8K's ####."""


def strip_reasoning(text: str) -> str:
    """The text after a model's reasoning; empty where the reasoning was cut off."""
    return split(text).answer.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, with balanced braces.

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
    """The rest of the line after the last answer marker.

    >>> marked("Thus the final answer is **12**.")
    "12"
    """
    found = re.findall(MARK.format(words=words) + r"([^\n]*)", text, re.IGNORECASE)
    if not found:
        return None
    return found[-1].strip().strip("*`").rstrip(".").strip().strip("*") or None


def math_answer(text: str) -> str | None:
    """The boxed answer, else the marked one, else the last number."""
    text = strip_reasoning(text)
    return boxed(text) or marked(text) or last_number(text)


def number_answer(text: str) -> str | None:
    """A number: the boxed one (without units), else the first after a marker, else the last."""
    text = strip_reasoning(text)
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
    """A word or phrase: the boxed answer, else the marked one, else the last line."""
    text = strip_reasoning(text)
    lines = [line for line in text.splitlines() if line.strip()]
    candidate = boxed(text) or marked(text) or (lines[-1] if lines else "")
    return candidate.strip().strip("*`\"'").rstrip(".").strip() or None


def yes_or_no(text: str) -> str | None:
    """The first "yes" or "no" of the answer."""
    text = strip_reasoning(text)
    candidate = boxed(text) or marked(text) or text
    found = re.search(r"\b(yes|no)\b", candidate.lower())
    return found[1] if found else None


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the chosen option, A for the first.

    In order: a letter that is boxed, follows a marker or begins the text, or exactly an option's text; the only letter
    in parentheses; the only option whose text occurs. Otherwise None.
    """
    text = strip_reasoning(text)
    letters = ascii_uppercase[: len(choices)]
    own = {plain_words(choice): letter for letter, choice in zip(letters, choices, strict=True)}
    # a separate letter, but not the article of "A dog" or the pronoun of "I think"
    leading = rf"(?:option|choice)?[\s(*\[]*([{letters}])(?![\w'])(?!(?<=[AI])\s+[a-z])"
    for candidate in (boxed(text), marked(text, "answer|option|choice"), text):
        if candidate is None:
            continue
        lead = re.match(leading, text_of(candidate))
        if lead:
            return lead[1]
        if plain_words(candidate) in own:
            return own[plain_words(candidate)]
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
    """Lower-case words and numbers, separated by single spaces."""
    return " ".join(re.findall(r"[^\W_]+(?:\.\d+)?", text.lower()))
