"""A run's results as tidy tables, for the report and tables/*.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from evals.report.read import read_table
from vlopd.config.experiment import ExperimentConfig
from vlopd.digests import digest_weights
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_log, read_record

ORDER = (
    *("teacher", "full", "replicate", "variant", "subnetwork", "projection", "transplant", "other"),
    *("pooled", "control", "null", "base"),
)
"""Order of arms in tables and figures, from ceiling to floor."""

RECORDED = (
    *("checkpoint_digest", "total_parameters", "trained_parameters", "density", "mask", "seed"),
    *("steps", "device", "precision", "off_mask_unmoved", "delta_norm"),
)
MEASURES = {
    "relative_delta_fro": "Relative norm of the update",
    "frac_delta_eq_0": "Unmoved coordinates",
    "frac_abs_delta_lt": "Coordinates that moved less than",
    "low_magnitude_update_overlap_ratio": "Updates on the smallest weights",
    "principal_update_overlap_ratio": "Updates on the principal weights",
    "principal_projection_energy_ratio": "Energy inside the principal subspaces",
    "top_subspace_rotation": "Rotation of the top subspace",
    "top_energy_ratio": "Energy of the top singular values",
    "stable_rank": "Stable rank",
    "energy_share": "Share of the update's energy",
}
"""Labels of the geometry metrics."""


def arm_records(run: RunFolder, config: ExperimentConfig) -> dict[str, Any]:
    """record.json of every arm that has one, with None for missing entries."""
    paths = {arm: run.arm_record(arm) for arm in config.arms}
    none = dict.fromkeys(RECORDED)
    return {arm: {**none, **read_record(path)} for arm, path in paths.items() if path.exists()}


def scores(compared: Mapping[str, Any], records: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task and arm, with pooled controls as an arm, ceiling first, the best of the controls before others.

    `mark` is "above" or "below" the base where the corrected p says so, `exploratory` whether that p is uncorrected.
    """
    rows = []
    for task, entry in compared["tasks"].items():
        arms = dict(entry["arms"])
        several = len({group["arm"] for group in entry["controls"]}) > 1
        for group in entry["controls"]:
            if len(group["arms"]) > 1:
                of = f" for {group['arm']}" if several else ""
                record = {"density": records.get(group["arms"][0], {}).get("density")}
                pooled = {"role": "pooled", **group["pooled"], "record": record}
                arms[f"{group['kind']}{of} (mean of {len(group['arms'])})"] = pooled
        better = -1 if entry.get("higher_is_better", True) else 1
        against_base = {
            its["a"]: its
            for its in entry["contrasts"]
            if isinstance(its["a"], str)
            and entry["arms"].get(str(its["b"]), {}).get("role") == "base"
        }

        def place(item: tuple[str, Any], better: int = better) -> tuple[int, float]:
            role = item[1]["role"]
            return ORDER.index(role), better * item[1]["mean"] * (role in ("pooled", "control"))

        for arm, its in sorted(arms.items(), key=place):
            record = its.get("record", records.get(arm, {}))
            to_full, recovery = its["difference_to_full"] or {}, its["recovery"]
            gain = against_base.get(arm, {})
            rows.append(
                {
                    "task": task,
                    "arm": arm,
                    "role": its["role"],
                    "metric": entry["metric"],
                    "scale": entry.get("scale", "fraction"),
                    **estimate(its),
                    **{f"difference_{key}": v for key, v in estimate(to_full).items()},
                    **{f"gain_{key}": v for key, v in estimate(gain).items() if key != "n"},
                    "mark": gain.get("direction"),
                    "higher_is_better": bool(entry.get("higher_is_better", True)),
                    "exploratory": bool(gain.get("exploratory")),
                    "mcnemar_p": to_full.get("mcnemar_p"),
                    "recovery": recovery["value"],
                    "recovery_low": (recovery["interval"] or [None, None])[0],
                    "recovery_high": (recovery["interval"] or [None, None])[1],
                    "recovery_status": recovery["status"],
                    "delta_norm": record.get("delta_norm"),
                    "kl_to_base": compared["arms"].get(arm, {}).get("kl_to_base"),
                    "density": record.get("density"),
                    "trained_parameters": record.get("trained_parameters"),
                    "total_parameters": record.get("total_parameters"),
                    "extraction_failure_fraction": its.get("extraction_failure_fraction"),
                }
            )
    return pd.DataFrame(rows)


def compared_tables(
    compared: Mapping[str, Any], records: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    """The tables of a compare.json, by the names of their files."""
    return {
        "arms": scores(compared, records),
        "contrasts": contrasts(compared),
        "kinds": groups(compared),
        "answers": answers(compared),
        "seeds": seeds(compared),
        "pass_at": further(compared, "pass_at"),
        "further": further(compared, "further"),
    }


def contrasts(compared: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task and contrast, as in compare.json."""
    rows = []
    for task, entry in compared["tasks"].items():
        for its in entry["contrasts"]:
            rest = {k: its[k] for k in ("p", "p_holm", "test", "minimum_detectable_effect")}
            words = {"direction": its.get("direction"), "exploratory": its.get("exploratory")}
            words["scale"] = entry.get("scale", "fraction")
            rows.append({"task": task, "name": its["name"], **estimate(its), **rest, **words})
    return pd.DataFrame(rows)


def differences(compared: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task and contrast a - b, as numbers to compute with; `recovery` is a's, where it has one."""
    rows = []
    for task, entry in compared["tasks"].items():
        for its in entry["contrasts"]:
            arms = {"a": its["a"], "b": its["b"]}
            names = {
                side: ", ".join(arm) if isinstance(arm, list) else arm for side, arm in arms.items()
            }
            found = estimate(its)
            numbers = {"difference": found.pop("mean"), **found}
            rest = {key: its[key] for key in ("p", "p_holm", "minimum_detectable_effect")}
            recovery = (entry["arms"][its["a"]].get("recovery") or {}).get("value")
            rows.append({"task": task, **names, **numbers, **rest, "recovery": recovery})
    return pd.DataFrame(rows)


def groups(compared: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task, arm and question kind, with the kind's chance level."""
    rows = []
    for task, entry in compared["tasks"].items():
        chance = entry["chance"] or {}
        arms = sorted(entry["arms"].items(), key=lambda item: ORDER.index(item[1]["role"]))
        for arm, its in arms:
            for kind, value in its["by_group"].items():
                where = {"task": task, "arm": arm, "role": its["role"], "kind": kind}
                where["scale"] = entry.get("scale", "fraction")
                rows.append({**where, **estimate(value), "chance": chance.get(kind)})
    return pd.DataFrame(rows)


def seeds(compared: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task and contrast over training or mask seeds."""
    rows = []
    for task, entry in compared["tasks"].items():
        for its in entry.get("seeds", ()):
            kept = {key: its[key] for key in ("name", "seeds_a", "seeds_b", "sd_a", "sd_b")}
            levels = its.get("levels") or {}
            kept |= {"level_a": levels.get("a"), "level_b": levels.get("b")}
            kept["two_level"] = its.get("two_level")
            rows.append({"task": task, **kept, **estimate(its)})
    return pd.DataFrame(rows)


def further(compared: Mapping[str, Any], key: str) -> pd.DataFrame:
    """One row per task, arm and metric: `pass_at` k of sampled answers, or `further` metrics of the questions."""
    return pd.DataFrame(
        {"task": task, "arm": arm, "metric": metric, **estimate(value)}
        for task, entry in compared["tasks"].items()
        for arm, its in sorted(entry["arms"].items(), key=lambda item: ORDER.index(item[1]["role"]))
        for metric, value in (its.get(key) or {}).items()
    )


def answers(compared: Mapping[str, Any]) -> pd.DataFrame:
    """One row per task and arm: fractions of right, wrong, unreadable and cut answers, and mean lengths in tokens."""
    rows = []
    for task, entry in compared["tasks"].items():
        for arm, its in sorted(
            entry["arms"].items(), key=lambda item: ORDER.index(item[1]["role"])
        ):
            split = its.get("outcomes") or {}
            row = {key: split.get(key) for key in ("right", "wrong", "unreadable", "cut")}
            lengths = (
                "answered_fraction",
                "truncated_fraction",
                "mean_tokens",
                "mean_thought_tokens",
            )
            row |= {key: its.get(key) for key in lengths}
            if any(value is not None for value in row.values()):
                rows.append({"task": task, "arm": arm, "role": its["role"], **row})
    return pd.DataFrame(rows)


LAST = 5


def held_out_scores(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """Held-out evaluation during training, one row per arm, task and step: the task's first metric as `score`."""
    rows = []
    for arm in config.arms:
        path = run.arm(arm) / "heldout.jsonl"
        for row in read_log(path):
            others = (key for key in row if key not in ("step", "task", "limit", "seconds"))
            if (metric := next(others, None)) is not None and row[metric] is not None:
                where = {"arm": arm, "task": row["task"], "metric": metric, "step": row["step"]}
                rows.append({**where, "score": row[metric]})
    return pd.DataFrame(rows)


def held_out(scores: pd.DataFrame) -> pd.DataFrame:
    """Per arm and task of `held_out_scores`: the final score, the mean of the last five, and the peak.

    Step 0, the untrained base, is in none of them. The peak, the maximum over evaluations on the same questions, is
    biased upward; it is included because papers report it.
    """
    if scores.empty:
        return scores
    rows = []
    trained = scores[scores.step > 0].sort_values("step", kind="stable")
    for (arm, task), part in trained.groupby(["arm", "task"], sort=False):
        peak = part.loc[part.score.idxmax()]
        found = {"final": part.score.iloc[-1], "last": part.score.tail(LAST).mean()}
        found |= {"peak": peak.score, "peak_step": int(peak.step), "evaluations": len(part)}
        rows.append({"arm": arm, "task": task, "metric": part.metric.iloc[0], **found})
    return pd.DataFrame(rows)


def estimate(entry: Mapping[str, Any]) -> dict[str, Any]:
    """n, mean, standard_error, low and high of an estimate in compare.json; None for no estimate."""
    if not entry:
        return dict.fromkeys(("mean", "standard_error", "low", "high"))
    low, high = entry["interval"]
    kept = {key: entry[key] for key in ("n", "mean", "standard_error") if key in entry}
    return {**kept, "low": low, "high": high}


def training(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """metrics.jsonl of every trained arm, one row per arm and step."""
    frames = []
    for arm in config.arms:
        path = run.arm(arm) / "metrics.jsonl"
        if rows := read_log(path):
            frame = pd.DataFrame(rows).apply(pd.to_numeric)  # a column of nulls has no type
            frame.insert(0, "arm", arm)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def masks(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """One row per mask: rule, density, and density in each component of the model."""
    rows = []
    for name in config.masks:
        if run.mask_record(name).exists():
            record = read_record(run.mask_record(name))
            rule = config.masks[name].model_dump()
            words = [rule.pop("type"), *(f"{key}={value}" for key, value in rule.items())]
            components = record.get("density_by_component", {})
            rows.append(
                {"mask": name, "rule": " ".join(words), "density": record["density"], **components}
            )
    return pd.DataFrame(rows)


def vision(run: RunFolder, records: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """evals/vision.json as (one row per arm and probe, one row per arm with alignment), of the arms as they are now."""
    path = run.root / "evals" / "vision.json"
    found = read_record(path) if path.exists() else {"towers": {}, "alignment": {}}
    probed = found.get("inputs", {}).get("checkpoints", {})
    same = {
        arm
        for arm, content in probed.items()
        if arm in records and digest_weights(content) == records[arm]["checkpoint_digest"]
    }
    if found.get("base") not in same:
        same = set()
    found |= {
        key: {a: its for a, its in found[key].items() if a in same}
        for key in ("towers", "alignment")
    }
    probes = [
        {
            "arm": arm,
            "asked": name,
            "chance": its["chance"],
            "base": its["base"]["mean"],
            "trained": its["trained"]["mean"],
            **estimate(its["difference"]),
            "linear_cka": tower["drift"]["linear_cka"],
            "cosine": tower["drift"]["cosine"],
        }
        for arm, tower in found["towers"].items()
        for name, its in tower["probes"].items()
    ]
    aligned = [
        {
            "arm": arm,
            "clip_score": its["clip_score"]["mean"],
            "standard_error": its["clip_score"]["standard_error"],
            **{f"difference_{k}": v for k, v in estimate(its.get("difference") or {}).items()},
            "exact_match": its["exact_match"]["mean"],
            "warnings": "; ".join(its["warnings"]),
        }
        for arm, its in found["alignment"].items()
        if "clip_score" in its
    ]
    return pd.DataFrame(probes), pd.DataFrame(aligned)


def identity(records: Mapping[str, Any]) -> pd.DataFrame:
    """Agreement of each arm's weights with the arms it derives from, one row per pair and tolerance.

    Fractions of coordinates with |arm - other| <= tolerance; for reference, also of the base.
    """
    rows = [
        {"arm": arm, "other": other, **row}
        for arm, record in records.items()
        for other, found in (record.get("identity") or {}).items()
        for row in found
    ]
    return pd.DataFrame(rows)


def geometry(run: RunFolder, config: ExperimentConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(geometry.csv, headline of summary.json) of the arms of geometry.arms, with an `arm` column.

    Measurements of an earlier config stay in the folder; their arm may have been made again.
    """
    tidy, summary = [], []
    for arm in config.arms:
        folder = run.geometry(arm)
        if arm in config.geometry.arms and (folder / "summary.json").exists():
            tidy.append(read_table(folder / "geometry.csv").assign(arm=arm))
            summary += [{"arm": arm, **row} for row in headline(folder)]
    return pd.concat(tidy) if tidy else pd.DataFrame(), pd.DataFrame(summary)


def geometry_groups(run: RunFolder, config: ExperimentConfig) -> pd.DataFrame:
    """groups.csv: measures of trainings against signal nulls and drawn nulls; empty where a run has no null arms."""
    table = run.root / "geometry" / "groups.csv"
    if not config.roles.nulls or not table.exists():
        return pd.DataFrame()
    texts = ("of", "null", "kind", "parameter", "reason")
    return read_table(table).fillna(dict.fromkeys(texts, ""))


def headline(folder: Path) -> list[dict[str, Any]]:
    """The headline rows of a folder's summary.json, each with a label."""
    rows = read_record(folder / "summary.json")["headline"]
    return [{"label": label(row), "null": "", "p": None, **row} for row in rows]


def label(row: Mapping[str, Any]) -> str:
    """The label of a headline row: `Energy of the top singular values, k=16, median over matrices`."""
    words = MEASURES.get(row["metric"], row["metric"].replace("_", " "))
    scope = {"[all]": "", "[median]": "median over matrices"}.get(row["name"], row["name"])
    scope = scope.strip("[]").removeprefix("part=")
    parameter = str(row["parameter"] or "").replace(",", ", ")
    return ", ".join(part for part in (words, parameter, scope) if part)
