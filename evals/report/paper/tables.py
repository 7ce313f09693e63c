"""The tables of arXiv 2606.13657 from run folders: each number with its interval, drawn null and signal null.

Reads files only. A number is a `Number`: of an update (`kind` "update"), or of a null beside it ("drawn", "signal");
one that a run lacks has no value and a reason. pages.py lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from evals.report.paper.geometry import PARTS, density_rows, main_rows, module_rows
from evals.report.paper.numbers import Lacking, Number, Table
from evals.report.paper.optimizers import OPTIMIZER_COLUMNS, optimizer_rows
from evals.report.paper.overlaps import OVERLAP_COLUMNS, overlap_rows
from evals.report.paper.pair import Pair
from evals.report.paper.retraining import retraining_rows
from evals.report.paper.scores import SCORES
from vlopd.config.experiment import ExperimentConfig
from vlopd.run.folder import RunFolder
from vlopd.update_geometry.paper import COLUMNS

TABLES: Mapping[str, tuple[str, tuple[str, ...], Callable[[Pair], Iterator[Number]]]] = {
    "main": (
        "Size, sparsity, spectrum and place of the update",
        tuple(its.title.replace("\n", " ") for its in COLUMNS),
        main_rows,
    ),
    "modules": (
        "Shares of the update's energy",
        tuple(title for title, _ in PARTS),
        module_rows,
    ),
    "modules-relative": (
        "Shares of the energy over shares of the parameters",
        tuple(title.removesuffix(" %") for title, _ in PARTS),
        density_rows,
    ),
    "overlaps": ("Coordinates moved by both of two trainings", OVERLAP_COLUMNS, overlap_rows),
    "retraining": ("Retraining under masks", SCORES, retraining_rows),
    "optimizers": ("Optimizers", OPTIMIZER_COLUMNS, optimizer_rows),
}
"""Title, columns and rows of each table, in the paper's order."""


def paper_tables(runs: Sequence[tuple[RunFolder, ExperimentConfig]]) -> dict[str, Table]:
    """Every table over these runs, one pair each; what a run lacks is in `lacking` with the reason."""
    names = [config.name for _, config in runs]
    for more in ([run.root.name for run, _ in runs], [str(run.root) for run, _ in runs]):
        if len(set(names)) < len(names):
            names = more
    pairs = [Pair(name, run, config) for name, (run, config) in zip(names, runs, strict=True)]
    found = {}
    for name, (title, columns, rows) in TABLES.items():
        table = found[name] = Table(title, columns)
        for pair in pairs:
            try:
                table.numbers.extend(rows(pair))
            except Lacking as why:
                table.lacking[pair.name] = str(why)
            else:
                table.notes.extend(_tasks_of(pair, columns))
    return found


def _tasks_of(pair: Pair, columns: Sequence[str]) -> list[str]:
    """Which tasks the scores of a pair are on."""
    if "test %" not in columns:
        return []
    held_out = next(iter(pair.curves.values()), {})
    curve = f"held-out: {held_out['task']}, {held_out['metric']}; " if held_out else ""
    return [f"{pair.name}: {curve}test: {pair.task or 'not evaluated'}."]
