"""Overlap and direction of the updates of several runs, for each pair of runs, compared with those of their nulls.

Independent nulls overlap too, at the coordinates where rounding makes both visible, so the global ratio over
independence is uninformative alone; the strata (by tensor, and by tensor and decile of |w|) and the nulls correct it.
Directions (cosine, largest coordinates, leading subspaces) are what training runs share beyond their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from operator import gt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PretrainedConfig

from vlopd.config.analysis import GeometryConfig
from vlopd.distributed import cores, share_of
from vlopd.masks.select import quota
from vlopd.models.config_files import config_of
from vlopd.models.parameter_names import classify
from vlopd.progress import progress as bar
from vlopd.types import TensorName
from vlopd.update_geometry.aggregate import PARTS, rows_of, unshared_rows
from vlopd.update_geometry.checkpoint import measured, pool, write_table
from vlopd.update_geometry.coordinates import UPDATE_ATOLS, Term, not_above
from vlopd.update_geometry.magnitudes import CHUNK, compare, kth_smallest, magnitudes
from vlopd.update_geometry.matrix import OBSERVED, split
from vlopd.update_geometry.nulls import null_delta, null_name
from vlopd.update_geometry.partial import OVERLAP, load_partial, open_partial, save_partial
from vlopd.update_geometry.schema import Measure, Place, Row, parameters
from vlopd.update_geometry.spectrum import Factors, MatrixSum, as_matrix, factorise, too_large
from vlopd.weights.delta import difference, stream

STRATA = 10
"""Quantile groups of a tensor's coordinates by |w|, smallest first, equal in size up to ties."""
TOP_FRACTION = 0.05
"""Share of each tensor's coordinates, those of the largest |delta|, whose overlap is measured."""
RANK = 16
"""Dimension of the leading singular subspaces that are compared."""
DETAILED_PAIRS = 10
"""Most pairs of runs of which each tensor and each decile of |w| has its own rows."""


@dataclass
class OverlapRow(Row):
    """A row on a pair of runs, named `first` and `second`."""

    first: str
    second: str


class TensorOverlap(NamedTuple):
    """Sums over the coordinates of one tensor, for all pairs of R runs at once; float64.

    The first axis is of the draws, the observed updates first.
    """

    sizes: np.ndarray
    """[STRATA] coordinates"""
    products: np.ndarray
    """[draws, R, R] inner products of the updates"""
    moved: np.ndarray
    """[draws, atols, STRATA, R, R] coordinates that both moved; on the diagonal, that one moved"""
    top: np.ndarray
    """[draws, STRATA, R, R] coordinates in both top masks"""
    top_sizes: np.ndarray
    """[draws, STRATA, R] coordinates in the top mask"""
    similar: np.ndarray
    """[matrices, draws, 2, R, R] similarity of the left and right subspaces; NaN where there are none"""
    approximate: str
    """The reason why subspaces are inexact; empty where exact."""


def write_overlap(
    base: Path,
    runs: Mapping[str, Path],
    out: Path,
    config: GeometryConfig,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
    workers: int | None = None,
    processes: Accelerator | None = None,
) -> Path:
    """Writes overlap.csv and .parquet on all pairs of `runs` (name -> trained folder) from one base.

    Counts only parameters that all runs share; others get a row with the reason. Each tensor is read once, and each
    null of a run drawn once, for all pairs. inputs: what identifies the checkpoints; with it, a killed comparison
    resumes. workers: threads, each with one tensor of all runs in memory (default: one per core). processes, with
    `inputs`: all of them measure a share of the tensors, within `in_step`, and the first writes the tables. Returns the
    path of overlap.csv.
    """
    model = config_of(base)
    deltas = {
        run: stream(base, folder, classify, config.max_left_out) for run, folder in runs.items()
    }
    first = next(iter(deltas.values()))
    shared = set.intersection(*(set(its.report.matched) for its in deltas.values()))
    names = [name for name in first.report.matched if name in shared]
    sizes, order = first.sizes(), {name: i for i, name in enumerate(names)}
    partial = None
    if inputs is not None:
        about = {"inputs": inputs, "config": config.of_update, "runs": list(runs), "names": names}
        partial = open_partial(out / OVERLAP, about, processes)
    names_by_size = sorted(names, key=lambda n: (-sizes[n], n))
    first_process = processes is None or processes.is_main_process
    with ExitStack() as stack:
        read = {run: stack.enter_context(its.reader()) for run, its in deltas.items()}

        def work(name: str) -> tuple[Place, TensorOverlap]:
            path = partial.path(order[name]) if partial else None
            if path and (kept := _load_overlap(path)) is not None:
                return kept
            pairs = {run: one(name) for run, one in read.items()}
            its = next(iter(pairs.values()))
            shape = "x".join(map(str, its.base.shape))
            place = Place(name, its.where.component, its.where.layer, its.where.module, shape)
            trained = {run: pair.trained for run, pair in pairs.items()}
            own = _compare_updates(its.where, its.base, trained, config, model)
            if path:
                _save_overlap(path, place, own)
            return place, own

        shown = stack.enter_context(
            bar(
                title="overlap: tensors",
                total=len(share_of(processes, names)),
                unit="tensor",
                disable=not (progress and first_process),
            )
        )
        run_all = stack.enter_context(pool(workers or cores()))
        found = measured(run_all, work, names_by_size, lambda _: shown.update(1), processes)
    if not first_process:
        return out / "overlap.csv"
    ordered = [found[name] for name in names]
    reports = {run: its.report for run, its in deltas.items()}
    unshared = list(unshared_rows(reports, set(names)))
    rows = []
    pairs = list(combinations(enumerate(runs), 2))
    for (i, one), (j, other) in pairs:
        own = _pair_rows(ordered, i, j, _draw_names(config), len(pairs) <= DETAILED_PAIRS)
        for row in (*own, *unshared):
            rows.append(OverlapRow(**vars(row), first=one, second=other))
    write_table(out, "overlap", rows)
    if partial:
        partial.remove()
    return out / "overlap.csv"


def _save_overlap(path: Path, place: Place, its: TensorOverlap) -> None:
    arrays = its._asdict()
    about = {"place": place._asdict(), "approximate": arrays.pop("approximate")}
    save_partial(path, arrays, about)


def _load_overlap(path: Path) -> tuple[Place, TensorOverlap] | None:
    if (kept := load_partial(path)) is None:
        return None
    arrays, about = kept
    return Place(**about["place"]), TensorOverlap(**arrays, approximate=about["approximate"])


def _draw_names(config: GeometryConfig) -> list[str]:
    return [
        OBSERVED,
        *(null_name(null) for null in config.nulls for _ in range(config.null_draws)),
    ]


# ---------------------------------------------------------------------------------------- one tensor


def _compare_updates(
    where: TensorName,
    base: Tensor,
    trained: Mapping[str, Tensor],
    config: GeometryConfig,
    model: PretrainedConfig | None,
) -> TensorOverlap:
    """The sums of one tensor over all runs, observed and for each null draw.

    Holds one update of each run at a time, in fp32.
    """
    strata = _magnitude_strata(base)
    plan = [(null, draw) for null in config.nulls for draw in range(config.null_draws)]
    draws = []
    for null, draw in [(None, 0), *plan]:
        changes = []
        for run, after in trained.items():
            change = difference(base, after)
            if null is not None:  # independent noise per run
                names = (config.seed, draw, where.name, run)
                change = null_delta(null, base, change, after.dtype, *names)
            changes.append(change)
        similar, approximate = _similarities(where, changes, config, model)
        draws.append((*_coordinate_sums([c.reshape(-1) for c in changes], strata), similar))
    products, moved, top, top_sizes, similar = (np.array(each) for each in zip(*draws, strict=True))
    sizes = torch.bincount(strata, minlength=STRATA).double().numpy()
    return TensorOverlap(
        sizes, products, moved, top, top_sizes, np.moveaxis(similar, 1, 0), approximate
    )


def _coordinate_sums(changes: Sequence[Tensor], strata: Tensor) -> tuple[np.ndarray, ...]:
    """(products, moved, top, top_sizes) of `TensorOverlap` for one draw, from the flat updates of all runs.

    The inner product of two updates is exact up to the rounding of float64 sums.
    """
    r = len(changes)
    limits = [not_above(atol, changes[0].dtype) for atol in UPDATE_ATOLS]
    cuts = [_top_cut(change) for change in changes]
    cut = torch.tensor([value for value, _ in cuts], dtype=changes[0].dtype)[:, None]
    tie = torch.tensor([share for _, share in cuts])[:, None]
    products = np.zeros((r, r))
    moved, top = np.zeros((len(limits), STRATA, r, r)), np.zeros((STRATA, r, r))
    top_sizes = np.zeros((STRATA, r))
    for start in range(0, len(strata), CHUNK):
        chosen = slice(start, start + CHUNK)
        own = strata[chosen]
        chunk = torch.stack([change[chosen] for change in changes])
        wide = chunk.double()
        products += (wide @ wide.T).numpy()
        sizes = chunk[:, torch.argsort(own)].abs()  # coordinates of a stratum side by side
        ends = torch.bincount(own, minlength=STRATA).tolist()
        for stratum, part in enumerate(sizes.split(ends, dim=1)):
            for j, limit in enumerate(limits):
                above = (part > limit).float()
                moved[j, stratum] += (above @ above.T).numpy()
            inside = (part > cut).float() + tie * (part == cut)
            top[stratum] += (inside @ inside.T).numpy()
            top_sizes[stratum] += inside.sum(1).numpy()
    return products, moved, top, top_sizes


def _top_cut(change: Tensor) -> tuple[float, float]:
    """(the smallest |delta| of a flat update's top mask, the share of the coordinates of that size that it has).

    Ties are common in a stored precision. Each counts by this share, as if drawn at random: ordered by place, two
    masks would share their ties.
    """
    sizes, k = change.abs(), quota(TOP_FRACTION, len(change))
    found = kth_smallest(sizes, len(sizes) - k + 1)
    above = len(sizes) - found.smaller - found.equal
    return found.value, (k - above) / found.equal


def _similarities(
    where: TensorName,
    changes: Sequence[Tensor],
    config: GeometryConfig,
    model: PretrainedConfig | None,
) -> tuple[np.ndarray, str]:
    """(|U_a^T U_b|^2 / RANK of the leading singular subspaces of all pairs, left and right, [matrices, 2, R, R]; the
    reason why they are inexact).

    NaN where a matrix has no more than RANK rows or columns, which span all, or an update has a lower rank.
    """
    found, why = [], ""
    for pieces in zip(*(split(where, change, model) for change in changes), strict=True):
        similar = np.full((2, len(changes), len(changes)), np.nan)
        factors: dict[int, Factors] = {}
        for i, (_, piece) in enumerate(pieces):
            update, _ = as_matrix(piece)
            if update is None or min(update.shape) <= RANK or not update.any():
                continue
            m, n = update.shape
            reason = too_large(m, n, config)
            its = factorise(MatrixSum((update,)), RANK, config.factorisation, reason)
            if its.rank >= RANK:
                factors[i], why = its, reason or why
        for side in range(2) if factors else ():
            bases = [(its.left, its.right)[side] for its in factors.values()]
            basis, count = torch.cat(bases, dim=1), len(bases)
            cosines = (basis.T @ basis).square().view(count, RANK, count, RANK)
            own = list(factors)
            similar[side][np.ix_(own, own)] = cosines.sum((1, 3)).numpy() / RANK
        found.append(similar)
    return np.array(found), why


def _magnitude_strata(base: Tensor) -> Tensor:
    """The decile of |w| within its tensor of each coordinate, flat uint8; equal weights share a decile."""
    sizes, n = magnitudes(base.reshape(-1)), base.numel()
    strata = torch.zeros(n, dtype=torch.uint8)
    ks = sorted({max(1, n * i // STRATA) for i in range(1, STRATA)})
    for k in ks:
        strata += compare(gt, sizes, kth_smallest(sizes, k).value).view(torch.uint8)
    return strata


# --------------------------------------------------------------------------------------------- rows


def _pair_rows(
    tensors: Sequence[tuple[Place, TensorOverlap]],
    i: int,
    j: int,
    draws: Sequence[str],
    detailed: bool,
) -> Iterator[Row]:
    """Rows of the runs i and j: all, by component and part, medians of subspaces; if `detailed`, also by decile of |w|
    and by tensor."""
    counts = np.stack([_count_cells(its, i, j) for _, its in tensors])
    top, products = _top_cells(tensors, i, j), _product_cells(tensors, i, j)

    def rows(place: Place, chosen: Sequence[int], directions: bool = True) -> Iterator[Row]:
        values = [_overlap_measures(counts[chosen, d]) for d in range(len(draws))]
        if directions:
            for d, measures in enumerate(values):
                measures += _direction_measures(products[chosen, d], top[chosen, d])
        yield from rows_of(values, draws, place)

    yield from rows(Place("[all]"), range(len(tensors)))
    for place, chosen in _groups([place for place, _ in tensors]).items():
        values = [
            _direction_measures(products[chosen, d], top[chosen, d]) for d in range(len(draws))
        ]
        yield from rows_of(values, draws, place)
    similar = np.concatenate([its.similar[:, :, :, i, j] for _, its in tensors])
    why = next((its.approximate for _, its in tensors if its.approximate), "")
    medians = [_median_similarities(similar[:, d], why) for d in range(len(draws))]
    yield from rows_of(medians, draws, Place("[median]"))
    if not detailed:
        return
    for stratum in range(STRATA):
        part = counts[:, :, :, stratum : stratum + 1]
        if part.sum():
            values = [_overlap_measures(part[:, d]) for d in range(len(draws))]
            yield from rows_of(values, draws, Place(f"[magnitude={stratum}]"))
    for index, (place, _) in enumerate(tensors):
        yield from rows(place, [index])


def _groups(places: Sequence[Place]) -> dict[Place, list[int]]:
    """The tensors of each component and part, by their row's place."""
    found: dict[Place, list[int]] = {}
    for index, place in enumerate(places):
        part = PARTS.get(place.module, "other")
        component = Place(f"[component={place.component}]", component=place.component)
        for group in (component, Place(f"[part={part}]")):
            found.setdefault(group, []).append(index)
    return dict(sorted(found.items()))


def _count_cells(its: TensorOverlap, i: int, j: int) -> np.ndarray:
    """Counts [draws, atols, STRATA, 4]: changed in neither, in i only, in j only, in both."""
    a, b, both = its.moved[..., i, i], its.moved[..., j, j], its.moved[..., i, j]
    return np.stack([its.sizes - a - b + both, a - both, b - both, both], axis=-1)


def _product_cells(tensors: Sequence[tuple[Place, TensorOverlap]], i: int, j: int) -> np.ndarray:
    """(a.b, |a|^2, |b|^2) of the updates of i and j, [tensors, draws, 3]."""
    return np.array(
        [
            np.stack([p[:, i, j], p[:, i, i], p[:, j, j]], axis=-1)
            for p in (its.products for _, its in tensors)
        ]
    )


def _top_cells(tensors: Sequence[tuple[Place, TensorOverlap]], i: int, j: int) -> np.ndarray:
    """Coordinates in both top masks of i and j, by chance within tensors, and within deciles: [tensors, draws, 3]."""
    found = []
    for _, its in tensors:
        both = its.top[..., i, j].sum(-1)
        a, b = its.top_sizes[..., i], its.top_sizes[..., j]
        tensor = a.sum(-1) * b.sum(-1) / its.sizes.sum()
        decile = (a * b / np.maximum(its.sizes, 1)).sum(-1)
        found.append(np.stack([both, tensor, decile], axis=-1))
    return np.array(found)


def _direction_measures(products: np.ndarray, top: np.ndarray) -> list[Measure]:
    """Directions of two updates A and B, from `_product_cells` and `_top_cells` [tensors, 3] of one draw.

    delta_cosine                                  A.B / (|A| |B|)
    top_mask_overlap_over_chance                  coordinates in the top masks of both, over chance within tensors
    top_mask_overlap_over_chance_within_magnitudes  over chance within tensors and deciles of |w|

    A top mask has each tensor's TOP_FRACTION of largest |delta|.
    """
    product, a, b = products.sum(0).tolist()
    both, tensor, decile = top.sum(0).tolist()
    name, key = "top_mask_overlap_over_chance", parameters(fraction=TOP_FRACTION)
    cosine = Term("delta_cosine", "", product, float(np.sqrt(a) * np.sqrt(b)))
    apart = ""
    if a == 0 or b == 0:  # masks of ties alone
        both = tensor = decile = 0.0
    elif decile == 0:
        apart = "the masks have no decile of |w| in common"
    return [
        cosine.measure(),
        Term(name, key, both, tensor, decided_by="places").measure(),
        Term(
            f"{name}_within_magnitudes", key, both, decile, reason=apart, decided_by="places"
        ).measure(),
    ]


def _median_similarities(similar: np.ndarray, approximate: str) -> list[Measure]:
    """Medians over matrices of `TensorOverlap.similar` of one pair and draw, [matrices, 2]."""
    found = []
    for side, values in zip(("left", "right"), similar.T, strict=True):
        name, key = f"{side}_subspace_similarity", parameters(k=RANK)
        values = values[~np.isnan(values)]
        if not len(values):
            reason = f"no matrix has more than {RANK} rows and columns, and moved in both"
            found.append(Measure(name, key, None, "skipped", reason))
            continue
        reason = f"median of {len(values)} tensors" + (f"; {approximate}" if approximate else "")
        status = "approximate" if approximate else "ok"
        found.append(Measure(name, key, float(np.median(values)), status, reason))
    return found


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
