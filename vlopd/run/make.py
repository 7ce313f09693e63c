"""An arm or a mask, and first what it is made from."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from vlopd import distributed
from vlopd.config.arms import (
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
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
from vlopd.run.inputs import foreign, made_from, mask_inputs
from vlopd.run.resolve import (
    base_arm,
    check_here,
    checkpoint_folder,
    read_mask,
    refuse_other_base,
)
from vlopd.run.stage import Stage, stage
from vlopd.weights import delta


def make_arm(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Makes one arm and what it needs; returns whether the arm itself had to be made."""
    base, arm = base_arm(config), config.arms.get(name, BaseArm())
    if name != base:
        make_arm(run, config, base, how)
    if (mask := mask_of(arm)) is not None:
        make_mask(run, config, mask, how)
    for checkpoint in checkpoints_of(arm).values():
        make_checkpoint(run, config, checkpoint, how)
    inputs = partial(made_from, run, config, name)
    if isinstance(arm, DistillArm):
        with stage(run, f"arms/{name}") as its:
            distributed.accelerator().wait_for_everyone()
            if its.is_due(inputs):
                train_arm(its, config, name, arm, how)
        return its.made
    with distributed.main_process_first(), stage(run, f"arms/{name}") as its:
        if its.is_due(inputs):
            shutil.rmtree(run.arm(name), ignore_errors=True)  # what an arm of this name was before
            match arm:
                case BaseArm():
                    write_base(its, config, name)
                case TeacherArm():
                    note_teacher(its, config, name, arm)
                case CheckpointArm() | ImportedArm():
                    note_foreign(its, config, name, arm)
                case TransplantArm():
                    transplant(its, config, name, arm, how)
                case ExtrapolateArm():
                    extrapolate(its, config, name, arm, how)
    return its.made


def make_checkpoint(run: RunFolder, config: ExperimentConfig, text: str, how: Making) -> None:
    """Makes the arm whose checkpoint is named, where it is one of this run."""
    arm = Reference.parse(text).arm
    if arm is not None:
        make_arm(run, config, arm, how)


def make_mask(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Builds a mask file from its rule, and first what the rule needs; returns whether there was anything to do."""
    rule, base = config.masks[name], base_arm(config)
    make_arm(run, config, base, how)
    for other in rule.combines:
        make_mask(run, config, other, how)
    if rule.reads is not None:
        make_checkpoint(run, config, rule.reads, how)
    with distributed.main_process_first(), stage(run, f"masks/{name}") as its:
        if its.is_due(lambda _: mask_inputs(run, config, name)):
            write_mask(its, config, name, how)
    return its.made


def write_mask(its: Stage, config: ExperimentConfig, name: str, how: Making) -> None:
    run, rule, base = its.run, config.masks[name], base_arm(config)
    run.checksums.check(f"arms/{base}")
    named: dict[str, Mask] = {}
    if isinstance(rule, FileMask):
        named[rule.path], _ = load_mask(Path(rule.path))
        check_here(named[rule.path], run, base, rule.path)
    # what a combined mask inherits was allowed when that was made
    refuse_other_base(foreign(run, config, rule), its.inputs["base"], how.allow_other_base)
    named |= {other: read_mask(run, config, other) for other in rule.combines}
    folder = run.checkpoint(base)
    trained = folder if rule.reads is None else checkpoint_folder(run, config, rule.reads)
    mask = build_mask(rule, delta.stream_whole(folder, trained, names.classify), named)
    path = run.mask(name)
    save_mask(path, mask, its.inputs, names.classify, lambda _, about: its.finish(about, [path]))
