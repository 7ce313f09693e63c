"""Evolution of an update over checkpoints: cosine to the final update, and similarity of its subspaces.

Compared with a random walk: noise with increments of the observed sizes, rounded and matched in norm like
any null. A walk of T equal steps also has cosine sqrt(t / T) to its end, so a rising cosine is not evidence.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vlopd.config.analysis import GeometryConfig
from vlopd.distributed import share, share_of
from vlopd.models.config_files import config_of
from vlopd.models.parameter_names import classify
from vlopd.progress import progress as bar
from vlopd.seeding import generator
from vlopd.update_geometry.aggregate import rows_of, unshared_rows
from vlopd.update_geometry.checkpoint import write_table
from vlopd.update_geometry.coordinates import Term
from vlopd.update_geometry.magnitudes import norm
from vlopd.update_geometry.matrix import OBSERVED, matrices
from vlopd.update_geometry.nulls import matched_delta
from vlopd.update_geometry.schema import Measure, Place, Row, parameters
from vlopd.update_geometry.spectrum import Factors, MatrixSum, as_matrix, factorise, too_large
from vlopd.weights.delta import stream

RANKS = (1, 4, 16)
WALK = "random_walk"


@dataclass
class StepRow(Row):
    """A row on one checkpoint of a run."""

    step: int


def step_of(folder: Path, position: int) -> int:
    """The number at the end of a checkpoint folder's name, else its position in the list."""
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else position


def write_trajectory(
    base: Path,
    steps: Mapping[int, Path],
    out: Path,
    config: GeometryConfig,
    progress: bool = True,
    tables: Mapping[int, Path] | None = None,
    processes: Accelerator | None = None,
) -> Path:
    """Writes trajectory.csv and .parquet of checkpoints (step -> folder); the last is the final one.

    tables: step -> the folder of that step's geometry.csv, whose group rows are included. Tensors are split into
    matrices, [out, in], as there. Holds all checkpoints of one tensor in memory. processes: all of them measure a share
    of the tensors, within `in_step`, and the first writes the tables. Returns the path of trajectory.csv.
    """
    order = sorted(steps)
    model = config_of(base)
    deltas = {step: stream(base, steps[step], classify, config.max_left_out) for step in order}
    names = [
        name
        for name in deltas[order[-1]].report.matched
        if all(name in its.report.matched for its in deltas.values())
    ]
    draws = [OBSERVED, *[WALK] * config.null_draws]
    first_process = processes is None or processes.is_main_process
    with ExitStack() as stack:
        read = {step: stack.enter_context(its.reader()) for step, its in deltas.items()}
        shown = stack.enter_context(
            bar(
                title="trajectory: tensors",
                total=len(share_of(processes, names)),
                unit="tensor",
                disable=not (progress and first_process),
            )
        )

        def work(name: str) -> list[tuple[Place, list[UpdateSeries]]]:
            """The place and the series, by draw, of each matrix of a tensor."""
            found = []
            stored = [matrices(read[step](name), model) for step in order]
            for pairs in zip(*stored, strict=True):
                first, where = pairs[0], pairs[0].where
                shape = "x".join(map(str, first.base.shape))
                place = Place(first.name, where.component, where.layer, where.module, shape)
                changes = [pair.delta for pair in pairs]
                own = [_compare_steps(changes, config)]
                for draw in range(config.null_draws):
                    names_of_stream = (config.seed, draw, first.name)
                    noise = _random_walk_null(
                        first.base, changes, pairs[-1].trained.dtype, *names_of_stream
                    )
                    own.append(_compare_steps(noise, config))
                found.append((place, own))
            shown.update(1)
            return found

        every = share(processes, work, names)
    if not first_process:
        return out / "trajectory.csv"
    places = [place for its in every for place, _ in its]
    courses = [own for its in every for _, own in its]  # [matrices][draws]
    rows = list(_step_rows(order, courses, draws, places))
    reports = {f"step {step}": its.report for step, its in deltas.items()}
    unshared = list(unshared_rows(reports, set(names)))
    rows += [StepRow(**vars(row), step=step) for step in order for row in unshared]
    for step, folder in (tables or {}).items():
        rows += [StepRow(**row, step=step) for row in _read_group_rows(folder)]
    write_table(out, "trajectory", rows)
    return out / "trajectory.csv"


def _random_walk_null(
    base: Tensor, changes: Sequence[Tensor], stored: torch.dtype, *names: str | int
) -> list[Tensor]:
    """Draws a random walk with the norms of `changes` [steps] after rounding; independent Gaussian increments."""
    direction = torch.zeros_like(changes[0])
    found, last = [], 0.0
    stream_ = generator("cpu", "null", WALK, *names)
    for change in changes:
        size = norm(change)
        noise = torch.randn(change.shape, generator=stream_, dtype=change.dtype)
        direction = direction + noise * (
            math.sqrt(max(size**2 - last**2, 0)) / max(norm(noise), 1e-30)
        )
        last = max(size, last)
        moved = matched_delta(base, direction.clone(), size, stored) if size else 0 * change
        found.append(moved)
    return found


class UpdateSeries(NamedTuple):
    """One matrix's update D at each step, compared with two partners E: the final and the previous update.

    products: (D.E, |D|^2, |E|^2). similar: |U_k^T U'_k|^2 / k of the top-k left and right singular subspaces, NaN
    where there are none. `approximate`: the reason why the subspaces are inexact; empty where exact.
    """

    products: np.ndarray  # [steps, 2, 3]
    similar: np.ndarray  # [steps, 2, 2, ranks]
    approximate: str


def _compare_steps(changes: Sequence[Tensor], config: GeometryConfig) -> UpdateSeries:
    """Compares the updates of one matrix, observed or null, over the steps."""
    flat = [as_matrix(change)[0] for change in changes]
    subspaces = [None if m is None else _leading_factors(m, config) for m in flat]
    products, similar = [], []
    for i, change in enumerate(changes):
        partners = (len(changes) - 1, i - 1 if i else None)
        products.append(
            [_inner_products(change, None if p is None else changes[p]) for p in partners]
        )
        similar.append(
            [
                _subspace_similarities(subspaces[i], None if p is None else subspaces[p])
                for p in partners
            ]
        )
    approximate = next((s.approximate for s in subspaces if s is not None), "")
    return UpdateSeries(np.array(products), np.array(similar), approximate)


def _leading_factors(matrix: Tensor, config: GeometryConfig) -> Factors | None:
    if not matrix.any():
        return None
    m, n = matrix.shape
    return factorise(
        MatrixSum((matrix,)), min(max(RANKS), m, n), config.factorisation, too_large(m, n, config)
    )


def _inner_products(a: Tensor, b: Tensor | None) -> tuple[float, float, float]:
    if b is None:
        return 0.0, 0.0, 0.0
    product = sum(
        float((x.double() * y).sum())
        for x, y in zip(a.reshape(-1).split(2**18), b.reshape(-1).split(2**18), strict=True)
    )
    return product, norm(a) ** 2, norm(b) ** 2


def _subspace_similarities(a: Factors | None, b: Factors | None) -> np.ndarray:
    """Subspace similarities [left and right, ranks]; NaN where a rank exceeds either's."""
    found = np.full((2, len(RANKS)), np.nan)
    if a is None or b is None:
        return found
    for side, (one, other) in enumerate(((a.left, b.left), (a.right, b.right))):
        cosines = (one.T @ other).square()
        for j, k in enumerate(RANKS):
            if k <= min(a.rank, b.rank, *cosines.shape):
                found[side, j] = float(cosines[:k, :k].sum()) / k
    return found


def _step_rows(
    order: Sequence[int],
    courses: Sequence[Sequence[UpdateSeries]],
    draws: Sequence[str],
    places: Sequence[Place],
) -> Iterator[StepRow]:
    """The rows of the series [matrices][draws], of all matrices together and of each."""
    products = np.array([[each.products for each in own] for own in courses])
    similar = np.array([[each.similar for each in own] for own in courses])
    members = [(Place("[all]"), slice(None))]
    members += [(place, slice(i, i + 1)) for i, place in enumerate(places)]
    for place, chosen in members:
        approximate = next((o[0].approximate for o in courses[chosen] if o[0].approximate), "")
        for s, step in enumerate(order):
            values = [
                _cosine_measures(products[chosen, d, s].sum(0))
                + _median_similarities(similar[chosen, d, s], approximate)
                for d in range(len(draws))
            ]
            for row in rows_of(values, draws, place):
                yield StepRow(**vars(row), step=step)


def _cosine_measures(products: np.ndarray) -> list[Measure]:
    """cosine_to_final and cosine_to_previous from (D.E, |D|^2, |E|^2) of both, summed over tensors."""
    found = []
    for partner, (product, own, theirs) in zip(("final", "previous"), products, strict=True):
        term = Term(f"cosine_to_{partner}", "", float(product), math.sqrt(own * theirs))
        found.append(term.measure())
    return found


def _median_similarities(similar: np.ndarray, approximate: str) -> list[Measure]:
    """Medians of subspace similarities [tensors, 2, 2, ranks] over the tensors that have them.

    approximate: the reason why some are inexact; empty where exact.
    """
    status = "approximate" if approximate else "ok"
    found = []
    for p, partner in enumerate(("final", "previous")):
        for s, side in enumerate(("left", "right")):
            for j, k in enumerate(RANKS):
                values = similar[:, p, s, j]
                values = values[~np.isnan(values)]
                key = (f"{side}_subspace_similarity_to_{partner}", parameters(k=k))
                if len(values):
                    count = f"median of {len(values)} tensors" if len(similar) > 1 else ""
                    reason = "; ".join(filter(None, (count, approximate)))
                    found.append(Measure(*key, float(np.median(values)), status, reason))
                else:
                    found.append(Measure(*key, None, "skipped", "no such subspace on both sides"))
    return found


def _read_group_rows(folder: Path) -> Iterator[dict]:
    """The rows of geometry.csv on the whole model and its groups, with the fields of `Row`."""
    numbers = ("value", "null_mean", "null_sd", "excess", "excess_t", "p")
    with (folder / "geometry.csv").open() as file:
        for row in csv.DictReader(file):
            if row["name"].startswith("["):
                parsed = {k: float(row[k]) if row[k] else None for k in numbers}
                yield {**row, **parsed, "layer": int(row["layer"]) if row["layer"] else None}
