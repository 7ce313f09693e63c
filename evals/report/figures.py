"""The report's figures as SVG that inherits the page's text colour, for light and dark themes.

Colours are based on the Okabe-Ito palette (colour-blind safe); text and axes are drawn in a placeholder colour that
becomes `currentColor`. Figures are narrow, to be legible on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {
    "teacher": "#8a8f98",
    "full": "#2b83c6",
    "replicate": "#56b4e9",
    "variant": "#7a6fb0",
    "subnetwork": "#d55e00",
    "transplant": "#b9659a",
    "projection": "#cc9a06",
    "other": "#7a6fb0",
    "pooled": "#009e73",
    "control": "#3fb593",
    "null": "#b8b3a7",
    "base": "#8a8f98",
}
VARIANTS = ("#7a6fb0", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c564b", "#17a2b8", "#7f7f7f")
MOST_POINTS = 400
"""Points of one line of a figure."""
INK = "#010203"
"""Placeholder for the page's text colour."""
WIDTH = 5.2
MARGIN = 0.1
"""Around what is drawn, in inches, like WIDTH."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlopd",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def to_svg(figure: Figure, name: str) -> str:
    """An <svg> element without fixed size or metadata, with unique ids and currentColor as text colour."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        # not savefig, which draws twice to cut the margins
        FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
        shown = figure.get_tightbbox().padded(MARGIN)
    svg, height = buffer.getvalue(), figure.get_figheight()
    box = [72 * x for x in (shown.x0, height - shown.y1, shown.width, shown.height)]
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height|xmlns(:xlink)?)="[^"]*"', "", head)
    view = " ".join(f"{x:.2f}" for x in box)
    head = re.sub(r'viewBox="[^"]*"', f'viewBox="{view}"', head)
    return f"{head}>{body}".strip()


def standalone(svg: str) -> str:
    """The same SVG as a standalone file, for light and dark themes."""
    style = (
        "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d5dae0}}"
        "text{font-family:sans-serif}</style>"
    )
    head, _, body = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'


def canvas(height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def dots(rows: pd.DataFrame, chance: float | None, label: str, scale: float = 100) -> Figure:
    """Mean and interval of each arm (columns arm, role, mean, low, high), times `scale`, top row first.

    Dashed lines mark chance and the teacher. Of fractions, with a scale of 100, the whole range is shown.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = canvas(0.9 + 0.26 * len(rows))
        intervals(axes, rows, scale)
        teacher = rows[rows.role == "teacher"]["mean"]
        lines = {"chance": chance, "teacher": teacher.iloc[0] if len(teacher) else None}
        known = sorted((scale * value, text) for text, value in lines.items() if value is not None)
        # beside each other where they would overlap
        near = len(known) == 2 and scale == 100 and known[1][0] - known[0][0] < 16
        for (value, text), side in zip(known, ("right", "left"), strict=False):
            axes.axvline(value, color=INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6, zorder=0)
            side = side if near else "center"
            axes.text(value, -0.75, text, ha=side, va="bottom", fontsize=9, alpha=0.8)
        axes.set_xlabel(label)
        if scale == 100:
            axes.set_xlim(-2, 102)
    return figure


def forest(rows: pd.DataFrame, label: str, scale: float = 100) -> Figure:
    """Paired differences with intervals (columns arm, role, mean, low, high), times `scale`, and a line at zero."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = canvas(0.8 + 0.26 * len(rows))
        intervals(axes, rows, scale)
        axes.axvline(0, color=INK, lw=0.8, alpha=0.7, zorder=0)
        axes.set_xlabel(label)
    return figure


def comparison(scores: pd.DataFrame, contrasts: pd.DataFrame) -> Figure:
    """Scores of models (columns task, model, metric, mean, low, high) and their contrasts (task, name, mean, low,
    high, scale), in percent or the metric's own unit, with intervals; one row of panels per task."""
    tasks = list(scores.task.unique())
    heights = [
        max(2, (scores.task == task).sum(), (contrasts.task == task).sum()) for task in tasks
    ]
    with matplotlib.rc_context(STYLE):
        size = (1.7 * WIDTH, 0.26 * sum(heights) + 0.9 * len(tasks))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        panels = figure.subplots(len(tasks), 2, squeeze=False, height_ratios=heights)
        for task, (left, right) in zip(tasks, panels, strict=True):
            own = scores[scores.task == task].rename(columns={"model": "arm"})
            differences = contrasts[contrasts.task == task].rename(columns={"name": "arm"})
            fraction = (differences.scale == "fraction").all()
            times, unit = (100, "%") if fraction else (1, "own unit")
            intervals(left, own.assign(role=["base"] + ["other"] * (len(own) - 1)), times)
            intervals(right, differences.assign(role="other"), times)
            right.axvline(0, color=INK, lw=0.8, alpha=0.7, zorder=0)
            left.set_xlabel(f"{task}: {own.metric.iloc[0]} ({unit})")
            right.set_xlabel(f"paired difference ({'percentage points' if fraction else unit})")
    return figure


def against_density(rows: pd.DataFrame, lines: Mapping[str, float], label: str) -> Figure:
    """Score against density (columns arm, role, density, mean, low, high), one colour per role; dashed lines at full,
    base and teacher."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = canvas(2.9)
        for role, part in rows.sort_values("density").groupby("role", sort=False):
            errors = 100 * np.array([part["mean"] - part.low, part.high - part["mean"]])
            axes.errorbar(
                100 * part.density,
                100 * part["mean"],
                # rounding may put the interval's end past a mean of 0 or 1
                yerr=np.maximum(np.nan_to_num(errors), 0),
                fmt="o",
                ls="none" if part.density.nunique() == 1 else "-",
                color=COLOURS[str(role)],
                ms=4.5,
                lw=1.3,
                label=role,
            )
        for text, value in lines.items():
            axes.axhline(100 * value, color=INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6, zorder=0)
            axes.annotate(
                short(text), (1, 100 * value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=8,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trained coordinates (%)")
        axes.set_ylabel(label)
        axes.grid()
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
    return figure


def intervals(axes: Axes, rows: pd.DataFrame, scale: float) -> None:
    """A dot and a bar per row, labelled with the arm's name."""
    for y, row in enumerate(rows.itertuples()):
        colour = COLOURS[row.role]
        if pd.notna(row.low) and pd.notna(row.high):
            axes.plot([scale * row.low, scale * row.high], [y, y], color=colour, lw=2.2)
        axes.plot([scale * row.mean], [y], "o", color=colour, ms=5.5)
    axes.set_yticks(range(len(rows)), [short(arm) for arm in rows.arm])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")


def short(name: str, most: int = 28) -> str:
    """A name for a figure; of a long one the beginning and the end, in which arms differ."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}\u2026{name[-half:]}"


def curves(
    rows: pd.DataFrame, roles: Mapping[str, str], value: str, label: str, every: bool = True
) -> Figure:
    """One line per arm over optimizer steps: each step faintly, a running mean on top; with `every` False the points.

    `rows` has columns arm, step and `value`; arms of one role share a colour and differ in dashes, variants have one
    colour each. A long training is thinned to MOST_POINTS a line.
    """
    arms = [short(str(arm), 24) for arm in rows.arm.unique()]
    columns = max(1, min(3, len(arms), 48 // (max(map(len, arms)) + 6)))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = canvas(2.5 + 0.19 * -(-len(arms) // columns))
        seen: dict[str, int] = {}
        for arm, part in rows.groupby("arm", sort=False):
            role = roles[str(arm)]
            number = seen[role] = seen.get(role, -1) + 1
            colour = COLOURS[role]
            if role == "variant":
                number, shade = divmod(number, len(VARIANTS))
                colour = VARIANTS[shade]
            dash = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (1, 1)))[number % 4]
            line: dict[str, Any] = {
                "color": colour,
                "lw": 1.5,
                "ls": dash,
                "label": short(str(arm), 24),
            }
            if not every:
                axes.plot(part.step, part[value], marker="o", ms=3, **line)
                continue
            window = max(1, len(part) // 40)
            smooth = part[value].rolling(window, min_periods=1, center=True).mean()
            thin = slice(None, None, -(-len(part) // MOST_POINTS))
            axes.plot(part.step[thin], part[value][thin], color=colour, lw=0.5, alpha=0.25)
            axes.plot(part.step[thin], smooth[thin], **line)
        if every and (rows[value] > 0).all() and rows[value].max() > 5 * rows[value].min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid()
        figure.legend(loc="outside upper left", ncols=columns, fontsize=9, handlelength=2.6)
    return figure


def heat(value: pd.DataFrame, excess: pd.DataFrame, label: str) -> Figure:
    """Heat maps, layers by modules: the value on the left, its excess over the null on the right."""
    height = 1.5 + min(7.0, 0.2 * len(value))
    panels = 1 if excess.empty else 2
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(height, panels)
        panel(figure, axes[0], value, label, "cividis", None, None)
        if panels == 2:
            bound = float(excess.abs().max().max()) or 1.0
            panel(figure, axes[1], excess, "excess over null", "PuOr_r", -bound, bound)
            axes[1].set_yticks([])
    return figure


def panel(
    figure: Figure,
    axes: Axes,
    table: pd.DataFrame,
    title: str,
    colours: str,
    low: float | None,
    high: float | None,
) -> None:
    mesh = axes.pcolormesh(
        table.to_numpy(float), cmap=colours, vmin=low, vmax=high, edgecolors="face", linewidth=0.3
    )
    axes.invert_yaxis()
    step = max(1, len(table) // 24)
    axes.set_yticks([i + 0.5 for i in range(0, len(table), step)], table.index[::step], fontsize=7)
    axes.set_xticks(
        [i + 0.5 for i in range(table.shape[1])], table.columns, rotation=60, ha="right", fontsize=7
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="top", shrink=0.9, aspect=24, pad=0.02)
    bar.set_label(title, fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
