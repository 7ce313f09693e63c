"""Reads the arms' evaluations and pairs their scores by question: evals/<arm>/ -> aligned scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.stats import Scores
from vlopd.errors import RunError
from vlopd.files import read_json, read_jsonl


@dataclass(frozen=True)
class PairedScores:
    """One task's scores of all arms, paired by question: `scores[arm][i]` belongs to question i.

    further[metric][arm]: scores of other metrics, such as pass@k of sampled answers.
    """

    task: str
    metric: str
    scores: Mapping[str, Scores]
    groups: Sequence[str | None]
    clusters: Sequence[str] | None
    further: Mapping[str, Mapping[str, Scores]]


def read_results(evals: Path, arms: Sequence[str]) -> dict[str, Any]:
    """Reads results.json of every arm. Raises RunError for a missing arm or data that differ."""
    missing = [arm for arm in arms if not (evals / arm / "results.json").exists()]
    if missing:
        raise RunError(
            f"{evals.parent} has no evaluation of {', '.join(missing)}; run `vlopd eval {evals.parent}`"
        )
    results = {arm: read_json(evals / arm / "results.json") for arm in arms}
    first = arms[0]
    for arm in arms[1:]:
        for key in ("data_digest", "primary_metric"):
            mine, theirs = results[first][key], results[arm][key]
            if mine != theirs:
                task = next(t for t in {**mine, **theirs} if mine.get(t) != theirs.get(t))
                raise RunError(
                    f"{first} and {arm} were evaluated with different {key} on {task} "
                    f"({mine.get(task)} and {theirs.get(task)}) and cannot be compared; delete the older of "
                    f"{evals / first} and {evals / arm} and evaluate again"
                )
    return results


def read_paired_scores(
    evals: Path, arms: Sequence[str], task: str, metric: str, further: Sequence[str] = ()
) -> PairedScores:
    """Joins the arms' samples of a task on (doc_id, doc_hash), in the first arm's order.

    Raises RunError where the arms have different questions, or scores are not in [0, 1].
    """
    tables = {}
    for arm in arms:
        path = evals / arm / f"samples_{task}.jsonl"
        rows = read_jsonl(path)
        tables[arm] = {(row["doc_id"], row["doc_hash"]): row for row in rows}
        if len(tables[arm]) < len(rows):
            raise RunError(f"{path} has several rows per question; evaluate {arm} again")
        if not rows:
            raise RunError(f"{path} has no rows; evaluate {arm} again")
        for row in rows:
            value = row.get(metric)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise RunError(
                    f"{path}: question {row['doc_id']} has {metric} = {value}, but compared scores must be in "
                    f"[0, 1]; list such a metric first in the task's metric_list, and evaluate {arm} again"
                )
        if tables[arm].keys() != tables[arms[0]].keys():
            unpaired = len(tables[arm].keys() ^ tables[arms[0]].keys())
            raise RunError(
                f"{arms[0]} ({len(tables[arms[0]])} questions) and {arm} ({len(tables[arm])}) differ in "
                f"{unpaired} questions of {task}; delete evals/ and evaluate again"
            )
    order = tables[arms[0]]
    clusters = [row["cluster"] for row in order.values()]
    # one cluster per question is no clustering, so the exact methods for 0/1 scores apply
    clustered = None not in clusters and len(set(clusters)) < len(clusters)

    def scores_of(name: str) -> dict[str, Scores]:
        return {arm: np.array([float(tables[arm][k][name]) for k in order]) for arm in arms}

    return PairedScores(
        task,
        metric,
        scores_of(metric),
        [row["group"] for row in order.values()],
        [str(cluster) for cluster in clusters] if clustered else None,
        {name: scores_of(name) for name in further},
    )
