"""What each arm is for, from the config alone: roles, the controls that are averaged, the contrasts that are declared.

Every arm may say its `role`; the defaults here hold where they are unambiguous, and are refused where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    Role,
    TeacherArm,
    TransplantArm,
    mask_of,
)
from vlopd.config.masks import MagnitudeMask, MaskConfig, PrincipalMask, RandomMask
from vlopd.config.recipe import Recipe

RANDOM = "random"
"""In eval.contrasts, the mean of an arm's random controls."""

WITHOUT_EFFECT = {
    *("train.save_every", "train.sample_every", "train.evidence_every", "train.keep_steps"),
    *("train.micro_batch", "loss.chunk_tokens"),
}
"""Settings of a recipe that do not decide what is trained, up to rounding."""


class Controls(NamedTuple):
    """Arms that differ from the arm that they control, and from each other, in the mask's draw alone."""

    arm: str
    """The arm under the mask that they are controls of."""
    kind: str
    """Of their masks: `random`, `low-magnitude`, ..."""
    match: str | None
    """Of random masks, the classes in which they have as many coordinates."""
    arms: tuple[str, ...]


class Unpooled(NamedTuple):
    """A control that is not averaged with others: it differs from the arm that it controls in more than the mask."""

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
    """An arm, or the controls whose mean is taken."""


@dataclass(frozen=True)
class Roles:
    """What each arm is for. `families` are arms that differ in the training seed alone, where there are several."""

    of: Mapping[str, Role]
    controls: tuple[Controls, ...] = ()
    unpooled: tuple[Unpooled, ...] = ()
    families: tuple[tuple[str, ...], ...] = ()

    def arms(self, role: Role) -> list[str]:
        return [arm for arm, its in self.of.items() if its == role]

    def first(self, role: Role) -> str | None:
        return next(iter(self.arms(role)), None)

    def contrasts(self, texts: Sequence[str]) -> list[Contrast]:
        """The declared contrasts. Raises ValueError as `contrast`, and where two are one test, which counts once."""
        found: dict[Contrast, str] = {}
        for text in texts:
            a, b = its = self.contrast(text)
            other = found.get(its) or (found.get(Contrast(b, a)) if isinstance(b, str) else None)
            if other is not None:
                raise ValueError(f"eval.contrasts: {other!r} and {text!r} are one comparison")
            found[its] = text
        return list(found)

    def contrast(self, text: str) -> Contrast:
        """A declared contrast: "arm - arm", or "arm - random" for the mean of the arm's random controls.

        Raises ValueError where it names what there is not.
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
            return Contrast(a, b)
        if b in kinds:
            return Contrast(a, kinds[b])
        several = [kind for kind in kinds if kind.startswith(f"{RANDOM}, ")]
        if several:
            raise ValueError(
                f"eval.contrasts: {text!r} is not one comparison; say which of "
                + ", ".join(repr(f"{a} - {kind}") for kind in several)
            )
        reasons = "".join(f" ({its.line})" for its in self.unpooled if its.of == a)
        raise ValueError(
            f'eval.contrasts: {text!r} needs an arm whose mask is of type "random", like that of {a}; '
            f"there is none{reasons}"
        )


def roles_of(
    arms: Mapping[str, ArmConfig], masks: Mapping[str, MaskConfig], recipes: Mapping[str, Recipe]
) -> Roles:
    """The roles that arms say, and the others' defaults; `recipes` are those of the arms that are trained.

    An unmasked arm that is trained is full, a replicate of it, or a variant: full is the one that says so, else the
    one that has no sections of its own, else the only one. Raises ValueError where that is not one.
    """
    settings = {name: settings_of(arm, recipes.get(name)) for name, arm in arms.items()}
    said = {name: arm.role or default_role(arm, masks) for name, arm in arms.items()}
    full = full_arm(arms, said, recipes, settings)
    of: dict[str, Role] = {}
    for name, role in said.items():
        if role is None or role == "full":
            is_alike = full is not None and not apart(arms, settings, full, name)
            of[name] = "full" if name == full else "replicate" if is_alike else "variant"
        else:
            of[name] = role
    check_replicates(arms, of, settings, full)
    bases = [name for name, role in of.items() if role == "base"]
    if len(bases) > 1:
        raise ValueError(
            f"arms.{bases[0]} and arms.{bases[1]} are both the base; remove one, or give a checkpoint another role"
        )
    controls, unpooled = pooled(arms, masks, of, settings)
    return Roles(of, controls, unpooled, families_of(arms, of, settings))


def default_role(arm: ArmConfig, masks: Mapping[str, MaskConfig]) -> Role | None:
    """Of an arm that says none; null where it depends on the others: full, a replicate or a variant."""
    if isinstance(arm, (BaseArm, TeacherArm)):
        return "base" if isinstance(arm, BaseArm) else "teacher"
    if isinstance(arm, (CheckpointArm, ImportedArm)):
        return "other"
    if isinstance(arm, ExtrapolateArm) or (isinstance(arm, DistillArm) and arm.subspace):
        return "projection"
    if arm.mask is None:
        return None
    if isinstance(masks[arm.mask], RandomMask):
        return "control"
    return "transplant" if isinstance(arm, TransplantArm) else "subnetwork"


def full_arm(
    arms: Mapping[str, ArmConfig],
    said: Mapping[str, Role | None],
    recipes: Mapping[str, Recipe],
    settings: Mapping[str, dict[str, Any]],
) -> str | None:
    """The arm that others are compared with. Raises ValueError where several that differ could be it."""
    if declared := [name for name, role in said.items() if role == "full"]:
        full, *rest = declared
        for other in rest:
            if differs := apart(arms, settings, full, other):
                raise ValueError(
                    f'arms.{full} and arms.{other} both have role = "full" and differ in {shortened(differs)}; give '
                    'one of them role = "variant"'
                )
        return full
    candidates = [name for name, role in said.items() if role is None]
    pool = [name for name in candidates if not own_sections(arms[name])] or candidates
    # what was trained on data alone is full only where nothing else could be
    pool = [name for name in pool if set(recipes[name].rollout.source.shares) != {"data"}] or pool
    for other in pool[1:]:
        if differs := apart(arms, settings, pool[0], other):
            raise ValueError(
                f"arms.{pool[0]} and arms.{other} could each be the full arm that others are compared with, and "
                f'differ in {shortened(differs)}; give the one that is role = "full", or all role = "variant"'
            )
    return pool[0] if pool else None


def own_sections(arm: ArmConfig) -> bool:
    return isinstance(arm, DistillArm) and bool(arm.own)


def check_replicates(
    arms: Mapping[str, ArmConfig],
    of: Mapping[str, Role],
    settings: Mapping[str, dict[str, Any]],
    full: str | None,
) -> None:
    """Raises ValueError for an arm that is declared a replicate and is none."""
    for name in (name for name, arm in arms.items() if arm.role == "replicate"):
        if full is None:
            raise ValueError(f'arms.{name}: role = "replicate" needs an arm with role = "full"')
        if differs := apart(arms, settings, full, name):
            raise ValueError(
                f'arms.{name}: role = "replicate" is of an arm that differs from {full} in the seed alone, and this '
                f'one differs in {shortened(differs)}; give it role = "variant"'
            )


def pooled(
    arms: Mapping[str, ArmConfig],
    masks: Mapping[str, MaskConfig],
    of: Mapping[str, Role],
    settings: Mapping[str, dict[str, Any]],
) -> tuple[tuple[Controls, ...], tuple[Unpooled, ...]]:
    """The controls of every arm under a mask, in groups that may be averaged, and those that belong in none."""
    controls = [name for name, role in of.items() if role == "control"]
    masked = {name: its for name, arm in arms.items() if (its := mask_of(arm)) is not None}
    groups: list[Controls] = []
    unpooled: list[Unpooled] = []
    for name, mask in masked.items():
        if name in controls:
            continue
        alike: dict[tuple[str, ...], list[str]] = {}
        of_type = [other for other in masked if type(arms[other]) is type(arms[name])]
        masks_of_type = {masked[other] for other in of_type if other not in controls}
        for other in (other for other in of_type if other in controls):
            rule, origins = masks[masked[other]], origins_of(masks, masked[other])
            if mask not in origins if isinstance(rule, RandomMask) else len(masks_of_type) > 1:
                continue  # it is the control of another arm, or nothing says of which
            if differs := differences(settings[name], settings[other]):
                unpooled.append(Unpooled(other, name, differs))
            else:
                alike.setdefault(rule_of(masks, masked[other]), []).append(other)
        kinds = [kind_of(masks[masked[members[0]]]) for members in alike.values()]
        for kind, members in zip(kinds, alike.values(), strict=True):
            first = masks[masked[members[0]]]
            label = kind if kinds.count(kind) == 1 else f"{kind}, as {members[0]}"
            match = first.match if isinstance(first, RandomMask) else None
            groups.append(Controls(name, label, match, tuple(members)))
    return tuple(groups), tuple(unpooled)


def families_of(
    arms: Mapping[str, ArmConfig], of: Mapping[str, Role], settings: Mapping[str, dict[str, Any]]
) -> tuple[tuple[str, ...], ...]:
    """Trained arms that differ in the training seed alone, where there are several; full is the first of its own."""
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


# ------------------------------------------------------------------------------------------ masks


def kind_of(rule: MaskConfig) -> str:
    if isinstance(rule, MagnitudeMask):
        return f"{rule.which}-magnitude"
    return rule.which.replace("_", "-") if isinstance(rule, PrincipalMask) else rule.type


def origins_of(masks: Mapping[str, MaskConfig], mask: str) -> list[str]:
    """The masks whose densities a random mask copies, through any number of `like`."""
    found = []
    while isinstance(rule := masks[mask], RandomMask):
        mask = rule.like
        found.append(mask)
    return found


def rule_of(masks: Mapping[str, MaskConfig], mask: str) -> tuple[str, ...]:
    """What two masks that are drawn alike have in common: the rule but its seed, and what it copies in the end."""
    rule = masks[mask]
    if not isinstance(rule, RandomMask):
        return (rule.model_dump_json(exclude={"seed"}),)
    over = rule_of(masks, rule.like)
    return over if over[0] == rule.match else (rule.match, *over)


# --------------------------------------------------------------------------------------- settings


def settings_of(arm: ArmConfig, recipe: Recipe | None) -> dict[str, Any]:
    """All that decides an arm but its role, seed and mask, as {"optim.learning_rate": 1e-4, ...}."""
    shared = set(Recipe.model_fields)
    found = arm.model_dump(mode="json", exclude={"role", "seed", "mask", *shared})
    if recipe is not None:
        found |= recipe.model_dump(mode="json", include=shared)
    return {key: value for key, value in flat(found).items() if key not in WITHOUT_EFFECT}


def flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        elif value is not None:
            found[above + key] = value
    return found


def apart(
    arms: Mapping[str, ArmConfig], settings: Mapping[str, dict[str, Any]], a: str, b: str
) -> tuple[str, ...]:
    """In what two arms differ besides the training seed."""
    return differences(
        {**settings[a], "mask": mask_of(arms[a])}, {**settings[b], "mask": mask_of(arms[b])}
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """`optim.learning_rate 0.0001 -> 0.0003` of every setting that is another; of a section of another type, that."""
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    retyped = tuple(key.removesuffix("type") for key in keys if key.endswith(".type"))
    return tuple(
        f"{key} {shown(a.get(key))} -> {shown(b.get(key))}"
        for key in keys
        if key.endswith(".type") or not key.startswith(retyped or ("\0",))
    )


def shown(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shortened(differences: Sequence[str], most: int = 3) -> str:
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return ", ".join(differences[:most]) + more
