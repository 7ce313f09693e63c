"""Data and chance level of the visual world's multiple-choice questions, for the YAML files beside this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from datasets import Dataset

from evals.tasks.kinds import mean_by_kind
from vlopd.data import shapes_choice
from vlopd.data.shapes import Split


def dataset(size: int, seed: int, split: Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: the questions of the task `shapes` of that size and seed, with choices."""
    return {"test": questions(size, seed, split)}


@lru_cache(maxsize=4)
def questions(size: int, seed: int, split: Split) -> Dataset:
    """Made once a process: every arm is asked the same."""
    return Dataset.from_list(list(shapes_choice.choice_rows(size, seed, split)))


def colours(size: int, seed: int, split: Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: the colour of one object of each of the same scenes, grouped by its shape."""
    return {"test": Dataset.from_list(list(shapes_choice.colour_rows(size, seed, split)))}


@lru_cache(maxsize=1)
def training_answers() -> Mapping[str, Mapping[str, int]]:
    return shapes_choice.training_answers()


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Expected accuracy of a guesser who takes the choice that training gave most often, over all and by kind."""

    def hit(doc: Mapping[str, Any]) -> float:
        known = training_answers().get(doc["question"], {})
        times = [known.get(choice, 0) for choice in doc["choices"]]
        best = [c for c, n in zip(doc["choices"], times, strict=True) if n == max(times)]
        return (doc["answer"] in best) / len(best)

    return mean_by_kind(docs, hit)
