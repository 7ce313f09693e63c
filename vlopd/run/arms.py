"""Arms of every kind, each from what is there: trained, transplanted, extrapolated, or only noted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vlopd import distributed
from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    Subspace,
    TeacherArm,
    TransplantArm,
    checkpoints_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.recipe import Recipe
from vlopd.data.load import load_data
from vlopd.digests import digest_checkpoint, digest_json
from vlopd.distill import Evaluate, Hooks, distill
from vlopd.errors import RunError
from vlopd.files import is_first_process, read_json, whole_folder
from vlopd.masks.apply import delta_norm, extrapolated, transplanted
from vlopd.models.load import DTYPES, load_configured, resolve
from vlopd.models.save import save
from vlopd.run.folder import RunFolder
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
    arm_content,
    arm_digest,
    base_arm,
    checkpoint_digest,
    data_content,
    deltas,
    hub_folder,
    model_content,
    other_base,
    read_mask,
    read_tensors,
    refuse_other_base,
    teacher_content,
    teacher_folder,
)
from vlopd.train.log import open_trackers
from vlopd.train.pair import load_pair
from vlopd.train.sparse import Trainable
from vlopd.weights.stored import stored_tensors
from vlopd.weights.subspace import Projection, update_projection


class Making(NamedTuple):
    """How artifacts are made, beyond what the config says."""

    allow_other_base: bool = False
    """Masks and checkpoints from another base may be used, and every record says so."""
    evaluate: Evaluate | None = None
    """Scores a student while it trains (eval.during)."""
    before_training: Callable[[], None] = lambda: None
    """Raises UserError where it is known that a later stage would fail; called when there is something to train."""


PLAIN = Making()


def write_base(run: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """Writes the student as it is loaded, in the stored precision: what every delta is measured from."""
    inputs = due(run, config, name)
    if inputs is None:
        return False
    student, state = load_base(config)
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, card(config, name, "the student before any training"), state)
    total = student.model.num_parameters()
    record(
        run,
        config,
        name,
        "base",
        inputs,
        total_parameters=total,
        trained_parameters=0,
        density=0.0,
    )
    return True


def note_teacher(run: RunFolder, config: ExperimentConfig, name: str, arm: TeacherArm) -> bool:
    """A teacher is not copied into the run; its record says where it is."""
    teacher = config.teacher_of(arm)
    inputs = due(run, config, name)
    if inputs is None:
        return False
    folder = hub_folder(str(teacher_folder(run, config, teacher)), teacher.revision)
    note(
        run, config, name, "teacher", inputs, digest_checkpoint(folder), folder, model=teacher.model
    )
    return True


def note_foreign(
    run: RunFolder, config: ExperimentConfig, name: str, arm: CheckpointArm | ImportedArm
) -> bool:
    """A model or scores from elsewhere are not copied into the run; the record says where they are."""
    inputs = due(run, config, name)
    if inputs is None:
        return False
    folder = None
    if isinstance(arm, CheckpointArm):
        folder = hub_folder(resolve(arm.model), None)
        model = config.checkpoint_of(arm)
        load_configured(model, DTYPES[config.precision.compute])  # refused here, not when evaluated
    digest = digest_json(inputs["files"]) if folder is None else digest_checkpoint(folder)
    note(run, config, name, arm.type, inputs, digest, folder)
    return True


def due(run: RunFolder, config: ExperimentConfig, name: str) -> dict[str, Any] | None:
    """What an arm is to be made from, or None where it was made from just that.

    Every file is read: the work that follows is on what these digests say. What vouched for an arm that is to be
    made again goes first.
    """
    if run.checksums.is_done(f"arms/{name}", run.arm_record(name), made_from(run, config, name)):
        return None
    inputs = made_from(run, config, name, is_first_process())
    if is_first_process():
        run.checksums.start(f"arms/{name}", run.arm_record(name))
    return inputs


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
        return {**arm.model_dump(mode="json"), "files": files}
    inputs = {"base": arm_digest(run, base_arm(config)), "files": files}
    if isinstance(arm, DistillArm):
        recipe = config.recipe_of(arm)
        teachers = recipe.teachers
        settings = config.model_dump(mode="json", include={"student", "precision"})
        settings |= recipe.model_dump(mode="json")
        inputs |= {
            "student": read_json(run.arm_record(base_arm(config)))["inputs"],
            "teachers": {n: teacher_content(run, config, t, whole) for n, t in teachers.items()},
            "data": data_content(recipe.data, tuple(teachers.values()), whole),
            "arm": arm.model_dump(mode="json"),
            "settings": digest_json(settings),
        }
    else:
        inputs["arm"] = arm.model_dump(mode="json")
    return inputs | read_inputs(run, config, arm, whole)


def is_made(arm: ArmConfig) -> bool:
    """Whether an arm is a checkpoint of this run, made from its base."""
    return isinstance(arm, (DistillArm, TransplantArm, ExtrapolateArm))


def train_arm(
    run: RunFolder, config: ExperimentConfig, name: str, arm: DistillArm, how: Making
) -> bool:
    """Distils the student from the base, under the arm's mask if it has one, and proves the mask held."""
    recipe = config.recipe_of(arm)
    base = run.checkpoint(base_arm(config))
    inputs = due(run, config, name)
    if inputs is None:
        return False
    how.before_training()
    refuse_other_base(own_other_base(run, config, arm), inputs["base"], how.allow_other_base)
    accelerator = distributed.accelerator()
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
            run,
            config,
            name,
            "distill",
            inputs,
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
    return True


def describe(recipe: Recipe, arm: DistillArm) -> str:
    """How an arm was trained, in a few words for its model card."""
    text = f"{recipe.objective}, {recipe.train.steps} steps"
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
    run: RunFolder, config: ExperimentConfig, name: str, arm: TransplantArm, how: Making
) -> bool:
    """The base with the other arm's values on the mask: the mask's share of the update, untrained."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        assert mask is not None
        pairs = deltas(run, config, arm.of)
        return {pair.name: transplanted(pair, mask[pair.name]) for pair in pairs}

    what = f"the base with {arm.of}'s values on mask {arm.mask}"
    return write_untrained(run, config, name, arm, what, change, how)


def extrapolate(
    run: RunFolder, config: ExperimentConfig, name: str, arm: ExtrapolateArm, how: Making
) -> bool:
    """The base plus a multiple of an early delta: what going on in its direction would give."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        factor, pairs = arm.factor, deltas(run, config, arm.of)
        if arm.norm_of is not None:
            early = delta_norm(pairs)
            if early == 0:
                raise RunError(f"{arm.of} did not move from the base: it has no direction")
            factor = delta_norm(deltas(run, config, arm.norm_of)) / early
        assert factor is not None
        return {
            p.name: extrapolated(p, factor, None if mask is None else mask[p.name]) for p in pairs
        }

    length = arm.factor if arm.norm_of is None else f"the norm of {arm.norm_of}'s over its own"
    what = f"the base plus {length} times the delta of {arm.of}"
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
    """An arm that is the base with some of its tensors changed, given the arm's mask."""
    inputs = due(run, config, name)
    if inputs is None:
        return False
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
