"""The geometry stage: two checkpoint folders in, geometry.csv, match.json and summary.json out."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PretrainedConfig

from vlopd.checkpoint import write_json, write_text
from vlopd.config import GeometryConfig
from vlopd.delta import TensorDelta, stream
from vlopd.geometry.coordinates import Term, coordinate_terms, source_masks, total
from vlopd.geometry.nulls import iid_delta
from vlopd.geometry.projection import matrix_measures, skipped_measures
from vlopd.geometry.rows import Measure, Row, beside_null
from vlopd.geometry.spectrum import as_matrix, factorise, rank_at
from vlopd.models.atlas import classify, parts
from vlopd.models.load import load_model_config
from vlopd.types import TensorName

PARTS = {
    **dict.fromkeys(("gate", "up", "down", "gate_up", "expert_gate_up", "expert_down"), "ffn"),
    **dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention"),
    **{module: module for module in ("embedding", "head", "norm")},
}
"""The coarse division of modules that energy is reported by; all others are "other"."""

HEADLINE = (
    ("[all]", "relative_delta_fro", ""),
    ("[all]", "frac_delta_eq_0", ""),
    ("[all]", "frac_abs_delta_lt", "atol=1e-05"),
    ("[all]", "low_magnitude_update_overlap_ratio", "ratio=0.1,atol=0"),
    ("[all]", "principal_update_overlap_ratio", "ratio=0.1,atol=0"),
    ("[median]", "principal_projection_energy_ratio", "ratio=0.1"),
    ("[median]", "top_subspace_rotation", "ratio=0.1"),
    ("[median]", "top_energy_ratio", "k=16"),
    ("[median]", "stable_rank", ""),
)
"""What summary.json repeats, with the energy share of every part."""


@dataclass(frozen=True)
class Finding:
    """What one tensor gave: in both lists the observed update first, then the null's draws."""

    where: TensorName
    shape: str
    terms: list[list[Term]]
    measures: list[list[Measure]]

    @property
    def energy(self) -> list[float]:
        return [terms[0].numerator for terms in self.terms]

    @property
    def numel(self) -> float:
        return next(t.denominator for t in self.terms[0] if t.metric == "frac_delta_eq_0")


def analyse(
    source_folder: Path,
    trained_folder: Path,
    out: Path,
    config: GeometryConfig,
    inputs: dict[str, Any],
    progress: bool = True,
) -> Path:
    """Measures what training did to every tensor, beside nulls, and writes three files into `out`.

    Returns the path of summary.json, the stage's record: it is written last and holds `inputs`.
    Raises RunError where the checkpoints cannot be read or are not of one model.
    """
    deltas = stream(source_folder, trained_folder, classify)
    record = out / "summary.json"
    record.unlink(missing_ok=True)  # an old record must never lie beside new tables
    model = load_model_config(str(source_folder)) if has_config(source_folder) else None
    bar = tqdm(deltas, desc="geometry", unit="tensor", disable=not progress)
    findings = [examine(piece, config) for pair in bar for piece in matrices(pair, model)]
    rows = [row for finding in findings for row in tensor_rows(finding)]
    groups = group_rows(findings)

    write_text(out / "geometry.csv", to_csv([*groups, *rows]))
    write_json(out / "match.json", asdict(deltas.report))
    by_key = {(row.name, row.metric, row.parameter): row for row in groups}
    parts = [key for key in by_key if key[0].startswith("[part=") and key[1] == "energy_share"]
    keys = ("name", "metric", "parameter", "value", "null_mean", "null_sd")
    headline = [by_key[key] for key in (*HEADLINE, *parts) if key in by_key]
    summary = {
        "inputs": inputs,
        "null": {"type": "iid", "draws": config.null_draws, "seed": config.seed},
        "tensors": len(deltas),
        "fused_tensors_are_split": model is not None,
        "matrices": len(findings),
        "matrices_not_moved": sum(finding.energy[0] == 0 for finding in findings),
        "matrices_without_spectrum": sum(f.measures[0][0].status == "skipped" for f in findings),
        "headline": [{key: asdict(row)[key] for key in keys} for row in headline],
    }
    write_json(record, summary)
    return record


def has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def matrices(pair: TensorDelta, model: PretrainedConfig | None) -> Iterator[TensorDelta]:
    """The matrices that one stored tensor holds, each [out, in]: q, k, v of a fused qkv, single experts.

    Without the model's configuration a tensor is taken whole.
    """
    if model is None:
        yield pair
        return
    for part in parts(pair.where, pair.source.shape, model):
        where, name = pair.where, pair.name
        if part.expert is not None:
            name += f"[{part.expert}]"
        if part.module != where.module.removeprefix("expert_"):
            name += f"[{part.module}]"
        source, trained = pair.source[part.index], pair.trained[part.index]
        if part.transposed:
            source, trained = source.T, trained.T
        yield TensorDelta(
            TensorName(name, where.component, where.layer, part.module),
            source.contiguous(),
            trained.contiguous(),
        )


def examine(pair: TensorDelta, config: GeometryConfig) -> Finding:
    """All measures of one tensor's update and its nulls; the source is factorised once."""
    delta = pair.delta
    source = pair.source.to(delta.dtype)
    matrix, reason = as_matrix(source)
    ratios = config.ratios
    factors = None
    if matrix is not None:
        factors = factorise(matrix, max(rank_at(ratio, *matrix.shape) for ratio in ratios))
    masks = source_masks(source, factors, ratios)
    finding = Finding(pair.where, "x".join(map(str, source.shape)), [], [])
    for draw in range(-1, config.null_draws):
        if draw >= 0:
            stream = (config.seed, draw, pair.name)
            delta = iid_delta(source, pair.delta, pair.trained.dtype, *stream)
        finding.terms.append(coordinate_terms(source, delta, masks, ratios))
        if matrix is None or factors is None:
            finding.measures.append(skipped_measures(ratios, reason))
        else:
            change = delta.flatten(1).double()
            finding.measures.append(matrix_measures(matrix, factors, change, ratios))
    return finding


def tensor_rows(finding: Finding) -> Iterable[Row]:
    """The rows of one tensor."""
    where = finding.where
    values = [
        [*(term.measure() for term in terms), *measures]
        for terms, measures in zip(finding.terms, finding.measures, strict=True)
    ]
    for observed, *draws in zip(*values, strict=True):
        yield beside_null(
            observed, draws, where.name, where.component, where.layer, where.module, finding.shape
        )


def group_rows(findings: Sequence[Finding]) -> list[Row]:
    """Rows of the whole model and of each component, module and part of it.

    Norms and coordinate measures are those of the group taken as one vector. Spectral measures are
    medians over the group's tensors, unweighted; `reason` counts them, and those that gave no
    value.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        where = finding.where
        part = PARTS.get(where.module, "other")
        labels = (("component", where.component), ("module", where.module), ("part", part))
        for label in (("all", ""), *labels):
            groups.setdefault(label, []).append(finding)

    rows = []
    for kind, value in sorted(groups):
        members = groups[kind, value]
        name = "[all]" if kind == "all" else f"[{kind}={value}]"
        columns: dict[str, Any] = {kind: value} if kind in ("component", "module") else {}
        terms = [
            [total(same).measure() for same in zip(*draw, strict=True)]
            for draw in zip(*(finding.terms for finding in members), strict=True)
        ]
        if kind != "all":
            terms = [
                known + new for known, new in zip(terms, shares(members, findings), strict=True)
            ]
        medians = [
            [median(same) for same in zip(*draw, strict=True)]
            for draw in zip(*(finding.measures for finding in members), strict=True)
        ]
        rows += [
            beside_null(seen, draws, name, **columns) for seen, *draws in zip(*terms, strict=True)
        ]
        name = "[median]" if kind == "all" else name
        rows += [
            beside_null(seen, draws, name, **columns) for seen, *draws in zip(*medians, strict=True)
        ]
    return rows


def median(measures: Sequence[Measure]) -> Measure:
    """Median over tensors of one measure, with the count of those that have no value."""
    values = [measure.value for measure in measures if measure.value is not None]
    count = Counter(measure.status for measure in measures)
    reason = f"median of {len(values)} tensors; {count['zero']} zero, {count['skipped']} skipped"
    first = measures[0]
    if values:
        return Measure(first.metric, first.parameter, statistics.median(values), "ok", reason)
    status = "zero" if count["zero"] else "skipped"
    return Measure(first.metric, first.parameter, None, status, reason)


def shares(members: Sequence[Finding], everything: Sequence[Finding]) -> list[list[Measure]]:
    """A group's share of the update's energy and of the parameters; observed, then each null draw.

    The first alone misleads: the largest modules have the most energy whatever training does.
    """
    parameter_share = sum(f.numel for f in members) / sum(f.numel for f in everything)
    found = []
    for draw in range(len(members[0].terms)):
        part = sum(finding.energy[draw] for finding in members)
        whole = sum(finding.energy[draw] for finding in everything)
        energy = Term("energy_share", "", part, whole).measure()
        relative = Term("energy_share_over_parameter_share", "", part, whole * parameter_share)
        found.append([energy, Measure("parameter_share", "", parameter_share), relative.measure()])
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """Tidy CSV, one measure a row; an empty field is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()
