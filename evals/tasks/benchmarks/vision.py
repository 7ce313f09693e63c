"""MathVista, MMMU, ScienceQA, ChartQA, POPE and AI2D: questions on images, most of them multiple-choice.

Prompts are ours, so scores are comparable between arms, not with published ones. Choices are answered by letter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
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
from evals.tasks.benchmarks.official_rules import mmmu_choice, mmmu_open, relaxed_accuracy
from evals.tasks.benchmarks.official_rules import pope as pope_answer
from vlopd.data.raw_values import cell_text
from vlopd.errors import DataError
from vlopd.grading.equality import number, same_number
from vlopd.grading.extraction import (
    choice_letter,
    math_answer,
    number_answer,
    short_answer,
    states,
    strip_reasoning,
    yes_or_no,
)

CHOOSE = "{}\n{}\nAnswer with the letter of the right choice."
SHORTLY = "{}\nAnswer with one word, number or short phrase."


def choose(question: str, choices: Sequence[str]) -> str:
    return CHOOSE.format(question, lettered(choices))


def listed(row: Row, column: str) -> list[str]:
    """A column's list of texts, stored as a list or as a Python literal (MMMU)."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise DataError(f"column {column!r} holds {value!r} in place of a list") from None
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} holds {value!r} in place of a list")
    return [unmarked(str(cell_text(each))).strip() for each in value]


def at(choices: Sequence[str], index: Any, column: str) -> str:
    """The choice of a stored index, from 0."""
    if not str(index).isdigit() or int(index) >= len(choices):
        raise DataError(f"column {column!r} is {index!r}; its choices are 0 to {len(choices) - 1}")
    return choices[int(index)]


def place_of(letter: str, choices: Sequence[str], column: str = "answer") -> int:
    """The place from 0 of the choice with a letter, A for the first."""
    letters = ascii_uppercase[: len(choices)]
    if len(letter) != 1 or letter not in letters:
        raise DataError(f"column {column!r} is {letter!r}; its choices are {' '.join(letters)}")
    return letters.index(letter)


def interleaved(prompt: str) -> tuple[str, list[str]]:
    """A prompt with placeholders for its `<image 1>`, and the columns of the images in order; the first without any."""
    pictures = [f"image_{k}" for k in re.findall(r"<image (\d)>", prompt)]
    if not pictures:
        return PLACEHOLDER + prompt, ["image_1"]
    return re.sub(r"<image \d>", PLACEHOLDER, prompt), pictures


def mathvista(row: Row) -> Document:
    """Answers are a choice, an integer, a float of `precision` decimals, a list, or text."""
    asked, answer, kind = text(row, "question"), text(row, "answer"), row["answer_type"]
    choices = listed(row, "choices") if row["question_type"] == "multi_choice" else []
    if unit := row["unit"]:
        asked += f" (Unit: {unit})"
    wanted = {
        "integer": "Give the answer as a whole number.",
        "float": f"Give the answer as a number with {int(row['precision'] or 0)} decimals.",
        "list": "Give the answer as a list of numbers in square brackets.",
    }
    prompt = (
        choose(asked, choices)
        if choices
        else f"{asked}\n{wanted.get(kind, '')} End with `Answer: ...`."
    )
    return document(
        PLACEHOLDER + prompt,
        asked,
        answer,
        (row["metadata"] or {}).get("task"),
        choices,
        ["decoded_image"],
        answer_type=kind,
        decimals=int(row["precision"] or 0) if kind == "float" else None,
    )


def mmmu(row: Row) -> Document:
    """Images are placed at `<image 1>` in the question and its choices; open questions may accept a list of answers."""
    asked = text(row, "question")
    choices = listed(row, "options") if row["question_type"] == "multiple-choice" else []
    prompt, pictures = interleaved(choose(asked, choices) if choices else SHORTLY.format(asked))
    letter = answer = text(row, "answer")
    if choices:
        answer = choices[place_of(answer, choices)]
    accepted = listed(row, "answer") if answer.startswith("[") and not choices else [answer]
    # the official rule does not read a short choice by its text
    target = letter if choices else accepted[0]
    subject = re.sub(r"^[a-z]+_|_\d+$", "", text(row, "id"))  # validation_Art_Theory_3
    more = {"accepted": accepted, "target": target}
    return document(prompt, asked, answer, subject, choices, pictures, **more)


def scienceqa_img(row: Row) -> Document:
    choices, asked = listed(row, "choices"), text(row, "question")
    if row["hint"]:
        asked = f"{unmarked(row['hint']).strip()}\n{asked}"
    answer = at(choices, row["answer"], "answer")
    prompt = PLACEHOLDER + choose(asked, choices)
    return document(prompt, asked, answer, text(row, "subject"), choices, ["image"])


def ai2d(row: Row) -> Document:
    choices, asked = listed(row, "options"), text(row, "question")
    answer = at(choices, row["answer"], "answer")
    return document(PLACEHOLDER + choose(asked, choices), asked, answer, None, choices, ["image"])


def chartqa(row: Row) -> Document:
    """The first label is the answer. Questions are human-written (0) or generated (1)."""
    asked, kind = text(row, "query"), row["human_or_machine"]
    kind = {0: "human", 1: "machine"}.get(kind, kind)
    answer = listed(row, "label")[0]
    return document(PLACEHOLDER + SHORTLY.format(asked), asked, answer, kind, (), ["image"])


def pope(row: Row) -> Document:
    """Object presence in the image; half of the answers are yes."""
    asked, answer = text(row, "question"), text(row, "answer").lower()
    prompt = f"{PLACEHOLDER}{asked}\nAnswer yes or no."
    return document(prompt, asked, answer, text(row, "category"), ["yes", "no"], ["image"])


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mathvista",
            "AI4Math/MathVista",
            "testmini",
            ("question", "decoded_image", "choices", "unit", "precision", "answer", "question_type",
             "answer_type", "metadata"),
            mathvista,
        ),
        Benchmark(
            "mmmu",
            "lmms-lab-encoder/MMMU",
            "validation",
            ("id", "question", "options", "answer", "question_type", "image_1"),
            mmmu,
            formerly="lmms-lab/MMMU",
        ),
        Benchmark(
            "scienceqa_img",
            "lmms-lab-encoder/ScienceQA",
            "test",
            ("image", "question", "choices", "answer", "hint", "subject"),
            scienceqa_img,
            "ScienceQA-IMG",
            formerly="lmms-lab/ScienceQA",
        ),
        Benchmark(
            "chartqa",
            "HuggingFaceM4/ChartQA",
            "test",
            ("image", "query", "label", "human_or_machine"),
            chartqa,
        ),
        Benchmark(
            "pope",
            "lmms-lab-encoder/POPE",
            "test",
            ("image", "question", "answer", "category"),
            pope,
            formerly="lmms-lab/POPE",
        ),
        Benchmark(
            "ai2d",
            "lmms-lab-encoder/ai2d",
            "test",
            ("image", "question", "options", "answer"),
            ai2d,
            formerly="lmms-lab/ai2d",
        ),
    )
}  # fmt: skip


def dataset(benchmark: str, **_: Any) -> dict[str, Dataset]:
    return documents.documents(BENCHMARKS[benchmark])


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    return documents.pictures(BENCHMARKS[doc["benchmark"]], doc)


chance = documents.chance


# ------------------------------------------------------------------------------------------ scoring


def score_choice(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Accuracy of the chosen letter."""
    extracted = choice_letter(results[0], doc["choices"])
    right = extracted is not None and doc["choices"][ord(extracted) - ord("A")] == doc["answer"]
    return outcome(extracted, right)


def score_mathvista(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    if doc["choices"]:
        return score_choice(doc, results)
    if doc["answer_type"] == "list":
        extracted = math_answer(results[0])
        wanted = re.findall(r"[-+]?[\d.]+", doc["answer"])
        found = re.findall(r"[-+]?[\d.]+", extracted or "")
        right = len(wanted) == len(found) and all(map(same_number, found, wanted))
        return outcome(extracted, right)
    extracted = number_answer(results[0])
    return outcome(
        extracted, extracted is not None and same_number(extracted, doc["answer"], doc["decimals"])
    )


def score_mmmu(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """`acc` by the authors' rule (official_rules.py), `careful` by the letter or the phrase that is the answer."""
    response = strip_reasoning(results[0])
    if choices := doc["choices"]:
        official = mmmu_choice(response, choices)
        right = official is not None and choices[ord(official) - ord("A")] == doc["answer"]
        letter = choice_letter(response, choices)
        careful = letter is not None and choices[ord(letter) - ord("A")] == doc["answer"]
        return {**outcome(letter, right), "careful": float(careful)}
    extracted = short_answer(response)
    right = bool(response) and mmmu_open(response, doc["accepted"])
    careful = any(
        agrees(response, extracted, each, doc.get("question", "")) for each in doc["accepted"]
    )
    return {**outcome(extracted, right), "careful": float(careful)}


def agrees(response: str, extracted: str | None, accepted: str, question: str) -> bool:
    """Whether an open answer is an accepted one: a number to two decimals, one letter, or a phrase with its words."""
    if extracted is None:
        return False
    if number(accepted) is not None:
        return same_number(number_answer(response, question) or "", accepted, 2)
    return states(response, accepted, question)


def score_chartqa(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """`relaxed_accuracy` of the short answer by the official rule; `careful` reads percents and units."""
    extracted = short_answer(results[0])
    right = extracted is not None and relaxed_accuracy(extracted, doc["answer"])
    careful = states(results[0], doc["answer"], doc["question"])
    return {**outcome(extracted, right, "relaxed_accuracy"), "careful": float(careful)}


def score_pope(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Accuracy, a question's contribution to F1 and rate of "yes" by the authors' rule; `careful` accuracy.

    `f1` of a question is 1 for a true positive, 0 for a false positive or negative, and -1 for a true negative, which
    F1 ignores.
    """
    response = strip_reasoning(results[0])
    official, extracted, right = (
        pope_answer(response),
        yes_or_no(response, doc.get("question", "")),
        doc["answer"],
    )
    yes = (official == "yes", right == "yes")
    return {
        **outcome(extracted, official == right),
        "careful": float(extracted == right),
        "yes_rate": float(yes[0]),
        "f1": 1.0 if all(yes) else 0.0 if any(yes) else -1.0,
    }


def f1(parts: Sequence[float]) -> float:
    """F1 of "yes" from the contributions of `score_pope`: 2 J / (1 + J), with J the fraction of 1 among 0 and 1."""
    counted = [part for part in parts if part >= 0]
    jaccard = float(np.mean(counted)) if counted else 0.0
    return 2 * jaccard / (1 + jaccard)
