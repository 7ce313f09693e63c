"""Reads yes or no: the word, or the existence that a sentence affirms or denies; the question is not needed."""

from __future__ import annotations

import re

from vlopd.grading.final_statements import (
    DRESSING,
    NoAnswer,
    Statement,
    boxes,
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
    r"conclude|the answer[^.\n]{0,20}?|short answer)"
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


def read(text: str) -> str | None:
    """`yes` or `no`, or None."""
    return decide(text.replace("\u2019", "'"), stated, concluded, exclusive=True)


def stated(statement: Statement) -> str | None:
    """The answer of a statement. Raises NoAnswer where it gives none or both."""
    said = text_of(statement.said).strip()
    if statement.kind in ("tag", "box"):
        if inner := boxes(said):
            said = text_of(inner[-1][1])
        found = _word(said) or concluded(said)
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


def _word(said: str) -> str | None:
    """The yes or no that a text begins with."""
    said = IDIOM.sub(" ", said)
    match = LEAD.match(said)
    if match is None or BOTH.match(said[match.start("yes" if match["yes"] else "no") :]):
        return None
    return "yes" if match["yes"] else "no"


def concluded(text: str) -> str | None:
    """The answer of a text without a statement: its first word, a concluding `so yes`, or what it affirms."""
    text = text.strip()
    bare = UNSURE_BUT.sub("", IDIOM.sub(" ", text))
    if BOTH.search(bare[:60]):
        return None
    concluding = list(CONCLUDES.finditer(bare))
    first = _word(bare)
    if concluding:
        last = concluding[-1]
        return (last["word"] or last["last"]).lower()
    if first is not None:
        other = "no" if first == "yes" else "yes"
        return None if re.search(rf"\n\W*{other}\W*$", bare, re.IGNORECASE) else first
    parts = [each for each in sentences(bare) if re.search(r"\w", each)]
    later = [found for each in parts[1:] if (found := _plain_word(each))]
    if later:
        return later[-1]
    if any(UNCERTAIN.search(each) for each in parts[-2:]) or gives_up(" ".join(parts[:2])):
        return None
    polarities = [(each, value) for each in parts if (value := polarity(each))]
    drawn = [value for each, value in polarities if DRAWN.match(each)]
    values = {value for _, value in polarities}
    if drawn or len(values) == 1:
        return drawn[-1] if drawn else polarities[0][1]
    if not polarities:
        return None
    # the first sentence answers, unless it describes (`The image shows a street. There is no dog.`)
    return "yes" if polarities[0][1] == "yes" and THERE_IS.search(polarities[0][0]) else "no"


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
