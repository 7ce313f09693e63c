"""Pairs the parameters of two checkpoints by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vlopd.models.parameter_names import unwrapped_name

Shapes = Mapping[str, tuple[int, ...]]


Changes = list[tuple[str, str]]
"""(prefix in the first, prefix in the second checkpoint), in the order in which they apply."""


def pair_names(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({first name: second name}, prefix changes): by name, without wrappers, and under another prefix."""
    found = {name: name for name in ours.keys() & theirs.keys()}
    left = strip_wrappers(ours.keys() - found.keys())
    right = strip_wrappers(theirs.keys() - found.keys())
    found |= {left[bare]: right[bare] for bare in left.keys() & right.keys()}
    under, changes = _pair_by_prefix(
        {bare: ours[name] for bare, name in left.items()},
        {bare: theirs[name] for bare, name in right.items()},
    )
    return found | {left[bare]: right[other] for bare, other in under.items()}, changes


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """{name without wrappers: name}; ambiguous ones are left out."""
    bare = {name: unwrapped_name(name) for name in names}
    count = Counter(bare.values())
    return {plain: name for name, plain in bare.items() if count[plain] == 1}


def _pair_by_prefix(ours: Shapes, theirs: Shapes) -> tuple[dict[str, str], Changes]:
    """({first name: second name}, prefix changes) of parameters under another prefix, such as language_model.

    Skips names that both checkpoints have. Greedily applies the prefix change that pairs the most parameters of
    equal shape. Parameters to which two equally good changes give different partners stay unpaired.
    """
    left = {name: shape for name, shape in ours.items() if name not in theirs}
    right = {name: shape for name, shape in theirs.items() if name not in ours}
    found: dict[str, str] = {}
    changes: Changes = []
    while left and right:
        votes = {
            change: _pairs_under(left, right, change) for change in _prefix_changes(left, right)
        }
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
            partner = _with_prefix(name, *best)
            if partner is not None and partner in right and not {name, partner} & unsure:
                found[name] = partner
                del left[name], right[partner]
        changes += [best] if len(found) > before else []
        for name in unsure:
            left.pop(name, None)
            right.pop(name, None)
    return found, changes


def _pairs_under(left: Shapes, right: Shapes, change: tuple[str, str]) -> dict[str, str]:
    """{first name: second name} of parameters of equal shape under a prefix change."""
    others = {name: _with_prefix(name, *change) for name in left}
    return {n: other for n, other in others.items() if other and right.get(other) == left[n]}


def _prefix_changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Candidate prefix changes: those that map a stem (a name up to its layer number) of one side to one of the other.

    A name without a layer is a stem as a whole, and must share its module too: norm.weight, not just weight.
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


def _with_prefix(name: str, old: str, new: str) -> str | None:
    """The name with its prefix replaced; None where it does not begin with the old one."""
    if old and not name.startswith(old + "."):
        return None
    rest = name[len(old) + 1 :] if old else name
    return f"{new}.{rest}" if new else rest


def rename_prefixes(changes: Changes, names: Mapping[str, str]) -> dict[str, str]:
    """Renames each key by the first prefix change that fits it."""
    found = {}
    for bare, name in names.items():
        others = (_with_prefix(bare, *change) for change in changes)
        found[next((other for other in others if other is not None), bare)] = name
    return found
