"""Rank correlations of what the arms of configs/studies/forgetting.toml kept with KL to the base, norm and density.

From the rows in docs/results/forgetting.csv (`scripts/study_rows.py runs/forgetting` writes them).
"""

from __future__ import annotations

from pathlib import Path

from scipy.stats import spearmanr

from evals.report.read import read_table

KEPT = "shapes_students_palette"


def main() -> None:
    rows = read_table(Path("docs/results/forgetting.csv"))
    arms = rows[(rows.task == KEPT) & rows.kl_to_base.notna()]
    print(f"{KEPT}: {arms.score.min():.3f} to {arms.score.max():.3f} over {len(arms)} arms")
    for column in ("kl_to_base", "delta_norm", "density"):
        print(f"{column}: rank correlation {spearmanr(arms[column], arms.score).statistic:.3f}")


if __name__ == "__main__":
    main()
