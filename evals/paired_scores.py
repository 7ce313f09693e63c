"""Reads the arms' evaluations and pairs their scores by question: evals/<arm>/ -> aligned scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evals import corpus_metrics
from evals.stats import Scores
from vlopd.config.analysis import EvalConfig
from vlopd.errors import ConfigError, RunError
from vlopd.run.schemas.read import read_answers, read_record

NOT_METRICS = (
    *("doc_id", "doc_hash", "prompt_hash", "question", "prompt", "target", "completion", "thought"),
    *("thought_truncated", "tokens", "thought_tokens", "stop", "truncated", "outcome"),
    *("group", "cluster", "image", "images"),
)
"""Columns of samples_<task>.jsonl besides the metrics; `image` is of an earlier version."""
OUTCOMES = ("right", "wrong", "unreadable", "cut")
LENGTHS = ("mean_tokens", "truncated_fraction", "mean_thought_tokens", "answered_fraction")
"""Entries of results.json by task that are averages over its questions."""

Key = tuple[Any, ...]
Row = Mapping[str, Any]


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
    higher_is_better: bool = True
    members: Sequence[str] | None = None
    """The tasks of a group, whose questions these are; None for a task."""
    sizes: Sequence[int] | None = None
    """Numbers of questions of the members."""
    group: str | None = None
    """The group whose total stands for this task."""
    weights: Scores | None = None
    """Weights of the questions, of mean 1; None for equal ones."""
    outcomes: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    """Fractions of answers by OUTCOMES, by arm; None where the score is not 0/1 or nothing is generated."""
    lengths: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """LENGTHS by arm."""
    corpus: corpus_metrics.CorpusMetric | None = None
    """What a metric that is no mean over questions is computed from; `scores` is then empty."""

    def pooled(self, values: Sequence[float]) -> float:
        """The total of the members' means, weighted as their questions are."""
        return float(np.average(values, weights=self.sizes if self.weights is None else None))


def outcome_of(value: Any, truncated: bool, unreadable: bool) -> str | None:
    """One of OUTCOMES of an answer with a 0/1 score; None for other scores.

    An answer that is not right and was truncated is cut, also where nothing could be read from it.
    """
    if value not in (0, 1):
        return None
    return "right" if value else "cut" if truncated else "unreadable" if unreadable else "wrong"


def metric_of(
    task: str,
    facts: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    chosen: Mapping[str, str],
) -> tuple[str | None, str | None]:
    """(column of the metric to compare, None), or (None, why there is none).

    The one that eval.metric chooses for the task; else the first that can be compared. A choice that the task lacks is
    ignored; `chosen_metric` refuses it.
    """
    if (column := chosen_metric(task, facts, columns, chosen, strict=False)) is not None:
        return column, None
    reasons = [corpus_metrics.why_not(column, facts.get(column, {})) for column in columns]
    found = next((c for c, why in zip(columns, reasons, strict=True) if why is None), None)
    return found, None if found else "; ".join(map(str, reasons)) or "it has no metric"


def chosen_metric(
    task: str,
    facts: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    chosen: Mapping[str, str],
    groups: Sequence[str] = (),
    strict: bool = True,
) -> str | None:
    """The column of eval.metric's choice for the task, or else for one of its groups, the innermost first.

    None without one. With `strict`, raises ConfigError where it is not there.
    """
    key = _key_in(chosen, task, *groups)
    if key is None:
        return None
    wanted = chosen[key]
    for column in columns:
        if wanted in (column, f"{column},{facts.get(column, {}).get('filter')}"):
            return column
    if strict:
        raise ConfigError(
            f"eval.metric.{key}: {task} has no metric {wanted!r}; it has {'; '.join(columns)}"
        )
    return None


def _key_in(chosen: Mapping[str, str], *names: str) -> str | None:
    """The first name that eval.metric has, for a variant without pictures also that of its task or group."""
    own = (each for name in names for each in (name, name.partition("@")[0]))
    return next((each for each in own if each in chosen), None)


def _groups_of(results: Mapping[str, Any], task: str) -> list[str]:
    """The groups and tags that a task was evaluated in, the innermost first."""
    found, members = [], [task]
    within = {**(results.get("leaves") or {}), **(results.get("group_subtasks") or {})}
    while members:
        inner = [g for g, its in within.items() if g not in found and {*members} & {*its}]
        members = [group for group in inner if group != task]
        found += members
    return found


def read_results(evals: Path, arms: Sequence[str]) -> dict[str, Any]:
    """Reads results.json of every arm. Raises RunError for a missing arm or data that differ."""
    missing = [arm for arm in arms if not (evals / arm / "results.json").exists()]
    if missing:
        raise RunError(
            f"{evals.parent} has no evaluation of {', '.join(missing)}; run `vlopd eval {evals.parent}`"
        )
    results = {arm: read_record(evals / arm / "results.json") for arm in arms}
    first = arms[0]
    for arm in arms[1:]:
        mine, theirs = (results[name]["data_digest"] for name in (first, arm))
        if mine != theirs:
            task = next(t for t in {**mine, **theirs} if mine.get(t) != theirs.get(t))
            raise RunError(
                f"{first} and {arm} were evaluated with different data_digest on {task} "
                f"({mine.get(task)} and {theirs.get(task)}) and cannot be compared; delete the older of "
                f"{evals / first} and {evals / arm} and evaluate again (imported scores with the settings of the run)"
            )
    return results


def read_tasks(
    evals: Path, results: Mapping[str, Any], arms: Sequence[str], config: EvalConfig
) -> tuple[list[PairedScores], dict[str, str]]:
    """Reads all tasks of the arms' evaluations: (a group's total before its tasks, {task: why it is not compared}).

    Raises RunError where the arms have different questions, and ConfigError for a metric that a task lacks.
    """
    first = results[arms[0]]
    totals = {
        group: its
        for group, its in (first.get("totals") or {}).items()
        if set(its["members"]) <= first["data_digest"].keys()
    }
    # the first total of several, so that a task is in one place
    group_of = {task: group for group, its in reversed(totals.items()) for task in its["members"]}
    made = first.get("leaves")  # of lm-eval, results are in the order in which they were imported
    asked = [made.get(task, [task]) for task in config.tasks] if made else []
    leaves = {
        task: TaskRows(evals, results, arms, task)
        for task in sorted(first["data_digest"], key=lambda t: [t not in its for its in asked])
    }
    groups = {task: _groups_of(first, task) for task in leaves}
    known = {name for task in leaves for name in (task, *groups[task])}
    for name in config.metric:
        if _key_in({name: ""}, *known) is None:
            raise ConfigError(
                f"eval.metric: {name!r} is no task of this evaluation; there are {', '.join([*totals, *leaves])}"
            )
    found: list[PairedScores] = []
    not_compared: dict[str, str] = {}
    for name in _in_order(totals, leaves, group_of):
        if name in totals:
            made = _total(name, totals[name], leaves, config)
        else:
            made = leaves[name].paired(config, groups[name])
        if isinstance(made, str):
            not_compared[name] = made
            continue
        found.append(made)
        if not made.members and not _key_in(config.metric, name, *groups[name]):
            not_compared |= leaves[name].passed_over(made.metric)
    within = {member: its.task for its in reversed(found) for member in its.members or ()}
    # tasks that are in no total stand for themselves
    return [replace(its, group=within.get(its.task)) for its in found], not_compared


def _in_order(
    totals: Mapping[str, Any], leaves: Mapping[str, Any], group_of: Mapping[str, str]
) -> Iterator[str]:
    """Tasks in the order of their evaluation, a group before the first of its tasks and these together."""
    done: set[str] = set()
    for task in leaves:
        names = [task]
        if (group := group_of.get(task)) is not None:
            names = [group, *totals[group]["members"]]
        for name in names:
            if name not in done:
                done.add(name)
                yield name
    yield from (group for group in totals if group not in done)  # whose tasks are in another


class TaskRows:
    """The rows of one task, of all arms, joined on (doc_id, doc_hash) in the first arm's order."""

    def __init__(self, evals: Path, results: Mapping[str, Any], arms: Sequence[str], task: str):
        self.evals, self.results, self.arms, self.task = evals, results, arms, task

    def path(self, arm: str) -> Path:
        return self.evals / arm / f"samples_{self.task}.jsonl"

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        """{arm: rows in the first arm's order}. Raises RunError where the questions differ."""
        tables: dict[str, dict[Key, Row]] = {}
        for arm in self.arms:
            path, rows = self.path(arm), read_answers(self.path(arm))
            tables[arm] = {(row["doc_id"], row["doc_hash"]): row for row in rows}
            if len(tables[arm]) < len(rows):
                raise RunError(f"{path} has several rows per question; evaluate {arm} again")
            if not rows:
                raise RunError(f"{path} has no rows; evaluate {arm} again")
            first = tables[self.arms[0]]
            if tables[arm].keys() != first.keys():
                unpaired = len(tables[arm].keys() ^ first.keys())
                raise RunError(
                    f"{self.arms[0]} ({len(first)} questions) and {arm} ({len(tables[arm])}) differ in "
                    f"{unpaired} questions of {self.task}; delete evals/ and evaluate again"
                )
        order = list(tables[self.arms[0]])
        return {arm: [table[key] for key in order] for arm, table in tables.items()}

    @property
    def rows(self) -> list[Row]:
        """The first arm's."""
        return self.tables[self.arms[0]]

    @cached_property
    def columns(self) -> list[str]:
        """The metrics that every row of every arm has, in the first row's order."""
        return [
            name
            for name in self.rows[0]
            if name not in NOT_METRICS
            and all(row.get(name) is not None for rows in self.tables.values() for row in rows)
        ]

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """How each metric is aggregated, from the first arm's results that say so."""
        found: dict[str, dict[str, Any]] = {name: {"aggregation": "mean"} for name in self.columns}
        for arm in reversed(self.arms):
            found |= (self.results[arm].get("metrics") or {}).get(self.task, {})
        for name, its in found.items():
            if its["aggregation"] == "mean" and name in self.columns and self.is_item(name):
                its = {**its, "aggregation": None}
            found[name] = its
        return found

    def is_item(self, column: str) -> bool:
        return not isinstance(self.rows[0][column], (int, float))

    @property
    def clusters(self) -> list[str] | None:
        """The clusters of the questions; None where there are none, or one per question, which is no clustering."""
        named = [row.get("cluster") for row in self.rows]
        if None in named or len(set(named)) == len(named):
            return None
        return [str(cluster) for cluster in named]

    def metric(self, config: EvalConfig, groups: Sequence[str]) -> tuple[str | None, str | None]:
        """(the compared metric, None) or (None, why there is none). Raises ConfigError for one that is not there."""
        column = chosen_metric(self.task, self.facts, self.columns, config.metric, groups)
        if column is not None:
            why = corpus_metrics.why_not(column, self.facts.get(column, {}))
            return (column, None) if why is None else (None, why)
        first = self.results[self.arms[0]]
        if self.task not in (first.get("metrics") or {}):  # of an earlier version
            why = first.get("not_compared", {}).get(self.task)
            return first["primary_metric"].get(self.task), why
        return metric_of(self.task, self.facts, self.columns, {})

    def passed_over(self, metric: str) -> dict[str, str]:
        """{task (metric): why it is not compared} of the task's metrics before the one that is."""
        before = self.columns[: self.columns.index(metric)]
        found = {name: corpus_metrics.why_not(name, self.facts.get(name, {})) for name in before}
        return {f"{self.task} ({name})": why for name, why in found.items() if why}

    def scores(self, column: str) -> dict[str, Scores]:
        """The metric of every question, by arm. Raises RunError where it is no number.

        Without facts on the metric, of an earlier version, also where it is not in [0, 1].
        """
        most = sys.float_info.max if "higher_is_better" in self.facts.get(column, {}) else 1
        for arm, rows in self.tables.items():
            for row in rows:
                value = row.get(column)
                if not isinstance(value, (int, float)) or not 1 - most <= value <= most:
                    rule = "is no number" if most > 1 else "must be in [0, 1]"
                    raise RunError(
                        f"{self.path(arm)}: question {row['doc_id']} has {column} = {value}, which {rule}; "
                        f"evaluate {arm} again"
                    )
        return {
            arm: np.array([float(row[column]) for row in rows]) for arm, rows in self.tables.items()
        }

    def paired(self, config: EvalConfig, groups: Sequence[str]) -> PairedScores | str:
        """The task's paired scores, or why it is not compared. `groups`: those that it is in."""
        column, why = self.metric(config, groups)
        if column is None:
            return str(why)
        facts = self.facts.get(column, {"aggregation": "mean"})
        shared: dict[str, Any] = {
            "groups": [row["group"] for row in self.rows],
            "clusters": self.clusters,
            "higher_is_better": facts.get("higher_is_better", True),
            "lengths": self.lengths,
        }
        scores = {} if self.is_item(column) else self.scores(column)
        if facts["aggregation"] != "mean" or _outside(scores):
            items = {arm: [row[column] for row in rows] for arm, rows in self.tables.items()}
            corpus = corpus_metrics.CorpusMetric(facts["aggregation"], items)
            return PairedScores(self.task, column, {}, further={}, corpus=corpus, **shared)
        return PairedScores(
            self.task,
            column,
            scores,
            further=self.further(column),
            outcomes={arm: self.outcomes(arm, column) for arm in self.arms},
            **shared,
        )

    def further(self, column: str) -> dict[str, dict[str, Scores]]:
        """Scores of the other metrics in [0, 1] that are means over questions."""
        found = {}
        for name in self.columns:
            facts = self.facts.get(name, {})
            if name in (column, "extraction_failure") or facts.get("aggregation") != "mean":
                continue
            if not self.is_item(name) and not _outside(scores := self.scores(name)):
                found[name] = scores
        return found

    def outcomes(self, arm: str, column: str) -> dict[str, float] | None:
        """Fractions of the arm's answers by OUTCOMES, of this metric."""
        found: list[str | None] = []
        for row in self.tables[arm]:
            if row.get("truncated") is None:
                return None  # of an earlier version, imported, or not generated
            if isinstance(row.get("outcome"), str) and row["outcome"].startswith("["):
                if self.results[arm]["primary_metric"].get(self.task) != column:
                    return None  # the rows have no single samples' scores on other metrics
                found += json.loads(row["outcome"])
            else:
                unreadable = row.get("extraction_failure", 0) == 1
                found.append(outcome_of(row[column], row["truncated"] == 1, unreadable))
        if not found or None in found:
            return None
        return {name: found.count(name) / len(found) for name in OUTCOMES}

    @property
    def lengths(self) -> dict[str, dict[str, float | None]]:
        found = {}
        for arm, its in self.results.items():
            own = {name: (its.get(name) or {}).get(self.task) for name in LENGTHS}
            found[arm] = own | {
                key: value
                for key, value in ((its.get("thinking") or {}).get(self.task) or {}).items()
                if key in LENGTHS
            }
        return found


def _outside(scores: Mapping[str, Scores]) -> bool:
    """Whether any score is not in [0, 1]."""
    return any(x.min() < 0 or x.max() > 1 for x in scores.values())


def _total(
    name: str, about: Mapping[str, Any], leaves: Mapping[str, TaskRows], config: EvalConfig
) -> PairedScores | str:
    """The total of a group: its tasks' questions joined, as lm-eval averages them. Or why it is not compared.

    By size, a question counts the same in every task; else every task does.
    """
    key = _key_in(config.metric, name)
    chosen = config.metric[key] if key else None
    parts: dict[str, tuple[TaskRows, str]] = {}
    for task in about["members"]:
        its = leaves[task]
        wanted = {task: chosen or f"{about['metric']},{about.get('filter') or ''}"}
        column = chosen_metric(task, its.facts, its.columns, wanted, strict=False)
        if column is None and not chosen:
            wanted = {task: about["metric"]}
            column = chosen_metric(task, its.facts, its.columns, wanted, strict=False)
        if column is None and chosen:
            raise ConfigError(
                f"eval.metric.{key}: {task} has no metric {chosen!r}; it has {'; '.join(its.columns)}"
            )
        if column is not None:  # lm-eval's totals are over the tasks that have the metric
            parts[task] = its, column
    if not parts:
        return f"none of its tasks has the metric {about['metric']}"
    for task, (its, column) in parts.items():
        aggregation = its.facts.get(column, {}).get("aggregation", "mean")
        if aggregation != "mean" or its.is_item(column) or _outside(its.scores(column)):
            return f"{task}'s {column} is no mean of numbers in [0, 1]"
    tasks = [its for its, _ in parts.values()]
    arms, sizes = tasks[0].arms, [len(its.rows) for its in tasks]
    columns = {column for _, column in parts.values()}

    def joined(one: Callable[[TaskRows, str], Scores]) -> Scores:
        return np.concatenate([one(its, column) for its, column in parts.values()])

    weights = None
    if not about["weight_by_size"]:
        weights = np.concatenate([np.full(n, sum(sizes) / (len(sizes) * n)) for n in sizes])
    clusters = None
    if any(its.clusters for its in tasks):
        # equal names in two tasks are one cluster (the same picture); if they are not, intervals are wider
        clusters = [
            own[i] if own else f"{its.task} {i}"
            for its in tasks
            for own in [its.clusters]
            for i in range(len(its.rows))
        ]
    share = np.array(sizes if weights is None else np.ones(len(sizes)), dtype=float)
    share /= share.sum()

    def pooled(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.dot(share, known)) if len(known) == len(share) else None

    outcomes: dict[str, dict[str, float] | None] = {}
    for arm in arms:
        each = [its.outcomes(arm, column) for its, column in parts.values()]
        outcomes[arm] = (
            None
            if None in each
            else {o: pooled([e[o] for e in each if e]) or 0.0 for o in OUTCOMES}
        )
    first, metric = parts[next(iter(parts))]
    return PairedScores(
        name,
        metric if len(columns) == 1 else about["metric"],
        {arm: joined(lambda its, column, arm=arm: its.scores(column)[arm]) for arm in arms},  # type: ignore[misc]
        [None] * sum(sizes),
        clusters,
        {},
        higher_is_better=first.facts.get(metric, {}).get("higher_is_better", True),
        members=list(parts),
        sizes=sizes,
        weights=weights,
        outcomes=outcomes,
        lengths={
            arm: {key: pooled([its.lengths[arm][key] for its in tasks]) for key in LENGTHS}
            for arm in arms
        },
    )
