"""The inputs of each artifact of a run, as digests; they decide whether it is up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ImportedArm,
    TeacherArm,
    UntrainedArm,
    checkpoints_of,
    replay_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import FileMask, FunctionMask, MaskConfig
from vlopd.config.recipe import EXECUTION, Recipe
from vlopd.config.roles import SignalNulls
from vlopd.digests import digest_checkpoint, file_digest
from vlopd.errors import UserError
from vlopd.models.load import resolve
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import (
    arm_content,
    arm_digest,
    arm_folder,
    checkpoint_digest,
    data_content,
    hub_folder,
    model_content,
    other_base,
    plugin_content,
    read_file_mask,
    teacher_content,
)
from vlopd.run.schemas.read import read_record
from vlopd.update_geometry.trajectory import step_of


def arm_inputs(
    run: RunFolder, config: ExperimentConfig, name: str, whole: bool = False
) -> dict[str, Any]:
    """The inputs that determine an arm; `whole` as in digests.file_digest."""
    config = run.with_choice(config, name)
    arm = config.arms.get(name, BaseArm())
    if isinstance(arm, BaseArm):
        return {
            "student": config.student.model_dump(mode="json", exclude={"attention"}),
            "files": model_content(config.student, whole),
            "stored": config.precision.stored,
        }
    if config.candidates(name):
        return _tuned_inputs(run, config, name)
    files = arm_content(run, config, config.base_arm if _starts_from_base(arm) else name, whole)
    if isinstance(arm, TeacherArm):
        teacher = config.teacher_of(arm)
        return {"teacher": teacher.model, "revision": teacher.revision, "files": files}
    if isinstance(arm, (CheckpointArm, ImportedArm)):
        return {**arm.model_dump(mode="json", exclude={"role"}), "files": files}
    inputs = {"base": arm_digest(run, config.base_arm), "files": files}
    if isinstance(arm, DistillArm):
        recipe = config.recipe_of(arm)
        teachers = recipe.teachers
        inputs |= {
            "student": read_record(run.arm_record(config.base_arm))["inputs"],
            "teachers": {n: teacher_content(run, config, t, whole) for n, t in teachers.items()},
            "data": data_content(recipe.data, tuple(teachers.values()), whole),
            **config.settings_of(arm),
        }
        if arm.null is not None:
            inputs["null"] = arm.null.type
            if (replayed := replay_of(arm)) is not None:
                run.checksums.check(f"arms/{replayed}", whole)
                inputs["replayed"] = arm_digest(run, replayed)
        if arm.lora is not None and arm.lora.like is not None:
            run.checksums.check(f"masks/{arm.lora.like}", whole)
            counts = read_record(run.mask_record(arm.lora.like))["counts"]
            inputs["like"] = {"parameters": sum(counts.values())}
        if plugins := plugin_content(recipe.plugins, whole):
            inputs["plugins"] = plugins
    else:
        inputs["arm"] = arm.model_dump(mode="json", exclude={"role"})
    return inputs | _reference_inputs(run, config, arm, whole)


def _tuned_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The inputs of a tuned arm: its group's curve and choice, and the chosen candidate."""
    about = run.sweep(str(config.sweep_group(name)))
    chosen = read_record(about)["candidates"][name]
    return {
        "base": arm_digest(run, config.base_arm),
        "sweep": file_digest(about),
        "chosen": chosen,
        "checkpoint": arm_digest(run, chosen),
    }


def execution_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of EXECUTION, for an arm's record."""
    sections = recipe.model_dump(mode="json", include=EXECUTION)
    return {f"{name}.{key}": value for name, its in sections.items() for key, value in its.items()}


def _starts_from_base(arm: ArmConfig) -> bool:
    """Whether an arm is a checkpoint made from this run's base."""
    return isinstance(arm, DistillArm | UntrainedArm)


def _reference_inputs(
    run: RunFolder,
    config: ExperimentConfig,
    arm: DistillArm | UntrainedArm,
    whole: bool,
) -> dict[str, Any]:
    """Digests of the mask and checkpoints that an arm reads, with those of another base in `other_base`."""
    inputs: dict[str, Any] = {}
    foreign = other_bases_of_arm(run, config, arm)
    if arm.mask is not None:
        run.checksums.check(f"masks/{arm.mask}", whole)
        about = read_record(run.mask_record(arm.mask))
        inputs["mask"] = about["digest"]
        foreign |= about["inputs"].get("other_base", {})
    for key, text in checkpoints_of(arm).items():
        inputs[key] = checkpoint_digest(run, config, text, whole)
    return inputs | ({"other_base": foreign} if foreign else {})


def other_bases_of_arm(
    run: RunFolder, config: ExperimentConfig, arm: DistillArm | UntrainedArm
) -> dict[str, str]:
    """{checkpoint: digest of its base} of the checkpoints an arm reads that have another base."""
    found: dict[str, str] = {}
    for text in checkpoints_of(arm).values():
        found |= other_base(run, config, text)
    return found


def mask_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The inputs that determine a mask.

    Raises RunError where a file of an arm or mask it reads was changed.
    """
    rule = config.masks[name]
    inputs: dict[str, Any] = {
        "rule": rule.model_dump(mode="json"),
        "base": arm_digest(run, config.base_arm),
    }
    if isinstance(rule, FunctionMask):
        inputs["plugins"] = plugin_content([rule.use("mask")], whole=True)
    other_bases: dict[str, str] = {}
    if rule.reads is not None:
        inputs["of"] = checkpoint_digest(run, config, rule.reads, whole=True)
    if rule.combines:
        for other in rule.combines:
            run.checksums.check(f"masks/{other}")
        records = {other: read_record(run.mask_record(other)) for other in rule.combines}
        inputs["masks"] = {other: about["digest"] for other, about in records.items()}
        for about in records.values():
            other_bases |= about["inputs"].get("other_base", {})
    if isinstance(rule, FileMask):
        _, about = read_file_mask(run, config, rule)
        other_bases = about.pop("other_base", {})
        inputs |= {key: value for key, value in about.items() if key != "base"}
    other_bases |= other_bases_of_mask(run, config, rule)
    return inputs | ({"other_base": other_bases} if other_bases else {})


def other_bases_of_mask(
    run: RunFolder, config: ExperimentConfig, rule: MaskConfig
) -> dict[str, str]:
    """{checkpoint or file: digest of its base} of those a mask reads that have another base."""
    if rule.reads is not None:
        return other_base(run, config, rule.reads)
    if isinstance(rule, FileMask):
        ours = arm_digest(run, config.base_arm)
        its = read_file_mask(run, config, rule)[1].get("base", ours)
        if its != ours and not _is_student(config, its):
            return {rule.path: its}
    return {}


def _is_student(config: ExperimentConfig, digest: str) -> bool:
    """Whether a digest is of the student's own checkpoint, and the base arm stores it as it is."""
    student = config.student
    if config.precision.stored != "auto":
        return False
    try:
        return digest == digest_checkpoint(hub_folder(resolve(student.model), student.revision))
    except UserError:  # the student may be gone from a finished run's machine
        return False


def geometry_inputs(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any]:
    """The inputs that determine the geometry of an arm."""
    base, steps = config.base_arm, saved_steps(run, name)
    inputs: dict[str, Any] = {
        "base": arm_digest(run, base),
        "trained": digest_checkpoint(arm_folder(run, config, name)),
        # determines how fused tensors are split
        "config": file_digest(run.checkpoint(base) / "config.json"),
        "settings": config.geometry.of_update,
    }
    if foreign := read_record(run.arm_record(name)).get("other_base"):
        inputs["other_base"] = foreign
    if steps:
        inputs["steps"] = {str(step): digest_checkpoint(steps[step]) for step in sorted(steps)}
    return inputs


def overlap_inputs(run: RunFolder, config: ExperimentConfig, names: list[str]) -> dict[str, Any]:
    """The inputs that determine the overlap of the arms' updates."""
    return {
        "base": arm_digest(run, config.base_arm),
        "arms": {name: digest_checkpoint(arm_folder(run, config, name)) for name in names},
        "settings": config.geometry.of_update,
    }


def null_groups(config: ExperimentConfig, names: Sequence[str]) -> list[SignalNulls]:
    """The signal nulls among the measured arms `names`, each with the arms that it is compared with there."""
    found = []
    for group in config.roles.nulls:
        of, arms = (tuple(a for a in its if a in names) for its in (group.of, group.arms))
        if of and arms:
            found.append(SignalNulls(group.null, of, arms))
    return found


def groups_inputs(run: RunFolder, config: ExperimentConfig, names: Sequence[str]) -> dict[str, Any]:
    """The inputs that determine the comparison of groups of arms: their tables of geometry, and that of overlap."""
    groups, its = null_groups(config, names), config.geometry
    arms = sorted({arm for group in groups for arm in (*group.of, *group.arms)})
    tables = {f"geometry/{arm}": f"geometry/{arm}/geometry.parquet" for arm in arms}
    tables["geometry/overlap"] = "geometry/overlap.parquet"
    return {
        "groups": [{"null": g.null, "of": list(g.of), "arms": list(g.arms)} for g in groups],
        "tables": {table: run.checksums.read(name)[table] for name, table in tables.items()},
        "settings": {
            "equal_ratio": its.equal_ratio,
            "equal_difference": its.equal_difference,
            "confidence": config.eval.confidence,
        },
    }


def saved_steps(run: RunFolder, name: str) -> dict[int, Path]:
    """The arm's checkpoints of train.keep_steps, by step."""
    kept = sorted(run.arm(name).glob("checkpoints/step-*"))
    return {step_of(folder, i): folder for i, folder in enumerate(kept)}
