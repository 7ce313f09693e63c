"""Loads the examples of a data section: a built-in world, a file or hub id, a function of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from vlopd import seeding
from vlopd.config.data import (
    CapitalsData,
    DataConfig,
    EmojiData,
    FileData,
    FunctionData,
    ReasoningData,
    ShapesData,
)
from vlopd.config.models import ImageContext, TeacherConfig
from vlopd.data.capitals import CapitalsDataset
from vlopd.data.dataset import FileDataset
from vlopd.data.emoji import EmojiDataset
from vlopd.data.emoji import folder as emoji_folder
from vlopd.data.functions import FunctionDataset
from vlopd.data.reasoning import ReasoningDataset
from vlopd.data.shapes import ShapesDataset
from vlopd.types import Example

Item = TypeVar("Item")


def load_data(
    data: DataConfig, size: int, seed: int = 1, teachers: Iterable[TeacherConfig] = ()
) -> Sequence[Example]:
    """The examples of a data section. Built-in worlds and functions get a size and a seed; a file has its own examples.

    Columns with pictures for one of the `teachers` alone (its image context) are opened too.
    """
    match data:
        case ShapesData():
            return ShapesDataset(data.split, size, seed, data.modality)
        case CapitalsData():
            return CapitalsDataset(data.split, size, seed)
        case ReasoningData():
            return ReasoningDataset(data.split, size, seed, data.subjects)
        case EmojiData():
            return EmojiDataset(data.split, size, seed)
        case FileData():
            return FileDataset(data, picture_columns(teachers))
        case FunctionData():
            return FunctionDataset(data, size, seed)


def picture_columns(teachers: Iterable[TeacherConfig]) -> list[str]:
    """The columns of the teachers' image contexts."""
    contexts = [teacher.context for teacher in teachers]
    return [context.column for context in contexts if isinstance(context, ImageContext)]


def files_of(data: DataConfig, teachers: Sequence[TeacherConfig] = ()) -> list[Path]:
    """The files that a data section's examples come from, pictures included; none for a world that is code alone.

    Raises UserError as `load_data` does.
    """
    match data:
        case FileData():
            path = Path(data.path)
            if path.is_file() and not data.has_images and not picture_columns(teachers):
                return [path]  # without reading its rows, for every arm anew
            source = load_data(data, 0, 0, teachers)
            assert isinstance(source, FileDataset)
            return source.files()
        case EmojiData():
            return [path for path in sorted(emoji_folder().rglob("*")) if path.is_file()]
    return []


def pick(data: Sequence[Item], start: int, count: int, seed: int) -> list[Item]:
    """Examples `start` to `start + count` of an endless stream over `data` that is reshuffled every epoch.

    A function of its arguments alone, so that a resumed run needs no saved position.
    """
    examples = []
    epoch, order = -1, torch.empty(0)
    for position in range(start, start + count):
        if position // len(data) != epoch:
            epoch = position // len(data)
            draws = seeding.generator("cpu", "data order", seed, epoch)
            order = torch.randperm(len(data), generator=draws)
        examples.append(data[int(order[position % len(data)])])
    return examples
