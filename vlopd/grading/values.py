r"""Reads a number or an expression out of what a statement says, or out of the sentence that concludes an output.

An equation is read as its last side (`60 + 180 + 126 = 366` as 366) where its first is arithmetic or a letter. A number
within an expression (12 in `12\pi`) is not read by itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from vlopd.grading.final_statements import (
    DRESSING,
    NoAnswer,
    Statement,
    alternatives,
    asking,
    clause_of,
    conclusion,
    gives_up,
    sentences,
    statements,
)

NUMBER = r"(?:(?<![\w)}\d])-)?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+"
VALUE = rf"(?:{NUMBER})(?:\s?/\s?\d+(?![\d.,]*\d))?"
"""A number or a fraction of whole numbers."""
MATHS = re.compile(
    r"\$\$(.{1,400}?)\$\$|\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)|(?<![\\\d])\$([^$\n]{1,300}?)(?<!\\)\$(?!\d)",
    re.DOTALL,
)
"""Mathematics in its delimiters."""
JOINS = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or|;)\s*")
UNIT_AFTER = re.compile(
    r"(?:\\?%|\xb0|\s{0,2}(?:[a-zA-Z\xb5\u20ac\xa3]{1,20}(?:[./^][a-zA-Z\d{}\xb2\xb3]{1,6}|"
    r"[\xb2\xb3])?\b\.?|\\text\b|"
    r"\\mathrm\b|\\,|\\;|\\ |\\circ|\^\{?\\circ|\\degree|\\%)|[*_`\"'\u201d)\]}.,;:!?$]|\s|$)"
)
OPERATOR_AFTER = re.compile(
    r"[*_]{0,2}\s{0,2}(?:\\(?:pi|sqrt|frac|dfrac|tfrac|times|cdot|div|pm|ln|log|sin|cos|tan|theta|"
    r"alpha|beta|left|over|"
    r"infty|in|binom|choose)\b|\\?[\^/](?=[\s({\d\\a-zA-Z])(?!\s?(?:person|day|hour|week|month|year|"
    r"kg|s\b|h\b|hr|min|\{?\\?circ))|[\u03c0\u221a\xd7\xf7\xb7]|"
    r"[*+](?=\s{0,2}[\d(a-zA-Z\\$])(?!\*)|[-\u2212]\s{1,2}[\d(\\]|x\s?\d|x\b|i\b|e\^|"
    r"(?!(?:[mgLJNWCVA]|[ckm]m|mi|ft|kg|mol)\s?/\s?(?:s|h|hr|min|kg|m|L|C|K|mol)\b)[a-df-zA-Z]\s?[\^+*/=(\d]|"
    r"(?<!\s)\()"
)
"""What makes the number before it a part of an expression: `12\\pi`, `12x`, `3 + 4`, `2\\sqrt3`."""
OPERATOR_BEFORE = re.compile(
    r"(?:\\(?:pi|sqrt|frac|dfrac|tfrac|times|cdot|pm|ln|log|binom)\s?[{(]?|"
    r"[\^_/*+\u221a\u03c0\xd7\xf7]\s?[{(]?|[a-zA-Z)]\s?[-\u2212]\s?|[a-zA-Z]|[{\[(]\d{0,6},\s?)$"
)
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
DECADES = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: k for k, word in enumerate(UNITS.split())}
TENS = {word: 10 * k for k, word in enumerate(DECADES.split(), 2)}
MAGNITUDES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SMALL = "|".join([*TENS, *sorted(WORDS, key=len, reverse=True)])
WORDED = re.compile(
    rf"\b((?:{_SMALL})(?:(?:[- ]| and )(?:{_SMALL}|{'|'.join(MAGNITUDES)})){{0,8}})\b(?! of (?:the|these|those|us)\b)",
    re.IGNORECASE,
)
"""A number in words: `twenty-five`, `six hundred and ninety-four`."""
ELSEWHERE = re.compile(
    r"\b(?:between|than|within|from|divided|multiple|rounded?|least|most|step|part|case|to find|"
    r"need|if|when|where|"
    r"first|let|not|by adding|by multiplying|decimal|decimals|digits?|minus|plus|times|range)\b",
    re.IGNORECASE,
)
"""Words before a number that make it something else than the answer."""
APPROXIMATELY = re.compile(r"\\approx|\u2248")
POINT = re.compile(
    r"(?<![\w)])([(\[](?:[^\s()\[\],]{1,30},\s?){1,4}[^\s()\[\],]{1,30}[)\]])\W{0,3}$"
)
"""A point or an interval that ends a sentence."""
CHECKS = re.compile(r"\b(?:whether|check|verify|suppose)\b", re.IGNORECASE)
REASONING = re.compile(
    r"(?:to (?!1)|first|we (?:need|know|have|can|are)|let|step|given|since|in order|using|if|start|note)\b",
    re.I,
)
IMPERATIVE = re.compile(
    r"\W*(?:multiply|divide|add|subtract)\b.* to (?:get|obtain|give|find)", re.IGNORECASE
)
RESULT = re.compile(
    r"(?:\b(?:is|are|was|were|be|has|have|had|equals?|gets?|got|gives?|gave|leaves?|makes?|costs?|"
    r"earns?|earned|pays?|paid|"
    r"spends?|spent|ran|walked|drove|travell?ed|scored|wrote|baked|planted|lost|found|won|picked|covers?|swam|drank|grew|needs?|takes?|took|weighs?|becomes|totals?|sells?|sold|saves?|saved|makes|made|"
    r"reads?|shows?|"
    r"receives?|received|buys?|bought|eats?|ate|drinks?|uses?|used|walks?|runs?|travels?|owes?|"
    r"collects?|contains?|"
    r"holds?|find|see|count|counted|obtain|yields?|remain|approximately|about|roughly|be|you have|"
    r"lasts?|produces?|(?:increase|decrease|rise|drop|fall|difference|change|gain|loss) of|"
    r"answer|total of|adds up to|comes? to|amounts? to|namely|measures?|reach(?:es)?|"
    r"scored?|only|exactly)\b|\bi\.e\.,?|[=:\u2248]|\\approx)"
)
SO = re.compile(
    r"(?:^|[,;:.\u2014-]\s?|\band )(?:so|thus|therefore|hence|then|giving|which (?:is|gives|makes|"
    r"means|equals|leaves)|making|leaving|for a total of|in total)\b",
    re.I,
)


def normal(text: str) -> str:
    r"""Plain signs for minus, thin spaces and thousands separators: `1{,}000`, `1,\!000`, `1\,000`."""
    text = (
        text.replace("\u2212", "-")
        .replace("\u202f", " ")
        .replace("\xa0", " ")
        .replace("\u2009", " ")
    )
    text = re.sub(
        r"(?<![\d.])(\d[\d.]{0,15})((?: ?\xb0 ?[CF]?| degrees?(?: [A-Z][a-z]+)?)?) below zero",
        r"-\1\2",
        text,
    )
    text = re.sub(
        r"((?:\b(?:is|are|was|were|of|sold|makes?|has|have)|[=:]|^)\s?\$?\d{1,3}) (\d{3})(?! ?\d|\.\d)",
        r"\1,\2",
        text,
    )
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!,|\{,\\!\})(?=\d{3}(?!\d))", ",", text)
    return (
        re.sub(r"(?<=\d) (?=\d{3}(?: \d{3}|\b)(?!\d|\.\d))(?<!\d{4} )", ",", text)
        if re.search(r"\d \d{3} \d{3}", text)
        else text
    )


# ----------------------------------------------------------------------------------------- expressions


def stated_expression(statement: Statement) -> str | None:
    """The expression of a statement; None where it has none. Raises NoAnswer where it says so."""
    if statement.kind == "tag":
        return tagged(statement.said, stated_expression)
    if statement.kind == "box":
        return last_side(normal(statement.said)) or None
    said = first_paragraph(statement.said)
    if (statement.kind == "heading" and not plain(said)) or not re.search(r"\w", said[:200]):
        return None
    if REASONING.match(said):
        return None
    if gives_up(first_sentence(said)):
        raise NoAnswer
    if postponed(statement):
        return None
    return expression(said)


def tagged(said: str, stated: Callable[[Statement], str | None]) -> str | None:
    """The answer in a tag's content: stated there in turn, or the content itself."""
    for inner in reversed(statements(said)):
        if inner.kind != "tag" and (answer := stated(inner)) is not None:
            return answer
    return stated(Statement(0, "label", said)) if said.strip() else None


def postponed(statement: Statement) -> bool:
    """Whether a label begins a derivation that concludes later: `Answer: 5 + 3 = 8. 8 * 4 = 32. So there are 32.`"""
    if statement.kind != "label" or plain(first_sentence(statement.said)):
        return False
    parts = sentences(statement.said)
    return len(parts) > 1 and bool(SO.match(parts[-1])) and bool(re.search(r"\d", parts[-1]))


def first_paragraph(said: str) -> str:
    """The text up to a blank line; all of a display that begins it."""
    said = said.strip().strip("*_`\"'\u201c\u201d~ ")
    found = MATHS.match(said)
    if found and found.end() > 0 and (found[1] or found[2]):
        return found[0]
    return re.split(r"\n\s*\n", said, maxsplit=1)[0]


def first_sentence(said: str) -> str:
    parts = sentences(said[:600])
    return parts[0] if parts else ""


def plain(said: str) -> bool:
    """Whether this is an expression, or a number with a unit, and nothing else."""
    line = first_sentence(normal(said)).strip(DRESSING + ".")
    if MATHS.fullmatch(line):
        return True
    return bool(
        re.fullmatch(
            rf"(?:[^\w\s]{{0,3}})(?:{NUMBER})(?:\s?/\s?\d+)?\W{{0,3}}(?:[a-zA-Z.\xb2\xb3/]+\W{{0,2}}){{0,4}}",
            line,
        )
    )


ATTACHED = re.compile(
    r"\d\s?(?:cm|mm|km|kg|mg|mL|ml|ft|in|mph|min|hrs?|lbs?|oz|am|pm|th|st|nd|rd|[mgLlsh])(?:[\xb2\xb3]|\^\{?[23]\}?)?"
    r"(?:\s?/\s?[a-z]+)?\.?$"
)


def algebraic(line: str) -> bool:
    """Whether a line is an expression, and no plain number, word or number with a unit: `6xy`, `(3, x/2)`."""
    bare = re.sub(r"\\[a-zA-Z]+|(?<![a-zA-Z])(?:sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", " ", line)
    if (
        not line
        or re.search(r"[a-zA-Z]{4,}|(?<![a-zA-Z])(?!and|or)[a-zA-Z]{2,3} ", bare)
        or ATTACHED.search(line)
    ):
        return False
    return bool(
        re.search(
            r"[\u221a\u03c0\u221e^\u2070\xb9\xb2\xb3\u2074-\u2079]|\\(?:[dt]?frac|sqrt|pi|infty)|(?<![a-zA-Z])sqrt|"
            r"(?<![a-zA-Z])[a-zA-Z]\s?[-+*/(^=\u2212]|[-+*/=(\u2212]\s?[a-zA-Z](?![a-zA-Z])|\d[a-zA-Z]{1,3}\b|"
            r"^[(\[{][^()\[\]]*,[^()\[\]]*[)\]}]$",
            line,
        )
    )


def expression(said: str) -> str | None:
    """The expression that a statement's text begins with: mathematics, an equation, a number or a short phrase."""
    line = first_sentence(normal(said))
    found = [match for match in MATHS.finditer(line)]
    display = MATHS.match(normal(said))
    if display and (not found or display.end() > found[0].end()):
        found = [display]
    if found and (len(line[: found[0].start()].split()) <= 8 or len(found) == 1):
        inside = [_inside(found[0])]
        for before, after in itertools.pairwise(found):
            if not JOINS.fullmatch(line[before.end() : after.start()]):
                break
            inside.append(_inside(after))
        return ", ".join(last_side(each) for each in inside) or None
    line = line.replace("**", "").strip(DRESSING).rstrip(".").strip(DRESSING + "$")
    if re.match(r"either\b|between\b", line, re.IGNORECASE):
        raise NoAnswer
    if "=" in line:
        line = last_side(line)
    if len(re.findall(r"(?:^|,\s?|\band )[a-zA-Z]\s?=", line)) > 1:  # x = 3, y = 4
        return line
    if algebraic(line):
        return line
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", "", line)
    if re.search(r"\\[a-zA-Z]|[\^_]", line) and not re.search(r"\b[a-z]{4,}", bare):
        return line or None
    number = number_in(line)
    if number is not None and re.fullmatch(NUMBER, number):
        return number
    if re.search(r"\d", line):
        cut = re.split(r"\s(?:because|since|as|so|which|where|when)\b|\s\(", line, maxsplit=1)[0]
        return cut.strip(DRESSING + ",") or None
    phrase = re.split(
        r",? (?:because|since|as|which|so|where|due to)\b|[;\n]|, (?=\w+ing\b)", line, maxsplit=1
    )[0]
    phrase = phrase.strip(DRESSING + ",.")
    if re.match(r"(?:the|an?) .* (?:of|between) ", phrase):  # described and not given
        return None
    return phrase if phrase and len(phrase.split()) <= 8 else None


def _inside(match: re.Match[str]) -> str:
    return (
        next(group for group in match.groups() if group is not None)
        .strip()
        .strip("$")
        .rstrip(".,")
        .strip()
    )


def last_side(said: str) -> str:
    """`104` of `100+4=104`, `x = 5` as it is: the last side of an equation of numbers, or of a chain."""
    said = APPROXIMATELY.split(
        said.strip().strip("$").strip().lstrip("\u2248~").removeprefix("\\approx"), maxsplit=1
    )[0].strip()
    sides = _sides(said)
    if len(sides) == 1:
        return said
    first, last = sides[0], sides[-1]
    if len(sides) == 2 and not _arithmetic(first):
        return said
    if any("," in side and not re.search(r"\d,\d{3}", side) for side in sides):
        return said
    return last.strip().strip("$").strip()


def _sides(said: str) -> list[str]:
    """The sides of an equation, at `=` outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(said):
        depth += (letter in "{([") - (letter in "})]")
        if letter == "=" and depth <= 0 and said[place - 1 : place] not in ("\\", "<", ">", "!"):
            parts.append(said[start:place])
            start = place + 1
    parts = [*parts, said[start:]]
    return parts if all(part.strip() for part in parts) else [said]


def _arithmetic(side: str) -> bool:
    """Whether a side is made of numbers and operations, with units and words between, and not of variables."""
    bare = re.sub(
        r"\\(?:text|mathrm)\{[^{}]*\}|\\(?:times|cdot|div|d?frac|left|right|sqrt|pm|quad|,|%|\$)",
        " ",
        side,
    )
    bare = re.sub(r"\b[a-zA-Z]{2,}\b|(?<=\d) ?[a-zA-Z\xb0]+\b", " ", bare)
    return bool(
        re.search(r"\d", side) and not re.search(r"[a-wyzA-Z]|(?<![\d ])x|x(?! ?\d)", bare)
    ) or bool(re.fullmatch(r"\s*[a-zA-Z]{2,}(?: [a-zA-Z]+){0,8}\s*", side))


ROOT = re.compile(rf"[a-zA-Z]\s?=\s?(?:{VALUE})|(?:{VALUE})")
ROOTS = re.compile(
    rf"(?<![\w^])([a-zA-Z])\s?=\s?(?:{VALUE})(?:(?:,|,? and|,? or) (?:\1\s?=\s?)?(?:{VALUE}))+(?=\W*$)"
)
"""`x = 7 or x = -3`, which ends a sentence."""
NAMED = re.compile(
    r"\b(?:is|are) ([A-Z][a-z]+(?: [A-Z][a-z]+)?)(?=\W*$|,? (?:even|because|since|as|with|who|and not)\b)"
)

DRAWN = re.compile(
    r"^\W*(?:so|thus|therefore|hence)\b[^.\d=]{1,60} (?:is|are) (?:an? |the )?"
    r"(?!(?:not|correct|complete|done|clear|proved|proven|needed|required|obvious|equal)\b)([a-z]+(?: [a-z]+)?)\W*$",
    re.IGNORECASE,
)
"""`So the shape is a rhombus.`"""


def concluded_expression(text: str, question: str = "") -> str | None:
    """The expression that an output without a statement ends with."""
    whole = text.strip()
    last = conclusion(whole, question)
    display = _last_display(whole)
    if display is not None:
        return display
    if last is None:
        return None
    offered = [
        each
        for each in alternatives(question)
        if re.search(rf"(?<![\w-]){re.escape(each)}(?![\w-])", last, re.I if each[1:] else 0)
    ]
    if len(offered) == 1 and len(last.split()) <= 12 and "=" not in last:
        return None if re.search(r"\bnot\b|n't\b|\bneither\b", last) else offered[0]
    if roots := ROOTS.search(normal(last)):
        return ", ".join(ROOT.findall(roots[0]))
    if point := POINT.search(last):
        return point[1]
    found = list(MATHS.finditer(last))
    if found:
        tail = last[found[-1].end() :].strip(" .*")
        if len(tail.split()) <= 6 or len(found) == 1:
            return _run(last, found) or None
    if whole.count("{") != whole.count("}"):  # cut off
        return None
    sides = re.split(
        r"(?<![<>!:])=|\u2192|\u21d2|\u27f9|\bis\b|\bequals\b|:",
        normal(last).strip(" .*\u2705\u2713\u2714"),
    )
    side = re.sub(r"\s(?:square|cubic|units?)\b[a-z ]{0,20}$", "", sides[-1].strip(DRESSING + ",."))
    if algebraic(side):
        return side
    if len(sentences(whole)) == 1 and not re.search(
        r"[a-zA-Z]{3,}", re.sub(r"\\[a-zA-Z]+", "", whole)
    ):
        return last_side(normal(whole).strip(DRESSING).rstrip(".")) or None
    if named := NAMED.search(last):
        return named[1]
    if (drawn := DRAWN.search(last)) and not gives_up(last):
        return drawn[1]
    if not re.search(r"\d", last) and len(sentences(whole)) > 1 and not SO.search(last):
        return None
    return concluded_number(whole, question)


def _run(said: str, found: list[re.Match[str]]) -> str:
    """The last mathematics of a sentence, with those that are joined to it: `$x = -1$ and $x = 4$`."""
    run = [last_side(_inside(found[-1]))]
    name = run[0].partition("=")[0].strip() if "=" in run[0] else ""
    for before, after in reversed(list(itertools.pairwise(found))):
        side = last_side(_inside(before))
        joined = JOINS.fullmatch(said[before.end() : after.start()])
        if not joined or not name or side.partition("=")[0].strip() != name:
            break
        run.insert(0, side)
    return ", ".join(run)


def _last_display(text: str) -> str | None:
    """The display that ends the text."""
    tail = text[-600:].rstrip(" .\n*")
    if not tail.endswith(("$$", "\\]")):
        return None
    found = list(MATHS.finditer(tail))
    if found and found[-1].end() == len(tail):
        return last_side(_inside(found[-1])) or None
    return None


# --------------------------------------------------------------------------------------------- numbers


def stated_number(statement: Statement) -> str | None:
    """The number of a statement; an expression as it is where there is no number of its own."""
    if statement.kind == "tag":
        return tagged(statement.said, stated_number)
    if statement.kind == "box":
        inside = last_side(normal(statement.said))
        return number_in(inside) or inside or None
    said = first_paragraph(statement.said)
    if (statement.kind == "heading" and not plain(said)) or REASONING.match(said):
        return None
    line = normal(first_sentence(said))
    found = MATHS.search(normal(said))
    if found and (found.end() > len(line) or found.start() <= 80):
        side = last_side(_inside(found))
        bare = re.sub(r"^[a-zA-Z]\w?\s*=\s*", "", side)
        return number_in(bare) or side or None
    if not re.search(r"\w", line):
        return None
    if gives_up(line) and not re.match(rf"\W*(?:{NUMBER})", line):
        raise NoAnswer
    if postponed(statement):
        return None
    if "=" in line:
        line = last_side(re.sub(r"^[a-zA-Z]\w?\s*=\s*", "", line))
    if (number := number_in(line)) is not None:
        return number
    if re.search(r"\d", line[:60]) and not re.search(
        r"[a-z]{4,}", re.sub(r"\\[a-z]+", "", line[:60])
    ):
        return line.strip(DRESSING).rstrip(".") or None
    return None


def numbers(text: str) -> list[str]:
    return re.findall(NUMBER, text)


def number_in(said: str) -> str | None:
    """The number that a short text states: its only one, or the first; None within an expression or far into it."""
    bare = re.sub(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s?\{([^{}]*)\}", r" \1 ", normal(said))
    bare = re.sub(
        r"\\[$%]|\\(?:quad|,|;|:|!| )|\\(?:left|right)\b",
        lambda m: "%" if m[0][1] == "%" else " ",
        bare,
    )
    bare = (
        re.sub(r"\^\s?\{?\s?(?:\\circ|2|3)\s?\}?(?=\W*$)", "", bare)
        if re.search(r"[a-z]\s?\^|\\circ", bare)
        else bare
    )
    match = re.search(VALUE, bare)
    if match is None:
        return worded_number(bare)
    before, after = bare[: match.start()], bare[match.end() :]
    if len(before.split()) > 8 or ELSEWHERE.search(before) or OPERATOR_BEFORE.search(before[-12:]):
        return None
    if OPERATOR_AFTER.match(after) or not UNIT_AFTER.match(after):
        return None
    if (
        re.match(r":\d|\s\d{1,3}\s?/\s?\d", after)
        or re.match(r"\s?(?:or|to|and|/|[\u2013-])\s?-?\$?\d", after)
        or re.match(r",\s?-?\d", after)
    ):
        return None
    sign = "-" if re.search(r"\bminus $|\bnegative $", before) else ""
    return sign + re.sub(r"\s", "", match[0])


def worded_number(said: str) -> str | None:
    """`twenty-five` as 25, where it is the first of few words."""
    match = WORDED.search(said)
    if (
        match is None
        or len(said[: match.start()].split()) > 4
        or ELSEWHERE.search(said[: match.start()])
    ):
        return None
    return str(in_digits(match[1]))


def in_digits(words: str) -> int:
    """694 of `six hundred and ninety-four`."""
    total = part = 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word == "hundred":
            part = max(part, 1) * 100
        elif word in MAGNITUDES:
            total, part = total + max(part, 1) * MAGNITUDES[word], 0
        else:
            part += TENS.get(word, WORDS.get(word, 0))
    return total + part


def asked_number(said: str, question: str) -> str | None:
    """The only number of a sentence that counts what the question asks for: `18 girls and 12 boys`; with its unit."""
    if re.search(r"\bdollars?\b", question) and (
        cents := re.search(r"\b(\d{1,4}) cents?\W*$", said)
    ):
        return str(int(cents[1]) / 100)
    asked = re.search(r"how many (\w{3,})", asking(question), re.IGNORECASE)
    if asked is None or re.search(r"n't|\bnot\b|\binstead\b", said):
        return None
    stem = re.escape(asked[1][:-1] if asked[1].endswith("s") else asked[1])
    found = re.findall(
        rf"(?<![\w.,/*+=-])({NUMBER})\W{{1,3}}(?:[a-z]{{2,}} )?{stem}", said, re.IGNORECASE
    )
    return found[0] if len(set(found)) == 1 else None


COMPARED = re.compile(
    r",? which (?:is|are|means|makes)\b[^,;]{0,40}?(?:\b(?:more|less|fewer|greater|than|half|twice|"
    r"percent|per|times)\b|%).*$",
    re.IGNORECASE,
)
"""A clause that compares the answer that stands before it."""


def concluded_number(text: str, question: str = "") -> str | None:
    """The number that the last sentence states, by the word or sign before it; the only one of a plain output.

    With the question, the one of what it counts, in the clause that speaks most of it.
    """
    last = conclusion(text, question)
    if last is None or re.match(r"(?:step|first|next|let)\b", last, re.I):
        return None
    last = normal(last)
    if (asked := asked_number(re.sub(r"\*\*|\$", "", last), question)) is not None:
        return asked
    if not re.search(r"percent|share|%|compare|than|differ", question, re.IGNORECASE):
        cut = COMPARED.sub("", last)
        last = cut if re.search(r"\d", cut) else last
    display = list(MATHS.finditer(last))
    if display and display[-1].end() >= len(last.rstrip(" .*")) - 40:
        side = last_side(_inside(display[-1]))
        bare = re.sub(r"^[a-zA-Z]\w?\s*=\s*", "", side)
        return number_in(bare) or side or None
    last = re.sub(r"\*\*|`", "", last)
    if question and "=" not in last and len(re.findall(VALUE, last)) > 1:
        clause = clause_of(last, question)
        last = clause if re.search(VALUE, clause) else last
    cues = list(SO.finditer(last))
    clause = (
        last[cues[-1].end() :]
        if cues and re.search(r"\d|" + WORDED.pattern, last[cues[-1].end() :], re.I)
        else last
    )
    found = list(re.finditer(VALUE, clause))
    if not found:
        if len(clause.split()) > 12:
            return None
        ends = [clause, *(clause[result.end() :] for result in RESULT.finditer(clause))]
        return next((each for end in reversed(ends) if (each := worded_number(end))), None)
    if len(found) == 1:
        only = found[0]
        before, after = clause[: only.start()], clause[only.end() :]
        if (
            OPERATOR_BEFORE.search(before[-12:])
            or OPERATOR_AFTER.match(after)
            or (ELSEWHERE.search(before[-24:]) or CHECKS.search(before))
        ):
            return None
        return only[0] if len(clause.split()) <= 25 else None
    equation = clause.rpartition("=")[2] if "=" in clause else ""
    if equation and (number := number_in(equation)) is not None:
        return number
    for result in reversed(list(RESULT.finditer(clause))):
        infinitive = clause[: result.start()].endswith("to ") and not IMPERATIVE.match(clause)
        if not infinitive and (number := number_in(clause[result.end() :])) is not None:
            return number
    subject = re.match(rf"\W*({VALUE})%?(?:,? or (?:{VALUE})%?,?)? (?:is|are|of)\b", clause)
    return re.sub(r"\s", "", subject[1]) if subject and cues else None
