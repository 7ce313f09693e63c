"""Data, scoring and chance level of the shapes tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from datasets import Dataset
from PIL import Image

from evals.tasks.chance import mean_by_kind
from vlopd.data import shapes
from vlopd.data.answers import after_last_colon


def dataset(size: int, seed: int, split: shapes.Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: `size` questions of a split, one per scene; images are rendered on demand."""
    return {"test": questions(size, seed, split)}


@lru_cache(maxsize=4)
def questions(size: int, seed: int, split: shapes.Split) -> Dataset:
    """Cached, so that all arms share the questions of a process."""
    world = shapes.ShapesDataset(split, size, seed)
    return Dataset.from_list([world.row(i) for i in range(size)])


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    return [shapes.render(shapes.scene_from_json(doc["scene"]), doc["jitter"])]


def doc_to_image_as_learned(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The scene in the palette that the built-in student learned, where distillation teaches nothing."""
    scene, own = shapes.scene_from_json(doc["scene"]), shapes.STUDENTS_COLOURS
    return [shapes.render(scene, doc["jitter"], own, shapes.STUDENTS_SHADE)]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    return f"{shapes.scene_caption(shapes.scene_from_json(doc['scene']))} {doc['question']}"


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of the full string and of the verdict after the last colon; extraction fails without one."""
    answer, target = results[0].strip(), doc["answer"]
    separator = shapes.VERDICT.strip()
    return {
        "exact_match": float(answer == target),
        "verdict_match": float(after_last_colon(answer) == after_last_colon(target)),
        "extraction_failure": float(
            not answer or (separator in target and separator not in answer)
        ),
    }


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match of a blind baseline that knows the training answers, overall and by kind."""
    by_text, by_kind = shapes.blind_guesser()
    return mean_by_kind(
        docs, lambda doc: by_text.get(doc["question"], by_kind[doc["kind"]]) == doc["answer"]
    )
