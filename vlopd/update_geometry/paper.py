"""The summary table of arXiv 2606.13657 for a pair: one row for the update, one per null."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vlopd.config.analysis import GeometryConfig


class Column(NamedTuple):
    """One column: the row of geometry.csv it shows, and a scale factor."""

    title: str
    name: str
    metric: str
    parameter: str
    scale: float


COLUMNS = (
    Column("norm\n%", "[all]", "relative_delta_fro", "", 100),
    Column("sparse\n%", "[all]", "frac_isclose_zero", "atol=1e-05", 100),
    Column("top-16\n%", "[median]", "top_energy_ratio", "k=16", 100),
    Column("stable\nrank", "[median]", "stable_rank", "", 1),
    Column(
        "princ.\ncov. %", "[all]", "principal_update_overlap_ratio", "ratio=0.1,atol=1e-05", 100
    ),
    Column(
        "low-mag\ncov. %",
        "[all]",
        "low_magnitude_update_overlap_ratio",
        "ratio=0.1,atol=1e-05",
        100,
    ),
    Column("joint\nproj %", "[median]", "principal_projection_energy_ratio", "ratio=0.1", 100),
)


def preset() -> GeometryConfig:
    """The settings of `--preset paper`: its ratios."""
    return GeometryConfig(arms=(), ratios=(0.01, 0.05, 0.1, 0.2))


def lacking(config: GeometryConfig) -> str | None:
    """What the settings of a measurement lack for the table, with the remedy; None if nothing."""
    if 0.1 in config.ratios:
        return None
    return f"its table needs 0.1 in ratios, which are {list(config.ratios)}; add it, as in ratios=[0.1]"


def paper_table(rows: Iterable[Mapping[str, str]]) -> list[tuple[str, Sequence[str]]]:
    """(label, cells in the order of COLUMNS) of the pair, and of each null with its sd on a second line.

    rows: of geometry.csv. Labels wrap and cells are narrow, to fit a terminal of 80 columns.
    """
    wanted = {(c.name, c.metric, c.parameter) for c in COLUMNS}
    found: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        key = (row["name"], row["metric"], row["parameter"])
        if key in wanted:
            found.setdefault(key, {})[row["null"]] = row
    nulls = list(dict.fromkeys(null for own in found.values() for null in own if null))
    lines: list[tuple[str, Sequence[str]]] = [("update", [_cell(found, c, None) for c in COLUMNS])]
    lines += [(null.replace("_", " "), [_cell(found, c, null) for c in COLUMNS]) for null in nulls]
    return lines


def _cell(
    found: Mapping[tuple[str, str, str], Mapping[str, Mapping[str, str]]],
    column: Column,
    null: str | None,
) -> str:
    own = found.get((column.name, column.metric, column.parameter), {})
    row = next(iter(own.values()), None) if null is None else own.get(null)
    if row is None:
        return "-"
    value = row["value"] if null is None else row["null_mean"]
    if value == "":
        return "-"
    text = f"{column.scale * float(value):.4g}"
    if null is not None and row["null_sd"]:
        text += f"\n±{column.scale * float(row['null_sd']):.1g}"
    return text
