r"""Finds where an output states its answer: tags, boxes, labels, headings and sentences, whatever the answer's type.

All functions take time linear in the text: patterns have bounded repetitions, and braces are matched in one pass.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

LONGEST = 2000
"""Maximum characters of what one statement says; an answer is shorter."""
MOST = 20
"""Statements that are read, from the last; an output with more repeats itself."""


class Statement(NamedTuple):
    """A place where the answer is stated, and what is stated there."""

    start: int
    kind: str
    """`tag`, `box`, `label` (`Answer: ...`, a heading) or `sentence` (`the answer is ...`)."""
    said: str
    """The content of the tag or box; else the text from there on, up to LONGEST characters."""


class NoAnswer(Exception):
    """Raised by a reader where a statement says that there is no answer, or gives several."""


# ------------------------------------------------------------------------------------------- patterns

TAG_NAMES = ("answer", "final_answer", "final", "conclusion", "ans")
TAG = re.compile(rf"<({'|'.join(TAG_NAMES)})>|\[(answer|ans)\]", re.IGNORECASE)
"""`<CONCLUSION>` is LLaVA-CoT's."""

BOX = re.compile(r"\\f?box(?:ed)?(?:[ \t]{0,3}\{|[ \t]{0,3}(?=[-\w$\\(]))|\\framebox[ \t]{0,3}\{")
ANY_TAG = re.compile(rf"</?(?:{'|'.join(TAG_NAMES)})>", re.IGNORECASE)
JSON = re.compile(
    r"[\"'](?:final[_ ]?)?answer[\"']\s{0,3}:\s{0,3}(?:\"([^\"\n]{1,300})\"|'([^'\n]{1,300})'|"
    r"(-?[\d.,/%]{1,30}))\s{0,4}[,}]",
    re.IGNORECASE,
)
"""The answer of a JSON object or a Python dictionary."""

BLANK = re.compile(
    r"\\(?:boxed|fbox)[ \t]{0,3}\{(?:\\phantom\{[^{}]{0,40}\}|[\s?.\u2026_-]|\\[ ,;_]){0,60}\}"
)
"""A box that was left empty."""
GLM_BOX = ("<|begin_of_box|>", "<|end_of_box|>")
UNBRACED = re.compile(r"\(\w\)|-?\$?(?:\\[a-zA-Z]+|[\d.,/]*\d|\w)")
"""The content of `\\boxed 5`."""
BETWEEN_BOXES = re.compile(
    r"[\s$,;.]{0,6}(?:\\?text\{)?[\s]{0,3}(?:and|or|,)?[\s}$]{0,6}(?:[a-zA-Z](?:_\{?\w\}?)?\s?=)?[\s$]{0,4}"
)
"""Between boxes of one list: `$x = \\boxed{1}$ or $x = \\boxed{2}$`."""

_NOUN = r"answers?|ans|choice|option|selection|pick|conclusion|verdict|result|response|value|letter|solution"
_ADJECTIVE = (
    r"so|thus|therefore|hence|my|the|your|final|correct|right|best|chosen|selected|short|numerical|"
    r"numeric|overall|"
    r"direct|most likely|predicted|proposed|option|our"
)
_BEFORE = r"^[ \t>#*_`\-\u2022\u2705\u27a1\u2192\u21d2\ufe0f]{0,12}(?:step \d{1,2}: |\d{1,2}[.)] )?"
LABEL = re.compile(
    rf"{_BEFORE}(?P<words>(?:(?:{_ADJECTIVE})[ ,*_]{{1,4}}){{0,4}}(?:{_NOUN}))"
    r"(?: choice| letter| option)?(?: ?\([^()\n]{0,20}\))?[*_`\"]{0,3}[ \t]{0,3}"
    r"(?:(?P<sign>[:\uff1a=]|(?<=ns)\.|-{1,2}>|=>|[-\u2013\u2014\u2192\u21d2](?=[ \t*]))|"
    r"[*_`.#]{0,4}[ \t]{0,3}$)",
    re.IGNORECASE | re.MULTILINE,
)
"""A line that is or begins with a label: `Answer: ...`, `Answer - B`, `### Final Answer`."""
PLAIN_LABEL = re.compile(
    r"(?:(?:the |my |so )?(?:option|choice|result|response|value|letter|selection|pick|conclusion|"
    r"verdict|solution))s?",
    re.IGNORECASE,
)
"""Labels that do not name the final answer by themselves: those alone are headings of reasoning."""

IS = (
    r"(?:is|are|was|were|would be|will be|should be|must be|has to be|becomes|equals|"
    r"comes out to be|comes to|turns out to be)"
)
SENTENCE = re.compile(
    rf"\b(?:(?:answers?|ans)\b(?P<mid>[^.?!:=\n]{{0,60}}?)(?:\b{IS}\b(?!n't)|[:\uff1a=])"
    rf"|(?:final|correct|right|exact|numerical|desired|requested|best|appropriate|matching|overall|"
    rf"only|possible|two|real)[ *]{{1,3}}"
    rf"(?:solutions?|roots?|result|value|solution|number|total|amount|count|response|expression|word|"
    rf"name|term|label|statement|option|choice|letter)\b"
    rf"[^.?!:=\n]{{0,50}}?(?:\b{IS}\b(?!n't)|[:\uff1a])"
    rf"|\b(?:solutions|roots)\b[^.?!:=\n]{{0,50}}?\bare\b(?!n't)"
    r"|answer(?: (?:the|this) question)? with (?:a )?(?=[(*\[\"'\u201c]))[\s*_:\"'`]{0,8}",
    re.IGNORECASE,
)
"""`the answer is ...`, `"answer": ...`, `the correct value of x is ...`."""
HASHES = re.compile(r"(?:^|[ \t])####[ \t*]{0,4}(?=[^\s#])", re.MULTILINE)
"""GSM8K's mark."""
SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|in (?:which|that) case|suppose|supposing|assume|assuming|what|which|"
    r"think|thought|guess(?:ed)? at first|"
    r"not|n't|isn't|because|someone|might|could|initially|a common(?: wrong)?|wrong|incorrect|previous|earlier)"
    r"\b[^.;:\n,]{0,24}$",
    re.IGNORECASE,
)
"""Before a sentence that does not state the answer: `if the answer is ...`, `check whether the answer is ...`."""
UNSTATED = re.compile(
    r"[\s*\"'(]{0,4}(?:not\b(?![^.\n]{0,40}\bbut\b)|n't|never\b|neither\b|incorrect\b|wrong\b|"
    r"required\b|expected\b|"
    r"asked\b|supposed\b|to be\b|in the form|given (?:in|as|by|to)\b|rounded\b|based on\b|derived\b|obtained\b|"
    r"found by\b|calculated (?:by|as follows)\b|supported\b|determined by\b|clear\b|obvious\b|"
    r"simple\b|as follows|"
    r"straightforward\b|reasonable\b|consistent\b|confirmed\b|(?:is |"
    r"indeed )?correct(?:\b(?! option| choice| answer))|"
    r"verified\b|an? (?:integer|whole number|positive|single|letter|number|multiple|real)\b|"
    r"one of\b|among\b(?! none)|between\b|provided\b|shown\b|explained\b)",
    re.IGNORECASE,
)
"""What follows `the answer is` where the answer is described and not stated."""
INSTEAD = re.compile(r"^[\s*]{0,3}not\b[^.\n]{0,40}?\bbut(?: rather)?\b[\s*]{0,3}", re.IGNORECASE)
DRESSING = " \t\r\n*_`\"'\u201c\u201d~"
SAME = 9
"""Characters that two statements begin with where they repeat each other: `The answer is 4. The answer is 5.`"""
ADJACENT = 40
"""Maximum characters from a statement to the next one that contradicts it, rather than follows from what is between."""
TURNS = re.compile(
    r"\b(?:but|not|no|wait|actually|sorry|so|thus|therefore|hence|instead|rather|"
    r"correct\w*|final|wrong|n't|however|hmm|oops)\b|[?]",
    re.IGNORECASE,
)
"""Words between two statements of which the later one holds."""
CJK = re.compile(
    r"(?:\u6545?\u9009(?:\u62e9|\u9879)?(?=[\s:\uff1a(*]{0,4}[A-Z])|\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3|"
    r"\u6b63\u786e\u9009\u9879)(?:\u5e94\u8be5\u662f|\u662f|\u4e3a|"
    r"\u306f)?[\s:\uff1a*]{0,4}"
)
"""`The answer is` in Chinese and Japanese."""
CORRECTION = re.compile(
    r"(?:(?<=[.!?\n*\u2026)] )|(?<=\n)|(?<=[.!?,;\u2014-] ))(?:but |no,? |oh,? |hmm,? )?(?:wait|"
    r"actually|correction|scratch that|"
    r"on second thoughts?|let me (?:re-?(?:check|consider|count|calculate|think|compute|examine|read)|correct)|"
    r"i (?:made|was|misread|miscounted|misspoke|apologi[sz]e)|sorry|oops|apologies|upon (?:re|"
    r"closer)|looking again)\b",
    re.IGNORECASE,
)
"""Where an output takes back what it said."""
NEW_TURN = re.compile(
    r"\n[ \t#*]{0,6}(?:Question|Q|Human|User|Problem|Instruction|Exercise|Example)[ \t]?\d{0,3}[*]{0,2}[:.]"
    r"|\n[^\n]{5,200}\?\s{1,2}(?i:please )?(?:Answer|answer) (?:the|with|yes|in|using)\b",
)
"""Where a model goes on with a question of its own, whose answer does not count."""
TOKENS = re.compile(
    r"</?s>|<\|(?!begin_of_box|end_of_box)\w{1,20}\|>|<(?:eos|pad|unk|end_of_turn|start_of_turn)>|\[/?INST\]"
)
"""Special tokens that were decoded into the text."""
PROMPT = re.compile(
    r"(?:^|(?<=[.?!:\n] )|(?<=\n))[ \t]{0,3}(?:please )?(?:(?:answer|respond|"
    r"reply)(?: the question)? (?:with|using|in) "
    r"(?:the|a|an|one|only|just|yes|your|exactly)\b[^.:\n]{0,80}|answer yes or no|"
    r"(?:put|write|give) (?:the|your) final answer (?:in|within|inside|as)\b[^.:\n]{0,40})(?:[.:]|\n|$)",
    re.IGNORECASE,
)
"""The instruction of the prompt, repeated."""
UNDECIDED = re.compile(
    r"\b(?:i|we)(?:'m| am| are)?(?: really| honestly| still| simply| just)? "
    r"(?:can(?:no|')t|cannot|can not|could(?: not|n't)|(?:am )?unable to|not able to|won't|do not|don't|prefer not to|"
    r"not sure) (?:\w+ly )?"
    r"(?:decide|tell|determine|choose|commit|settle|resolve|pick|know|give (?:an?|any|one|the)|which|"
    r"find (?:the (?:error|mistake)|out|which)|say which|be sure|verify (?:either|which))\b|"
    r"\b(?:no way (?:for me )?to|impossible to|hard to) (?:settle|decide|tell|choose)\b|\bleave (?:it|this) open\b",
    re.IGNORECASE,
)
"""An output that ends without deciding, whatever it stated before."""
GIVEN_UP = re.compile(
    r"\b(?:i(?:'m| am)? (?:do not|don't|did not|cannot|can't|can not|could not|couldn't|am unable|"
    r"unable|not able|"
    r"honestly (?:do not|don't)|really (?:do not|don't)|simply (?:cannot|can't)|won't|prefer not|"
    r"(?:would|'d) need (?:more|the full))(?: to)?(?: \w+ly)? "
    r"(?:know|determine|tell|say|answer|find (?:an?|the|any) (?:answer|solution)|solve|provide|give|"
    r"make out|decide|choose|commit|settle|pick|guess|verify|see (?:the|an|any|this|your)(?: attached)? "
    r"(?:image|picture|chart|figure|photo)|view|access|identify|read|assist|help|be sure|conclude|"
    r"have enough|recogni[sz]e)|"
    r"(?:can ?not|can't|could not|couldn't|not possible to|impossible to|unable to|hard to|"
    r"difficult to|no way to) "
    r"(?:be )?(?:determined?|told|answered|tell|say|identif(?:y|ied)|know|known|read|conclude|"
    r"inferred?)|(?:hard|difficult|impossible) to (?:make out|see|read)\b|"
    r"(?:not|in)(?: \w+)?[ -]?(?:enough|sufficient) (?:information|data|detail|context)|"
    r"insufficient (?:information|data)|"
    r"no idea|unanswerable|not answerable|leave (?:it|this) open|(?:don't|do not) have access|not available to me|"
    r"no way for me to|not sure|unsure|unclear|undetermined|uncertain|unknown|as an ai|none of (?:the|these|"
    r"those)(?: \w+){0,2} "
    r"(?:options|choices|answers|match|fit|is|are|apply|seem)|no (?:correct|right|valid|definite|"
    r"clear) (?:answer|option|choice)|"
    r"not (?:among|listed|in) (?:the|these|any of the) (?:options|choices|list)|no answer|"
    r"(?:does not|doesn't|do not|don't) (?:provide|show|give|contain|specify|include|say|state|"
    r"indicate|mention)"
    r" (?:this|the|that|any|enough|such)(?: \w+)? (?:information|data|answer|details?|values?)|"
    r"to (?:find|determine|see|get) (?:it|this|that|out),? (?:you )?(?:\w+ )?(?:look|check|refer|consult|search)|"
    r"not (?:specified|given|provided|stated|visible enough|legible|available))\b",
    re.IGNORECASE,
)
"""An output that says it has no answer."""
GOES_ON = re.compile(
    r"\b(?:but(?! (?:you|please|if you)\b)|however|still|nevertheless|yet|if i had to)\b",
    re.IGNORECASE,
)
DANGLING = re.compile(
    r"(?:\b(?:the|(?-i:a|i)(?!\s?\$)|an|to|of|and|or|is|are|was|we|so|in|on|at|by|for|with|from|as|that|this|"
    r"which|then|if|get|need|find|"
    r"have|has|be|than|because|since|its|their|add|multiply|subtract|divide|equals?|let|let's|also|"
    r"but|she|he|they|it|"
    r"where|when|into|between|means|gives|makes|per|each|there|these|those|would|will|should|must|"
    r"can|not)|[-+=*/,(:\u2212\u00d7&^\\]|"
    r"\\times|\\cdot)[\s$]{0,3}$",
    re.IGNORECASE,
)
"""The end of an output that was cut off within a sentence."""
UNEVALUATED = re.compile(r"=[^=,;]{1,30}[,;] [\d.]{1,12}\s?[-+*/\u2212\u00d7\u00f7]\s?[\d.]{1,12}$")
"""The end of a chain of sums that was cut off before the last result."""
ENDED = re.compile(r"[.!?)\]}$*`\"'>\u201d\u3002%]\s*$")
SHORT_END = re.compile(
    r"(?:so|thus|hence|therefore|it's|it is|yes|no|answer|final)\b", re.IGNORECASE
)
PLEASANTRY = re.compile(
    r"\s*(?:i )?(?:hope|let me know|please let|feel free|if you (?:have|need|would)|thank|"
    r"is there anything|have a (?:nice|great)|note(?: that|:)|please note|for comparison|"
    r"for (?:reference|context|example)\b|remember\b|keep in mind|\*?\*?(?:check|verification|verify|proof|explanation|"
    r"reasoning|note)\*?\*?:|\(?(?:the question might|optional)|by the way|incidentally|fun fact|"
    r"in comparison|this (?:result|answer|matches|agrees|checks|confirms|makes sense)|\(?if (?!and|so)[^,\n]{3,80},|"
    r"(?:we|you) can (?:check|verify)|to (?:check|verify|double-check)|let(?:'s| me| us) (?:check|verify|double)|"
    r"as a check|in case you|just ask|i'?m (?:happy|glad)|i'?d be (?:happy|glad)|i'?ll be (?:happy|glad)|"
    r"happy to|this is (?:the|my) final answer\W*$|do you (?:want|need)|would you like|good luck|"
    r"hooray|great job|done\W*$|(?:this|that|these|it|they)(?:'s| is| are| was| were) (?:because\b|"
    r"(?:often|usually|commonly) (?:found|used|seen)\b|an? (?:very |fairly |quite )?(?:common|typical|standard|usual|"
    r"popular|well-known|famous) ))",
    re.IGNORECASE,
)
"""A closing sentence, without content."""
REMARK = re.compile(
    r"\b(?:rule|theorem|law|identity|formula|property|definition|test)\b[^.]{0,40}\b(?:says?|states?|tells us)\b"
    r"(?!.*\b(?:so|thus|therefore|hence)\b)",
    re.IGNORECASE,
)
"""A sentence about a rule or a notion, which answers nothing."""
CODE = re.compile(r"^[ \t]{0,40}(?:import|from|def|for|while|print|return)\b", re.MULTILINE)
CHECK = re.compile(
    r"(?:\n|(?<=[.!?] ))[\s*_#(]{0,4}(?:check(?:ing)?|verification|verify(?:ing)?|proof|explanation|note|remark)"
    r"[*_]{0,2}:",
    re.IGNORECASE,
)
"""Where a check or note begins, which concludes nothing."""
BEGINS_SO = re.compile(r"\W*(?:so|thus|therefore|hence|in (?:total|conclusion|summary))\b", re.I)
CLAUSES = re.compile(
    r"; |,? (?:but|while|whereas|although|though|even though|followed by|compared (?:to|with)|up from|down from|"
    r"unlike|as opposed to|rather than|instead of)\b|,? (?=not (?!only))|, (?=(?:and|or) )|, (?=which is|with )|"
    r" and (?=\w+(?:ed|s) (?:by|in|at|to)\b)| \((?=not\b|which\b|without\b|second\b|while\b)|"
    r" and (?=(?:her|his|its|their|the|she|he|it|they) (?:\w+ )?(?:is|was|has|had)\b)"
)
"""Where a clause of a sentence ends."""
DENIAL = re.compile(r"\W*(?:it(?:'s| is) |and )?not\b|it isn't", re.IGNORECASE)
COMMON = re.compile(
    "the|was|and|are|for|its|his|her|did|has|had|but|not|can|how|who|what|which|where|when|that|this|they|there|their|"
    "from|with|does|have|many|much|shown|image|picture|chart|she|him|will|now"
)
"""Words that do not tell what is asked."""
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][*\"')\u201d$\]])|(?<=[.!?]\*\*))\s+|\n+")
ABBREVIATED = re.compile(
    r"\b(?:vs|approx|e\.g|i\.e|no|fig|eq|dr|mr|mrs|st|cf|etc)\.$|"
    r"(?-i:\b[A-Z]\. ?|\b(?:Dr|Mr|Mrs|Ms|Prof)\.? )(?-i:[A-Z])\.$",
    re.IGNORECASE,
)


# ------------------------------------------------------------------------------------------- finding


def statements(text: str) -> list[Statement]:
    """The statements of the answer, in order; a box within a tag or sentence comes after it."""
    found = [Statement(start, "tag", said) for start, said in tags(text)]
    found += [Statement(start, "box", said) for start, said in boxes(text)]
    labels = list(LABEL.finditer(text))
    for match in labels:
        kind = "heading" if PLAIN_LABEL.fullmatch(match["words"]) else "label"
        if kind == "label" or match["sign"] or "#" in match[0] or "**" in match[0]:
            found.append(Statement(match.start(), kind, _rest(text, match.end())))
    begins = [match.start() for match in labels]
    for match in SENTENCE.finditer(text):
        k = bisect_right(begins, match.start()) - 1
        if k >= 0 and labels[k].end() > match.start():
            continue
        if SUPPOSED.search(text[max(0, match.start() - 40) : match.start()]):
            continue
        said = INSTEAD.sub("", _rest(text, match.end()), count=1)
        if not UNSTATED.match(said):
            found.append(Statement(match.start(), "sentence", said))
    found += [Statement(m.start(), "label", _rest(text, m.end())) for m in HASHES.finditer(text)]
    found += [Statement(m.start(), "sentence", _rest(text, m.end())) for m in CJK.finditer(text)]
    return sorted(found)


def _rest(text: str, start: int) -> str:
    return text[start : start + LONGEST].lstrip(DRESSING + ":#>\u2026")


def tags(text: str) -> list[tuple[int, str]]:
    """(start, content) of `<answer>...</answer>` and its like, open ones to the end; and of `{"answer": ...}`."""
    found = []
    for match in TAG.finditer(text):
        name = match[1] or match[2]
        closing = f"</{name}>" if match[1] else f"[/{name}]"
        inside = text[match.end() : match.end() + LONGEST]
        end = inside.lower().find(closing.lower())
        found.append((match.start(), inside[: end if end >= 0 else None].strip()))
    found += [(m.start(), next(filter(None, m.groups()))) for m in JSON.finditer(text)]
    return sorted(found)


def boxes(text: str) -> list[tuple[int, str]]:
    r"""(start, content) of `\boxed{...}`, `\fbox{...}`, `\boxed 5` and GLM's box tokens, neighbours joined by commas.

    A box that is never closed was cut off and is left out.
    """
    found: list[tuple[int, int, str]] = []
    closing = _closing_braces(text) if BOX.search(text) else {}
    for match in BOX.finditer(text):
        if match[0].endswith("{"):
            end = closing.get(match.end() - 1)
            if end is not None and not BLANK.match(text, match.start(), end + 1):
                found.append((match.start(), end + 1, text[match.end() : end].strip()))
        elif bare := UNBRACED.match(text, match.end()):
            found.append((match.start(), bare.end(), bare[0]))
    start = text.find(GLM_BOX[0])
    while start >= 0:
        begin = start + len(GLM_BOX[0])
        end = text.find(GLM_BOX[1], begin, begin + LONGEST)
        if end >= 0:
            found.append((start, end + len(GLM_BOX[1]), text[begin:end].strip()))
        start = text.find(GLM_BOX[0], begin)
    joined: list[tuple[int, int, str]] = []
    for start, end, said in sorted(found):
        if joined and start < joined[-1][1]:  # a box in a box
            joined[-1] = (start, end, said)
        elif joined and BETWEEN_BOXES.fullmatch(text, joined[-1][1], start):
            first, _, more = joined.pop()
            joined.append((first, end, more if more == said else f"{more}, {said}"))
        else:
            joined.append((start, end, said))
    return [(start, said) for start, _, said in joined]


def _closing_braces(text: str) -> dict[int, int]:
    """The place of the closing brace of each opening one that is closed."""
    stack, pairs = [], {}
    for match in re.finditer(r"\\[{}]|[{}]", text):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            pairs[stack.pop()] = match.start()
    return pairs


# ------------------------------------------------------------------------------------------- deciding


def decide(
    text: str,
    stated: Callable[[Statement], str | None],
    concluded: Callable[[str], str | None],
    also: Callable[[str], list[tuple[int, str]]] = lambda text: [],
    exclusive: bool = False,
) -> str | None:
    """The answer of an output: that of its last readable statement, else what it concludes.

    `stated` reads a statement (None: not readable, the one before counts), `also` finds (place, answer) of further
    ones, and `concluded` reads a text without any; each may raise NoAnswer. A tag comes before all else. A correction
    after the last statement counts if it concludes something. A question that the model asks itself after answering
    ends the text. `exclusive`: an answer is spelled in one way, so that two different ones side by side are none.
    """
    whole = TOKENS.sub("", text)
    text = unlooped(whole)
    looped = len(text) < len(whole)
    turn = NEW_TURN.search(text)
    if (
        turn
        and (found := decide(text[: turn.start()], stated, concluded, also, exclusive)) is not None
    ):
        return found
    echoed = [match for match in PROMPT.finditer(text) if not text[match.end() :].strip()]
    text = PROMPT.sub(" ", text)
    if undecided(text) or (BLANK.search(text) and not boxes(text)):
        return None
    try:
        all_found = statements(text)
        for statement in reversed([each for each in all_found if each.kind == "tag"][-MOST:]):
            if (answer := stated(statement)) is not None:
                return answer
        marks: list[tuple[int, Statement | str]] = [(each.start, each) for each in all_found]
        marks += also(text)
        last: tuple[int, str] | None = None
        kind = ""
        for start, mark in sorted(marks, key=lambda each: each[0], reverse=True)[:MOST]:
            answer = mark if isinstance(mark, str) else stated(mark)
            if answer is None:
                continue
            if last is None:
                last, kind = (start, answer), "" if isinstance(mark, str) else mark.kind
                continue
            if looped and different(answer, last[1]):
                raise NoAnswer
            between = text[start : last[0]]
            if exclusive or between.startswith(text[last[0] : last[0] + SAME]):
                repeated = _alike(between, text[last[0] : last[0] + ADJACENT])
                near = len(between) <= ADJACENT and not TURNS.search(between[repeated:])
                if (
                    near
                    and different(answer, last[1])
                    and not (isinstance(mark, str) and kind == "label")
                ):
                    raise NoAnswer
            break
        if last is not None:
            return _corrected(text, last[0], concluded) or last[1]
        return None if echoed else concluded(ANY_TAG.sub("", text))
    except NoAnswer:
        return None


def _alike(text: str, other: str) -> int:
    """The number of characters that two texts begin with alike."""
    pairs = zip(text, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def different(answer: str, other: str) -> bool:
    """Whether two answers differ, and are no spellings of one number."""
    values = [re.sub(r"[^\w.-]", "", each).lower().strip(".") for each in (answer, other)]
    return values[0] != values[1] and not ("frac" in "".join(values) or "/" in answer + other)


def unlooped(text: str) -> str:
    """A text that repeats up to 40 words from its start to its end, as those words alone."""
    places = list(re.finditer(r"\S+", text))
    words = [match[0] for match in places]
    for n in range(1, 41):
        if len(words) < max(3, 2 * n):
            break
        if all(words[k] == words[k - n] for k in range(n, len(words) - 1)) and words[
            (len(words) - 1) % n
        ].startswith(words[-1]):
            return text[: places[n - 1].end()]
    return text


def undecided(text: str) -> bool:
    """Whether one of the last two sentences says that the output cannot decide."""
    found = UNDECIDED.search(" ".join(sentences(text[-600:])[-2:]))
    return found is not None and not re.search(
        r"\b(?:but|so|still)\b", found.string[found.end() :], re.I
    )


def _corrected(text: str, start: int, concluded: Callable[[str], str | None]) -> str | None:
    """What a correction after the statement at `start` concludes."""
    cues = [match.start() for match in CORRECTION.finditer(text, start)]
    if not cues:
        return None
    try:
        return concluded(text[cues[-1] :])
    except NoAnswer:
        return None


# ------------------------------------------------------------------------------------------- sentences


def sentences(text: str) -> list[str]:
    """Sentences and lines, stripped, without empty ones; a decimal point or an abbreviation ends none."""
    found: list[str] = []
    for part in SENTENCE_END.split(text):
        if found and ABBREVIATED.search(found[-1]):
            found[-1] += " " + part
        elif part.strip():
            found.append(part.strip())
    return found


def conclusion(text: str, question: str = "") -> str | None:
    """The last sentence with content; None where the output gives up or is cut off there, as in a box.

    Checks, notes, comparisons and courtesies that follow it do not count, nor, with the question, a long last sentence
    that has no word of it where one before has.
    """
    tail = without_code(text)[-LONGEST:]
    said = [each for each in sentences(tail) if re.search(r"\w", each)]
    if not said or gives_up(" ".join(said[-2:])):
        return None
    if (check := CHECK.search(tail)) and not BEGINS_SO.match(said[-1]):
        said = [each for each in sentences(tail[: check.start()]) if re.search(r"\w", each)] or said
    while said and (
        REMARK.search(said[-1]) or PLEASANTRY.match(said[-1]) or said[-1].endswith("?")
    ):
        said.pop()
    if not said or BOX.search(said[-1]):
        return None
    if said[-1].endswith((":", " *", "=", ",")) or _unfinished(tail, said):
        return None
    end = said[-1].rstrip(DRESSING)
    dangles = len(tail.split()) > 2 and (DANGLING.search(end) or UNEVALUATED.search(end))
    if dangles:
        return None
    asked = stems(asking(question))
    plain = (
        "=" not in said[-1]
        and not BEGINS_SO.match(said[-1])
        and "**" not in said[-1]
        and len(said[-1].split()) > 5
    )
    if asked and plain and len(said) > 1 and not stems(said[-1]) & asked:
        return next(
            (each for each in reversed(said) if stems(each) & asked and not REMARK.search(each)),
            None,
        )
    return said[-1]


def _unfinished(text: str, said: list[str]) -> bool:
    """Whether the last of several sentences lacks the full stop that the one before has, and is no short line."""
    if (
        len(said) < 2
        or ENDED.search(said[-1])
        or not re.search(r"[^.][.!?][*\"')]{0,3}$", said[-2])
    ):
        return False
    words = len(said[-1].split())
    if re.match(r"\W*[A-Za-z ]{1,30}=.*=\s?\$?\d[\d.,]*\W*$", said[-1]):  # Total = 2 + 3 = 5
        return False
    own_line = text.rstrip().rpartition("\n")[2].strip() == said[-1]
    return not (
        (own_line and words <= 8)
        or (words <= 4 and SHORT_END.match(said[-1]))
        or (words <= 10 and BEGINS_SO.match(said[-1]) and ":" in said[-1])
    )


def without_code(text: str) -> str:
    """The text without blocks of a program."""
    parts = text.split("```")
    if len(parts) == 1:
        return text
    return "".join(each for k, each in enumerate(parts) if k % 2 == 0 or not CODE.search(each))


def alternatives(question: str) -> list[str]:
    """The words that a question offers: `A` and `B` of `Which angle is larger, A or B?`."""
    found = re.search(
        r"(?:^|, )(?:is|are|was|were|do|does|did|which|who)\b(?: .*?)? "
        r"([\w-]{1,30}),? or (?:the |an? |is it )?([\w-]{1,30})\W{0,3}$",
        asking(question)[-300:],
        re.IGNORECASE,
    )
    return list(found.groups()) if found else []


def stems(text: str) -> set[str]:
    """The words of a text by their first five letters, and its numbers, without the commonest words."""
    words = re.findall(r"[a-z]{3,}|\d+", text.lower())
    return {
        re.sub(r"(?:ed|es|s|ing)$", "", word)[:5] for word in words if not COMMON.fullmatch(word)
    }


def asking(question: str) -> str:
    """The last sentence of a question that asks, without the story before it."""
    parts = re.split(r"(?<=[.!?])\s", question.strip())
    return next((part for part in reversed(parts) if part.endswith("?")), parts[-1])


def clause_of(said: str, question: str) -> str:
    """The clause of a sentence that speaks most of what the question asks, the first of several; no pure denial."""
    question = asking(question)
    asked = stems(question)
    focus = re.search(
        r"\b(?:what|which)(?: is| was|'s)?(?: the)? (\w{4,})", question, re.IGNORECASE
    )
    clauses = [each for each in CLAUSES.split(said) if len(each.split()) > 1 or each == said]
    affirmed = [each for each in clauses if not DENIAL.match(each)]

    def spoken(clause: str) -> int:
        found = stems(clause)
        return len(found & asked) + 2 * bool(focus and (stems(focus[1]) & found))

    return max(affirmed or clauses or [said], key=spoken)


def gives_up(text: str) -> bool:
    """Whether a text says that it has no answer, and does not go on to one with `but`."""
    match = GIVEN_UP.search(text)
    return match is not None and not GOES_ON.search(text, match.end())
