"""Writes the results of the study's runs as small tables, docs/study/data/RUN*.csv; of an unfinished run what it has.

    python scripts/study_collect.py runs/study/a-100 runs/study/b-*

RUN.csv has a row for each arm and task, as scripts/study_rows.py has them, with the learning rates that were tried.
RUN-updates.csv and RUN-pairs.csv have the measures of groups.csv as columns: a row for each update, or pair of updates
(two of one kind of training, or OPD and another), and two for its drawn null, mean and standard deviation. An arm's
kind of training is its name without its number. runs.csv has a line on each run's time and machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from evals.report.read import read_table  # noqa: E402
from scripts.study_rows import study_rows  # noqa: E402
from vlopd.config.experiment import ExperimentConfig  # noqa: E402
from vlopd.config.roles import SignalNulls  # noqa: E402
from vlopd.files import read_json  # noqa: E402
from vlopd.run.folder import RunFolder  # noqa: E402
from vlopd.update_geometry.groups import METRICS, PAIR, Value, group_values  # noqa: E402

DATA = ROOT / "docs" / "study" / "data"
KEPT = {its.metric for its in METRICS if its.decided_by == "norm"}
"""Measures that are equal in every drawn null, which has the norms of the update."""
OPD = "full"
"""The kind of training that all others are compared with."""


def arms_table(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """The rows of scripts/study_rows.py, with every arm's time and, of a tuned arm, its validation scores."""
    rows = study_rows(run, config).drop(columns=["study", "difference_to_full", "low", "high"])
    more = [{"arm": arm, **_tuning(run, config, arm)} for arm in rows["arm"].unique()]
    return rows.merge(pd.DataFrame(more), on="arm")


def _tuning(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    """Seconds of training, with all candidates', the grid, its validation scores, whether the choice is at its edge."""
    record = read_json(run.arm_record(arm))
    made = [run.arm_record(name) for name in config.candidates(arm)]
    each = [read_json(path) for path in made if path.exists()] or [record]
    sweep = record.get("sweep") or {}
    curve = sweep.get("curve", ())
    return {
        "seconds": sum(its.get("seconds") or 0 for its in each),
        "grid": " ".join(":".join(f"{x:g}" for x in p["settings"].values()) for p in curve),
        "validation": " ".join(f"{point['score']:.6g}" for point in curve),
        "at_edge": bool(sweep["at_edge"]) if sweep else None,
    }


def kind_of(arm: str) -> str:
    """The kind of training of an arm of several seeds: its name without the number."""
    return re.sub(r"(?<!e)-\d+$", "", arm)


def measures(run: RunFolder, config: ExperimentConfig) -> list[Value]:
    """The measures of the arms, and of their pairs that are needed, with the drawn nulls of each kind's own.

    In a Value, `of` is the kind of training; of pairs of two kinds that of the second.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for arm in config.geometry.arms:
        if (run.geometry(arm) / "geometry.parquet").exists():
            kinds[kind_of(arm)].append(arm)
    alone = [SignalNulls("", tuple(arms), ()) for arms in kinds.values()]
    mixed = [
        SignalNulls(kind, tuple(kinds[OPD]), tuple(arms))
        for kind, arms in kinds.items()
        if kind != OPD and OPD in kinds
    ]
    found = group_values(run.root / "geometry", [*alone, *mixed], config.geometry.null_draws)
    return [value for value in found if value.kind != "signal"]


def geometry_tables(values: Sequence[Value]) -> dict[str, pd.DataFrame]:
    """{"updates", "pairs": a row for each unit and statistic, a column for each measure}."""
    tables: dict[str, dict[tuple[Any, ...], dict[str, float]]] = {"updates": {}, "pairs": {}}
    for its in values:
        rows = tables["pairs" if PAIR in its.unit else "updates"]
        measure = " ".join(filter(None, (its.metric, its.parameter, its.name)))
        drawn = its.kind == "drawn"
        if its.value is None or (drawn and its.metric in KEPT):
            continue
        head = (its.unit, its.null if drawn else "")
        rows.setdefault((*head, "mean" if drawn else "", its.draws), {})[measure] = its.value
        if its.sd is not None:
            rows.setdefault((*head, "sd", its.draws), {})[measure] = float(f"{its.sd:.3g}")
    heads = ["unit", "null", "statistic", "draws"]
    found = {}
    for name, rows in tables.items():
        frame = pd.DataFrame(
            {**dict(zip(heads, key, strict=True)), **row} for key, row in rows.items()
        )
        found[name] = frame.astype({"draws": "Int64"}) if len(frame) else frame
    return found


def about(run: RunFolder, config: ExperimentConfig) -> dict[str, Any]:
    """A run's wall time, from its first config to its last result, with its machine and versions."""
    its = run.read()
    first, machine = (its["history"] or [its])[0], its["machine"]
    results = (*run.root.glob("arms/*/record.json"), *run.root.glob("evals/*/results.json"))
    results += (*run.root.glob("geometry/*.json"), *run.root.glob("compare.json"))
    begun = datetime.fromisoformat(first["created"]).timestamp()
    records = [read_json(path) for path in run.root.glob("arms/*/record.json")]
    here = {"system": platform.platform(), "cores": os.cpu_count()} == machine
    return {
        "run": run.root.name,
        "study": config.name,
        "begun": first["created"],
        "wall_seconds": round(max(path.stat().st_mtime for path in results) - begun),
        "training_seconds": round(sum(record.get("seconds") or 0 for record in records)),
        "trainings": sum(bool(record.get("seconds")) for record in records),
        "finished": run.compare.exists(),
        "device": " ".join(sorted({its["device"] for its in records if its.get("device")})),
        "cores": machine["cores"],
        "processor": _processor() if here else None,
        "torch": its["versions"]["torch"],
        "python": its["versions"]["python"],
        "commit": (its["git"] or {}).get("commit"),
    }


def _processor() -> str | None:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", path.read_text(), re.M) if path.exists() else None
    return found[1] if found else None


def collect(path: Path, out: Path) -> Iterator[Path]:
    """Writes the files of a run; yields their paths."""
    run, config = RunFolder.open(path, locked=False)
    name = run.root.name
    tables = {name: arms_table(run, config)}
    found = {}
    if len({kind_of(arm) for arm in config.geometry.arms}) < len(config.geometry.arms):
        found = geometry_tables(measures(run, config))  # there are several seeds
    tables |= {f"{name}-{key}": table for key, table in found.items() if len(table)}
    for each, table in tables.items():
        table.to_csv(out / f"{each}.csv", index=False, float_format="%.6g")
        yield out / f"{each}.csv"
    runs = out / "runs.csv"
    known = read_table(runs) if runs.exists() else pd.DataFrame({"run": []})
    lines = pd.concat([known[known["run"] != name], pd.DataFrame([about(run, config)])])
    whole = ["wall_seconds", "training_seconds", "trainings", "cores"]
    lines.astype(dict.fromkeys(whole, int)).sort_values("run").to_csv(runs, index=False)
    yield runs


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the CSV files")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.runs:
        for file in collect(path, given.out):
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
