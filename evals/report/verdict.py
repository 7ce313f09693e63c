"""The verdict: what the numbers of compare.json say, in sentences that say no more than they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vlopd.config.roles import UnpooledControl

Entry = Mapping[str, Any]
UNREADABLE = 0.5
"""Share of answers without a readable result above which a score is about the format."""
OWN_NAMES = ("subnetwork", "transplant")
"""Arm names that are words of these sentences."""
SHORT = {"on-policy distillation": "OPD", "supervised fine-tuning": "SFT"}
"""Names of trainings that are read as their initials."""
MATCHED = {
    "global": "random masks of the same density",
    "module": "random masks of the same densities per module",
    "tensor": "random masks of the same per-tensor densities",
    "magnitude": "random masks of the same densities at every size of weight",
    "visibility": "random masks of the same densities in every binade of the weights",
}
"""What random masks have in common with the mask that they are controls of, by their `match`."""
TOLD = {("full", "base"), ("subnetwork", "full"), ("replicate", "full"), ("other", "base")}
"""Contrasts between two arms, by role, that have sentences of their own."""


def verdict(record: Entry) -> list[str]:
    """What compare.json says in plain sentences, task by task. Scores are in percent, differences in points."""
    if "arms" not in record:
        return ["Not compared yet, or by an older version: run `vlopd compare RUN`."]
    sentences = []
    for task, entry in record["tasks"].items():
        teller = Teller(entry, record["arms"])
        prefix = f"{task}: " if len(record["tasks"]) > 1 else ""
        retrained = teller.retrained()
        # what the experiment is about comes first, then what it rests on
        lines = [*retrained[:1], *teller.full_training(), *retrained[1:]]
        lines += [*teller.transplants(), *teller.others(), *teller.declared(), *teller.limits()]
        sentences += [prefix + line for line in lines]
    roles = {arm: its["role"] for arm, its in record["arms"].items()}
    noise = "training-seed noise is not in them"
    if any(its.get("seed") is not None for its in record["arms"].values()):
        noise += (
            f" ({full_name(record['arms'])} was repeated, see its replicates)"
            if "replicate" in roles.values()
            else " (one seed per arm)"
        )
    sentences += [
        f"{capital(UnpooledControl(**its).line)}; it is compared on its own."
        for its in record["not_pooled"]
    ]
    for arm, made_of in record["other_base"].items():
        sentences.append(
            f"{capital(arm)} was made with --allow-other-base: {', '.join(made_of)} came from "
            "another base checkpoint."
        )
    sentences.append(f"Intervals are {100 * record['confidence']:g} % over questions; {noise}.")
    return sentences


def full_name(arms: Mapping[str, Entry]) -> str:
    """What the full arm is called in a sentence: full OPD, full SFT, ...; full training of one that came trained."""
    full = next((its for its in arms.values() if its["role"] == "full"), {})
    training = full.get("training") or "training"
    return f"full {SHORT.get(training, training)}"


class Teller:
    """The sentences about one task."""

    def __init__(self, task: Entry, about: Mapping[str, Entry]):
        self.task, self.about = task, about
        self.arms: Mapping[str, Entry] = task["arms"]
        self.base, self.teacher, self.full = map(self.first, ("base", "teacher", "full"))
        self.gain = self.contrast(self.full, self.base)
        self.name = full_name(about)

    def full_training(self) -> list[str]:
        """How far the full arm gets from base to teacher."""
        lines = []
        base, teacher, full, gain = self.base, self.teacher, self.full, self.gain
        name = self.name[0].upper() + self.name[1:]
        if full and base and teacher:
            between = (
                f"between base ({percent(self.arms[base]['mean'])}) "
                f"and teacher ({percent(self.arms[teacher]['mean'])})"
            )
            gap = self.task["gap_closed"]
            if gap["status"] == "ok":
                lines.append(f"{name} closes {share(gap)} of the gap {between}.")
            else:
                lines.append(
                    f"The teacher is not distinguishably better than the base, so no gap {between} "
                    "is there to close."
                )
        if gain and full:
            lines.append(
                f"{name} scores {percent(self.arms[full]['mean'])}: {points(gain)} against the "
                f"base, {finding(gain, 'above', 'below')}."
            )
            if self.arms[full]["recovery"]["status"] != "ok":
                lines.append("Without a gain over the base, recovery is undefined for every arm.")
        chance = (self.task.get("chance") or {}).get("all")
        if base and chance is not None and self.arms[base]["interval"][0] is not None:
            low, high = self.arms[base]["interval"]
            if low <= chance <= high:
                lines.append(
                    f"The base ({percent(self.arms[base]['mean'])}) is not distinguishable from "
                    f"chance ({percent(chance)})."
                )
        for arm in self.having("replicate"):
            if contrast := self.contrast(arm, full):
                lines.append(f"{name} repeated as {arm} differs from {full} by {points(contrast)}.")
        return lines

    def retrained(self) -> list[str]:
        """What the subnetworks recover, and whether random masks would do as well."""
        lines = []
        for arm in self.having("subnetwork"):
            name = f"The {self.density(arm)}subnetwork{named(arm)}, retrained{self.seed(arm)},"
            recovered = self.arms[arm]["recovery"]
            if recovered["status"] == "ok":
                line = f"{name} recovers {share(recovered)} of {self.name}'s gain"
            else:
                line = f"{name} scores {percent(self.arms[arm]['mean'])}"
            for group in self.controls(arm):
                masks = MATCHED.get(group["match"], f"{group['kind']} masks")
                its = group["pooled"]
                value = (
                    share(its["recovery"]) if recovered["status"] == "ok" else percent(its["mean"])
                )
                line += f"; {masks} {value} ({mean_of(group['arms'])})"
            lines.append(line + ".")
            for group in self.controls(arm):
                difference = group["difference"]
                line = (
                    f"{capital(arm)} minus {group['kind']}: {points(difference)}, "
                    f"{p_values(difference)}: {finding(difference, 'better', 'worse')}."
                )
                if group["match"]:  # draws of one rule, which a rank among them means something for
                    line += (
                        f" Among its {len(group['arms'])} random controls it ranks {group['rank']} "
                        f"of {group['of']}; over mask seeds no p below "
                        f"{group['smallest_possible_p']:.2g} is possible."
                    )
                lines.append(line)
            if difference := self.contrast(arm, self.full):
                lines.append(
                    f"{capital(arm)} minus full: {points(difference)}, "
                    f"{finding(difference, 'better', 'worse')}; {no_worse(difference)}."
                )
        for its in self.task["seeds"]:
            lines.append(
                f"Over seeds as well as questions, {its['name']} ({its['seeds_a']} and {its['seeds_b']} arms): "
                f"{points(its)}."
            )
        return lines

    def others(self) -> list[str]:
        """Models and scores from elsewhere."""
        return [
            f"{c['a']} minus {c['b']}: {points(c)}, {finding(c, 'better', 'worse')}."
            for c in self.task["contrasts"]
            if c["a"] in self.having("other")
        ]

    def declared(self) -> list[str]:
        """The declared contrasts of which nothing else is said."""
        return [
            f"{c['a']} minus {c['b']}: {points(c)}, {p_values(c)}: {finding(c, 'better', 'worse')}."
            for c in self.task["contrasts"]
            if c["declared"]
            and isinstance(c["b"], str)
            and (self.arms[c["a"]]["role"], self.arms[c["b"]]["role"]) not in TOLD
        ]

    def transplants(self) -> list[str]:
        """What the delta on the mask does without retraining."""
        lines = []
        for arm in self.having("transplant"):
            recovered, to_full = self.arms[arm]["recovery"], self.arms[arm]["difference_to_full"]
            line = (
                f"The transplant{named(arm)}, base plus the full delta on the "
                f"{self.density(arm)}mask without retraining, "
            )
            if recovered["status"] == "ok":
                line += f"recovers {share(recovered)}"
            else:
                line += f"scores {percent(self.arms[arm]['mean'])}"
            lines.append(line + (f", {points(to_full)} against full." if to_full else "."))
            for group in self.controls(arm):
                difference = group["difference"]
                lines.append(
                    f"{capital(arm)} minus transplants on {group['kind']} masks "
                    f"({mean_of(group['arms'])}): {points(difference)}, "
                    f"{finding(difference, 'better', 'worse')}."
                )
        return lines

    def limits(self) -> list[str]:
        """What so many questions could show at all, and answers that could not be read."""
        lines = [
            f"No answer could be read from {percent(share)} of {name}'s completions, which count as wrong."
            for name, its in self.arms.items()
            if (share := its.get("extraction_failure_fraction") or 0) > UNREADABLE
        ]
        effect, of = (
            self.task["minimum_detectable_effect"],
            self.task["minimum_detectable_effect_of"],
        )
        if not effect or math.isnan(effect):
            return lines
        return [
            *lines,
            f"With these {self.task['n']} questions there is 80 % power to detect a difference of "
            f"{100 * effect:.1f} pp ({of}).",
        ]

    def having(self, role: str) -> list[str]:
        return [name for name, arm in self.arms.items() if arm["role"] == role]

    def first(self, role: str) -> str | None:
        return next(iter(self.having(role)), None)

    def contrast(self, a: str | None, b: str | None) -> Entry | None:
        return next((c for c in self.task["contrasts"] if (c["a"], c["b"]) == (a, b)), None)

    def controls(self, arm: str) -> list[Entry]:
        """The pooled controls of an arm, a group a kind of mask."""
        return [group for group in self.task["controls"] if group["arm"] == arm]

    def density(self, arm: str) -> str:
        value = self.about[arm].get("density")
        return "" if value is None else f"{100 * value:.3g} % "

    def seed(self, arm: str) -> str:
        if self.full is None:
            return ""
        same = self.about[arm].get("seed") == self.about[self.full].get("seed")
        return " from the same seed" if same else " from another seed"


# -------------------------------------------------------------------------------- numbers in words


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def points(difference: Entry) -> str:
    """A difference with its interval, in percentage points: +5.2 pp [+1.0, +9.4]."""
    return f"{100 * difference['mean']:+.1f} pp{interval(difference, 100, '+.1f')}"


def share(recovered: Entry) -> str:
    """A recovery with its interval: 0.71 [0.63, 0.79]."""
    if recovered["value"] is None:
        return recovered["status"]
    return f"{recovered['value']:.2f}{interval(recovered, 1, '.2f')}"


def interval(entry: Entry, scale: float, form: str) -> str:
    """The entry's interval in brackets after a space; nothing where it has none."""
    bounds = entry["interval"]
    if bounds is None or not all(map(is_known, bounds)):
        return ""
    return f" [{scale * bounds[0]:{form}}, {scale * bounds[1]:{form}}]"


def finding(difference: Entry, above: str, below: str) -> str:
    """Which side of zero the interval lies on, if it lies on one."""
    low, high = difference["interval"]
    if low is not None and low > 0:
        return f"distinguishably {above}"
    if high is not None and high < 0:
        return f"distinguishably {below}"
    return "not distinguishable at this number of questions"


def no_worse(difference: Entry) -> str:
    """Whether a subnetwork is as good as full, at the margin that was declared."""
    tested = difference["non_inferiority"]
    margin = f"{100 * tested['margin']:.3g} pp"
    if tested["holds"]:
        return f"no worse by {margin} or more (non-inferior, p {equals(tested['p'])})"
    low = tested["low"]
    worst = "" if not is_known(low) else f"; it may be {-100 * low:.1f} pp worse"
    return f"not shown to be within {margin} (non-inferiority p {equals(tested['p'])}){worst}"


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is such a number: nan, and null in a file, stand where questions were too few."""
    return value is not None and not math.isnan(value)


def p_value(p: float | None) -> str:
    return "-" if not is_known(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def equals(p: float | None) -> str:
    return p_value(p) if is_known(p) and p < 0.001 else f"= {p_value(p)}"


def p_values(difference: Entry) -> str:
    """The p of a contrast, and the corrected one where it is of the family."""
    corrected = difference["p_holm"]
    holm = f" ({p_value(corrected)} after Holm)" if is_known(corrected) else ""
    return f"p {equals(difference['p'])}{holm}"


def mean_of(arms: Sequence[str]) -> str:
    return "one mask" if len(arms) == 1 else f"mean of {len(arms)}"


def named(arm: str) -> str:
    """The arm's name in brackets, unless the sentence has just said it."""
    return "" if arm in OWN_NAMES else f" ({arm})"


def capital(arm: str) -> str:
    """An arm's name at the start of a sentence; names of the user's own stay as they are."""
    return arm.capitalize() if arm in OWN_NAMES else arm
