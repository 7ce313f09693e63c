"""Makes an arm or a mask after its dependencies."""

from __future__ import annotations

import shutil
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from vlopd import distributed
from vlopd.bits import pack, unpack
from vlopd.config.arms import (
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    MergeArm,
    TeacherArm,
    TransplantArm,
    checkpoints_of,
    masks_read,
    replay_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import FileMask, MaskConfig, Reference
from vlopd.errors import RunError
from vlopd.files import is_first_process
from vlopd.masks.files import save_mask
from vlopd.masks.rules import Mask, build_mask, is_by_tensor
from vlopd.models import parameter_names
from vlopd.run.arms import (
    DEFAULT_OPTIONS,
    ArmOptions,
    record_external,
    record_teacher,
    train_arm,
    write_base,
    write_extrapolation,
    write_merge,
    write_transplant,
    write_tuned,
)
from vlopd.run.dependencies import arm_inputs, mask_inputs, other_bases_of_mask
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import (
    checkpoint_folder,
    mask_of_file,
    read_mask,
    refuse_other_base,
)
from vlopd.run.stage import Stage, stage
from vlopd.weights import delta


def make_arm(
    run: RunFolder, config: ExperimentConfig, name: str, options: ArmOptions = DEFAULT_OPTIONS
) -> bool:
    """Makes one arm and its dependencies; returns whether the arm itself was made."""
    base, arm = config.base_arm, config.arms.get(name, BaseArm())
    if name != base:
        make_arm(run, config, base, options)
    for mask in masks_read(arm):
        make_mask(run, config, mask, options)
    for checkpoint in checkpoints_of(arm).values():
        _make_checkpoint(run, config, checkpoint, options)
    if (replayed := replay_of(arm)) is not None:
        make_arm(run, config, replayed, options)
    if (group := config.follows(name)) is not None:
        make_arm(run, config, config.sweep_members(group)[0], options)
        config = run.with_choice(config, name)
        arm = config.arms[name]
    inputs = partial(arm_inputs, run, config, name)
    if config.candidates(name):
        return _make_tuned(run, config.with_candidates(), name, options)
    if isinstance(arm, DistillArm):
        state = distributed.accelerator()
        with stage(run, f"arms/{name}") as its:
            with distributed.in_step(state):
                is_due = its.is_due_in_all(state, inputs)
            if is_due:
                train_arm(its, config, name, arm, options)
            elif is_first_process():  # left by a kill after the record
                shutil.rmtree(run.arm(name) / "state", ignore_errors=True)
        return its.made
    with distributed.main_process_first(), stage(run, f"arms/{name}") as its:
        if its.is_due(inputs):
            shutil.rmtree(run.arm(name), ignore_errors=True)  # an earlier arm of this name
            match arm:
                case BaseArm():
                    write_base(its, config, name)
                case TeacherArm():
                    record_teacher(its, config, name, arm)
                case CheckpointArm() | ImportedArm():
                    record_external(its, config, name, arm)
                case TransplantArm():
                    write_transplant(its, config, name, arm, options)
                case ExtrapolateArm():
                    write_extrapolation(its, config, name, arm, options)
                case MergeArm():
                    write_merge(its, config, name, arm, options)
    return its.made


def _make_tuned(run: RunFolder, config: ExperimentConfig, name: str, options: ArmOptions) -> bool:
    """Makes a tuned arm after the candidates of its group and the choice among them."""
    group = str(config.sweep_group(name))
    for member in config.sweep_members(group):
        for candidate in config.candidates(member):
            make_arm(run, config, candidate, options)
    choose = options.choose
    if choose is None:
        raise RunError(f"arms.{name} is tuned, and not made yet; make it with `vlopd run`")
    choose(run, config, group)
    with distributed.main_process_first(), stage(run, f"arms/{name}") as its:
        if its.is_due(lambda _: arm_inputs(run, config, name)):
            shutil.rmtree(run.arm(name), ignore_errors=True)
            write_tuned(its, config, name)
    return its.made


def _make_checkpoint(
    run: RunFolder, config: ExperimentConfig, text: str, options: ArmOptions
) -> None:
    """Makes the arm that a checkpoint reference names, if it is of this run."""
    arm = Reference.parse(text).arm
    if arm is not None:
        make_arm(run, config, arm, options)


def make_mask(
    run: RunFolder, config: ExperimentConfig, name: str, options: ArmOptions = DEFAULT_OPTIONS
) -> bool:
    """Builds a mask after its dependencies; returns whether the mask itself was made."""
    rule, base = config.masks[name], config.base_arm
    make_arm(run, config, base, options)
    for other in rule.combines:
        make_mask(run, config, other, options)
    if rule.reads is not None:
        _make_checkpoint(run, config, rule.reads, options)
    state = distributed.accelerator()
    with distributed.in_step(state), stage(run, f"masks/{name}") as its:
        if its.is_due_in_all(state, lambda _: mask_inputs(run, config, name)):
            _write_mask(its, config, name, options, state)
    return its.made


def _write_mask(
    its: Stage, config: ExperimentConfig, name: str, options: ArmOptions, state: Accelerator
) -> None:
    run, rule, base = its.run, config.masks[name], config.base_arm
    shared = state.num_processes > 1 and is_by_tensor(rule)
    if state.is_main_process:
        run.checksums.check(f"arms/{base}")
    elif not shared:
        return
    named: dict[str, Mask] = {}
    if isinstance(rule, FileMask):
        named[rule.path] = mask_of_file(run, config, rule)
    # bases inherited from combined masks were checked when those were made
    refuse_other_base(
        other_bases_of_mask(run, config, rule), its.inputs["base"], options.allow_other_base
    )
    named |= {other: read_mask(run, config, other) for other in rule.combines}
    folder = run.checkpoint(base)
    trained = folder if rule.reads is None else checkpoint_folder(run, config, rule.reads)
    pairs = delta.stream_whole(folder, trained, parameter_names.classify)
    mask = _built_together(rule, pairs, state) if shared else build_mask(rule, pairs, named)
    if state.is_main_process:
        path, classify = run.mask(name), parameter_names.classify
        save_mask(path, mask, its.inputs, classify, lambda _, about: its.finish(about, [path]))


def _built_together(rule: MaskConfig, pairs: delta.Deltas, state: Accelerator) -> Mask:
    """`build_mask` of a rule that is by tensor, for the first process; all build a tensor each, of like sizes."""
    sizes, n = pairs.sizes(), state.num_processes
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    found: dict[str, tuple[torch.Size, Tensor]] = {}
    with pairs.reader() as read:

        def work(name: str) -> tuple[torch.Size, Tensor]:
            marked = build_mask(rule, [read(name)])[name]
            return marked.shape, pack(marked)

        for start in range(0, len(names), n):
            some = names[start : start + n]
            built = distributed.share(state, work, some)
            if state.is_main_process:
                found |= zip(some, built, strict=True)
    ordered = ((name, *found[name]) for name in pairs.report.matched if name in found)
    return {name: unpack(bits, sizes[name]).view(shape) for name, shape, bits in ordered}
