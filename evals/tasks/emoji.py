"""Data and chance level of the emoji classification tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from PIL import Image

from evals.tasks.chance import mean_by_kind
from vlopd.data import emoji


def dataset(split: emoji.Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: all held-out drawings, grouped by what is new, clustered by concept."""
    return {"test": Dataset.from_list(emoji.held_out(split))}


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    shown = emoji.Emoji(*(doc[field] for field in emoji.Emoji._fields))
    return [emoji.open_drawing(shown, doc["artist"])]


def chance(docs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy of always answering the most common group of the training concepts, overall and by kind."""
    ((commonest, _),) = Counter(e.group for e in emoji.of_split("train")).most_common(1)
    return mean_by_kind(docs, lambda doc: doc["answer"] == commonest)
