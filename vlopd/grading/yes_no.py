"""Reads yes or no: the word, or the existence that a sentence affirms or denies.

With the question (`Is there a dog in the image?`), sentences about something else do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

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
from vlopd.grading.words import text_of

IDIOM = re.compile(
    r"\b(?:there(?:'s| is| can be|'d be)? )?(?:no|without(?: a)?|beyond(?: a)?|not a|"
    r"no reason(?:able)? to) (?:reasonable )?"
    r"(?:doubt(?:ing|ed)?|question|denying|mistaking|mistake|problem|worries|matter what|wonder|"
    r"need to guess|uncertainty)\b(?: (?:about|that|of|on)(?: it| that| this)?)?|"
    r"\bnot only\b|\bno longer\b|\bif i'?m not mistaken\b|\bnot (?:hard|difficult) to (?:see|spot|"
    r"find)\b|\bcan(?:no|')t (?:miss|deny)\b|"
    r"\bno\. ?\d|\bno (?:other|more) \w+(?: besides| except| than)?|\bwhether or not\b|\bnot just\b|"
    r"\bnot to mention\b|\bno wait\b|"
    r"\bwhich is not (?:surprising|uncommon)\b",
    re.IGNORECASE,
)
"""Negative words that deny nothing: `there is no doubt`."""
YES = (
    r"(?:so|right|that'?s (?:right|correct|true)|present)(?=\W*$)|(?:it )?(?:is|does)(?=\W*$)|"
    r"yes|yeah|yep|yup|affirmative|absolutely|definitely|certainly|indeed|of course|"
    r"sure(?!,? (?:let|i can|here|i'?ll|thing))|true|correct"
)
NO = (
    r"(?:definitely|absolutely|certainly|clearly|probably|apparently|unfortunately|of course|"
    r"surely) not|no(?:pe)?(?![\w'-])(?! (?:one|matter|other|"
    r"[a-z]+s? (?:is|are|was|can|appears?|seems?|in|visible)))|nah|not (?:at all|that i|really|"
    r"visible|present|in (?:the|this)|here|as far|any|quite|seen|exactly)|"
    r"negative|none|false|incorrect|nowhere|not\b(?! (?:possible|clear|sure|certain|able|enough))"
)
LEAD = re.compile(
    rf"[\s,*_\"'`(\[{{$\\>#\u2705\u274c:-]{{0,8}}(?:(?:well|oh|hmm|ok(?:ay)?|so|"
    rf"i (?:would )?(?:think|believe|guess|say)|i'?d say|it is|it'?s|"
    rf"definitely|probably|clearly|therefore|thus|hence|simply|a|an|my answer is|most likely|likely|"
    rf"is|be|the answer is|resounding|clear)[\s,:*\"'(]{{1,4}}){{0,3}}"
    rf"(?:(?P<no>{NO})|(?P<yes>{YES}))\b(?!\s?(?:/|or|and/or)\s?(?:no|yes)\b)(?!-)",
    re.IGNORECASE,
)
BOTH = re.compile(r"\b(?:yes|no) (?:and|or|/) (?:yes|no)\b|\byes/no\b", re.IGNORECASE)
CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|in (?:short|conclusion|summary)|overall|i'd say|i would say|say|"
    r"conclude|the answer[^.\n]{0,20}?|short answer|answer(?: \w+){0,3} with)"
    r"[\s,:*\"'(]{1,4}(?:it(?:'s| is) |i (?:would )?say |that'?s |a |is |that )?(?:definitely |"
    r"clearly |probably |a )?[*\"'(]{0,3}"
    r"(?P<word>yes|no)(?![\w'-])(?! (?:\w+ ){1,4}(?:is|are|can|exists?|appears?|visible|present))|"
    r"[:\u2014\u2013-]\s?[*\"']{0,3}(?P<last>yes|no)[*\"'.!)]{0,4}\s*$",
    re.IGNORECASE | re.MULTILINE,
)
DENIES = re.compile(
    r"\b(?:no|not|n't|never|none|nor|neither|nothing(?! (?:known|to|else|more))|nobody|nowhere|"
    r"without|absen(?:t|ce)|lacks?|lacking|missing|cannot|can't|fails? to|"
    r"devoid|free of|instead of|rather than|zero|isn't|aren't|doesn't|don't|didn't|couldn't|wasn't|"
    r"weren't|isnt|doesnt|dont|cant)\b|n't\b",
    re.IGNORECASE,
)
AFFIRMS = re.compile(
    r"\b(?:there(?:'s| (?:is|are|was|were|appears?|seems?|does|exists?|certainly|definitely|clearly|"
    r"indeed|actually|also|must|looks))\b|"
    r"(?:i|we|you|one) (?:can|could|do|am able to|was able to)?(?: \w+ly)? ?(?:see|spot|notice|"
    r"observe|find|make out|identify|detect|recogni[sz]e|count)\b|"
    r"(?:can|could|may) (?:\w+ly )?be (?:\w+ly )?(?:seen|spotted|found|observed|noticed|identified|made out)|"
    r"(?:is|are|was|were|appears?|seems?|does appear|do appear)(?: to be)? (?:\w+ly )?(?:visible|"
    r"present|shown|seen|depicted|pictured|standing|sitting|"
    r"lying|located|in (?:the|this)|on (?:the|a)|included|featured|there|parked|walking|holding|"
    r"hanging|placed|behind|next to|near|at the|beside|under)\b|"
    r"(?:image|picture|photo|photograph|scene|it|figure|chart) (?:does |clearly |indeed |also |"
    r"actually )*(?:shows?|contains?|includes?|depicts?|features?|has|have|"
    r"contain|include|display(?:s)?)|exists?\b|does (?:contain|include|have|show|feature|exist|appear))",
    re.IGNORECASE,
)
THERE = re.compile(
    r"\bthere(?:'s|\b)|\b(?:visible|present|exists?|see|spot|contains?)\b", re.IGNORECASE
)
UNSURE_BUT = re.compile(r"^\W*(?:i'?m|i am) not [^.,]{0,40}, but ", re.IGNORECASE)
DRAWN = re.compile(r"(?:so|thus|therefore|hence|in conclusion|overall)\b", re.IGNORECASE)
ONLY = re.compile(r"\bonly (?!one\b|two\b|a few\b|part\b)", re.IGNORECASE)
THERE_IS = re.compile(r"\bthere\b", re.IGNORECASE)
UNCERTAIN = re.compile(
    r"\b(?:(?:un)?clear (?:whether|if)|not (?:clear|sure|certain|possible|able)|unsure|uncertain|"
    r"hard to (?:say|tell)|difficult to (?:say|tell|determine)|"
    r"can(?:not|'t| not) (?:be )?(?:determined?|tell|say|verify|confirm|judge|be sure)|"
    r"cannot see (?:the|any) (?:image|picture)|"
    r"(?:may|might|could) or (?:may|might|could) not|whether or not|impossible to|"
    r"(?:can(?:not|'t)|don't|do not|unable to|not able to)(?: \w+)? (?:see|view|access|have|process|"
    r"open)(?: \w+)? (?:the|an|any|your|access|this)(?: \w+)? ?(?:image|images|picture|"
    r"photo)(?! of)|depends|"
    r"i don't know|no idea|sorry|(?:need|would need) (?:to see|more)|might be|may be|could be|"
    r"perhaps|maybe|possibly)\b",
    re.IGNORECASE,
)


ASKED = re.compile(
    r"\b(?:(?:is|are) there(?: an?| any| some)?|(?:can|do) you see(?: an?| any| some)?|"
    r"does (?:the|this) \w+ (?:contain|show|have|include)(?: an?| any| some)?|(?:is|are) (?:an?|any|some)) "
    r"([a-z][a-z -]{1,40}?)(?= in (?:the|this)| (?:visible|present|shown|here|anywhere|on the)\b|\s*\?)",
    re.IGNORECASE,
)
"""What a question about existence asks for."""
ALSO = {
    "person": "people|man|woman|men|women|boy|girl|child|children|lady",
    "couch": "sofa", "tv": "television", "airplane": "plane", "motorcycle": "motorbike",
    "bicycle": "bike", "refrigerator": "fridge", "cell phone": "phone|smartphone", "mouse": "mice", "knife": "knives",
    "sports ball": "ball", "potted plant": "plant", "dining table": "table", "sheep": "lamb",
}  # fmt: skip
"""Other words for the objects of COCO, which POPE asks for."""
SUPPOSES = re.compile(
    r"\b(?:would|could|if|whether|might|may|expect|at first|first sight|seems? (?:at first|as)|going to say|thought|"
    r"resembles?|instead of|unlike|question (?:is|asks))\b",
    re.IGNORECASE,
)
REFERS = re.compile(
    r"\W*(?:so |thus |but |and |therefore |hence |indeed )?,?\s?(?:none|nothing|there(?:'s| is|"
    r" are) (?:indeed )?(?:one|none|some|"
    r"any|not|no such|two|several)\b|there (?:isn't|aren't|is)\W*(?:any|one)?\W*$|(?:i|we|"
    r"you) (?:can |do )?(?:see|spot|find)"
    r" (?:one|none)|it(?:'s| is)(?: not|n't)? (?:there|present|visible|in the)|it isn't (?:there|"
    r"present|visible|in the)|"
    r"the object (?:asked|in question|is))",
    re.IGNORECASE,
)
"""Begins a sentence about what was asked for, without its name."""
CHINESE = re.compile(r"\W*(?:(不|没|否|無|无)|(是|有|对|對|存在))")


def read(text: str, question: str = "") -> str | None:
    """`yes` or `no`, or None."""
    reader = partial(concluded, question=question)
    return decide(
        text.replace("\u2019", "'"), partial(stated, reader=reader), reader, exclusive=True
    )


def stated(statement: Statement, reader: Callable[[str], str | None]) -> str | None:
    """The answer of a statement. Raises NoAnswer where it gives none or both."""
    said = text_of(statement.said).strip()
    if statement.kind in ("tag", "box"):
        if inner := boxes(said):
            said = text_of(inner[-1][1])
        found = _word(said) or reader(said)
        if found is None and said:
            raise NoAnswer
        return found
    line = (sentences(said) or [""])[0]
    if BOTH.match(line.lstrip(DRESSING)):
        raise NoAnswer
    if found := _word(line):
        return found
    if statement.kind == "heading":
        return None
    if UNCERTAIN.search(line) or gives_up(line):
        raise NoAnswer
    return polarity(line)


def _asked(question: str, text: str) -> re.Pattern[str] | None:
    """The names of what the question asks for; of several words the last, unless the text has all."""
    found = ASKED.search(question)
    if found is None:
        return None
    name = found[1].strip().lower()
    also = ALSO.get(name, "")
    if not re.search(rf"\b{re.escape(name)}", text, re.IGNORECASE):
        name = name.rpartition(" ")[2]
    stem = re.escape(name[:-1] if name.endswith(("y", "s")) and len(name) > 3 else name)
    names = rf"{stem}(?:e?s|y|ies)?" + (f"|(?:{also})s?" if also else "")
    return re.compile(rf"\b(?:{names})\b", re.IGNORECASE)


def about(sentence: str, asked: re.Pattern[str]) -> str | None:
    """Whether a sentence says that what was asked for is there; None where it supposes, asks or is about others."""
    if sentence.endswith("?"):
        return None
    found = None
    for clause in re.split(
        r",? but |; |: |,? (?:al)?though |,? while |, (?:so|and|as|since) ", sentence
    ):
        match = asked.search(clause)
        if match is None:
            if REFERS.match(clause) and not SUPPOSES.search(clause):
                found = "no" if DENIES.search(clause) else "yes"
            continue
        before, after = clause[: match.start()], clause[match.end() :]
        denial = list(DENIES.finditer(before))
        free = denial and re.search(
            r",? and (?!an? )| with (?!an? )|(?<!there )\b(?:is|are|has|stands?)\b",
            before[denial[-1].end() :],
        )
        near = re.split(r",| (?:who|which|that|with|and) ", after, maxsplit=1)[0]
        if (denial and not free) or DENIES.search(near):
            found = "no"
        elif not SUPPOSES.search(clause) and not UNCERTAIN.search(clause):
            defines = re.match(r"\W*(?:an? |the )?$", before, re.IGNORECASE) and re.match(
                r"s? (?:is|are) (?:an? |(?:\w+ ){0,3}"
                r"(?:mammals|animals|birds|vehicles|devices|tools|fruits|machines)\b)",
                after,
            )
            asks = re.search(
                r"question (?:is|asks)|asked|(?:look(?:s|ing)? (?:for|like)|take it for)\W*(?:an?|the|any)?\W*$",
                before,
            )
            found = found if defines or asks else "yes"
    return found


def _word(said: str) -> str | None:
    """The yes or no that a text begins with."""
    said = IDIOM.sub(" ", said)
    match = LEAD.match(said)
    if match is None or BOTH.match(said[match.start("yes" if match["yes"] else "no") :]):
        return None
    return "yes" if match["yes"] else "no"


def concluded(text: str, question: str = "") -> str | None:
    """The answer of a text without a statement: its first word, else the last that it says of what was asked for."""
    text = text.strip()
    bare = UNSURE_BUT.sub("", IDIOM.sub(" ", text))
    if BOTH.search(bare[:60]):
        return None
    if chinese := CHINESE.match(bare):
        return "no" if chinese[1] else "yes"
    if letter := re.fullmatch(r"\W*([YN])\W*", text, re.IGNORECASE):
        return "yes" if letter[1] in "Yy" else "no"
    parts = [each for each in sentences(bare) if re.search(r"\w", each)]
    first = _word(bare)
    words = [found for each in parts if (found := _plain_word(each) or _concluding(each))]
    asked = _asked(question, bare)
    if first is not None and (_plain_word(parts[0]) or first == "no" or not words):
        other = "no" if first == "yes" else "yes"
        if re.search(rf"\n\W*{other}\W*$", bare, re.IGNORECASE):
            return None
        turned = [each for each in parts[1:] if _plain_word(each) == other]
        return None if any(asked and about(each, asked) == other for each in turned) else first
    if any(UNCERTAIN.search(each) for each in parts[-2:]) or gives_up(" ".join(parts[:2])):
        return words[-1] if words else None
    if asked:
        said = [
            found
            for each in parts
            if (found := _plain_word(each) or _concluding(each) or about(each, asked))
        ]
        return said[-1] if said and (words or conclusion(bare)) else None
    if words:
        return words[-1]
    polarities = [(each, value) for each in parts if (value := polarity(each))]
    drawn = [value for each, value in polarities if DRAWN.match(each)]
    values = {value for _, value in polarities}
    if drawn or len(values) == 1:
        return drawn[-1] if drawn else polarities[0][1]
    if not polarities:
        return None
    # the first sentence answers, unless it describes (`The image shows a street. There is no dog.`)
    return "yes" if polarities[0][1] == "yes" and THERE_IS.search(polarities[0][0]) else "no"


def _concluding(sentence: str) -> str | None:
    """The yes or no of `so yes` or `I answer the question with no`."""
    found = list(CONCLUDES.finditer(sentence))
    if not found or SUPPOSES.search(
        re.sub(r"I would|question whether", "", sentence[: found[-1].start() + 1])
    ):
        return None
    return str(found[-1]["word"] or found[-1]["last"]).lower()


def _plain_word(sentence: str) -> str | None:
    match = re.match(r"[\W_]*(yes|no)\b(?=[\s*_\"']{0,3}(?:[,.;:!]|$))", sentence, re.IGNORECASE)
    return match[1].lower() if match else None


def polarity(sentence: str) -> str | None:
    """Whether a sentence affirms or denies that something is there; None where it does neither, or asks.

    Of a main clause and one with `although` the main one counts; otherwise a denial does (`a cat, but no dog`).
    """
    bare = IDIOM.sub(" ", sentence).strip()
    if bare.endswith("?"):
        return None
    if concession := re.match(
        r"(?:although|though|while|whereas|even though)\b[^,]{1,120},", bare, re.IGNORECASE
    ):
        return _clause(bare[concession.end() :])
    main = re.split(r",? (?:although|though|even though|while|whereas) ", bare, maxsplit=1)[0]
    if found := [value for each in re.split(r",? but |; ", main) if (value := _clause(each))]:
        return "no" if "no" in found else "yes"
    return _clause(bare)


def _clause(clause: str) -> str | None:
    if UNCERTAIN.search(clause):
        return None
    if DENIES.search(clause) and (
        THERE.search(clause) or AFFIRMS.search(clause) or len(clause.split()) <= 14
    ):
        return "no"
    return "yes" if AFFIRMS.search(clause) and not ONLY.search(clause) else None
