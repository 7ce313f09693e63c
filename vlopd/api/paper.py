"""`vlopd.paper`: the tables of arXiv 2606.13657 of one or more runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from evals.report.paper import pages
from evals.report.paper.numbers import Table
from evals.report.paper.tables import paper_tables
from vlopd.errors import ConfigError
from vlopd.run.folder import RunFolder


@dataclass(frozen=True)
class Paper:
    """The tables by name: main, modules, modules-relative, overlaps, retraining, optimizers."""

    tables: Mapping[str, Table]

    def __getitem__(self, name: str) -> pd.DataFrame:
        """A table as texts, one row a line: each training, then its drawn and signal nulls."""
        return pages.wide(self.tables[name])

    @property
    def numbers(self) -> pd.DataFrame:
        """All numbers, one a row: value, interval, difference to the null, p, and the reason where there is none."""
        found = {name: pages.numbers(table) for name, table in self.tables.items()}
        return pd.concat(found, names=["table"]).reset_index("table").reset_index(drop=True)

    def write(self, out: Path | str) -> list[Path]:
        """Writes NAME.md, NAME.csv and NAME.tex of every table into a folder; returns the files."""
        return pages.write(self.tables, Path(out))


def paper(*runs: str | Path) -> Paper:
    """Makes the tables of arXiv 2606.13657 from finished run folders, one pair of models each.

    Every number has its interval over training seeds, its drawn null and its signal null; what a run lacks is named.
    Nothing is computed or changed in the runs. Raises ConfigError without a run, RunError for a folder that is none.

    >>> vlopd.paper("runs/paper", "runs/paper-smollm2")["main"]
    """
    if not runs:
        raise ConfigError("no run: give one run folder or more, as in `vlopd paper runs/paper`")
    folders = [Path(run).resolve() for run in runs]
    if twice := next((run for i, run in enumerate(folders) if run in folders[:i]), None):
        raise ConfigError(f"{twice} is given twice; each run is a pair of models of its own")
    return Paper(paper_tables([RunFolder.open(run, locked=False) for run in runs]))
