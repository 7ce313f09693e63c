"""Overlap of the visible updates of several runs, compared with that of their nulls.

Independent nulls overlap too, at the coordinates where rounding makes both visible, so the global ratio over
independence is uninformative alone; the strata (by tensor, and by tensor and decile of |w|) and the nulls correct it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from operator import gt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlopd.config.analysis import GeometryConfig
from vlopd.models.parameter_names import classify
from vlopd.progress import progress as bar
from vlopd.update_geometry.aggregate import rows_of, unshared_rows
from vlopd.update_geometry.checkpoint import write_table
from vlopd.update_geometry.coordinates import UPDATE_ATOLS, Term, not_above
from vlopd.update_geometry.magnitudes import compare, kth_smallest, magnitudes
from vlopd.update_geometry.matrix import OBSERVED
from vlopd.update_geometry.nulls import null_delta, null_name
from vlopd.update_geometry.schema import Measure, Place, Row, parameters
from vlopd.weights.delta import difference, stream

STRATA = 10
"""Quantile groups of a tensor's coordinates by |w|, smallest first, equal in size up to ties."""


@dataclass
class OverlapRow(Row):
    """A row on a pair of runs, named `first` and `second`."""

    first: str
    second: str


def write_overlap(
    base: Path,
    runs: Mapping[str, Path],
    out: Path,
    config: GeometryConfig,
    progress: bool = True,
) -> Path:
    """Writes overlap.csv and .parquet on all pairs of `runs` (name -> trained folder) from one base.

    Counts only parameters that all runs share; others get a row with the reason. Returns the path of overlap.csv.
    """
    deltas = {
        run: stream(base, folder, classify, config.max_left_out) for run, folder in runs.items()
    }
    shared = set.intersection(*(set(its.report.matched) for its in deltas.values()))
    names = [name for name in next(iter(deltas.values())).report.matched if name in shared]
    counts: dict[tuple[str, str], list[np.ndarray]] = {two: [] for two in combinations(runs, 2)}
    places = []
    with ExitStack() as stack:
        read = {run: stack.enter_context(its.reader()) for run, its in deltas.items()}
        for name in bar(names, title="overlap: tensors", unit="tensor", disable=not progress):
            pairs = {run: one(name) for run, one in read.items()}
            first = next(iter(pairs.values()))
            where, shape = first.where, "x".join(map(str, first.base.shape))
            places.append(Place(name, where.component, where.layer, where.module, shape))
            trained = {run: pair.trained for run, pair in pairs.items()}
            for two, table in _count_tables(name, first.base, trained, config).items():
                counts[two].append(table)
    draws = [OBSERVED]
    draws += [null_name(null) for null in config.nulls for _ in range(config.null_draws)]
    rows = []
    for (one, other), each in counts.items():
        for row in _pair_rows(np.stack(each), draws, places):
            rows.append(OverlapRow(**vars(row), first=one, second=other))
        for row in unshared_rows({run: its.report for run, its in deltas.items()}, set(names)):
            rows.append(OverlapRow(**vars(row), first=one, second=other))
    write_table(out, "overlap", rows)
    return out / "overlap.csv"


def _count_tables(
    name: str, base: Tensor, trained: Mapping[str, Tensor], config: GeometryConfig
) -> dict[tuple[str, str], np.ndarray]:
    """For each pair of runs, counts [draws, atols, STRATA, 4] of one tensor's coordinates.

    The last axis: changed in neither, in the first only, in the second only, in both.
    """
    strata = _magnitude_strata(base)
    plan = [
        (None, 0),
        *((null, draw) for null in config.nulls for draw in range(config.null_draws)),
    ]
    found: dict[tuple[str, str], list[list[np.ndarray]]] = {t: [] for t in combinations(trained, 2)}
    for null, draw in plan:
        moved: dict[str, list[Tensor]] = {}
        for run, after in trained.items():
            change = difference(base, after)
            if null is not None:  # independent noise per run
                change = null_delta(null, base, change, after.dtype, config.seed, draw, name, run)
            size = change.reshape(-1).abs()
            limits = [not_above(atol, size.dtype) for atol in UPDATE_ATOLS]
            moved[run] = [compare(gt, size, limit) for limit in limits]
        for one, other in found:
            both = zip(moved[one], moved[other], strict=True)
            found[one, other].append([_count_table(strata, a, b) for a, b in both])
    return {two: np.array(each) for two, each in found.items()}


def _count_table(strata: Tensor, a: Tensor, b: Tensor) -> np.ndarray:
    code = strata * 4 + a.to(torch.uint8) + 2 * b.to(torch.uint8)
    return torch.bincount(code, minlength=4 * STRATA).view(STRATA, 4).numpy()


def _magnitude_strata(base: Tensor) -> Tensor:
    """The decile of |w| within its tensor of each coordinate, flat uint8; equal weights share a decile."""
    sizes, n = magnitudes(base.reshape(-1)), base.numel()
    strata = torch.zeros(n, dtype=torch.uint8)
    ks = sorted({max(1, n * i // STRATA) for i in range(1, STRATA)})
    for k in ks:
        strata += compare(gt, sizes, kth_smallest(sizes, k).value).view(torch.uint8)
    return strata


def _pair_rows(counts: np.ndarray, draws: Sequence[str], places: Sequence[Place]) -> Iterator[Row]:
    """Rows of a pair of runs from counts [tensors, draws, atols, STRATA, 4]: all, by decile of |w|, by tensor."""
    yield from rows_of(
        [_overlap_measures(counts[:, d]) for d in range(len(draws))], draws, Place("[all]")
    )
    for stratum in range(STRATA):
        part = counts[:, :, :, stratum : stratum + 1]
        if part.sum():
            values = [_overlap_measures(part[:, d]) for d in range(len(draws))]
            yield from rows_of(values, draws, Place(f"[magnitude={stratum}]"))
    for i, place in enumerate(places):
        values = [_overlap_measures(counts[i : i + 1, d]) for d in range(len(draws))]
        yield from rows_of(values, draws, place)


def _overlap_measures(counts: np.ndarray) -> list[Measure]:
    """Overlap of two updates A and B from one draw's counts [tensors, atols, strata, 4].

    update_jaccard                        |A and B| / |A or B|
    first_covered_by_second               |A and B| / |A|, by chance |B| / n; and vice versa
    overlap_enrichment_vs_random          |A and B| / (|A| |B| / n), with chance uniform over all coordinates
    ..._within_tensors                    chance summed over tensors
    ..._within_tensors_and_magnitudes     chance summed over tensors and deciles of |w|
    """
    found = []
    for j, atol in enumerate(UPDATE_ATOLS):
        cells = counts[:, j].astype(float)  # [tensors, strata, 4]
        a, b = cells[..., 1] + cells[..., 3], cells[..., 2] + cells[..., 3]
        both, n = cells[..., 3], cells.sum(-1)
        whole, key = both.sum(), parameters(atol=atol)
        name = "overlap_enrichment_vs_random"
        fine = (a * b / np.maximum(n, 1)).sum()
        tensors = (a.sum(1) * b.sum(1) / np.maximum(n.sum(1), 1)).sum()
        everywhere = a.sum() * b.sum() / max(n.sum(), 1)
        for metric, bottom in (
            ("update_jaccard", a.sum() + b.sum() - whole),
            ("first_covered_by_second", a.sum()),
            ("second_covered_by_first", b.sum()),
            (name, everywhere),
            (f"{name}_within_tensors", tensors),
            (f"{name}_within_tensors_and_magnitudes", fine),
        ):
            term = Term(metric, key, float(whole), float(bottom), decided_by="places")
            found.append(term.measure())
    return found
