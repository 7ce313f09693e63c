"""The rows of retraining: full training, and the arms retrained under masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evals.report.paper.numbers import Lacking, Number
from evals.report.paper.pair import Pair
from evals.report.paper.scores import SCORES, Nulls, score_numbers
from vlopd.config.arms import DistillArm, mask_of
from vlopd.config.masks import MaskConfig, RandomMask


def retraining_rows(pair: Pair) -> Iterator[Number]:
    """Full training and the arms retrained under masks: density, held-out curve, test score and recovery."""
    arms = [arm for arm, its in pair.config.arms.items() if isinstance(its, DistillArm)]
    masked = [arm for arm in arms if _mask(pair, arm)]
    if not masked:
        raise Lacking("no arm is retrained under a mask: add one with mask = NAME")
    if not pair.entry and not pair.curves:
        raise Lacking("no scores: `vlopd eval RUN`, then `vlopd compare RUN`")
    unmasked = pair.groups([arm for arm in arms if arm not in masked])
    full = next((its for its in unmasked if pair.config.roles.of[its.arms[0]] == "full"), None)
    if full is not None:
        nulls: Nulls = {"drawn": {}, "signal": full.nulls}
        yield from _score_rows(pair, full.label, full.arms, nulls)
    for label, members in _mask_groups(pair, [arm for arm in masked if pair.is_shown(arm)]):
        is_control = pair.config.roles.of[members[0]] == "control"
        yield from _score_rows(
            pair, label, members, None if is_control else _controls_of(pair, members[0])
        )


def _score_rows(
    pair: Pair, label: str, arms: Sequence[str], nulls: Nulls | None
) -> Iterator[Number]:
    for column in SCORES:
        yield from score_numbers(pair, ("retraining", pair.name, label, column), arms, nulls)


def _mask(pair: Pair, arm: str) -> str:
    """The name of an arm's mask; empty without one."""
    return mask_of(pair.config.arms[arm]) or ""


def _mask_groups(pair: Pair, arms: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(label, arms) of the masked arms that differ only in the training seed or in the draw of the mask."""
    alike: dict[str, list[str]] = {}
    for arm in arms:
        its = pair.config.arms[arm]
        rule = pair.config.masks[_mask(pair, arm)]
        drawn = isinstance(rule, RandomMask)
        which = rule.model_dump_json(exclude={"seed"}) if drawn else _mask(pair, arm)
        alike.setdefault(
            f"{which} {its.model_dump_json(exclude={'seed', 'mask', 'role'})}", []
        ).append(arm)
    found = []
    for members in alike.values():
        name = _mask(pair, members[0])
        words = _mask_words(pair, name, pair.config.masks[name])
        n = f"mean of {len(members)}" if len(members) > 1 else "n = 1"
        names = members[0] if len(members) == 1 else members[0].removesuffix("-0")
        found.append((f"{names} ({words}), {n}", tuple(members)))
    return found


def _mask_words(pair: Pair, name: str, rule: MaskConfig) -> str:
    """The origin of a mask: `mask of sft`, `mask of the rademacher null`, `random like top, per tensor`."""
    if isinstance(rule, RandomMask):
        return f"random like {rule.like}, per {rule.match}"
    of = (rule.reads or "").partition("@")[0]
    if of in pair.labels:
        return f"mask {name} of the null {pair.labels[of]}"
    return f"mask {name} of {rule.reads}" if rule.reads else f"mask {name}"


def _controls_of(pair: Pair, arm: str) -> Nulls:
    """The controls of an arm: those under random masks by kind, and those under masks of signal nulls by label."""
    mine = [its for its in pair.entry.get("controls", ()) if its["arm"] == arm]
    signal, drawn = {}, {}
    for its in mine:
        arms = tuple(its["arms"])
        rule = pair.config.masks[_mask(pair, arms[0])]
        of = (rule.reads or "").partition("@")[0]
        if of in pair.labels:
            signal[pair.labels[of]] = arms
        elif isinstance(rule, RandomMask):
            drawn[its["kind"]] = arms
    return {"drawn": drawn, "signal": signal}
