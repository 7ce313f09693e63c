"""Every contrast between the arms of a run, paired by question: evals/*/ -> compare.json.

Scores lie in [0, 1] and are better when higher. Intervals are over questions; where several arms differ in nothing
but the training seed, `seeds` has intervals over both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals import stats
from evals.pairing import PairedScores, read_paired_scores, read_results
from evals.stats import Scores
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import DistillArm, Role
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.recipe import training_of
from vlopd.config.roles import Roles
from vlopd.digests import digest_files, digest_json
from vlopd.errors import RunError
from vlopd.files import read_json, without_nan
from vlopd.run.folder import RunFolder
from vlopd.run.stage import stage

POWER = 0.8
PAIRS: tuple[tuple[Role, Role], ...] = (
    *(("teacher", "base"), ("full", "base"), ("teacher", "full"), ("replicate", "full")),
    *(("variant", "full"), ("variant", "base")),
    *(("subnetwork", "full"), ("subnetwork", "base"), ("control", "base")),
    *(("transplant", "full"), ("transplant", "subnetwork")),
    *(("projection", "full"), ("projection", "base")),
    *(("other", "full"), ("other", "base")),
)
"""The contrasts that follow from the arms' roles."""
SUMMED_UP: tuple[tuple[Role, Role], ...] = (
    ("full", "base"),
    ("subnetwork", "full"),
    ("subnetwork", "base"),
    ("subnetwork", "control"),
)
"""Those that are repeated over training seeds, where there are several."""
FORMAT = 2
"""Of compare.json; one of another format is made again."""


def compare(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes compare.json: every arm and every contrast.

    Raises RunError when an arm has no evaluation, or arms were asked different questions.
    """
    inputs = {"config": digest_json(config.model_dump(mode="json"))}
    return compare_arms(run, config.roles, config.eval, inputs, arms_about(run, config))


def compare_arms(
    run: RunFolder,
    roles: Roles,
    config: EvalConfig,
    inputs: Mapping[str, Any],
    about: Mapping[str, Mapping[str, Any]],
) -> Path:
    """The comparison of a folder's evaluations, by what each arm is for; `about` is what is known of each arm."""
    evals = {arm: run.eval(arm) for arm in roles.of}
    for arm in evals:
        if run.checksums.path(f"evals/{arm}").exists():
            run.checksums.check(f"evals/{arm}")
    results = read_results(run.root / "evals", list(evals))
    digests = {
        f"evals/{arm}": digest_files([its / "results.json", *its.glob("samples_*.jsonl")])
        for arm, its in evals.items()
    }
    with stage(run, "compare", derived=True) as its:
        if its.is_due(lambda _: {**inputs, **digests, "format": FORMAT}):
            record = comparison(run, roles, config, results, about)
            its.finish(without_nan(record), ())
    return run.compare


def comparison(
    run: RunFolder,
    roles: Roles,
    config: EvalConfig,
    results: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of compare.json. Raises RunError where no task has a score a question."""
    arms = list(roles.of)
    first = results[arms[0]]
    if not first["primary_metric"]:
        why = "; ".join(f"{task}: {reason}" for task, reason in first["not_compared"].items())
        raise RunError(f"nothing can be compared ({why}); add a task with a score a question")
    tasks = {}
    for task, metric in first["primary_metric"].items():
        further = first.get("pass_at", {}).get(task, [])
        answers = read_paired_scores(run.root / "evals", arms, task, metric, further)
        tasks[task] = compare_task(answers, roles, config)
        tasks[task]["chance"] = first.get("chance", {}).get(task)
        for arm in arms:
            failures = results[arm].get("extraction_failure_fraction", {}).get(task)
            tasks[task]["arms"][arm]["extraction_failure_fraction"] = failures
    return {
        "confidence": config.confidence,
        "margin": config.margin,
        "declared_contrasts": config.contrasts and list(config.contrasts),
        "sampled": config.sampled and config.sampled.model_dump(mode="json"),
        "other_base": {arm: its for arm in arms if (its := results[arm].get("other_base"))},
        "not_compared": first.get("not_compared", {}),
        "arms": {arm: {"role": role, **about.get(arm, {})} for arm, role in roles.of.items()},
        "not_pooled": [its._asdict() for its in roles.unpooled],
        "tasks": tasks,
    }


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

    def contrast(a: str, b: str | tuple[str, ...], name: str = "") -> dict[str, Any]:
        entry = measure.contrast(name or f"{a} - {b}", a, b, scores[a], mean_scores(scores, b))
        if full and roles.of[a] == "subnetwork" and b == full:
            entry["non_inferiority"] = measure.non_inferiority(a, full)
        return entry

    contrasts = [
        contrast(a, b)
        for above, below in PAIRS
        for a in roles.arms(above)
        for b in roles.arms(below)
    ]
    controls = []
    for group in roles.controls:
        contrasts += [contrast(group.arm, other) for other in group.arms]
        name = f"{group.arm} - {group.kind} (mean of {len(group.arms)})"
        difference = contrast(group.arm, group.arms, name)
        contrasts.append(difference)
        pooled = mean_scores(scores, group.arms)
        means = [float(scores[other].mean()) for other in group.arms]
        controls.append(
            {
                **group._asdict(),
                "pooled": {
                    **measure.arm(pooled),
                    "sd_between_arms": float(np.std(means, ddof=1)) if len(means) > 1 else None,
                },
                "difference": difference,
                **stats.rank_among(float(scores[group.arm].mean()), means).__dict__,
            }
        )
    contrasts += [contrast(its.of, its.arm) for its in roles.unpooled]
    given = {(its["a"], its["b"]) for its in contrasts}
    declared = roles.contrasts(config.contrasts or ())
    contrasts += [contrast(a, b) for a, b in declared if (a, b) not in given]
    adjust(contrasts, set(declared))
    key = controls[0]["difference"] if controls else next(iter(contrasts), None)
    return {
        "metric": answers.metric,
        "n": len(answers.groups),
        "clusters": len(set(answers.clusters)) if answers.clusters else None,
        "arms": entries,
        "contrasts": contrasts,
        "controls": controls,
        "seeds": over_seeds(answers, roles, config),
        "gap_closed": entries[full]["gap_closed"] if full else None,
        "minimum_detectable_effect": key and key["minimum_detectable_effect"],
        "minimum_detectable_effect_of": key and key["name"],
    }


def adjust(contrasts: Sequence[dict[str, Any]], declared: Collection[tuple[Any, Any]]) -> None:
    """Holm's p over the declared contrasts, or over all where none are declared; null for the others."""
    for contrast in contrasts:
        contrast["declared"] = (contrast["a"], contrast["b"]) in declared
        contrast["p_holm"] = None
    family = [contrast for contrast in contrasts if contrast["declared"] or not declared]
    for contrast, p in zip(family, stats.holm([c["p"] for c in family]), strict=True):
        contrast["p_holm"] = p


def mean_scores(scores: Mapping[str, Scores], arms: str | Sequence[str]) -> Scores:
    """An arm's score of each question, or the mean of several arms'."""
    if isinstance(arms, str):
        return scores[arms]
    return np.mean([scores[arm] for arm in arms], axis=0)


def over_seeds(answers: PairedScores, roles: Roles, config: EvalConfig) -> list[dict[str, Any]]:
    """The main contrasts between arms that differ in the training seed alone (or the control mask's), as groups."""
    single = [(arm,) for arm in roles.of if not any(arm in own for own in roles.families)]
    groups: dict[str, list[tuple[str, ...]]] = {
        role: [own for own in (*roles.families, *single) if roles.of[own[0]] == role]
        for role in ("base", "full", "subnetwork")
    }
    kinds = {group.arms: group.kind for group in roles.controls}
    groups["control"] = list(kinds)
    rows = []
    for above, below in SUMMED_UP:
        for a in groups[above]:
            for b in groups[below]:
                if len(a) == len(b) == 1:
                    continue
                if below == "control" and not any(
                    group.arm in a and group.arms == b for group in roles.controls
                ):
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
                name = f"{a[0]} - {kinds[b] if below == 'control' else b[0]}"
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


def arms_about(run: RunFolder, config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """What a comparison says of each arm: what its training is called, its seed, and its record's density."""
    found: dict[str, dict[str, Any]] = {}
    for name, arm in config.arms.items():
        path = run.arm_record(name)
        its: dict[str, Any] = dict.fromkeys(("training", "seed", "density"))
        if isinstance(arm, DistillArm):
            its |= {"training": training_of(config.recipe_of(arm)), "seed": arm.seed}
        found[name] = its | ({"density": read_json(path).get("density")} if path.exists() else {})
    return found
