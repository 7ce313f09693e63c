"""Checks of a run's inputs before its first step: `vlopd run`, `vlopd check`.

Most are of file headers and configurations. Values are read only of what would first be read after other arms have
trained: checkpoints in folders, teachers of single arms. Every problem is one line that names the thing and the
remedy; evals/preflight.py has those of the tasks. An input refused here would otherwise stop a run halfway.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from vlopd.config.arms import (
    CheckpointArm,
    DistillArm,
    ImportedArm,
    MergeArm,
    TeacherArm,
    checkpoints_of,
    masks_read,
)
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import (
    ComplementMask,
    DifferenceMask,
    FileMask,
    IntersectionMask,
    MagnitudeMask,
    MaskConfig,
    PrincipalMask,
    RandomMask,
    Reference,
    Selection,
    TopFractionMask,
    UnionMask,
    WholeMask,
)
from vlopd.config.models import ModelConfig, TeacherConfig
from vlopd.config.objective import FunctionLoss
from vlopd.config.recipe import ArmRecipe
from vlopd.config.training import Component, TrainConfig
from vlopd.errors import ConfigError, PluginError, RunError, UserError
from vlopd.masks.files import check_shapes, load_mask
from vlopd.masks.foreign import is_foreign, open_foreign
from vlopd.masks.importing import align, in_parameter_names
from vlopd.masks.rules import Mask, whole_parameters
from vlopd.models import parameter_names
from vlopd.models.load import (
    DTYPES,
    check_files,
    check_tokens,
    load_configured,
    load_model_config,
    local_folder,
    resolve,
)
from vlopd.models.loaded import LoadedModel
from vlopd.preflight.rows import refuse_rows
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import checkpoint_folder, hub_folder, score_files
from vlopd.seeding import generator
from vlopd.train.log import refuse_trackers
from vlopd.train.lora import adapter_size
from vlopd.train.losses import Sampled, token_divergence
from vlopd.train.optimizers import refuse_missing_components
from vlopd.train.pair import ModelPair, load_pair, without_weights
from vlopd.weights import delta
from vlopd.weights.checks import refuse_unlike_config
from vlopd.weights.delta import TensorDelta


class _Problems:
    """Error lines, without repeats."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def catch(self, where: str = ""):
        """Turns a UserError into a line."""
        try:
            yield
        except UserError as error:
            line = " ".join(f"{where}{error}".split())
            if line not in self.lines:
                self.lines.append(line)


def find_problems(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """The errors that would stop these arms, or those that they are made from, one line each."""
    found = _Problems()
    needed = list(dict.fromkeys(a for name in names for a in (name, *config.ancestors(name))))
    with found.catch():
        refuse_trackers(config.tracking)
    for name in needed:
        with found.catch(f"arms.{name}: "):
            refuse_missing_files(config, name)
    before = len(found.lines)
    for use in config.plugins_of(needed):
        with found.catch():
            use.check()
    if len(found.lines) > before:
        return found.lines  # data, rows and models cannot be checked without them
    trained = {n: arm for n in needed if isinstance(arm := config.arms[n], DistillArm)}
    for name, arm in trained.items():
        with found.catch(f"arms.{name}: " if arm.own else ""):
            split_among_processes(config.recipe_of(arm).train)
    before = len(found.lines)
    for model in models_of(config, needed):
        with found.catch():
            refuse_unfit(model)
    if len(found.lines) > before:
        return found.lines  # nothing more can be checked with such a model
    extents: dict[str, Extents] = {}
    with suppress(UserError):  # a student that cannot be read is found below, with its teachers
        student = without_weights(config.student)
        for mask in dict.fromkeys(m for n in needed for m in masks_read(config.arms[n])):
            with found.catch():
                add_extents(extents, config, mask, student)
        for name in needed:
            arm = config.arms[name]
            if isinstance(arm, MergeArm) and arm.is_given:
                with found.catch(f"arms.{name}: "):
                    selected_parameters(arm, student)
    for text in dict.fromkeys(t for n in needed for t in references_of(config, n)):
        with found.catch(), suppress(NotThere):
            refuse_another_model(config, text)
    pairs: dict[str, ModelPair] = {}
    seeds: dict[str, list[int]] = {}
    recipes: dict[str, tuple[str, ArmRecipe, ModelPair]] = {}
    for name, arm in trained.items():
        recipe = config.recipe_of(arm)
        where = f"arms.{name}: " if arm.own else ""
        with found.catch(where):
            models = recipe.model_dump_json(include={"teacher", "data"})
            if models not in pairs:
                pairs[models] = load_pair(
                    config.student,
                    recipe.teacher,
                    device="meta",
                    images=recipe.data.has_images,
                    load=without_weights,
                )
            key = recipe.model_dump_json(include={"teacher", "data", "rollout", "reward", "train"})
            recipes.setdefault(key, (where, recipe, pairs[models]))
            seeds.setdefault(key, []).append(arm.seed)
            if isinstance(recipe.loss, FunctionLoss):
                try_loss(recipe.loss, pairs[models].vocabulary.size)
            if arm.mask is None or arm.mask in extents:
                marked = None if arm.mask is None else extents[arm.mask]
                freeze, student = recipe.train.freeze, pairs[models].student
                refuse_nothing_to_train(freeze, name, arm.mask, marked, student)
            if (lora := arm.lora) is not None:
                lora = lora if lora.like is None else lora.with_parameters(1)
                adapter_size(pairs[models].student.model, lora, recipe.train.freeze)
            names_in_model = dict(pairs[models].student.model.named_parameters())
            refuse_missing_components(recipe.optim, names_in_model)
    for key, (where, recipe, pair) in recipes.items():
        with found.catch(where):
            refuse_rows(recipe, pair, sorted(set(seeds[key])))
    if not found.lines:  # the most expensive check, loading whole models, comes last
        for model in teachers_loaded_late(config, needed):
            with found.catch():
                load_configured(model, DTYPES[config.precision.resolved])
    found.lines += find_geometry_problems(config, [n for n in config.geometry.arms if n in names])
    return found.lines


def find_geometry_problems(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """The errors that would stop the geometry of these arms, one line each."""
    found = _Problems()
    for name in names:
        with found.catch("geometry.arms: "):
            if isinstance(config.arms[name], TeacherArm):
                refuse_another_shape(config, name)
    return found.lines


def evaluated(config: ExperimentConfig, names: Sequence[str]) -> dict[str, LoadedModel]:
    """The models that arms are evaluated with, without weights, by their config keys.

    Raises UserError where a configuration or a tokenizer cannot be read.
    """
    found: dict[str, LoadedModel] = {}
    for name in names:
        arm = config.arms[name]
        if isinstance(arm, TeacherArm):
            model = config.teacher_of(arm).loaded_from(config.student)
            found[f"arms.{name}"] = without_weights(model)
        elif isinstance(arm, CheckpointArm):
            model = config.checkpoint_of(arm)
            try:
                found[f"arms.{name}"] = without_weights(model)
            except UserError as error:
                raise type(error)(f"arms.{name}: {error}") from None  # as `find_problems` has it
        elif not isinstance(arm, ImportedArm) and "student" not in found:
            found["student"] = without_weights(config.student)
    return found


def refuse_another_shape(config: ExperimentConfig, name: str) -> None:
    """Raises ConfigError where a teacher is of another architecture than the student: there is no delta."""
    arm = config.arms[name]
    assert isinstance(arm, TeacherArm)
    ours, theirs = (
        {n: p.shape for n, p in without_weights(model).model.named_parameters()}
        for model in (config.student, config.teacher_of(arm).loaded_from(config.student))
    )
    for parameter, shape in ours.items():
        if theirs.get(parameter) != shape:
            there = tuple(theirs[parameter]) if parameter in theirs else "not there"
            raise ConfigError(
                f"{name} is of another shape than the student ({parameter} is {tuple(shape)}, there {there}): it has "
                "no delta; leave it out"
            )


# -------------------------------------------------------------------------------- files and masks


def refuse_missing_files(config: ExperimentConfig, name: str) -> None:
    """Raises UserError where checkpoints or scores that an arm names are not there."""
    arm = config.arms[name]
    for text in references_of(config, name):
        folder_of(config, text)
    if isinstance(arm, ImportedArm):
        score_files(Path(arm.results))
    if isinstance(arm, CheckpointArm):
        load_model_config(arm.model)
        if Path(arm.model).is_dir():
            refuse_no_weights(Path(arm.model))


def references_of(config: ExperimentConfig, name: str) -> list[str]:
    """The folders outside of the run that an arm reads, itself or through its mask, as the config names them."""
    arm = config.arms[name]
    of_masks = [text for mask in masks_read(arm) for text in config.read_by(mask)]
    texts = [*checkpoints_of(arm).values(), *of_masks]
    return [text for text in texts if Reference.parse(text).path is not None]


class NotThere(RunError):
    """A folder that is named is not there, or has no weights."""


def folder_of(config: ExperimentConfig, text: str) -> Path:
    """The folder of a checkpoint outside of the run. Raises NotThere."""
    try:
        folder = checkpoint_folder(RunFolder(""), config, text)
        refuse_no_weights(folder)
    except RunError as error:
        raise NotThere(str(error)) from None
    return folder


def refuse_no_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise RunError(f"{folder} has no *.safetensors; name a checkpoint folder")


def refuse_another_model(config: ExperimentConfig, text: str) -> None:
    """Raises UserError where a folder's checkpoint lacks a parameter of the student, or has one that is not finite.

    Reads both, tensor by tensor, as the arms and masks that are made from it will.
    """
    folder = folder_of(config, text)
    base = hub_folder(resolve(config.student.model), config.student.revision)
    for _ in delta.stream_whole(base, folder, parameter_names.classify):
        pass


def models_of(config: ExperimentConfig, names: Sequence[str]) -> list[ModelConfig]:
    """The student, and the teachers of these arms, without repeats."""
    arms = [config.arms[name] for name in names]
    found: list[ModelConfig] = [config.student]
    for arm in arms:
        if isinstance(arm, DistillArm):
            found += [t for t in config.recipe_of(arm).teachers.values() if not t.is_student]
        elif isinstance(arm, TeacherArm):
            found.append(config.teacher_of(arm).loaded_from(config.student))
    return list({model.model_dump_json(): model for model in found}.values())


def refuse_unfit(model: ModelConfig) -> None:
    """Raises UserError for a model whose tokenizer, template and files, of which headers are read, do not fit its
    config.json."""
    check_tokens(without_weights(model))
    folder = local_folder(model.model, model.revision)
    if folder is not None:
        check_files(model.model, folder)
        refuse_unlike_config(folder)


def teachers_loaded_late(config: ExperimentConfig, names: Sequence[str]) -> list[ModelConfig]:
    """The teachers that are first loaded after another arm has trained; those of the first arm are loaded at once."""
    arms = [config.arms[name] for name in names]
    trained = [config.recipe_of(arm) for arm in arms if isinstance(arm, DistillArm)]
    if not trained:
        return []
    shared = list(config.teachers.values())
    at_once = {where(t) for t in trained[0].teachers.values() if t in shared}
    late: list[TeacherConfig] = [t for recipe in trained for t in recipe.teachers.values()]
    late += [config.teacher_of(arm) for arm in arms if isinstance(arm, TeacherArm)]
    found = {where(teacher): teacher for teacher in late if not teacher.is_student}
    return [teacher for key, teacher in found.items() if key not in at_once]


def where(model: ModelConfig) -> tuple[str, str | None]:
    return model.model, model.revision


class Extent(NamedTuple):
    """How much of a parameter is in a mask, as far as its rule determines."""

    some: bool
    """Some coordinate may be in the mask."""
    all: bool
    """Every coordinate is certainly in the mask."""


Extents = dict[str, Extent]
"""By parameter."""


def add_extents(
    known: dict[str, Extents], config: ExperimentConfig, mask: str, student: LoadedModel
) -> Extents:
    """Adds to `known`, by name, the extents of a mask and of those that it is made from; returns its own.

    Raises UserError, with the name of the mask, for one that is of another model.
    """
    if mask in known:
        return known[mask]
    rule = config.masks[mask]
    parts = [add_extents(known, config, other, student) for other in rule.combines]
    parameters = dict(student.model.named_parameters())
    try:
        match rule:
            case WholeMask():
                taken = selected_parameters(rule, student)
                known[mask] = {n: Extent(taken[n], taken[n]) for n in parameters}
            case FileMask():
                held = mask_of_file(Path(rule.path), student)
                known[mask] = {n: Extent(bool(m.any()), bool(m.all())) for n, m in held.items()}
            case _:
                columns = {n: [part[n] for part in parts] for n in parameters}
                if isinstance(rule, RandomMask) and rule.match in ("global", "module"):
                    everywhere = [part[n] for part in parts for n in parameters]
                    drawn = Extent(any(e.some for e in everywhere), all(e.all for e in everywhere))
                    columns = {n: [drawn] for n in parameters}
                known[mask] = {n: extent(rule, columns[n]) for n in parameters}
    except UserError as error:
        raise type(error)(f"masks.{mask}: {error}") from None
    return known[mask]


def selected_parameters(rule: Selection, student: LoadedModel) -> dict[str, bool]:
    """Whether a rule selects each parameter. Raises ConfigError for a name that the student does not have."""
    one = torch.ones(1)
    names = [parameter_names.classify(n) for n, _ in student.model.named_parameters()]
    pairs = [TensorDelta(where, one, one) for where in names]
    return {n: bool(m.any()) for n, m in whole_parameters(pairs, rule).items()}


def extent(rule: MaskConfig, parts: Sequence[Extent]) -> Extent:
    """Of one parameter in a mask, from its extents in those that the mask is made from."""
    match rule:
        case ComplementMask():
            return Extent(not parts[0].all, not parts[0].some)
        case UnionMask():
            return Extent(any(e.some for e in parts), any(e.all for e in parts))
        case IntersectionMask():
            return Extent(all(e.some for e in parts), all(e.all for e in parts))
        case DifferenceMask():
            first, *others = parts
            return Extent(
                first.some and not any(e.all for e in others),
                first.all and not any(e.some for e in others),
            )
        case RandomMask():
            return parts[0]
        case MagnitudeMask() | TopFractionMask() | PrincipalMask():
            return Extent(True, rule.fraction == 1)
        case _:  # from an update that is not known yet
            return Extent(True, False)


def mask_of_file(path: Path, student: LoadedModel) -> Mask:
    """A mask file's parameters. Raises RunError where it is damaged, or of another model."""
    shapes = {n: tuple(p.shape) for n, p in student.model.named_parameters()}
    if is_foreign(path):
        buffers = student.model.state_dict().keys() - shapes.keys()
        return align(open_foreign(path), shapes, student.model.config, buffers).mask
    held = in_parameter_names(load_mask(path)[0], student)
    try:
        check_shapes(held, shapes)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    return held


def refuse_nothing_to_train(
    freeze: Sequence[Component],
    name: str,
    mask: str | None,
    marked: Extents | None,
    student: LoadedModel,
) -> None:
    """Raises ConfigError for an arm without a coordinate to train; `marked` are its mask's extents."""
    model = student.model
    if marked is not None and not any(e.some for e in marked.values()):
        raise ConfigError(
            f"arms.{name}: mask {mask!r} has no coordinate, so nothing is left to train; change masks.{mask}"
        )
    try:
        parameter_names.freeze(model, freeze)
        left = [n for n, p in model.named_parameters() if p.requires_grad]
    finally:
        model.requires_grad_(True)
    if not any(marked is None or marked[n].some for n in left):
        raise ConfigError(
            f"arms.{name}: train.freeze = {list(freeze)} leaves nothing of mask {mask!r} to train"
        )


def split_among_processes(train: TrainConfig) -> None:
    """Raises ConfigError where a step's prompts do not divide among a launcher's processes."""
    processes, prompts = int(os.environ.get("WORLD_SIZE", "1")), train.prompts_per_step
    if prompts % processes:
        raise ConfigError(
            f"train.prompts_per_step = {prompts} does not divide among {processes} processes"
        )


def try_loss(loss: FunctionLoss, size: int) -> None:
    """Calls a plug-in loss on random log-probs [2, `size`].

    Raises PluginError where it fails, or where it or its gradient is not finite.
    """
    draws = generator("cpu", "trial of a loss")
    student = torch.randn(2, size, generator=draws).requires_grad_()
    teacher = torch.randn(2, size, generator=draws)
    made_up = Sampled(torch.zeros(2, dtype=torch.long), torch.zeros(2))
    value = token_divergence(loss, student, teacher, made_up, diagnostics=False).loss
    value.sum().backward()
    gradient = student.grad
    for what, numbers in (("value", value), ("gradient", gradient)):
        if numbers is not None and not bool(numbers.isfinite().all()):
            raise PluginError(
                f"loss = {loss.type}: its {what} is not finite on random log-probs [2, {size}]"
            )
