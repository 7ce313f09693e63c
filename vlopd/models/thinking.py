"""Where a reasoning model's thought ends and its answer begins.

Families mark thoughts with special tokens, with plain text of several tokens, or with channels, and some chat
templates open the mark themselves, so that a completion has only its end. Every reader of answers (rewards,
evaluation, captions) goes through `split`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


@dataclass(frozen=True)
class Mark:
    """The strings with which a family opens and closes a thought; the first of each is the usual one."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    end: tuple[str, ...] = ()
    """What may follow the answer and is not part of it."""
    header: str = ""
    """What opening and closing go on to where they are headers (`<|channel|>analysis<|message|>`)."""

    def __str__(self) -> str:
        return f"{self.opening[0]} ... {self.closing[0]}"

    @property
    def strings(self) -> tuple[str, ...]:
        return (*self.opening, *self.closing, *self.end, self.header)


class Reading(NamedTuple):
    """A completion's two parts."""

    thought: str | None
    """What precedes the answer, marks included; None where the model did not think aloud."""
    answer: str
    """The completion itself where there is no thought; empty where the thought never closes."""
    closed: bool = True
    """False where the completion ends inside a thought: it was cut off, and has no answer."""
    mark: Mark | None = None
    """The last thought's."""


def pair(opening: str, closing: str) -> Mark:
    return Mark((opening,), (closing,))


HARMONY = Mark(
    ("<|channel|>analysis", "<|channel|>commentary"),
    ("<|channel|>final",),
    ("<|end|>", "<|return|>", "<|call|>", "<|start|>"),
    "<|message|>",
)
"""gpt-oss: a message a channel, of which only `final` is for the user."""

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
"""Read in every model's text: fine-tuning teaches them to models whose tokenizer and template have none."""

PROSE = (
    Mark(  # Granite 3.2
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
)
"""Ordinary words, read only in the text of models whose template asks for them."""

TAG = re.compile(r"</?[a-z_:]+>", re.IGNORECASE)
"""Marks that are read in any case: `<Think>`, `<THINK>`."""
NAMED = re.compile(r"think|thought|reason", re.IGNORECASE)
BRACKETED = re.compile(r"<[^<>\s'\"]{1,40}>|\[[^\[\]\s'\"]{1,40}\]|◁[^◁▷\s]{1,40}▷")
QUOTED = re.compile(r"[\s(>:]?[`'\"“][`'\"”]")
"""What is around a quoted mark: up to two characters before it and one after."""
LONGEST = 200
"""Characters of a mark with its header, or with white space around it."""
CLOSERS = (("begin", "end"), ("start", "end"), ("open", "close"), ("prefix", "suffix"))


def marks_of(added_tokens: Iterable[str], template: str) -> tuple[Mark, ...]:
    """The marks that a model's added tokens or chat template have; unknown ones are paired by their names.

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
    """A tag in lower case, any other string as it is."""
    return string.lower() if TAG.fullmatch(string) else string


def _closings_of(opening: str) -> list[str]:
    """What may close a mark, going by its name: `</x>`, `<|/x|>`, `<|end_x|>`, and `end` for `begin` or `start`."""
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
    """(a pattern of all marks, {string, tags in lower case: (its mark, whether it opens)})."""
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
    """A completion's thought and answer; `opened` is the mark that its prompt opened.

    The answer is what follows the last thought. A thought that opens within another needs an end of its own, except
    right after the first (a template's `<think>`, repeated by the model). A closing mark without an opening one ends a
    thought that began with the completion. What only mentions a mark is no mark: in quotes or backticks or, within a
    thought, an opening one in the middle of a line with a space or punctuation after it.
    """
    pattern, of = _compile_marks(tuple(marks))
    inside, depth = opened, int(opened is not None)
    answer, last = 0, opened  # where the answer begins, and the mark that it follows
    previous, was_opening = 0, opened is not None  # of the last mark: where it ends, what it did
    for match in pattern.finditer(text):
        mark, opens = of[_fold_case(re.sub(r">\s+", ">", match[0]))]
        if inside is not None and mark != inside:
            continue
        # in doubt an opening mark opens: a number in a thought must not be graded
        if _is_mention(text, match.start(), match.end(), previous, opens and inside is not None):
            continue
        end = match.end()
        if mark.header:
            found = text.find(mark.header, end, end + LONGEST)
            if found < 0 and len(text) > end + LONGEST:
                continue
            end = len(text) if found < 0 else found + len(mark.header)
        if not opens:
            # each message of a channel is whole: those do not nest
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
    said = text[answer:]
    for end_of_answer in last.end:
        if end_of_answer in said:
            said = said.split(end_of_answer)[0].rstrip()
    return Reading(text[:answer].strip(), said.lstrip(), True, last)


def _is_mention(text: str, start: int, end: int, previous: int, nested: bool) -> bool:
    """Whether text[start:end] is spoken of rather than used; `previous` is where the mark before it ends.

    nested: it is an opening mark within a thought.
    """
    if QUOTED.fullmatch(text[max(0, start - 2) : start] + text[end : end + 1]):
        return True
    if not nested or not re.match(r"[ \t.,;:!?)\]'\"`]", text[end : end + 1]):
        return False
    line = max(previous, text.rfind("\n", previous, start) + 1)
    return bool(text[line:start].strip())


def opened_by(prompt: str, generation_prompt: str, marks: Sequence[Mark]) -> Mark | None:
    """The mark of the thought that a prompt leaves open, None where it leaves none open.

    prompt: its end is enough. generation_prompt: what the chat template puts before an answer; it may put a thought's
    first words after the mark, too.
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
    """Those special tokens that decoding must keep for marks to be found."""
    tokens = set(special)
    spoken = [
        mark
        for mark in marks
        if any(_is_part(t, string) for t in tokens for string in (*mark.opening, *mark.closing))
    ]
    return {t for t in tokens for mark in spoken if any(_is_part(t, s) for s in mark.strings)}


def _is_part(token: str, string: str) -> bool:
    return token in string or _fold_case(token) == _fold_case(string)
