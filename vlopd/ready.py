"""What can be known of a run before its first step, and is refused then: `vlopd run`, `vlopd check`.

No weights are read. Every finding is one line that names the thing and the remedy; evals/ready.py has those of the
tasks. What is found here would otherwise stop a run when the arms before it are trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vlopd import masks
from vlopd.checkpoint import RunError, RunFolder
from vlopd.config import (
    CheckpointArm,
    ConfigError,
    DataError,
    DistillArm,
    ExperimentConfig,
    FileMask,
    ImageContext,
    ImportedArm,
    Reference,
    TeacherArm,
    UserError,
    WholeMask,
    checkpoints_of,
    mask_of,
)
from vlopd.context import field_of
from vlopd.data import open_data, pick
from vlopd.data.files import FileSource
from vlopd.delta import TensorDelta
from vlopd.log import refuse_missing_trackers
from vlopd.masks.rules import whole
from vlopd.models import atlas, families
from vlopd.models.about import first_line
from vlopd.models.load import LoadedModel, load_model_config, too_long
from vlopd.pair import ModelPair, load_pair, without_weights
from vlopd.rewards import RULES, answer_of
from vlopd.sources import from_data
from vlopd.stages import scores_of
from vlopd.stages.places import checkpoint_folder
from vlopd.types import Example

FEW = 8
"""Rows whose prompts are made in full, pictures and all."""
BUILT_IN_ROWS = 64
"""Of a built-in world, whose rows are alike."""
CLOSE_ROWS = 64
"""Of the rows that may be too long, those with pictures that are made in full, longest first."""


class Findings:
    """Lines of what is wrong, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def catch(self, where: str = ""):
        """Keeps a UserError as a line and goes on."""
        try:
            yield
        except UserError as error:
            line = " ".join(f"{where}{error}".split())
            if line not in self.lines:
                self.lines.append(line)


def findings(config: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """What would stop these arms or what they are made from; empty where nothing would."""
    found = Findings()
    needed = list(dict.fromkeys(a for name in names for a in (name, *config.ancestors(name))))
    with found.catch():
        refuse_missing_trackers(config)
    for name in needed:
        with found.catch(f"arms.{name}: "):
            refuse_missing_files(config, name)
    trained = {n: arm for n in needed if isinstance(arm := config.arms[n], DistillArm)}
    pairs: dict[str, ModelPair] = {}
    seeds: dict[str, list[int]] = {}
    recipes: dict[str, tuple[str, ExperimentConfig, ModelPair]] = {}
    for name, arm in trained.items():
        its = config.of_arm(arm)
        where = f"arms.{name}: " if arm.own else ""
        with found.catch(where):
            split_among_processes(its)
        with found.catch(where):
            models = its.model_dump_json(include={"teacher", "data"})
            if models not in pairs:
                pairs[models] = load_pair(its, "meta", load=without_weights)
            key = its.model_dump_json(include={"teacher", "data", "rollout", "reward", "train"})
            recipes.setdefault(key, (where, its, pairs[models]))
            seeds.setdefault(key, []).append(arm.seed)
            refuse_nothing_to_train(config, its, name, pairs[models].student)
    for key, (where, its, pair) in recipes.items():
        with found.catch(where):
            refuse_rows(its, pair, sorted(set(seeds[key])))
    for name in config.geometry.arms:
        with found.catch("geometry.arms: "):
            if name in names and isinstance(config.arms[name], TeacherArm):
                refuse_another_shape(config, name)
    return found.lines


def evaluated(config: ExperimentConfig, names: Sequence[str]) -> dict[str, LoadedModel]:
    """The models that arms are evaluated with, without weights, by what the config calls them.

    Raises UserError where a configuration or a tokenizer cannot be read.
    """
    found: dict[str, LoadedModel] = {}
    for name in names:
        arm = config.arms[name]
        if isinstance(arm, TeacherArm):
            model = config.loaded_as(config.teacher_of(arm))
            found[f"arms.{name}"] = without_weights(model)
        elif isinstance(arm, CheckpointArm):
            model = config.student.model_copy(update={"model": arm.model})
            found[f"arms.{name}"] = without_weights(model)
        elif not isinstance(arm, ImportedArm) and "student" not in found:
            found["student"] = without_weights(config.student)
    return found


def refuse_another_shape(config: ExperimentConfig, name: str) -> None:
    """Raises ConfigError where a teacher is of another architecture than the student: there is no delta."""
    arm = config.arms[name]
    assert isinstance(arm, TeacherArm)
    ours, theirs = (
        {n: p.shape for n, p in without_weights(model).model.named_parameters()}
        for model in (config.student, config.loaded_as(config.teacher_of(arm)))
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
    """Raises UserError where checkpoints, masks or scores that an arm names are not there."""
    arm = config.arms[name]
    texts = [*checkpoints_of(arm).values()]
    mask = mask_of(arm)
    for each in [] if mask is None else masks_under(config, mask):
        rule = config.masks[each]
        texts += [] if rule.reads is None else [rule.reads]
        if isinstance(rule, FileMask) and not isinstance(arm, DistillArm):
            masks.load_mask(Path(rule.path))  # of a trained arm, with its shapes below
    for text in texts:
        if Reference.parse(text).path is not None:
            refuse_no_weights(checkpoint_folder(RunFolder(""), config, text))
    if isinstance(arm, ImportedArm):
        scores_of(Path(arm.results))
    if isinstance(arm, CheckpointArm):
        load_model_config(arm.model)
        if Path(arm.model).is_dir():
            refuse_no_weights(Path(arm.model))


def refuse_no_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise RunError(f"{folder} has no *.safetensors; name a checkpoint folder")


def masks_under(config: ExperimentConfig, mask: str) -> Iterable[str]:
    """A mask and those that it is made from."""
    yield mask
    for other in config.masks[mask].combines:
        yield from masks_under(config, other)


def refuse_nothing_to_train(
    config: ExperimentConfig, its: ExperimentConfig, name: str, student: LoadedModel
) -> None:
    """Raises UserError for a mask that is of another model, and for an arm without a coordinate to train."""
    model = student.model
    parameters = dict(model.named_parameters())
    arm = config.arms[name]
    marked: dict[str, bool] = dict.fromkeys(parameters, True)
    mask = mask_of(arm)
    for each in [] if mask is None else masks_under(config, mask):
        rule = config.masks[each]
        found: dict[str, bool] | None = None
        if isinstance(rule, WholeMask):
            one = torch.ones(1)
            pairs = [TensorDelta(atlas.classify(n), one, one) for n in parameters]
            try:
                found = {n: bool(m.any()) for n, m in whole(pairs, rule).items()}
            except ConfigError as error:
                raise ConfigError(f"masks.{each}: {error}") from None
        elif isinstance(rule, FileMask):
            held, _ = masks.load_mask(Path(rule.path))
            others = set(model.state_dict()) - set(parameters)  # running means, tied names
            held = {n: m for n, m in held.items() if n not in others}
            try:
                masks.check_shapes(held, {n: p.shape for n, p in parameters.items()})
            except RunError as error:
                raise RunError(f"masks.{each}: {rule.path}: {error}") from None
            found = {n: bool(m.any()) for n, m in held.items()}
        if each == mask and found is not None:
            marked = found
    try:
        atlas.freeze(model, its.train.freeze)
        trains = [n for n, p in parameters.items() if p.requires_grad and marked[n]]
    finally:
        model.requires_grad_(True)
    if not trains:
        raise ConfigError(
            f"arms.{name}: train.freeze = {list(its.train.freeze)} leaves nothing of mask {mask!r} to train"
        )


def split_among_processes(config: ExperimentConfig) -> None:
    """Raises ConfigError where a step's prompts do not divide among a launcher's processes."""
    processes, prompts = int(os.environ.get("WORLD_SIZE", "1")), config.train.prompts_per_step
    if prompts % processes:
        raise ConfigError(
            f"train.prompts_per_step = {prompts} does not divide among {processes} processes"
        )


# ------------------------------------------------------------------------------- models and data


class Reader(NamedTuple):
    """A model that reads the data, with what it makes of an example."""

    loaded: LoadedModel
    view: Callable[[Example], Example]
    quick_view: Callable[[Example], Example]
    """Of an example whose pictures are not decoded."""


def refuse_rows(config: ExperimentConfig, pair: ModelPair, seeds: Sequence[int]) -> None:
    """Raises UserError for the first row, of those that training uses, that cannot be used, with the count of its like.

    Of a file all rows are read, with the headers of their pictures. Prompts are counted in bytes, which are never
    fewer than tokens, and tokenized where that is too many; those with pictures that may not fit are made in full.
    """
    train, rollout = config.train, config.rollout
    data = open_data(config, train.steps * train.prompts_per_step, seeds[0])
    count = min(len(data), train.steps * train.prompts_per_step)
    used: Sequence[int] = range(min(count, BUILT_IN_ROWS))
    quick = data
    if isinstance(data, FileSource):
        every = range(len(data))
        used = sorted({i for seed in seeds for i in pick(every, 0, count, seed)})
        quick = data.unopened()
    only_data = set(rollout.source.shares) == {"data"}
    measured = [Measured() for _ in range(1 + len(pair.teachers))]
    for i in used[:FEW]:
        for reader, so_far in zip(readers_of(pair, data[i]), measured, strict=False):
            view = reader.view(data[i])
            so_far.add(view.images, tokens_of(reader.loaded, view))
    close: dict[int, tuple[float, int]] = {}  # by how much it may be too long, its new tokens
    long: dict[int, DataError] = {}
    for i in used:
        example = quick[i]
        answer_tokens = refuse_row(config, pair, example)
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
    """The error of a prompt that leaves no room for so many tokens; None where it does."""
    length, limit = tokens_of(loaded, example), loaded.context_length
    if limit is None or length + new_tokens <= limit:
        return None
    return too_long(example.id, length, new_tokens, loaded)


def refuse_row(config: ExperimentConfig, pair: ModelPair, example: Example) -> int:
    """Raises UserError where a row lacks what routes, rewards or completions from the data need.

    Returns the tokens of its answer as a completion, 0 where the data writes none.
    """
    pair.assign([example])
    if config.reward is not None:
        answer_of(example)
        RULES[config.reward.rule](example, "")
    if "data" not in config.rollout.source.shares:
        return 0
    return from_data(pair, [example], config.rollout.max_new_tokens).ids.shape[1]


def readers_of(pair: ModelPair, example: Example) -> list[Reader]:
    """The student and the teachers that grade an example."""
    ((grader, _),) = pair.assign([example])
    found = [Reader(pair.student, as_it_is, as_it_is)]
    for teacher in grader.members:
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
    """What pictures cost a model in tokens, from prompts made in full."""

    def __init__(self) -> None:
        self.tokens, self.pixels = 0.0, 1

    def add(self, images: Sequence[Image.Image], tokens: int) -> None:
        if images:
            self.tokens = max(self.tokens, tokens / len(images))
            self.pixels = max(self.pixels, max(pixels(image) for image in images))

    def at_most(self, example: Example, text: str) -> float:
        """An upper bound on the tokens of a prompt; infinite where no picture was measured."""
        of_pictures = sum(
            self.tokens * max(1.0, pixels(image) / self.pixels) if self.tokens else float("inf")
            for image in example.images
        )
        return len(text.encode()) + of_pictures


def pixels(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def text_of(loaded: LoadedModel, example: Example) -> str:
    """The prompt before its pictures are put in. Raises UserError with the example's id where there is none."""
    try:
        return loaded.render_text(example)
    except UserError:
        raise
    except Exception as error:  # templates raise what they like
        raise unreadable(loaded, example, error) from None


def tokens_of(loaded: LoadedModel, example: Example) -> int:
    """The length of a prompt. Raises UserError with the example's id where it cannot be made."""
    text = text_of(loaded, example)
    try:
        prompts = families.encode(loaded.processor, [text], [example.images], loaded.sees_images)
    except UserError:
        raise
    except Exception as error:  # so do processors
        raise unreadable(loaded, example, error) from None
    return prompts.input_ids.shape[1]


def unreadable(loaded: LoadedModel, example: Example, error: Exception) -> UserError:
    return UserError(
        f"example {example.id!r}: {loaded.name} cannot read its prompt: {first_line(error)}; "
        "if its chat template is at fault, set `template` beside its `model`"
    )
