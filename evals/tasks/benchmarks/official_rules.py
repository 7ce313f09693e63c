"""Scoring rules of ChartQA, MMMU and POPE as published, with their quirks; `careful` scores stand beside them.

Sources of the rules: ChartQA, arXiv 2203.10244, section 5.1, in the form that public harnesses share; MMMU,
github.com/MMMU-Benchmark/MMMU, eval_utils; POPE, github.com/RUCAIBox/POPE, evaluate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase


def relaxed_accuracy(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """ChartQA: numbers within 5 % of a target other than 0, else equal strings in lower case.

    A trailing % divides by 100. Thousands separators and units make a string (`1,000`).
    """
    a, b = _float(prediction), _float(target)
    if a is not None and b:
        return abs(a - b) / abs(b) <= tolerance
    return prediction.lower() == target.lower()


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mmmu_choice(response: str, choices: Sequence[str]) -> str | None:
    """MMMU's letter: the last `(B)`, else the last `B` before a space, else `B.`, else the last option's text.

    None in place of the authors' random letter. Letters within words count too (`DNA is` has A).
    """
    for sign in ",.!?;:'":
        response = response.strip(sign)
    response = f" {response} "
    letters = ascii_uppercase[: len(choices)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if form.format(letter) in response]:
            # of one candidate the place does not matter; the first of several that have none, as numpy's argmax
            return max(found, key=lambda letter: response.rfind(place.format(letter)))
    if len(response.split()) <= 5:
        return None
    spoken = response.lower()
    named = {
        letter: spoken.rfind(choice.lower())
        for letter, choice in zip(letters, choices, strict=True)
        if choice.lower() in spoken
    }
    return max(named, key=lambda letter: named[letter]) if named else None


KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Before the part of a sentence that MMMU takes for the answer."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open(response: str, accepted: Sequence[str]) -> bool:
    """MMMU's open questions: an accepted number among the numbers of the key parts, or an accepted phrase within one.

    Numbers are rounded to two decimals. A phrase of one letter needs a space beside it, so `A` accepts the article.
    """
    norms = [norm for answer in accepted for norm in _normal(answer)]
    keys = _key_parts(response)
    numbers = [number for key in keys for form in NUMBERS for number in re.findall(form, key)]
    for part in (norm for said in (*keys, *numbers) for norm in _normal(said)):
        if isinstance(part, float):
            if part in norms:
                return True
        elif any(isinstance(norm, str) and norm in part for norm in norms):
            return True
    return False


def _key_parts(response: str) -> list[str]:
    """The shortest tail after a key word in each sentence; of the last one also after `=`; else the whole response.

    The response is in lower case before it is split at full stops before capitals, so only lines are split.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    found = []
    for k, line in enumerate(lines):
        keys = (*KEYS, "=") if k == len(lines) - 1 else KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [response]


def _normal(text: str) -> list[str | float]:
    """A number to two decimals, or lower case; a single letter with a space before or behind it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def pope(response: str) -> str | None:
    """POPE: `no` where the first sentence has the word No, no or not, else `yes`; None for an empty response."""
    if not response.strip():
        return None
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"
