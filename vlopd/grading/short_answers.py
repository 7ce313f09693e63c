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
    r"\s(?:is|are|was|were|would be|is called|is named|is labell?ed|appears to be|seems to be|equals)\s(?:called |named |approximately |about |around |exactly |roughly |at |in )?|\s=\s|:\s",
    re.IGNORECASE,
)
DESCRIBES = re.compile(
    r"\b(?:\w{3,}est|most|least|first|second|third|last|only|same|next|total|sum|average|difference|number|percentage|percent of|value|name|colou?r|country|"
    r"year|that|which|one|who|answer|item|object|shown|image|chart|graph|picture|question|ratio|median|mean|category|group|style|leading|leads|with)\b",
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
    if statement.kind == "sentence" or len(lines[0].split()) > 6:
        first = sentences(lines[0])[0]
    else:
        first = lines[0]
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
        r",? because\b|,? since\b|,? as (?:it|the|shown|seen|this|indicated|they)\b|, which\b|,? (?:according to|based on)\b|; | \u2013 | \u2014 ",
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
    bare = sentence.strip(EDGES).rstrip(".").replace("**", "")
    found = list(COPULA.finditer(bare))
    if not found or len(bare.split()) > 40:
        return tidy(bare)
    first = found[0]
    subject, predicate = bare[: first.start()], bare[first.end() :]
    described = len(DESCRIBES.findall(predicate)), len(DESCRIBES.findall(subject))
    known = re.match(r"(?:there|it|this|that|these|they|he|she|i|we)\b", subject, re.IGNORECASE)
    if (
        described[0] > described[1]
        and not known
        and len(subject.split()) <= 5
        and ":" not in first[0]
    ):
        return tidy(subject)
    last = found[-1]
    return phrase(bare[last.end() :] if ":" in last[0] or "=" in last[0] else predicate)
