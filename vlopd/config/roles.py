"""The role of each arm in the comparison, pooled controls and declared contrasts, from the config alone.

An arm's `role` may be given; otherwise the default applies, and an ambiguous one is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    MergeArm,
    Role,
    TeacherArm,
    TransplantArm,
    mask_of,
)
from vlopd.config.masks import MagnitudeMask, MaskConfig, PrincipalMask, RandomMask, Reference
from vlopd.config.recipe import ArmRecipe

RANDOM = "random"
"""In eval.contrasts, the mean of an arm's random controls."""

_WITHOUT_EFFECT = {
    *("train.save_every", "train.sample_every", "train.evidence_every", "train.keep_steps"),
    *("train.micro_batch", "train.micro_tokens", "loss.chunk_tokens", "train.metrics"),
    *("rollout.batch", "train.keep_completions"),
}
"""Settings of a recipe that do not affect the trained weights, up to rounding."""


class Controls(NamedTuple):
    """Controls of one arm that differ from it and from each other only in the draw of the mask; averaged.

    Tuned ones share one choice (DistillArm.sweep_group).
    """

    arm: str
    """The arm they are controls of."""
    kind: str
    """Kind of their masks: `random`, `low-magnitude`, ..."""
    match: str | None
    """Of random masks: the classes in which densities are matched (RandomMask.match)."""
    arms: tuple[str, ...]


class SignalNulls(NamedTuple):
    """Arms trained on one signal null, and the real arms that differ from them in nothing but the signal and seed."""

    null: str
    """The null's label: `rademacher`, or `rademacher, replayed`."""
    of: tuple[str, ...]
    """The real arms: full before its replicates, then in the order of seeds."""
    arms: tuple[str, ...]
    """The null arms, in the order of seeds."""


class UnpooledControl(NamedTuple):
    """A control that is not averaged, since it differs from its arm in more than the mask."""

    arm: str
    of: str
    differences: tuple[str, ...]

    @property
    def line(self) -> str:
        differs = ", ".join(self.differences)
        return f"{self.arm} is not pooled with the controls of {self.of}: {differs}"


class Contrast(NamedTuple):
    a: str
    b: str | tuple[str, ...]
    """An arm, or controls whose mean is used."""


@dataclass(frozen=True)
class Roles:
    """Roles and groups of arms. `seed_groups`: arms that differ only in the training seed, if several."""

    of: Mapping[str, Role]
    controls: tuple[Controls, ...] = ()
    unpooled: tuple[UnpooledControl, ...] = ()
    seed_groups: tuple[tuple[str, ...], ...] = ()
    nulls: tuple[SignalNulls, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Training seeds of the trained arms."""

    def arms(self, role: Role) -> list[str]:
        return [arm for arm, its in self.of.items() if its == role]

    def first(self, role: Role) -> str | None:
        return next(iter(self.arms(role)), None)

    def full_at_seed_of(self, arm: str) -> str | None:
        """The full arm or a replicate of it with an arm's training seed; else full, or None without one."""
        full = self.first("full")
        alike = [its for its in (full, *self.arms("replicate")) if its is not None]
        return next((its for its in alike if self.seeds.get(its) == self.seeds.get(arm)), full)

    def contrasts(self, texts: Sequence[str]) -> list[Contrast]:
        """The declared contrasts. Raises ValueError as `contrast`, and where two are one test, which counts once."""
        found: dict[frozenset[str | tuple[str, ...]], tuple[str, Contrast]] = {}
        for text in texts:
            its = self.contrast(text)
            single = its.b[0] if len(its.b) == 1 and not isinstance(its.b, str) else its.b
            sides = frozenset({its.a, single})
            if sides in found:
                raise ValueError(
                    f"eval.contrasts: {found[sides][0]!r} and {text!r} are one comparison"
                )
            found[sides] = text, its
        return [its for _, its in found.values()]

    def contrast(self, text: str) -> Contrast:
        """Parses a declared contrast: "arm - arm", or "arm - random" for the mean of the arm's random controls.

        An arm's only control of a kind is their mean. Raises ValueError for an unknown name.
        """
        a, dash, b = text.partition(" - ")
        if not dash:
            raise ValueError(f'eval.contrasts: {text!r} is not "arm - arm"')
        if a == b:
            raise ValueError(f"eval.contrasts: {text!r} compares an arm with itself")
        kinds = {group.kind: group.arms for group in self.controls if group.arm == a}
        for name, known in ((a, self.of), (b, {*self.of, *kinds, RANDOM})):
            if name not in known:
                raise ValueError(
                    f"eval.contrasts names {name!r}, which is not among {sorted(known)}"
                )
        if b in self.of:
            return Contrast(a, (b,) if (b,) in kinds.values() else b)
        if b in kinds:
            return Contrast(a, kinds[b])
        several = [kind for kind in kinds if kind.startswith(f"{RANDOM}, ")]
        if several:
            raise ValueError(
                f"eval.contrasts: {text!r} is ambiguous; use one of "
                + ", ".join(repr(f"{a} - {kind}") for kind in several)
            )
        reasons = "".join(f" ({its.line})" for its in self.unpooled if its.of == a)
        raise ValueError(
            f'eval.contrasts: {text!r} needs an arm under a mask of type "random" with `like` = the mask of {a}; '
            f"there is none{reasons}"
        )


def roles_of(
    arms: Mapping[str, ArmConfig], masks: Mapping[str, MaskConfig], recipes: Mapping[str, ArmRecipe]
) -> Roles:
    """Given or default roles of all arms; `recipes` are those of the trained arms.

    A trained arm without a mask is full, a replicate of it, or a variant. Full is the arm with role = "full", else the
    one without sections of its own, else the only one. Raises ValueError where that is ambiguous.
    """
    settings = {name: _settings_of(arm, recipes.get(name)) for name, arm in arms.items()}
    given = {name: arm.role or _default_role(arm, masks, arms) for name, arm in arms.items()}
    full = _full_arm(arms, given, recipes, settings)
    of: dict[str, Role] = {}
    for name, role in given.items():
        if role is None or role == "full":
            is_alike = full is not None and not _arm_differences(arms, settings, full, name)
            of[name] = "full" if name == full else "replicate" if is_alike else "variant"
        else:
            of[name] = role
    _check_replicates(arms, of, settings, full)
    bases = [name for name, role in of.items() if role == "base"]
    if len(bases) > 1:
        raise ValueError(
            f"arms.{bases[0]} and arms.{bases[1]} are both the base; remove one, or give a checkpoint another role"
        )
    controls, unpooled = _group_controls(arms, masks, of, settings)
    groups = _seed_groups(arms, of, settings)
    seeds = {name: arm.seed for name, arm in arms.items() if isinstance(arm, DistillArm)}
    return Roles(of, controls, unpooled, groups, _signal_nulls(arms, of, settings), seeds)


def _default_role(
    arm: ArmConfig, masks: Mapping[str, MaskConfig], arms: Mapping[str, ArmConfig]
) -> Role | None:
    """The role of an arm without one; None where it depends on the others: full, replicate or variant."""
    if isinstance(arm, (BaseArm, TeacherArm)):
        return "base" if isinstance(arm, BaseArm) else "teacher"
    if isinstance(arm, (CheckpointArm, ImportedArm, MergeArm)):
        return "other"
    if isinstance(arm, DistillArm) and arm.null is not None:
        return "null"
    is_part = isinstance(arm, TransplantArm) and arm.part is not None
    if is_part or isinstance(arm, ExtrapolateArm) or (isinstance(arm, DistillArm) and arm.subspace):
        return "projection"
    if isinstance(arm, DistillArm) and arm.lora:
        return "variant"
    if arm.mask is None:
        return None
    if isinstance(masks[arm.mask], RandomMask) or _null_of_mask(masks[arm.mask], arms):
        return "control"
    return "transplant" if isinstance(arm, TransplantArm) else "subnetwork"


def _full_arm(
    arms: Mapping[str, ArmConfig],
    given: Mapping[str, Role | None],
    recipes: Mapping[str, ArmRecipe],
    settings: Mapping[str, dict[str, Any]],
) -> str | None:
    """The full arm, with which others are compared. Raises ValueError where several different arms qualify."""
    if declared := [name for name, role in given.items() if role == "full"]:
        full, *rest = declared
        for other in rest:
            if differs := _arm_differences(arms, settings, full, other):
                raise ValueError(
                    f'arms.{full} and arms.{other} both have role = "full" and differ in {_join_some(differs)}; give '
                    'one of them role = "variant"'
                )
        return full
    candidates = [name for name, role in given.items() if role is None]
    pool = [name for name in candidates if not _has_own_sections(arms[name])] or candidates
    # an arm trained on data alone is full only if no other arm qualifies
    pool = [name for name in pool if set(recipes[name].rollout.source.shares) != {"data"}] or pool
    for other in pool[1:]:
        if differs := _arm_differences(arms, settings, pool[0], other):
            raise ValueError(
                f"arms.{pool[0]} and arms.{other} could each be the full arm of the comparison, and "
                f'differ in {_join_some(differs)}; give one of them role = "full", or all role = "variant"'
            )
    return pool[0] if pool else None


def _has_own_sections(arm: ArmConfig) -> bool:
    return isinstance(arm, DistillArm) and bool(arm.own)


def _check_replicates(
    arms: Mapping[str, ArmConfig],
    of: Mapping[str, Role],
    settings: Mapping[str, dict[str, Any]],
    full: str | None,
) -> None:
    """Raises ValueError for a declared replicate that differs from full in more than the seed."""
    for name in (name for name, arm in arms.items() if arm.role == "replicate"):
        if full is None:
            raise ValueError(f'arms.{name}: role = "replicate" needs an arm with role = "full"')
        if differs := _arm_differences(arms, settings, full, name):
            raise ValueError(
                f'arms.{name}: role = "replicate" allows only another seed than {full}, but this arm differs in '
                f'{_join_some(differs)}; give it role = "variant"'
            )


def _group_controls(
    arms: Mapping[str, ArmConfig],
    masks: Mapping[str, MaskConfig],
    of: Mapping[str, Role],
    settings: Mapping[str, dict[str, Any]],
) -> tuple[tuple[Controls, ...], tuple[UnpooledControl, ...]]:
    """Groups the controls of each masked arm into those that may be averaged, and the rest."""
    controls = [name for name, role in of.items() if role == "control"]
    masked = {name: its for name, arm in arms.items() if (its := mask_of(arm)) is not None}
    groups: list[Controls] = []
    unpooled: list[UnpooledControl] = []
    for name, mask in masked.items():
        if name in controls or of[name] == "null":
            continue
        alike: dict[tuple[str, ...], list[str]] = {}
        of_type = [other for other in masked if type(arms[other]) is type(arms[name])]
        masks_of_type = {masked[other] for other in of_type if other not in controls}
        for other in (other for other in of_type if other in controls):
            rule, origins = masks[masked[other]], _copied_masks(masks, masked[other])
            if isinstance(rule, RandomMask):
                is_its = mask in origins
            elif _null_of_mask(rule, arms):  # the same rule, of a null's update
                is_its = _without_origin(rule) == _without_origin(masks[mask])
            else:
                is_its = len(masks_of_type) <= 1
            if not is_its:
                continue  # a control of another arm, or of none in particular
            if differs := _differences(settings[name], settings[other]):
                unpooled.append(UnpooledControl(other, name, differs))
            else:
                null = _null_of_mask(rule, arms)
                key = ("null", null) if null else _draw_key(masks, masked[other])
                key = (*key, _choice_of(other, arms[other]))
                alike.setdefault(key, []).append(other)
        rules = [masks[masked[members[0]]] for members in alike.values()]
        kinds = [_mask_kind(rule, arms) for rule in rules]
        matches = [rule.match if isinstance(rule, RandomMask) else None for rule in rules]
        for kind, match, members in zip(kinds, matches, alike.values(), strict=True):
            label = kind
            if kinds.count(kind) > 1:
                alone = match is not None and matches.count(match) == 1
                label = f"{kind}, {match}-matched" if alone else f"{kind}, as {members[0]}"
            groups.append(Controls(name, label, match, tuple(members)))
    return tuple(groups), tuple(unpooled)


def _seed_groups(
    arms: Mapping[str, ArmConfig], of: Mapping[str, Role], settings: Mapping[str, dict[str, Any]]
) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more trained arms that differ only in the training seed; full is the first of its group."""
    alike: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if isinstance(arm, DistillArm):
            role = "full" if of[name] == "replicate" else of[name]
            alike.setdefault(repr((role, arm.mask, sorted(settings[name].items()))), []).append(
                name
            )
    return tuple(
        tuple(sorted(names, key=lambda name: of[name] == "replicate"))
        for names in alike.values()
        if len(names) > 1
    )


def _signal_nulls(
    arms: Mapping[str, ArmConfig], of: Mapping[str, Role], settings: Mapping[str, dict[str, Any]]
) -> tuple[SignalNulls, ...]:
    """Groups the null arms that differ only in the seed, each with its real arms, if there are any."""

    def key(name: str) -> str:
        without = {k: value for k, value in settings[name].items() if k != "null"}
        return repr((mask_of(arms[name]), sorted(without.items())))

    trained = {name: arm for name, arm in arms.items() if isinstance(arm, DistillArm)}
    by_seed = sorted(trained, key=lambda name: (of[name] != "full", trained[name].seed))
    groups: dict[tuple[str, str], list[str]] = {}
    for name in (name for name in trained if of[name] == "null"):
        null = trained[name].null
        assert null is not None
        groups.setdefault((key(name), null.label), []).append(name)
    found = []
    for (own, label), members in groups.items():
        real = tuple(name for name in by_seed if trained[name].null is None and key(name) == own)
        if real:
            ordered = tuple(sorted(members, key=lambda name: trained[name].seed))
            found.append(SignalNulls(label, real, ordered))
    return tuple(found)


# ------------------------------------------------------------------------------------------ masks


def _null_of_mask(rule: MaskConfig, arms: Mapping[str, ArmConfig]) -> str | None:
    """The label of the signal null whose update a mask is chosen by; None for another mask."""
    name = None if rule.reads is None else Reference.parse(rule.reads).arm
    arm = None if name is None else arms.get(name)
    return arm.null.label if isinstance(arm, DistillArm) and arm.null is not None else None


def _without_origin(rule: MaskConfig) -> str:
    """A mask's rule without the checkpoint that it reads."""
    return rule.model_dump_json(exclude={"of"})


def _mask_kind(rule: MaskConfig, arms: Mapping[str, ArmConfig]) -> str:
    if null := _null_of_mask(rule, arms):
        return null
    if isinstance(rule, MagnitudeMask):
        return f"{rule.which}-magnitude"
    return rule.which.replace("_", "-") if isinstance(rule, PrincipalMask) else rule.type


def _copied_masks(masks: Mapping[str, MaskConfig], mask: str) -> list[str]:
    """The masks whose densities a random mask copies, following `like`."""
    found = []
    while isinstance(rule := masks[mask], RandomMask):
        mask = rule.like
        found.append(mask)
    return found


def _choice_of(name: str, arm: ArmConfig) -> str:
    """A tuned arm's group, whose arms share one choice; empty for others."""
    return arm.sweep_group or name if isinstance(arm, DistillArm) and arm.sweep else ""


def _draw_key(masks: Mapping[str, MaskConfig], mask: str) -> tuple[str, ...]:
    """A key equal for masks that differ only in the draw: the rule without its seed, and the mask it copies."""
    rule = masks[mask]
    if not isinstance(rule, RandomMask):
        return (rule.model_dump_json(exclude={"seed"}),)
    over = _draw_key(masks, rule.like)
    return over if over[0] == rule.match else (rule.match, *over)


# --------------------------------------------------------------------------------------- settings


def _settings_of(arm: ArmConfig, recipe: ArmRecipe | None) -> dict[str, Any]:
    """The settings that determine an arm except role, seed and mask, as {"optim.learning_rate": 1e-4, ...}.

    Of a tuned arm the grid stands in place of the values of its keys: which is chosen is a result, and no difference.
    """
    shared = set(ArmRecipe.model_fields)
    found = arm.model_dump(
        mode="json", exclude={"role", "seed", "mask", "null", "sweep_group", *shared}
    )
    if isinstance(arm, DistillArm) and arm.null is not None:
        found["null"] = arm.null.label
    if recipe is not None:
        found |= recipe.model_dump(mode="json", include=shared)
    swept = (arm.sweep or {}) if isinstance(arm, DistillArm) else {}
    without = {*_WITHOUT_EFFECT, *swept}
    return {key: value for key, value in _flatten(found).items() if key not in without}


def _flatten(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{above}{key}.")
        elif value is not None:
            found[above + key] = value
    return found


def _arm_differences(
    arms: Mapping[str, ArmConfig], settings: Mapping[str, dict[str, Any]], a: str, b: str
) -> tuple[str, ...]:
    """The differences of two arms other than the training seed."""
    return _differences(
        {**settings[a], "mask": mask_of(arms[a])}, {**settings[b], "mask": mask_of(arms[b])}
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Different settings, as `optim.learning_rate 0.0001 -> 0.0003`; for a section of another type, only the type."""
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    retyped = tuple(key.removesuffix("type") for key in keys if key.endswith(".type"))
    return tuple(
        f"{key} {_format_value(a.get(key))} -> {_format_value(b.get(key))}"
        for key in keys
        if key.endswith(".type") or not key.startswith(retyped or ("\0",))
    )


def _format_value(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join_some(differences: Sequence[str], most: int = 3) -> str:
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return ", ".join(differences[:most]) + more
