"""The report's section on tuned arms: validation scores over the grid, with the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from evals.report import figures
from evals.report.page import Context, add_figure, rows_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.sweeps import Point, words_of
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record


def read_sweeps(run: RunFolder, config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """{group: sweeps/GROUP.json} of the groups of tuned arms that have chosen."""
    found = {group: run.sweep(group) for group in config.sweep_groups}
    return {group: read_record(path) for group, path in found.items() if path.exists()}


def chosen_points(
    config: ExperimentConfig, sweeps: Mapping[str, Mapping[str, Any]]
) -> dict[str, Point]:
    """{arm: its chosen settings} of the tuned arms, and of those that take their choice."""
    groups = {arm: config.sweep_group(arm) or config.follows(arm) for arm in config.arms}
    return {
        arm: sweeps[group]["chosen"] for arm, group in groups.items() if group and group in sweeps
    }


def curves(sweeps: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per group and point: settings in words and by key, score, standard error, n, and whether it is chosen."""
    rows = [
        {
            "group": group,
            "arms": ", ".join(its["candidates"]),
            "settings": words_of(point["settings"]),
            **point["settings"],
            **{key: point[key] for key in ("score", "standard_error", "n")},
            "chosen": point["settings"] == its["chosen"],
            "at_edge": ", ".join(its["at_edge"]),
        }
        for group, its in sweeps.items()
        for point in its["curve"]
    ]
    return pd.DataFrame(rows)


def tuning_context(
    sweeps: Mapping[str, Mapping[str, Any]], table: pd.DataFrame, drawn: dict[str, str]
) -> Context | None:
    """Template variables of the section; None without tuned arms. Adds its figure to `drawn`."""
    if table.empty:
        return None
    first = next(iter(sweeps.values()))
    grids = {tuple(its["grid"]) for its in sweeps.values()}
    key = next(iter(first["grid"]))
    figure = None
    if len(grids) == 1 and len(first["grid"]) == 1 and pd.api.types.is_numeric_dtype(table[key]):
        figure = "tuning"
        add_figure(drawn, figure, _draw(table, key))
    tasks = ", ".join(f"{task} ({its['metric']})" for task, its in first["tasks"].items())
    return {"rows": rows_of(table), "figure": figure, "rule": first["rule"], "tasks": tasks}


def _draw(table: pd.DataFrame, key: str) -> Figure:
    """Validation score over the one swept key, a line per group; a ring marks the choice."""
    with matplotlib.rc_context(figures.STYLE):
        figure, (axes,) = figures.canvas(2.6)
        groups = list(table.groupby("group", sort=False))
        values = sorted(table[key].unique())
        in_logs = values[0] > 0 and values[-1] / values[0] >= 5
        for i, (group, rows) in enumerate(groups):
            colour = figures.VARIANTS[i % len(figures.VARIANTS)]
            ordered = rows.sort_values(key)
            aside = 0.012 * (
                i - (len(groups) - 1) / 2
            )  # so that equal scores do not hide each other
            at = (
                ordered[key] * (values[-1] / values[0]) ** aside
                if in_logs
                else ordered[key] + aside * (values[-1] - values[0])
            )
            axes.errorbar(
                at,
                ordered.score,
                ordered.standard_error,
                color=colour,
                lw=1.2,
                marker="o",
                ms=3,
                label=str(group),
            )
            best = ordered.chosen
            axes.plot(at[best], ordered.score[best], "o", ms=8, mfc="none", mec=colour)
        if in_logs:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(key)
        axes.set_ylabel("validation score")
        if len(groups) > 1:
            axes.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
