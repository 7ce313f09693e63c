"""Makes arms of every type: trained, transplanted, extrapolated, merged, or recorded without a copy."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlopd import distributed, seeding
from vlopd.config.arms import (
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    MergeArm,
    Subspace,
    TeacherArm,
    TransplantArm,
    UntrainedArm,
    replay_of,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.lora import Lora
from vlopd.config.masks import TopFractionMask
from vlopd.config.recipe import ArmRecipe, Recipe, training_of
from vlopd.config.tracking import TrackingConfig
from vlopd.data.load import load_data
from vlopd.digests import digest_checkpoint, digest_json
from vlopd.errors import RunError
from vlopd.files import read_json, whole_folder, write_json
from vlopd.loop import Evaluate, Hooks, distill
from vlopd.masks.apply import delta_norm, extrapolated, norm_over_tensors, transplanted
from vlopd.masks.rules import build_mask, combine, whole_parameters
from vlopd.models.load import DTYPES, load_configured, resolve
from vlopd.models.save import save
from vlopd.run.dependencies import execution_of, other_bases_of_arm
from vlopd.run.folder import RunFolder
from vlopd.run.records import (
    base_arm_is_exact,
    count_changed,
    discovery_seeds,
    load_base,
    model_card,
    record_checkpoint,
    weight_agreement,
    write_record,
)
from vlopd.run.resolve import (
    checkpoint_deltas,
    hub_folder,
    read_mask,
    read_tensors,
    refuse_other_base,
    teacher_folder,
)
from vlopd.run.schemas.read import read_record
from vlopd.run.stage import Stage
from vlopd.train.log import open_trackers
from vlopd.train.lora import LoraTrainable
from vlopd.train.pair import LoadedTeachers, ModelPair, load_pair
from vlopd.train.resume import is_state_of
from vlopd.train.sparse import Trainable
from vlopd.weights.delta import TensorDelta
from vlopd.weights.merging import merged, moved
from vlopd.weights.stored import stored_tensors
from vlopd.weights.subspace import Projection, inner_part, rank_of, update_projection

PredictMemory = Callable[[ModelPair, Recipe, float, Mapping[str, Any]], Mapping[str, Any] | None]
"""(pair, recipe, fraction of coordinates that train, memory.json) -> what was to be expected."""

Choose = Callable[[RunFolder, ExperimentConfig, str], None]
"""(run, config with the candidates, group of tuned arms): writes sweeps/GROUP.json, the candidates being trained."""


class ArmOptions(NamedTuple):
    """Options of making arms and masks that are not in the config."""

    allow_other_base: bool = False
    """Use masks and checkpoints of another base (recorded in every later artifact)."""
    evaluate: Evaluate | None = None
    """Evaluates the student during training (eval.during)."""
    teachers: LoadedTeachers | None = None
    """Teachers that stay loaded from one arm to the next; None: each arm loads its own."""
    predict: PredictMemory | None = None
    """Predicts the memory of an arm's training, for its memory.json."""
    choose: Choose | None = None
    """Chooses the settings of a group of tuned arms."""


DEFAULT_OPTIONS = ArmOptions()


def write_base(its: Stage, config: ExperimentConfig, name: str) -> None:
    """Writes the untrained student in the stored precision; every delta is relative to it."""
    student, state = load_base(config)
    student.check_pictures()  # named as the config does, and mended before anything depends on it
    with whole_folder(its.run.checkpoint(name)) as folder:
        save(student, folder, model_card(config, name, "the student before any training"), state)
    total = student.model.num_parameters()
    record_checkpoint(
        its, config, name, "base", total_parameters=total, trained_parameters=0, density=0.0
    )


def record_teacher(its: Stage, config: ExperimentConfig, name: str, arm: TeacherArm) -> None:
    """Records a teacher's location and digest; its weights are not copied into the run."""
    teacher = config.teacher_of(arm)
    folder = hub_folder(str(teacher_folder(its.run, config, teacher)), teacher.revision)
    write_record(
        its, config, name, "teacher", digest_checkpoint(folder), folder, model=teacher.model
    )


def record_external(
    its: Stage, config: ExperimentConfig, name: str, arm: CheckpointArm | ImportedArm
) -> None:
    """Records the location and digest of an external model or scores; they are not copied into the run."""
    folder = None
    if isinstance(arm, CheckpointArm):
        folder = hub_folder(resolve(arm.model), None)
        model = config.checkpoint_of(arm)
        load_configured(model, DTYPES[config.precision.resolved])  # fails here, before any training
    digest = digest_json(its.inputs["files"]) if folder is None else digest_checkpoint(folder)
    write_record(its, config, name, arm.type, digest, folder)


def train_arm(
    its: Stage, config: ExperimentConfig, name: str, arm: DistillArm, options: ArmOptions
) -> None:
    """Trains the student from the base, under the arm's mask if any, and verifies that the rest did not move."""
    recipe, run, inputs = config.recipe_of(arm), its.run, its.inputs
    if name in config.replayed:
        train = recipe.train.model_copy(update={"keep_completions": True})
        recipe = recipe.model_copy(update={"train": train})
    replayed = replay_of(arm)
    if replayed is not None and config.candidates(replayed):
        replayed = str(read_record(run.arm_record(replayed))["candidate"])
    base = run.checkpoint(config.base_arm)
    refuse_other_base(
        other_bases_of_arm(run, config, arm), inputs["base"], options.allow_other_base
    )
    accelerator = distributed.accelerator()
    distributed.main_process_alone(accelerator, lambda: _clear(run.arm(name), digest_json(inputs)))
    pair = load_pair(
        config.student,
        recipe.teacher,
        compute=config.precision.resolved,
        device=accelerator.device,
        images=recipe.data.has_images,
        # the base arm, unless it is stored in a lower precision than the student
        student_folder=base if base_arm_is_exact(config) else None,
        kept=options.teachers,
        with_teachers=arm.null is None or arm.null.type != "random_gradient",
        sharded=recipe.train.sharding == "full",
    )
    before = read_tensors(base) if accelerator.is_main_process else {}
    mask, projections, lora = None, None, arm.lora
    if arm.mask is not None:
        mask = read_mask(run, config, arm.mask)
    if arm.subspace is not None:
        projections = _read_projections(
            run, config, arm.subspace, dict(pair.student.model.named_parameters())
        )
    if lora is not None and lora.like is not None:
        lora = lora.with_parameters(inputs["like"]["parameters"])
    data = load_data(recipe.data, recipe.prompts, arm.seed, recipe.teachers.values())
    started = time.perf_counter()
    folder = run.arm(name)

    def keep(step: int, trainable: Trainable) -> None:
        with whole_folder(run.step_checkpoint(name, step)) as checkpoint:
            text = model_card(
                config, name, f"{_describe(recipe, arm)}, {step} of them done", inputs
            )
            save(pair.student, checkpoint, text, trainable.merged(before))

    with distributed.together(accelerator):
        tracking = config.tracking if accelerator.is_main_process else TrackingConfig()
        settings = {**config.model_dump(mode="json"), **recipe.model_dump(mode="json")}
        trackers = open_trackers(
            tracking, config.name, run.root.resolve().name, name, folder, settings
        )
    every = config.eval.during.every if config.eval.during else None
    trainable = distill(
        pair,
        data,
        recipe,
        folder,
        arm.seed,
        # without the checkpoint's buffers (running means of a tower), which are not trained
        mask and {n: mask[n] for n, _ in pair.student.model.named_parameters()},
        Hooks(keep, options.evaluate, every, trackers),
        projections=projections,
        lora=lora,
        identity=digest_json(inputs),
        accelerator=accelerator,
        null=arm.null,
        replay=None if replayed is None else run.arm(replayed),
        teacher_cache=run.root / "teacher-cache",
    ).trainable

    def write() -> None:
        if options.predict is not None:
            about, share = read_json(folder / "memory.json"), trainable.count / trainable.total
            about["predicted"] = options.predict(pair, recipe, share, about)
            write_json(folder / "memory.json", about)
        merged = trainable.merged(before)
        if isinstance(trainable, LoraTrainable):
            trainable.save_adapter(folder / "adapter", config.student.model)
        with whole_folder(run.checkpoint(name)) as checkpoint:
            text = model_card(config, name, _describe(recipe, arm), inputs)
            save(pair.student, checkpoint, text, merged)
        changes = count_changed(before, read_tensors(run.checkpoint(name)), mask)
        if changes["off_mask"] is not None:
            with stored_tensors(pair.student) as own:
                moved = changes["off_mask"]["moved_in_memory"] = trainable.moved_off_mask(own)
            changes["off_mask_unmoved"] &= moved == 0
        record_checkpoint(
            its,
            config,
            name,
            "distill",
            mask=arm.mask,
            seed=arm.seed,
            discovery_seeds=discovery_seeds(config, name),
            steps=recipe.train.steps,
            total_parameters=trainable.total,
            trained_parameters=trainable.count,
            density=trainable.count / trainable.total,
            **({"lora": _lora_entry(trainable, lora, changes)} if lora is not None else {}),
            seconds=round(time.perf_counter() - started, 1),
            device=str(accelerator.device),
            processes=accelerator.num_processes,
            notes=recipe.notes,
            values=recipe.train.master,
            execution=execution_of(recipe),
            **changes,
            identity=weight_agreement(run, config, name, before, mask),
        )
        shutil.rmtree(folder / "state", ignore_errors=True)

    distributed.main_process_alone(accelerator, write)


def _clear(folder: Path, identity: str) -> None:
    """Removes early checkpoints and logs of an arm made from other inputs, unless its saved state will be resumed."""
    if is_state_of(folder / "state", identity):
        return
    for path in folder.glob("*"):
        if path.name != "state":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lora_entry(trainable: Trainable, lora: Lora, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The size of an arm's LoRA in its record, beside what was asked for, and the density of its merged delta."""
    assert isinstance(trainable, LoraTrainable)
    on = changes["on_mask"]
    return {
        **trainable.size._asdict(),
        "alpha": trainable.alpha,
        "wanted_parameters": lora.parameters,
        "merged_density": on["moved"] / on["coordinates"],
    }


def _describe(recipe: ArmRecipe, arm: DistillArm) -> str:
    """A short description of an arm's training for its model card."""
    text = f"{training_of(recipe)}, {recipe.objective}, {recipe.train.steps} steps"
    text += f", mask {arm.mask}" if arm.mask else ""
    text += ", a LoRA (../adapter), merged" if arm.lora else ""
    text += f", signal null {arm.null.label}" if arm.null else ""
    if arm.subspace:
        text += f", gradients projected on rank {arm.subspace.rank} of {arm.subspace.of}"
    return text


def _read_projections(
    run: RunFolder, config: ExperimentConfig, subspace: Subspace, parameters: Mapping[str, Tensor]
) -> dict[str, Projection]:
    """The projection of each matrix onto the subspace of its early update."""
    found = {
        pair.name: update_projection(pair.delta, subspace.rank, subspace.side)
        for pair in checkpoint_deltas(run, config, subspace.of)
        if pair.name in parameters
    }
    return {name: projection for name, projection in found.items() if projection is not None}


def write_tuned(its: Stage, config: ExperimentConfig, name: str) -> None:
    """Makes the files of a tuned arm from those of its chosen candidate, as hard links where the disk has them."""
    run = its.run
    about = dict(read_record(run.sweep(str(config.sweep_group(name)))))
    about.pop("inputs")
    chosen = its.inputs["chosen"]
    run.checksums.check(f"arms/{chosen}")
    record, source = run.arm_record(chosen), run.arm(chosen)
    for path in source.rglob("*"):
        if path.is_file() and path != record:
            to = run.arm(name) / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, to)
            except OSError:
                shutil.copy2(path, to)
    content = {key: value for key, value in read_record(record).items() if key != "inputs"}
    about["budget"] = config.budget_of(name)
    content |= {"arm": name, "candidate": chosen, "sweep": about}
    its.finish(content, [p for p in run.arm(name).rglob("*") if p.is_file()])


def write_transplant(
    its: Stage, config: ExperimentConfig, name: str, arm: TransplantArm, options: ArmOptions
) -> None:
    """Writes the base plus the other arm's delta on the mask, or a part of that delta, without training."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        pairs = checkpoint_deltas(its.run, config, arm.of)
        if arm.part is None:
            assert mask is not None
            return {pair.name: transplanted(pair, mask[pair.name]) for pair in pairs}

        def part(pair: TensorDelta) -> Tensor:
            found = part_of_update(pair, arm)
            return found if mask is None else found.where(mask[pair.name], 0.0)

        factor = 1.0
        if arm.norm_of is not None:
            own = norm_over_tensors(part(pair) for pair in pairs)
            if own == 0:
                raise RunError(f"the part of {arm.of} is zero, so it has no direction to scale")
            factor = delta_norm(checkpoint_deltas(its.run, config, arm.norm_of)) / own
        return {pair.name: moved(pair, factor * part(pair)) for pair in pairs}

    what = f"the base with {arm.of}'s values"
    if arm.part is not None:
        rank = f"rank {arm.rank or arm.rank_fraction}"
        what = f"the base plus the {arm.part} part, {rank}, of the delta of {arm.of}"
        what += f", scaled to the norm of {arm.norm_of}'s" if arm.norm_of else ""
    what += f" on mask {arm.mask}" if arm.mask else ""
    _write_untrained(its, config, name, arm, what, change, options)


def part_of_update(pair: TensorDelta, arm: TransplantArm) -> Tensor:
    """The part of one tensor's delta that an arm transplants, float64; of a vector all is off the subspaces."""
    delta = pair.trained.double() - pair.base.double()
    if delta.ndim < 2:
        return delta if arm.part in ("off_principal", "off_random") else torch.zeros_like(delta)
    stream = None
    if arm.seed is not None:
        stream = seeding.generator("cpu", "subspaces", arm.seed, pair.name)
    rank = rank_of(delta.flatten(1), arm.rank, arm.rank_fraction)
    inner = inner_part(pair.base, delta, rank, stream)
    return inner if arm.part in ("principal", "random") else delta - inner


def write_merge(
    its: Stage, config: ExperimentConfig, name: str, arm: MergeArm, options: ArmOptions
) -> None:
    """Writes the base plus the merged deltas of several arms, without training."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        several = [checkpoint_deltas(its.run, config, text) for text in arm.of]
        kept = None
        density = 0.2 if arm.density is None else arm.density
        if arm.method == "ties" and density < 1:
            trim = TopFractionMask(fraction=density, scope="global")
            kept = [build_mask(trim, pairs) for pairs in several]
        found = {}
        for pairs in zip(*several, strict=True):
            (tensor,) = {
                pair.name for pair in pairs
            }  # each has all parameters of the base, by name
            own = None if kept is None else [marked[tensor] for marked in kept]
            value = merged(pairs, arm.method, arm.scale, own)
            if mask is not None:
                value = value.where(mask[tensor], pairs[0].base.to(value.dtype))
            found[tensor] = value
        return found

    what = (
        f"the base plus {arm.scale:g} times the {arm.method} of the deltas of {', '.join(arm.of)}"
    )
    for key in ("components", "layers", "modules"):
        what += f", {key} {', '.join(map(str, dict(arm)[key]))}" if dict(arm)[key] else ""
    what += f", on mask {arm.mask}" if arm.mask else ""
    _write_untrained(its, config, name, arm, what, change, options)


def write_extrapolation(
    its: Stage, config: ExperimentConfig, name: str, arm: ExtrapolateArm, options: ArmOptions
) -> None:
    """Writes the base plus a multiple of an early delta, without training."""

    def change(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        factor, pairs = arm.factor, checkpoint_deltas(its.run, config, arm.of)
        if arm.norm_of is not None:
            early = delta_norm(pairs)
            if early == 0:
                raise RunError(f"{arm.of} equals the base, so its delta has no direction")
            factor = delta_norm(checkpoint_deltas(its.run, config, arm.norm_of)) / early
        assert factor is not None
        return {
            p.name: extrapolated(p, factor, None if mask is None else mask[p.name]) for p in pairs
        }

    length = (
        arm.factor if arm.norm_of is None else f"(norm of the delta of {arm.norm_of} / its norm)"
    )
    what = f"the base plus {length} times the delta of {arm.of}"
    what += f" on mask {arm.mask}" if arm.mask else ""
    _write_untrained(its, config, name, arm, what, change, options)


def _write_untrained(
    its: Stage,
    config: ExperimentConfig,
    name: str,
    arm: UntrainedArm,
    what: str,
    change: Callable[[Mapping[str, Tensor] | None], dict[str, Tensor]],
    options: ArmOptions,
) -> None:
    """Writes an arm that is the base with some tensors replaced; `change(mask)` returns them.

    The mask is the arm's, on the parameters that a merge selects.
    """
    run, inputs = its.run, its.inputs
    refuse_other_base(
        other_bases_of_arm(run, config, arm), inputs["base"], options.allow_other_base
    )
    mask = None if arm.mask is None else read_mask(run, config, arm.mask)
    if isinstance(arm, MergeArm) and arm.is_given:
        selected = whole_parameters(checkpoint_deltas(run, config, arm.of[0]), arm)
        mask = selected if mask is None else combine("intersection", [mask, selected])
    base = run.checkpoint(config.base_arm)
    before = read_tensors(base)
    # only its configuration is used: all weights that are written are in `before`
    student = load_configured(config.student, DTYPES[config.precision.resolved], folder=base)
    with whole_folder(run.checkpoint(name)) as folder:
        save(student, folder, model_card(config, name, what, inputs), {**before, **change(mask)})
    total = student.model.num_parameters()
    count = total if mask is None else sum(int(marked.sum()) for marked in mask.values())
    record_checkpoint(
        its,
        config,
        name,
        arm.type,
        mask=arm.mask,
        total_parameters=total,
        trained_parameters=0,
        density=count / total,
        **count_changed(before, read_tensors(run.checkpoint(name)), mask),
        identity=weight_agreement(run, config, name, before, mask),
    )
