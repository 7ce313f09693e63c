"""Calibration of p: the fraction of rows outside the nulls' prediction intervals for updates drawn from the null.

    python scripts/study_calibration.py                # 150 pairs per null and precision: four minutes on 2 cores
    python scripts/study_calibration.py --pairs 30     # a quick run

Every pair has a new base matrix and a structured update of it (scaled rows and columns, heavy tails, two
directions), of which one null draw is taken as the trained matrix and measured against further draws of the same
null. So p < 0.05 should hold for 5 % of the rows, and p < 0.01 for 1 %. Nulls that preserve a property of the update
(its entries, its row energies) take it from the draw, as in use.

The last table is of updates with structure: noise with two planted directions, against the Gaussian null.
Rows of one pair are correlated, so the error of a fraction is that of a few times `pairs` rows, not of their count: the
table of hits has the mean and the deviation over pairs of the number of rows with p < 0.05, and the deviation that
independent rows would have.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from vlopd.config.analysis import (
    AdamNull,
    Bf16WalkNull,
    GaussianNull,
    GeometryConfig,
    LowRankNull,
    NullConfig,
    PermutedNull,
    RowColumnNull,
    SignFlippedNull,
    StochasticBf16WalkNull,
    UlpNull,
)
from vlopd.seeding import generator
from vlopd.types import TensorName
from vlopd.update_geometry.aggregate import tensor_rows
from vlopd.update_geometry.matrix import keys_of, measure_matrix
from vlopd.update_geometry.nulls import null_delta, null_name
from vlopd.update_geometry.schema import EQUAL
from vlopd.weights.delta import TensorDelta

NULLS: tuple[NullConfig, ...] = (
    GaussianNull(),
    AdamNull(),
    Bf16WalkNull(),
    StochasticBf16WalkNull(),
    RowColumnNull(),
    PermutedNull(),
    SignFlippedNull(),
    LowRankNull(rank=8),
    UlpNull(),
)
PRECISIONS = (torch.bfloat16, torch.float32)
DRAWS = (5, 8)
SHAPE = (48, 64)
RATIOS = (0.1, 0.25)
FAMILIES = {
    "sparsity": ("frac_", "update_density", "visible_fraction"),
    "sizes": ("delta_", "coord_top_energy"),
    "masks": (
        "principal_update",
        "principal_cov",
        "principal_enr",
        "principal_not",
        "nonp",
        "low_",
    ),
    "spectrum": ("spectral_norm", "stable_rank", "effective_rank", "rank_tol", "top_energy"),
    "projection": ("principal_projection", "left_principal", "right_principal"),
    "rotation": ("top_subspace", "right_subspace"),
    "drift": ("spectral_drift",),
}
"""Prefixes of the metrics' names."""
BANDS = {0.05: (0.03, 0.07), 0.01: (0.003, 0.025)}


class Outcome(NamedTuple):
    """One row against its null."""

    pair: int
    draws: int
    family: str
    p: float
    t: float


def family_of(metric: str) -> str:
    return next(f for f, starts in FAMILIES.items() if metric.startswith(starts))


def base_and_update(
    pair: int, stored: torch.dtype, shape: tuple[int, int], planted: bool
) -> tuple[Tensor, Tensor]:
    """(base as stored, an update as stored).

    The update has scaled rows and columns, heavy tails and two directions, and 0.03 to 1 % of the base's size. Where
    `planted` it is i.i.d. noise of 1 %, with two directions of random signs that have a tenth of its energy each.
    """
    stream = generator("cpu", "calibration", pair)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=stream)

    m, n = shape
    base = (0.02 * normal(m, n)).to(stored)
    if planted:
        relative = 0.01
        update = math.sqrt(0.8) * normal(m, n)
        update += math.sqrt(0.1) * normal(m, 2).sign() @ normal(2, n).sign()
    else:
        relative = 3e-4 * 33 ** float(torch.rand((), generator=stream))
        update = normal(m, n) * torch.exp(0.5 * normal(m, 1)) * torch.exp(0.5 * normal(n))
        update += 0.3 * normal(m, 2) @ normal(2, n)
    update *= relative * 0.02 / update.square().mean().sqrt()
    wide = base.float()
    return base, (wide + update).to(stored).float() - wide


def outcomes(
    null: NullConfig,
    stored: torch.dtype,
    pair: int,
    planted: bool,
    numbers: Sequence[int] = DRAWS,
    shape: tuple[int, int] = SHAPE,
) -> list[Outcome]:
    """The rows of one pair that have a p, for several numbers of draws."""
    config = GeometryConfig(nulls=(null,), null_draws=max(numbers), ratios=RATIOS)
    base, update = base_and_update(pair, stored, shape, planted)
    if not planted:
        update = null_delta(null, base, update, stored, "trained", pair)
    where = TensorName(f"pair-{pair}", "language", 0, "up")
    finding = measure_matrix(TensorDelta(where, base, (base.float() + update).to(stored)), config)
    keys, found = keys_of(config), []
    for draws in numbers:
        kept = slice(draws + 1)
        fewer = replace(
            finding,
            draws=finding.draws[kept],
            terms=finding.terms[kept],
            measures=finding.measures[kept],
            statuses=finding.statuses[kept],
        )
        for row in tensor_rows(fewer, keys):
            if row.null != null_name(null) or row.p is None:
                continue
            assert row.null_sd is not None and row.null_mean is not None
            if row.null_sd > EQUAL * abs(row.null_mean):  # else the null has no spread
                size = abs(row.excess_t or 0.0)
                found.append(Outcome(pair, draws, family_of(row.metric), row.p, size))
    return found


def work(
    task: tuple[NullConfig, torch.dtype, int, bool],
) -> tuple[tuple[str, torch.dtype, bool], list[Outcome]]:
    torch.set_num_threads(1)
    null, stored, _, planted = task
    return (null_name(null), stored, planted), outcomes(*task)


def line(label: str, own: Sequence[Outcome], marked: bool = False) -> str:
    """Label, count, and the two fractions in percent; with `marked`, ! follows one outside its band."""
    cells = [f"{label:42} {len(own):8}"]
    for level, (low, high) in BANDS.items():
        share = sum(each.p < level for each in own) / max(len(own), 1)
        cells.append(f"{100 * share:6.2f}{'!' if marked and not low <= share <= high else ' '}")
    return "  ".join(cells)


def hits(own: Sequence[Outcome]) -> str:
    """Mean and deviation over pairs of the number of rows with p < 0.05, and the deviation of independent rows."""
    pairs = sorted({each.pair for each in own})
    counts = [sum(each.p < 0.05 for each in own if each.pair == pair) for pair in pairs]
    independent = math.sqrt(len(own) / len(pairs) * 0.05 * 0.95)
    return f"{statistics.mean(counts):8.2f}  {statistics.stdev(counts):7.2f}  {independent:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=150, help="pairs per null and precision")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    tasks = [
        (null, stored, pair, False)
        for null, stored in product(NULLS, PRECISIONS)
        for pair in range(args.pairs)
    ]
    tasks += [
        (GaussianNull(), stored, pair, True)
        for stored in PRECISIONS
        for pair in range(args.pairs // 2)
    ]
    found: dict[tuple[str, torch.dtype, bool], list[Outcome]] = {}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for key, own in pool.imap_unordered(work, tasks, chunksize=10):
            found.setdefault(key, []).extend(own)

    print(
        "trained = a fresh draw of the null; ! marks a share outside 3-7 % (p < 0.05) or 0.3-2.5 % (p < 0.01)"
    )
    print(f"{'null, precision, draws':42} {'rows':>8}  p<.05 %  p<.01 %")
    for (null, stored, planted), own in found.items():
        for draws in () if planted else DRAWS:
            label = f"{null}, {str(stored).removeprefix('torch.')}, {draws}"
            print(line(label, [each for each in own if each.draws == draws], True))
    print(f"{'rows with p < .05 of a pair: null':42} {'mean':>8}  {'sd':>7}  sd if independent")
    for (null, stored, planted), own in found.items():
        if not planted:
            label = f"{null}, {str(stored).removeprefix('torch.')}, {max(DRAWS)}"
            print(f"{label:42} {hits([each for each in own if each.draws == max(DRAWS)])}")
    print(
        f"{'null, family':42} {'rows':>8}  p<.05 %  p<.01 %   (both precisions, both numbers of draws)"
    )
    for null, family in product(map(null_name, NULLS), FAMILIES):
        own = [each for (of, _, planted), its in found.items() for each in its
               if of == null and not planted and each.family == family]  # fmt: skip
        print(
            line(f"{null}, {family}", own)
            if own
            else f"{null}, {family}: all preserved by the null"
        )
    print(
        f"{'planted directions, precision, family':42} {'rows':>8}  p<.05 %  p<.01 %   median |t|"
    )
    for (_, stored, planted), its in found.items():
        for family in FAMILIES if planted else ():
            own = [each for each in its if each.family == family and each.draws == max(DRAWS)]
            label = f"{str(stored).removeprefix('torch.')}, {family}"
            middle = statistics.median(each.t for each in own)
            print(f"{line(label, own)}  {middle:9.1f}")


if __name__ == "__main__":
    main()
