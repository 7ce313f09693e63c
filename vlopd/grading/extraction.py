r"""Rule-based extraction of answers from generated text; None without an answer, which tasks count as
`extraction_failure`. Reasoning is removed first (vlopd/models/thinking.py).

The order, for every type of answer:

1. The last `<answer>...</answer>` (or `<conclusion>`, `[ANSWER]`, `{"answer": ...}`), whose content is read as a text.
2. The last statement of the answer that can be read as its type: `\boxed{}`, `Answer: ...`, a heading with the next
   line, `#### ...`, `the answer is ...`; for choices also `I choose B` and `B is correct`. What follows it does not
   count, unless it is another statement, or takes it back (`Wait, ...`) and concludes something. Statements that are
   negated or supposed (`the answer is not`, `if the answer is`) are none.
3. What the output concludes, by type. A choice: the letter that begins the text, the only option that a list of options
   finds right, `which corresponds to option B`, the letter on the last line, the only one in brackets or after
   `option`, the only option whose text occurs. Yes or no: the first word, a concluding `so yes`, a sentence that
   affirms or denies that something is there. Mathematics and numbers: the display that ends the text, or the number
   that the last sentence states. A short answer: the last sentence, or the part of it that answers.

The question is optional. With it, yes or no is about what it asks for, a number is what it counts, an expression may be
one of two that it offers (`A or B?`), and a last sentence without a word of it does not conclude where one before has
them.

None where the output says that it has no answer, gives several, or is cut off before it concludes: a statement
`the answer is A or B` gives none; a last sentence that ends in `=` or `the` concludes nothing, nor does a program, a
remark about a rule or a loop of different answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from vlopd.grading import choices as options
from vlopd.grading import short_answers, values, yes_no
from vlopd.grading.final_statements import boxes, decide, statements
from vlopd.models.thinking import split

__all__ = [
    "boxed",
    "choice_letter",
    "marked",
    "math_answer",
    "number_answer",
    "short_answer",
    "states",
    "strip_reasoning",
    "yes_or_no",
]


def strip_reasoning(text: str) -> str:
    """The text after a model's reasoning; empty where the reasoning was cut off."""
    return split(text).answer.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, with balanced braces; those of a list are joined by commas.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    "\frac{1}{2}"
    """
    found = boxes(text)
    return found[-1][1] if found else None


def marked(text: str) -> str | None:
    """The rest of the line after the last answer marker.

    >>> marked("Thus the final answer is **12**.")
    "12"
    """
    found = [each for each in statements(text) if each.kind in ("label", "sentence") and each.said]
    return short_answers.tidy(found[-1].said.splitlines()[0]) if found else None


def math_answer(text: str, question: str = "") -> str | None:
    r"""An expression in LaTeX or plain text: `\frac{3}{4}`, `x = 3`, `12\pi`, `Evelyn`."""
    concluded = partial(values.concluded_expression, question=question)
    return decide(strip_reasoning(text), values.stated_expression, concluded)


def number_answer(text: str, question: str = "") -> str | None:
    r"""A number as written, without its unit; an expression that is stated in its place (`12\pi`) is returned whole."""
    concluded = partial(values.concluded_number, question=question)
    return decide(strip_reasoning(text), values.stated_number, concluded)


def short_answer(text: str, question: str = "") -> str | None:
    """A word, number or short phrase, without formatting and final full stop."""
    return short_answers.read(strip_reasoning(text), question)


def states(text: str, gold: str, question: str = "", tolerance: float = 0.05) -> bool:
    """Whether the text states the short answer `gold`, in words of its own; numbers to a relative tolerance."""
    return short_answers.states(strip_reasoning(text), gold, question, tolerance)


def yes_or_no(text: str, question: str = "") -> str | None:
    """`yes` or `no`, by word or by what is affirmed or denied (`There is no dog`) of what the question asks for."""
    return yes_no.read(strip_reasoning(text), question)


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the chosen option, A for the first."""
    return options.read(strip_reasoning(text), choices)
