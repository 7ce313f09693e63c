"""Checks of the rows that training uses: what they lack, and whether they fit the models' contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from PIL import Image

from vlopd.config.models import ImageContext
from vlopd.config.recipe import ArmRecipe
from vlopd.data.dataset import StoredDataset
from vlopd.data.functions import FunctionDataset
from vlopd.data.load import load_data, order
from vlopd.data.mixture import MixtureDataset
from vlopd.errors import DataError, UserError, first_line
from vlopd.models import families
from vlopd.models.loaded import LoadedModel, too_long_error
from vlopd.plugins import Plugin
from vlopd.train.pair import ModelPair
from vlopd.train.rewards import RULES, answer_of, scores
from vlopd.train.rollouts import from_data
from vlopd.train.teacher_context import field_of
from vlopd.types import Example

FEW = 8
"""Rows whose prompts are rendered in full, pictures included."""
BUILT_IN_ROWS = 64
"""Rows that are checked of a built-in world; they are alike."""
CLOSE_ROWS = 64
"""Rows with pictures that may be too long and are rendered in full, longest first."""


class _Reader(NamedTuple):
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
    measured = [_Measured() for _ in range(1 + len(pair.teachers))]
    judges = [*([] if recipe.reward is None else [recipe.reward.rule]), *recipe.train.metrics]
    if own := [judge for judge in judges if isinstance(judge, Plugin)]:
        for example in (data[i] for i in used[:BUILT_IN_ROWS]):
            for plugin in own:
                scores(plugin, [example], [""])
    for i in shown:
        for reader, so_far in zip(_readers_of(pair, data[i]), measured, strict=False):
            view = reader.view(data[i])
            so_far.add(view.images, _tokens_of(reader.loaded, view))
    close: dict[int, tuple[float, int]] = {}  # tokens that it may be too long by, its new tokens
    long: dict[int, DataError] = {}
    for i in used:
        example = quick[i]
        answer_tokens = _refuse_row(recipe, pair, example)
        new_tokens = answer_tokens if only_data else rollout.max_new_tokens
        for reader, so_far in zip(_readers_of(pair, example), measured, strict=False):
            view, limit = reader.quick_view(example), reader.loaded.context_length
            text = _text_of(reader.loaded, view)
            if limit is None or (over := so_far.at_most(view, text) + new_tokens - limit) <= 0:
                continue
            if view.images:
                close[i] = max(close.get(i, (0.0, 0)), (over, new_tokens))
            elif error := _beyond(reader.loaded, view, new_tokens):
                long[i] = error
    for i in sorted(close, key=lambda i: close[i], reverse=True)[:CLOSE_ROWS]:
        example = data[i]
        for reader in _readers_of(pair, example):
            if error := _beyond(reader.loaded, reader.view(example), close[i][1]):
                long.setdefault(i, error)
    if long:
        more = f"; {len(long) - 1} more of {len(used)} rows are too long as well"
        raise DataError(f"{long[min(long)]}{more if len(long) > 1 else ''}")


def _beyond(loaded: LoadedModel, example: Example, new_tokens: int) -> DataError | None:
    """The error for a prompt that does not fit the context with the new tokens; None where it fits."""
    length, limit = _tokens_of(loaded, example), loaded.context_length
    if limit is None or length + new_tokens <= limit:
        return None
    return too_long_error(example.id, length, new_tokens, loaded)


def _refuse_row(recipe: ArmRecipe, pair: ModelPair, example: Example) -> int:
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


def _readers_of(pair: ModelPair, example: Example) -> list[_Reader]:
    """The student and the teachers that read an example."""
    found = [_Reader(pair.student, _as_it_is, _as_it_is)]
    for teacher in (member for each, _ in pair.assign([example]) for member in each.members):
        quick = teacher.view
        if isinstance(teacher.context, ImageContext):  # a crop would decode the picture
            quick = partial(_with_field, teacher.context.column)
        found.append(_Reader(teacher.loaded, teacher.view, quick))
    return found


def _as_it_is(example: Example) -> Example:
    return example


def _with_field(column: str, example: Example) -> Example:
    """The example, if it has the field. Raises UserError where not."""
    field_of(example, column)
    return example


class _Measured:
    """Tokens per picture of a model, from prompts rendered in full."""

    def __init__(self) -> None:
        self.tokens, self.pixels = 0.0, 1

    def add(self, images: Sequence[Image.Image], tokens: int) -> None:
        if images:
            self.tokens = max(self.tokens, tokens / len(images))
            self.pixels = max(self.pixels, max(_pixels(image) for image in images))

    def at_most(self, example: Example, text: str) -> float:
        """An upper bound on a prompt's tokens; infinite where no picture was measured."""
        of_pictures = sum(
            self.tokens * max(1.0, _pixels(image) / self.pixels) if self.tokens else float("inf")
            for image in example.images
        )
        return len(text.encode()) + of_pictures


def _pixels(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def _text_of(loaded: LoadedModel, example: Example) -> str:
    """The prompt before pictures are expanded. Raises UserError with the example's id where it cannot be rendered."""
    try:
        return loaded.render_text(example)
    except UserError:
        raise
    except Exception as error:  # a template may raise anything
        raise _unreadable(loaded, example, error) from None


def _tokens_of(loaded: LoadedModel, example: Example) -> int:
    """The length of a prompt in tokens. Raises UserError with the example's id where it cannot be tokenized."""
    text = _text_of(loaded, example)
    try:
        prompts = families.encode(loaded.processor, [text], [example.images], loaded.sees_images)
    except UserError:
        raise
    except Exception as error:  # so may a processor
        raise _unreadable(loaded, example, error) from None
    return prompts.input_ids.shape[1]


def _unreadable(loaded: LoadedModel, example: Example, error: Exception) -> UserError:
    return UserError(
        f"example {example.id!r}: {loaded.name} cannot read its prompt: {first_line(error)}; "
        "if its chat template is at fault, set `template` beside its `model`"
    )
