"""Data, scoring and chance level of the questions on capitals, for the YAML files beside this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from vlopd.data import capitals


def dataset(split: capitals.Split, **_: Any) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset`: every question of a split, grouped by continent, clustered by country."""
    rows = capitals.every_question(split)
    about = [{"kind": row["continent"], "cluster": row["country"]} for row in rows]
    return {"test": Dataset.from_list([{**a, **b} for a, b in zip(rows, about, strict=True)])}


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Is the capital, under any of its names, in the answer as whole words? Accents and case are ignored.

    An answer that names no capital of the table, right or wrong, is an extraction failure.
    """
    named = any(
        capitals.mentions_capital(results[0], each.capital) for each in capitals.countries()
    )
    return {
        "capital_named": float(capitals.mentions_capital(results[0], doc["capital"])),
        "extraction_failure": float(not named),
    }


def chance(docs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """A guesser who names one of all capitals in the table at random: over all, and by group."""
    share = 1.0 / len(capitals.countries())
    return {group: share for group in ("all", *sorted({doc["kind"] for doc in docs}))}
