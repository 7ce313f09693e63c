"""Data and scoring of the reasoning-gym tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from vlopd.data import reasoning
from vlopd.grading.equality import same_number
from vlopd.grading.extraction import number_answer, short_answer


def dataset(
    subject: reasoning.Subject, split: reasoning.Split, size: int, seed: int, **_: Any
) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: `size` distinct questions of a split."""
    rows = reasoning.unique_questions(subject, split, size, seed)
    return {"test": Dataset.from_list(rows)}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match: equal numbers (arithmetic), equal word lists (sorting), or equal last word (spelling)."""
    extracted: Any
    if doc["kind"] == "arithmetic":
        extracted = number_answer(results[0])
        right = extracted is not None and same_number(extracted, doc["answer"])
    else:
        found = words_of(results[0])
        wanted = doc["answer"].lower().split(", ")
        extracted = (found if doc["kind"] == "sorting" else found[-1:]) or None
        right = extracted == wanted
    return {"exact_match": float(right), "extraction_failure": float(extracted is None)}


def words_of(text: str) -> list[str]:
    """The words of a short answer after its last colon: `Sorted: a, b` gives a and b."""
    extracted = short_answer(text) or ""
    return re.findall(r"\w+", extracted.rpartition(":")[2].lower())
