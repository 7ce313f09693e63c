"""Reads a word, number or short phrase: what is stated as the answer, else the last sentence's answering part.

`states` asks instead whether an output states a given answer, as a reader does who has it at hand.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from vlopd.grading import yes_no
from vlopd.grading.final_statements import (
    DRESSING,
    NoAnswer,
    Statement,
    alternatives,
    boxes,
    clause_of,
    conclusion,
    decide,
    gives_up,
    sentences,
)
from vlopd.grading.values import (
    MAGNITUDES,
    MATHS,
    NUMBER,
    REASONING,
    SO,
    WORDED,
    in_digits,
    last_side,
    normal,
)
from vlopd.grading.words import text_of

EDGES = DRESSING + "$,;"
COPULA = re.compile(
    r"\s(?:is|are|was|were|would be|is called|is named|is labell?ed|appears to be|seems to be|"
    r"equals)\s(?:called |named |approximately |about |around |exactly |roughly |at |in |"
    r"therefore |thus |hence )*|\s=\s|:\s",
    re.IGNORECASE,
)
HAS = re.compile(
    r"\s(?:has|have|had|leads?|represents?|accounts? for|received|recorded|shows?|"
    r"won)\s",
    re.IGNORECASE,
)
NUMERIC = re.compile(
    r"\bhow (?:many|much|old|long|far|tall|high)\b|\b(?:in|by|which|what) (?:which |what )?year\b|"
    r"\bwhat(?:'s| is| was| were| are)? (?:the )?(?:\w+ ){0,2}(?:percentage|share|value|number|"
    r"total|sum|difference|ratio|rate|"
    r"average|mean|median|price|cost|amount)\b(?! (?:of |on )?(?:the )?(?:plate|phone))",
    re.IGNORECASE,
)
"""Questions that a number answers."""
HEDGED = re.compile(r"\b(?:could|may|might) be\b[^.]* or\b|\beither\b[^.]* or\b", re.IGNORECASE)
LISTS = re.compile(
    r"(?:the|this) [\w ]{1,40}? (?-i:lists|provides|presents|compares|describes) (?-i:[a-z]+ and [^A-Z\d\"]*\.?$)",
    re.IGNORECASE,
)
"""A description that names nothing."""
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


def read(text: str, question: str = "") -> str | None:
    """The short answer of an output (without its reasoning), or None."""
    return decide(text, stated, partial(concluded, question=question))


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


def concluded(text: str, question: str = "") -> str | None:
    """The part that answers of the sentence that concludes a text without a statement."""
    last = concluding(text, question)
    return answering_part(last) if last else None


def concluding(text: str, question: str = "") -> str | None:
    """The sentence that concludes, from its last `so` on; with the question, one that speaks of what is asked."""
    last = conclusion(text, question)
    if last is None or LISTS.match(last):
        return None
    offered = alternatives(question)
    if (
        offered
        and re.match(r"there (?:is|are)\b|both\b", last, re.IGNORECASE)
        and all(re.search(rf"\b{each}\b", last, re.IGNORECASE) for each in offered)
    ):
        return None
    if HEDGED.search(last) and not NUMERIC.search(question):
        return None
    last = re.sub(r"\s\((?:not|which|while|unlike)\b[^()]*\)", "", last)
    cues = [cue for cue in SO.finditer(last) if re.search(r"\w", last[cue.end() :])]
    if (
        question
        and NUMERIC.search(question)
        and len(last.split()) > 4
        and not quantities(last, question)
    ):
        return None
    return last[cues[-1].end() :].lstrip(" ,:") if cues else last or None


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


# ------------------------------------------------------------------------------- given the reference answer

NEGATED = re.compile(
    r"\b(?:not|no|n't|never|neither|nor|than|of|unlike|without)\W+(?:an? |the |really |that of )?$",
    re.IGNORECASE,
)
IDENTIFIES = re.compile(
    r"\byears?\b|\bwhen\b|\bdate\b|\b(?:page|jersey|room|plate|phone|bus|house|flight|zip|serial|model|written)\b",
    re.IGNORECASE,
)
"""Questions whose numbers are names and exact."""
MONTHS = re.compile(
    r"\b(january|february|march|april|june|july|august|september|october|november|december)\b"
)
ARTICLES = re.compile(r"^(?:an?|the) (?=.)")
AMOUNT = re.compile(
    rf"(?P<number>{NUMBER})(?:\s?(?:/|:)\s?(?P<below>\d+)(?![\d:/]))?(?P<unit>\s?%| ?(?:percent|per cent)\b)?"
    rf"(?: ?(?P<by>{'|'.join(MAGNITUDES)}|[MKB])\b)?|{WORDED.pattern}",
    re.IGNORECASE,
)


class Quantity(NamedTuple):
    value: Fraction
    by: int
    """1,000,000 for `1.2 million`."""
    percent: bool
    start: int


def quantities(said: str, question: str = "") -> list[Quantity]:
    """The numbers of a text, in digits or words, except those that the question gives."""
    said, given, found = (
        normal(re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", said)),
        {match[0] for match in re.finditer(NUMBER, normal(question))},
        [],
    )
    for match in AMOUNT.finditer(said):
        if match["number"] is None:
            if not (match[0].lower() == "one" and len(said.split()) > 1):
                found.append(Quantity(Fraction(in_digits(match[0])), 1, False, match.start()))
            continue
        if match["number"] in given and not match["unit"]:
            continue
        value = Fraction(match["number"].replace(",", ""))
        if match["below"] and int(match["below"]):
            value /= int(match["below"])
        by = (match["by"] or "").lower()
        by = MAGNITUDES.get(by, {"m": 10**6, "k": 1000, "b": 10**9}.get(by, 1))
        found.append(Quantity(value, by, bool(match["unit"]), match.start()))
    return found


def states(text: str, gold: str, question: str = "", tolerance: float = 0.05) -> bool:
    """Whether an output (without its reasoning) states the answer `gold` and no other.

    Numbers may differ by the tolerance, with or without percent signs, units and magnitudes; years and numbers that are
    names may not. A text is stated where the answer or the concluding clause holds its words, and does not deny them.
    """
    wanted = compact(gold)
    if wanted in ("yes", "no"):
        return yes_no.read(text, question) == wanted
    said = decide(text, stated, partial(concluding, question=question))
    phrase_read = read(text, question)
    if said is None or phrase_read is None:
        return False
    if wanted in (compact(said), compact(tidy(said) or ""), compact(phrase_read)):
        return True
    said = clause_of(said.replace("**", ""), question)
    target = quantities(gold)
    if len(target) == 1 and not re.search(r"[a-z]{2,}", _without_units(gold), re.IGNORECASE):
        exact = IDENTIFIES.search(question) and target[0].value == int(target[0].value)
        return _near(said, target[0], question, 0 if exact else tolerance)
    return _holds(said, wanted)


def compact(said: str) -> str:
    """Lower-case letters and digits alone, without an article, months by their first letters."""
    said = ARTICLES.sub("", text_of(normal(said)).lower().strip(" \"'*_`.\u201c\u201d\u2018\u2019"))
    said = MONTHS.sub(lambda match: match[0][:3], said)
    said = {"us": "unitedstates", "usa": "unitedstates", "uk": "unitedkingdom"}.get(
        re.sub(r"\W", "", said), said
    )
    return re.sub(
        r"(?<!\d)[.]|[.](?!\d)|[^\w.+-]|[\u2013-](?!\d)|_", "", said.replace("\u2013", "-")
    )


def _without_units(gold: str) -> str:
    return re.sub(
        rf"percent|per cent|dollars?|{'|'.join(MAGNITUDES)}|{WORDED.pattern}",
        "",
        gold,
        flags=re.IGNORECASE,
    )


def _near(said: str, target: Quantity, question: str, tolerance: float) -> bool:
    """Whether the number that a clause gives is the wanted one: its first, its last year, or that of what is asked."""
    found = quantities(said, question) or quantities(said)
    is_year = (
        re.search(r"\byear\b|\bwhen\b", question, re.IGNORECASE) and 1000 < target.value < 2200
    )
    if (
        years := [each for each in found if 1000 < each.value < 2200 and each.by == 1]
        if is_year
        else []
    ):
        found = years[-1:]
    elif target.percent and any(each.percent for each in found):
        found = [each for each in found if each.percent]
    asked = re.search(r"how many (\w{3,})", question, re.IGNORECASE)
    if asked:
        counted = [
            q
            for q in found
            if re.match(rf"\S+ (?:\w+ )?{re.escape(asked[1])}", normal(said)[q.start :])
        ]
        found = counted or found
    if len(found) > 1 and not is_year:
        part = quantities(answering_part(said) or "")
        found = part if len(part) == 1 else found
    if not found:
        return False
    first = found[-1] if "=" in said else found[0]
    wanted = target.value * target.by
    values = {first.value, first.value * first.by}
    if first.percent != target.percent:
        values |= {first.value / 100} if first.percent else {first.value * 100}
    goals = {wanted, target.value}
    return any(
        abs(value - goal) <= Fraction(tolerance) * abs(goal) for value in values for goal in goals
    )


def _holds(said: str, wanted: str) -> bool:
    """Whether a clause has the wanted words as whole words, not denied; a plural is its singular."""
    words = [match for match in re.finditer(r"[^\s,;:!?()\"\u201c\u201d]+", said)]
    if len(wanted) <= 2:
        return False
    for k, first in enumerate(words):
        joined = ""
        for word in words[k:]:
            joined += re.sub(r"['\u2019]s$", "", word[0])
            held = compact(joined)
            if held == wanted or (
                len(wanted) > 3 and wanted in (held + "s", held.removesuffix("s"))
            ):
                return not NEGATED.search(said[: first.start()].removesuffix("the "))
            if len(held) > len(wanted) + 1:
                break
    return False
