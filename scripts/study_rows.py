"""Writes the results of runs as tidy rows, docs/results/STUDY.csv: one row for each arm and task.

    python scripts/study_rows.py runs/density runs/paper [--out docs/results]

Numbers are those of the runs' own files; nothing is computed again but sums of tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report import tables
from evals.report.read import read_table
from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.files import read_json, read_jsonl
from vlopd.run.folder import RunFolder

GEOMETRY = {
    "relative_norm": ("[all]", "relative_delta_fro", ""),
    "unmoved_1e-5": ("[all]", "frac_isclose_zero", "atol=1e-05"),
    "stable_rank": ("[median]", "stable_rank", ""),
    "top_16_energy": ("[median]", "top_energy_ratio", "k=16"),
    "joint_projection_10": ("[median]", "principal_projection_energy_ratio", "ratio=0.1"),
    "low_magnitude_10": ("[all]", "low_magnitude_update_overlap_ratio", "ratio=0.1,atol=1e-05"),
    "ffn_energy_share": ("[part=ffn]", "energy_share", ""),
    "vision_energy_share": ("[component=vision]", "energy_share", ""),
}
"""Columns of an arm's update: (name, metric, parameter) in its geometry.csv."""
COLUMNS = (
    *("study", "arm", "role", "mask", "density", "seed", "learning_rate", "optimizer", "null"),
    *("tokens", "task", "score", "se", "n", "difference_to_full", "low", "high", "kl_to_base"),
    *("delta_norm", *GEOMETRY),
)


def study_rows(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """One row for each arm and task, with None for what the run does not have; a group's tasks are left out."""
    compared = read_json(run.compare) if run.compare.exists() else _evaluated(run, config)
    tasks = {task: its for task, its in compared["tasks"].items() if not its["group"]}
    shown = tasks or {"": {"arms": {}}}
    records = tables.arm_records(run, config)
    rows = []
    for arm, record in records.items():
        its = config.arms[arm]
        null = its.null if isinstance(its, DistillArm) else None
        about = {
            "study": config.name,
            "arm": arm,
            "role": config.roles.of[arm],
            "null": null.label if null is not None else None,
            "kl_to_base": compared["arms"].get(arm, {}).get("kl_to_base"),
            "delta_norm": record.get("delta_norm"),
            **{key: record.get(key) for key in ("mask", "density", "seed")},
            **_training(run, config, arm, record),
            **_geometry(run, config, arm),
        }
        for task, entry in shown.items():
            scored = entry["arms"].get(arm)
            if scored is None and task:
                continue
            found = tables.estimate(scored) if scored else {}
            to_full = tables.estimate((scored or {}).get("difference_to_full") or {})
            scores = {"score": found.get("mean"), "se": found.get("standard_error")}
            scores |= {"difference_to_full": to_full["mean"]}
            scores |= {key: to_full[key] for key in ("low", "high")}
            rows.append({**about, "task": task or None, "n": found.get("n"), **scores})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _evaluated(run: RunFolder, config: ExperimentConfig) -> dict[str, Any]:
    """Scores and KL to the base of the arms that are evaluated, as in compare.json, of a run without one."""
    tasks: dict[str, Any] = {}
    arms: dict[str, Any] = {}
    for arm in config.arms:
        results, kl = (run.eval(arm) / name for name in ("results.json", "base_kl.json"))
        if not results.exists():
            continue
        arms[arm] = read_json(kl) if kl.exists() else {}
        found = read_json(results)
        for task in (task for own in found["leaves"].values() for task in own):
            its, metric = found["results"][task], found["primary_metric"][task]
            entry = {
                "n": its["sample_len"],
                "mean": its[f"{metric},none"],
                "interval": (None, None),
            }
            entry["standard_error"] = its[f"{metric}_stderr,none"]
            tasks.setdefault(task, {"group": None, "arms": {}})["arms"][arm] = entry
    return {"tasks": tasks, "arms": arms}


def _training(run: RunFolder, config: ExperimentConfig, arm: str, record: Any) -> dict[str, Any]:
    """Learning rate, optimizer and number of trained tokens of a trained arm."""
    its = config.arms[arm]
    if not isinstance(its, DistillArm):
        return {}
    used = ((record.get("inputs") or {}).get("recipe") or {}).get("optim") or {}
    chosen = (record.get("sweep") or {}).get("chosen") or {}
    optim = config.recipe_of(its).optim
    path = run.arm(arm) / "metrics.jsonl"
    steps = read_jsonl(path) if path.exists() else []
    tokens = [row.get("completion_tokens", 0) for row in steps]
    return {
        "learning_rate": chosen.get(
            "optim.learning_rate", used.get("learning_rate", optim.learning_rate)
        ),
        "optimizer": used.get("type", optim.type),
        "tokens": int(sum(tokens)) or None,
    }


def _geometry(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    path = run.geometry(arm) / "geometry.csv"
    if arm not in config.geometry.arms or not path.exists():
        return {}
    table = read_table(path, ["name", "metric", "parameter", "value"])
    known = {
        (row.name_, row.metric, row.parameter): row.value
        for row in table.fillna({"parameter": ""}).rename(columns={"name": "name_"}).itertuples()
        if str(row.name_).startswith("[")
    }
    return {column: known.get(key) for column, key in GEOMETRY.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="folder of the CSV files"
    )
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.runs:
        run, config = RunFolder.open(path, locked=False)
        rows = study_rows(run, config)
        rows.to_csv(given.out / f"{config.name}.csv", index=False, float_format="%.6g")
        print(f"{given.out / config.name}.csv: {len(rows)} rows")


if __name__ == "__main__":
    main()
