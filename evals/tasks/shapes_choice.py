"""Data and chance level of the shapes multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from evals.tasks.chance import mean_by_kind
from vlopd.data import shapes_choice
from vlopd.data.shapes import Split, training_answers


def dataset(size: int, seed: int, split: Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: the questions of task `shapes` of that size and seed, with choices."""
    return {"test": Dataset.from_list(list(shapes_choice.choice_rows(size, seed, split)))}


def colours(size: int, seed: int, split: Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: the colour of one object per scene (the same scenes), grouped by its shape."""
    return {"test": Dataset.from_list(list(shapes_choice.colour_rows(size, seed, split)))}


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Expected accuracy of a blind baseline that takes the most frequent training answer, overall and by kind."""
    by_text, _ = training_answers()

    def hit(doc: Mapping[str, Any]) -> float:
        known: Mapping[str, int] = by_text.get(doc["question"], {})
        times = [known.get(choice, 0) for choice in doc["choices"]]
        best = [c for c, n in zip(doc["choices"], times, strict=True) if n == max(times)]
        return (doc["answer"] in best) / len(best)

    return mean_by_kind(docs, hit)
