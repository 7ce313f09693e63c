"""Which parameter of one checkpoint is which of another, by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vlopd.models.names import unwrapped_name

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    pass


Shapes = Mapping[str, tuple[int, ...]]


Changes = list[tuple[str, str]]
"""(prefix here, prefix there), in the order in which they apply."""


def paired(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({our name: their name}, the changes of prefix): by name, without wrappers, and under another prefix."""
    found = {name: name for name in ours.keys() & theirs.keys()}
    left = unwrapped(ours.keys() - found.keys())
    right = unwrapped(theirs.keys() - found.keys())
    found |= {left[bare]: right[bare] for bare in left.keys() & right.keys()}
    under, changes = renamed(
        {bare: ours[name] for bare, name in left.items()},
        {bare: theirs[name] for bare, name in right.items()},
    )
    return found | {left[bare]: right[other] for bare, other in under.items()}, changes


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """{name without wrappers: name}; those that two names share are left out."""
    bare = {name: unwrapped_name(name) for name in names}
    count = Counter(bare.values())
    return {plain: name for name, plain in bare.items() if count[plain] == 1}


def renamed(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({our name: their name}, the changes of prefix) of parameters under another prefix, such as language_model.

    Names and shapes of two checkpoints; those of equal name are left out. Of all changes of prefix that the
    names admit, the one under which most parameters meet with equal shapes is taken, then the next. Where two
    changes of equal number give a parameter different partners, none is sure.
    """
    left = {name: shape for name, shape in ours.items() if name not in theirs}
    right = {name: shape for name, shape in theirs.items() if name not in ours}
    found: dict[str, str] = {}
    changes: Changes = []
    while left and right:
        votes = {change: meeting(left, right, change) for change in prefix_changes(left, right)}
        best = max(votes, key=lambda change: (len(votes[change]), change), default=None)
        if best is None or not votes[best]:
            break
        rivals = [v for v in votes.values() if len(v) == len(votes[best])]
        partners: dict[str, set[str]] = {}
        for rival in rivals:
            for name, other in rival.items():
                partners.setdefault(name, set()).add(other)
                partners.setdefault(other, set()).add(name)
        unsure = {name for name, its in partners.items() if len(its) > 1}
        unsure |= {other for name in unsure for other in partners[name]}
        before = len(found)
        for name in list(left):
            partner = replaced(name, *best)
            if partner is not None and partner in right and not {name, partner} & unsure:
                found[name] = partner
                del left[name], right[partner]
        changes += [best] if len(found) > before else []
        for name in unsure:
            left.pop(name, None)
            right.pop(name, None)
    return found, changes


def meeting(left: Shapes, right: Shapes, change: tuple[str, str]) -> dict[str, str]:
    """{name here: name there} of parameters that a change of prefix brings together with equal shapes."""
    others = {name: replaced(name, *change) for name in left}
    return {n: other for n, other in others.items() if other and right.get(other) == left[n]}


def prefix_changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(prefix here, prefix there) under which some stem of one side, up to its layer's number, becomes the other's.

    Names without a layer are a stem as a whole, and meet in their module at least: norm.weight, not weight alone.
    """

    def stems(names: Mapping[str, Any]) -> set[tuple[str, ...]]:
        return {tuple(re.split(r"\.(?=\d+\.)", name, maxsplit=1)[0].split(".")) for name in names}

    changes = set()
    for a in stems(left):
        for b in stems(right):
            common = 0
            while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
                common += 1
            needed = 2 if a[-1] in ("weight", "bias") else 1
            if common >= min(needed, len(a), len(b)):
                changes.add((".".join(a[: len(a) - common]), ".".join(b[: len(b) - common])))
    return changes


def replaced(name: str, old: str, new: str) -> str | None:
    """The name with another prefix, or None where it does not begin with the old one."""
    if old and not name.startswith(old + "."):
        return None
    rest = name[len(old) + 1 :] if old else name
    return f"{new}.{rest}" if new else rest


def renamed_by(changes: Changes, names: Mapping[str, str]) -> dict[str, str]:
    """The same under the first change of prefix that fits each name."""
    found = {}
    for bare, name in names.items():
        others = (replaced(bare, *change) for change in changes)
        found[next((other for other in others if other is not None), bare)] = name
    return found
