"""The pipeline's stages up to geometry: each reads files of a run folder, writes one artifact, and is
skipped when the artifact is there and was made from the same inputs.

    source arm -> distilled arms -> masks -> retrained and transplanted arms -> geometry
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from vlopd import delta, masks, processes
from vlopd.checkpoint import (
    RunError,
    RunFolder,
    digest_checkpoint,
    digest_json,
    read_json,
    up_to_date,
    whole_folder,
    write_json,
)
from vlopd.config import (
    DistillArm,
    ExperimentConfig,
    RandomMask,
    SourceArm,
    TeacherArm,
    TeacherConfig,
    TransplantArm,
)
from vlopd.data import open_data
from vlopd.distill import distill
from vlopd.geometry.analyse import analyse
from vlopd.geometry.overlap import overlap
from vlopd.geometry.trajectory import step_of, trajectory
from vlopd.models import atlas
from vlopd.models.load import DTYPES, load_configured, load_model_config, resolve, save
from vlopd.pair import load_pair

RUN_WIDE = ("student", "teacher", "precision", "data", "rollout", "loss", "optim", "train")
"""Sections of the config that decide a distilled arm's weights."""


def source_arm(config: ExperimentConfig) -> str:
    """The arm that holds the untrained student; every run has one."""
    return next((n for n, arm in config.arms.items() if isinstance(arm, SourceArm)), "base")


def make_arm(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """Makes one arm and what it needs; returns whether there was anything to do."""
    source = source_arm(config)
    if name != source:
        make_source(run, config, source)
    arm = config.arms.get(name, SourceArm())
    if isinstance(arm, SourceArm):
        return make_source(run, config, name)
    if isinstance(arm, TeacherArm):
        with processes.main_process_first():
            return note_teacher(run, config, name, arm)
    if arm.mask is not None:
        make_mask(run, config, arm.mask)
    if isinstance(arm, TransplantArm):
        make_arm(run, config, arm.of)
        with processes.main_process_first():
            return transplant(run, config, name, arm)
    return train_arm(run, config, name, arm)


# ---------------------------------------------------------------------------------------------- arms


def make_source(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The untrained student as an arm; returns whether it had to be written."""
    with processes.main_process_first():
        return write_source(run, config, name)


def write_source(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """Writes the student as it is loaded, in the stored precision: what every delta is measured from."""
    inputs = {
        "student": config.student.model_dump(mode="json", exclude={"attention"}),
        "stored": config.precision.stored,
    }
    if up_to_date(run.arm_record(name), inputs):
        return False
    student = load_configured(config.student, stored_dtype(config))
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, "the student before any training"))
    total = student.model.num_parameters()
    record(
        run,
        config,
        name,
        "source",
        inputs,
        total_parameters=total,
        trained_parameters=0,
        density=0.0,
    )
    return True


def stored_dtype(config: ExperimentConfig) -> torch.dtype:
    """The precision of checkpoints: as configured, or the student's own."""
    if config.precision.stored != "source":
        return DTYPES[config.precision.stored]
    student = config.student
    own = load_model_config(student.model, student.revision, student.trust_remote_code).dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def note_teacher(run: RunFolder, config: ExperimentConfig, name: str, arm: TeacherArm) -> bool:
    """A teacher is not copied into the run; its record says where it is."""
    teacher = config.teacher_of(arm)
    inputs = {"teacher": teacher.model, "revision": teacher.revision}
    if teacher.is_student:
        inputs["source"] = arm_digest(run, source_arm(config))
    if up_to_date(run.arm_record(name), inputs):
        return False
    folder = teacher_folder(run, config, teacher)
    digest = digest_checkpoint(folder) if folder.is_dir() else None
    write_json(
        run.arm_record(name),
        {
            "arm": name,
            "type": "teacher",
            "model": teacher.model,
            "checkpoint_digest": digest,
            "precision": precision(config),
            "inputs": inputs,
        },
    )
    return True


def teacher_folder(run: RunFolder, config: ExperimentConfig, teacher: TeacherConfig) -> Path:
    """Where a teacher's checkpoint is: its own folder, or the source's where it is the student itself."""
    return (
        run.checkpoint(source_arm(config)) if teacher.is_student else Path(resolve(teacher.model))
    )


def arm_folder(run: RunFolder, config: ExperimentConfig, name: str) -> Path:
    """An arm's checkpoint; a teacher's is where the teacher is, on the hub's local snapshot if need be."""
    arm = config.arms.get(name)
    if not isinstance(arm, TeacherArm):
        return run.checkpoint(name)
    teacher = config.teacher_of(arm)
    folder = teacher_folder(run, config, teacher)
    if folder.is_dir():
        return folder
    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(teacher.model, revision=teacher.revision, allow_patterns=wanted))


def train_arm(run: RunFolder, config: ExperimentConfig, name: str, arm: DistillArm) -> bool:
    """Distils the student from the source, under the arm's mask if it has one, and proves the mask held."""
    source = run.checkpoint(source_arm(config))
    resolved = config.model_dump(mode="json")
    inputs: dict[str, Any] = {
        "source": arm_digest(run, source_arm(config)),
        "arm": resolved["arms"][name],
        "settings": digest_json({key: resolved[key] for key in RUN_WIDE}),
    }
    mask = None
    if arm.mask is not None:
        inputs["mask"] = read_json(run.mask_record(arm.mask))["digest"]
    if up_to_date(run.arm_record(name), inputs):
        return False
    if arm.mask is not None:
        mask = read_mask(run, config, arm.mask)
    accelerator = processes.accelerator()
    pair = load_pair(config, accelerator.device, source)
    prompts = config.train.steps * config.train.prompts_per_step
    data = open_data(config, prompts, arm.seed)
    started = time.perf_counter()
    folder = run.arm(name)
    trainable = distill(
        pair, data, config, arm, folder, name, mask, digest_json(inputs), accelerator
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        before = read_tensors(source)
        merged = trainable.merged(before)
        teachers = ", ".join(teacher.model for teacher in config.teachers.values())
        how = f"on-policy distillation from {teachers}, {config.train.steps} steps"
        how += f", mask {arm.mask}" if arm.mask else ""
        with whole_folder(run.checkpoint(name)) as checkpoint:
            save(pair.student, checkpoint, card(config, name, how), merged)
        record(
            run,
            config,
            name,
            "distill",
            inputs,
            mask=arm.mask,
            seed=arm.seed,
            steps=config.train.steps,
            total_parameters=trainable.total,
            trained_parameters=trainable.count,
            density=trainable.count / trainable.total,
            seconds=round(time.perf_counter() - started, 1),
            device=str(accelerator.device),
            off_mask_unmoved=None
            if mask is None
            else off_mask_unmoved(before, read_tensors(run.checkpoint(name)), mask),
        )
        shutil.rmtree(folder / "state", ignore_errors=True)
    accelerator.wait_for_everyone()
    return True


def transplant(run: RunFolder, config: ExperimentConfig, name: str, arm: TransplantArm) -> bool:
    """The source with the other arm's values on the mask: the mask's share of the update, untrained."""
    inputs = {
        "source": arm_digest(run, source_arm(config)),
        "of": arm_digest(run, arm.of),
        "mask": read_json(run.mask_record(arm.mask))["digest"],
    }
    if up_to_date(run.arm_record(name), inputs):
        return False
    mask = read_mask(run, config, arm.mask)
    source = run.checkpoint(source_arm(config))
    state = {
        pair.name: masks.transplanted(pair, mask[pair.name])
        for pair in delta.stream(source, run.checkpoint(arm.of), atlas.classify)
    }
    before = read_tensors(source)
    student = load_configured(config.student, stored_dtype(config), folder=source)
    what = f"the source with {arm.of}'s values on mask {arm.mask}"
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, what), {**before, **state})
    count = sum(int(marked.sum()) for marked in mask.values())
    total = student.model.num_parameters()
    record(
        run,
        config,
        name,
        "transplant",
        inputs,
        mask=arm.mask,
        total_parameters=total,
        trained_parameters=0,
        density=count / total,
        off_mask_unmoved=off_mask_unmoved(before, read_tensors(run.checkpoint(name)), mask),
    )
    return True


def record(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    kind: str,
    inputs: Mapping[str, Any],
    **about: Any,
) -> None:
    write_json(
        run.arm_record(name),
        {
            "arm": name,
            "type": kind,
            **about,
            "precision": precision(config),
            "checkpoint_digest": digest_checkpoint(run.checkpoint(name)),
            "inputs": dict(inputs),
        },
    )


def precision(config: ExperimentConfig) -> dict[str, str]:
    stored = str(stored_dtype(config)).removeprefix("torch.")
    return {"compute": config.precision.compute, "stored": stored, "values": "fp32"}


def arm_digest(run: RunFolder, name: str) -> str:
    return read_json(run.arm_record(name))["checkpoint_digest"]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def off_mask_unmoved(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor]
) -> bool:
    """Whether every coordinate off the mask is the source's, bit for bit."""
    for name, old in before.items():
        bits = torch.int16 if old.element_size() == 2 else torch.int32
        moved = old.view(bits) != after[name].view(bits)
        if bool((moved & ~mask[name] if name in mask else moved).any()):
            return False
    return True


def card(config: ExperimentConfig, name: str, what: str) -> str:
    """The text of an arm's model card."""
    return (
        "---\nlibrary_name: transformers\ntags: [vlopd, on-policy-distillation]\n---\n"
        f"# {config.name}: arm {name}\n\nMade by vlopd from {config.student.model}: {what}.\n"
        "Loads with `transformers`; ../record.json has its inputs, precision and digests.\n"
    )


# --------------------------------------------------------------------------------------------- masks


def make_mask(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """Builds a mask file from its rule, and first what the rule needs."""
    rule = config.masks[name]
    source = source_arm(config)
    make_source(run, config, source)
    inputs: dict[str, Any] = {
        "rule": rule.model_dump(mode="json"),
        "source": arm_digest(run, source),
    }
    if isinstance(rule, RandomMask):
        make_mask(run, config, rule.like)
        inputs["like"] = read_json(run.mask_record(rule.like))["digest"]
    else:
        make_arm(run, config, rule.of)
        inputs["of"] = arm_digest(run, rule.of)
    with processes.main_process_first():
        if up_to_date(run.mask_record(name), inputs):
            return False
        if isinstance(rule, RandomMask):
            mask = masks.random_like(read_mask(run, config, rule.like), rule.seed)
        else:
            trained = arm_folder(run, config, rule.of)
            mask = masks.build_mask(
                rule, delta.stream(run.checkpoint(source), trained, atlas.classify)
            )
        masks.save_mask(run.mask(name), mask, inputs, atlas.classify)
        return True


def read_mask(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Tensor]:
    """A mask of this run; refused when it was made for another model or another source."""
    source = source_arm(config)
    mask, metadata = masks.load_mask(run.mask(name))
    shapes = {key: tensor.shape for key, tensor in read_tensors(run.checkpoint(source)).items()}
    try:
        masks.check_mask(mask, metadata, shapes, arm_digest(run, source))
    except RunError as error:
        raise RunError(f"{run.mask(name)}: {error}") from None
    return mask


# ------------------------------------------------------------------------------------------ geometry


def make_geometry(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The geometry of an arm's delta, each number beside its nulls; and of its checkpoints, if it kept any."""
    source = source_arm(config)
    base, out = run.checkpoint(source), run.geometry(name)
    kept = sorted(run.arm(name).glob("checkpoints/step-*"))
    steps = {step_of(folder, i): folder for i, folder in enumerate(kept)}
    inputs: dict[str, Any] = {
        "source": arm_digest(run, source),
        "trained": arm_digest(run, name),
        "settings": config.geometry.model_dump(mode="json"),
    }
    if steps:
        inputs["steps"] = {str(step): digest_checkpoint(steps[step]) for step in sorted(steps)}
    if up_to_date(out / "summary.json", inputs):
        return False
    tables = {}
    for step, folder in steps.items():
        tables[step] = out / "steps" / str(step)
        own = {**inputs, "step": step}
        if not up_to_date(tables[step] / "summary.json", own):
            analyse(base, folder, tables[step], config.geometry, own)
    if len(steps) > 1:
        trajectory(base, steps, out, config.geometry, tables=tables)
    analyse(base, arm_folder(run, config, name), out, config.geometry, inputs)
    return True


def make_overlap(run: RunFolder, config: ExperimentConfig, names: list[str]) -> bool:
    """The overlap of the visible updates of several arms: RUN/geometry/overlap.csv and its record."""
    source, record = source_arm(config), run.root / "geometry" / "overlap.json"
    inputs: dict[str, Any] = {
        "source": arm_digest(run, source),
        "arms": {name: arm_digest(run, name) for name in names},
        "settings": config.geometry.model_dump(mode="json"),
    }
    if up_to_date(record, inputs):
        return False
    record.unlink(missing_ok=True)
    runs = {name: arm_folder(run, config, name) for name in names}
    overlap(run.checkpoint(source), runs, record.parent, config.geometry)
    write_json(record, {"inputs": inputs})
    return True
