"""Checks of a run's inputs before its first step: `vlopd run`, `vlopd check`.

Most are of file headers and configurations. Values are read only of what would first be read after other arms have
trained: checkpoints in folders, teachers of single arms. Every finding is one line that names the thing and the
remedy; evals/preflight.py has those of the tasks. An input refused here would otherwise stop a run halfway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vlopd.config.arms import (
    CheckpointArm,
    DistillArm,
    ImportedArm,
    TeacherArm,
    checkpoints_of,
    mask_of,
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
    TopFractionMask,
    UnionMask,
    WholeMask,
)
from vlopd.config.models import ImageContext, ModelConfig, TeacherConfig
from vlopd.config.objective import FunctionLoss
from vlopd.config.recipe import ArmRecipe
from vlopd.config.training import Component, TrainConfig
from vlopd.data.dataset import StoredDataset
from vlopd.data.functions import FunctionDataset
from vlopd.data.load import load_data, order
from vlopd.data.mixture import MixtureDataset
from vlopd.errors import ConfigError, DataError, PluginError, RunError, UserError, first_line
from vlopd.masks.files import check_shapes, load_mask
from vlopd.masks.foreign import is_foreign, open_foreign
from vlopd.masks.importing import align, under_names_of
from vlopd.masks.rules import Mask, whole_parameters
from vlopd.models import families, parameter_names
from vlopd.models.load import DTYPES, load_configured, load_model_config, resolve
from vlopd.models.loaded import LoadedModel, too_long_error
from vlopd.plugins import Plugin
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import checkpoint_folder, hub_folder, score_files
from vlopd.seeding import generator
from vlopd.train.log import refuse_missing_trackers
from vlopd.train.losses import on_support
from vlopd.train.optimizers import refuse_missing_components
from vlopd.train.pair import ModelPair, load_pair, without_weights
from vlopd.train.rewards import RULES, answer_of, scores
from vlopd.train.rollouts import from_data
from vlopd.train.teacher_context import field_of
from vlopd.types import Example
from vlopd.weights import delta
from vlopd.weights.delta import TensorDelta

FEW = 8
"""Rows whose prompts are rendered in full, pictures included."""
BUILT_IN_ROWS = 64
"""Rows that are checked of a built-in world; they are alike."""
CLOSE_ROWS = 64
"""Rows with pictures that may be too long and are rendered in full, longest first."""


class Findings:
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


def findings(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """The errors that would stop these arms, or those that they are made from, one line each."""
    found = Findings()
    needed = list(dict.fromkeys(a for name in names for a in (name, *config.ancestors(name))))
    with found.catch():
        refuse_missing_trackers(config.tracking.trackers)
    for name in needed:
        with found.catch(f"arms.{name}: "):
            refuse_missing_files(config, name)
    unusable = False
    for use in config.plugins_of(needed):
        with found.catch():
            use.check()
            continue
        unusable = True
    if unusable:
        return found.lines  # data, rows and models cannot be checked without them
    trained = {n: arm for n in needed if isinstance(arm := config.arms[n], DistillArm)}
    for name, arm in trained.items():
        with found.catch(f"arms.{name}: " if arm.own else ""):
            split_among_processes(config.recipe_of(arm).train)
    extents: dict[str, Extents] = {}
    with suppress(UserError):  # a student that cannot be read is found below, with its teachers
        student = without_weights(config.student)
        for mask in dict.fromkeys(m for n in needed if (m := mask_of(config.arms[n])) is not None):
            with found.catch():
                add_extents(extents, config, mask, student)
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
            names_in_model = dict(pairs[models].student.model.named_parameters())
            refuse_missing_components(recipe.optim, names_in_model)
    for key, (where, recipe, pair) in recipes.items():
        with found.catch(where):
            refuse_rows(recipe, pair, sorted(set(seeds[key])))
    if not found.lines:  # the most expensive check, loading whole models, comes last
        for model in teachers_loaded_late(config, needed):
            with found.catch():
                load_configured(model, DTYPES[config.precision.resolved])
    found.lines += geometry_findings(config, [n for n in config.geometry.arms if n in names])
    return found.lines


def geometry_findings(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """The errors that would stop the geometry of these arms, one line each."""
    found = Findings()
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
                raise type(error)(f"arms.{name}: {error}") from None  # as `findings` has it
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
    mask = mask_of(arm)
    texts = [*checkpoints_of(arm).values(), *([] if mask is None else config.read_by(mask))]
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
                one = torch.ones(1)
                pairs = [TensorDelta(parameter_names.classify(n), one, one) for n in parameters]
                taken = {n: bool(m.any()) for n, m in whole_parameters(pairs, rule).items()}
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
    parameters = dict(student.model.named_parameters())
    others = set(student.model.state_dict()) - set(parameters)  # running means, tied names
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    if is_foreign(path):
        return align(open_foreign(path), shapes, student.model.config, others).mask
    held = {n: m for n, m in load_mask(path)[0].items() if n not in others}
    held = under_names_of(held, shapes, student.model.config)
    try:
        check_shapes(held, {n: p.shape for n, p in parameters.items()})
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


# ------------------------------------------------------------------------------- models and data


class Reader(NamedTuple):
    """A model that reads the data, with its view of an example."""

    loaded: LoadedModel
    view: Callable[[Example], Example]
    quick_view: Callable[[Example], Example]
    """The same for an example whose pictures are not decoded."""


def refuse_rows(recipe: ArmRecipe, pair: ModelPair, seeds: Sequence[int]) -> None:
    """Raises UserError for the first row of those that training uses that cannot be used; if too long, with the count.

    Of a file all rows are read, with the headers of their pictures. Prompts are counted in bytes, which are never
    fewer than tokens, and tokenized where that is too many; those with pictures that may not fit are rendered in full.
    """
    rollout = recipe.rollout
    data = load_data(recipe.data, recipe.prompts, seeds[0], recipe.teachers.values())
    count = min(len(data), recipe.prompts)
    used: Sequence[int] = range(min(count, BUILT_IN_ROWS))
    quick = data
    if isinstance(data, FunctionDataset) and not recipe.data.has_images:
        used = range(count)  # they need not be alike
    if isinstance(data, MixtureDataset):
        count = recipe.prompts  # a row may be drawn again before another is first
    if isinstance(data, StoredDataset):
        used = sorted({i for seed in seeds for i in order(data, 0, count, seed)})
        quick = data.with_headers_only()
    shown = used[:FEW]
    if isinstance(data, MixtureDataset):
        used, shown = data.at_most(used, BUILT_IN_ROWS, generated=True), data.at_most(used, FEW)
    only_data = set(rollout.source.shares) == {"data"}
    measured = [Measured() for _ in range(1 + len(pair.teachers))]
    judges = [*([] if recipe.reward is None else [recipe.reward.rule]), *recipe.train.metrics]
    if own := [judge for judge in judges if isinstance(judge, Plugin)]:
        for example in (data[i] for i in used[:BUILT_IN_ROWS]):
            for plugin in own:
                scores(plugin, [example], [""])
    for i in shown:
        for reader, so_far in zip(readers_of(pair, data[i]), measured, strict=False):
            view = reader.view(data[i])
            so_far.add(view.images, tokens_of(reader.loaded, view))
    close: dict[int, tuple[float, int]] = {}  # tokens that it may be too long by, its new tokens
    long: dict[int, DataError] = {}
    for i in used:
        example = quick[i]
        answer_tokens = refuse_row(recipe, pair, example)
        new_tokens = answer_tokens if only_data else rollout.max_new_tokens
        for reader, so_far in zip(readers_of(pair, example), measured, strict=False):
            view, limit = reader.quick_view(example), reader.loaded.context_length
            text = text_of(reader.loaded, view)
            if limit is None or (over := so_far.at_most(view, text) + new_tokens - limit) <= 0:
                continue
            if view.images:
                close[i] = max(close.get(i, (0.0, 0)), (over, new_tokens))
            elif error := beyond(reader.loaded, view, new_tokens):
                long[i] = error
    for i in sorted(close, key=lambda i: close[i], reverse=True)[:CLOSE_ROWS]:
        example = data[i]
        for reader in readers_of(pair, example):
            if error := beyond(reader.loaded, reader.view(example), close[i][1]):
                long.setdefault(i, error)
    if long:
        more = f"; {len(long) - 1} more of {len(used)} rows are too long as well"
        raise DataError(f"{long[min(long)]}{more if len(long) > 1 else ''}")


def beyond(loaded: LoadedModel, example: Example, new_tokens: int) -> DataError | None:
    """The error for a prompt that does not fit the context with the new tokens; None where it fits."""
    length, limit = tokens_of(loaded, example), loaded.context_length
    if limit is None or length + new_tokens <= limit:
        return None
    return too_long_error(example.id, length, new_tokens, loaded)


def refuse_row(recipe: ArmRecipe, pair: ModelPair, example: Example) -> int:
    """Raises UserError where a row lacks what routes, rewards or completions from the data need.

    Returns the number of tokens of its answer as a completion, 0 where no completions are from the data.
    """
    pair.assign([example])
    rule = None if recipe.reward is None else recipe.reward.rule
    if rule is not None and not isinstance(rule, Plugin):
        answer_of(example)
        RULES[rule](example, "")
    if "data" not in recipe.rollout.source.shares:
        return 0
    return from_data(pair, [example], recipe.rollout.max_new_tokens).ids.shape[1]


def try_loss(loss: FunctionLoss, size: int) -> None:
    """Calls the user's own loss on random log-probs [2, `size`].

    Raises PluginError where it fails, or where it or its gradient is not finite.
    """
    draws = generator("cpu", "trial of a loss")
    student = torch.randn(2, size, generator=draws).log_softmax(-1).requires_grad_()
    teacher = torch.randn(2, size, generator=draws).log_softmax(-1)
    value = on_support(loss, student, teacher)
    value.sum().backward()
    gradient = student.grad
    for what, numbers in (("value", value), ("gradient", gradient)):
        if numbers is not None and not bool(numbers.isfinite().all()):
            raise PluginError(
                f"loss = {loss.type}: its {what} is not finite on random log-probs [2, {size}]"
            )


def readers_of(pair: ModelPair, example: Example) -> list[Reader]:
    """The student and the teachers that read an example."""
    found = [Reader(pair.student, as_it_is, as_it_is)]
    for teacher in (member for each, _ in pair.assign([example]) for member in each.members):
        quick = teacher.view
        if isinstance(teacher.context, ImageContext):  # a crop would decode the picture
            quick = partial(with_field, teacher.context.column)
        found.append(Reader(teacher.loaded, teacher.view, quick))
    return found


def as_it_is(example: Example) -> Example:
    return example


def with_field(column: str, example: Example) -> Example:
    """The example, if it has the field. Raises UserError where not."""
    field_of(example, column)
    return example


class Measured:
    """Tokens per picture of a model, from prompts rendered in full."""

    def __init__(self) -> None:
        self.tokens, self.pixels = 0.0, 1

    def add(self, images: Sequence[Image.Image], tokens: int) -> None:
        if images:
            self.tokens = max(self.tokens, tokens / len(images))
            self.pixels = max(self.pixels, max(pixels(image) for image in images))

    def at_most(self, example: Example, text: str) -> float:
        """An upper bound on a prompt's tokens; infinite where no picture was measured."""
        of_pictures = sum(
            self.tokens * max(1.0, pixels(image) / self.pixels) if self.tokens else float("inf")
            for image in example.images
        )
        return len(text.encode()) + of_pictures


def pixels(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def text_of(loaded: LoadedModel, example: Example) -> str:
    """The prompt before pictures are expanded. Raises UserError with the example's id where it cannot be rendered."""
    try:
        return loaded.render_text(example)
    except UserError:
        raise
    except Exception as error:  # a template may raise anything
        raise unreadable(loaded, example, error) from None


def tokens_of(loaded: LoadedModel, example: Example) -> int:
    """The length of a prompt in tokens. Raises UserError with the example's id where it cannot be tokenized."""
    text = text_of(loaded, example)
    try:
        prompts = families.encode(loaded.processor, [text], [example.images], loaded.sees_images)
    except UserError:
        raise
    except Exception as error:  # so may a processor
        raise unreadable(loaded, example, error) from None
    return prompts.input_ids.shape[1]


def unreadable(loaded: LoadedModel, example: Example, error: Exception) -> UserError:
    return UserError(
        f"example {example.id!r}: {loaded.name} cannot read its prompt: {first_line(error)}; "
        "if its chat template is at fault, set `template` beside its `model`"
    )
