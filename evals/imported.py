"""What the results files of finished evaluations say of metrics and groups: lm-eval's own, and a run's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.registry import higher_is_better_registry, metric_agg_registry

from evals.scoring import name_of_aggregation


def imported_facts(
    results: Mapping[str, Any], task: str, columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{column: its entry as `scoring.metric_facts` gives it}, by a run's results, lm-eval's config, or its registry.

    A function of a file is only accepted from a package, since results of others must not name code to run.
    """
    given = (results.get("metrics") or {}).get(task) or {}
    configured = metric_list_of(results, task)
    better = (results.get("higher_is_better") or {}).get(task) or {}
    found = {}
    for column in columns:
        if column in given:
            facts = dict(given[column])
            if str(facts["aggregation"]).startswith("/"):
                facts["aggregation"] = None
            found[column] = facts
            continue
        metric, _, _ = column.partition(",")
        name = configured.get(metric, {}).get("aggregation")
        if name is None and metric in metric_agg_registry:
            name = name_of_aggregation(metric_agg_registry.get(metric))
        elif name is not None and not str(name).replace("+", "").isidentifier():
            name = None  # a function's source, as lm-eval writes it
        elif name is None:
            name = "mean"
        more = configured.get(metric, {}).get("higher_is_better", better.get(metric))
        if more is None and metric in higher_is_better_registry:
            more = higher_is_better_registry.get(metric)
        facts = {"aggregation": name, "higher_is_better": more is not False}
        found[column] = {**facts, "filter": _first_filter(results, task, metric)}
    return found


def metric_list_of(results: Mapping[str, Any], task: str) -> dict[str, Mapping[str, Any]]:
    """{metric: its settings} of the metric_list in a task's recorded configuration."""
    listed = ((results.get("configs") or {}).get(task) or {}).get("metric_list") or []
    return {its["metric"]: its for its in listed if isinstance(its, Mapping) and "metric" in its}


def _first_filter(results: Mapping[str, Any], task: str, metric: str) -> str | None:
    """The name of the filter that lm-eval reports a metric of first, from its keys `metric,filter`."""
    entry = (results.get("results") or {}).get(task) or {}
    names = (key.partition(",") for key in entry if isinstance(key, str))
    return next((filter for name, _, filter in names if name == metric), None)


def leaves_of(results: Mapping[str, Any], group: str) -> list[str]:
    """The tasks of a group, by lm-eval's `group_subtasks`; empty for no group."""
    subtasks = results.get("group_subtasks") or {}
    found: dict[str, None] = {}

    def visit(name: str, seen: frozenset[str]) -> None:
        for member in subtasks.get(name, ()):
            if member in subtasks and member not in seen:
                visit(member, seen | {member})
            elif member not in subtasks:
                found[member] = None

    visit(group, frozenset({group}))
    return list(found)


def totals_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """{outermost group: how its total is made, as `scoring.group_total` gives it}.

    lm-eval's results do not say whether a total is weighted by size: it is taken as the one that its value agrees with.
    """
    if "totals" in results:
        return dict(results["totals"])
    entries = results.get("groups") or {}
    within = {name for names in (results.get("group_subtasks") or {}).values() for name in names}
    found = {}
    for group, its in entries.items():
        keys = [
            key
            for key, value in its.items()
            if "," in key and "_stderr" not in key and isinstance(value, float)
        ]
        members = leaves_of(results, group)
        if group in within or not keys or not members:
            continue
        metric, _, filter = keys[0].partition(",")
        scored = [results["results"].get(task) or {} for task in members]
        values = [own[keys[0]] for own in scored if keys[0] in own]
        plain = sum(values) / len(values) if values else math.nan
        sizes = [own.get("sample_len", 1) for own in scored if keys[0] in own]
        weighted = sum(v * n for v, n in zip(values, sizes, strict=True)) / max(sum(sizes), 1)
        by_size = abs(its[keys[0]] - weighted) <= abs(its[keys[0]] - plain)
        found[group] = {
            "members": members,
            "metric": metric,
            "filter": filter,
            "weight_by_size": by_size,
        }
    return found
