"""How a run's arms were trained, as short terms for the head of the report: from its config and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.recipe import training_of
from vlopd.run.checksums import differences
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record

LEFT_OUT = ("chunk_tokens", "type")
"""Fields of a loss that are not part of its description."""


def recipe(
    run: RunFolder, config: ExperimentConfig, records: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(term, description) of the pair, the training, its cost and machine, and the evaluation; without what is unknown.

    Where no arm is trained there are the pair and the evaluation alone.
    """
    trained = {arm: its for arm, its in config.arms.items() if isinstance(its, DistillArm)}
    found = [("Student", config.student.model)]
    if config.teacher is not None:
        teachers = ", ".join(about.model for about in config.teachers.values())
        found.append(("Teacher" if len(config.teachers) == 1 else "Teachers", teachers))
    if trained:
        made = [records[arm] for arm in trained if arm in records]
        found += [
            *_training(config, trained),
            _precision(config, made),
            *_differences(config, trained),
        ]
        found += _cost(run, made)
    found.append(("Evaluation", _evaluation(config)))
    return found


def _training(config: ExperimentConfig, trained: Mapping[str, DistillArm]) -> list[tuple[str, str]]:
    """The recipe of the full arm, or of the first trained one."""
    its = config.recipe_of(trained[_main(config, trained)])
    rollout, optim, train = its.rollout, its.optim, its.train
    completions = rollout.completions_per_prompt
    each = f", {completions} completions each" if completions > 1 else ""
    updates = f", {train.updates_per_rollout} updates each" if train.updates_per_rollout > 1 else ""
    rate: list[str] = [optim.type, optim.schedule]
    if optim.warmup_steps:
        rate.append(f"warm-up {optim.warmup_steps}")
    cut = [f"top-p {rollout.top_p:g}"] if rollout.top_p < 1 else []
    cut += [f"top-k {rollout.top_k}"] if rollout.top_k else []
    found = [
        ("Training", training_of(its)),
        ("Loss", _loss(its.loss.model_dump(mode="json"))),
        ("Learning rate", f"{optim.learning_rate:g} ({', '.join(rate)})"),
        ("Steps", f"{train.steps:,}{updates}"),
        ("Batch", f"{train.prompts_per_step:,} prompts a step{each}"),
        ("Completion length", f"at most {rollout.max_new_tokens:,} tokens"),
        ("Temperature", ", ".join([f"{rollout.temperature:g}", *cut])),
    ]
    if its.reward is not None:
        found.insert(2, ("Reward", str(its.reward.rule)))
    return found


def _main(config: ExperimentConfig, trained: Mapping[str, DistillArm]) -> str:
    full = config.roles.first("full")
    return full if full is not None and full in trained else next(iter(trained))


def _precision(config: ExperimentConfig, records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The dtypes as the arms' records have them, or, before there are any, the config."""
    asked = config.precision.model_dump()
    used = dict.fromkeys(
        tuple((its["precision"] or {}).get(key, asked[key]) for key in ("compute", "stored"))
        for its in records
    ) or {(asked["compute"], asked["stored"]): None}
    words = [f"computed in {compute}, stored as {stored}" for compute, stored in used]
    return ("Precision", "; ".join(words))


def _differences(
    config: ExperimentConfig, trained: Mapping[str, DistillArm]
) -> list[tuple[str, str]]:
    """How the recipes of other arms differ from the one that is shown."""
    base = config.recipe_of(trained[_main(config, trained)]).model_dump(mode="json")
    found = []
    for arm, own in trained.items():
        if lines := differences(base, config.recipe_of(own).model_dump(mode="json")):
            more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
            found.append((f"{arm} differs in", "; ".join(lines[:4]) + more))
    return found


def _loss(loss: Mapping[str, Any]) -> str:
    """`reverse_kl, support full, token_mean, temperatures 1 and 1`, of the fields that a loss has."""
    parts = [str(loss["type"]).replace("_", " ")]
    for key, value in loss.items():
        if isinstance(value, Mapping):
            rest = [f"{k} {v}" for k, v in value.items() if k != "type"]
            parts.append(f"{key} {' '.join([str(value.get('type')).replace('_', ' '), *rest])}")
        elif key not in LEFT_OUT and value not in (None, False):
            known = key.replace("_temperature", " temperature").replace("normalisation", "")
            parts.append(f"{known.replace('_', ' ')} {str(value).replace('_', ' ')}".strip())
    return ", ".join(parts)


def _cost(run: RunFolder, records: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Machine, time and memory of the trained arms."""
    found = []
    memories = [
        read_record(path)
        for its in records
        if (path := run.arm(str(its["arm"])) / "memory.json").exists()
    ]
    devices = {str(m["device"]) for m in memories} or {
        str(r["device"]) for r in records if r["device"]
    }
    if devices:
        found.append(("Hardware", ", ".join(sorted(devices))))
    if seconds := [float(r["seconds"]) for r in records if r.get("seconds")]:
        span = " to ".join(dict.fromkeys((duration(min(seconds)), duration(max(seconds)))))
        each = f", {span} an arm" if len(seconds) > 1 else ""
        found.append(("Training time", f"{duration(sum(seconds))}{each}"))
        spent = [
            float(r["seconds"]) * r["processes"]
            for r in records
            if r.get("seconds") and r.get("processes")
        ]
        if len(spent) == len(seconds):  # records of before have no number of processes
            found.append(("Device-hours", f"{sum(spent) / 3600:.2g}"))
    peaks = [max(m["peak_bytes"].values()) for m in memories if m.get("peak_bytes")]
    if peaks:
        found.append(("Peak memory", f"{max(peaks) / 2**30:.3g} GiB ({memories[0]['peak_of']})"))
    return found


def _evaluation(config: ExperimentConfig) -> str:
    asked = config.eval
    limit = f", at most {asked.limit:,} questions each" if asked.limit else ""
    how = "greedy, or the tasks' own settings"
    if asked.sampled:
        how = f"{asked.sampled.n} samples at temperature {asked.sampled.temperature:g}"
    return f"{', '.join(asked.tasks)}{limit}; {how}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
