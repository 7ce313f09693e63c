"""Every contrast between the arms of a run, paired by question: evals/*/ -> compare.json.

Arms are put into roles by the config alone. Scores lie in [0, 1] and are better when higher. All
intervals are over questions; what another training seed would change is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evals import stats
from evals.report.verdict import verdict
from evals.stats import Scores
from vlopd.checkpoint import (
    RunError,
    RunFolder,
    digest_files,
    digest_json,
    read_json,
    read_jsonl,
    up_to_date,
    write_json,
)
from vlopd.config import (
    DistillArm,
    ExperimentConfig,
    ExtrapolateArm,
    RandomMask,
    SourceArm,
    TeacherArm,
    TransplantArm,
    mask_of,
)

Role = Literal[
    "base",
    "teacher",
    "full",
    "replicate",
    "variant",
    "subnetwork",
    "random",
    "transplant",
    "projection",
]
POWER = 0.8


# ------------------------------------------------------------------------------------------- roles


@dataclass(frozen=True)
class Roles:
    """What each arm is for. `controls[arm]`: the arms made alike under random masks of its mask."""

    of: Mapping[str, Role]
    controls: Mapping[str, tuple[str, ...]]

    def arms(self, role: Role) -> list[str]:
        return [arm for arm, its in self.of.items() if its == role]

    def first(self, role: Role) -> str | None:
        return next(iter(self.arms(role)), None)


def roles_of(config: ExperimentConfig) -> Roles:
    """The first unmasked distill arm is full OPD, further ones are its replicates or, with sections of their
    own (another loss, say), its variants.

    Arms that an early checkpoint's subspace or direction made, masked or not, are projections.
    """
    of: dict[str, Role] = {}
    for name, arm in config.arms.items():
        if isinstance(arm, (SourceArm, TeacherArm)):
            of[name] = "base" if isinstance(arm, SourceArm) else "teacher"
        elif isinstance(arm, ExtrapolateArm) or (isinstance(arm, DistillArm) and arm.subspace):
            of[name] = "projection"
        elif isinstance(arm, DistillArm) and arm.mask is None and arm.own:
            of[name] = "variant"
        elif arm.mask is None:
            of[name] = "replicate" if "full" in of.values() else "full"
        elif isinstance(config.masks[arm.mask], RandomMask):
            of[name] = "random"
        else:
            of[name] = "transplant" if isinstance(arm, TransplantArm) else "subnetwork"
    controls = {
        name: tuple(
            other
            for other, its in of.items()
            if its == "random"
            and type(config.arms[other]) is type(config.arms[name])
            and origin(config, mask_of(config.arms[other])) == mask_of(config.arms[name])
        )
        for name, role in of.items()
        if role in ("subnetwork", "transplant")
    }
    return Roles(of, {name: arms for name, arms in controls.items() if arms})


def origin(config: ExperimentConfig, mask: str | None) -> str | None:
    """The mask whose densities a random mask copies, through any number of `like`."""
    while mask is not None and isinstance(its := config.masks[mask], RandomMask):
        mask = its.like
    return mask


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Answers:
    """One task's scores under every arm, aligned: `scores[arm][i]` belongs to question i."""

    task: str
    metric: str
    scores: Mapping[str, Scores]
    groups: Sequence[str | None]
    clusters: Sequence[str] | None


def read_results(run: RunFolder, arms: Sequence[str]) -> dict[str, Any]:
    """results.json of every arm. Raises RunError on a missing arm or on data that differ."""
    missing = [arm for arm in arms if not (run.eval(arm) / "results.json").exists()]
    if missing:
        raise RunError(
            f"{run.root} has no evaluation of {', '.join(missing)}; run `vlopd eval {run.root}`"
        )
    results = {arm: read_json(run.eval(arm) / "results.json") for arm in arms}
    first = arms[0]
    for arm in arms[1:]:
        for key in ("data_digest", "primary_metric"):
            mine, theirs = results[first][key], results[arm][key]
            if mine != theirs:
                task = next(t for t in {**mine, **theirs} if mine.get(t) != theirs.get(t))
                raise RunError(
                    f"{first} and {arm} were evaluated with different {key} on {task} "
                    f"({mine.get(task)} and {theirs.get(task)}); delete evals/ and evaluate again"
                )
    return results


def read_answers(run: RunFolder, arms: Sequence[str], task: str, metric: str) -> Answers:
    """Joins the arms' samples of a task on (doc_id, doc_hash), in the first arm's order.

    Raises RunError when the arms were not asked the same questions, or scores are not in [0, 1].
    """
    tables = {}
    for arm in arms:
        path = run.eval(arm) / f"samples_{task}.jsonl"
        rows = read_jsonl(path)
        tables[arm] = {(row["doc_id"], row["doc_hash"]): row for row in rows}
        if len(tables[arm]) < len(rows):
            raise RunError(f"{path} has several rows a question; give the task a single filter")
        values = [row.get(metric) for row in rows]
        if not values or not all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in values):
            raise RunError(
                f"{path} needs rows, each with {metric!r} in [0, 1]; evaluate {arm} again"
            )
        if tables[arm].keys() != tables[arms[0]].keys():
            apart = len(tables[arm].keys() ^ tables[arms[0]].keys())
            raise RunError(
                f"{arms[0]} ({len(tables[arms[0]])} questions) and {arm} ({len(tables[arm])}) were "
                f"asked {apart} different ones of {task}; delete evals/ and evaluate again"
            )
    order = tables[arms[0]]
    clusters = [row["cluster"] for row in order.values()]
    # a cluster a question is no clustering at all, and leaves the exact methods for 0/1 scores open
    clustered = None not in clusters and len(set(clusters)) < len(clusters)
    return Answers(
        task,
        metric,
        {arm: np.array([float(tables[arm][k][metric]) for k in order]) for arm in arms},
        [row["group"] for row in order.values()],
        [str(cluster) for cluster in clusters] if clustered else None,
    )


# --------------------------------------------------------------------------------------- comparing


def compare(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes compare.json: every arm, every contrast, and the verdict in words.

    Raises RunError when an arm has no evaluation, or arms were asked different questions.
    """
    arms = list(config.arms)
    results = read_results(run, arms)
    inputs = {"config": digest_json(config.model_dump(mode="json"))}
    for arm in arms:
        inputs[f"evals/{arm}"] = digest_files(
            [run.eval(arm) / "results.json", *run.eval(arm).glob("samples_*.jsonl")]
        )
    if up_to_date(run.compare, inputs):
        return run.compare
    roles = roles_of(config)
    tasks = {}
    for task, metric in results[arms[0]]["primary_metric"].items():
        answers = read_answers(run, arms, task, metric)
        tasks[task] = compare_task(answers, roles, config)
        tasks[task]["chance"] = results[arms[0]].get("chance", {}).get(task)
        for arm in arms:
            failures = results[arm].get("extraction_failure_fraction", {}).get(task)
            tasks[task]["arms"][arm]["extraction_failure_fraction"] = failures
    foreign = {arm: its for arm in arms if (its := results[arm].get("other_source"))}
    record = {
        "inputs": inputs,
        "confidence": config.eval.confidence,
        "other_source": foreign,
        "tasks": tasks,
    }
    record["verdict"] = verdict(record, config, densities(run, arms))
    write_json(run.compare, without_nan(record))
    return run.compare


def compare_task(answers: Answers, roles: Roles, config: ExperimentConfig) -> dict[str, Any]:
    """One task's entry of compare.json, but for what results.json alone knows."""
    scores, base, full = answers.scores, roles.first("base"), roles.first("full")
    teacher = roles.first("teacher")
    measure = Measure(answers, config, base, full)
    entries = {}
    for arm in scores:
        entries[arm] = {"role": roles.of[arm], **measure.arm(scores[arm], arm == full)}
        entries[arm]["by_group"] = measure.by_group(scores[arm])
        entries[arm]["gap_closed"] = (
            measure.recovery(scores[arm], scores[base], scores[teacher])
            if base and teacher
            else None
        )

    pairs: list[tuple[Role, Role]]
    pairs = [("teacher", "base"), ("full", "base"), ("teacher", "full"), ("replicate", "full")]
    pairs += [("variant", "full"), ("variant", "base")]
    pairs += [("subnetwork", "full"), ("subnetwork", "base"), ("random", "base")]
    pairs += [("transplant", "full"), ("transplant", "subnetwork")]
    pairs += [("projection", "full"), ("projection", "base")]
    contrasts = [
        measure.contrast(f"{a} - {b}", a, b, scores[a], scores[b])
        for above, below in pairs
        for a in roles.arms(above)
        for b in roles.arms(below)
    ]
    controls = {}
    for arm, randoms in roles.controls.items():
        for other in randoms:
            contrasts.append(
                measure.contrast(f"{arm} - {other}", arm, other, scores[arm], scores[other])
            )
        pooled = np.mean([scores[other] for other in randoms], axis=0)
        means = [float(scores[other].mean()) for other in randoms]
        name = f"{arm} - random (mean of {len(randoms)})"
        difference = measure.contrast(name, arm, list(randoms), scores[arm], pooled)
        contrasts.append(difference)
        controls[arm] = {
            "arms": list(randoms),
            "pooled": {
                **measure.arm(pooled),
                "sd_between_arms": float(np.std(means, ddof=1)) if len(means) > 1 else None,
            },
            "difference": difference,
            **stats.rank_among(float(scores[arm].mean()), means).__dict__,
        }
    for contrast, adjusted in zip(contrasts, stats.holm([c["p"] for c in contrasts]), strict=True):
        contrast["p_holm"] = adjusted
    key = next(iter(controls.values()))["difference"] if controls else next(iter(contrasts), None)
    return {
        "metric": answers.metric,
        "n": len(answers.groups),
        "clusters": len(set(answers.clusters)) if answers.clusters else None,
        "arms": entries,
        "contrasts": contrasts,
        "random_controls": controls,
        "gap_closed": entries[full]["gap_closed"] if full else None,
        "minimum_detectable_effect": key and key["minimum_detectable_effect"],
        "minimum_detectable_effect_of": key and key["name"],
    }


@dataclass(frozen=True)
class Measure:
    """The numbers of one task as JSON values, at the config's confidence."""

    answers: Answers
    config: ExperimentConfig
    base: str | None
    full: str | None

    def arm(self, x: Scores, is_full: bool = False) -> dict[str, Any]:
        """An arm's mean, its difference to full and its recovery of full's gain over base."""
        confidence, scores = self.config.eval.confidence, self.answers.scores
        entry = plain(stats.mean_with_error(x, self.answers.clusters, confidence))
        to_full: dict[str, Any] | None = None
        regained: dict[str, Any] = {
            "value": None,
            "interval": None,
            "status": "no base or full arm",
        }
        if is_full:  # the reference: not an estimate
            to_full = {"mean": 0.0, "standard_error": 0.0, "interval": [0.0, 0.0]}
            to_full["mcnemar_p"] = 1.0
        elif self.full:
            difference = self.difference(x, scores[self.full])
            to_full = plain(difference)
            to_full["mcnemar_p"] = difference.p if difference.test == "mcnemar" else None
        if self.base and self.full:
            regained = self.recovery(x, scores[self.base], scores[self.full])
        return {**entry, "difference_to_full": to_full, "recovery": regained}

    def by_group(self, x: Scores) -> dict[str, Any]:
        """Mean and error within each question kind; empty where questions have none."""
        groups, clusters = np.array(self.answers.groups, dtype=object), self.answers.clusters
        found = {}
        for kind in sorted({group for group in groups if group is not None}):
            of_kind = groups == kind
            within = None if clusters is None else np.array(clusters)[of_kind]
            estimate = stats.mean_with_error(x[of_kind], within, self.config.eval.confidence)
            found[kind] = plain(estimate)
        return found

    def contrast(self, name: str, a: Any, b: Any, x: Scores, y: Scores) -> dict[str, Any]:
        difference = self.difference(x, y)
        # from the error of the mean, so that clustering counts
        effect = stats.minimum_detectable_effect(
            difference.standard_error, 1, POWER, 1 - self.config.eval.confidence
        )
        entry = {"name": name, "a": a, "b": b, **plain(difference)}
        return {**entry, "test": difference.test, "minimum_detectable_effect": effect}

    def difference(self, x: Scores, y: Scores) -> stats.Difference:
        confidence = self.config.eval.confidence
        return stats.paired_difference(x, y, self.answers.clusters, confidence)

    def recovery(self, sub: Scores, base: Scores, full: Scores) -> dict[str, Any]:
        its = self.config.eval
        found = stats.recovery(
            sub, base, full, its.bootstrap_draws, 0, its.confidence, self.answers.clusters
        )
        interval = None if found.value is None else [found.low, found.high]
        return {"value": found.value, "interval": interval, "status": found.status}


# ----------------------------------------------------------------------------------------- helpers


def plain(estimate: stats.Estimate) -> dict[str, Any]:
    """An estimate as JSON: n, mean, standard_error, interval, and p where there is one."""
    entry = dict(estimate.__dict__)
    entry.pop("test", None)
    entry["interval"] = [entry.pop("low"), entry.pop("high")]
    return entry


def without_nan(value: Any) -> Any:
    """The same value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def densities(run: RunFolder, arms: Sequence[str]) -> dict[str, float | None]:
    """The density each arm's record gives, where it has a record."""
    records = {arm: run.arm_record(arm) for arm in arms}
    return {a: read_json(path).get("density") for a, path in records.items() if path.exists()}
