"""Measures the update between two checkpoint folders; writes geometry.csv and .parquet, match.json, summary.json."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from pyarrow.csv import write_csv
from threadpoolctl import threadpool_limits
from transformers import PretrainedConfig

from vlopd import interrupts
from vlopd.config.analysis import GeometryConfig
from vlopd.distributed import cores, exchanged, share_of
from vlopd.errors import RunError
from vlopd.files import whole_file, write_json
from vlopd.models.config_files import config_of
from vlopd.models.parameter_names import classify
from vlopd.progress import progress as bar
from vlopd.update_geometry.aggregate import group_rows, left_out_rows, tensor_rows
from vlopd.update_geometry.matrix import MatrixResult, keys_of, matrices, measure_matrix
from vlopd.update_geometry.nulls import null_name
from vlopd.update_geometry.partial import (
    PARTIAL,
    Partial,
    load_partial,
    open_partial,
    save_partial,
)
from vlopd.update_geometry.schema import (
    NEEDED_COLUMNS,
    STATUSES,
    Place,
    Row,
    count_flagged,
    detectable_excess,
    why_no_p,
)
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
"""The rows repeated in summary.json, with the energy share of every part."""
MATCHED = ("relative_delta_fro", "energy_share")
"""Measures that every drawn null has in common with the update, repeated for the first alone."""

T = TypeVar("T")
Run = Callable[[Callable[[str], T], Sequence[str]], Iterator[tuple[str, T]]]
ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


def measure_checkpoint(
    base_folder: Path,
    trained_folder: Path,
    out: Path,
    config: GeometryConfig,
    inputs: dict[str, Any],
    progress: bool = True,
    workers: int | None = None,
    device: str = "cpu",
    write_record: Callable[[Path, Any], None] = write_json,
    title: str = "geometry",
    processes: Accelerator | None = None,
) -> Path:
    """Measures the update of every tensor against nulls, and writes the tables into `out`.

    Returns the path of summary.json, the stage's record, which is written last and holds `inputs`. A killed
    analysis of the same inputs resumes. workers: threads, each with one tensor pair in memory and
    one core (default: one per core; 1 on a GPU). title: of the progress bar. processes: all of them measure a share of
    the tensors, within `in_step`, and the first writes the tables.
    Raises RunError where the checkpoints cannot be read or are
    not of one model.
    """
    deltas = stream(base_folder, trained_folder, classify, config.max_left_out)
    record = out / "summary.json"
    model = config_of(base_folder)
    if first := processes is None or processes.is_main_process:
        record.unlink(missing_ok=True)  # never leave an old record beside new tables
    about = {"inputs": inputs, "config": config.of_update}
    partial = open_partial(out / PARTIAL, about, processes)
    workers = workers or (1 if device != "cpu" else cores())
    if processes is not None and device != "cpu":
        device = str(processes.device)
    try:
        findings = _measure_matrices(
            *(deltas, model, config, partial, progress and first, workers, device, title, processes)
        )
    except RunError:  # of what cannot be measured, nothing is left to go on from
        if first:
            partial.remove()
        raise
    if not first:
        return record
    keys = keys_of(config)
    groups = group_rows(findings, keys)
    rows = [*groups, *(row for finding in findings for row in tensor_rows(finding, keys))]
    rows += left_out_rows(deltas.report)

    write_table(out, "geometry", rows)
    write_json(out / "match.json", asdict(deltas.report))
    counts = {s: sum(s in _statuses_of(f) for f in findings) for s in ("approximate", "failed")}
    write_record(
        record,
        {
            "inputs": inputs,
            "nulls": [null_name(null) for null in config.nulls] if config.null_draws else [],
            "null_draws": config.null_draws,
            "no_p": why_no_p(config.null_draws) if config.nulls else "",
            "detectable_excess_sd": detectable_excess(config.null_draws),
            "flagged": count_flagged(rows),
            "seed": config.seed,
            "tensors": len(deltas),
            "tensors_narrowed": len(deltas.report.narrowed),
            "left_out": _left_out_summary(deltas.report),
            "fused_tensors_are_split": model is not None,
            "matrices": len(findings),
            "matrices_not_moved": sum(bool(finding.energy[0] == 0) for finding in findings),
            "matrices_without_spectrum": sum(bool(np.isnan(f.measures[0, 0, 0])) for f in findings),
            "matrices_approximate": counts["approximate"],
            "matrices_failed": counts["failed"],
            "null_norm_error": _null_norm_error(findings),
            "headline": _headline(groups),
        },
    )
    partial.remove()
    return record


def _left_out_summary(report: MatchReport) -> dict[str, Any]:
    """The entry of summary.json on the tensors that are not compared; match.json lists all of them."""
    return {
        "tensors": len(report.left_out),
        "base_share": report.base_share,
        "trained_share": report.trained_share,
        "largest": [its.name for its in report.left_out[:5]],
        "summary": report.summary(),
    }


def _headline(groups: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows repeated in summary.json, one per null; those of MATCHED against the first null."""
    parts = [r for r in groups if r.name.startswith("[part=") and r.metric == "energy_share"]
    order = {key: i for i, key in enumerate(HEADLINE)}
    chosen = [row for row in groups if (row.name, row.metric, row.parameter) in order]
    chosen.sort(key=lambda row: order[row.name, row.metric, row.parameter])
    keys = ("name", "metric", "parameter", "value", "null", "null_mean", "null_sd", "p")
    first = next(({row.null} for row in chosen if row.null), {""})
    return [
        {key: vars(row)[key] for key in keys}
        for row in [*chosen, *parts]
        if row.null != "closed_form" and (row.metric not in MATCHED or row.null in first)
    ]


def _null_norm_error(findings: Sequence[MatrixResult]) -> dict[str, float]:
    """Relative error of the nulls' norms against the update's: of the whole model, and of the worst matrix."""
    energies = np.stack([finding.energy for finding in findings])  # [matrices, draws]
    moved = energies[energies[:, 0] > 0]
    if not len(moved) or energies.shape[1] == 1:
        return {}
    each = np.abs(np.sqrt(moved[:, 1:] / moved[:, :1]) - 1)
    whole = np.abs(np.sqrt(moved[:, 1:].sum(0) / moved[:, 0].sum()) - 1)
    return {"model": float(whole.max()), "worst_matrix": float(each.max())}


def _statuses_of(finding: MatrixResult) -> set[str]:
    return {STATUSES[s] for s in np.unique(finding.statuses[0])}


# ------------------------------------------------------------------------------------------ measuring


def _measure_matrices(
    deltas: Deltas,
    model: PretrainedConfig | None,
    config: GeometryConfig,
    partial: Partial,
    progress: bool,
    workers: int,
    device: str,
    title: str,
    processes: Accelerator | None,
) -> list[MatrixResult]:
    """The results of all matrices, in the order of names; those in `partial` are not recomputed.

    Of several processes the first gets all, the others none. Schedules the largest tensors first, for balance.
    """
    order = {name: i for i, name in enumerate(deltas.report.matched)}
    sizes = deltas.sizes()
    names = sorted(order, key=lambda n: (-sizes[n], n))

    def work(name: str) -> list[MatrixResult]:
        path = partial.path(order[name])
        if (kept := _load_findings(path)) is not None:
            return kept
        own = [measure_matrix(piece, config, device) for piece in matrices(read(name), model)]
        _save_findings(path, own)
        return own

    shown = bar(
        title=f"{title}: matrices, with nulls",
        total=sum(sizes[name] for name in share_of(processes, names)),
        unit="weight",
        unit_scale=True,
        disable=not progress,
    )
    with shown, deltas.reader() as read, pool(workers, device) as run:
        found = measured(
            *(run, work, names), lambda name: shown.update(sizes[name]), processes=processes
        )
    return [finding for name in order for finding in found[name]] if found else []


def measured(
    run: Run,
    work: Callable[[str], T],
    names: Sequence[str],
    on_done: Callable[[str], Any],
    processes: Accelerator | None,
) -> dict[str, T]:
    """{name: work(name)}, by `run` of `pool`.

    Of several processes, within `in_step`, each works on a share, whose results `work` must save; the first then gets
    all, the others none.
    """
    found = {}
    for name, its in run(work, share_of(processes, names)):
        found[name] = its
        on_done(name)
        interrupts.stop_after(f"{len(found)} of {len(names)} tensors")
    if processes is not None and processes.num_processes > 1:
        exchanged(processes, None)  # all are saved
        if not processes.is_main_process:
            return {}
        found |= dict(run(work, [name for name in names if name not in found]))
    return found


@contextmanager
def pool(workers: int, device: str = "cpu") -> Iterator[Run]:
    """Yields `run(work, names)`, which yields (name, work(name)) as each completes.

    Threads rather than processes: torch releases the GIL, and imports are in memory once. One core per thread:
    small matrices use several cores poorly, and sums then do not depend on how many there are.
    """

    def one_by_one(work, names):
        return ((name, work(name)) for name in names)

    if workers == 1 and device != "cpu":
        yield one_by_one
        return
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    numpys = threadpool_limits(1, user_api="blas")
    try:

        def run(work, names):
            futures = {executor.submit(work, name): name for name in names}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()

        if workers == 1:
            torch.set_num_threads(1)
        yield one_by_one if workers == 1 else run
    finally:
        executor.shutdown(cancel_futures=True)
        numpys.restore_original_limits()
        torch.set_num_threads(threads)


def _save_findings(path: Path, findings: Sequence[MatrixResult]) -> None:
    arrays: dict[str, Any] = {}
    about = []
    for i, finding in enumerate(findings):
        values = dict(vars(finding))
        for key in ("terms", "measures", "statuses"):
            arrays[f"{i}.{key}"] = values.pop(key)
        about.append({**values, "place": finding.place._asdict()})
    save_partial(path, arrays, about)


def _load_findings(path: Path) -> list[MatrixResult] | None:
    if (kept := load_partial(path)) is None:
        return None
    arrays, about = kept
    return [
        MatrixResult(
            Place(**its["place"]),
            tuple(its["draws"]),
            arrays[f"{i}.terms"],
            arrays[f"{i}.measures"],
            arrays[f"{i}.statuses"],
            {int(k): v for k, v in its["term_reasons"].items()},
            {int(k): v for k, v in its["measure_reasons"].items()},
        )
        for i, its in enumerate(about)
    ]


# ---------------------------------------------------------------------------------------------- files


def write_table(out: Path, name: str, rows: Sequence[Any]) -> None:
    """Writes dataclass rows, one measure each, to NAME.parquet and NAME.csv; None is an empty field."""
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
    """Reads the rows of a folder's geometry.csv. Raises RunError for another table."""
    path = folder / "geometry.csv"
    remedy = "delete its folder and run its stage again"
    try:
        with path.open(encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            if lacking := [name for name in NEEDED_COLUMNS if name not in names]:
                raise RunError(f"{path} has no column {lacking[0]}; {remedy}")
            for row in reader:
                if None in row or None in row.values():
                    raise RunError(f"{path} has a row of another length than its first; {remedy}")
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not CSV ({error}); {remedy}") from None
