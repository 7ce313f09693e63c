"""Arms of every kind, each from what is there: trained, transplanted, extrapolated, or only noted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vlopd import distributed
from vlopd.config.arms import (
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    Subspace,
    TeacherArm,
    TransplantArm,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.recipe import Recipe, training_of
from vlopd.data.load import load_data
from vlopd.digests import digest_checkpoint, digest_json
from vlopd.distill import Evaluate, Hooks, distill
from vlopd.errors import RunError
from vlopd.files import whole_folder
from vlopd.masks.apply import delta_norm, extrapolated, transplanted
from vlopd.models.load import DTYPES, load_configured, resolve
from vlopd.models.save import save
from vlopd.run.folder import RunFolder
from vlopd.run.inputs import own_other_base
from vlopd.run.records import (
    card,
    identities,
    keeps_base,
    load_base,
    note,
    off_mask,
    record,
    seeds_of,
)
from vlopd.run.resolve import (
    base_arm,
    deltas,
    hub_folder,
    read_mask,
    read_tensors,
    refuse_other_base,
    teacher_folder,
)
from vlopd.run.stage import Stage
from vlopd.train.log import open_trackers
from vlopd.train.pair import load_pair
from vlopd.train.resume import is_state_of
from vlopd.train.sparse import Trainable
from vlopd.weights.stored import stored_tensors
from vlopd.weights.subspace import Projection, update_projection


class Making(NamedTuple):
    """How artifacts are made, beyond what the config says."""

    allow_other_base: bool = False
    """Masks and checkpoints from another base may be used, and every record says so."""
    evaluate: Evaluate | None = None
    """Scores a student while it trains (eval.during)."""


PLAIN = Making()


def write_base(its: Stage, config: ExperimentConfig, name: str) -> None:
    """Writes the student as it is loaded, in the stored precision: what every delta is measured from."""
    student, state = load_base(config)
    with whole_folder(its.run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, "the student before any training"), state)
    total = student.model.num_parameters()
    record(its, config, name, "base", total_parameters=total, trained_parameters=0, density=0.0)


def note_teacher(its: Stage, config: ExperimentConfig, name: str, arm: TeacherArm) -> None:
    """Records where a teacher is; its weights are not copied into the run."""
    teacher = config.teacher_of(arm)
    folder = hub_folder(str(teacher_folder(its.run, config, teacher)), teacher.revision)
    note(its, config, name, "teacher", digest_checkpoint(folder), folder, model=teacher.model)


def note_foreign(
    its: Stage, config: ExperimentConfig, name: str, arm: CheckpointArm | ImportedArm
) -> None:
    """Records where a model or scores from elsewhere are; they are not copied into the run."""
    folder = None
    if isinstance(arm, CheckpointArm):
        folder = hub_folder(resolve(arm.model), None)
        model = config.checkpoint_of(arm)
        load_configured(model, DTYPES[config.precision.compute])  # refused here, not when evaluated
    digest = digest_json(its.inputs["files"]) if folder is None else digest_checkpoint(folder)
    note(its, config, name, arm.type, digest, folder)


def train_arm(
    its: Stage, config: ExperimentConfig, name: str, arm: DistillArm, how: Making
) -> None:
    """Distils the student from the base, under the arm's mask if it has one, and proves the mask held."""
    recipe, run, inputs = config.recipe_of(arm), its.run, its.inputs
    base = run.checkpoint(base_arm(config))
    refuse_other_base(own_other_base(run, config, arm), inputs["base"], how.allow_other_base)
    accelerator = distributed.accelerator()
    distributed.main_process_alone(accelerator, lambda: clear(run.arm(name), digest_json(inputs)))
    pair = load_pair(
        config.student,
        recipe.teacher,
        compute=config.precision.compute,
        device=accelerator.device,
        images=recipe.data.has_images,
        # the base arm, unless that is stored in less than the student's own precision
        student_folder=base if keeps_base(config) else None,
    )
    before, mask, projections = read_tensors(base), None, None
    if arm.mask is not None:
        mask = read_mask(run, config, arm.mask)
    if arm.subspace is not None:
        projections = read_projections(
            run, config, arm.subspace, dict(pair.student.model.named_parameters())
        )
    data = load_data(recipe.data, recipe.prompts, arm.seed, recipe.teachers.values())
    started = time.perf_counter()
    folder = run.arm(name)

    def keep(step: int, trainable: Trainable) -> None:
        with whole_folder(run.kept(name, step)) as checkpoint:
            text = card(config, name, f"{describe(recipe, arm)}, {step} of them done", inputs)
            save(pair.student, checkpoint, text, trainable.merged(before))

    with distributed.together(accelerator):
        names = config.tracking.trackers if accelerator.is_main_process else ()
        settings = {**config.model_dump(mode="json"), **recipe.model_dump(mode="json")}
        trackers = open_trackers(names, f"{config.name}-{name}", folder, settings)
    every = config.eval.during.every if config.eval.during else None
    trainable = distill(
        pair,
        data,
        recipe,
        folder,
        arm.seed,
        # buffers of the checkpoint (running means of a tower) do not train
        mask and {n: mask[n] for n, _ in pair.student.model.named_parameters()},
        Hooks(keep, how.evaluate, every, trackers),
        projections=projections,
        identity=digest_json(inputs),
        accelerator=accelerator,
    ).trainable

    def write() -> None:
        merged = trainable.merged(before)
        with whole_folder(run.checkpoint(name)) as checkpoint:
            text = card(config, name, describe(recipe, arm), inputs)
            save(pair.student, checkpoint, text, merged)
        proof = off_mask(before, read_tensors(run.checkpoint(name)), mask)
        if proof["off_mask"] is not None:
            with stored_tensors(pair.student) as own:
                moved = proof["off_mask"]["moved_in_memory"] = trainable.moved_off_mask(own)
            proof["off_mask_unmoved"] &= moved == 0
        record(
            its,
            config,
            name,
            "distill",
            mask=arm.mask,
            seed=arm.seed,
            discovery_seeds=seeds_of(config, name),
            steps=recipe.train.steps,
            total_parameters=trainable.total,
            trained_parameters=trainable.count,
            density=trainable.count / trainable.total,
            seconds=round(time.perf_counter() - started, 1),
            device=str(accelerator.device),
            notes=recipe.notes,
            **proof,
            identity=identities(run, config, name, before, mask),
        )
        shutil.rmtree(folder / "state", ignore_errors=True)

    distributed.main_process_alone(accelerator, write)


def clear(folder: Path, identity: str) -> None:
    """Removes what an arm made from other inputs left (early checkpoints, logs), unless its state is resumed from."""
    if is_state_of(folder / "state", identity):
        return
    for path in folder.glob("*"):
        if path.name != "state":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe(recipe: Recipe, arm: DistillArm) -> str:
    """How an arm was trained, in a few words for its model card."""
    text = f"{training_of(recipe)}, {recipe.objective}, {recipe.train.steps} steps"
    text += f", mask {arm.mask}" if arm.mask else ""
    if arm.subspace:
        text += f", gradients projected on rank {arm.subspace.rank} of {arm.subspace.of}"
    return text


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
    its: Stage, config: ExperimentConfig, name: str, arm: TransplantArm, how: Making
) -> None:
    """The base with the other arm's values on the mask: the mask's share of the update, untrained."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        assert mask is not None
        pairs = deltas(its.run, config, arm.of)
        return {pair.name: transplanted(pair, mask[pair.name]) for pair in pairs}

    what = f"the base with {arm.of}'s values on mask {arm.mask}"
    write_untrained(its, config, name, arm, what, change, how)


def extrapolate(
    its: Stage, config: ExperimentConfig, name: str, arm: ExtrapolateArm, how: Making
) -> None:
    """The base plus a multiple of an early delta: what going on in its direction would give."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        factor, pairs = arm.factor, deltas(its.run, config, arm.of)
        if arm.norm_of is not None:
            early = delta_norm(pairs)
            if early == 0:
                raise RunError(f"{arm.of} did not move from the base: it has no direction")
            factor = delta_norm(deltas(its.run, config, arm.norm_of)) / early
        assert factor is not None
        return {
            p.name: extrapolated(p, factor, None if mask is None else mask[p.name]) for p in pairs
        }

    length = arm.factor if arm.norm_of is None else f"the norm of {arm.norm_of}'s over its own"
    what = f"the base plus {length} times the delta of {arm.of}"
    what += f" on mask {arm.mask}" if arm.mask else ""
    write_untrained(its, config, name, arm, what, change, how)


def write_untrained(
    its: Stage,
    config: ExperimentConfig,
    name: str,
    arm: TransplantArm | ExtrapolateArm,
    what: str,
    change: Callable[[Mapping[str, Tensor] | None], dict[str, Tensor]],
    how: Making,
) -> None:
    """Writes an arm that is the base with some of its tensors changed, given the arm's mask."""
    run, inputs = its.run, its.inputs
    refuse_other_base(own_other_base(run, config, arm), inputs["base"], how.allow_other_base)
    mask = None if arm.mask is None else read_mask(run, config, arm.mask)
    base = run.checkpoint(base_arm(config))
    before = read_tensors(base)
    # for its configuration: all weights that are written are in `before`
    student = load_configured(config.student, DTYPES[config.precision.compute], folder=base)
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, what, inputs), {**before, **change(mask)})
    total = student.model.num_parameters()
    count = total if mask is None else sum(int(marked.sum()) for marked in mask.values())
    record(
        its,
        config,
        name,
        arm.type,
        mask=arm.mask,
        total_parameters=total,
        trained_parameters=0,
        density=count / total,
        **off_mask(before, read_tensors(run.checkpoint(name)), mask),
        identity=identities(run, config, name, before, mask),
    )
