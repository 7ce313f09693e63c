"""Data and scoring of the questions from reasoning-gym, for the YAML files beside this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from evals.tasks.equality import same_number
from evals.tasks.extraction import number_answer, short_answer
from vlopd.data import reasoning


def dataset(
    subject: reasoning.Subject, split: reasoning.Split, size: int, seed: int, **_: Any
) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: `size` different questions of a split."""
    rows = reasoning.unique_questions(subject, split, size, seed)
    return {"test": Dataset.from_list(rows)}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Equal as numbers; the same words in the same order; or the same last word."""
    said: Any
    if doc["kind"] == "arithmetic":
        said = number_answer(results[0])
        right = said is not None and same_number(said, doc["answer"])
    else:
        found = words_of(results[0])
        wanted = doc["answer"].lower().split(", ")
        said = (found if doc["kind"] == "sorting" else found[-1:]) or None
        right = said == wanted
    return {"exact_match": float(right), "extraction_failure": float(said is None)}


def words_of(text: str) -> list[str]:
    """The words of a short answer, after its last colon: `Sorted: a, b` is a and b."""
    said = short_answer(text) or ""
    return re.findall(r"\w+", said.rpartition(":")[2].lower())
