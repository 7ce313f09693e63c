"""Verifiable rewards: whether a completion is right, and group-relative advantages (GRPO).

A rule is a pure function of the example and the completion's text, 1.0 for right and 0.0 for wrong; a plug-in
returns any finite number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

import torch
from torch import Tensor

from vlopd.config.objective import RewardConfig
from vlopd.data.answers import after_last_colon, mentions_any, normalise
from vlopd.errors import DataError
from vlopd.grading.equality import number as number_of
from vlopd.grading.equality import same_math, same_number, unreadable
from vlopd.grading.extraction import (
    choice_letter,
    math_answer,
    number_answer,
    yes_or_no,
)
from vlopd.grading.words import plain_words, text_of
from vlopd.plugins import Plugin
from vlopd.plugins import number as number_from
from vlopd.types import Example

Rule = Callable[[Example, str], float]


def exact_match(example: Example, text: str) -> float:
    """The completion equals the answer, apart from surrounding white space."""
    return float(text.strip() == answer_of(example).strip())


def verdict_match(example: Example, text: str) -> float:
    """The text after the last colon equals that of the answer."""
    return float(after_last_colon(text) == after_last_colon(answer_of(example)))


def answer_named(example: Example, text: str) -> float:
    """The answer occurs in the completion as whole words; case, accents and punctuation are ignored."""
    wanted = normalise(answer_of(example))
    if not wanted:
        raise DataError(
            f"example {example.id!r}: its answer {example.answer!r} has no word or number to match; "
            'use reward.rule = "exact_match"'
        )
    return float(mentions_any(text, [wanted]))


def capital_named(example: Example, text: str) -> float:
    """The capital, under any of its names, occurs in the completion (data.type = "capitals")."""
    if "capital" not in example.fields:
        raise DataError(
            f"example {example.id!r} has no field 'capital'; this rule is for data.type = \"capitals\""
        )
    if example.fields["kind"] != "capital":
        return answer_named(example, text)
    names = (example.fields["capital"], *example.fields.get("aliases", ()))
    return float(mentions_any(text, names))


def mathematics(example: Example, text: str) -> float:
    """The completion's answer is mathematically equal to the reference, as in the mathematics benchmarks."""
    gold = answer_of(example)
    if why := unreadable(gold):
        raise _bad_answer(example, "mathematics", why)
    found = math_answer(text, example.question)
    return float(found is not None and same_math(found, gold))


def number(example: Example, text: str) -> float:
    """The completion's answer is the number of the reference, which may follow GSM8K's ####."""
    gold = answer_of(example).rpartition("####")[2]
    if number_of(gold) is None:
        raise _bad_answer(example, "number", "it is not a number")
    found = number_answer(text, example.question)
    return float(found is not None and same_number(found, gold))


def choice(example: Example, text: str) -> float:
    """The completion chooses the reference's letter, or its text among the choices."""
    choices = _choices_of(example)
    gold = text_of(answer_of(example)).strip()
    letters = ascii_uppercase[: len(choices)]
    if found := re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", gold):
        wanted = found[1].upper()
    else:
        words = [plain_words(choice) for choice in choices]
        place = words.index(plain_words(gold)) if plain_words(gold) in words else -1
        wanted = letters[place] if place >= 0 else ""
    if not wanted or wanted not in letters:
        raise _bad_answer(
            example, "choice", f"it is no letter of {letters[0]} to {letters[-1]} and no choice"
        )
    return float(choice_letter(text, choices) == wanted)


def yes_no(example: Example, text: str) -> float:
    """The completion says yes where the reference does, and no where it does."""
    gold = plain_words(answer_of(example))
    if gold not in ("yes", "no"):
        raise _bad_answer(example, "yes_no", "it is neither yes nor no")
    return float(yes_or_no(text, example.question) == gold)


def _choices_of(example: Example) -> list[str]:
    """The field `choices` or `options` (a list, or texts by letter), else the lines `A. ...` of the question.

    Raises DataError where there are fewer than two.
    """
    for name in ("choices", "options"):
        value = example.fields.get(name)
        if isinstance(value, Mapping):
            value = value.get("text", list(value.values()))
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1:
            return [str(choice) for choice in value]
    found: list[str] = []
    for letter, words in re.findall(r"(?m)^\s*\(?([A-Z])[.):]\s*(\S.*)$", example.question):
        if letter == ascii_uppercase[len(found) % 26]:
            found.append(words.strip())
    if len(found) < 2:
        raise DataError(
            f"example {example.id!r} has no choices: no list in a column 'choices' or 'options', and no lines "
            "'A. ...', 'B. ...' in its question, which reward.rule = \"choice\" needs"
        )
    return found


def _bad_answer(example: Example, rule: str, why: str) -> DataError:
    return DataError(
        f'example {example.id!r}: its answer {example.answer!r} cannot be graded by reward.rule = "{rule}", as {why}; '
        "correct data.answer or remove the row"
    )


RULES: Mapping[str, Rule] = {
    "exact_match": exact_match,
    "verdict_match": verdict_match,
    "answer_named": answer_named,
    "capital_named": capital_named,
    "mathematics": mathematics,
    "number": number,
    "choice": choice,
    "yes_no": yes_no,
}


def answer_of(example: Example) -> str:
    """Raises DataError where the example has no answer, or an empty one: an empty completion would be right."""
    if example.answer is None:
        raise DataError(
            f"example {example.id!r} has no answer, which rewards and completions from the data need; "
            "name its column: data.answer"
        )
    if not example.answer.strip():
        raise DataError(
            f"example {example.id!r} has an empty answer, {example.answer!r}, which rewards and completions from the "
            "data cannot use; fill it in or remove the row"
        )
    return example.answer


def reward(config: RewardConfig, examples: Sequence[Example], texts: Sequence[str]) -> Tensor:
    """The reward of each completion, [B] float64."""
    rule = config.rule
    if isinstance(rule, Plugin):
        return scores(rule, examples, texts)
    found = [RULES[rule](example, text) for example, text in zip(examples, texts, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def scores(plugin: Plugin, examples: Sequence[Example], texts: Sequence[str]) -> Tensor:
    """A plug-in's number for each completion, [B] float64. Raises PluginError."""
    found = [
        number_from(plugin, f"example {example.id!r}", example, text)
        for example, text in zip(examples, texts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def group_advantages(rewards: Tensor, group: int, scale: str) -> Tensor:
    """[B] rewards, `group` adjacent completions per prompt -> [B] advantages.

    (r - mean) / std over the group (GRPO, arXiv 2402.03300; population std, without Bessel's correction), or r - mean
    (arXiv 2503.20783). 0 where all rewards of a group are equal: no learning signal.
    """
    groups = rewards.view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "std":
        centred = centred / groups.std(1, keepdim=True, correction=0)
    # rounding can leave the mean unequal to its equal members, and a deviation that is not exactly 0
    mixed = (groups != groups[:, :1]).any(1, keepdim=True)
    return torch.where(mixed, centred, 0.0).flatten()
