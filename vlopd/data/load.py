"""Sources of examples: the built-in visual world, capitals, reasoning-gym, emoji, and any file or hub data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from vlopd import seeding
from vlopd.config.data import CapitalsData, EmojiData, FileData, ReasoningData, ShapesData
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.models import ImageContext
from vlopd.data.capitals import CapitalsDataset
from vlopd.data.dataset import FileDataset
from vlopd.data.emoji import EmojiDataset
from vlopd.data.emoji import folder as emoji_folder
from vlopd.data.reasoning import ReasoningDataset
from vlopd.data.shapes import ShapesDataset
from vlopd.types import Example

Item = TypeVar("Item")


def open_data(config: ExperimentConfig, size: int, seed: int) -> Sequence[Example]:
    """An experiment's examples. The built-in worlds give `size` of them for a seed; a file has its own.

    Columns with pictures for a teacher alone (its image context) are opened too.
    """
    match data := config.data:
        case ShapesData():
            return ShapesDataset(data.split, size, seed, data.modality)
        case CapitalsData():
            return CapitalsDataset(data.split, size, seed)
        case ReasoningData():
            return ReasoningDataset(data.split, size, seed, data.subjects)
        case EmojiData():
            return EmojiDataset(data.split, size, seed)
        case FileData():
            return FileDataset(data, teachers_pictures(config))


def teachers_pictures(config: ExperimentConfig) -> list[str]:
    """The columns with pictures that teachers alone are shown."""
    contexts = [teacher.context for teacher in config.teachers.values()]
    return [context.column for context in contexts if isinstance(context, ImageContext)]


def files_of(config: ExperimentConfig) -> list[Path]:
    """The files that an experiment's examples come from, pictures included; none for a world that is code alone.

    Raises UserError as `open_data` does.
    """
    match data := config.data:
        case FileData():
            path = Path(data.path)
            if path.is_file() and not data.has_images and not teachers_pictures(config):
                return [path]  # without reading its rows, for every arm anew
            source = open_data(config, 0, 0)
            assert isinstance(source, FileDataset)
            return source.files()
        case EmojiData():
            return [path for path in sorted(emoji_folder().rglob("*")) if path.is_file()]
    return []


def pick(data: Sequence[Item], start: int, count: int, seed: int) -> list[Item]:
    """Examples `start` to `start + count` of an endless, epoch-wise shuffled stream over `data` (places, of a range).

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
