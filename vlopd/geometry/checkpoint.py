"""The geometry stage: two checkpoint folders in; geometry.csv and .parquet, match.json and summary.json out."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow.csv import write_csv
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from transformers import PretrainedConfig

from vlopd.config.analysis import GeometryConfig
from vlopd.digests import digest_json
from vlopd.files import read_json, whole_file, write_json
from vlopd.geometry.aggregate import group_rows, left_out_rows, tensor_rows
from vlopd.geometry.matrix import Finding, examine, keys_of, matrices
from vlopd.geometry.nulls import null_name
from vlopd.geometry.schema import STATUSES, Place, Row
from vlopd.models.config_files import config_of
from vlopd.models.names import classify
from vlopd.weights.delta import Deltas, stream
from vlopd.weights.matching import MatchReport

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

ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
PARTIAL = "partial"
"""Folder of what is measured so far, a file a stored tensor; removed when the tables are written."""


def analyse(
    base_folder: Path,
    trained_folder: Path,
    out: Path,
    config: GeometryConfig,
    inputs: dict[str, Any],
    progress: bool = True,
    workers: int | None = None,
    device: str = "cpu",
    write_record: Callable[[Path, Any], None] = write_json,
) -> Path:
    """Measures what training did to every tensor, beside nulls, and writes the tables into `out`.

    Returns the path of summary.json, the stage's record: it is written last and holds `inputs`. A killed
    analysis of the same inputs goes on where it was. workers: threads, each with one tensor pair in memory and
    one core (a core each unless told; 1 on a GPU). Raises RunError where the checkpoints cannot be read or are
    not of one model.
    """
    deltas = stream(base_folder, trained_folder, classify, config.max_left_out)
    record = out / "summary.json"
    record.unlink(missing_ok=True)  # an old record must never lie beside new tables
    model = config_of(base_folder)
    settings = config.model_dump(mode="json", exclude={"arms"})
    partial = open_partial(out, {"inputs": inputs, "config": settings})
    workers = workers or (1 if device != "cpu" else os.cpu_count() or 1)
    findings = measure(deltas, model, config, partial, progress, workers, device)
    keys = keys_of(config)
    groups = group_rows(findings, keys)
    rows = [*groups, *(row for finding in findings for row in tensor_rows(finding, keys))]
    rows += left_out_rows(deltas.report)

    write_table(out, "geometry", rows)
    write_json(out / "match.json", asdict(deltas.report))
    counts = {s: sum(s in statuses_of(f) for f in findings) for s in ("approximate", "failed")}
    write_record(
        record,
        {
            "inputs": inputs,
            "nulls": [null_name(null) for null in config.nulls] if config.null_draws else [],
            "null_draws": config.null_draws,
            "seed": config.seed,
            "tensors": len(deltas),
            "tensors_narrowed": len(deltas.report.narrowed),
            "left_out": left_out(deltas.report),
            "fused_tensors_are_split": model is not None,
            "matrices": len(findings),
            "matrices_not_moved": sum(bool(finding.energy[0] == 0) for finding in findings),
            "matrices_without_spectrum": sum(bool(np.isnan(f.measures[0, 0, 0])) for f in findings),
            "matrices_approximate": counts["approximate"],
            "matrices_failed": counts["failed"],
            "null_norm_error": null_norm_error(findings),
            "headline": headline(groups),
        },
    )
    shutil.rmtree(partial)
    return record


def left_out(report: MatchReport) -> dict[str, Any]:
    """What summary.json says of the tensors that are not compared; match.json names all of them."""
    return {
        "tensors": len(report.left_out),
        "base_share": report.base_share,
        "trained_share": report.trained_share,
        "largest": [its.name for its in report.left_out[:5]],
        "summary": report.summary(),
    }


def headline(groups: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows that summary.json repeats, beside each null."""
    parts = [r for r in groups if r.name.startswith("[part=") and r.metric == "energy_share"]
    order = {key: i for i, key in enumerate(HEADLINE)}
    chosen = [row for row in groups if (row.name, row.metric, row.parameter) in order]
    chosen.sort(key=lambda row: order[row.name, row.metric, row.parameter])
    keys = ("name", "metric", "parameter", "value", "null", "null_mean", "null_sd", "p")
    return [
        {key: vars(row)[key] for key in keys}
        for row in [*chosen, *parts]
        if row.null != "closed_form"
    ]


def null_norm_error(findings: Sequence[Finding]) -> dict[str, float]:
    """How far the nulls' norms are from the update's, relative: over the whole model, and in the worst matrix."""
    energies = np.stack([finding.energy for finding in findings])  # [matrices, draws]
    moved = energies[energies[:, 0] > 0]
    if not len(moved) or energies.shape[1] == 1:
        return {}
    each = np.abs(np.sqrt(moved[:, 1:] / moved[:, :1]) - 1)
    whole = np.abs(np.sqrt(moved[:, 1:].sum(0) / moved[:, 0].sum()) - 1)
    return {"model": float(whole.max()), "worst_matrix": float(each.max())}


def statuses_of(finding: Finding) -> set[str]:
    return {STATUSES[s] for s in np.unique(finding.statuses[0])}


# ------------------------------------------------------------------------------------------ measuring


def measure(
    deltas: Deltas,
    model: PretrainedConfig | None,
    config: GeometryConfig,
    partial: Path,
    progress: bool,
    workers: int,
    device: str,
) -> list[Finding]:
    """The findings of all matrices, in the order of names; what `partial` holds is not measured again.

    The largest tensors go first, so that no worker is left with one at the end.
    """
    order = {name: i for i, name in enumerate(deltas.report.matched)}
    sizes = deltas.sizes()
    found: dict[str, list[Finding]] = {}

    def work(name: str) -> list[Finding]:
        path = partial / f"{order[name]:06}.npz"
        if path.exists():
            return load_findings(path)
        own = [examine(piece, config, device) for piece in matrices(read(name), model)]
        save_findings(path, own)
        return own

    bar = tqdm(
        total=sum(sizes.values()), desc="geometry", unit="w", unit_scale=True, disable=not progress
    )
    with bar, deltas.reader() as read, pool(workers) as run:
        for name, own in run(work, sorted(order, key=lambda n: (-sizes[n], n))):
            found[name] = own
            bar.update(sizes[name])
    return [finding for name in order for finding in found[name]]


@contextmanager
def pool(workers: int):
    """Yields `run(work, names)`, which gives (name, work(name)) as each is done.

    Threads rather than processes: the time goes into torch, which lets other threads run, and what is imported
    is in memory once. Each has one core, which small matrices use far better than one has many.
    """
    if workers == 1:
        yield lambda work, names: ((name, work(name)) for name in names)
        return
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    numpys = threadpool_limits(1, user_api="blas")
    try:

        def run(work, names):
            futures = {executor.submit(work, name): name for name in names}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()

        yield run
    finally:
        executor.shutdown(cancel_futures=True)
        numpys.restore_original_limits()
        torch.set_num_threads(threads)


def open_partial(out: Path, about: dict[str, Any]) -> Path:
    """The folder of partial results for these inputs; those of others are removed."""
    partial, digest = out / PARTIAL, digest_json(about)
    note = partial / "about.json"
    if partial.exists() and (not note.exists() or read_json(note)["digest"] != digest):
        shutil.rmtree(partial)
    if not note.exists():
        write_json(note, {"digest": digest, **about})
    return partial


def save_findings(path: Path, findings: Sequence[Finding]) -> None:
    arrays: dict[str, Any] = {}
    about = []
    for i, finding in enumerate(findings):
        values = dict(vars(finding))
        for key in ("terms", "measures", "statuses"):
            arrays[f"{i}.{key}"] = values.pop(key)
        about.append({**values, "place": finding.place._asdict()})
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)


def load_findings(path: Path) -> list[Finding]:
    found = []
    with np.load(path, allow_pickle=False) as file:
        for i, its in enumerate(json.loads(str(file["about"]))):
            found.append(
                Finding(
                    Place(**its["place"]),
                    tuple(its["draws"]),
                    file[f"{i}.terms"],
                    file[f"{i}.measures"],
                    file[f"{i}.statuses"],
                    {int(k): v for k, v in its["term_reasons"].items()},
                    {int(k): v for k, v in its["measure_reasons"].items()},
                )
            )
    return found


# ---------------------------------------------------------------------------------------------- files


def write_table(out: Path, name: str, rows: Sequence[Any]) -> None:
    """NAME.parquet and NAME.csv of dataclass rows, one measure a row; an empty field is no value."""
    table = pa.table(
        {
            field.name: pa.array(
                list(map(attrgetter(field.name), rows)), ARROW[str(field.type).split()[0]]
            )
            for field in fields(rows[0])
        }
    )
    with whole_file(out / f"{name}.parquet") as temporary:
        pq.write_table(table, temporary)
    with whole_file(out / f"{name}.csv") as temporary:
        write_csv(table, temporary)


def read_rows(folder: Path) -> Iterator[dict[str, str]]:
    """The rows of a folder's geometry.csv."""
    with (folder / "geometry.csv").open() as file:
        yield from csv.DictReader(file)
