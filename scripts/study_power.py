"""The power of the study's primary hypotheses, from pilots whose seeds the study does not use (docs/study/protocol.md).

    python scripts/study_power.py            # seconds
    python scripts/study_power.py --collect runs/paper runs/signal-nulls runs/study/[bd]-pilot-*

`--collect` writes docs/study/data/pilot-geometry.csv and pilot-scores.csv from run folders. Printed is the fraction of
simulated studies in which a part of a hypothesis is shown at 5 % and at 1.25 % (the smallest level of Holm's four), if
means and deviations are those of the pilot, and normal. For H1 and H4, which state equivalence or no inferiority, also
at a true difference of zero.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from evals.report.read import read_table  # noqa: E402
from scripts.study_analysis import CLAIMS, DENSITIES, POINTS_MARGIN, SCORES, SIGNAL  # noqa: E402
from scripts.study_collect import DATA  # noqa: E402
from vlopd.files import read_json  # noqa: E402
from vlopd.update_geometry.group_statistics import jackknife, pair_mean, welch  # noqa: E402

SEEDS, PAIRS_OF_SEEDS = 10, 5
LEVELS = (0.05, 0.0125)
RATIO_MARGIN = math.log(1.25)
MEASURES = {
    its.hypothesis + its.part: (its.metric, its.name) for its in CLAIMS if its.null == SIGNAL
}
"""Metric and name of a part's rows; all but the cosine are compared on the log scale."""


def collect(runs: Iterable[Path]) -> None:
    """Writes the pilots' values from run folders."""
    geometry, scores = [], []
    for run in runs:
        table = run / "geometry" / "group_values.csv"
        if table.exists():
            values = read_table(table).fillna({"null": "", "parameter": ""})
            values["run"] = run.name
            kept = values["null"].isin(["", "rademacher"]) & (values["kind"] != "drawn")
            wanted = pd.MultiIndex.from_frame(values[["metric", "name"]]).isin(MEASURES.values())
            geometry.append(
                values[kept & wanted][["run", "kind", "unit", "metric", "name", "value"]]
            )
        else:
            (task,) = read_json(run / "compare.json")["tasks"].values()
            for arm, its in task["arms"].items():
                scores.append((run.name, arm, its["mean"]))
    pd.concat(geometry).to_csv(DATA / "pilot-geometry.csv", index=False, float_format="%.6g")
    if scores:
        frame = pd.DataFrame(scores, columns=["run", "arm", "score"])
        frame.to_csv(DATA / "pilot-scores.csv", index=False, float_format="%.6g")


def shares(p_values: Callable[[], float], draws: int) -> str:
    """The shares of `draws` simulated p-values that are at most each level."""
    found = np.array([p_values() for _ in range(draws)])
    return " ".join(f"{np.mean(found <= level):5.2f}" for level in LEVELS)


def arm_power(part: str, real: Sequence[float], null: Sequence[float], draws: int) -> None:
    """Prints the power of a part of H1 (equivalence) or H3 (difference), which compares arms."""
    rng = np.random.default_rng(0)
    deviations = np.std(real, ddof=1), np.std(null, ddof=1)
    difference = float(np.mean(real) - np.mean(null))

    def p(true: float) -> float:
        groups = [
            mean + deviation * rng.normal(size=SEEDS)
            for mean, deviation in zip((true, 0.0), deviations, strict=True)
        ]
        found = welch(*(group.tolist() for group in groups), RATIO_MARGIN, 0.95)
        value = found.p_equivalent if part.startswith("H1") else found.p
        assert value is not None
        return value

    print(
        f"{part}: difference {difference:6.3f}, deviations {deviations[0]:.3f} {deviations[1]:.3f}, "
        f"power {shares(lambda: p(difference), draws)}"
        + (f", at no difference {shares(lambda: p(0.0), draws)}" * part.startswith("H1"))
    )


def pair_power(part: str, real: Sequence[float], null: Sequence[float], draws: int) -> None:
    """Prints the power of a part of H2, which compares pairs of arms, if pairs vary independently."""
    rng = np.random.default_rng(0)
    groups = [[f"{kind}{i}" for i in range(SEEDS)] for kind in ("real", "null")]

    def difference(one: Sequence[str], other: Sequence[str]) -> float:
        return pair_mean(pairs, one, one) - pair_mean(pairs, other, other)

    pairs: dict[frozenset[str], float] = {}

    def p() -> float:
        for values, arms in zip((real, null), groups, strict=True):
            for pair in combinations(arms, 2):
                drawn = rng.normal(np.mean(values), np.std(values, ddof=1))
                pairs[frozenset(pair)] = float(drawn)
        found = jackknife(difference, groups, RATIO_MARGIN, 0.95, 1.0)
        assert found.p is not None
        return found.p / 2 if found.value > 0 else 1 - found.p / 2

    print(
        f"{part}: {np.mean(real):.3f} against {np.mean(null):.3f}, power {shares(p, max(20, draws // 20))}"
    )


def score_power(part: str, claim: str, differences: Sequence[float], draws: int) -> None:
    """Prints the power of a part of H4 at a density from the differences of two arms in the pilot's runs."""
    rng = np.random.default_rng(0)
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))

    def p(true: float) -> float:
        values = true + deviation * rng.normal(size=PAIRS_OF_SEEDS)
        error, df = np.std(values, ddof=1) / math.sqrt(PAIRS_OF_SEEDS), PAIRS_OF_SEEDS - 1
        if claim == "above":
            return float(t.sf(values.mean() / error, df))
        if claim == "equivalent":
            return float(t.sf((POINTS_MARGIN - abs(values.mean())) / error, df))
        return float(t.sf((POINTS_MARGIN + values.mean()) / error, df))

    print(
        f"H4{part}: difference {100 * mean:5.1f} points, deviation {100 * deviation:.1f}, "
        f"power {shares(lambda: p(mean), draws)}"
        + (f", at no difference {shares(lambda: p(0.0), draws)}" * (claim != "above"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--draws", type=int, default=4000)
    given = parser.parse_args()
    if given.collect:
        collect(given.collect)
    geometry = read_table(DATA / "pilot-geometry.csv")
    print(
        f"power at {LEVELS[0]:.0%} and {LEVELS[1]:.2%}; {SEEDS} seeds of OPD and of the signal null"
    )
    for run, table in geometry.groupby("run"):
        print(f"pilot {run}:")
        for part, (metric, name) in MEASURES.items():
            rows = table[(table["metric"] == metric) & (table["name"] == name)]
            real, null = (rows[rows["kind"] == kind]["value"] for kind in ("real", "signal"))
            if metric != "delta_cosine":
                real, null = np.log(real), np.log(null)
            test = pair_power if part.startswith("H2") else arm_power
            test(part, real.tolist(), null.tolist(), given.draws)
    if (DATA / "pilot-scores.csv").exists():
        scores = read_table(DATA / "pilot-scores.csv")
        for part, density in product("bd", DENSITIES):
            its = scores[scores["run"].str.startswith(f"{part}-pilot-")]
            table = its.pivot(index="run", columns="arm", values="score")
            print(f"pilot of {part.upper()}, {density} %, {PAIRS_OF_SEEDS} pairs of seeds:")
            for test, (one, other, claim) in SCORES.items():
                arms = [arm if arm == "full" else f"{arm}-{density}" for arm in (one, other)]
                score_power(test, claim, (table[arms[0]] - table[arms[1]]).tolist(), given.draws)


if __name__ == "__main__":
    main()
