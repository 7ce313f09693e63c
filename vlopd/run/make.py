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
from vlopd.config.masks import FileMask, Reference
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
from vlopd.run.inputs import foreign, mask_inputs
from vlopd.run.resolve import (
    base_arm,
    check_here,
    checkpoint_folder,
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
