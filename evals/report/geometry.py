"""Figures of the geometry tables, for the report of a run and for any checkpoints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.report import figures, tables
from vlopd.run.schemas.read import read_record

HEAT_MAPS = (("frac_delta_eq_0", ""), ("top_energy_ratio", "k=16"))
"""(metric, parameter) drawn as heat maps: one that rounding explains, one that it does not."""
MASKS = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low")
OVERLAPS = ("first_covered_by_second", "second_covered_by_first", "update_jaccard")
TRAJECTORIES = (
    ("cosine_to_final", "", "cosine to the final update"),
    ("left_subspace_similarity_to_final", "k=16", "similarity of the top-16 left subspace"),
    ("frac_delta_eq_0", "", "unmoved coordinates"),
    ("stable_rank", "", "stable rank, median"),
)
PALETTE = ("#d55e00", "#009e73", "#b9659a", "#e69f00", "#56b4e9", "#8a8f98", "#7a6fb0")
CLOSED = "closed_form"
MANY_PAIRS = 10
"""Most pairs of updates whose overlaps are drawn one by one."""


class Drawing(NamedTuple):
    """A figure and its caption."""

    figure: Figure
    words: str


def draw(tidy: pd.DataFrame) -> dict[str, Drawing]:
    """Figures of one geometry.csv, by name; figures without rows are omitted."""
    tidy = tidy.assign(parameter=tidy.parameter.fillna(""), null=tidy.null.fillna(""))
    found = _heat_maps(tidy)
    spectrum_rows = tidy[
        tidy.name.eq("[median]")
        & tidy.metric.eq("top_energy_ratio")
        & tidy.parameter.str.startswith("k=")
        & tidy.value.notna()
    ]
    if not spectrum_rows.empty:
        at = spectrum_rows.assign(at=spectrum_rows.parameter.str[2:].astype(int))
        figure = lines(at, "largest singular values", "share of the update's energy", True)
        words = "Energy of the update's largest singular values, median over matrices, against the nulls"
        found["spectrum"] = Drawing(figure, words)
    metrics = {f"{mask}_update_overlap_ratio": mask.replace("_", " ") for mask in MASKS}
    own = tidy[
        tidy.name.eq("[all]") & tidy.metric.isin(metrics) & tidy.parameter.eq("ratio=0.1,atol=0")
    ]
    if own.value.notna().any():
        label = "moved coordinates inside the mask (%), ratio 0.1"
        figure = dots(own.assign(label=own.metric.map(metrics)), label)
        found["masks"] = Drawing(figure, "Moved coordinates inside each mask, against the nulls")
    return found


def draw_overlap(table: pd.DataFrame) -> dict[str, Drawing]:
    """The figure of an overlap.csv: coordinates moved by both; of more than MANY_PAIRS pairs the cosines as a map."""
    table = table.assign(null=table.null.fillna(""))  # empty without nulls
    pairs = table[["first", "second"]].drop_duplicates()
    if len(pairs) > MANY_PAIRS:
        return _cosine_map(table)
    own = table[
        table.name.eq("[all]") & table.metric.isin(OVERLAPS) & table.parameter.eq("atol=0")
    ].copy()
    if own.empty:
        return {}
    own["label"] = [
        {
            OVERLAPS[0]: f"{row.first} in {row.second}",
            OVERLAPS[1]: f"{row.second} in {row.first}",
            OVERLAPS[2]: f"{row.first}, {row.second}: Jaccard",
        }[row.metric]
        for row in own.itertuples()
    ]
    words = "Coordinates moved by both of two updates, against independent nulls"
    return {"overlap": Drawing(dots(own, "overlap of moved coordinates (%)"), words)}


def _cosine_map(table: pd.DataFrame) -> dict[str, Drawing]:
    """Cosines of all pairs of updates, with 1 on the diagonal."""
    own = table[table.name.eq("[all]") & table.metric.eq("delta_cosine") & table.value.notna()]
    if own.empty:
        return {}
    own = own.drop_duplicates(["first", "second"])
    order = list(dict.fromkeys([*own["first"], *own.second]))
    cosines = pd.DataFrame(float("nan"), index=order, columns=order)
    for row in own.itertuples():
        cosines.loc[row.first, row.second] = cosines.loc[row.second, row.first] = row.value
    for name in order:
        cosines.loc[name, name] = 1.0
    figure = figures.heat(cosines, pd.DataFrame(), "Cosine of the updates")
    return {"overlap": Drawing(figure, "Cosine of each pair of updates")}


def draw_trajectory(table: pd.DataFrame) -> dict[str, Drawing]:
    """The figure of a trajectory.csv."""
    table = table.assign(parameter=table.parameter.fillna(""), null=table.null.fillna(""))
    found = {}
    for metric, parameter, label in TRAJECTORIES:
        own = table[
            table.name.isin(["[all]", "[median]"])
            & table.metric.eq(metric)
            & table.parameter.eq(parameter)
            & table.value.notna()
        ]
        if own.step.nunique() > 1:
            figure = lines(own.assign(at=own.step), "optimizer step", label, False)
            name = f"trajectory-{metric}".replace("_", "-")
            found[name] = Drawing(
                figure, f"{label[0].upper()}{label[1:]} over checkpoints, against the nulls"
            )
    return found


def _heat_maps(tidy: pd.DataFrame) -> dict[str, Drawing]:
    """Heat maps (layer by module) of HEAT_MAPS, and of their excess over the first null."""
    rows = tidy[(tidy.status == "ok") & tidy.layer.notna() & ~tidy.name.str.startswith("[")]
    drawn = [null for null in rows.null.unique() if null not in ("", CLOSED)]
    rows = rows[rows.null.eq(drawn[0] if drawn else "")]
    found = {}
    for metric, parameter in HEAT_MAPS:
        chosen = rows[(rows.metric == metric) & (rows.parameter == parameter)]
        if chosen.empty:
            continue
        words = tables.label({"metric": metric, "parameter": parameter, "name": "[all]"})
        place = chosen.component + " " + chosen.layer.astype(int).astype(str)
        # in the model's order, not the alphabet's
        grid = chosen.assign(
            place=pd.Categorical(place, place.unique(), ordered=True),
            module=pd.Categorical(chosen.module, chosen.module.unique(), ordered=True),
        )
        values, excess = (
            grid.pivot_table(column, "place", "module", "mean", observed=True)
            for column in ("value", "excess")
        )
        name = metric.replace("_", "-")
        text = f"{words} by layer and module (left), and its excess over the null (right)"
        if drawn:
            text = text.replace("the null", f"the {drawn[0].replace('_', ' ')} null")
        found[name] = Drawing(figures.heat(values, excess, words), text)
    return found


def lines(rows: pd.DataFrame, across: str, label: str, logarithmic: bool) -> Figure:
    """The observed value over column `at`, and every null's mean +- 2 standard deviations."""
    nulls = [null for null in rows.null.unique() if null not in ("", CLOSED)]
    with matplotlib.rc_context(figures.STYLE):
        figure, (axes,) = figures.canvas(2.4 + _legend_height(nulls))
        observed = rows.drop_duplicates("at").sort_values("at")
        axes.plot(
            observed["at"],
            observed.value,
            "o-",
            ms=3.5,
            color=figures.COLOURS["full"],
            label="update",
            zorder=3,
        )
        for null, colour in zip(nulls, PALETTE * 9, strict=False):
            own = rows[rows.null.eq(null)].sort_values("at")
            spread = 2 * own.null_sd.fillna(0)
            axes.plot(own["at"], own.null_mean, "--", lw=1.2, color=colour, label=title(null))
            axes.fill_between(
                own["at"],
                own.null_mean - spread,
                own.null_mean + spread,
                color=colour,
                alpha=0.2,
                lw=0,
            )
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(across)
        axes.set_ylabel(textwrap.fill(label, 27))
        axes.grid()
        figure.legend(loc="outside upper left", ncols=3, fontsize=9, handlelength=2.6)
    return figure


def dots(rows: pd.DataFrame, label: str) -> Figure:
    """The observed value of every `label` in percent, and below it every null's mean +- 2 standard deviations."""
    names = list(rows.label.unique())
    nulls = [null for null in rows.null.unique() if null]
    with matplotlib.rc_context(figures.STYLE):
        height = len(names) * (0.24 + 0.09 * len(nulls))
        figure, (axes,) = figures.canvas(0.6 + height + _legend_height(nulls))
        below = min(0.2, 0.65 / max(len(nulls), 1))
        first = -below * len(nulls) / 2
        for i, (null, colour) in enumerate(zip(nulls, PALETTE * 9, strict=False)):
            own = rows[rows.null.eq(null)]
            y = [names.index(name) + first + below * (i + 1) for name in own.label]
            axes.errorbar(
                100 * own.null_mean, y, xerr=200 * own.null_sd.fillna(0), fmt="D", ms=3.5,
                color=colour, lw=1.5, label=title(null),
            )  # fmt: skip
        observed = rows.drop_duplicates("label")
        y = [names.index(name) + first for name in observed.label]
        axes.plot(
            100 * observed.value, y, "o", ms=5.5, color=figures.COLOURS["full"], label="update"
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
    return figure


def title(null: str) -> str:
    return f"null: {null.replace('_', ' ')}"


def _legend_height(nulls: Sequence[str]) -> float:
    """Height in inches of a three-column legend of the update and the nulls."""
    return 0.17 * math.ceil((1 + len(nulls)) / 3)


def left_out(folder: Path) -> str:
    """A sentence on the tensors that a geometry leaves out of the comparison; empty if none."""
    return read_record(folder / "summary.json").get("left_out", {}).get("summary", "")


def is_unmoved(summary: Mapping[str, Any]) -> bool:
    """Whether no coordinate of the update of a summary.json moved, so that most of its measures are undefined."""
    return bool(summary.get("matrices")) and summary["matrices"] == summary["matrices_not_moved"]


def unmeasured(tidy: pd.DataFrame) -> dict[str, int]:
    """{reason: number of tensors} of the measures without an exact value in one geometry.csv."""
    tensors = tidy[(tidy.status != "ok") & ~tidy.name.str.startswith("[")]
    return tensors.groupby("reason").name.nunique().to_dict()
