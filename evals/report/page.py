"""Parts that the pages share: the Jinja environment with the number formats, rows and figures for the templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from evals.report import figures
from evals.report.geometry import Drawing
from evals.report.verdict import interval, p_value, percent, plain
from vlopd.errors import without_controls
from vlopd.update_geometry.schema import detectable_excess, why_no_p

Context = dict[str, Any]


def add_figure(drawn: dict[str, str], name: str, figure: Figure) -> None:
    """Adds a figure as SVG to {name: svg}."""
    drawn[name] = figures.to_svg(figure, name)


def add_drawings(
    drawn: dict[str, str], prefix: str, drawings: Mapping[str, Drawing]
) -> list[tuple[str, str]]:
    """Adds drawings to {name: svg}; returns (name, caption) of each."""
    for name, drawing in drawings.items():
        add_figure(drawn, f"{prefix}-{name}", drawing.figure)
    return [(f"{prefix}-{name}", drawing.words) for name, drawing in drawings.items()]


def rows_of(table: pd.DataFrame) -> list[Context]:
    """Rows as dicts, with None for empty cells."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def environment() -> Environment:
    """The Jinja environment, with the report's number formats as filters."""
    env = Environment(
        loader=PackageLoader("evals.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: without_controls(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        brackets=brackets,
        number=number,
        percent=percent,
        p_value=p_value,
        hundred=lambda x, form="%.1f": "-" if x is None else form % (100 * x),
        significant=lambda x: "-" if x is None else f"{x:.4g}",
        count=lambda x: "-" if x is None else f"{int(x):,}",
        why_no_p=why_no_p,
        detectable_excess=detectable_excess,
    )
    return env


def number(value: float | None, scale: str = "fraction", form: str = ".1f", sign: str = "") -> str:
    """A score or difference in the unit of its task: percent of a fraction, or the metric's own unit."""
    if value is None:
        return "-"
    return plain(100 * value, sign + form) if scale == "fraction" else plain(value, f"{sign}.4g")


def brackets(low: float | None, high: float | None, scale: str = "own", form: str = ".2f") -> str:
    """An interval in brackets, one open to a side where it has no bound there; empty without both."""
    return interval({"interval": (low, high)}, 100 if scale == "fraction" else 1, form).strip()
