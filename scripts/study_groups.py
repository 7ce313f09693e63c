"""Error rates of groups.csv in planted worlds whose answers are known.

    python scripts/study_groups.py                 # 400 studies, 4,000 intervals: one minute on one core
    python scripts/study_groups.py --studies 50    # a quick run

A study has seeds trained on a signal and seeds trained on a null. Every update has eight matrices of one spectrum, up
to seed noise that is larger for the null. The signal makes the first matrix larger and gives it a direction that its
seeds share; nothing else differs, except the other matrices' shares of the energy. Counted is what is flagged
elsewhere, by family (false discoveries over discoveries, averaged over studies; studies without a discovery count 0).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlopd.config.analysis import GeometryConfig
from vlopd.update_geometry.group_statistics import Difference, jackknife, pair_mean, welch
from vlopd.update_geometry.groups import GroupRow, Value, compare_groups

MATRICES, SIDES, RANK = 8, (16, 12), 6
LEVEL = 0.95
Q = 0.10
"""q up to which a row counts as flagged."""
Update = NDArray[np.float64]


class Case(NamedTuple):
    """The sizes of two groups, and the deviation of the second in that of the first."""

    real: int
    null: int
    spread: float


CASES = tuple(
    Case(*sizes, spread) for sizes in ((2, 2), (3, 3), (5, 3), (5, 5)) for spread in (1, 3)
)


# ------------------------------------------------------------------------------------ planted worlds


def study(rng: np.random.Generator, real: int = 3, null: int = 3) -> list[GroupRow]:
    """The rows of groups.csv of one planted world."""
    base = rng.normal(size=(MATRICES, *SIDES))
    shared = _update(rng, 0.0)[0]
    updates = {f"real-{i}": _with_signal(rng, shared) for i in range(real)}
    updates |= {f"null-{i}": _update(rng, 0.1) for i in range(null)}
    values = [
        Value(*_group(arm), arm, *measure)
        for arm, update in updates.items()
        for measure in _measures(base, update)
    ]
    for a, b in combinations(updates, 2):
        for i, cosine in enumerate(_cosines(updates[a], updates[b])):
            key = ("direction", "delta_cosine", "", f"[component={i}]")
            values.append(Value(*_group(a, b), f"{a}|{b}", *key, float(cosine)))
    return compare_groups(values, GeometryConfig(), LEVEL)


def _group(*arms: str) -> tuple[str, str, str]:
    """Kind, null and real arm of an arm or a pair."""
    sides = {arm.partition("-")[0] for arm in arms}
    kind = "mixed" if len(sides) > 1 else "real" if "real" in sides else "signal"
    return kind, "" if kind == "real" else "rademacher", "real-0"


def _update(rng: np.random.Generator, noise: float) -> Update:
    """Matrices [MATRICES, *SIDES] of random directions and equal spectra, up to log-normal noise of a seed."""
    left = np.linalg.qr(rng.normal(size=(MATRICES, SIDES[0], RANK)))[0]
    right = np.linalg.qr(rng.normal(size=(MATRICES, SIDES[1], RANK)))[0]
    sizes = np.exp(-np.arange(RANK) / 2 + noise * rng.normal(size=(MATRICES, RANK)))
    seed = np.exp(noise * rng.normal())  # all rows of a seed are correlated
    found: Update = seed * (left * sizes[:, None]) @ right.transpose(0, 2, 1)
    return found


def _with_signal(rng: np.random.Generator, shared: Update) -> Update:
    """An update whose first matrix is larger and near `shared`, of the same spectrum as any."""
    update = _update(rng, 0.05)
    sizes = np.linalg.svd(update[0], compute_uv=False)
    near, _, far = np.linalg.svd(shared + 0.15 * rng.normal(size=SIDES), full_matrices=False)
    update[0] = 2 * (near * sizes) @ far
    return update


def _measures(base: Update, update: Update) -> Iterator[tuple[str, str, str, str, float]]:
    """Family, metric, parameter, name and value of an update's measures, by matrix."""
    energy = (update**2).sum((1, 2))
    values = np.linalg.svd(update, compute_uv=False) ** 2
    small = np.abs(base) < np.quantile(np.abs(base), 0.5, axis=(1, 2), keepdims=True)
    inside = ((update**2) * small).sum((1, 2)) / energy
    for i in range(MATRICES):
        at = f"[component={i}]"
        yield "spectrum", "stable_rank", "", at, energy[i] / values[i, 0]
        yield "spectrum", "tail_energy_ratio", "k=16", at, values[i, 2:].sum() / energy[i]
        yield "size", "relative_delta_fro", "", at, math.sqrt(energy[i] / (base[i] ** 2).sum())
        yield "place", "energy_share", "", f"[module={i}]", energy[i] / energy.sum()
        metric = "low_magnitude_update_overlap_ratio"
        yield "place", metric, "ratio=0.1,atol=1e-05", at, float(inside[i])


def _cosines(a: Update, b: Update) -> NDArray[np.float64]:
    inner: NDArray[np.float64] = (a * b).sum((1, 2))
    return inner / np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))


PLANTED = {
    ("size", "relative_delta_fro", "[component=0]"),
    ("place", "energy_share", "[module=0]"),
    ("direction", "delta_cosine", "[component=0]"),
}
"""The rows that the section must find."""


def outcome(rows: Sequence[GroupRow]) -> tuple[dict[str, float], float]:
    """The false discovery proportion of each family, and the fraction of planted rows that are flagged."""
    shares: dict[str, float] = {}
    planted = [r for r in rows if (r.family, r.metric, r.name) in PLANTED]
    for family in dict.fromkeys(row.family for row in rows):
        flagged = [r for r in rows if r.family == family and r.q is not None and r.q <= Q]
        # the first matrix differs in direction, hence in what it covers, and all shares sum to one
        false = [r for r in flagged if r.name != "[component=0]" and r.metric != "energy_share"] + [
            r for r in flagged if r.family == "spectrum" and r.name == "[component=0]"
        ]
        shares[family] = len(false) / max(1, len(flagged))
    return shares, sum(r.q is not None and r.q <= Q for r in planted) / len(planted)


# ------------------------------------------------------------------------- intervals and equivalence


def arms_difference(
    rng: np.random.Generator, case: Case, true: float, margin: float = 0.5
) -> Difference:
    """The comparison of arms with normal values whose means differ by `true`, deviations by `case.spread`."""
    real = true + rng.normal(size=case.real) * 0.2
    null = rng.normal(size=case.null) * 0.2 * case.spread
    return welch(real.tolist(), null.tolist(), margin, LEVEL)


def pairs_difference(
    rng: np.random.Generator, case: Case, dimensions: int, mixed: bool
) -> tuple[Difference, float]:
    """The comparison of pairs of arms by their inner products, and its true value.

    Updates of the real arms share a direction, to which every arm adds noise in `dimensions` dimensions: in few, pairs
    of an arm vary together, in many independently.
    """
    shared = np.full(dimensions, 0.6 / math.sqrt(dimensions))
    noise = rng.normal(size=(case.real + case.null, dimensions)) / math.sqrt(dimensions)
    noise[case.real :] *= case.spread
    noise[: case.real] += shared
    arms = [str(i) for i in range(len(noise))]
    inner = noise @ noise.T
    pairs = {
        frozenset((arms[i], arms[j])): float(inner[i, j])
        for i, j in product(range(len(arms)), repeat=2)
        if i < j
    }

    def difference(real: Sequence[str], null: Sequence[str]) -> float:
        other = real if mixed else null
        return pair_mean(pairs, real, real) - pair_mean(pairs, other, null)

    groups = arms[: case.real], arms[case.real :]
    return jackknife(difference, groups, 0.5, LEVEL, float(np.abs(inner).max())), 0.36


def coverage(
    rng: np.random.Generator, case: Case, draws: int, dimensions: int = 0, mixed: bool = False
) -> float:
    """The fraction of intervals that hold the true difference: of arms, or of pairs with `dimensions`."""
    hits = 0
    for _ in range(draws):
        found, true = (
            pairs_difference(rng, case, dimensions, mixed)
            if dimensions
            else (arms_difference(rng, case, 0.3), 0.3)
        )
        assert found.low is not None and found.high is not None
        hits += found.low <= true <= found.high
    return hits / draws


def false_equivalence(rng: np.random.Generator, case: Case, draws: int) -> float:
    """The fraction that is called equivalent of groups whose true difference is the margin."""
    found = [arms_difference(rng, case, 0.5).p_equivalent for _ in range(draws)]
    return sum(p is not None and p <= 1 - LEVEL for p in found) / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--intervals", type=int, default=4000)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"flagged at q <= {Q}: false discoveries by family, and planted rows found")
    for real, null in ((3, 3), (5, 5)):
        found = [outcome(study(rng, real, null)) for _ in range(given.studies)]
        print(f"  {real} and {null} seeds", end="")
        for family in found[0][0]:
            shares = [shares[family] for shares, _ in found]
            error = np.std(shares) / math.sqrt(len(shares))
            print(f"  {family} {np.mean(shares):.3f} ± {error:.3f}", end="")
        print(f"  planted {np.mean([power for _, power in found]):.3f}")
    print(f"{LEVEL:.0%} intervals that hold the true difference; equivalence stated at the margin")
    for case in CASES:
        n = given.intervals
        line = f"  {case.real} and {case.null} seeds, deviation x{case.spread:g}:"
        line += f" arms {coverage(rng, case, n):.3f}"
        if min(case.real, case.null) > 2:
            for dimensions, mixed in product((2, 2000), (False, True)):
                with_what = "mixed pairs" if mixed else "pairs"
                some = n // 4 if dimensions > 100 else n
                value = coverage(rng, case, some, dimensions, mixed)
                line += f", {with_what} in {dimensions} dimensions {value:.3f}"
        print(f"{line}; equivalent {false_equivalence(rng, case, n):.3f}", flush=True)


if __name__ == "__main__":
    main()
