"""Aggregates matrix results into rows per tensor, whole model, component, layer, module and part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vlopd.models.parameter_names import classify
from vlopd.update_geometry.coordinates import Term
from vlopd.update_geometry.matrix import OBSERVED, Keys, MatrixResult
from vlopd.update_geometry.schema import (
    STATUSES,
    Measure,
    Place,
    Row,
    parameters,
    rows_against_nulls,
)
from vlopd.weights.matching import LeftOut, MatchReport

PARTS = {
    **dict.fromkeys(("gate", "up", "down", "gate_up", "expert_gate_up", "expert_down"), "ffn"),
    **dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention"),
    **{module: module for module in ("embedding", "head", "norm")},
}
"""Parts (groups of modules) that energy is reported by; all other modules are "other"."""


def tensor_rows(finding: MatrixResult, keys: Keys) -> Iterator[Row]:
    """The rows of one tensor."""
    values = [
        _measures_of_terms(finding.terms[draw], finding.term_reasons, keys)
        for draw in range(len(finding.draws))
    ]
    yield from rows_of(values, finding.draws, finding.place)
    yield from rows_of(_spectral_measures_of(finding, keys), finding.draws, finding.place)


def rows_of(
    values: Sequence[Sequence[Measure]], draws: Sequence[str], place: Place
) -> Iterator[Row]:
    """Rows from measures [draws][measures], the observed update first."""
    nulls = list(dict.fromkeys(name for name in draws if name != OBSERVED))
    for same in zip(*values, strict=True):
        drawn: dict[str, list[float]] = {null: [] for null in nulls}
        for null, measure in zip(draws[1:], same[1:], strict=True):
            if measure.value is not None:
                drawn[null].append(measure.value)
        yield from rows_against_nulls(same[0], drawn, place)


def _measures_of_terms(terms: np.ndarray, reasons: dict[int, str], keys: Keys) -> list[Measure]:
    """Converts one draw's terms [T, 4] to measures."""
    found = []
    for i, (key, (top, bottom, mean, variance)) in enumerate(
        zip(keys.terms, terms.tolist(), strict=True)
    ):
        chance = None if math.isnan(mean) else (mean, variance)
        metric, parameter, fold, decided_by = key
        term = Term(metric, parameter, top, bottom, fold, reasons.get(i, ""), decided_by, chance)
        found.append(term.measure())
    return found


def _spectral_measures_of(finding: MatrixResult, keys: Keys) -> list[list[Measure]]:
    """The spectral measures of one tensor, [draws][measures]."""
    return [
        [
            Measure(
                *key,
                None if math.isnan(value) else value,
                STATUSES[status],
                finding.measure_reasons.get(i, "") if draw == 0 else "",
                chance=None if math.isnan(mean) else (mean, sd),
            )
            for i, (key, (value, mean, sd), status) in enumerate(
                zip(keys.measures, values.tolist(), statuses.tolist(), strict=True)
            )
        ]
        for draw, (values, statuses) in enumerate(
            zip(finding.measures, finding.statuses, strict=True)
        )
    ]


def group_rows(findings: Sequence[MatrixResult], keys: Keys) -> list[Row]:
    """Rows of the whole model and of each component, layer, module and part.

    Norms and coordinate measures are of the group's concatenated vector. Spectral measures are unweighted
    medians over the group's tensors; `reason` counts the tensors with and without a value.
    """
    groups: dict[tuple[str, str, int | None], list[MatrixResult]] = {}
    for finding in findings:
        where = finding.place
        part = PARTS.get(where.module, "other")
        labels: list[tuple[str, str, int | None]] = [
            ("all", "", None),
            ("component", where.component, None),
            ("module", where.module, None),
            ("part", part, None),
        ]
        if where.layer is not None:
            labels.append(("layer", where.component, where.layer))
        for label in labels:
            groups.setdefault(label, []).append(finding)

    rows: list[Row] = []
    for kind, value, layer in sorted(groups, key=lambda g: (g[0], g[1], g[2] or 0)):
        members = groups[kind, value, layer]
        name = f"[{kind}={value}]" if layer is None else f"[layer={value}.{layer}]"
        place = Place(
            "[all]" if kind == "all" else name,
            component=value if kind in ("component", "layer") else "",
            layer=layer,
            module=value if kind == "module" else "",
        )
        draws = members[0].draws
        terms, reasons = _sum_terms(members, keys)
        values = [_measures_of_terms(draw, reasons, keys) for draw in terms]
        if kind != "all":
            extra = _energy_shares(members, findings)
            values = [own + new for own, new in zip(values, extra, strict=True)]
        rows += rows_of(values, draws, place)
        middle = Place("[median]") if kind == "all" else place
        rows += rows_of(_median_measures(members, keys), draws, middle)
    return rows


def _sum_terms(members: Sequence[MatrixResult], keys: Keys) -> tuple[np.ndarray, dict[int, str]]:
    """Sums the terms of several tensors to [draws, T, 4]; returns the reasons of terms that no tensor has."""
    stack = np.stack([finding.terms for finding in members])  # [tensors, draws, T, 4]
    counted = np.ones((len(members), stack.shape[2]), dtype=bool)
    for i, finding in enumerate(members):
        counted[i, list(finding.term_reasons)] = False
    stack = np.where(counted[:, None, :, None], stack, 0.0)
    found = stack.sum(0)
    largest = [i for i, key in enumerate(keys.terms) if key.fold == "max"]
    found[:, largest, 0] = stack[:, :, largest, 0].max(0)
    single = [i for i, key in enumerate(keys.terms) if key.fold in ("max", "sum")]
    found[:, single, 1] = 1.0
    absent = np.flatnonzero(~counted.any(0))
    return found, {int(i): members[0].term_reasons[int(i)] for i in absent}


def _median_measures(members: Sequence[MatrixResult], keys: Keys) -> list[list[Measure]]:
    """Medians over tensors, [draws][measures], with counts of tensors without a value."""
    stack = np.stack([finding.measures for finding in members])  # [tensors, draws, M, 3]
    statuses = np.stack([finding.statuses for finding in members])
    found = []
    for draw in range(stack.shape[1]):
        own = []
        for i, key in enumerate(keys.measures):
            values = stack[:, draw, i, 0]
            values = values[~np.isnan(values)]
            count = Counter(STATUSES[s] for s in statuses[:, draw, i].tolist())
            reason = f"median of {len(values)} tensors; " + ", ".join(
                f"{count[status]} {status}" for status in STATUSES[1:]
            )
            chances = stack[:, draw, i, 1]
            chances = chances[~np.isnan(chances)]
            chance = (float(np.median(chances)), None) if len(chances) else None
            if len(values):
                status = "approximate" if count["approximate"] else "ok"
                own.append(Measure(*key, float(np.median(values)), status, reason, chance=chance))
            else:
                status = next(s for s in ("failed", "zero", "skipped") if count[s])
                own.append(Measure(*key, None, status, reason))
        found.append(own)
    return found


def _energy_shares(
    members: Sequence[MatrixResult], everything: Sequence[MatrixResult]
) -> list[list[Measure]]:
    """A group's share of the update's energy and of the parameters, and their ratio; observed, then each null draw.

    The energy share alone is misleading: the largest modules have the most energy under any update.
    """
    parameter_share = sum(f.numel for f in members) / sum(f.numel for f in everything)
    parts = np.sum([finding.energy for finding in members], axis=0)
    wholes = np.sum([finding.energy for finding in everything], axis=0)
    found = []
    for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True):
        relative = "energy_share_over_parameter_share"
        found.append(
            [
                Term("energy_share", "", part, whole, decided_by="norm").measure(),
                Measure("parameter_share", "", parameter_share, decided_by="norm"),
                Term(relative, "", part, whole * parameter_share, decided_by="norm").measure(),
            ]
        )
    return found


def left_out_rows(report: MatchReport) -> Iterator[Row]:
    """Rows on the tensors left out: their share of each checkpoint's entries, and each tensor with its reason.

    Empty where everything is compared.
    """
    count = f"{len(report.left_out)} tensors are not compared"
    for side, share in (("base", report.base_share), ("trained", report.trained_share)):
        if report.left_out:
            measure = Measure("left_out_share", f"of={side}", share, reason=count)
            yield from rows_against_nulls(measure, {}, Place("[all]"))
    for its in report.left_out:
        shares = parameters(base_share=its.base_share, trained_share=its.trained_share)
        measure = Measure("left_out", shares, None, "skipped", its.reason)
        yield from rows_against_nulls(measure, {}, _place_of(its))


def unshared_rows(reports: Mapping[str, MatchReport], shared: set[str]) -> Iterator[Row]:
    """A row per tensor that is not compared in all checkpoints, with the checkpoints that lack it and the reason."""
    left_out = {
        label: {its.name: its for its in report.left_out} for label, report in reports.items()
    }
    every = {name for own in left_out.values() for name in own}
    every |= {name for report in reports.values() for name in report.matched}
    for name in sorted(every - shared):
        own = [its[name] for its in left_out.values() if name in its]
        place = _place_of(own[0] if own else LeftOut(name, (), "", 0, 0, True))
        reasons = [
            f"{label}: {left_out[label][name].reason if name in left_out[label] else 'tied'}"
            for label, report in reports.items()
            if name not in report.matched
        ]
        measure = Measure("left_out", "", None, "skipped", "; ".join(reasons))
        yield from rows_against_nulls(measure, {}, place)


def _place_of(its: LeftOut) -> Place:
    where = classify(its.name)
    return Place(
        its.name, where.component, where.layer, where.module, "x".join(map(str, its.shape))
    )
