"""Data, scoring and chance level of the capitals tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from vlopd.data import capitals


def dataset(split: capitals.Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: all questions of a split, grouped by continent, clustered by country."""
    rows = capitals.every_question(split)
    about = [{"kind": row["continent"], "cluster": row["country"]} for row in rows]
    return {"test": Dataset.from_list([{**a, **b} for a, b in zip(rows, about, strict=True)])}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Scores whether the answer contains a name of the capital as whole words, ignoring accents and case.

    An answer without any capital of the table is an extraction failure.
    """
    named = any(
        capitals.mentions_capital(results[0], each.capital) for each in capitals.countries()
    )
    return {
        "capital_named": float(capitals.mentions_capital(results[0], doc["capital"])),
        "extraction_failure": float(not named),
    }


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Chance level of naming a random capital of the table, overall and by kind."""
    share = 1.0 / len(capitals.countries())
    return {group: share for group in ("all", *sorted({doc["kind"] for doc in docs}))}
