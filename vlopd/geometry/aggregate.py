"""Rows out of findings: of every tensor, of the whole model, and of its components, layers, modules and parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vlopd.geometry.coordinates import Term
from vlopd.geometry.matrix import OBSERVED, Finding, Keys
from vlopd.geometry.schema import STATUSES, Measure, Place, Row, beside_nulls, parameters
from vlopd.models.names import classify
from vlopd.weights.matching import LeftOut, MatchReport

PARTS = {
    **dict.fromkeys(("gate", "up", "down", "gate_up", "expert_gate_up", "expert_down"), "ffn"),
    **dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention"),
    **{module: module for module in ("embedding", "head", "norm")},
}
"""The coarse division of modules that energy is reported by; all others are "other"."""


def tensor_rows(finding: Finding, keys: Keys) -> Iterator[Row]:
    """The rows of one tensor."""
    values = [
        folded(finding.terms[draw], finding.term_reasons, keys)
        for draw in range(len(finding.draws))
    ]
    yield from rows_of(values, finding.draws, finding.place)
    yield from rows_of(own_measures(finding, keys), finding.draws, finding.place)


def rows_of(
    values: Sequence[Sequence[Measure]], draws: Sequence[str], place: Place
) -> Iterator[Row]:
    """Rows of measures [draws][measures], the observed first."""
    nulls = list(dict.fromkeys(name for name in draws if name != OBSERVED))
    for same in zip(*values, strict=True):
        drawn: dict[str, list[float]] = {null: [] for null in nulls}
        for null, measure in zip(draws[1:], same[1:], strict=True):
            if measure.value is not None:
                drawn[null].append(measure.value)
        yield from beside_nulls(same[0], drawn, place)


def folded(terms: np.ndarray, reasons: dict[int, str], keys: Keys) -> list[Measure]:
    """Measures of one draw's terms [T, 4]."""
    found = []
    for i, (key, (top, bottom, mean, variance)) in enumerate(
        zip(keys.terms, terms.tolist(), strict=True)
    ):
        chance = None if math.isnan(mean) else (mean, variance)
        metric, parameter, fold, decided_by = key
        term = Term(metric, parameter, top, bottom, fold, reasons.get(i, ""), decided_by, chance)
        found.append(term.measure())
    return found


def own_measures(finding: Finding, keys: Keys) -> list[list[Measure]]:
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


def group_rows(findings: Sequence[Finding], keys: Keys) -> list[Row]:
    """Rows of the whole model and of each component, layer, module and part of it.

    Norms and coordinate measures are those of the group taken as one vector. Spectral measures are
    medians over the group's tensors, unweighted; `reason` counts them, and those that gave no
    value.
    """
    groups: dict[tuple[str, str, int | None], list[Finding]] = {}
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
        terms, reasons = summed(members, keys)
        values = [folded(draw, reasons, keys) for draw in terms]
        if kind != "all":
            extra = shares(members, findings)
            values = [own + new for own, new in zip(values, extra, strict=True)]
        rows += rows_of(values, draws, place)
        middle = Place("[median]") if kind == "all" else place
        rows += rows_of(medians(members, keys), draws, middle)
    return rows


def summed(members: Sequence[Finding], keys: Keys) -> tuple[np.ndarray, dict[int, str]]:
    """The terms of several tensors added up [draws, T, 4], and why those that none of them has have no value."""
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
    nobody = np.flatnonzero(~counted.any(0))
    return found, {int(i): members[0].term_reasons[int(i)] for i in nobody}


def medians(members: Sequence[Finding], keys: Keys) -> list[list[Measure]]:
    """Medians over tensors, [draws][measures], with the count of those that have no value."""
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


def shares(members: Sequence[Finding], everything: Sequence[Finding]) -> list[list[Measure]]:
    """A group's share of the update's energy and of the parameters; observed, then each null draw.

    The first alone misleads: the largest modules have the most energy whatever training does.
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
    """Rows about what is not compared: its share of each checkpoint's entries, and every tensor of it with the reason.

    None where everything is compared.
    """
    count = f"{len(report.left_out)} tensors are not compared"
    for side, share in (("base", report.base_share), ("trained", report.trained_share)):
        if report.left_out:
            measure = Measure("left_out_share", f"of={side}", share, reason=count)
            yield from beside_nulls(measure, {}, Place("[all]"))
    for its in report.left_out:
        shares = parameters(base_share=its.base_share, trained_share=its.trained_share)
        measure = Measure("left_out", shares, None, "skipped", its.reason)
        yield from beside_nulls(measure, {}, place_of(its))


def unshared_rows(reports: Mapping[str, MatchReport], shared: set[str]) -> Iterator[Row]:
    """A row for every tensor that is not compared in all of several checkpoints, saying in which it is not, and why."""
    left_out = {
        label: {its.name: its for its in report.left_out} for label, report in reports.items()
    }
    every = {name for own in left_out.values() for name in own}
    every |= {name for report in reports.values() for name in report.matched}
    for name in sorted(every - shared):
        own = [its[name] for its in left_out.values() if name in its]
        place = place_of(own[0] if own else LeftOut(name, (), "", 0, 0, True))
        reasons = [
            f"{label}: {left_out[label][name].reason if name in left_out[label] else 'tied'}"
            for label, report in reports.items()
            if name not in report.matched
        ]
        measure = Measure("left_out", "", None, "skipped", "; ".join(reasons))
        yield from beside_nulls(measure, {}, place)


def place_of(its: LeftOut) -> Place:
    where = classify(its.name)
    return Place(
        its.name, where.component, where.layer, where.module, "x".join(map(str, its.shape))
    )
