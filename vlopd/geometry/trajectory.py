"""How an update grows over checkpoints: its direction towards the final one, and when its subspaces lock.

Beside a random walk: noise whose increments have the observed steps' sizes, rounded and matched in norm like
any null. A walk of T equal steps has cosine sqrt(t / T) with its end too, so a rising cosine is no finding.
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
from torch import Tensor
from tqdm import tqdm

from vlopd.config.analysis import GeometryConfig
from vlopd.geometry.aggregate import rows_of, unshared_rows
from vlopd.geometry.checkpoint import write_table
from vlopd.geometry.coordinates import Term
from vlopd.geometry.magnitudes import norm
from vlopd.geometry.matrix import OBSERVED, matrices
from vlopd.geometry.nulls import matched_delta
from vlopd.geometry.schema import Measure, Place, Row, parameters
from vlopd.geometry.spectrum import Factors, Sum, as_matrix, factorise, too_large
from vlopd.models.config_files import config_of
from vlopd.models.names import classify
from vlopd.seeding import generator
from vlopd.weights.delta import stream

RANKS = (1, 4, 16)
WALK = "random_walk"


@dataclass
class StepRow(Row):
    """A row about one checkpoint of a run."""

    step: int


def step_of(folder: Path, position: int) -> int:
    """The number at the end of a checkpoint folder's name, else its position in the list."""
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else position


def trajectory(
    base: Path,
    steps: Mapping[int, Path],
    out: Path,
    config: GeometryConfig,
    progress: bool = True,
    tables: Mapping[int, Path] | None = None,
) -> Path:
    """Writes trajectory.csv and .parquet of checkpoints (step -> folder), the last of which is the final one.

    tables: step -> the folder of that step's geometry.csv, whose aggregates are taken in. Tensors are split into
    matrices, [out, in], as there. All checkpoints of one tensor are in memory at a time. Returns the path of
    trajectory.csv.
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
    courses: list[list[Course]] = []  # [matrices][draws]
    places = []
    with ExitStack() as stack:
        read = {step: stack.enter_context(its.reader()) for step, its in deltas.items()}
        for name in tqdm(names, desc="trajectory", unit="tensor", disable=not progress):
            stored = [matrices(read[step](name), model) for step in order]
            for pairs in zip(*stored, strict=True):
                first, where = pairs[0], pairs[0].where
                shape = "x".join(map(str, first.base.shape))
                places.append(Place(first.name, where.component, where.layer, where.module, shape))
                changes = [pair.delta for pair in pairs]
                own = [along(changes, config)]
                for draw in range(config.null_draws):
                    names_of_stream = (config.seed, draw, first.name)
                    noise = walk(first.base, changes, pairs[-1].trained.dtype, *names_of_stream)
                    own.append(along(noise, config))
                courses.append(own)
    rows = list(step_rows(order, courses, draws, places))
    reports = {f"step {step}": its.report for step, its in deltas.items()}
    unshared = list(unshared_rows(reports, set(names)))
    rows += [StepRow(**vars(row), step=step) for step in order for row in unshared]
    for step, folder in (tables or {}).items():
        rows += [StepRow(**row, step=step) for row in aggregates(folder)]
    write_table(out, "trajectory", rows)
    return out / "trajectory.csv"


def walk(
    base: Tensor, changes: Sequence[Tensor], stored: torch.dtype, *names: str | int
) -> list[Tensor]:
    """A random walk with the norms of `changes` [steps] after rounding; independent Gaussian increments."""
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


class Course(NamedTuple):
    """One matrix's updates D at each step, with their two partners E: the final update, and the one before.

    products: (D.E, |D|^2, |E|^2). similar: |U_k^T U'_k|^2 / k of the top-k left and right singular subspaces, NaN
    where there are none. `approximate` says why the subspaces are not exact; else it is empty.
    """

    products: np.ndarray  # [steps, 2, 3]
    similar: np.ndarray  # [steps, 2, 2, ranks]
    approximate: str


def along(changes: Sequence[Tensor], config: GeometryConfig) -> Course:
    """The course of one matrix's updates, or of a null's."""
    flat = [as_matrix(change)[0] for change in changes]
    subspaces = [None if m is None else top(m, config) for m in flat]
    products, similar = [], []
    for i, change in enumerate(changes):
        partners = (len(changes) - 1, i - 1 if i else None)
        products.append([inner(change, None if p is None else changes[p]) for p in partners])
        similar.append([sims(subspaces[i], None if p is None else subspaces[p]) for p in partners])
    approximate = next((s.approximate for s in subspaces if s is not None), "")
    return Course(np.array(products), np.array(similar), approximate)


def top(matrix: Tensor, config: GeometryConfig) -> Factors | None:
    if not matrix.any():
        return None
    m, n = matrix.shape
    return factorise(
        Sum((matrix,)), min(max(RANKS), m, n), config.factorisation, too_large(m, n, config)
    )


def inner(a: Tensor, b: Tensor | None) -> tuple[float, float, float]:
    if b is None:
        return 0.0, 0.0, 0.0
    product = sum(
        float((x.double() * y).sum())
        for x, y in zip(a.reshape(-1).split(2**18), b.reshape(-1).split(2**18), strict=True)
    )
    return product, norm(a) ** 2, norm(b) ** 2


def sims(a: Factors | None, b: Factors | None) -> np.ndarray:
    """Subspace similarities [left and right, ranks]; NaN where a rank is more than either has."""
    found = np.full((2, len(RANKS)), np.nan)
    if a is None or b is None:
        return found
    for side, (one, other) in enumerate(((a.left, b.left), (a.right, b.right))):
        cosines = (one.T @ other).square()
        for j, k in enumerate(RANKS):
            if k <= min(a.rank, b.rank, *cosines.shape):
                found[side, j] = float(cosines[:k, :k].sum()) / k
    return found


def step_rows(
    order: Sequence[int],
    courses: Sequence[Sequence[Course]],
    draws: Sequence[str],
    places: Sequence[Place],
) -> Iterator[StepRow]:
    """The rows of courses [matrices][draws], of all together and of each."""
    products = np.array([[each.products for each in own] for own in courses])
    similar = np.array([[each.similar for each in own] for own in courses])
    members = [(Place("[all]"), slice(None))]
    members += [(place, slice(i, i + 1)) for i, place in enumerate(places)]
    for place, chosen in members:
        approximate = next((o[0].approximate for o in courses[chosen] if o[0].approximate), "")
        for s, step in enumerate(order):
            values = [
                directions(products[chosen, d, s].sum(0))
                + medians(similar[chosen, d, s], approximate)
                for d in range(len(draws))
            ]
            for row in rows_of(values, draws, place):
                yield StepRow(**vars(row), step=step)


def directions(products: np.ndarray) -> list[Measure]:
    """cosine_to_final and cosine_to_previous from (D.E, |D|^2, |E|^2) of both, summed over tensors."""
    found = []
    for partner, (product, own, theirs) in zip(("final", "previous"), products, strict=True):
        term = Term(f"cosine_to_{partner}", "", float(product), math.sqrt(own * theirs))
        found.append(term.measure())
    return found


def medians(similar: np.ndarray, approximate: str) -> list[Measure]:
    """Subspace similarities [tensors, 2, 2, ranks] as medians over the tensors that have them.

    approximate: why some of them are not exact; else empty.
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


def aggregates(folder: Path) -> Iterator[dict]:
    """The rows of geometry.csv about the whole model and its parts, as `Row` has them."""
    numbers = ("value", "null_mean", "null_sd", "excess", "excess_t", "p")
    with (folder / "geometry.csv").open() as file:
        for row in csv.DictReader(file):
            if row["name"].startswith("["):
                parsed = {k: float(row[k]) if row[k] else None for k in numbers}
                yield {**row, **parsed, "layer": int(row["layer"]) if row["layer"] else None}
