"""An arm or a mask, and first what it is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlopd import distributed
from vlopd.config.arms import (
    BaseArm,
    CheckpointArm,
    DistillArm,
    ImportedArm,
    TeacherArm,
    TransplantArm,
    checkpoints_of,
    mask_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import FileMask, MaskConfig, Reference
from vlopd.files import read_json
from vlopd.masks.files import load_mask, save_mask
from vlopd.masks.rules import Mask, build_mask
from vlopd.models import names
from vlopd.run.arms import (
    PLAIN,
    Making,
    extrapolate,
    note_foreign,
    note_teacher,
    train_arm,
    transplant,
    write_base,
)
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import (
    arm_digest,
    base_arm,
    check_here,
    checkpoint_digest,
    checkpoint_folder,
    other_base,
    read_mask,
    refuse_other_base,
)
from vlopd.weights import delta


def make_arm(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Makes one arm and what it needs; returns whether there was anything to do."""
    base = base_arm(config)
    if name != base:
        make_base(run, config, base)
    arm = config.arms.get(name, BaseArm())
    if isinstance(arm, BaseArm):
        return make_base(run, config, name)
    if isinstance(arm, (TeacherArm, CheckpointArm, ImportedArm)):
        with distributed.main_process_first(), run.making(run.arm(name)):
            if isinstance(arm, TeacherArm):
                return note_teacher(run, config, name, arm)
            return note_foreign(run, config, name, arm)
    mask = mask_of(arm)
    if mask is not None:
        make_mask(run, config, mask, how)
    for checkpoint in checkpoints_of(arm).values():
        make_checkpoint(run, config, checkpoint, how)
    if isinstance(arm, DistillArm):
        with run.making(run.arm(name)):
            distributed.accelerator().wait_for_everyone()
            return train_arm(run, config, name, arm, how)
    with distributed.main_process_first(), run.making(run.arm(name)):
        if isinstance(arm, TransplantArm):
            return transplant(run, config, name, arm, how)
        return extrapolate(run, config, name, arm, how)


def make_checkpoint(run: RunFolder, config: ExperimentConfig, text: str, how: Making) -> None:
    """Makes the arm whose checkpoint is named, where it is one of this run."""
    arm = Reference.parse(text).arm
    if arm is not None:
        make_arm(run, config, arm, how)


def make_base(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The untrained student as an arm; returns whether it had to be written."""
    with distributed.main_process_first(), run.making(run.arm(name)):
        return write_base(run, config, name)


def make_mask(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Builds a mask file from its rule, and first what the rule needs."""
    rule = config.masks[name]
    base = base_arm(config)
    make_base(run, config, base)
    for other in rule.combines:
        make_mask(run, config, other, how)
    if rule.reads is not None:
        make_checkpoint(run, config, rule.reads, how)
    with distributed.main_process_first(), run.making(run.mask(name)):
        inputs = mask_inputs(run, config, name)
        if run.checksums.is_done(f"masks/{name}", run.mask_record(name), inputs):
            return False
        run.checksums.check(f"arms/{base}")
        named: dict[str, Mask] = {}
        if isinstance(rule, FileMask):
            named[rule.path], _ = load_mask(Path(rule.path))
            check_here(named[rule.path], run, base, rule.path)
        # what a combined mask inherits was allowed when that was made
        refuse_other_base(foreign(run, config, rule), inputs["base"], how.allow_other_base)
        named |= {other: read_mask(run, config, other) for other in rule.combines}
        folder = run.checkpoint(base)
        trained = folder if rule.reads is None else checkpoint_folder(run, config, rule.reads)
        mask = build_mask(rule, delta.stream_whole(folder, trained, names.classify), named)
        check_here(mask, run, base, f"masks.{name}")

        def finish(record: Path, content: Any) -> None:
            run.checksums.finish(f"masks/{name}", record, content, [run.mask(name)])

        run.checksums.start(f"masks/{name}", run.mask_record(name))
        save_mask(run.mask(name), mask, inputs, names.classify, finish)
        return True


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
