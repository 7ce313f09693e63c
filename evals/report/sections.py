"""The sections on scores of a run's report and of a comparison of models, and the page around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report import figures, tables
from evals.report.examples import Examples
from evals.report.page import Context, add_figure, environment, rows_of
from evals.report.verdict import full_name

EMPTY: Context = {
    "config": None,
    "recipe": [],
    "records": {},
    "additions": None,
    "training": [],
    "tuning": None,
    "own_metrics": [],
    "curves": [],
    "held_out": [],
    "geometry": [],
    "overlap": [],
    "probes": [],
    "alignment": [],
    "masks": [],
    "identity": [],
    "generations": [],
    "examples": None,
    "beside": "",
}
"""Parts of a report that a comparison without a run lacks."""


def render_report(context: Context, examples: Examples, beside: Path) -> str:
    """The report's page; examples that do not fit it are written to the folder `beside`, next to it."""
    examples.write_beside(beside)
    shown = examples if examples.index else None
    name = beside.name if len(examples.chunks) > 1 else ""
    template = environment().get_template("report.html.j2")
    return template.render({**context, "examples": shown, "beside": name})


def scores_context(
    compared: Mapping[str, Any], data: Mapping[str, pd.DataFrame], drawn: dict[str, str]
) -> Context:
    """Template variables of the comparison: every task that is in no group, and a table of all."""
    roles = {its["role"] for its in compared["arms"].values()}
    top = [task for task, entry in compared["tasks"].items() if not entry.get("group")]
    return {
        "compared": compared,
        "full": full_name(compared["arms"]),
        "has_full": "full" in roles,
        "has_teacher": "teacher" in roles,
        "base_name": _base_name(compared),
        "level": f"{100 * compared['confidence']:g}" if compared["tasks"] else "95",
        "family": _family(compared),
        "overview": _overview(compared, data["arms"], top) if len(top) > 1 else None,
        "tasks": [_task_context(name, compared, data, drawn) for name in top],
    }


def _base_name(compared: Mapping[str, Any]) -> str:
    """What the base is called in words: by its name where it is a model of a comparison; empty without one."""
    base = next((arm for arm, its in compared["arms"].items() if its["role"] == "base"), "")
    return "the base" if base == "base" else base


def _family(compared: Mapping[str, Any]) -> str:
    """What Holm's correction is over, in words."""
    if family := compared.get("family"):
        tasks = len(family["tasks"])
        on = f" on {tasks} task{'s' if tasks != 1 else ''}"
        return f"the {family['name']} ({family['tests']} tests{on})"
    return "the declared contrasts" if compared.get("declared_contrasts") else "this table"


def _overview(compared: Mapping[str, Any], rows: pd.DataFrame, top: Sequence[str]) -> Context:
    """Arms by tasks, as `tables.scores` orders arms, controls by their mean over the tasks."""
    shown = rows[rows.task.isin(top)].drop_duplicates("arm")
    fractions = rows[rows.task.isin(top) & (rows.scale == "fraction")]
    means = fractions.groupby("arm")["mean"].mean()
    order = sorted(
        shown.itertuples(),
        key=lambda row: (
            tables.ORDER.index(row.role),
            -means.get(row.arm, 0.0) if row.role in ("pooled", "control") else 0,
        ),
    )
    columns = []
    for task in top:
        entry = compared["tasks"][task]
        own = entry.get("scale", "fraction") != "fraction"
        better = "" if entry.get("higher_is_better", True) else ", lower is better"
        columns.append(f"{task} ({entry['metric']}{better})" if own or better else task)
    cells = {(its["task"], its["arm"]): its for its in rows_of(rows)}
    lines = [(r.arm, r.role, [cells.get((task, r.arm)) for task in top]) for r in order]
    return {"columns": columns, "rows": lines}


def _task_context(
    task: str, compared: Mapping[str, Any], data: Mapping[str, pd.DataFrame], drawn: dict[str, str]
) -> Context:
    """Template variables of one task; adds its figures to `drawn`."""
    entry = compared["tasks"][task]
    own = {name: table[table.task == task] for name, table in data.items() if "task" in table}
    own = {name: own.get(name, pd.DataFrame()) for name in data}
    rows, name = own["arms"], slug(task)
    chance = (entry["chance"] or {}).get("all")
    scale = entry.get("scale", "fraction")
    times = 100 if scale == "fraction" else 1
    percent = " (%)" if scale == "fraction" else ""
    share = f"{100 * compared['confidence']:g} % interval"
    label = f"{entry['metric']}{percent}, {share}"
    add_figure(drawn, f"scores-{name}", figures.dots(rows, chance, label, times))
    reference = _reference(compared)
    column = "difference_" if reference["role"] == "full" else "gain_"
    differences = rows[rows.arm != reference["arm"]].dropna(subset=[f"{column}mean"])
    if not differences.empty:
        names = {f"{column}{key}": key for key in ("mean", "low", "high")}
        plotted = differences[["arm", "role", *names]].rename(columns=names)
        unit = "percentage points" if scale == "fraction" else entry["metric"]
        forest = figures.forest(
            plotted, f"difference to {reference['words']} ({unit}), {share}", times
        )
        add_figure(drawn, f"differences-{name}", forest)
    if scale == "fraction":
        _draw_density(rows, name, f"{entry['metric']} (%)", drawn)
    return {
        "name": task,
        "slug": name,
        "chance": chance,
        "entry": entry,
        "scale": scale,
        "reference": "full" if reference["role"] == "full" else reference["arm"],
        "reference_arm": reference["arm"],
        "reference_words": reference["words"],
        "reference_column": column,
        "trained": bool(rows.density.notna().any() or rows.trained_parameters.notna().any()),
        "leaves": _leaves(entry, compared, data["arms"]),
        "rows": rows_of(rows),
        "answers": rows_of(own["answers"]),
        "contrasts": rows_of(own["contrasts"]),
        "kinds": _pivot(own["kinds"], lambda row: f"{row['kind']}\nn = {row['n']}"),
        "seeds": rows_of(own["seeds"]),
        "passes": _pivot(own["pass_at"], lambda row: row["metric"]),
        "further": _pivot(own["further"], lambda row: row["metric"]),
        "non_inferior": [
            {"arm": c["a"], "full": c["b"], "why": None, **c["non_inferiority"]}
            for c in entry["contrasts"]
            if c.get("non_inferiority")
        ],
        "no_answer": [
            (arm, its["extraction_failure_fraction"])
            for arm, its in entry["arms"].items()
            if (its["extraction_failure_fraction"] or 0) > 0.01
        ],
    }


def _reference(compared: Mapping[str, Any]) -> dict[str, str]:
    """The arm that others are set against: full training, else the base, else the first arm."""
    roles = {arm: its["role"] for arm, its in compared["arms"].items()}
    for role in ("full", "base"):
        for arm, its in roles.items():
            if its == role:
                words = full_name(compared["arms"]) if role == "full" else arm
                return {"arm": arm, "role": role, "words": words}
    first = next(iter(roles))
    return {"arm": first, "role": roles[first], "words": first}


def _leaves(
    entry: Mapping[str, Any], compared: Mapping[str, Any], rows: pd.DataFrame
) -> Context | None:
    """The tasks of a group by arms, or None for a task."""
    if not entry.get("members"):
        return None
    members = [task for task in entry["members"] if task in compared["tasks"]]
    arms = list(rows[rows.task.isin(members)].arm.unique())
    cells = {(its["task"], its["arm"]): its for its in rows_of(rows[rows.task.isin(members)])}
    lines = [
        (task, compared["tasks"][task]["n"], [cells.get((task, arm)) for arm in arms])
        for task in members
    ]
    return {"columns": arms, "rows": lines}


def _draw_density(rows: pd.DataFrame, name: str, label: str, drawn: dict[str, str]) -> None:
    """Draws score against density, if masked arms have several densities."""
    masked = rows[rows.role.isin(("subnetwork", "control", "transplant")) & (rows.density > 0)]
    if masked.density.round(6).nunique() < 2:
        return
    edges = rows[rows.role.isin(("full", "base", "teacher"))]
    lines = dict(zip(edges.arm, edges["mean"], strict=True))
    add_figure(drawn, f"density-{name}", figures.against_density(masked, lines, label))


def _pivot(table: pd.DataFrame, head: Callable[[Context], str]) -> Context | None:
    """Pivots a tidy table: one row per arm, one column per row of an arm, titled by `head`."""
    if table.empty:
        return None
    rows = [(arm, rows_of(part)) for arm, part in table.groupby("arm", sort=False)]
    return {"columns": ["Arm", *map(head, rows[0][1])], "rows": rows}


def slug(task: str) -> str:
    """A task's name for ids and file names."""
    return "".join(c if c.isalnum() else "-" for c in task)
