"""Self-contained pages on checkpoints outside a run: geometry.html of updates, compare.html of models.

Read files only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report import figures, geometry, tables
from evals.report.examples import collect
from evals.report.headline import headline
from evals.report.page import Context, add_drawings, environment, rows_of
from evals.report.read import read_table
from evals.report.sections import EMPTY, render_report, scores_context
from evals.report.verdict import verdict
from vlopd.files import write_text
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record
from vlopd.update_geometry.schema import FLAGGED_BY_CHANCE, HITS_SD, INDEPENDENT_HITS_SD

GROUPS = {"component": "Components", "part": "Parts", "layer": "Layers"}
"""Kinds of group rows that the page has a table of."""
COLUMNS = (
    ("Parameters, %", "parameter_share", 100, False),
    ("Energy, %", "energy_share", 100, False),
    ("Relative norm, %", "relative_delta_fro", 100, False),
    ("Unmoved, %", "frac_delta_eq_0", 100, True),
    ("Top-16 energy, %", "top_energy_ratio", 100, True),
    ("Stable rank", "stable_rank", 1, True),
    ("In principal subspaces, %", "principal_projection_energy_ratio", 100, True),
)
"""Columns of the group tables: title, metric, scale, and whether a null determines it only by chance."""
PARAMETERS = {"top_energy_ratio": "k=16", "principal_projection_energy_ratio": "ratio=0.1"}
OVERLAPS = {
    "update_jaccard": "Jaccard index",
    "first_covered_by_second": "Moved by the first that the second moved too",
    "second_covered_by_first": "Moved by the second that the first moved too",
    "overlap_enrichment_vs_random": "Overlap over chance",
    "overlap_enrichment_vs_random_within_tensors": "Overlap over chance, within tensors",
    "overlap_enrichment_vs_random_within_tensors_and_magnitudes": (
        "Overlap over chance, within tensors and deciles of |w|"
    ),
    "delta_cosine": "Cosine of the updates",
    "top_mask_overlap_over_chance": "Largest 5 % of coordinates: overlap over chance, within tensors",
    "top_mask_overlap_over_chance_within_magnitudes": (
        "Largest 5 % of coordinates: overlap over chance, within tensors and deciles of |w|"
    ),
    "left_subspace_similarity": "Leading 16 left singular vectors: similarity, median over matrices",
    "right_subspace_similarity": "Leading 16 right singular vectors: similarity, median over matrices",
}
"""Labels of the measures of an overlap.csv."""


def write_geometry_page(
    out: Path,
    base: str,
    folders: Mapping[str, Path],
    trained: Mapping[str, str],
    notes: Sequence[str] = (),
    paper: Mapping[str, Sequence[tuple[str, Sequence[str]]]] = {},
    paper_columns: Sequence[str] = (),
) -> Path:
    """Writes out/geometry.html, and figures/ beside each table, of the tables in `folders` and in `out`.

    Returns the path of the page. folders: name -> folder of its geometry.csv and summary.json.
    trained: name -> the path or id of the checkpoint. paper: name -> the lines of the paper's table.
    """
    drawn: dict[str, str] = {}
    sections, about = [], {}
    for name, folder in folders.items():
        summary, tidy = read_record(folder / "summary.json"), read_table(folder / "geometry.csv")
        about[name] = summary
        sections.append(
            {
                "arm": name,
                "rows": rows_of(pd.DataFrame(tables.headline(folder))),
                "left_out": geometry.left_out(folder),
                "reasons": geometry.unmeasured(tidy),
                "figures": _add_and_save(drawn, name, geometry.draw(tidy), folder),
                "groups": _group_tables(tidy),
                "null": next(iter(summary["nulls"]), ""),
                "paper": paper.get(name, ()),
                "summary": summary,
                "flagged": summary.get("flagged", {}),
            }
        )
    steps = out / "trajectory.csv"
    overlap = read_table(out / "overlap.csv") if (out / "overlap.csv").exists() else None
    trajectory = geometry.draw_trajectory(read_table(steps)) if steps.exists() else {}
    drawings = {} if overlap is None else geometry.draw_overlap(overlap)
    first = next(iter(about.values()))
    context = {
        "base": base,
        "trained": trained,
        "sections": sections,
        "draws": first["null_draws"],
        "by_chance": FLAGGED_BY_CHANCE,
        "hits_sd": (HITS_SD, INDEPENDENT_HITS_SD),
        "notes": notes,
        "paper_columns": paper_columns,
        "overlap": [] if overlap is None else _overlap_rows(overlap),
        "overlap_figures": _add_and_save(drawn, "all", drawings, out),
        "trajectory": _add_and_save(drawn, "all", trajectory, out),
        "settings": json.dumps(first["inputs"]["settings"], indent=1),
        "inputs": {name: its["inputs"] for name, its in about.items()},
        "figures": drawn,
    }
    page = environment().get_template("geometry.html.j2").render(context)
    write_text(out / "geometry.html", page)
    return out / "geometry.html"


def _add_and_save(
    drawn: dict[str, str], prefix: str, drawings: Mapping[str, geometry.Drawing], folder: Path
) -> list[tuple[str, str]]:
    """`add_drawings` that also writes folder/figures/NAME.svg."""
    shown = add_drawings(drawn, prefix, drawings)
    for name in drawings:
        svg = figures.standalone(drawn[f"{prefix}-{name}"])
        write_text(folder / "figures" / f"{name}.svg", svg)
    return shown


def _group_tables(tidy: pd.DataFrame) -> list[Context]:
    """Per kind of group: titles, and one row per group of (value, null's mean) in the order of COLUMNS."""
    found = []
    names = tidy.name.where(tidy.name.str.startswith("["), "")
    for kind, title in GROUPS.items():
        part = tidy[names.str.startswith(f"[{kind}=")]
        if part.empty:
            continue
        rows = []
        for name, own in part.groupby("name", sort=False):
            label = str(name).strip("[]").partition("=")[2].replace(".", " ")
            rows.append((label, [_group_cell(own, *column[1:]) for column in COLUMNS]))
        if kind == "layer":
            rows.sort(key=lambda row: _layer_order(row[0]))
        found.append({"title": title, "columns": [c[0] for c in COLUMNS], "rows": rows})
    return found


def _layer_order(label: str) -> tuple[str, int]:
    component, _, number = label.rpartition(" ")
    return component, int(number) if number.isdigit() else 0


def _group_cell(own: pd.DataFrame, metric: str, scale: float, against: bool) -> Context | None:
    """A group's value of a metric and, with `against`, the mean of its first drawn null; None where not measured."""
    rows = own[own.metric.eq(metric) & own.parameter.fillna("").eq(PARAMETERS.get(metric, ""))]
    rows = rows[rows.value.notna() & rows.null.ne(geometry.CLOSED)]
    if rows.empty:
        return None
    first = rows.iloc[0]
    null = scale * first.null_mean if against and pd.notna(first.null_mean) else None
    return {"value": scale * first.value, "null": null}


def _overlap_rows(table: pd.DataFrame) -> list[Context]:
    """The rows of an overlap.csv on the whole model, any update counted, labelled."""
    own = table[
        table.name.isin(["[all]", "[median]"])
        & table.parameter.ne("atol=1e-05")
        & table.metric.isin(list(OVERLAPS))
    ]
    own = own.assign(label=own.metric.map(OVERLAPS), null=own.null.fillna(""))
    return rows_of(own)


def write_comparison_page(
    out: Path, record: Mapping[str, Any], models: Mapping[str, str], settings: Mapping[str, Any]
) -> Path:
    """Writes out/compare.html, the report of a compare.json of models (name -> path or id); returns its path.

    Its examples are of the rows in out/evals/; those that do not fit the page are in out/examples/.
    """
    drawn: dict[str, str] = {}
    first = next(iter(models))
    context: Context = {
        **EMPTY,
        **scores_context(record, tables.compared_tables(record, {}), drawn),
        "title": f"Comparison of {', '.join(models)}",
        "subtitle": f"{len(models)} models or evaluations on the same questions, each against {first}.",
        "headline": headline(record),
        "verdict": verdict(record),
        "models": models,
        "config_json": json.dumps(settings, indent=1),
        "figures": drawn,
    }
    shutil.rmtree(out / "examples", ignore_errors=True)
    found = collect(RunFolder(out), record)
    write_text(out / "compare.html", render_report(context, found, out / "examples"))
    return out / "compare.html"
