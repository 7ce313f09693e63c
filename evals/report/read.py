"""Reading the CSV files of a run as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A CSV file, or its `columns`. Only empty and "nan" cells are missing: "null" and "NA" may name arms."""
    return pd.read_csv(
        path,
        usecols=columns,
        low_memory=False,  # infer dtypes from whole columns, not per chunk
        keep_default_na=False,
        na_values=["", "nan"],
    )
