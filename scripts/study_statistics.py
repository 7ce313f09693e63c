"""Coverage of the intervals and error rates of the tests of evals/stats.py, over simulated experiments.

    python scripts/study_statistics.py                     # 10,000 experiments a cell: 15 minutes on 2 cores
    python scripts/study_statistics.py --experiments 500   # a quick run

Finished cells are kept in --out (one JSON line each) and not run again, so that the study can be interrupted. Prints
Markdown tables. Standard errors over 10,000 experiments: 0.22 points of a coverage of 95 %, 0.16 of an error rate of
2.5 %.

In the cells of differences every question is won, lost or tied by arm a with the given probabilities, correlated
within clusters by a Gaussian copula; the margin is the true loss, at which calling a non-inferior is the error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from evals import stats

Array = NDArray[np.float64]
MARGIN = 0.02
"""Margin of the non-inferiority test where a is not worse than b."""


class Cell(NamedTuple):
    """One row of a table: the study's name, its setting in words, and the function that simulates it."""

    study: str
    setting: str
    run: Callable[[np.random.Generator, int], dict[str, float]]


def cluster_names(sizes: str, n: int) -> NDArray[np.int64] | None:
    """A cluster's number for each of n questions; sizes "1" (none), "2", "2-5" (uniform)."""
    if sizes == "1":
        return None
    low, _, high = sizes.partition("-")
    drawn = np.random.default_rng(0).integers(int(low), int(high or low) + 1, size=n)
    return np.repeat(np.arange(n), drawn)[:n]


def latent(rng: np.random.Generator, names: NDArray[np.int64] | None, n: int, rho: float) -> Array:
    """Standard normal values of n questions, correlated by rho within clusters."""
    own = rng.normal(size=n)
    if names is None:
        return own
    return np.sqrt(rho) * rng.normal(size=names[-1] + 1)[names] + np.sqrt(1 - rho) * own


def differences(
    rng: np.random.Generator,
    experiments: int,
    n: int,
    sizes: str,
    wins: float,
    losses: float,
    rho: float,
    arms: int = 1,
) -> dict[str, float]:
    """Coverage of the difference's interval, errors at the margin, and p <= 0.05 where the arms are equal.

    With `arms` > 1 arm b is the mean of so many arms, each drawn against a.
    """
    names = cluster_names(sizes, n)
    truth = wins - losses
    margin = -truth if truth < 0 else MARGIN
    held = inferior = rejected = width = 0.0
    for _ in range(experiments):
        a = (rng.random(n) < 0.5).astype(float)
        others = []
        for _ in range(arms):
            z = latent(rng, names, n, rho)
            # won: a right and b wrong; the chance that a is right does not matter to the difference
            other = np.where(z > norm.isf(wins), a - 1, np.where(z < norm.ppf(losses), a + 1, a))
            others.append(other)
        if arms == 1:
            b = others[0]
            a = np.where(b < 0, 1.0, np.where(b > 1, 0.0, a))
            b = np.where(b < 0, 0.0, np.where(b > 1, 1.0, b))
        else:
            d = np.mean([a - other for other in others], axis=0)
            a, b = np.maximum(d, 0), np.maximum(-d, 0)
        tested = stats.non_inferiority(a, b, margin, names)
        found = stats.paired_difference(a, b, names)
        held += found.low <= truth <= found.high
        width += found.high - found.low
        rejected += found.p <= 0.05
        inferior += tested.holds
    numbers = {"coverage": held, "width": width}
    numbers |= {"non_inferior": inferior} if truth < 0 else {"p_below_0.05": rejected}
    return {key: value / experiments for key, value in numbers.items()}


def means(
    rng: np.random.Generator, experiments: int, n: int, sizes: str, rate: float, rho: float
) -> dict[str, float]:
    """Coverage of a score's interval."""
    names, held = cluster_names(sizes, n), 0
    for _ in range(experiments):
        x = (latent(rng, names, n, rho) < norm.ppf(rate)).astype(float)
        found = stats.mean_with_error(x, names)
        held += found.low <= rate <= found.high
    return {"coverage": held / experiments}


def seeds(
    rng: np.random.Generator, experiments: int, n: int, a: int, b: int, sd: float
) -> dict[str, float]:
    """Coverage over seeds and questions, for equal arms whose rate has a standard deviation sd over seeds."""
    held = width = 0.0
    for _ in range(experiments):
        ease = 0.15 * rng.normal(size=n)

        def scores(count: int, ease: Array = ease) -> Array:
            rate = 0.6 + sd * rng.normal(size=(count, 1)) + ease
            return (rng.random((count, n)) < rate).astype(float)

        found = stats.seed_difference(scores(a), scores(b))
        held += found.low <= 0 <= found.high
        width += found.high - found.low
    return {"coverage": held / experiments, "width": width / experiments}


def recoveries(
    rng: np.random.Generator, experiments: int, n: int, gain: float, true: float, apart: float
) -> dict[str, float]:
    """Coverage of Fieller's interval, and what reporting bounded intervals alone would do to the value.

    full and sub differ from the base in a fraction `apart` of the questions.
    """
    held, values, bounded = 0, [], []
    for _ in range(experiments):
        base = (rng.random(n) < 0.5).astype(float)

        def trained(gained: float, base: Array = base) -> Array:
            up, down = apart + gained, apart - gained  # of the half that is wrong, or right
            drawn = rng.random(n)
            return np.where(base > 0, drawn >= down, drawn < up).astype(float)

        found = stats.recovery(trained(gain * true), base, trained(gain))
        known = found.low is not None and found.high is not None
        if found.status == "negative":
            continue
        held += not known or found.low <= true <= found.high
        if found.value is not None:
            values.append(found.value)
            bounded += [found.value] if known else []
    return {
        "coverage": held / experiments,
        "bounded": len(bounded) / experiments,
        "median": float(np.median(values)),
        "median_if_bounded": float(np.median(bounded)) if bounded else float("nan"),
    }


def cells() -> Iterator[Cell]:
    """All cells, in the order of the tables."""
    one_sided, rare, often = (0.0, MARGIN), (0.03, 0.05), (0.1, 0.15)
    for n in (40, 100, 500):
        for sizes in ("1", "2", "5", "2-5", "1-50")[: 5 if n > 100 else 4]:
            for wins, losses in (one_sided, rare, often):
                for rho in {"1": (0.0,), "5": (0.95,)}.get(sizes, (0.3, 0.95)):
                    words = f"{n} | {sizes} | {wins:g}, {losses:g} | {rho:g}"
                    run = partial(differences, n=n, sizes=sizes, wins=wins, losses=losses, rho=rho)
                    yield Cell("differences", words, run)
    for n in (40, 100, 500):
        for sizes in ("1", "2-5"):
            for rate in (0.0, 0.02, 0.1):
                words = f"{n} | {sizes} | {rate:g}, {rate:g} | 0.5"
                run = partial(differences, n=n, sizes=sizes, wins=rate, losses=rate, rho=0.5)
                yield Cell("equal arms", words, run)
    for n in (100, 500):
        for sizes in ("1", "2-5"):
            for wins, losses in (rare, often):
                words = f"{n} | {sizes} | {wins:g}, {losses:g} | 0.5"
                run = partial(
                    differences, n=n, sizes=sizes, wins=wins, losses=losses, rho=0.5, arms=3
                )
                yield Cell("mean of three controls", words, run)
    for n in (40, 100, 500):
        for sizes in ("1", "2-5"):
            for rate in (0.5, 0.9, 0.98):
                run = partial(means, n=n, sizes=sizes, rate=rate, rho=0.5)
                yield Cell("scores", f"{n} | {sizes} | {rate:g} | 0.5", run)
    for sd in (0.0, 0.03, 0.06):
        for a, b in ((1, 1), (1, 3), (2, 2), (2, 5), (3, 3), (6, 6)):
            run = partial(seeds, n=300, a=a, b=b, sd=sd)
            yield Cell("seeds", f"{a}, {b} | {sd:g}", run)
    for n, gain, true in ((300, 0.05, 1.0), (300, 0.05, 0.5), (300, 0.2, 1.0), (1500, 0.05, 0.5)):
        run = partial(recoveries, n=n, gain=gain, true=true, apart=0.3)
        yield Cell("recovery", f"{n} | {gain:g} | {true:g}", run)


HEADS = {
    "differences": "n | cluster size | P(win), P(loss) | correlation",
    "equal arms": "n | cluster size | P(win), P(loss) | correlation",
    "mean of three controls": "n | cluster size | P(win), P(loss) | correlation",
    "scores": "n | cluster size | rate | correlation",
    "seeds": "seeds of a, b | SD between seeds",
    "recovery": "n | gain | true recovery",
}
"""Columns of each study's setting."""


def simulate(job: tuple[Cell, int]) -> dict[str, Any]:
    """One cell's line of the output file."""
    cell, experiments = job
    name = zlib.crc32((cell.study + cell.setting).encode())
    found = cell.run(np.random.default_rng((experiments, name)), experiments)
    key = {"study": cell.study, "setting": cell.setting, "experiments": experiments}
    return {**key, **{name: round(value, 5) for name, value in found.items()}}


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One Markdown table per study; fractions in percent, widths in percentage points."""
    for study, head in HEADS.items():
        own = [row for row in rows if row["study"] == study]
        names = list(dict.fromkeys(key for row in own for key in row))[3:]
        titles = [f"{name.replace('_', ' ')}" for name in names]
        print(f"\n**{study}**\n\n| {head} | {' | '.join(titles)} |")
        print("|" + "---|" * (head.count("|") + 1 + len(names)))
        for row in own:
            shown = [
                "" if name not in row
                else f"{row[name]:.2f}" if name.startswith("median")
                else f"{100 * row[name]:.1f}"
                for name in names
            ]  # fmt: skip
            print(f"| {row['setting']} | {' | '.join(shown)} |")


def print_summary(rows: list[dict[str, Any]]) -> None:
    """One Markdown table of ranges over the cells of a study and cluster size, in percent."""
    print("| study | cluster size | cells | coverage | non-inferior at the margin | p below 0.05 |")
    print("|---|---|---|---|---|---|")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["study"] not in ("seeds", "recovery"):
            sizes = row["setting"].split(" | ")[1].replace("1", "none")
            groups.setdefault((row["study"], sizes), []).append(row)

    def range_of(own: list[dict[str, Any]], name: str) -> str:
        values = [100 * row[name] for row in own if name in row]
        return f"{min(values):.1f} to {max(values):.1f}" if values else ""

    for (study, sizes), own in groups.items():
        shown = [range_of(own, name) for name in ("coverage", "non_inferior", "p_below_0.05")]
        print(f"| {study} | {sizes} | {len(own)} | {' | '.join(shown)} |")


def main() -> None:
    """Runs the missing cells and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("statistics.jsonl"))
    given = parser.parse_args()
    lines = given.out.read_text().splitlines(keepends=True) if given.out.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last may be cut off
    given.out.write_text("".join(lines))
    done = {
        row["study"] + row["setting"]: row
        for row in map(json.loads, lines)
        if row["experiments"] == given.experiments
    }
    every = list(cells())
    due = [(cell, given.experiments) for cell in every if cell.study + cell.setting not in done]
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool, given.out.open("a") as out:
        for row in pool.imap_unordered(simulate, due):
            done[row["study"] + row["setting"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
    rows = [done[cell.study + cell.setting] for cell in every]
    print_summary(rows)
    print_tables(rows)


if __name__ == "__main__":
    main()
