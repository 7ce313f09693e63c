"""The verdict: compare.json as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vlopd.config.roles import UnpooledControl

Entry = Mapping[str, Any]
UNREADABLE_FRACTION = 0.5
"""Extraction-failure fraction above which a score reflects the format rather than the answers."""
ROLE_WORDS = ("subnetwork", "transplant")
"""Arm names that are used as words in the sentences."""
ABBREVIATIONS = {"on-policy distillation": "OPD", "supervised fine-tuning": "SFT"}
"""Abbreviated names of trainings."""
MATCH_PHRASES = {
    "global": "random masks of the same density",
    "module": "random masks of the same densities per module",
    "tensor": "random masks of the same per-tensor densities",
    "magnitude": "random masks of the same densities per |w| bin",
    "visibility": "random masks of the same densities per binade of |w|",
}
"""Description of random control masks, by their `match`."""
COVERED = {("full", "base"), ("subnetwork", "full"), ("replicate", "full"), ("other", "base")}
"""Contrasts, as pairs of roles, that have dedicated sentences."""


def verdict(record: Entry) -> list[str]:
    """compare.json as sentences, task by task; scores in percent, differences in percentage points."""
    if "arms" not in record:
        return ["No comparison, or one of an older version: run `vlopd compare RUN`."]
    sentences = []
    for task, entry in record["tasks"].items():
        task_sentences = TaskSentences(entry, record["arms"])
        prefix = f"{task}: " if len(record["tasks"]) > 1 else ""
        retrained = task_sentences.retrained()
        # the main result first, then the results it depends on
        lines = [*retrained[:1], *task_sentences.full_training(), *retrained[1:]]
        lines += [
            *task_sentences.transplants(),
            *task_sentences.others(),
            *task_sentences.declared(),
            *task_sentences.limits(),
        ]
        sentences += [prefix + line for line in lines]
    roles = {arm: its["role"] for arm, its in record["arms"].items()}
    noise = "they exclude training-seed noise"
    if any(its.get("seed") is not None for its in record["arms"].values()):
        noise += (
            f" ({full_name(record['arms'])} was repeated, see its replicates)"
            if "replicate" in roles.values()
            else " (one seed per arm)"
        )
    sentences += [
        f"{_sentence_start(UnpooledControl(**its).line)}; it is compared separately."
        for its in record["not_pooled"]
    ]
    for arm, made_of in record["other_base"].items():
        sentences.append(
            f"{_sentence_start(arm)} was made with --allow-other-base: {', '.join(made_of)} came from "
            "another base checkpoint."
        )
    sentences.append(f"Intervals are {100 * record['confidence']:g} % over questions; {noise}.")
    return sentences


def full_name(arms: Mapping[str, Entry]) -> str:
    """The full arm's name in sentences: full OPD, full SFT, ...; "full training" for an external checkpoint."""
    full = next((its for its in arms.values() if its["role"] == "full"), {})
    training = full.get("training") or "training"
    return f"full {ABBREVIATIONS.get(training, training)}"


class TaskSentences:
    """The sentences on one task."""

    def __init__(self, task: Entry, about: Mapping[str, Entry]):
        self.task, self.about = task, about
        self.arms: Mapping[str, Entry] = task["arms"]
        self.base, self.teacher, self.full = map(self.first, ("base", "teacher", "full"))
        self.gain = self.contrast(self.full, self.base)
        self.name = full_name(about)

    def full_training(self) -> list[str]:
        """Full against base and teacher, and its replicates."""
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
                    f"The teacher is not distinguishably better than the base: there is no gap {between} to close."
                )
        if gain and full:
            lines.append(
                f"{name} scores {percent(self.arms[full]['mean'])}: {points(gain)} against the "
                f"base, {_direction(gain, 'above', 'below')}."
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
        for arm in self._with_role("replicate"):
            if contrast := self.contrast(arm, full):
                lines.append(f"{name} repeated as {arm} differs from {full} by {points(contrast)}.")
        return lines

    def retrained(self) -> list[str]:
        """Recovery of the subnetworks, and comparison with their controls."""
        lines = []
        for arm in self._with_role("subnetwork"):
            name = f"The {self.density(arm)}subnetwork{_parenthesised(arm)}, retrained{self.seed(arm)},"
            recovered = self.arms[arm]["recovery"]
            if recovered["status"] == "ok":
                line = f"{name} recovers {share(recovered)} of {possessive(self.name)} gain"
            else:
                line = f"{name} scores {percent(self.arms[arm]['mean'])}"
            for group in self.controls(arm):
                masks = MATCH_PHRASES.get(group["match"], f"{group['kind']} masks")
                its = group["pooled"]
                value = (
                    share(its["recovery"]) if recovered["status"] == "ok" else percent(its["mean"])
                )
                line += f"; {masks} {value} ({_mean_of(group['arms'])})"
            lines.append(line + ".")
            for group in self.controls(arm):
                difference = group["difference"]
                line = (
                    f"{_sentence_start(arm)} minus {group['kind']}: {points(difference)}, "
                    f"{_p_values(difference)}: {_direction(difference, 'better', 'worse')}."
                )
                if group["match"]:  # draws of one rule, among which a rank is meaningful
                    line += (
                        f" Among its {len(group['arms'])} random controls it ranks {group['rank']} "
                        f"of {group['of']}; over mask seeds no p below "
                        f"{group['smallest_possible_p']:.2g} is possible."
                    )
                lines.append(line)
            if difference := self.contrast(arm, self.full):
                lines.append(
                    f"{_sentence_start(arm)} minus full: {points(difference)}, "
                    f"{_direction(difference, 'better', 'worse')}; {non_inferiority_text(difference)}."
                )
        for its in self.task["seeds"]:
            lines.append(
                f"Over seeds as well as questions, {its['name']} ({its['seeds_a']} and {its['seeds_b']} arms): "
                f"{points(its)}."
            )
        return lines

    def others(self) -> list[str]:
        """External models and imported scores."""
        return [
            f"{c['a']} minus {c['b']}: {points(c)}, {_direction(c, 'better', 'worse')}."
            for c in self.task["contrasts"]
            if c["a"] in self._with_role("other")
        ]

    def declared(self) -> list[str]:
        """Declared contrasts without a dedicated sentence."""
        return [
            f"{c['a']} minus {c['b']}: {points(c)}, {_p_values(c)}: {_direction(c, 'better', 'worse')}."
            for c in self.task["contrasts"]
            if c["declared"]
            and isinstance(c["b"], str)
            and (self.arms[c["a"]]["role"], self.arms[c["b"]]["role"]) not in COVERED
        ]

    def transplants(self) -> list[str]:
        """The base plus the delta on the mask, without retraining."""
        lines = []
        for arm in self._with_role("transplant"):
            recovered, to_full = self.arms[arm]["recovery"], self.arms[arm]["difference_to_full"]
            line = (
                f"The transplant{_parenthesised(arm)}, base plus the full delta on the "
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
                    f"{_sentence_start(arm)} minus transplants on {group['kind']} masks "
                    f"({_mean_of(group['arms'])}): {points(difference)}, "
                    f"{_direction(difference, 'better', 'worse')}."
                )
        return lines

    def limits(self) -> list[str]:
        """Extraction failures, and the minimum detectable effect."""
        lines = [
            f"No answer could be extracted from {percent(share)} of {name}'s completions; these count as wrong."
            for name, its in self.arms.items()
            if (share := its.get("extraction_failure_fraction") or 0) > UNREADABLE_FRACTION
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

    def _with_role(self, role: str) -> list[str]:
        return [name for name, arm in self.arms.items() if arm["role"] == role]

    def first(self, role: str) -> str | None:
        return next(iter(self._with_role(role)), None)

    def contrast(self, a: str | None, b: str | None) -> Entry | None:
        return next((c for c in self.task["contrasts"] if (c["a"], c["b"]) == (a, b)), None)

    def controls(self, arm: str) -> list[Entry]:
        """The pooled controls of an arm, one group per kind of mask."""
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
    """The entry's interval in brackets after a space; empty if it has none."""
    bounds = entry["interval"]
    if bounds is None or not all(map(_is_number, bounds)):
        return ""
    return f" [{scale * bounds[0]:{form}}, {scale * bounds[1]:{form}}]"


def _direction(difference: Entry, above: str, below: str) -> str:
    """Whether the interval excludes zero, and on which side."""
    low, high = difference["interval"]
    if low is not None and low > 0:
        return f"distinguishably {above}"
    if high is not None and high < 0:
        return f"distinguishably {below}"
    return "not distinguishable at this number of questions"


def non_inferiority_text(difference: Entry) -> str:
    """The non-inferiority test of a subnetwork against full, at eval.margin."""
    tested = difference["non_inferiority"]
    margin = f"{100 * tested['margin']:.3g} pp"
    if tested["holds"]:
        return f"no worse by {margin} or more (non-inferior, p {_equals(tested['p'])})"
    low = tested["low"]
    worst = "" if not _is_number(low) else f"; it may be {-100 * low:.1f} pp worse"
    return f"not shown to be within {margin} (non-inferiority p {_equals(tested['p'])}){worst}"


def _is_number(value: float | None) -> TypeGuard[float]:
    """Whether a value is defined: NaN, and null in a file, mean too few questions."""
    return value is not None and not math.isnan(value)


def p_value(p: float | None) -> str:
    return "-" if not _is_number(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def _equals(p: float | None) -> str:
    return p_value(p) if _is_number(p) and p < 0.001 else f"= {p_value(p)}"


def _p_values(difference: Entry) -> str:
    """The p of a contrast, and the corrected p if it is in the family."""
    corrected = difference["p_holm"]
    holm = f" ({p_value(corrected)} after Holm)" if _is_number(corrected) else ""
    return f"p {_equals(difference['p'])}{holm}"


def _mean_of(arms: Sequence[str]) -> str:
    return "one mask" if len(arms) == 1 else f"mean of {len(arms)}"


def possessive(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _parenthesised(arm: str) -> str:
    """The arm's name in parentheses, unless it is already a word of the sentence."""
    return "" if arm in ROLE_WORDS else f" ({arm})"


def _sentence_start(arm: str) -> str:
    """An arm's name at the start of a sentence; the user's names are not capitalised."""
    return arm.capitalize() if arm in ROLE_WORDS else arm
