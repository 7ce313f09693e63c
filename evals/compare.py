"""Compares the arms of a run, paired by question: evals/*/ -> compare.json.

Intervals are over questions; where several arms differ only in the training seed, or several controls only in the
mask's, `seeds` has intervals over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from evals import stats
from evals.corpus_metrics import CorpusStatistics, recovery_to_json
from evals.paired_scores import PairedScores, read_results, read_tasks
from evals.stats import Scores
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import DistillArm, Role
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.recipe import training_of
from vlopd.config.roles import Roles
from vlopd.digests import digest_json, digest_scores
from vlopd.errors import RunError
from vlopd.files import without_nan
from vlopd.run.folder import RunFolder
from vlopd.run.links import check_links
from vlopd.run.schemas.read import read_record
from vlopd.run.stage import stage

ROLE_CONTRASTS: tuple[tuple[Role, Role], ...] = (
    *(("teacher", "base"), ("full", "base"), ("teacher", "full"), ("replicate", "full")),
    *(("variant", "full"), ("variant", "base")),
    *(("subnetwork", "full"), ("subnetwork", "base"), ("control", "base")),
    *(("transplant", "full"), ("transplant", "subnetwork")),
    *(("projection", "full"), ("projection", "base")),
    *(("other", "full"), ("other", "base")),
)
"""Contrasts made by default, as pairs of roles."""
QUESTIONS: frozenset[tuple[Role, Role]] = frozenset(
    {
        *(("teacher", "base"), ("full", "base"), ("subnetwork", "full"), ("subnetwork", "base")),
        *(("variant", "full"), ("transplant", "full"), ("projection", "full")),
        *(("other", "full"), ("other", "base")),
    }
)
"""Those that answer the question of their roles: with each arm's pooled controls the default family."""
QUESTIONS_WITHOUT_FULL: frozenset[tuple[Role, Role]] = frozenset(
    {("variant", "base"), ("projection", "base")}
)
"""More of them, where no arm is full."""
SEED_CONTRASTS: tuple[tuple[Role, Role], ...] = (
    ("full", "base"),
    ("subnetwork", "full"),
    ("subnetwork", "base"),
    ("subnetwork", "control"),
)
"""Contrasts also made over seeds, where there are several."""
FORMAT = 6
"""Version of compare.json; another version is made again."""


def compare(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes compare.json and returns its path.

    Raises RunError where an arm has no evaluation, or arms were evaluated on different questions.
    """
    run.checksums.check_finished("arms", "base_kl", "sweeps")
    check_links(run, config, "arms", "masks", "evals", "base_kl", "validation")
    entries = _arm_entries(run, config)
    inputs = {"config": digest_json(config.model_dump(mode="json"))}
    measured = {arm: its["kl_to_base"] for arm, its in entries.items()}
    if any(value is not None for value in measured.values()):
        inputs["kl_to_base"] = digest_json(measured)
    return compare_arms(run, config.roles, config.eval, inputs, entries)


def compare_arms(
    run: RunFolder,
    roles: Roles,
    config: EvalConfig,
    inputs: Mapping[str, Any],
    about: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Compares a folder's evaluations according to roles; `about` has further entries per arm."""
    evals = {arm: run.eval(arm) for arm in roles.of}
    for arm in evals:
        if run.checksums.path(f"evals/{arm}").exists():
            run.checksums.check(f"evals/{arm}")
    results = read_results(run.root / "evals", list(evals))
    digests = {f"evals/{arm}": digest_scores(its) for arm, its in evals.items()}
    with stage(run, "compare", derived=True) as its:
        if its.is_due(lambda _: {**inputs, **digests, "format": FORMAT}):
            record = _comparison(run, roles, config, results, about)
            its.finish(without_nan(record), ())
    return run.compare


def _comparison(
    run: RunFolder,
    roles: Roles,
    config: EvalConfig,
    results: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of compare.json. Raises RunError where no task can be compared."""
    arms = list(roles.of)
    paired, not_compared = read_tasks(run.root / "evals", results, arms, config)
    tasks: dict[str, dict[str, Any]] = {}
    for answers in paired:
        try:
            entry = _compare_task(answers, roles, config)
        except RunError as error:
            not_compared[answers.task] = f"{answers.metric}: {error}"
            continue
        tasks[answers.task] = {**entry, **_about_task(answers, results, tasks)}
        for arm in arms:
            entry["arms"][arm] |= _about_answers(answers, results[arm], arm)
    if not tasks:
        why = "; ".join(f"{task}: {reason}" for task, reason in not_compared.items())
        raise RunError(f"nothing can be compared ({why}); add a task with per-question scores")
    family = _decide(tasks, roles, config)
    return {
        "confidence": config.confidence,
        "margin": config.margin,
        "family": family,
        "declared_contrasts": config.contrasts and list(config.contrasts),
        "sampled": config.sampled and config.sampled.model_dump(mode="json"),
        "other_base": {arm: its for arm in arms if (its := results[arm].get("other_base"))},
        "not_compared": not_compared,
        "arms": {arm: {"role": role, **about.get(arm, {})} for arm, role in roles.of.items()},
        "not_pooled": [its._asdict() for its in roles.unpooled],
        "tasks": tasks,
    }


def _about_task(
    answers: PairedScores, results: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What an entry of compare.json says of its task besides the statistics."""
    first, *_ = results.values()
    # the chance of an accuracy, which says nothing of a corpus metric
    chances = {} if answers.corpus else first.get("chance") or {}
    chance = chances.get(answers.task)
    if answers.members and all(task in chances for task in answers.members):
        chance = {"all": answers.pooled([chances[task]["all"] for task in answers.members])}
    group = answers.group if answers.group in before else None
    return {
        "chance": chance,
        "higher_is_better": answers.higher_is_better,
        "members": answers.members and list(answers.members),
        "group": group,
        "in_family": group is None,
    }


def _about_answers(answers: PairedScores, results: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """What an arm's entry says of its answers besides the statistics."""
    failures = results.get("extraction_failure_fraction") or {}
    return {
        "extraction_failure_fraction": failures.get(answers.task),
        "outcomes": answers.outcomes.get(arm),
        **answers.lengths[arm],
    }


def _compare_task(answers: PairedScores, roles: Roles, config: EvalConfig) -> dict[str, Any]:
    """One task's entry of compare.json, without what is copied from results.json.

    Raises RunError where a corpus metric cannot be computed.
    """
    better, corpus = answers.higher_is_better, answers.corpus
    statistics: TaskStatistics | CorpusStatistics
    if corpus is None:
        statistics = TaskStatistics(answers, config)
    else:
        statistics = CorpusStatistics(corpus, answers.clusters, config, better)
        statistics.values  # noqa: B018, computed here, or refused
    base, full, teacher = (roles.first(role) for role in ("base", "full", "teacher"))

    def arm(*names: str) -> dict[str, Any]:
        """An arm's value, difference to full, and recovery of full's gain; of several arms their mean's."""
        to_full: dict[str, Any] | None = None
        recovered: dict[str, Any] = {
            "value": None,
            "interval": None,
            "status": "no base or full arm",
        }
        if names == (full,):  # the reference itself
            to_full = {"mean": 0.0, "standard_error": 0.0, "interval": [0.0, 0.0], "mcnemar_p": 1.0}
        elif full:
            to_full = statistics.difference(names, (full,))
            exact = to_full.pop("test") == "mcnemar"
            to_full["mcnemar_p"] = to_full["p"] if exact else None
        if base and full:
            recovered = statistics.recovery(names, (base,), (full,))
            if names in ((base,), (full,)) and recovered["value"] is not None:
                fixed = float(names == (full,))  # by definition
                recovered |= {"value": fixed, "interval": [fixed, fixed]}
        return {
            **statistics.estimate(names),
            "difference_to_full": to_full,
            "recovery": recovered,
        }

    def contrast(a: str, b: str | tuple[str, ...], name: str = "") -> dict[str, Any]:
        others = (b,) if isinstance(b, str) else b
        about = {"name": name or f"{a} - {b}", "a": a, "b": b}
        entry = {**about, **statistics.contrast((a,), others)}
        if roles.of[a] == "subnetwork" and isinstance(b, str) and roles.full_at_seed_of(a) == b:
            entry["non_inferiority"] = statistics.non_inferiority((a,), (b,))
        return entry

    entries = {name: {"role": role, **arm(name)} for name, role in roles.of.items()}
    for name, entry in entries.items():
        found: dict[str, dict[str, Any]] = {"pass_at": {}, "further": {}}
        for metric, of in answers.further.items():
            kind = "pass_at" if metric.startswith("pass@") else "further"
            found[kind][metric] = _mean_of(answers, of[name], config)
        entry["by_group"] = {} if corpus else _by_group(answers, answers.scores[name], config)
        gap = statistics.recovery((name,), (base,), (teacher,)) if base and teacher else None
        entry |= {**found, "gap_closed": gap}
    contrasts = [
        contrast(a, b)
        for above, below in ROLE_CONTRASTS
        for a in roles.arms(above)
        for b in _compared_with(roles, a, below)
    ]
    controls = []
    for group in roles.controls:
        if len(group.arms) > 1:  # else the mean is the one control
            contrasts += [contrast(group.arm, other) for other in group.arms]
        several = f" (mean of {len(group.arms)})" if len(group.arms) > 1 else ""
        name = f"{group.arm} - {group.kind}{several}"
        contrasts.append(difference := contrast(group.arm, group.arms, name))
        means = [entries[other]["mean"] for other in group.arms]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
        sign = 1 if better else -1
        ranked = stats.rank_among(sign * entries[group.arm]["mean"], [sign * x for x in means])
        controls.append(
            {
                **group._asdict(),
                "pooled": {**arm(*group.arms), "sd_between_arms": spread},
                "difference": difference,
                **ranked.__dict__,
            }
        )
    contrasts += [contrast(its.of, its.arm) for its in roles.unpooled]
    contrasts += [contrast(roles.real_of(arm), arm) for its in roles.nulls for arm in its.arms]
    given = {(its["a"], its["b"]) for its in contrasts}
    declared = roles.contrasts(config.contrasts or ())
    contrasts += [contrast(a, b) for a, b in declared if (a, b) not in given]
    key = controls[0]["difference"] if controls else next(iter(contrasts), None)
    return {
        "metric": answers.metric,
        "n": len(answers.groups),
        "clusters": len(set(answers.clusters)) if answers.clusters else None,
        "scale": "fraction" if statistics.is_fraction else "own",
        "arms": entries,
        "contrasts": contrasts,
        "controls": controls,
        "seeds": _contrasts_over_seeds(statistics, roles),
        "gap_closed": entries[full]["gap_closed"] if full else None,
        "minimum_detectable_effect": key and key["minimum_detectable_effect"],
        "minimum_detectable_effect_of": key and key["name"],
    }


def _compared_with(roles: Roles, a: str, below: Role) -> list[str]:
    """The arms of a role that an arm is compared with: of full, the one trained from a subnetwork's own seed.

    Then the mask alone differs; against full at the mask's seed, the training seed differs too.
    """
    if roles.of[a] == "subnetwork" and below == "full":
        return [arm for arm in [roles.full_at_seed_of(a)] if arm is not None]
    return roles.arms(below)


def _decide(
    tasks: Mapping[str, dict[str, Any]], roles: Roles, config: EvalConfig
) -> dict[str, Any]:
    """Sets p_holm, direction and exploratory of every contrast, and flags weak recoveries; returns the family.

    The family is the declared contrasts, or by default those that answer the questions of the roles, in all tasks that
    no group's total stands for. Holm's correction is over it; a contrast outside has a null p_holm and is exploratory.
    """
    declared = set(roles.contrasts(config.contrasts or ()))
    questions = QUESTIONS if roles.first("full") else QUESTIONS | QUESTIONS_WITHOUT_FULL
    family = []
    for entry in tasks.values():
        for its in entry["contrasts"]:
            its["declared"] = (its["a"], its["b"]) in declared
            of_roles = not isinstance(its["b"], str) or (
                (roles.of[its["a"]], _role_of_other(roles, its["a"], its["b"])) in questions
            )
            its["p_holm"] = None
            if entry["in_family"] and (its["declared"] if declared else of_roles):
                family.append(its)
    for its, p in zip(family, stats.holm([its["p"] for its in family]), strict=True):
        its["p_holm"] = p
    for entry in tasks.values():
        for its in entry["contrasts"]:
            its["exploratory"] = its["p_holm"] is None
            p = its["p"] if its["exploratory"] else its["p_holm"]
            sides = {1.0: "above", -1.0: "below"}
            is_found = p <= 1 - config.confidence
            its["direction"] = sides.get(float(np.sign(its["mean"]))) if is_found else None
        _flag_recoveries(entry, roles)
    return {
        "name": "declared contrasts" if declared else "default contrasts",
        "correction": "holm",
        "tests": len(family),
        "tasks": [task for task, entry in tasks.items() if entry["in_family"]],
    }


def _role_of_other(roles: Roles, a: str, b: str) -> Role:
    """The role of the other side of a contrast; `full` for the replicate that stands for it at the arm's seed."""
    stands = roles.of[a] == "subnetwork" and roles.full_at_seed_of(a) == b
    return "full" if stands else roles.of[b]


def _flag_recoveries(entry: dict[str, Any], roles: Roles) -> None:
    """Flags recoveries as weak where the decided p does not establish the gain that they are fractions of."""
    better = "above" if entry["higher_is_better"] else "below"
    established = {
        its["a"] for its in entry["contrasts"]
        if its["b"] == roles.first("base") and its["direction"] == better
    }  # fmt: skip
    arms = [*entry["arms"].values(), *(group["pooled"] for group in entry["controls"])]
    flagged = [] if roles.first("full") in established else [its["recovery"] for its in arms]
    if roles.first("teacher") not in established:
        flagged += [its["gap_closed"] for its in entry["arms"].values()]
    for found in flagged:
        if found and found["status"] == "ok":
            found["status"] = "weak"


def _contrasts_over_seeds(
    statistics: TaskStatistics | CorpusStatistics, roles: Roles
) -> list[dict[str, Any]]:
    """SEED_CONTRASTS between groups of arms that differ only in the training seed (controls: in the mask's seed)."""
    single = [(arm,) for arm in roles.of if not any(arm in group for group in roles.seed_groups)]
    groups: dict[str, list[tuple[str, ...]]] = {
        role: [arms for arms in (*roles.seed_groups, *single) if roles.of[arms[0]] == role]
        for role in ("base", "full", "subnetwork")
    }
    kinds = {group.arms: group.kind for group in roles.controls}
    groups["control"] = list(kinds)
    rows = []
    for above, below in SEED_CONTRASTS:
        for a in groups[above]:
            for b in groups[below]:
                if len(a) == len(b) == 1:
                    continue
                if below == "control" and not any(
                    group.arm in a and group.arms == b for group in roles.controls
                ):
                    continue
                entry = dict(statistics.over_seeds(a, b).__dict__)
                entry["interval"] = [entry.pop("low"), entry.pop("high")]
                name = f"{a[0]} - {kinds[b] if below == 'control' else b[0]}"
                seeds_of_b = "mask seeds" if below == "control" else "training seeds"
                levels = {
                    side: of if len(arms) > 1 else "one arm"
                    for side, arms, of in (("a", a, "training seeds"), ("b", b, seeds_of_b))
                }
                # a base has no training noise to be sampled
                varied = [len(a) > 1, levels["b"] == "training seeds" or below == "base"]
                its = {"levels": levels, "two_level": all(varied)}
                rows.append({"name": name, "a": list(a), "b": list(b), **its, **entry})
    return rows


@dataclass(frozen=True)
class TaskStatistics:
    """Statistics of a metric that is a mean over questions, as JSON values; several arms stand for their mean."""

    answers: PairedScores
    config: EvalConfig
    is_fraction = True

    def estimate(self, arms: Sequence[str]) -> dict[str, Any]:
        return _mean_of(self.answers, self._scores(arms), self.config)

    def difference(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        found = stats.paired_difference(self._scores(a), self._scores(b), **self._given)
        return {**estimate_to_json(found), "test": found.test}

    def contrast(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        found, confidence = self.difference(a, b), self.config.confidence
        # from the interval, which accounts for clusters and few discordant questions
        low, high = found["interval"]
        error = (high - low) / 2 / float(norm.ppf((1 + confidence) / 2))
        draws = self.config.bootstrap_draws
        drawn = stats.paired_bootstrap(self._scores(a), self._scores(b), draws, **self._given)
        return {
            **found,
            "bootstrap": list(drawn),
            "minimum_detectable_effect": stats.minimum_detectable_effect(
                error, 1, alpha=1 - confidence
            ),
        }

    def recovery(
        self, sub: Sequence[str], base: Sequence[str], full: Sequence[str]
    ) -> dict[str, Any]:
        x, y, z = (self._goodness(arms) for arms in (sub, base, full))
        return recovery_to_json(stats.recovery(x, y, z, **self._given))

    def non_inferiority(self, a: Sequence[str], b: Sequence[str]) -> dict[str, Any]:
        x, y = self._goodness(a), self._goodness(b)
        return dict(stats.non_inferiority(x, y, self.config.margin, **self._given).__dict__)

    def over_seeds(self, a: Sequence[str], b: Sequence[str]) -> stats.SeedDifference:
        scores = self.answers.scores
        x, y = ([scores[arm] for arm in arms] for arms in (a, b))
        return stats.seed_difference(x, y, **self._given)

    @property
    def _given(self) -> dict[str, Any]:
        """What every statistic of the task's questions depends on."""
        return _given(self.answers, self.config)

    def _scores(self, arms: Sequence[str]) -> Scores:
        return np.mean([self.answers.scores[arm] for arm in arms], axis=0)

    def _goodness(self, arms: Sequence[str]) -> Scores:
        """Scores of which higher is better, in [0, 1]."""
        scores = self._scores(arms)
        return scores if self.answers.higher_is_better else 1 - scores


# ----------------------------------------------------------------------------------------- helpers


def estimate_to_json(estimate: stats.Estimate) -> dict[str, Any]:
    """An estimate as JSON: n, mean, standard_error, interval, and p if it has one."""
    entry = dict(estimate.__dict__)
    entry.pop("test", None)
    entry["interval"] = [entry.pop("low"), entry.pop("high")]
    return entry


def _given(answers: PairedScores, config: EvalConfig) -> dict[str, Any]:
    return {
        "clusters": answers.clusters,
        "confidence": config.confidence,
        "weights": answers.weights,
    }


def _mean_of(answers: PairedScores, x: Scores, config: EvalConfig) -> dict[str, Any]:
    return estimate_to_json(stats.mean_with_error(x, **_given(answers, config)))


def _by_group(answers: PairedScores, x: Scores, config: EvalConfig) -> dict[str, Any]:
    """Mean and error within each question kind; empty if questions have none."""
    groups, clusters = np.array(answers.groups, dtype=object), answers.clusters
    found = {}
    for kind in sorted({group for group in groups if group is not None}):
        of_kind = groups == kind
        within = None if clusters is None else np.array(clusters)[of_kind]
        estimate = stats.mean_with_error(x[of_kind], within, config.confidence)
        found[kind] = estimate_to_json(estimate)
    return found


def _arm_entries(run: RunFolder, config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Entries of each arm in compare.json: its training's name, seed, density, norm of the update, KL to the base."""
    found: dict[str, dict[str, Any]] = {}
    for name, arm in config.arms.items():
        path = run.arm_record(name)
        its: dict[str, Any] = dict.fromkeys(("training", "seed", "density", "delta_norm"))
        if isinstance(arm, DistillArm):
            its |= {"training": training_of(config.recipe_of(arm)), "seed": arm.seed}
            its |= {"null": arm.null.label} if arm.null else {}
            its["budget"] = config.budget_of(name)
            if (group := config.sweep_group(name)) is not None and run.sweep(group).exists():
                about = read_record(run.sweep(group))
                its["sweep"] = {key: about[key] for key in ("chosen", "grid", "at_edge")}
        if path.exists():
            record = read_record(path)
            its |= {key: record.get(key) for key in ("density", "delta_norm")}
        found[name] = its | {"kl_to_base": _kl_to_base(run, name)}
    return found


def _kl_to_base(run: RunFolder, arm: str) -> float | None:
    """The mean KL(arm || base), nats per token; None where it was not measured."""
    path = run.checksums.record(f"base_kl/{arm}")
    value = read_record(path)["kl_to_base"] if path.exists() else None
    return None if value is None else float(value)
