"""Splits the completions of reasoning models into reasoning and answer.

Families delimit reasoning with special tokens, with plain text of several tokens, or with channels, and some chat
templates contain the opening delimiter, so that a completion has only the closing one. All consumers of answers
(rewards, evaluation, captions) use `split`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


@dataclass(frozen=True)
class Mark:
    """A family's reasoning delimiters: opening and closing strings; the first of each is the usual one."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    end: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    header: str = ""
    """The end of a header that opening and closing begin (`<|channel|>analysis<|message|>`)."""

    def __str__(self) -> str:
        return f"{self.opening[0]} ... {self.closing[0]}"

    @property
    def strings(self) -> tuple[str, ...]:
        return (*self.opening, *self.closing, *self.end, self.header)


class Reading(NamedTuple):
    """A completion split into reasoning and answer."""

    thought: str | None
    """The reasoning before the answer, delimiters included; None without any."""
    answer: str
    """The whole completion without reasoning; empty where the reasoning never closes."""
    closed: bool = True
    """False where the completion was cut off within the reasoning and has no answer."""
    mark: Mark | None = None
    """The delimiter of the last reasoning block."""


def pair(opening: str, closing: str) -> Mark:
    return Mark((opening,), (closing,))


HARMONY = Mark(
    ("<|channel|>analysis", "<|channel|>commentary"),
    ("<|channel|>final",),
    ("<|end|>", "<|return|>", "<|call|>", "<|start|>"),
    "<|message|>",
)
"""gpt-oss: one message per channel, of which only `final` is for the user."""

MARKS = (
    pair("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, GLM-4.5, SmolLM3, Phi-4-reasoning, ...
    pair("<thinking>", "</thinking>"),
    pair("<thought>", "</thought>"),  # EXAONE Deep
    pair("<thoughts>", "</thoughts>"),
    pair("<reasoning>", "</reasoning>"),
    pair("<analysis>", "</analysis>"),
    pair("<reflection>", "</reflection>"),
    pair("<scratchpad>", "</scratchpad>"),
    pair("<mm:think>", "</mm:think>"),
    pair("[THINK]", "[/THINK]"),  # Magistral
    pair("◁think▷", "◁/think▷"),  # Kimi-VL
    pair("<seed:think>", "</seed:think>"),  # Seed-OSS
    pair("<|channel>thought", "<channel|>"),  # Gemma 4
    pair("<unused94>thought", "<unused95>"),  # MedGemma
    pair("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Mark(  # Sky-T1
        ("<|begin_of_thought|>",),
        ("<|end_of_thought|>", "<|begin_of_solution|>"),
        ("<|end_of_solution|>",),
    ),
    Mark(  # Command A Reasoning
        ("<|START_THINKING|>",), ("<|END_THINKING|>", "<|START_RESPONSE|>"), ("<|END_RESPONSE|>",)
    ),
    HARMONY,
)
"""Recognised in every model's completions: fine-tuned models use them without tokens or template support."""

PROSE = (
    Mark(  # Granite 3.2
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
)
"""Ordinary words, recognised only for models whose template asks for them."""

TAG = re.compile(r"</?[a-z_:]+>", re.IGNORECASE)
"""Delimiters matched regardless of case: `<Think>`, `<THINK>`."""
NAMED = re.compile(r"think|thought|reason", re.IGNORECASE)
BRACKETED = re.compile(r"<[^<>\s'\"]{1,40}>|\[[^\[\]\s'\"]{1,40}\]|◁[^◁▷\s]{1,40}▷")
QUOTED = re.compile(r"[\s(>:]?[`'\"“][`'\"”]")
"""The characters around a quoted delimiter: up to two before it and one after."""
LONGEST = 200
"""Maximum characters of a delimiter with its header, or with white space around it."""
CLOSERS = (("begin", "end"), ("start", "end"), ("open", "close"), ("prefix", "suffix"))


def marks_of(added_tokens: Iterable[str], template: str) -> tuple[Mark, ...]:
    """The delimiters among a model's added tokens or in its chat template; unknown ones are paired by name.

    >>> marks_of(["<ponder_think>", "</ponder_think>"], "")
    (Mark(("<ponder_think>",), ("</ponder_think>",)),)
    """
    words = {
        word
        for word in (*added_tokens, *BRACKETED.findall(template))
        if len(word) > 2 and not word.startswith("<unused")  # every Gemma has those
    }
    every = (*MARKS, *PROSE)
    known = [
        mark
        for mark in every
        for string in (mark.opening[0], mark.closing[0])
        if string in template or any(string.startswith(_fold_case(word)) for word in words)
    ]
    of_known = {string for mark in every for string in mark.strings}
    unknown = {word for word in words if not {word, _fold_case(word)} & of_known}
    own = [
        pair(word, closing)
        for word in sorted(unknown)
        if NAMED.search(word)
        for closing in _closings_of(word)
        if closing in unknown
    ]
    return tuple(dict.fromkeys([*known, *own]))


def _fold_case(string: str) -> str:
    """Lower-cases a tag; returns any other string unchanged."""
    return string.lower() if TAG.fullmatch(string) else string


def _closings_of(opening: str) -> list[str]:
    """Candidate closing strings by name: `</x>`, `<|/x|>`, `<|end_x|>`, and `end` for `begin` or `start`."""
    found = [opening[:1] + "/" + opening[1:], opening[:2] + "/" + opening[2:]]
    for first, last in CLOSERS:
        for case in (str, str.upper, str.capitalize):
            if case(first) in opening:
                found.append(opening.replace(case(first), case(last)))
    if named := re.fullmatch(r"(\W+)(\w(?:.*\w)?)(\W+)", opening):
        before, name, after = named.groups()
        ends = (f"end_{name}", f"end_of_{name}", f"{name}_end")
        found += [f"{before}{e.upper() if name.isupper() else e}{after}" for e in ends]
    return found


@cache
def _compile_marks(marks: tuple[Mark, ...]) -> tuple[re.Pattern[str], dict[str, tuple[Mark, bool]]]:
    """(pattern of all delimiters, {string, tags in lower case: (its mark, whether it opens)})."""
    of = {_fold_case(string): (mark, False) for mark in marks for string in mark.closing}
    of |= {_fold_case(string): (mark, True) for mark in marks for string in mark.opening}
    longest_first = sorted(of, key=len, reverse=True)
    # some tokenizers decode a space after a special token
    spaced = [
        f"(?i:{string})"
        if TAG.fullmatch(string)
        else re.sub(r">(?=\w)", r">\\s*", re.escape(string))
        for string in longest_first
    ]
    return re.compile("|".join(spaced)), of


def split(text: str, opened: Mark | None = None, marks: Sequence[Mark] = MARKS) -> Reading:
    """Splits a completion into reasoning and answer; `opened` is the delimiter that its prompt left open.

    The answer follows the last reasoning block. A nested block needs a closing delimiter of its own, except
    right after the first opening (a template's `<think>`, repeated by the model). A closing delimiter without an
    opening one ends reasoning that began with the completion. Mentions do not count: a delimiter in quotes or
    backticks or, within reasoning, an opening one in the middle of a line, followed by a space or punctuation.
    """
    pattern, of = _compile_marks(tuple(marks))
    inside, depth = opened, int(opened is not None)
    answer, last = 0, opened  # start of the answer, and the mark before it
    previous, was_opening = 0, opened is not None  # end and kind of the last mark
    for match in pattern.finditer(text):
        mark, opens = of[_fold_case(re.sub(r">\s+", ">", match[0]))]
        if inside is not None and mark != inside:
            continue
        # when ambiguous, an opening mark opens: a number within reasoning must not be scored
        if _is_mention(text, match.start(), match.end(), previous, opens and inside is not None):
            continue
        end = match.end()
        if mark.header:
            found = text.find(mark.header, end, end + LONGEST)
            if found < 0 and len(text) > end + LONGEST:
                continue
            end = len(text) if found < 0 else found + len(mark.header)
        if not opens:
            # channels do not nest
            depth = 0 if mark.header else max(0, depth - 1)
            inside = mark if depth else None
            answer = end
        elif inside is None:
            inside, depth = mark, 1
        elif not (was_opening and not text[previous : match.start()].strip()):
            depth += 1
        last, previous, was_opening = mark, end, opens
    if last is None:
        return Reading(None, text)
    if inside is not None:
        return Reading(text.strip(), "", False, inside)
    rest = text[answer:]
    for end_of_answer in last.end:
        if end_of_answer in rest:
            rest = rest.split(end_of_answer)[0].rstrip()
    return Reading(text[:answer].strip(), rest.lstrip(), True, last)


def _is_mention(text: str, start: int, end: int, previous: int, nested: bool) -> bool:
    """Whether text[start:end] mentions a delimiter rather than uses it.

    previous: end of the delimiter before it. nested: an opening delimiter within reasoning.
    """
    if QUOTED.fullmatch(text[max(0, start - 2) : start] + text[end : end + 1]):
        return True
    if not nested or not re.match(r"[ \t.,;:!?)\]'\"`]", text[end : end + 1]):
        return False
    line = max(previous, text.rfind("\n", previous, start) + 1)
    return bool(text[line:start].strip())


def opened_by(prompt: str, generation_prompt: str, marks: Sequence[Mark]) -> Mark | None:
    """The delimiter of the reasoning block that a prompt leaves open, or None.

    prompt: its last characters suffice. generation_prompt: added by the chat template before an answer; it may contain
    the first words of the reasoning after the delimiter.
    """
    tail = "".join(prompt[-len(generation_prompt) - LONGEST :].split())
    for mark in marks:
        heads = ["".join(f"{each}{mark.header}".split()) for each in mark.opening]
        if any(_fold_case(tail[-len(head) :]) == _fold_case(head) for head in heads):
            return mark
    own = split(generation_prompt, None, marks)
    begun = not own.closed and tail.endswith("".join(generation_prompt.split()))
    return own.mark if begun else None


def kept_tokens(special: Iterable[str], marks: Sequence[Mark]) -> set[str]:
    """The special tokens that decoding must keep for delimiters to be found."""
    tokens = set(special)
    spoken = [
        mark
        for mark in marks
        if any(_is_part(t, string) for t in tokens for string in (*mark.opening, *mark.closing))
    ]
    return {t for t in tokens for mark in spoken if any(_is_part(t, s) for s in mark.strings)}


def _is_part(token: str, string: str) -> bool:
    return token in string or _fold_case(token) == _fold_case(string)
