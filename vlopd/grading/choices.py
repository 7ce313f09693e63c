"""Reads which option an output chooses: by its letter, its number in words, or its text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase

from vlopd.grading.final_statements import (
    DRESSING,
    GIVEN_UP,
    NoAnswer,
    Statement,
    boxes,
    conclusion,
    decide,
    gives_up,
    sentences,
)
from vlopd.grading.values import number_in
from vlopd.grading.words import in_latex, text_of

FUNCTION = (
    "because|since|as|is|was|are|for|due|based|which|and|or|but|would|has|seems|appears|given|matches|from|with|where|so|"
    "that|not|at|by|shows?|represents?|describes?|fits"
)
"""Words after a letter that make it a letter and not an article: `A because`, but not `A dog`."""
RIGHT = (
    "(?:the )?(?:only |most |single |clearly )?(?:correct|right|best|true|answer|appropriate|accurate|proper|valid|"
    "likely|suitable|one that|fit|match|choice|reasonable|sensible|consistent)"
)
BE = "(?:is|are|was|would be|must be|should be|has to be|seems(?: to be)?|appears to be|looks|remains)"
VERB = (
    r"(?:choos(?:e|es|ing)|chose|chosen|pick(?:s|ed|ing)?|select(?:s|ed|ing)?|go(?:es|ing)? (?:with|"
    r"for)|went with|"
    r"chang(?:e|ed|ing) (?:my|the) answer (?:from \(?[A-Z]\)? )?to|opt(?:s|ed|ing)? for|vote for|"
    r"settl(?:e|ed|ing) on|stick(?:ing)? with|my (?:answer|choice|"
    r"pick|vote) (?:is|goes to))"
)
POINTS = (
    r"(?:correspond(?:s|ing)? to|match(?:es|ing)?|lead(?:s|ing)? (?:us )?to|point(?:s|"
    r"ing)? (?:us )?to(?:wards?)?|indicat(?:es|ing)|"
    r"identified as|leav(?:es|ing)(?: us)?(?: with)?(?: only)?|it(?:'s| is| must be| has to be|"
    r" should be| would be)|"
    r"that(?:'s| is| would be)|this is|say|answer(?:ing)?|(?:and )?(?:so|thus|therefore|"
    r"hence)(?: it(?:'s| is))?|supports?|"
    r"favou?rs?|consistent with|represented by|given (?:by|in)|listed as|shown in|described (?:by|"
    r"in)|agrees with|fits|equivalent to|be|is)"
)
NOT_BEFORE = re.compile(
    r"(?:\bnot|n't|\bnever|\bcannot|\brul(?:e|es|ed|ing) out|\beliminat\w+|\bexclud\w+|\breject\w*|"
    r"\binstead of|\brather than|"
    r"\bthan|\bunlike|\bneither|\bnor|\bwithout|\bdiscard\w*|\bdismiss\w*|\bexcept|"
    r"\bbesides)\b[\s*(]{0,3}(?:\w{1,12} ){0,3}[*(\[]*$",
    re.IGNORECASE,
)
HYPOTHETICAL = re.compile(
    r"\b(?:if|whether|might|could|may|tempt\w*|some(?:one)?|people|many|first|initially|at a glance|"
    r"suppose|consider|check(?:ing)?|"
    r"between|either|mistake|trap|distractor|students?|test(?:ing)?|thought|was going to|would have)\b[^.;,\n]{0,40}$|"
    r"\bmistake is\b[^.;\n]{0,50}$",
    re.IGNORECASE,
)
MARKUP = re.compile(
    r"</?(?:b|i|p|strong|em|u|s|br)>|<\|(?!begin_of_box|end_of_box)\w{1,20}\|>", re.IGNORECASE
)
REJECTS = re.compile(
    r"\b(?:rul(?:e|es|ed|ing) out|eliminat\w+|exclud\w+|reject\w*|discard\w*|"
    r"dismiss\w*|neither)(?: the)?(?: \w+)? $",
    re.IGNORECASE,
)
CHOOSABLE = re.compile(
    r"(?:^\W{0,4}|\b(?:is|it's|say|answer|think|probably|likely|maybe|perhaps|leaves|only|so|yes|be|towards?|guess|"
    r"hence|thus|therefore|believe|"
    r"definitely|clearly|just|for|with|as) )[*_(\[\"']*$",
    re.IGNORECASE,
)
"""Before a letter that may be the choice."""
WRONG_AFTER = re.compile(
    r"[)\]*\"'.:,]{0,4}(?: ?[(\[][^()\n]{0,60}[)\]])?,?\s{0,2}(?:(?:is|are|was|seems|can be|"
    r"would be|should be|looks|must be|has been|"
    r"can safely be) (?:\w+ly |also |just |obviously )?(?:not|in(?:correct|valid|accurate|"
    r"consistent)|wrong|false|ruled out|eliminated|"
    r"excluded|rejected|out\b|too |unlikely|irrelevant|impossible|discarded|a distractor|untrue)|"
    r"isn't|doesn't|does not|cannot|can't|"
    r"describes? (?:something|a different)|fails|contradicts|has nothing|won't|would not|wouldn't|"
    r"aren't|did not|didn't|refers to (?:something|a different))",
    re.IGNORECASE,
)
WRONG = re.compile(
    r"\b(?:incorrect|wrong|false|not|n't|isn't|doesn't|aren't|don't|can't|cannot|no|untrue|"
    r"inaccurate|eliminated?|ruled out|invalid|unlikely|"
    r"irrelevant|fails?|contradicts?|too (?:small|large|high|low|big|short|long)|impossible)\b|"
    r"[\u2717\u2718\u274c\xd7]",
    re.IGNORECASE,
)
CORRECT = re.compile(
    r"\b(?:correct|right answer|is right|true|matches|this is (?:it|the answer)|yes|fits|valid|"
    r"best answer)\b|[\u2713\u2714\u2705]",
    re.IGNORECASE,
)
LINE_LABEL = re.compile(
    r"^[ \t>*_#\-\u2022]{0,6}(?:[Oo]ption|[Cc]hoice)? ?[(\[*]{0,3}([A-Z])[)\]*]{0,3}(?:[.:)\u2013-]|"
    r"(?= (?:is|\())|(?=\)))",
    re.MULTILINE,
)
ORDINALS = {
    word: k for k, word in enumerate(["first", "second", "third", "fourth", "fifth", "sixth"])
}
ORDINAL = re.compile(
    r"\b(first|second|third|fourth|fifth|sixth|last) (?:option|choice|answer|one|statement|alternative)\b",
    re.IGNORECASE,
)
IDENTIFIED = re.compile(
    r"(?:so |thus,? |therefore,? |hence,? )?(?:this|it|that|what remains|the only one left)(?:'s| is| must be)"
    r"(?: called| an?| the)? ([^.,;]{1,80})(?:[.,;!]|$)",
    re.IGNORECASE,
)
FILLER = re.compile(
    r"(?:(?:therefore|thus|so|hence|clearly|definitely|indeed|probably|most likely|likely|obviously|"
    r"simply|just|actually|in fact|"
    r"option|choice|answer|letter|number|statement|alternative|the|is|it's|it is|would be|be|"
    r"that of|given by|given in|in|represented by|"
    r"indicated by|labell?ed|found in|listed (?:as|under|in)|under|my final answer|correct|right|"
    r"best|final|one|as|to be|selected)"
    r"\b(?!\))[\s:,*_(\[\"'$\\]{0,6}){1,6}",
    re.IGNORECASE,
)
PUNCTUATION = r"[\s*_(\[{\"'\u201c`$<:\\]{0,8}"


@lru_cache(maxsize=64)
def _letter(letters: str) -> re.Pattern[str]:
    """A capital letter set off from what follows: not that of `A dog`, `I think` or `A-level`."""
    return re.compile(
        rf"([{letters}])(?![^\W_]|"
        rf"&)(?!['\u2019-]\w)(?!(?<=[AI])\s+(?!(?:{FUNCTION})\b)[a-z])(?!(?<=[AI])[ \t]+[A-Z][a-z]+ [a-z])"
    )


@lru_cache(maxsize=64)
def _choosing(letters: str) -> tuple[re.Pattern[str], ...]:
    """Sentences that choose: `I would choose B`, `which corresponds to option B`, `B is the correct answer`."""
    letter = _letter(letters).pattern.replace("(", "(?P<letter>", 1)
    noun = r"(?:the )?(?i:option|choice|answer|letter|statement|alternative|figure|image|picture)"
    open_, close = r"[\s*_(\[\"'\u201c$]{1,4}", r"[)\]*_\"'\u201d$]{0,4}"
    strong = (
        re.compile(rf"\b(?i:{VERB})(?: {noun}| the)?[\s:]?{open_}{letter}"),
        re.compile(
            rf"(?<![\w'])(?:{noun} ?)?[(\[*_\"']{{0,4}}{letter}{close}[.:]?"
            r"(?P<mid>(?:\s?[(\u2013:,-] ?(?:(?! is | are )[^()\n.;]){0,60}?[),:\u2013-]?)?|(?! is |"
            r" are )\s(?:(?! is | are )[^()\n.;,:]){0,50}?)"
            rf"\s{{0,2}}[*_]{{0,2}}(?i:{BE}|describes|matches|fits|represents|gives|shows|states) (?:\w+ly )?"
            rf"(?i:{RIGHT}|(?:the |it |this )?(?:best|exactly|correctly|well|perfectly))\b"
        ),
        re.compile(
            rf"(?<![\w'])(?i:option|choice|answer|"
            rf"letter)[\s(*\[]{{1,3}}{letter}{close} (?:is )?(?i:it|the one)\b"
        ),
    )
    return (
        *strong,
        re.compile(
            rf"\b(?i:{POINTS})(?: (?i:only|clearly|definitely|probably|most likely|likely|"
            rf"best))?[:,]? ?{noun}{open_}{letter}"
        ),
        re.compile(rf"\b(?i:{POINTS})[:,]? ?(?:the )?[*_\"']{{0,3}}[(\[]{letter}(?=[)\]])"),
        re.compile(
            rf"\b(?i:{BE}) (?:the )?(?i:option|choice|figure|image|picture|graph|diagram|statement) [(*]{{0,3}}{letter}"
        ),
        re.compile(
            rf"[\u2705\u2714\u2611\u27a1\u2192\u21d2][\ufe0f\s*]{{0,3}}(?:{noun} )?[(*]{{0,3}}{letter}(?=[.)*\s]|$)"
        ),
        re.compile(
            r"\b(?i:say|it's|it is|it must be|it has to be|it should be|that's|"
            r"(?:so|thus|therefore|hence),?(?: (?:it's|it is|it must be))?)[ *_]{1,4}"
            rf"{letter}(?=[*_]{{0,3}}(?:[.,;!]|$|\s*\n|\s(?i:because|since|as|for)\b))"
        ),
    )


N_STRONG = 3
"""The first patterns, which choose whatever the output says before."""
NEAR_END = 20_000
"""Characters at the end of an output in which it chooses."""


class Options:
    """The letters of a question's options and the forms in which an output may name them."""

    def __init__(self, choices: Sequence[str]):
        self.letters = ascii_uppercase[: len(choices)]
        self.exact = _unique([exact_form(choice) for choice in choices], self.letters)
        self.words = _unique([_bare(spoken(choice)) for choice in choices], self.letters)
        self.numbers = _unique([number_in(choice) or "" for choice in choices], self.letters)
        self.letter = _letter(self.letters)
        self.says_none = any(GIVEN_UP.search(choice) for choice in choices)

    def stated(self, statement: Statement) -> str | None:
        """The letter that a statement of the answer gives. Raises NoAnswer where it gives none or several."""
        if statement.kind in ("tag", "box"):
            return self.of_content(statement.said)
        said = statement.said
        if statement.kind == "heading":
            said = said.split("\n")[0]
        found = self.at_start(said)
        if found or statement.kind == "heading":
            return found
        line = (sentences(said) or [""])[0]
        if (named := self.named(line)) is not None:
            return named
        if (gives_up(line) and statement.kind != "sentence") or GIVEN_UP.match(
            line.lstrip(DRESSING)
        ):
            raise NoAnswer
        return None

    def of_content(self, said: str) -> str | None:
        """The letter in the content of a tag or box, which may itself be a sentence."""
        said = text_of(said).strip()
        if inner := boxes(said):
            return self.of_content(inner[-1][1])
        if found := self.at_start(said):
            return found
        if found := self.whole(said):
            return found
        answer = decide_inner(said, self)
        if (
            answer is None
            and said
            and (GIVEN_UP.search(said) or (len(said) < 100 and _several(said, self.letters)))
        ):
            raise NoAnswer
        return answer

    def whole(self, said: str) -> str | None:
        """The option whose text this is."""
        exact = exact_form(said)
        return (
            self.exact.get(exact) or self.words.get(_bare(spoken(said))) or self.numbers.get(exact)
        )

    def at_start(self, said: str) -> str | None:
        """The option that a text begins with: its letter, then its text. Raises NoAnswer at `B or C`."""
        said = text_of(said).lstrip(DRESSING + "([{$:\\\u2013#>")
        line = said.split("\n", 1)[0]
        if (whole := self.exact.get(exact_form(line))) and not self.letter.match(line):
            return whole
        said = said.lstrip(DRESSING + "-")
        if found := self._lead(said):
            return found
        first = (sentences(line) or [""])[0]
        for part in (
            line,
            first,
            re.split(r" because\b| since\b|, as\b|, which\b| \(|; ", first, maxsplit=1)[0],
        ):
            if whole := self.whole(part):
                return whole
        stripped = FILLER.sub("", said, count=1) if FILLER.match(said) else said
        if stripped is not said and (found := self._lead(stripped.lstrip(DRESSING + "([{$:\\"))):
            return found
        if stripped is not said and (whole := self.whole(stripped.split("\n", 1)[0])):
            return whole
        if ordinal := ORDINAL.search(first[:60]):
            k = ORDINALS.get(ordinal[1].lower(), len(self.letters) - 1)
            return self.letters[k] if k < len(self.letters) else None
        heard = _bare(spoken(first)) + " "
        begun = [
            (len(words), letter)
            for words, letter in self.words.items()
            if words and heard.startswith(words + " ")
        ]
        return max(begun)[1] if begun and not WRONG_AFTER.match(first[len(first) // 2 :]) else None

    def _lead(self, said: str) -> str | None:
        """The letter at the very start: `B`, `b)`, `B. a cat`; small ones alone or before a bracket or full stop."""
        match = self.letter.match(said)
        small = re.match(
            rf"([{self.letters.lower()}])(?=[)\]*_\"'`}}$]{{0,4}}(?:$|\n|[).:\]]|,? (?:because|since)\b|,))",
            said,
        )
        if (
            small
            and small[1] in "ai"
            and re.match(r". ?,? ?\w", said[1:])
            and not re.match(r".[).:\]]", said)
        ):
            small = None
        lead = match or small
        if lead is None:
            return None
        letter, end = lead[1].upper(), lead.end()
        rest = said[end : end + 200]
        if self._another(rest):
            if re.match(r"[^.!\n]{1,24}\?", rest):  # `A or B? I say B.`
                return None
            raise NoAnswer
        if WRONG_AFTER.match(rest):
            return None
        return letter

    def _another(self, rest: str) -> bool:
        """Whether another letter is given too: `B or C`, `A, B`, `A and D`."""
        both = re.match(
            rf"[)\]*_\s]{{0,4}}(?:[.,;/&+]|,? ?\b(?:and|or)\b|\bor maybe\b){{1,2}}[\s]{{0,2}}(?:and |"
            rf"or |possibly |option |choice |maybe )?[(\[*]{{0,3}}([{self.letters}])(?![\w'\u2019]|"
            rf"\.\w)(?=[)\]*_]{{0,4}}(?:$|[.,;!?\n)]| (?:are|both|could|depending|and|or)\b))",
            rest,
        )
        if both is None:
            return False
        after = rest[both.end() :]
        listed = re.match(
            r"[)\]*.]{0,3}\s+(?!and\b|or\b|are\b|both\b|could\b|depending\b)[\w$]", after
        )
        return not listed or both[0].strip()[:1] == "/"

    def chosen(self, text: str, weakly: bool = False) -> list[tuple[int, str]]:
        """(place, letter) of each sentence that chooses one. Raises NoAnswer where the last chooses several."""
        found = []
        patterns = _choosing(self.letters)
        for pattern in patterns if weakly else patterns[:N_STRONG]:
            for match in pattern.finditer(text, max(0, len(text) - NEAR_END)):
                before = text[max(0, match.start() - 60) : match.start()]
                start = match.start("letter")
                rest = text[match.end("letter") : match.end("letter") + 90]
                if NOT_BEFORE.search(text[max(0, start - 40) : start]) or NOT_BEFORE.search(before):
                    continue
                if (
                    re.search(r"\b(?:in|from|at) $", before, re.IGNORECASE)
                    or HYPOTHETICAL.search(before)
                    or WRONG_AFTER.match(rest)
                ):
                    continue
                mid = match.groupdict().get("mid") or ""
                if re.search(rf"\b(?:is|are|not|but|and|while|[{self.letters}])\b", mid):
                    continue
                found.append((start, "" if self._another(rest) else match["letter"]))
        if found and not max(found)[1]:
            raise NoAnswer
        return [each for each in found if each[1]]

    def concluded(self, text: str) -> str | None:
        """The option that a text without a statement of the answer chooses."""
        text = text.strip()
        if not text:
            return None
        judged = self._judged(text)
        if judged is not None:
            return judged or None
        if found := self._not_rejected(text):
            return found
        if (found := self.at_start_of_output(text)) is not None:
            return found
        if chosen := self.chosen(text, weakly=True):
            return max(chosen)[1]
        last = text.rstrip().rpartition("\n")[2]
        labels = "".join(match[1] for match in LINE_LABEL.finditer(text)) + last.strip(" .:)(*")
        if len(labels) > 1 and labels == self.letters[: len(labels)]:  # a list of options, cut off
            return None
        if "\n" in text and (found := self._lone(last)):
            return found
        parts = sentences(text)
        if parts and (lone := re.fullmatch(rf"\W*([{self.letters}])\W*", parts[-1])):
            return lone[1]
        for said in reversed(parts):
            if (named := IDENTIFIED.match(said)) and (whole := self.whole(named[1])):
                return whole
        ending = conclusion(text)
        if ending is None and not (self.says_none and text[-1:] in ".!"):
            return None
        ending = ending or sentences(text)[-1]
        few = text if len(sentences(text)) <= 2 else ending
        if found := self._mentioned(few) or self._alone_in(ending):
            return found
        for said in (ending, ending.rpartition("=")[2]):
            if (found := self.named(said)) is not None:
                return found
        short = few is text
        return self.named(text) if short else None

    def at_start_of_output(self, text: str) -> str | None:
        said = re.sub(r"^\d{1,3}[.)] ", "", text_of(text).lstrip(DRESSING + "([{$:#>\u2022\\"))
        if re.match(r"(?i:option|choice|answer|letter)\b[\s:*_(\[\"'-]{0,6}", said):
            said = re.sub(r"^\w+[\s:*_(\[\"'-]{0,6}", "", said)
        if found := self._lead(said):
            return found
        first = sentences(said)[0] if said.strip() else ""
        return self.whole(said.split("\n", 1)[0]) or self.whole(first) or self.whole(text)

    def _lone(self, line: str) -> str | None:
        """The letter that is all of a line."""
        match = re.fullmatch(
            rf"\W{{0,6}}([{self.letters}])\W{{0,6}}(?:\\\w+\W{{0,3}})?", text_of(line)
        )
        return match[1] if match else self.whole(line)

    def _judged(self, text: str) -> str | None:
        """The one option that a list of options finds right; "" where none or several are; None without a list."""
        labels = [match for match in LINE_LABEL.finditer(text) if match[1] in self.letters]
        order = "".join(match[1] for match in labels)
        if (
            (len(order) < 3 and len(order) < len(self.letters))
            or len(order) < 2
            or not order.startswith(self.letters[: min(2, len(order))])
        ):
            return None
        ends = [match.start() for match in labels[1:]] + [None]
        right, left = set(), set()
        for match, end in zip(labels, ends, strict=True):
            said = text[match.end() : end].strip()
            said = re.split(r"\n\s*\n", said, maxsplit=1)[0]
            if CORRECT.search(said) and not WRONG.search(said):
                right.add(match[1])
            if not WRONG.search(said):
                left.add(match[1])
        tail = text[labels[-1].end() :]
        tail = tail.partition("\n")[2]
        if tail.strip() and (chosen := self.chosen(tail, weakly=True)):
            return max(chosen)[1]
        if len(right) == 1:
            return right.pop()
        if len(left) == 1 and len(order) == len(self.letters):
            return left.pop()
        if tail.strip():
            ending = (sentences(tail) or [""])[-1]
            return self._lone(ending) or self._mentioned(ending) or self.named(ending) or ""
        return ""

    def _mentioned(self, text: str) -> str | None:
        """The only letter in brackets or after `option` that is not rejected."""
        one = rf"([{self.letters}])"
        pattern = (
            rf"\({one}\)|\[{one}\]|\b(?:[Oo]ption|[Cc]hoice|OPTION) [*(\"']{{0,3}}{one}\b|"
            rf"\*\*{one}(?:[.:)][^*\n]{{0,60}})?\*\*|"
            rf"\b(?:[Oo]ption|[Cc]hoice) ([{self.letters.lower()}])(?=[.,)]|$)"
        )
        held = set()
        for match in re.finditer(pattern, text):
            before = text[max(0, match.start() - 40) : match.start()]
            if not NOT_BEFORE.search(before) and not WRONG_AFTER.match(
                text[match.end() : match.end() + 90]
            ):
                held.add(next(group for group in match.groups() if group).upper())
        return held.pop() if len(held) == 1 else None

    def _alone_in(self, sentence: str) -> str | None:
        """The only letter of a sentence that may be a choice: `So I'd answer B.`, but not `the angle at B`."""
        between = rf"\b[Bb]etween [(]?[{self.letters}][)]? and [(]?[{self.letters}][)]?"
        said = re.sub(between, "", text_of(sentence))
        if re.match(
            r"(?:if|whether|suppose)\b[^,]*$|(?:if|whether) the answer", said, re.IGNORECASE
        ):
            return None
        found = set()
        for match in self.letter.finditer(said):
            before, rest = (
                said[max(0, match.start() - 40) : match.start()],
                said[match.end() : match.end() + 90],
            )
            at_end = not re.search(r"\w", rest)
            if NOT_BEFORE.search(before) or WRONG_AFTER.match(rest) or self._another(rest):
                continue
            if CHOOSABLE.search(before) or (at_end and re.search(r"[:,?!=] ?[*_(\[\"']*$", before)):
                found.add(match[1])
        verb = r"(?:\w[\w']* ){0,3}(?:it's|is|think|answer|probably|guess|say|so,?|with|choose|pick|select)"
        small = re.fullmatch(rf"{verb} (?-i:([{self.letters.lower()}]))\W*", said, re.IGNORECASE)
        small = small or re.fullmatch(rf"([{self.letters.lower()}]) is (?:the )?{RIGHT}\W*", said)
        if small and not found and not NOT_BEFORE.search(said[: small.start(1)]):
            return small[1].upper()
        return found.pop() if len(found) == 1 else None

    def _not_rejected(self, text: str) -> str | None:
        """The letter that is left where all the others are rejected: `A, C and D are incorrect`."""
        one = rf"[(]?[{self.letters}][)]?(?![\w'])"
        several = rf"(?<!\w){one}(?:(?:, and |, or |, | and | or | & ){one}){{1,8}}"
        rejected = set()
        for match in re.finditer(several, text):
            before, rest = (
                text[max(0, match.start() - 40) : match.start()],
                text[match.end() : match.end() + 90],
            )
            if REJECTS.search(before) or WRONG_AFTER.match(rest):
                rejected |= set(re.findall(rf"[{self.letters}]", match[0]))
        left = set(self.letters) - rejected
        return left.pop() if rejected and len(left) == 1 else None

    def named(self, said: str) -> str | None:
        """The only option whose text occurs and is not denied; a text within a longer option's does not count."""
        heard = f" {spoken(said)} "
        places = {}
        for words, letter in self.words.items():
            place = heard.rfind(f" {words} ") if words else -1
            if place >= 0 and (len(words) > 1 or words.isdigit()):
                places[letter] = (place, place + len(words) + 1)
        outer = {
            a: span
            for a, span in places.items()
            if not any(
                b != a and o[0] <= span[0] and span[1] <= o[1] and o != span
                for b, o in places.items()
            )
        }
        free = [
            a
            for a, (start, end) in outer.items()
            if not re.match(r" ?(?:is|was|are) (?:not|wrong|incorrect)\b", heard[end:])
            and not re.search(
                r" (?:not|no|never|isn t|aren t|neither|nor|than|without|rather than|instead of|"
                r"t)(?: an?| the| be| really)? ?$",
                heard[max(0, start - 24) : start + 1],
            )
        ]
        return free[0] if len(free) == 1 else None


def decide_inner(said: str, options: Options) -> str | None:
    """The letter in a tag's content that is a text of its own."""
    return decide(re.sub(r"</?\w+>", " ", said), options.stated, options.concluded)


def read(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an output (without its reasoning) chooses, or None."""
    options = Options(choices)
    text = MARKUP.sub("", text)
    return decide(text, options.stated, options.concluded, options.chosen, exclusive=True)


def _several(said: str, letters: str) -> bool:
    return len(set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", said))) > 1


def _unique(forms: Sequence[str], letters: str) -> dict[str, str]:
    """{form: letter} of the forms that only one option has."""
    return {
        form: letter
        for form, letter in zip(forms, letters, strict=True)
        if form and list(forms).count(form) == 1
    }


def spoken(text: str) -> str:
    """Lower-case words and numbers with their signs, separated by single spaces."""
    text = text_of(text).lower().replace("\u2212", "-")
    return " ".join(
        re.findall(
            r"(?:(?<![\w)])-)?\d+(?:\.\d+)?|[^\W\d_]+", re.sub(r"(?<=\d),(?=\d{3})", "", text)
        )
    )


def _bare(words: str) -> str:
    """Words without a leading article."""
    return re.sub(r"^(?:a|an|the) (?=.)", "", words)


def exact_form(text: str) -> str:
    """Lower case without spaces, LaTeX delimiters and final punctuation, but with signs: `-5` is not `5`."""
    text = in_latex(text_of(text)).lower().strip(DRESSING + "$.,;:!")
    text = re.sub(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"\1/\2", text)
    return re.sub(r"\s+|\\ |\\[(),\[\];]|\$|\\(?:left|right)(?![a-z])|^(?:an?|the) ", "", text)
