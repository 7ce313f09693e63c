"""What each arm of an experiment is for, from its config alone: which are compared with which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlopd.config.arms import (
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    TeacherArm,
    TransplantArm,
    mask_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import RandomMask

Role = Literal[
    "base",
    "teacher",
    "full",
    "replicate",
    "variant",
    "subnetwork",
    "random",
    "transplant",
    "projection",
    "other",
]


@dataclass(frozen=True)
class Roles:
    """What each arm is for.

    controls[arm]  the arms made alike under random masks of its mask
    seeds[arm]     of arms that were trained
    families       arms that differ in nothing but the training seed, where there are several, by the first's name
    """

    of: Mapping[str, Role]
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def arms(self, role: Role) -> list[str]:
        return [arm for arm, its in self.of.items() if its == role]

    def first(self, role: Role) -> str | None:
        return next(iter(self.arms(role)), None)


def roles_of(config: ExperimentConfig) -> Roles:
    """The first unmasked distill arm is full OPD, further ones are its replicates or, with sections of their
    own (another loss, say), its variants.

    Arms that an early checkpoint's subspace or direction made, masked or not, are projections.
    """
    of: dict[str, Role] = {}
    for name, arm in config.arms.items():
        if isinstance(arm, (BaseArm, TeacherArm)):
            of[name] = "base" if isinstance(arm, BaseArm) else "teacher"
        elif isinstance(arm, (CheckpointArm, ImportedArm)):
            of[name] = "other"
        elif isinstance(arm, ExtrapolateArm) or (isinstance(arm, DistillArm) and arm.subspace):
            of[name] = "projection"
        elif isinstance(arm, DistillArm) and arm.mask is None and arm.own:
            of[name] = "variant"
        elif arm.mask is None:
            of[name] = "replicate" if "full" in of.values() else "full"
        elif isinstance(config.masks[arm.mask], RandomMask):
            of[name] = "random"
        else:
            of[name] = "transplant" if isinstance(arm, TransplantArm) else "subnetwork"
    controls = {
        name: tuple(
            other
            for other, its in of.items()
            if its == "random"
            and type(config.arms[other]) is type(config.arms[name])
            and origin(config, mask_of(config.arms[other])) == mask_of(config.arms[name])
        )
        for name, role in of.items()
        if role in ("subnetwork", "transplant")
    }
    trained = {name: arm for name, arm in config.arms.items() if isinstance(arm, DistillArm)}
    alike: dict[str, list[str]] = {}
    for name, arm in trained.items():
        alike.setdefault(arm.model_dump_json(exclude={"seed"}), []).append(name)
    return Roles(
        of,
        {name: arms for name, arms in controls.items() if arms},
        {name: arm.seed for name, arm in trained.items()},
        {names[0]: tuple(names) for names in alike.values() if len(names) > 1},
    )


def origin(config: ExperimentConfig, mask: str | None) -> str | None:
    """The mask whose densities a random mask copies, through any number of `like`."""
    while mask is not None and isinstance(its := config.masks[mask], RandomMask):
        mask = its.like
    return mask
