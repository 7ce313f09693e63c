"""Reads a word, number or short phrase: what is stated as the answer, else the last sentence's answering part."""

from __future__ import annotations

import re

from vlopd.grading.final_statements import (
    DRESSING,
    NoAnswer,
    Statement,
    boxes,
    conclusion,
    decide,
    gives_up,
    sentences,
)
from vlopd.grading.values import MATHS, REASONING, SO, last_side, normal
from vlopd.grading.words import text_of

EDGES = DRESSING + "$,;"
COPULA = re.compile(
    r"\s(?:is|are|was|were|would be|is called|is named|is labell?ed|appears to be|seems to be|"
    r"equals)\s(?:called |named |approximately |about |around |exactly |roughly |at |in )?|\s=\s|:\s",
    re.IGNORECASE,
)
HAS = re.compile(
    r"\s(?:has|have|had|leads?|represents?|accounts? for|received|recorded|shows?|"
    r"won)\s",
    re.IGNORECASE,
)
KNOWN = re.compile(r"(?:there|it|this|that|these|they|he|she|i|we)\b", re.IGNORECASE)
QUANTITY = re.compile(
    r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?: ?%| (?:percent|million|billion|"
    r"thousand)\b)?(?![\w:/])"
)
YEAR = re.compile(
    r"\b(?:in|for|since|from|until|by|of|year) (?:the year )?[12]\d{3}$", re.IGNORECASE
)
DESCRIBES = re.compile(
    r"\b(?:\w{3,}est|most|least|first|second|third|last|only|same|next|total|sum|average|difference|"
    r"number|percentage|percent of|value|name|colou?r|country|"
    r"year|that|which|one|who|answer|item|object|shown|image|chart|graph|picture|question|ratio|"
    r"median|mean|category|group|style|leading|leads|with)\b",
    re.IGNORECASE,
)
"""Words of the side that repeats the question, in `light blue is the leading colour`."""


def read(text: str) -> str | None:
    """The short answer of an output (without its reasoning), or None."""
    return decide(text, stated, concluded)


def stated(statement: Statement) -> str | None:
    said = statement.said
    if statement.kind == "tag" and (inner := boxes(said)):
        said = inner[-1][1]
    if statement.kind in ("tag", "box"):
        return tidy(said) if not gives_up(said) else _refuse()
    if statement.kind == "heading":
        said = said.split("\n")[0]
        return tidy(said) if said and len(said.split()) <= 4 else None
    lines = [line for line in said.splitlines() if line.strip(EDGES)]
    if not lines or REASONING.match(lines[0]):
        return None
    long = statement.kind == "sentence" or len(lines[0].split()) > 6
    first = sentences(lines[0])[0] if long else lines[0]
    if gives_up(first):
        raise NoAnswer
    return phrase(first)


def _refuse() -> str:
    raise NoAnswer


def phrase(sentence: str) -> str | None:
    """The phrase at the start of a statement, without its reasons and asides."""
    found = MATHS.match(sentence)
    if found and not sentence[found.end() :].strip(EDGES + "."):
        sentence = next(group for group in found.groups() if group)
    cut = re.split(
        r",? because\b|,? since\b|,? as (?:it|the|shown|seen|this|indicated|they)\b|, wh(?:ich|o)\b|"
        r",? (?:according to|based on)\b|\s(?:with|at) (?=[\d$])|; | \u2013 | \u2014 ",
        sentence,
        maxsplit=1,
    )[0]
    return tidy(cut)


def tidy(said: str) -> str | None:
    """Removes formatting, quotes and a final full stop; an equation gives its last side."""
    said = re.sub(r"\\\$", "$", text_of(normal(said)))
    said = re.sub(r"\\%", "%", said)
    if "=" in said:
        said = last_side(said)
    said = re.sub(
        r"^\W{0,3}(?:approximately|about|around|roughly|nearly|almost|exactly) (?=[-$\d])",
        "",
        said,
        flags=re.I,
    )
    said = said.strip().strip("*_`\"'\u201c\u201d~,; \n")
    dollar = said.startswith("$") and said.count("$") == 1
    said = said.strip(EDGES).rstrip(".").rstrip(EDGES)
    return (("$" + said) if dollar and said else said) or None


def concluded(text: str) -> str | None:
    """The last line or sentence of a text without a statement, or the part of it that answers."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    if not lines:
        return None
    last = conclusion(text)
    if last is None:
        return None
    if (cues := list(SO.finditer(last))) and len(last[cues[-1].end() :].split()) >= 1:
        last = last[cues[-1].end() :].lstrip(" ,:")
    return answering_part(last)


def answering_part(sentence: str) -> str | None:
    """`light blue` of `The leading colour is light blue.` and of `Light blue is the leading colour.`"""
    bare = sentence.strip(DRESSING + ",;").rstrip(".").replace("**", "")
    if word := re.match(r"(yes|no)\b[,.;:!]", bare, re.IGNORECASE):
        return word[1]
    before_reason = phrase(bare)
    if before_reason and len(before_reason.split()) <= 3 and not COPULA.search(before_reason):
        return tidy(re.sub(r"^(?:it's|it is|that's) ", "", before_reason, flags=re.IGNORECASE))
    if len(bare.split()) > 40:
        return tidy(bare)
    found = list(COPULA.finditer(bare)) or list(HAS.finditer(bare))
    if found:
        first, last = found[0], found[-1]
        subject, predicate = bare[: first.start()], bare[first.end() :]
        if ":" not in first[0] and _describes(predicate.split(", ")[0], subject):
            return tidy(subject)
        said = phrase(bare[last.end() :] if ":" in last[0] or "=" in last[0] else predicate)
        if COPULA.search(bare) and not (said and re.search(r"\d", said) and len(said.split()) > 3):
            return _counted(bare, said)
    numbers = [m for m in QUANTITY.finditer(bare) if not YEAR.search(bare[: m.end()])]
    return tidy(numbers[0][0] if len(numbers) == 1 else bare)


def _describes(predicate: str, subject: str) -> bool:
    """Whether the predicate repeats the question and the subject answers: `Bach is the composer`."""
    if KNOWN.match(subject) or len(subject.split()) > 5:
        return False
    named = re.match(r"the [a-z ]+$", predicate) and not re.match(
        r"(?:the|a|an)\b", subject, re.IGNORECASE
    )
    return bool(named) or len(DESCRIBES.findall(predicate)) > len(DESCRIBES.findall(subject))


def _counted(sentence: str, said: str | None) -> str | None:
    """The number of `There are 5 bars.`; `said` otherwise."""
    number = re.match(r"(\d[\d,.]*) \w+$", said or "") if KNOWN.match(sentence) else None
    return number[1] if number else said
