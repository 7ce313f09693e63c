"""The pipeline's stages up to geometry: each reads files of a run folder, writes one artifact, and is
skipped when the artifact is there and was made from the same inputs.

    source arm -> distilled arms -> masks -> retrained and transplanted arms -> geometry
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from vlopd import delta, masks, processes
from vlopd.checkpoint import (
    RunError,
    RunFolder,
    digest_checkpoint,
    digest_files,
    digest_json,
    read_json,
    up_to_date,
    whole_folder,
    write_json,
)
from vlopd.config import (
    CheckpointArm,
    DistillArm,
    ExperimentConfig,
    ExtrapolateArm,
    FileMask,
    ImportedArm,
    Recipe,
    Reference,
    SourceArm,
    Subspace,
    TeacherArm,
    TeacherConfig,
    TransplantArm,
    checkpoints_of,
    mask_of,
)
from vlopd.data import open_data
from vlopd.distill import Evaluate, distill
from vlopd.geometry.analyse import analyse
from vlopd.geometry.overlap import overlap
from vlopd.geometry.trajectory import step_of, trajectory
from vlopd.masks.apply import delta_norm, extrapolated, identity, moved_off_mask, transplanted
from vlopd.models import atlas
from vlopd.models.load import DTYPES, load_configured, load_model_config, resolve, save
from vlopd.pair import load_pair
from vlopd.subspace import update_projection
from vlopd.trainable import Projection, Trainable

RUN_WIDE = ("student", "precision", *Recipe.model_fields)
"""Sections of the config that decide a distilled arm's weights, unless it has its own."""


class Making(NamedTuple):
    """How artifacts are made, beyond what the config says."""

    allow_other_source: bool = False
    """Masks and checkpoints from another source may be used, and every record says so."""
    evaluate: Evaluate | None = None
    """Scores a student while it trains (eval.during)."""


PLAIN = Making()


def source_arm(config: ExperimentConfig) -> str:
    """The arm that holds the untrained student; every run has one."""
    return next((n for n, arm in config.arms.items() if isinstance(arm, SourceArm)), "base")


def make_arm(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Makes one arm and what it needs; returns whether there was anything to do."""
    source = source_arm(config)
    if name != source:
        make_source(run, config, source)
    arm = config.arms.get(name, SourceArm())
    if isinstance(arm, SourceArm):
        return make_source(run, config, name)
    if isinstance(arm, (TeacherArm, CheckpointArm, ImportedArm)):
        with processes.main_process_first(), run.making(run.arm(name)):
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
            processes.accelerator().wait_for_everyone()
            return train_arm(run, config, name, arm, how)
    with processes.main_process_first(), run.making(run.arm(name)):
        if isinstance(arm, TransplantArm):
            return transplant(run, config, name, arm, how)
        return extrapolate(run, config, name, arm, how)


# --------------------------------------------------------------------------------------- checkpoints


def make_checkpoint(run: RunFolder, config: ExperimentConfig, text: str, how: Making) -> None:
    """Makes the arm whose checkpoint is named, where it is one of this run."""
    arm = Reference.parse(text).arm
    if arm is not None:
        make_arm(run, config, arm, how)


def checkpoint_folder(run: RunFolder, config: ExperimentConfig, text: str) -> Path:
    """Where a named checkpoint is (Reference). Raises RunError where it is not."""
    arm, path, step = Reference.parse(text)
    if arm is not None:
        folder = arm_folder(run, config, arm) if step is None else run.kept(arm, step)
    else:
        folder = Path(str(path))
        if step is not None:
            folder = folder / "checkpoints" / f"step-{step}"
        elif (folder / "checkpoint").is_dir():
            folder = folder / "checkpoint"
    if not folder.is_dir():
        again = f"; delete {run.arm(arm)} to train it again" if arm is not None else ""
        raise RunError(f"no checkpoint {folder}, which {text!r} names{again}")
    return folder


def checkpoint_digest(run: RunFolder, config: ExperimentConfig, text: str) -> str:
    arm, _, step = Reference.parse(text)
    if arm is not None and step is None:
        return arm_digest(run, arm)
    return digest_checkpoint(checkpoint_folder(run, config, text))


def other_source(run: RunFolder, config: ExperimentConfig, text: str) -> dict[str, str]:
    """{what: digest of its source} for a checkpoint of another run that was trained from another source."""
    path = Reference.parse(text).path
    if path is None or not (record := Path(path) / "record.json").exists():
        return {}
    its = read_json(record)["inputs"].get("source")
    return {} if its in (None, arm_digest(run, source_arm(config))) else {text: its}


def refuse_other_source(found: Mapping[str, str], ours: str, allow: bool) -> None:
    for what, its in found.items():
        if not allow:
            raise RunError(
                f"{what} is from source checkpoint {its[:12]}, this run's is {ours[:12]}; use one of this "
                "source, or say --allow-other-source, and every artifact after says so too"
            )


def deltas(run: RunFolder, config: ExperimentConfig, text: str) -> delta.Deltas:
    """What a named checkpoint changed from this run's source."""
    source = run.checkpoint(source_arm(config))
    return delta.stream(source, checkpoint_folder(run, config, text), atlas.classify)


# ---------------------------------------------------------------------------------------------- arms


def make_source(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """The untrained student as an arm; returns whether it had to be written."""
    with processes.main_process_first(), run.making(run.arm(name)):
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


def note_foreign(
    run: RunFolder, config: ExperimentConfig, name: str, arm: CheckpointArm | ImportedArm
) -> bool:
    """A model or scores from elsewhere are not copied into the run; the record says where they are."""
    inputs = arm.model_dump(mode="json")
    if isinstance(arm, CheckpointArm):
        inputs["digest"] = digest_checkpoint(hub_folder(resolve(arm.model), None))
    else:
        inputs["digest"] = digest_files(scores_of(Path(arm.results)))
    if up_to_date(run.arm_record(name), inputs):
        return False
    about = {"arm": name, "type": arm.type, "checkpoint_digest": inputs["digest"], "inputs": inputs}
    write_json(run.arm_record(name), {**about, "precision": precision(config)})
    return True


def scores_of(folder: Path) -> list[Path]:
    """The files of an lm-eval output folder: its last results_*.json and the samples of the same time.

    Raises RunError where they are not there.
    """
    results = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not results:
        raise RunError(f"{folder} has no results_*.json; name an output folder of lm-eval")
    last = results[-1]
    stamp = last.stem.removeprefix("results_")
    samples = sorted(last.parent.glob(f"samples_*_{stamp}.jsonl"))
    if not samples:
        raise RunError(
            f"{last} has no samples_*_{stamp}.jsonl beside it; run lm-eval with --log_samples"
        )
    return [last, *samples]


def hub_folder(model: str, revision: str | None) -> Path:
    """A model's folder: itself, or the hub's local snapshot of its weights."""
    if Path(model).is_dir():
        return Path(model)
    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


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
    return hub_folder(str(teacher_folder(run, config, teacher)), teacher.revision)


def train_arm(
    run: RunFolder, config: ExperimentConfig, name: str, arm: DistillArm, how: Making
) -> bool:
    """Distils the student from the source, under the arm's mask if it has one, and proves the mask held."""
    config = config.of_arm(arm)
    source = run.checkpoint(source_arm(config))
    resolved = config.model_dump(mode="json")
    inputs: dict[str, Any] = {
        "source": arm_digest(run, source_arm(config)),
        "arm": resolved["arms"][name],
        "settings": digest_json({key: resolved[key] for key in RUN_WIDE}),
        **read_inputs(run, config, arm),
    }
    if up_to_date(run.arm_record(name), inputs):
        return False
    refuse_other_source(
        own_other_source(run, config, arm), inputs["source"], how.allow_other_source
    )
    accelerator = processes.accelerator()
    pair = load_pair(config, accelerator.device, source)
    before, mask, projections = read_tensors(source), None, None
    if arm.mask is not None:
        mask = read_mask(run, config, arm.mask)
    if arm.subspace is not None:
        projections = read_projections(
            run, config, arm.subspace, dict(pair.student.model.named_parameters())
        )
    prompts = config.train.steps * config.train.prompts_per_step
    data = open_data(config, prompts, arm.seed)
    started = time.perf_counter()
    folder = run.arm(name)

    def keep(step: int, trainable: Trainable) -> None:
        with whole_folder(run.kept(name, step)) as checkpoint:
            text = card(config, name, f"{describe(config, arm)}, of which {step} are done", inputs)
            save(pair.student, checkpoint, text, trainable.merged(before))

    trainable = distill(
        pair,
        data,
        config,
        arm,
        folder,
        name,
        # what is stored but no parameter (running means of a tower) does not train
        mask and {n: mask[n] for n, _ in pair.student.model.named_parameters()},
        digest_json(inputs),
        accelerator,
        projections,
        keep,
        how.evaluate,
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        merged = trainable.merged(before)
        with whole_folder(run.checkpoint(name)) as checkpoint:
            text = card(config, name, describe(config, arm), inputs)
            save(pair.student, checkpoint, text, merged)
        proof = off_mask(before, read_tensors(run.checkpoint(name)), mask)
        if proof["off_mask"] is not None:
            moved = proof["off_mask"]["moved_in_memory"] = trainable.moved_off_mask(before)
            proof["off_mask_unmoved"] &= moved == 0
        record(
            run,
            config,
            name,
            "distill",
            inputs,
            mask=arm.mask,
            seed=arm.seed,
            discovery_seeds=seeds_of(config, name),
            steps=config.train.steps,
            total_parameters=trainable.total,
            trained_parameters=trainable.count,
            density=trainable.count / trainable.total,
            seconds=round(time.perf_counter() - started, 1),
            device=str(accelerator.device),
            notes=config.notes,
            **proof,
            identity=identities(run, config, name, before, mask),
        )
        shutil.rmtree(folder / "state", ignore_errors=True)
    accelerator.wait_for_everyone()
    return True


def describe(config: ExperimentConfig, arm: DistillArm) -> str:
    teachers = ", ".join(teacher.model for teacher in config.teachers.values())
    told = f"loss {config.loss.type} from {teachers}, {config.train.steps} steps"
    told += f", mask {arm.mask}" if arm.mask else ""
    if arm.subspace:
        told += f", gradients projected on rank {arm.subspace.rank} of {arm.subspace.of}"
    return told


def read_projections(
    run: RunFolder, config: ExperimentConfig, subspace: Subspace, parameters: Mapping[str, Tensor]
) -> dict[str, Projection]:
    """The projection of every matrix on the subspace of its early update."""
    found = {
        pair.name: update_projection(pair.delta, subspace.rank, subspace.side)
        for pair in deltas(run, config, subspace.of)
        if pair.name in parameters
    }
    return {name: projection for name, projection in found.items() if projection is not None}


def transplant(
    run: RunFolder, config: ExperimentConfig, name: str, arm: TransplantArm, how: Making
) -> bool:
    """The source with the other arm's values on the mask: the mask's share of the update, untrained."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        assert mask is not None
        pairs = deltas(run, config, arm.of)
        return {pair.name: transplanted(pair, mask[pair.name]) for pair in pairs}

    what = f"the source with {arm.of}'s values on mask {arm.mask}"
    return write_untrained(run, config, name, arm, what, change, how)


def extrapolate(
    run: RunFolder, config: ExperimentConfig, name: str, arm: ExtrapolateArm, how: Making
) -> bool:
    """The source plus a multiple of an early delta: what going on in its direction would give."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        factor, pairs = arm.factor, deltas(run, config, arm.of)
        if arm.norm_of is not None:
            early = delta_norm(pairs)
            if early == 0:
                raise RunError(f"{arm.of} did not move from the source: it has no direction")
            factor = delta_norm(deltas(run, config, arm.norm_of)) / early
        assert factor is not None
        return {
            p.name: extrapolated(p, factor, None if mask is None else mask[p.name]) for p in pairs
        }

    length = arm.factor if arm.norm_of is None else f"the norm of {arm.norm_of}'s over its own"
    what = f"the source plus {length} times the delta of {arm.of}"
    what += f" on mask {arm.mask}" if arm.mask else ""
    return write_untrained(run, config, name, arm, what, change, how)


def write_untrained(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    arm: TransplantArm | ExtrapolateArm,
    what: str,
    change: Callable[[Mapping[str, Tensor] | None], dict[str, Tensor]],
    how: Making,
) -> bool:
    """An arm that is the source with some of its tensors changed, given the arm's mask."""
    inputs: dict[str, Any] = {"source": arm_digest(run, source_arm(config))}
    inputs |= {"arm": arm.model_dump(mode="json"), **read_inputs(run, config, arm)}
    if up_to_date(run.arm_record(name), inputs):
        return False
    refuse_other_source(
        own_other_source(run, config, arm), inputs["source"], how.allow_other_source
    )
    mask = None if arm.mask is None else read_mask(run, config, arm.mask)
    source = run.checkpoint(source_arm(config))
    before = read_tensors(source)
    student = load_configured(config.student, stored_dtype(config), folder=source)
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, what, inputs), {**before, **change(mask)})
    total = student.model.num_parameters()
    count = total if mask is None else sum(int(marked.sum()) for marked in mask.values())
    record(
        run,
        config,
        name,
        arm.type,
        inputs,
        mask=arm.mask,
        total_parameters=total,
        trained_parameters=0,
        density=count / total,
        **off_mask(before, read_tensors(run.checkpoint(name)), mask),
        identity=identities(run, config, name, before, mask),
    )
    return True


def read_inputs(
    run: RunFolder, config: ExperimentConfig, arm: DistillArm | TransplantArm | ExtrapolateArm
) -> dict[str, Any]:
    """Digests of the mask and checkpoints that an arm reads, and which of them are of another source."""
    inputs: dict[str, Any] = {}
    foreign = own_other_source(run, config, arm)
    if arm.mask is not None:
        about = read_json(run.mask_record(arm.mask))
        inputs["mask"] = about["digest"]
        foreign |= about["inputs"].get("other_source", {})
    for key, text in checkpoints_of(arm).items():
        inputs[key] = checkpoint_digest(run, config, text)
    return inputs | ({"other_source": foreign} if foreign else {})


def own_other_source(
    run: RunFolder, config: ExperimentConfig, arm: DistillArm | TransplantArm | ExtrapolateArm
) -> dict[str, str]:
    """`other_source` of all checkpoints that an arm reads itself."""
    found: dict[str, str] = {}
    for text in checkpoints_of(arm).values():
        found |= other_source(run, config, text)
    return found


def seeds_of(config: ExperimentConfig, name: str) -> dict[str, int] | None:
    """The seeds of the trained arms that an arm was made from: of its mask's discovery."""
    arms = {other: config.arms[other] for other in config.ancestors(name)}
    found = {other: arm.seed for other, arm in arms.items() if isinstance(arm, DistillArm)}
    return found or None


# --------------------------------------------------------------------------------------------- proof


def off_mask(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Whether every coordinate off the mask is the source's, bit for bit; nothing to say without a mask."""
    if mask is None:
        return {"off_mask_unmoved": None, "off_mask": None}
    total = sum(tensor.numel() for tensor in before.values())
    off = total - sum(int(marked.sum()) for marked in mask.values())
    moved = moved_off_mask(before, after, mask)
    return {"off_mask_unmoved": moved == 0, "off_mask": {"coordinates": off, "moved": moved}}


def identities(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    before: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None,
) -> dict[str, Any] | None:
    """How equal an arm's weights are to those of the trained arms that it was made from."""
    others = [a for a in config.ancestors(name) if isinstance(config.arms[a], DistillArm)]
    arm = read_tensors(run.checkpoint(name))
    found = {o: identity(before, arm, read_tensors(run.checkpoint(o)), mask) for o in others}
    return found or None


# -------------------------------------------------------------------------------------------- records


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
            "other_source": inputs.get("other_source"),
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


def card(
    config: ExperimentConfig, name: str, what: str, inputs: Mapping[str, Any] | None = None
) -> str:
    """The text of an arm's model card."""
    foreign = (inputs or {}).get("other_source")
    note = (
        f"Other source: {', '.join(foreign)} came from another source checkpoint.\n"
        if foreign
        else ""
    )
    return (
        "---\nlibrary_name: transformers\ntags: [vlopd, on-policy-distillation]\n---\n"
        f"# {config.name}: arm {name}\n\nMade by vlopd from {config.student.model}: {what}.\n{note}"
        "Loads with `transformers`; ../record.json has its inputs, precision and digests.\n"
    )


# --------------------------------------------------------------------------------------------- masks


def make_mask(run: RunFolder, config: ExperimentConfig, name: str, how: Making = PLAIN) -> bool:
    """Builds a mask file from its rule, and first what the rule needs."""
    rule = config.masks[name]
    source = source_arm(config)
    make_source(run, config, source)
    for other in rule.combines:
        make_mask(run, config, other, how)
    if rule.reads is not None:
        make_checkpoint(run, config, rule.reads, how)
    with processes.main_process_first(), run.making(run.mask(name)):
        ours = arm_digest(run, source)
        inputs: dict[str, Any] = {"rule": rule.model_dump(mode="json"), "source": ours}
        own: dict[str, str] = {}
        inherited: dict[str, str] = {}
        named: dict[str, masks.Mask] = {}
        if rule.reads is not None:
            inputs["of"] = checkpoint_digest(run, config, rule.reads)
            own = other_source(run, config, rule.reads)
        if rule.combines:
            records = {other: read_json(run.mask_record(other)) for other in rule.combines}
            inputs["masks"] = {other: about["digest"] for other, about in records.items()}
            for about in records.values():
                inherited |= about["inputs"].get("other_source", {})
        if isinstance(rule, FileMask):
            named[rule.path], about = masks.load_mask(Path(rule.path))
            inputs["file"] = about["digest"]
            inherited = about["inputs"].get("other_source", {})
            if about["inputs"]["source"] != ours:
                own = {rule.path: about["inputs"]["source"]}
        if own or inherited:
            inputs["other_source"] = {**inherited, **own}
        if up_to_date(run.mask_record(name), inputs):
            return False
        for path, mask in named.items():
            check_here(mask, run, source, path)
        refuse_other_source(own, ours, how.allow_other_source)
        named |= {other: read_mask(run, config, other) for other in rule.combines}
        folder = run.checkpoint(source)
        trained = folder if rule.reads is None else checkpoint_folder(run, config, rule.reads)
        mask = masks.build_mask(rule, delta.stream(folder, trained, atlas.classify), named)
        check_here(mask, run, source, f"masks.{name}")
        masks.save_mask(run.mask(name), mask, inputs, atlas.classify)
        return True


def check_here(mask: masks.Mask, run: RunFolder, source: str, what: str | Path) -> None:
    """Refuses a mask whose tensors are not those of this run's source."""
    try:
        masks.check_shapes(mask, mask_shapes(run, source))
    except RunError as error:
        raise RunError(f"{what}: {error}") from None


def mask_shapes(run: RunFolder, source: str) -> dict[str, torch.Size]:
    tensors = read_tensors(run.checkpoint(source))
    return {name: t.shape for name, t in tensors.items() if t.is_floating_point()}


def read_mask(run: RunFolder, config: ExperimentConfig, name: str) -> masks.Mask:
    """A mask of this run; refused when it was made for another model or another source."""
    source = source_arm(config)
    mask, metadata = masks.load_mask(run.mask(name))
    try:
        masks.check_mask(mask, metadata, mask_shapes(run, source), arm_digest(run, source))
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
    if foreign := read_json(run.arm_record(name)).get("other_source"):
        inputs["other_source"] = foreign
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
