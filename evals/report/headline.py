"""The first three lines of a report: what full training gained, what the subnetwork recovered, and the limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.report.verdict import TaskSentences, full_name, plain, verdict

Entry = Mapping[str, Any]
WORDS = ("better", "worse", "not distinguishable")


def headline(record: Entry) -> list[str]:
    """Up to three lines. On one task they are sentences of the verdict; on several they count tasks, a group as one."""
    tasks = {task: its for task, its in record.get("tasks", {}).items() if not its.get("group")}
    if not tasks or "arms" not in record:
        return verdict(record)[:3]
    if len(tasks) == 1:
        (entry,) = tasks.values()
        about = TaskSentences(entry, record["arms"])
        main = [*about.full_training()[:1], *about.retrained()[:1]]
        main = main or about.others()[:2]
        decided = _subnetwork_findings(about) or verdict(record)[-1:]
        return [*main, " ".join([*decided, *about.limits()[-1:]])]
    lines = [*_full_lines(record, tasks), *_subnetwork_lines(record, tasks)]
    lines = lines or _other_lines(record, tasks)
    return [*lines[:2], " ".join([*_detectable(tasks), verdict(record)[-1]])]


def _subnetwork_findings(about: TaskSentences) -> list[str]:
    """The first subnetwork against its controls and against full: differences, p and what they decide."""
    arm = about.first("subnetwork")
    if arm is None:
        return []
    pairs = [(group["kind"], group["difference"]) for group in about.controls(arm)]
    if to_full := about.to_full(arm):
        pairs.append((about.name_of_full(to_full["b"]), to_full))
    name = "Subnetwork" if arm == "subnetwork" else arm
    found = "; ".join(f"minus {other}: {about.finding(its)}" for other, its in pairs)
    return [f"{name} {found}."] if found else []


def _full_lines(record: Entry, tasks: Mapping[str, Entry]) -> list[str]:
    full = next((arm for arm, its in record["arms"].items() if its["role"] == "full"), "")
    pairs = _pairs(record, tasks, full, "base")
    if not pairs:
        return []
    name = full_name(record["arms"])
    closed = [
        gap["value"]
        for entry in tasks.values()
        if (gap := entry.get("gap_closed")) and gap["status"] == "ok" and gap["value"] is not None
    ]
    gap = f"; it closes {_range(closed)} of the gap to the teacher" if closed else ""
    where = f" on the {_tasks(len(closed))} that have one" if 0 < len(closed) < len(pairs) else ""
    return [f"{name[0].upper()}{name[1:]} against the base: {_counts(pairs, tasks)}{gap}{where}."]


def _subnetwork_lines(record: Entry, tasks: Mapping[str, Entry]) -> list[str]:
    lines = []
    for arm in [arm for arm, its in record["arms"].items() if its["role"] == "subnetwork"]:
        recovered = [
            its["recovery"]["value"]
            for entry in tasks.values()
            if (its := entry["arms"].get(arm)) and its["recovery"]["status"] == "ok"
        ]
        name = f"The subnetwork{'' if arm == 'subnetwork' else f' ({arm})'}"
        line = f"{name} recovers {_range(recovered)} of the gain" if recovered else name
        line += f" on {_tasks(len(recovered))} with an established one" if recovered else ""
        for kind in dict.fromkeys(g["kind"] for e in tasks.values() for g in e["controls"]):
            pairs = {
                task: group["difference"]
                for task, entry in tasks.items()
                for group in entry["controls"]
                if (group["arm"], group["kind"]) == (arm, kind)
            }
            if pairs:
                line += f"; against its {kind} controls: {_counts(pairs, tasks)}"
        to_full = _pairs(record, tasks, arm, "full")
        if to_full:
            line += f"; against full: {_counts(to_full, tasks)}"
        lines.append(line + ".")
    return lines


def _other_lines(record: Entry, tasks: Mapping[str, Entry]) -> list[str]:
    """Each other arm against the first base."""
    lines = []
    for arm in record["arms"]:
        pairs = _pairs(record, tasks, arm, "base")
        if pairs:
            against = next(iter(pairs.values()))["b"]
            lines.append(f"{arm} against {against}: {_counts(pairs, tasks)}.")
    more = len(lines) - 2
    if more > 0:
        lines[1] += f" {more} more below."
    return lines


def _detectable(tasks: Mapping[str, Entry]) -> list[str]:
    """The range over tasks of the difference that there was power for."""
    effects = sorted(
        (its["minimum_detectable_effect"], task)
        for task, its in tasks.items()
        if its["minimum_detectable_effect"] and _is_fraction(its)
    )
    if not effects:
        return []
    (low, where), (high, there) = effects[0], effects[-1]
    span = f"{100 * low:.1f} pp ({where})"
    span += f" to {100 * high:.1f} pp ({there})" if len(effects) > 1 else ""
    return [f"80 % power, before correction, is for differences of {span}."]


def _pairs(record: Entry, tasks: Mapping[str, Entry], arm: str, role: str) -> dict[str, Entry]:
    """The contrast of an arm with the arm of a role, on every task that has it."""
    return {
        task: contrast
        for task, entry in tasks.items()
        for contrast in entry["contrasts"]
        if contrast["a"] == arm
        and (
            _role(record, contrast["b"]) == role
            or (role == "full" and contrast.get("non_inferiority"))
        )
    }


def _counts(pairs: Mapping[str, Entry], tasks: Mapping[str, Entry]) -> str:
    """`better on 4 of 6 tasks (+3.0 to +9.1 pp), worse on 1 (pope; -2.0 pp), not distinguishable on 1 (mmmu; +0.4 pp)`.

    With `by uncorrected p` where a contrast is outside the family of Holm's correction.
    """
    parts: list[str] = []
    for word in WORDS:
        found = {task: its for task, its in pairs.items() if _word(its, tasks[task]) == word}
        if found:
            total = f" of {_tasks(len(pairs))}" if not parts else ""
            notes = [", ".join(found)] if len(found) <= 2 or word == "worse" else []
            shown = [100 * its["mean"] for task, its in found.items() if _is_fraction(tasks[task])]
            if shown:
                ends = dict.fromkeys(plain(value, "+.1f") for value in (min(shown), max(shown)))
                notes.append(f"{' to '.join(ends)} pp")
            if any(its.get("exploratory") for its in found.values()):
                notes.append("by uncorrected p")
            parts.append(
                f"{word} on {len(found)}{total} ({'; '.join(notes)})"
                if notes
                else f"{word} on {len(found)}{total}"
            )
    return ", ".join(parts)


def _word(difference: Entry, task: Entry) -> str:
    """One of WORDS, by the direction and whether higher is better."""
    if (direction := _direction(difference)) is None:
        return WORDS[2]
    return WORDS[0] if (direction == "above") == task.get("higher_is_better", True) else WORDS[1]


def _is_fraction(task: Entry) -> bool:
    return bool(task.get("scale", "fraction") == "fraction")


def _direction(difference: Entry) -> str | None:
    """`direction`, or where a record has none the side of zero that the interval is on."""
    if "direction" in difference:
        return difference["direction"]
    low, high = difference["interval"]
    return "above" if (low or 0) > 0 else "below" if (high or 0) < 0 else None


def _role(record: Entry, arm: Any) -> str | None:
    return record["arms"][arm]["role"] if isinstance(arm, str) else None


def _tasks(n: int) -> str:
    return f"{n} task{'s' if n != 1 else ''}"


def _range(values: Iterable[float]) -> str:
    ordered: Sequence[float] = sorted(values)
    low, high = f"{ordered[0]:.2f}", f"{ordered[-1]:.2f}"
    return low if low == high else f"{low} to {high}"
