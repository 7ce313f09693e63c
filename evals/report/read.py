"""Reading the CSV files of a run as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vlopd.errors import RunError, first_line
from vlopd.update_geometry.schema import NEEDED_COLUMNS


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A CSV file, or its `columns`. Only empty and "nan" cells are missing: "null" and "NA" may name arms."""
    try:
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("it ends within a row")
        table = pd.read_csv(
            path,
            usecols=columns,
            low_memory=False,  # infer dtypes from whole columns, not per chunk
            keep_default_na=False,
            na_values=["", "nan"],
        )
    except ValueError as error:  # so are pandas' and of text that is not UTF-8
        raise RunError(
            f"{path} is not a table of vlopd ({first_line(error)}); delete its folder and run its stage again"
        ) from None
    needed = NEEDED_COLUMNS if path.name == "geometry.csv" and columns is None else ()
    if lacking := [name for name in needed if name not in table]:
        raise RunError(
            f"{path} is not a table of vlopd (no column {lacking[0]}); delete its folder and run its stage again"
        )
    return table
