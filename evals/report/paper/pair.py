"""A run's files as the paper's tables read them: its groups of seeds, their geometry, curves and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from evals.report import groups, tables
from evals.report.page import rows_of
from evals.report.read import read_table
from vlopd.config.experiment import ExperimentConfig
from vlopd.run.folder import RunFolder
from vlopd.run.links import check_links
from vlopd.run.schemas.read import read_record

Key = tuple[str, str, str]
"""(metric, parameter, name) of a geometry row."""


class Group(NamedTuple):
    """Arms that differ only in seeds, named after the first, with the signal nulls of them."""

    name: str
    arms: tuple[str, ...]
    nulls: Mapping[str, tuple[str, ...]]
    of: str
    """The arm that geometry/groups.csv names the group by."""

    @property
    def label(self) -> str:
        n = len(self.arms)
        return f"{self.name}, {n} seeds" if n > 1 else f"{self.name}, n = 1"


class Pair:
    """One run's files."""

    def __init__(self, name: str, run: RunFolder, config: ExperimentConfig):
        self.name, self.run, self.config = name, run, config
        shown = ("arms", "masks", "geometry", "evals", "tokens", "base_kl", "compare")
        run.checksums.check_finished(*shown)
        check_links(run, config, *shown)
        self.groups_files = groups.read_groups(run)
        self.labels = self.groups_files.labels()
        self.compared: Mapping[str, Any] = read_record(run.compare) if run.compare.exists() else {}
        tasks = self.compared.get("tasks", {})
        self.task = next((name for name, its in tasks.items() if not its["group"]), None)
        self.entry: Mapping[str, Any] = tasks[self.task] if self.task else {}

    @cached_property
    def measured(self) -> list[str]:
        """The arms whose geometry is measured."""
        arms = self.config.geometry.arms
        return [arm for arm in arms if (self.run.geometry(arm) / "summary.json").exists()]

    def groups(self, arms: Sequence[str]) -> list[Group]:
        """These arms in groups of one training, without the signal nulls, full first."""
        roles = self.config.roles
        found, seen = [], set(self.labels)
        for arm in sorted(arms, key=lambda arm: roles.of[arm] != "full"):
            if arm in seen:
                continue
            alike = next((its for its in roles.seed_groups if arm in its), (arm,))
            alike = tuple(its for its in alike if its in arms and its not in self.labels)
            seen.update(alike)
            of = next((each for each in alike if self.groups_files.nulls_of(each)), alike[0])
            name = alike[0].removesuffix("-0") if len(alike) > 1 else arm
            found.append(Group(name, alike, self.groups_files.nulls_of(of), of))
        return found

    @cached_property
    def geometry(self) -> dict[str, dict[Key, dict[str, dict[str, Any]]]]:
        """{arm: {(metric, parameter, name): {null: row}}} of aggregate rows."""
        found: dict[str, dict[Key, dict[str, dict[str, Any]]]] = {}
        for arm in self.measured:
            table = read_table(self.run.geometry(arm) / "geometry.csv")
            table = table[table.name.str.startswith("[")]
            text = ("metric", "parameter", "name", "null", "reason")
            table = table.assign(**{column: table[column].fillna("") for column in text})
            own = found.setdefault(arm, {})
            for row in rows_of(table):
                own.setdefault((row["metric"], row["parameter"], row["name"]), {})[row["null"]] = (
                    row
                )
        return found

    def values(self, arms: Sequence[str], key: Key) -> list[float]:
        """The values of a measure in these arms, of those that have one."""
        rows = (next(iter(self.geometry.get(arm, {}).get(key, {}).values()), None) for arm in arms)
        return [row["value"] for row in rows if row is not None and row["value"] is not None]

    @cached_property
    def curves(self) -> dict[str, dict[str, float]]:
        """{arm: final, mean of the last five and peak} of the first held-out task."""
        table = tables.held_out(tables.held_out_scores(self.run, self.config))
        if table.empty:
            return {}
        first = table[table.task == table.task.iloc[0]]
        return {row["arm"]: row for row in first.to_dict("records")}

    def is_shown(self, arm: str) -> bool:
        """Whether an arm has scores; candidates of a sweep have only a curve, and are not compared."""
        return arm in (self.entry["arms"] if self.entry else self.curves)

    @cached_property
    def records(self) -> dict[str, Any]:
        return tables.arm_records(self.run, self.config)

    def scored(self, arm: str) -> Mapping[str, Any] | None:
        """The entry of an arm in the comparison on the first task."""
        found: Mapping[str, Any] | None = self.entry.get("arms", {}).get(arm)
        return found
