"""The verdict: compare.json as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vlopd.config.roles import UnpooledControl
from vlopd.config.sweeps import words_of

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
UNESTABLISHED = "not distinguishable at this number of questions"


def verdict(record: Entry) -> list[str]:
    """compare.json as sentences, task by task; scores in percent, differences in percentage points."""
    if "arms" not in record or "family" not in record:
        return ["No comparison, or one of an older version: run `vlopd compare RUN`."]
    sentences = []
    shown = {task: entry for task, entry in record["tasks"].items() if not entry["group"]}
    for task, entry in shown.items():  # a group's total stands for its tasks
        task_sentences = TaskSentences(entry, record["arms"])
        prefix = f"{task}: " if len(shown) > 1 else ""
        retrained = task_sentences.retrained()
        # the main result first, then the results it depends on
        lines = [*retrained[:1], *task_sentences.full_training(), *retrained[1:]]
        lines += [
            *task_sentences.transplants(),
            *task_sentences.nulls(),
            *task_sentences.others(),
            *task_sentences.declared(),
            *task_sentences.limits(),
        ]
        sentences += [prefix + line for line in lines]
    sentences += tuning(record["arms"])
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
    if record["family"]["tests"] > 1:
        tasks = f" in {len(record['family']['tasks'])} tasks" if len(shown) > 1 else ""
        sentences.append(
            f"Differences are called distinguishable by p after Holm's correction over {record['family']['tests']} "
            f"{record['family']['name']}{tasks}."
        )
    return sentences


def tuning(arms: Mapping[str, Entry]) -> list[str]:
    """What was chosen for tuned arms, choices at the edge of their grid, and arms that had another budget."""
    lines = []
    budgets = {arm: its["budget"] for arm, its in arms.items() if its.get("budget")}
    for arm, its in arms.items():
        if found := its.get("sweep"):
            line = f"{_sentence_start(arm)} is tuned on the validation split: {words_of(found['chosen'])}, "
            line += f"of {budgets[arm]['settings']} settings"
            if found["at_edge"]:
                line += f"; that is the edge of the grid of {', '.join(found['at_edge'])}, so the best may lie outside"
            lines.append(line + ".")
    if lines and len({tuple(its.values()) for its in budgets.values()}) > 1:
        each: dict[tuple[int, int], list[str]] = {}
        for arm, its in budgets.items():
            each.setdefault((its["settings"], its["completions"]), []).append(arm)
        had = "; ".join(
            f"{', '.join(names)}: {settings} setting{'s' if settings > 1 else ''}, {completions:,} completions"
            for (settings, completions), names in each.items()
        )
        lines.append(
            f"The trained arms had different budgets ({had}): a difference between them is of tuning too."
        )
    return lines


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
        self.scale: str = task["scale"]
        self.up, self.down = (
            ("better", "worse") if task["higher_is_better"] else ("worse", "better")
        )

    def full_training(self) -> list[str]:
        """Full against base and teacher, and its replicates."""
        lines = []
        base, teacher, full, gain = self.base, self.teacher, self.full, self.gain
        name = self.name[0].upper() + self.name[1:]
        if full and base and teacher:
            between = (
                f"between base ({self.percent(self.arms[base]['mean'])}) "
                f"and teacher ({self.percent(self.arms[teacher]['mean'])})"
            )
            gap = self.task["gap_closed"]
            if gap["status"] == "ok":
                lines.append(f"{name} closes {share(gap)} of the gap {between}.")
            else:
                lines.append(f"There is no established gap {between} to close.")
        if gain and full:
            lines.append(
                f"{name} scores {self.percent(self.arms[full]['mean'])}: {self.points(gain)} against the "
                f"base, {_p_values(gain)}: {_direction(gain, 'above', 'below')}."
            )
            status = self.arms[full]["recovery"]["status"]
            if status == "weak":
                is_found = gain["direction"] == ("above" if self.up == "better" else "below")
                why = "is too small for its error" if is_found else "is not established"
                lines.append(
                    f"That gain {why}, so every recovery of it is weak: its (Fieller) interval may be "
                    "unbounded, and if it were reported only after a significant gain, it would be biased towards 0."
                )
            elif status != "ok":
                lines.append("Without a gain over the base, recovery is undefined for every arm.")
        chance = (self.task.get("chance") or {}).get("all")
        if base and chance is not None and self.arms[base]["interval"][0] is not None:
            low, high = self.arms[base]["interval"]
            if low <= chance <= high:
                known = "The base" if base == "base" else base
                lines.append(
                    f"{known} ({percent(self.arms[base]['mean'])}) is not distinguishable from "
                    f"chance ({percent(chance)})."
                )
        for arm in self._with_role("replicate"):
            if contrast := self.contrast(arm, full):
                lines.append(
                    f"{name} repeated as {arm} differs from {full} by {self.points(contrast)}."
                )
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
                line = f"{name} scores {self.percent(self.arms[arm]['mean'])}"
                if recovered["status"] == "weak":
                    line += f" (weak recovery: {share(recovered)})"
            for group in self.controls(arm):
                masks = MATCH_PHRASES.get(group["match"], f"{group['kind']} masks")
                its = group["pooled"]
                value = (
                    share(its["recovery"])
                    if recovered["status"] == "ok"
                    else self.percent(its["mean"])
                )
                line += f"; {masks} {value} ({_mean_of(group['arms'])})"
            lines.append(line + ".")
            for group in self.controls(arm):
                line = f"{_sentence_start(arm)} minus {group['kind']}: {self.finding(group['difference'])}."
                if group["match"] and len(group["arms"]) > 1:  # draws of one rule have ranks
                    line += (
                        f" Among its {len(group['arms'])} random controls it ranks {_rank(group)}; over mask seeds "
                        f"no p below {group['smallest_possible_p']:.2g} is possible."
                    )
                lines.append(line)
            if difference := self.to_full(arm):
                lines.append(
                    f"{_sentence_start(arm)} minus {self.name_of_full(difference['b'])}: {self.finding(difference)}; "
                    f"{non_inferiority_text(difference)}."
                )
        return lines + [self.over_seeds(its) for its in self.task["seeds"]]

    def over_seeds(self, its: Entry) -> str:
        """A difference over seeds, with the kinds of seed that it is over and the training noise that it lacks."""
        levels = its["levels"]
        kinds = dict.fromkeys(level for level in levels.values() if level != "one arm")
        line = (
            f"Over {' and '.join(kinds)} as well as questions, {its['name']} ({its['seeds_a']} and {its['seeds_b']} "
            f"arms): {self.points(its)}"
        )
        if its["two_level"]:
            return line + "."
        lacking = [
            "the controls"
            if levels[side] == "mask seeds"
            else f"{its[side][0]} (one training seed)"
            for side in ("a", "b")
            if levels[side] != "training seeds" and self.arms[its[side][0]]["role"] != "base"
        ]
        return f"{line}; the training noise of {' and '.join(lacking)} is not in the interval."

    def others(self) -> list[str]:
        """External models and imported scores, and variants and projections of the default family."""
        lines = []
        for its in self.task["contrasts"]:
            role = self.arms[its["a"]]["role"]
            in_family = role in ("variant", "projection") and not its["exploratory"]
            if (role == "other" or in_family) and not self._is_declared(its):
                lines.append(f"{its['a']} minus {its['b']}: {self.finding(its)}.")
        return lines

    def declared(self) -> list[str]:
        """Declared contrasts without a dedicated sentence."""
        return [
            f"{its['a']} minus {its['b']}: {self.finding(its)}."
            for its in self.task["contrasts"]
            if self._is_declared(its)
        ]

    def _is_declared(self, contrast: Entry) -> bool:
        """Whether a contrast between two arms is declared, and none of those that have a dedicated sentence."""
        a, b = contrast["a"], contrast["b"]
        covered = isinstance(b, str) and (self.arms[a]["role"], self.arms[b]["role"]) in COVERED
        if self.arms[a]["role"] == "subnetwork":  # of several full arms, one has the sentence
            covered = bool(contrast.get("non_inferiority"))
        return contrast["declared"] and isinstance(b, str) and not covered

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
                line += f"scores {self.percent(self.arms[arm]['mean'])}"
            lines.append(line + (f", {self.points(to_full)} against full." if to_full else "."))
            for group in self.controls(arm):
                lines.append(
                    f"{_sentence_start(arm)} minus transplants on {group['kind']} masks "
                    f"({_mean_of(group['arms'])}): {self.finding(group['difference'])}."
                )
        return lines

    def nulls(self) -> list[str]:
        """Arms trained on a signal that carries nothing, with the real arm beside."""
        lines = []
        for arm in self._with_role("null"):
            line = (
                f"{_sentence_start(arm)}, trained on a signal that carries nothing "
                f"({self.about[arm].get('null', 'signal null')}), scores {self.percent(self.arms[arm]['mean'])}"
            )
            its = next((c for c in self.task["contrasts"] if c["b"] == arm), None)
            lines.append(
                f"{line}; {its['a']} minus it: {self.finding(its)}." if its else f"{line}."
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
        size = f"{100 * effect:.1f} pp" if self.scale == "fraction" else f"{effect:.3g}"
        return [
            *lines,
            f"With these {self.task['n']:,} questions there is 80 % power to detect a difference of {size} ({of}) by "
            "its own p, before correction.",
        ]

    def percent(self, value: float | None) -> str:
        return percent(value, self.scale)

    def points(self, difference: Entry) -> str:
        return points(difference, self.scale)

    def finding(self, difference: Entry) -> str:
        """A contrast's difference, p and direction: +5.0 pp [+0.3, +9.7], p = 0.04 (0.12 after Holm): not ..."""
        words = _direction(difference, self.up, self.down)
        return f"{self.points(difference)}, {_p_values(difference)}: {words}"

    def _with_role(self, role: str) -> list[str]:
        return [name for name, arm in self.arms.items() if arm["role"] == role]

    def first(self, role: str) -> str | None:
        return next(iter(self._with_role(role)), None)

    def contrast(self, a: str | None, b: str | None) -> Entry | None:
        return next((c for c in self.task["contrasts"] if (c["a"], c["b"]) == (a, b)), None)

    def to_full(self, arm: str) -> Entry | None:
        """A subnetwork's contrast with full training: from its own seed, where there is such an arm."""
        found = [c for c in self.task["contrasts"] if c["a"] == arm and c.get("non_inferiority")]
        return next(iter(found), None)

    def name_of_full(self, arm: str) -> str:
        """`full`, or the replicate that stands for it at a subnetwork's seed, so that the mask alone differs."""
        return "full" if arm == self.full else f"{arm} ({self.name} from the same seed)"

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


def percent(value: float | None, scale: str = "fraction") -> str:
    """A score in percent, or as it is in a metric's own scale."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if scale == "fraction" else f"{value:.4g}"


def points(difference: Entry, scale: str = "fraction") -> str:
    """A difference with its interval, in percentage points: +5.2 pp [+1.0, +9.4]; or in a metric's own scale."""
    if scale == "fraction":
        return f"{plain(100 * difference['mean'], '+.1f')} pp{interval(difference, 100, '+.1f')}"
    return f"{plain(difference['mean'], '+.3g')}{interval(difference, 1, '+.3g')}"


def share(recovered: Entry) -> str:
    """A recovery with its interval: 0.71 [0.63, 0.79]."""
    if recovered["value"] is None:
        return recovered["status"]
    bounds = interval(recovered, 1, ".2f") or " (unbounded interval)"
    return f"{recovered['value']:.2f}{bounds}"


def interval(entry: Entry, scale: float, form: str) -> str:
    """The entry's interval in brackets after a space, open to a side where it has no bound; empty if it has none."""
    low, high = entry["interval"] or (None, None)
    if not _is_number(low) and not _is_number(high):
        return ""
    start = f"[{plain(scale * low, form)}" if _is_number(low) else "(-\u221e"
    end = f"{plain(scale * high, form)}]" if _is_number(high) else "\u221e)"
    return f" {start}, {end}"


def plain(value: float, form: str) -> str:
    """A number in a format like `+.1f`, without the minus of one that rounds to zero."""
    return format(value, form.replace(".", "z.", 1))


def _direction(difference: Entry, above: str, below: str) -> str:
    """The side on which p decides; distinguishable only by the corrected p of the family."""
    if difference["direction"] is not None:
        side = above if difference["direction"] == "above" else below
        return side if difference["exploratory"] else f"distinguishably {side}"
    low, high = difference["interval"]
    excludes_zero = _is_number(low) and _is_number(high) and not low <= 0 <= high
    return "not established" if excludes_zero else UNESTABLISHED


def non_inferiority_text(difference: Entry) -> str:
    """The non-inferiority test of a subnetwork against full, at eval.margin."""
    tested = difference["non_inferiority"]
    margin = f"{100 * tested['margin']:.3g} pp"
    if tested["holds"]:
        return f"no worse by {margin} or more (non-inferior, p {_equals(tested['p'])})"
    if tested["why"]:
        return f"not said to be within {margin}: {tested['why']}"
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
    """The p of a contrast with the corrected p, or that there is none."""
    p, corrected = difference["p"], difference["p_holm"]
    if corrected == p:
        return f"p {_equals(p)}"
    if corrected is None:
        note = "exploratory, uncorrected"
    else:
        same = p_value(corrected) == p_value(p)
        note = "also after Holm" if same else f"{p_value(corrected)} after Holm"
    return f"p {_equals(p)} ({note})"


def _rank(group: Entry) -> str:
    """The rank among controls: 1 of 4; with ties, 1 to 3 of 4, tied with 2."""
    rank, of, tied = group["rank"], group["of"], group["tied"]
    return f"{rank - tied} to {rank} of {of}, tied with {tied}" if tied else f"{rank} of {of}"


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
