r"""MathVerse, MathVision, We-Math, DynaMath, LogicVista and MMK12: mathematics and logic on images.

Prompts are ours, so scores are comparable between arms, not with published ones. Answers are read and compared by
rules; where the authors use a judge model, `BENCHMARKS` says so.

Where the schemas are from (columns, types and splits; nothing was downloaded from the hub):

- MathVerse (arXiv 2403.14624): the card of AI4Math/MathVerse; splits and configs from lmms-eval's tasks on
  CaraJ/MathVerse-lmmseval, which the same author uploaded with one split per version; values from the authors'
  repository (ZrrSkywalker/MathVerse). Vision Only has an empty question, Text Only an empty text for a picture.
- MathVision (arXiv 2402.14804): the card of MathLLMs/MathVision; values and rule from mathllm/MATH-V.
- We-Math (arXiv 2407.01284): lmms-eval's task on We-Math/We-Math; values and metrics from We-Math/We-Math on GitHub.
- DynaMath (arXiv 2411.00836): the card of DynaMath/DynaMath_Sample, whose ten splits are one in kcz358/DynaMath, which
  lmms-eval loads and which adds `question_id`; the rule from VLMEvalKit, which the authors recommend.
- LogicVista (arXiv 2407.04973): lmms-eval's task on lscpku/LogicVista; values from Yijia-Xiao/LogicVista. Not
  verified: whether `skill` is a text or a list (both are read) and whether the authors' one empty row is on the hub
  (it is left out).
- MMK12 (arXiv 2503.07365): public users of FanqingM/MMK12; its card was not seen. Not verified: the columns' order.

VLMEvalKit's TSV files hold the same columns with pictures in base64 and are not read here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from evals.lm import PLACEHOLDER
from evals.tasks.benchmarks import documents
from evals.tasks.benchmarks.documents import (
    Benchmark,
    Document,
    Row,
    document,
    lettered,
    outcome,
    text,
    unmarked,
)
from evals.tasks.benchmarks.mathematics import ASK
from vlopd.errors import DataError
from vlopd.grading.equality import number, same_math
from vlopd.grading.extraction import (
    boxed,
    choice_letter,
    marked,
    math_answer,
    number_answer,
    short_answer,
    strip_reasoning,
)
from vlopd.grading.words import plain_words, text_of

ASK_LETTER = "{}\n\nWork it out step by step and put the letter of the right choice in \\boxed{{}}."
ASK_LETTERS = (
    "{}\n\nWork it out step by step and put the right choice in \\boxed{{}}, or all right choices, as in "
    "\\boxed{{A, C}}."
)
ASK_FLOAT = "{}\n\nWork it out step by step and put the answer in \\boxed{{}}, as a number with three decimals."
ASK_TEXT = "{}\n\nWork it out step by step and put a short answer in \\boxed{{}}, fractions with three decimals."
IN_PICTURE = "The question is in the image."
BARE = r"\(?[A-Ja-j]\)?\.?"
"""A choice that is only a letter, where the choices are in the picture."""


# ------------------------------------------------------------------------------------------ reading


def options_in(question: str) -> list[str]:
    """The texts of the options A, B, ... that a question spells out, as in `(A) 3 (B) 4`; [] with fewer than two."""
    mark = r"(?<![\w\\])[(\uff08]?{}\s?[.:)\uff0e\uff1a\uff09\u3001]"
    for first in reversed(list(re.finditer(mark.format("A"), question))):
        marks = [first]
        for letter in ascii_uppercase[1:]:
            following = re.compile(mark.format(letter)).search(question, marks[-1].end())
            if following is None:
                break
            marks.append(following)
        if len(marks) > 1:
            ends = [each.start() for each in marks[1:]] + [len(question)]
            return [
                question[each.end() : end].strip(" ;,\n")
                for each, end in zip(marks, ends, strict=True)
            ]
    return []


def labels_in(question: str) -> list[str]:
    """The labels of options that a question names without a text: `A-E`, `A, B, C or D`, `1-5`; else A to D."""
    ranged = re.search(r"\b([A1])\s*(?:-|to)\s*([B-J2-9])\b", question)
    listed = re.search(r"\b([A1])(?:,\s*[B-J2-9])*,?\s*(?:and|or)?\s*([B-J2-9])\b", question)
    found = ranged or listed
    first, last = (found[1], found[2]) if found else ("A", "D")
    return [chr(code) for code in range(ord(first), ord(last) + 1)]


def with_choices(
    prompt: str, question: str, options: Sequence[str], answer: str, **more: Any
) -> Document:
    """Makes a multiple-choice document, whose answer is a letter or several: "A, C".

    `answer` as published: letters, or the text of an option. Where fewer options are known than the answer needs, the
    rest are bare letters. Raises DataError for an answer that is neither.
    """
    choices = list(options) or list("ABCD")
    letters = sorted(set(re.sub(r"[(),\s]+", " ", answer).split()))
    if not all(re.fullmatch("[A-J]", each) for each in letters):
        if answer not in choices:
            raise DataError(
                f"answer {answer!r} is neither a letter nor among the choices {choices}"
            )
        letters = [ascii_uppercase[choices.index(answer)]]
    choices += ascii_uppercase[len(choices) : ascii_uppercase.index(letters[-1]) + 1]
    return {**document(prompt, question, ", ".join(letters), **more), "choices": choices}


def mathverse(version: str, row: Row) -> Document:
    """One of the six versions of a problem; those of one problem are a cluster."""
    if (stored := text(row, "problem_version")) != version:
        raise DataError(f"column 'problem_version' is {stored!r}; this task has {version!r}")
    about, answer = row["metadata"] or {}, text(row, "answer").replace("掳", "°")
    shown = IN_PICTURE if version == "Vision Only" else text(row, "question")
    whole = unmarked(str(row["question_for_eval"] or "")).strip() or shown
    pictures = [] if version == "Text Only" else ["image"]
    more: dict[str, Any] = {"kind": about.get("subject"), "pictures": pictures}
    more["cluster"] = f"problem {text(row, 'problem_index')}"
    mark = PLACEHOLDER * len(pictures)
    if row["question_type"] == "multi-choice":
        asked = mark + ASK_LETTERS.format(shown)
        return with_choices(asked, whole, options_in(whole), answer, **more)
    return document(mark + ASK.format(shown), whole, answer, **more)


def mathvision(row: Row) -> Document:
    """Competition problems. The marks <image1> ... of the question are parts of the one picture and are kept."""
    asked, answer, subject = text(row, "question"), text(row, "answer"), text(row, "subject")
    options = [unmarked(str(each)).strip() for each in row["options"] or []]
    more: dict[str, Any] = {"kind": subject, "pictures": ["decoded_image"]}
    if options:
        written = not all(re.fullmatch(BARE, each) for each in options)
        prompt = ASK_LETTER.format(f"{asked}\n{lettered(options)}" if written else asked)
        return {**with_choices(PLACEHOLDER + prompt, asked, options, answer, **more), "value": None}
    gold = published_math(answer)
    made = document(PLACEHOLDER + ASK.format(asked), asked, gold, **more)
    return {**made, "value": value_of(gold)}


def published_math(gold: str) -> str:
    r"""MathVision's answers without the slips of their files: a lost \f, \boxed, \frac{1}2, units in braces."""
    gold = gold.strip().strip("$ ")
    gold = re.sub(r"^rac(?={)", r"\\frac", gold)  # \f was read as a form feed, which is a space
    gold = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", boxed(gold) or gold)
    return re.sub(r"(?:(?<=[\d}])|(?<=\\pi))\{[a-z]{4,}\}$|\^\{?\\circ\}?$", "", gold).strip()


def value_of(gold: str) -> float | None:
    """The value of a published expression; None where it has none."""
    if (exact := number(gold)) is not None:
        return float(exact)
    from latex2sympy2_extended import latex2sympy  # loads sympy

    try:
        return float(latex2sympy(gold).evalf())
    except Exception:  # the parser raises its own kinds, sympy TypeError
        return None


def wemath(row: Row) -> Document:
    """A problem or one of its steps; the rows of one ID are a cluster."""
    asked, options, key = text(row, "question"), text(row, "option"), text(row, "key")
    if key not in KEYS:
        raise DataError(f"column 'key' is {key!r}; it is one of {', '.join(KEYS)}")
    return with_choices(
        PLACEHOLDER + ASK_LETTER.format(f"{asked}\n{options}"),
        asked,
        options_in(options),
        text(row, "answer"),
        kind=KEYS[key],
        pictures=["image_path"],
        cluster=text(row, "ID"),
        key=key,
    )


KEYS = {
    "2steps_1": "one step",
    "2steps_2": "one step",
    "2steps_multi": "two steps",
    "3steps_1": "one step",
    "3steps_2": "one step",
    "3steps_3": "one step",
    "3steps_multi": "three steps",
}
"""Kinds of We-Math's rows by their key."""


def dynamath(row: Row) -> Document:
    """One of the variants of a seed question; those of one `id` are a cluster."""
    asked, answer, kind = text(row, "question"), text(row, "ground_truth"), text(row, "answer_type")
    more: dict[str, Any] = {"kind": text(row, "subject"), "pictures": ["decoded_image"]}
    more |= {"cluster": text(row, "id"), "answer_type": kind}
    if kind == "multiple choice":
        prompt = PLACEHOLDER + ASK_LETTER.format(asked)
        return with_choices(prompt, asked, options_in(asked), answer, **more)
    if kind == "float":
        if number(answer) is None:
            raise DataError(f"column 'ground_truth' is {answer!r} in place of a number")
        return document(PLACEHOLDER + ASK_FLOAT.format(asked), asked, answer, **more)
    if kind == "text":
        return document(PLACEHOLDER + ASK_TEXT.format(asked), asked, answer, **more)
    raise DataError(f"column 'answer_type' is {kind!r}; it is one of float, multiple choice, text")


def logicvista(row: Row) -> Document | None:
    """A puzzle whose choices are in the question or the picture; one may ask for several.

    None for a row without question and answer, which the authors' file has.
    """
    if not row["question"] and not row["answer"]:
        return None
    asked, skill = text(row, "question"), row["skill"]
    if isinstance(skill, str):
        skill = re.findall(r"[\w ]+", skill)
    return with_choices(
        PLACEHOLDER + ASK_LETTERS.format(asked),
        asked,
        options_in(asked) or labels_in(asked),
        text(row, "answer"),
        kind=skill[0] if skill else None,
        pictures=["image"],
    )


def mmk12(row: Row) -> Document:
    """School questions in four subjects, with the choices in the question."""
    asked, answer = text(row, "question"), text(row, "answer")
    more: dict[str, Any] = {"kind": text(row, "subject"), "pictures": ["image"]}
    prompt = PLACEHOLDER + ASK_LETTER.format(asked)
    return with_choices(prompt, asked, options_in(asked), answer, **more)


MATHVERSE = {
    "mathverse_text_dominant": "Text Dominant",
    "mathverse_text_lite": "Text Lite",
    "mathverse_text_only": "Text Only",
    "mathverse_vision_intensive": "Vision Intensive",
    "mathverse_vision_dominant": "Vision Dominant",
    "mathverse_vision_only": "Vision Only",
}
VISION = ("id", "question", "options", "decoded_image", "answer", "subject")

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(
            Benchmark(
                name,
                "CaraJ/MathVerse-lmmseval",
                name.removeprefix("mathverse_"),
                ("problem_index", "problem_version", "question", "answer", "question_type", "metadata",
                 "question_for_eval", *([] if version == "Text Only" else ["image"])),
                partial(mathverse, version),
                "testmini_text_only" if version == "Text Only" else "testmini_version_split",
                files=f"testmini_{name.removeprefix('mathverse_')}",
            )
            for name, version in MATHVERSE.items()
        ),
        Benchmark("mathvision", "MathLLMs/MathVision", "test", VISION, mathvision),
        Benchmark("mathvision_testmini", "MathLLMs/MathVision", "testmini", VISION, mathvision),
        Benchmark("wemath", "We-Math/We-Math", "testmini",
                  ("ID", "question", "option", "answer", "image_path", "key"), wemath),
        Benchmark("dynamath", "kcz358/DynaMath", "test",
                  ("id", "question", "decoded_image", "ground_truth", "answer_type", "subject"), dynamath),
        Benchmark("logicvista", "lscpku/LogicVista", "test",
                  ("question", "answer", "image", "skill"), logicvista),
        Benchmark("mmk12", "FanqingM/MMK12", "test",
                  ("question", "answer", "image", "subject"), mmk12),
    )
}  # fmt: skip
"""Judged by a model in the authors' pipeline: MathVerse (extraction and equality), MMK12 (equality), DynaMath and
LogicVista (extraction). MathVision and We-Math have rules of their own.
"""


def dataset(benchmark: str, **_: Any) -> dict[str, Dataset]:
    return documents.documents(BENCHMARKS[benchmark])


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    return documents.pictures(BENCHMARKS[doc["benchmark"]], doc)


chance = documents.chance


# ------------------------------------------------------------------------------------------ scoring


def letters_of(response: str, choices: Sequence[str]) -> str | None:
    """The chosen letter, or letters ("A, C"); an option may also be named by its text or its value."""
    answer, letters = strip_reasoning(response), ascii_uppercase[: len(choices)]
    final = boxed(answer) or marked(answer)
    for candidate in (final, answer):
        one = rf"[(\[]?[{letters}][)\]]?"
        listed = rf"{one}(?:(?:\s*(?:,|;|&|and)\s*)+{one})+"
        if re.fullmatch(listed, several := text_of(candidate or "").strip(" .*$")):
            return ", ".join(sorted(set(re.findall(rf"\b[{letters}]\b", several))))
    # "A" as the text of an option would be found in any sentence with the article
    named = [
        f"option {letter}" if re.fullmatch(BARE, choice) or not plain_words(choice) else choice
        for letter, choice in zip(letters, choices, strict=True)
    ]
    if (letter := choice_letter(response, named)) is not None or final is None:
        return letter
    equal = [each for each, choice in zip(letters, named, strict=True) if same_math(final, choice)]
    return equal[0] if len(equal) == 1 else None


def is_chosen(letters: str | None, doc: Mapping[str, Any]) -> bool:
    return letters == doc["answer"]


def score_choice(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Accuracy of the chosen letters; all of them where several are right."""
    extracted = letters_of(results[0], doc["choices"])
    return outcome(extracted, is_chosen(extracted, doc))


def score_mathverse(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Choices by letter, other answers by mathematical equality without a label ("Area =") before the value."""
    if doc["choices"]:
        return score_choice(doc, results)
    extracted, gold = math_answer(results[0]), doc["answer"]
    if extracted is None:
        return outcome(None, False)
    right = same_math(value_part(extracted), value_part(gold))
    if re.fullmatch(r"[A-Za-z ]{3,}", gold):
        right = right or plain_words(extracted) == plain_words(gold)
    return outcome(extracted, right)


def value_part(answer: str) -> str:
    r"""The value of `Area $=12 \mathrm{~cm}^2$`; other answers as they are, without plain units and a bearing's T."""
    lines = dict.fromkeys(answer.strip().splitlines())
    answer = next(iter(lines)) if len(lines) == 1 else answer
    answer = re.sub(r"^\\\[(.*)\\\]\.?$", r"\1", answer.strip()).replace("$", " ").replace("~", " ")
    label = r"(?:\\(?:mathrm|text)\{[A-Za-z .]+\}|[A-Za-z][A-Za-z .]+)?"
    answer = re.sub(rf"^{label}\s*=\s*", "", answer.strip())
    answer = re.sub(r"\s*(?:square |cubic )?units?\s*(?:\^\s*\{?[23]\}?)?$", "", answer)
    answer = re.sub(r"(\^\{?\s*\\circ\s*\}?|°)\s*T$", r"\1", answer)
    return re.sub(r"(?<=\d)\.(?=\\mathrm)", "", answer).strip()


def score_mathvision(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """MathVision's rule: a letter or its value; other answers to two decimals. `careful`: exact equality instead."""
    if doc["choices"]:
        scores = score_choice(doc, results)
        return {**scores, "careful": scores["acc"]}
    extracted = math_answer(results[0])
    exact = extracted is not None and same_math(extracted, doc["answer"])
    given, value = number(extracted or ""), doc["value"]
    near = given is not None and value is not None and round(float(given), 2) == round(value, 2)
    return {**outcome(extracted, exact or near), "careful": float(exact)}


def score_dynamath(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """DynaMath's rule: numbers within 0.001, choices by letter, and a text that the reference contains.

    `careful`: a text must be equal to the reference, or mathematically equal.
    """
    kind, gold = doc["answer_type"], doc["answer"]
    if kind == "multiple choice":
        extracted = letters_of(results[0], doc["choices"])
        right = exact = is_chosen(extracted, doc)
    elif kind == "float":
        extracted, given = decimal_answer(results[0])
        right = exact = given is not None and abs(given - float(gold)) <= 0.001
    else:
        extracted = text_of(short_answer(results[0]) or "") or None
        right = extracted is not None and extracted.lower() in gold.lower()
        exact = extracted is not None and (
            same_math(extracted, gold) or extracted.lower().split() == gold.lower().split()
        )
    scores = outcome(extracted, right)
    item = (doc["cluster"], scores["acc"])
    return {**scores, "careful": float(exact), "worst_case_acc": item}


def decimal_answer(response: str) -> tuple[str | None, float | None]:
    """A response's number, which may be a multiple of pi: as written, and its value."""
    written = math_answer(response)
    if multiple := re.fullmatch(r"\$*([-\d.]*)\s*(?:π|\\pi)\$*", written or ""):
        factor = number(multiple[1] or "1")
        return written, None if factor is None else float(factor) * math.pi
    if number(written or "") is None:
        written = number_answer(response)
    value = number(written or "")
    return written, None if value is None else float(value)


def worst_case_acc(items: Iterable[tuple[str, float]]) -> float:
    """DynaMath's worst-case accuracy: the fraction of questions with all variants right.

    items: (question, accuracy of a variant).
    """
    worst: dict[str, float] = defaultdict(lambda: 1.0)
    for question, right in items:
        worst[question] = min(worst[question], right)
    return float(np.mean(list(worst.values())))


# We-Math's four-dimensional metrics (arXiv 2407.01284, section 3), over problems with all of their steps

Item = tuple[str, str, float]
"""Of a row of We-Math: ID, key (`2steps_1` ... `3steps_multi`), accuracy."""


def score_wemath(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    scores = score_choice(doc, results)
    item = (doc["cluster"], doc["key"], scores["acc"])
    return {**scores, **dict.fromkeys(WEMATH, item)}


def problems(items: Iterable[Item]) -> list[tuple[list[bool], bool]]:
    """(each step right, the whole problem right) of each problem whose rows are all here."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for problem, key, right in items:
        found[problem][key] = right == 1
    complete = []
    for rows in found.values():
        steps = next(iter(rows))[0]
        if set(rows) == {key for key in KEYS if key[0] == steps}:
            whole = rows.pop(f"{steps}steps_multi")
            complete.append((list(rows.values()), whole))
    return complete


def fraction(items: Iterable[Item], holds: Callable[[list[bool], bool], bool]) -> float:
    """The fraction of problems for which `holds`; 0 without a complete problem."""
    found = [float(holds(*each)) for each in problems(items)]
    return float(np.mean(found)) if found else 0.0


def insufficient_knowledge(items: Iterable[Item]) -> float:
    """IK: the problem is wrong, and a step too."""
    return fraction(items, lambda steps, whole: not whole and not all(steps))


def inadequate_generalization(items: Iterable[Item]) -> float:
    """IG: the problem is wrong, but all steps right."""
    return fraction(items, lambda steps, whole: not whole and all(steps))


def complete_mastery(items: Iterable[Item]) -> float:
    """CM, strict: the problem and all steps are right."""
    return fraction(items, lambda steps, whole: whole and all(steps))


def complete_mastery_loose(items: Iterable[Item]) -> float:
    """CM, loose: the problem and at least one step are right."""
    return fraction(items, lambda steps, whole: whole and any(steps))


def rote_memorization(items: Sequence[Item]) -> float:
    """RM, strict: of the problems that are right, the fraction with a wrong step."""
    return _of_right(items, complete_mastery(items))


def rote_memorization_loose(items: Sequence[Item]) -> float:
    """RM, loose: of the problems that are right, the fraction with all steps wrong."""
    return _of_right(items, complete_mastery_loose(items))


def _of_right(items: Sequence[Item], mastered: float) -> float:
    right = fraction(items, lambda steps, whole: whole)
    return 1 - mastered / right if right else 0.0


def score_strict(items: Sequence[Item]) -> float:
    """We-Math's score, strict: complete mastery and half of inadequate generalization."""
    return complete_mastery(items) + 0.5 * inadequate_generalization(items)


def score_loose(items: Sequence[Item]) -> float:
    """We-Math's score, loose."""
    return complete_mastery_loose(items) + 0.5 * inadequate_generalization(items)


WEMATH = (
    "score_strict",
    "score_loose",
    "insufficient_knowledge",
    "inadequate_generalization",
    "complete_mastery",
    "complete_mastery_loose",
    "rote_memorization",
    "rote_memorization_loose",
)
"""We-Math's metrics over problems, by the name of their function."""
