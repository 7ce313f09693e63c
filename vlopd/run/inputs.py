"""What each artifact of a run is made from, as digests: what decides whether it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    TeacherArm,
    TransplantArm,
    checkpoints_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import FileMask, MaskConfig
from vlopd.digests import digest_checkpoint, file_digest
from vlopd.files import read_json
from vlopd.geometry.trajectory import step_of
from vlopd.masks.files import load_mask
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import (
    arm_content,
    arm_digest,
    arm_folder,
    base_arm,
    checkpoint_digest,
    data_content,
    model_content,
    other_base,
    teacher_content,
)


def made_from(
    run: RunFolder, config: ExperimentConfig, name: str, whole: bool = False
) -> dict[str, Any]:
    """The digests of all that decides an arm; `whole` as in digests.file_digest."""
    arm = config.arms.get(name, BaseArm())
    if isinstance(arm, BaseArm):
        return {
            "student": config.student.model_dump(mode="json", exclude={"attention"}),
            "files": model_content(config.student, whole),
            "stored": config.precision.stored,
        }
    files = arm_content(run, config, base_arm(config) if is_made(arm) else name, whole)
    if isinstance(arm, TeacherArm):
        teacher = config.teacher_of(arm)
        return {"teacher": teacher.model, "revision": teacher.revision, "files": files}
    if isinstance(arm, (CheckpointArm, ImportedArm)):
        return {**arm.model_dump(mode="json", exclude={"role"}), "files": files}
    inputs = {"base": arm_digest(run, base_arm(config)), "files": files}
    if isinstance(arm, DistillArm):
        recipe = config.recipe_of(arm)
        teachers = recipe.teachers
        settings = config.model_dump(mode="json", include={"student", "precision"})
        inputs |= {
            "student": read_json(run.arm_record(base_arm(config)))["inputs"],
            "teachers": {n: teacher_content(run, config, t, whole) for n, t in teachers.items()},
            "data": data_content(recipe.data, tuple(teachers.values()), whole),
            "arm": arm.model_dump(mode="json", include={"type", "seed", "mask", "subspace"}),
            "recipe": settings | recipe.model_dump(mode="json"),
        }
    else:
        inputs["arm"] = arm.model_dump(mode="json", exclude={"role"})
    return inputs | read_inputs(run, config, arm, whole)


def is_made(arm: ArmConfig) -> bool:
    """Whether an arm is a checkpoint of this run, made from its base."""
    return isinstance(arm, (DistillArm, TransplantArm, ExtrapolateArm))


def read_inputs(
    run: RunFolder,
    config: ExperimentConfig,
    arm: DistillArm | TransplantArm | ExtrapolateArm,
    whole: bool,
) -> dict[str, Any]:
    """Digests of the mask and checkpoints that an arm reads, and which of them are of another base."""
    inputs: dict[str, Any] = {}
    foreign = own_other_base(run, config, arm)
    if arm.mask is not None:
        run.checksums.check(f"masks/{arm.mask}", whole)
        about = read_json(run.mask_record(arm.mask))
        inputs["mask"] = about["digest"]
        foreign |= about["inputs"].get("other_base", {})
    for key, text in checkpoints_of(arm).items():
        inputs[key] = checkpoint_digest(run, config, text, whole)
    return inputs | ({"other_base": foreign} if foreign else {})


def own_other_base(
    run: RunFolder, config: ExperimentConfig, arm: DistillArm | TransplantArm | ExtrapolateArm
) -> dict[str, str]:
    """`other_base` of all checkpoints that an arm reads itself."""
    found: dict[str, str] = {}
    for text in checkpoints_of(arm).values():
        found |= other_base(run, config, text)
    return found


def mask_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The digests of all that decides a mask.

    Raises RunError where an arm or mask that it is made from is not as it was written.
    """
    rule = config.masks[name]
    inputs: dict[str, Any] = {
        "rule": rule.model_dump(mode="json"),
        "base": arm_digest(run, base_arm(config)),
    }
    other_bases: dict[str, str] = {}
    if rule.reads is not None:
        inputs["of"] = checkpoint_digest(run, config, rule.reads, whole=True)
    if rule.combines:
        for other in rule.combines:
            run.checksums.check(f"masks/{other}")
        records = {other: read_json(run.mask_record(other)) for other in rule.combines}
        inputs["masks"] = {other: about["digest"] for other, about in records.items()}
        for about in records.values():
            other_bases |= about["inputs"].get("other_base", {})
    if isinstance(rule, FileMask):
        _, about = load_mask(Path(rule.path))
        inputs["file"] = about["digest"]
        other_bases = about["inputs"].get("other_base", {})
    other_bases |= foreign(run, config, rule)
    return inputs | ({"other_base": other_bases} if other_bases else {})


def foreign(run: RunFolder, config: ExperimentConfig, rule: MaskConfig) -> dict[str, str]:
    """{what: digest of its base} of what a mask itself reads from another base."""
    if rule.reads is not None:
        return other_base(run, config, rule.reads)
    if isinstance(rule, FileMask):
        _, about = load_mask(Path(rule.path))
        if about["inputs"]["base"] != arm_digest(run, base_arm(config)):
            return {rule.path: about["inputs"]["base"]}
    return {}


def geometry_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The digests of all that decides the geometry of an arm."""
    base, steps = base_arm(config), kept_steps(run, name)
    inputs: dict[str, Any] = {
        "base": arm_digest(run, base),
        "trained": digest_checkpoint(arm_folder(run, config, name)),
        # says how fused tensors are split
        "config": file_digest(run.checkpoint(base) / "config.json"),
        "settings": config.geometry.model_dump(mode="json", exclude={"arms"}),
    }
    if foreign := read_json(run.arm_record(name)).get("other_base"):
        inputs["other_base"] = foreign
    if steps:
        inputs["steps"] = {str(step): digest_checkpoint(steps[step]) for step in sorted(steps)}
    return inputs


def overlap_inputs(run: RunFolder, config: ExperimentConfig, names: list[str]) -> dict[str, Any]:
    """The digests of all that decides the overlap of arms' updates."""
    return {
        "base": arm_digest(run, base_arm(config)),
        "arms": {name: digest_checkpoint(arm_folder(run, config, name)) for name in names},
        "settings": config.geometry.model_dump(mode="json", exclude={"arms"}),
    }


def kept_steps(run: RunFolder, name: str) -> dict[int, Path]:
    """The early checkpoints that an arm kept, by step."""
    kept = sorted(run.arm(name).glob("checkpoints/step-*"))
    return {step_of(folder, i): folder for i, folder in enumerate(kept)}
