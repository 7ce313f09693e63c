"""Measures of one matrix: of its update and of each null draw, packed into arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlopd.config.analysis import GeometryConfig
from vlopd.models.parameter_names import parts
from vlopd.types import TensorName
from vlopd.update_geometry.base_masks import BaseMasks
from vlopd.update_geometry.coordinates import Term, coordinate_terms
from vlopd.update_geometry.nulls import null_delta, null_name
from vlopd.update_geometry.projection import base_factors, matrix_measures, skipped_measures
from vlopd.update_geometry.schema import STATUSES, Measure, Place
from vlopd.update_geometry.spectrum import as_matrix
from vlopd.weights.delta import TensorDelta, difference

OBSERVED = ""
"""Name of the observed update among a result's draws, always the first."""


class TermKey(NamedTuple):
    """The fields of a term that are the same for every tensor."""

    metric: str
    parameter: str
    fold: str
    decided_by: str


class MeasureKey(NamedTuple):
    metric: str
    parameter: str


@dataclass(frozen=True)
class Keys:
    """Names of the rows of `MatrixResult.terms` and `MatrixResult.measures`; the same for every tensor of a config."""

    terms: tuple[TermKey, ...]
    measures: tuple[MeasureKey, ...]


@dataclass(frozen=True)
class MatrixResult:
    """The measures of one matrix.

    Worked example, one null of two draws, T terms and M measures:
        draws     ("", "gaussian", "gaussian")
        terms     [3, T, 4]  numerator, denominator, mean and variance of the numerator by chance (NaN: none)
        measures  [3, M, 3]  value (NaN: none), mean and deviation by chance (NaN: none)
        statuses  [3, M]     indices into STATUSES
    Reasons, by index of term or measure, are of the observed update.
    """

    place: Place
    draws: tuple[str, ...]
    terms: np.ndarray
    measures: np.ndarray
    statuses: np.ndarray
    term_reasons: dict[int, str]
    measure_reasons: dict[int, str]

    @property
    def energy(self) -> np.ndarray:
        """Squared norm of the update in each draw."""
        return self.terms[:, 0, 0]

    @property
    def numel(self) -> float:
        return float(self.terms[0, 1, 1])  # delta_rms divides by it


def matrices(pair: TensorDelta, model: PretrainedConfig | None) -> Iterator[TensorDelta]:
    """Splits a stored pair into its matrices, as `split` does."""
    both = (split(pair.where, tensor, model) for tensor in (pair.base, pair.trained))
    for (where, base), (_, trained) in zip(*both, strict=True):
        yield TensorDelta(where, base, trained)


def split(
    where: TensorName, tensor: Tensor, model: PretrainedConfig | None
) -> Iterator[tuple[TensorName, Tensor]]:
    """Splits a stored tensor into its matrices, each [out, in]: q, k, v of a fused qkv, single experts.

    Without the model's config the tensor is not split.
    """
    if model is None:
        yield where, tensor
        return
    for part in parts(where, tensor.shape, model):
        name = where.name
        if part.expert is not None:
            name += f"[{part.expert}]"
        if part.module != where.module.removeprefix("expert_"):
            name += f"[{part.module}]"
        found = tensor[part.index]
        if part.transposed and found.ndim > 1:  # a stack of biases holds vectors
            found = found.T
        yield TensorName(name, where.component, where.layer, part.module), found.contiguous()


def measure_matrix(pair: TensorDelta, config: GeometryConfig, device: str = "cpu") -> MatrixResult:
    """Measures one matrix's update and its nulls; factorises the base once.

    Holds the pair as stored and one fp32 update at a time, observed or null.
    """
    base, trained = pair.base.to(device), pair.trained.to(device)
    matrix, reason = as_matrix(base)
    factors, status = None, "skipped"
    if matrix is not None:
        try:
            factors = base_factors(matrix, config)
        except FAILURES as error:
            status, reason = "failed", _describe_error(error)
    masks = BaseMasks(base, factors, config.ratios)

    names, terms, measures = [], [], []
    plan = [(null, draw) for null in config.nulls for draw in range(config.null_draws)]
    for null, draw in [(None, 0), *plan]:
        change = difference(base, trained)
        if null is not None:
            names_of_stream = (config.seed, draw, pair.name)
            change = null_delta(null, base, change, trained.dtype, *names_of_stream)
        names.append(OBSERVED if null is None else null_name(null))
        terms.append(coordinate_terms(base, change, masks, config.ratios))
        if matrix is None or factors is None:
            measures.append(skipped_measures(config, reason, status))
            continue
        try:
            found = matrix_measures(matrix, factors, change.flatten(1), config)
        except FAILURES as error:
            found = skipped_measures(config, _describe_error(error), "failed")
        measures.append(found)
        del change
    where = pair.where
    shape = "x".join(map(str, base.shape))
    place = Place(where.name, where.component, where.layer, where.module, shape)
    return _pack_result(place, names, terms, measures)


FAILURES = (torch.linalg.LinAlgError, np.linalg.LinAlgError, torch.OutOfMemoryError, MemoryError)
"""Errors a factorisation may raise; the tensor's rows then have status `failed`, and every aggregate counts them."""


def _describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _pack_result(
    place: Place, names: list[str], terms: list[list[Term]], measures: list[list[Measure]]
) -> MatrixResult:
    none = (np.nan, np.nan)
    return MatrixResult(
        place=place,
        draws=tuple(names),
        terms=np.array(
            [[(t.numerator, t.denominator, *(t.chance or none)) for t in draw] for draw in terms],
            dtype=float,
        ),
        measures=np.array(
            [[(m.value, *(m.chance or none)) for m in draw] for draw in measures], dtype=float
        ),
        statuses=np.array(
            [[STATUSES.index(m.status) for m in draw] for draw in measures], dtype=np.int8
        ),
        term_reasons={i: t.reason for i, t in enumerate(terms[0]) if t.reason},
        measure_reasons={i: m.reason for i, m in enumerate(measures[0]) if m.reason},
    )


def keys_of(config: GeometryConfig) -> Keys:
    """The names of all measures that `measure_matrix` computes under a config."""
    one = torch.ones(1, 1)
    factors = base_factors(one, config)
    masks = BaseMasks(one, factors, config.ratios)
    terms = coordinate_terms(one, one, masks, config.ratios)
    measures = matrix_measures(one, factors, one, config)
    return Keys(
        tuple(TermKey(t.metric, t.parameter, t.fold, t.decided_by) for t in terms),
        tuple(MeasureKey(m.metric, m.parameter) for m in measures),
    )
