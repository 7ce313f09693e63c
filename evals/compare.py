"""Every contrast between the arms of a run, paired by question: evals/*/ -> compare.json.

Scores lie in [0, 1] and are better when higher. Intervals are over questions; where several arms differ in nothing
but the training seed, `seeds` has intervals over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import stats
from evals.pairing import PairedScores, read_paired_scores, read_results
from evals.report.verdict import verdict
from evals.roles import Role, Roles, roles_of
from evals.stats import Scores
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import RANDOM
from vlopd.config.experiment import ExperimentConfig
from vlopd.digests import digest_files, digest_json
from vlopd.errors import RunError
from vlopd.files import read_json, without_nan
from vlopd.run.checksums import Checksums
from vlopd.run.folder import RunFolder, up_to_date

POWER = 0.8
PAIRS: tuple[tuple[Role, Role], ...] = (
    *(("teacher", "base"), ("full", "base"), ("teacher", "full"), ("replicate", "full")),
    *(("variant", "full"), ("variant", "base")),
    *(("subnetwork", "full"), ("subnetwork", "base"), ("random", "base")),
    *(("transplant", "full"), ("transplant", "subnetwork")),
    *(("projection", "full"), ("projection", "base")),
    *(("other", "full"), ("other", "base")),
)
"""The contrasts that are reported, by role."""
SUMMED_UP: tuple[tuple[Role, Role], ...] = (
    ("full", "base"),
    ("subnetwork", "full"),
    ("subnetwork", "base"),
    ("subnetwork", "random"),
)
"""Those that are repeated over training seeds, where there are several."""


def compare(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes compare.json: every arm, every contrast, and the verdict in words.

    Raises RunError when an arm has no evaluation, or arms were asked different questions.
    """
    inputs = {"config": digest_json(config.model_dump(mode="json"))}
    evals = run.root / "evals"
    return compare_arms(
        evals, roles_of(config), config.eval, run.compare, inputs, densities(run, list(config.arms))
    )


def compare_arms(
    evals: Path,
    roles: Roles,
    config: EvalConfig,
    out: Path,
    inputs: Mapping[str, Any],
    density: Mapping[str, float | None],
) -> Path:
    """The comparison of evaluations in a folder, by what each arm is for."""
    arms, sums = list(roles.of), Checksums(evals.parent)
    for arm in arms:
        if sums.path(f"evals/{arm}").exists():
            sums.check(f"evals/{arm}")
    results = read_results(evals, arms)
    inputs = dict(inputs)
    for arm in arms:
        inputs[f"evals/{arm}"] = digest_files(
            [evals / arm / "results.json", *(evals / arm).glob("samples_*.jsonl")]
        )
    if up_to_date(out, inputs) and not any(sums.problems("compare", whole=False)):
        return out
    first = results[arms[0]]
    if not first["primary_metric"]:
        why = "; ".join(f"{task}: {reason}" for task, reason in first["not_compared"].items())
        raise RunError(f"nothing can be compared ({why}); add a task with a score a question")
    tasks = {}
    for task, metric in first["primary_metric"].items():
        further = first.get("pass_at", {}).get(task, [])
        answers = read_paired_scores(evals, arms, task, metric, further)
        tasks[task] = compare_task(answers, roles, config)
        tasks[task]["chance"] = first.get("chance", {}).get(task)
        for arm in arms:
            failures = results[arm].get("extraction_failure_fraction", {}).get(task)
            tasks[task]["arms"][arm]["extraction_failure_fraction"] = failures
    record = {
        "inputs": inputs,
        "confidence": config.confidence,
        "margin": config.margin,
        "sampled": config.sampled and config.sampled.model_dump(mode="json"),
        "other_base": {arm: its for arm in arms if (its := results[arm].get("other_base"))},
        "not_compared": first.get("not_compared", {}),
        "tasks": tasks,
    }
    record["verdict"] = verdict(record, roles.seeds, density)
    sums.finish("compare", out, without_nan(record), ())
    return out


def compare_task(answers: PairedScores, roles: Roles, config: EvalConfig) -> dict[str, Any]:
    """One task's entry of compare.json, but for what results.json alone knows."""
    scores, base, full = answers.scores, roles.first("base"), roles.first("full")
    teacher = roles.first("teacher")
    measure = Measure(answers, config, base, full)
    entries = {}
    for arm in scores:
        entries[arm] = {"role": roles.of[arm], **measure.arm(scores[arm], arm == full)}
        entries[arm]["by_group"] = measure.by_group(scores[arm])
        entries[arm]["pass_at"] = {
            name: plain(stats.mean_with_error(by_arm[arm], answers.clusters, config.confidence))
            for name, by_arm in answers.further.items()
        }
        entries[arm]["gap_closed"] = (
            measure.recovery(scores[arm], scores[base], scores[teacher])
            if base and teacher
            else None
        )

    contrasts = [
        measure.contrast(f"{a} - {b}", a, b, scores[a], scores[b])
        for above, below in PAIRS
        for a in roles.arms(above)
        for b in roles.arms(below)
    ]
    for contrast in contrasts:
        if full and roles.of[contrast["a"]] == "subnetwork" and contrast["b"] == full:
            contrast["non_inferiority"] = measure.non_inferiority(contrast["a"], full)
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
    adjust(contrasts, config.contrasts)
    key = next(iter(controls.values()))["difference"] if controls else next(iter(contrasts), None)
    return {
        "metric": answers.metric,
        "n": len(answers.groups),
        "clusters": len(set(answers.clusters)) if answers.clusters else None,
        "arms": entries,
        "contrasts": contrasts,
        "random_controls": controls,
        "seeds": over_seeds(answers, roles, config),
        "gap_closed": entries[full]["gap_closed"] if full else None,
        "minimum_detectable_effect": key and key["minimum_detectable_effect"],
        "minimum_detectable_effect_of": key and key["name"],
    }


def lost_contrasts(config: ExperimentConfig) -> list[str]:
    """The declared contrasts that no comparison of these arms' roles gives, a line each."""
    roles = roles_of(config)
    given = [
        f"{a} - {b}" for above, below in PAIRS for a in roles.arms(above) for b in roles.arms(below)
    ]
    for arm, randoms in roles.controls.items():
        given += [f"{arm} - {other}" for other in (RANDOM, *randoms)]
    return [
        f"eval.contrasts: {name!r} is no comparison of these arms' roles; there are {', '.join(given)}"
        for name in config.eval.contrasts or ()
        if name not in given
    ]


def adjust(contrasts: Sequence[dict[str, Any]], declared: Sequence[str] | None) -> None:
    """Holm's p over the declared contrasts, or over all where none are declared; null for the others."""

    def is_declared(contrast: Mapping[str, Any]) -> bool:
        b = RANDOM if isinstance(contrast["b"], list) else contrast["b"]
        return declared is None or f"{contrast['a']} - {b}" in declared

    family = [contrast for contrast in contrasts if is_declared(contrast)]
    for contrast in contrasts:
        contrast["p_holm"] = None
    for contrast, p in zip(family, stats.holm([c["p"] for c in family]), strict=True):
        contrast["p_holm"] = p


def over_seeds(answers: PairedScores, roles: Roles, config: EvalConfig) -> list[dict[str, Any]]:
    """The main contrasts between arms that differ in the training seed alone (or the random mask's), as groups."""
    single = [(arm,) for arm in roles.of if not any(arm in own for own in roles.families.values())]
    families = [*roles.families.values(), *single]
    groups = {
        role: [own for own in families if roles.of[own[0]] == role]
        for role in ("base", "full", "subnetwork")
    }
    groups["random"] = list(dict.fromkeys(roles.controls.values()))
    rows = []
    for above, below in SUMMED_UP:
        for a in groups[above]:
            for b in groups[below]:
                if len(a) == len(b) == 1:
                    continue
                if below == "random" and not any(roles.controls.get(arm) == b for arm in a):
                    continue
                found = stats.seed_difference(
                    [answers.scores[arm] for arm in a],
                    [answers.scores[arm] for arm in b],
                    config.bootstrap_draws,
                    confidence=config.confidence,
                    clusters=answers.clusters,
                )
                entry = dict(found.__dict__)
                entry["interval"] = [entry.pop("low"), entry.pop("high")]
                name = f"{a[0]} - {RANDOM if below == 'random' else b[0]}"
                rows.append({"name": name, "a": list(a), "b": list(b), **entry})
    return rows


@dataclass(frozen=True)
class Measure:
    """The numbers of one task as JSON values, at the config's confidence."""

    answers: PairedScores
    config: EvalConfig
    base: str | None
    full: str | None

    def arm(self, x: Scores, is_full: bool = False) -> dict[str, Any]:
        """An arm's mean, its difference to full and its recovery of full's gain over base."""
        confidence, scores = self.config.confidence, self.answers.scores
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
            estimate = stats.mean_with_error(x[of_kind], within, self.config.confidence)
            found[kind] = plain(estimate)
        return found

    def contrast(self, name: str, a: Any, b: Any, x: Scores, y: Scores) -> dict[str, Any]:
        difference = self.difference(x, y)
        # from the error of the mean, so that clustering counts
        effect = stats.minimum_detectable_effect(
            difference.standard_error, 1, POWER, 1 - self.config.confidence
        )
        low, high = stats.paired_bootstrap(
            x, y, self.config.bootstrap_draws, 0, self.config.confidence, self.answers.clusters
        )
        entry = {"name": name, "a": a, "b": b, **plain(difference), "bootstrap": [low, high]}
        return {**entry, "test": difference.test, "minimum_detectable_effect": effect}

    def non_inferiority(self, arm: str, full: str) -> dict[str, Any]:
        scores, its = self.answers.scores, self.config
        found = stats.non_inferiority(
            scores[arm], scores[full], its.margin, self.answers.clusters, its.confidence
        )
        return dict(found.__dict__)

    def difference(self, x: Scores, y: Scores) -> stats.Difference:
        confidence = self.config.confidence
        return stats.paired_difference(x, y, self.answers.clusters, confidence)

    def recovery(self, sub: Scores, base: Scores, full: Scores) -> dict[str, Any]:
        its = self.config
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


def densities(run: RunFolder, arms: Sequence[str]) -> dict[str, float | None]:
    """The density each arm's record gives, where it has a record."""
    records = {arm: run.arm_record(arm) for arm in arms}
    return {a: read_json(path).get("density") for a, path in records.items() if path.exists()}
