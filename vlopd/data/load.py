"""Loads the examples of a data section: built-in worlds, files, hub data sets, functions, and mixtures of them."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from vlopd.config.data import (
    CapitalsData,
    DataConfig,
    EmojiData,
    FileData,
    FunctionData,
    MixtureData,
    ReasoningData,
    ShapesData,
)
from vlopd.config.models import ImageContext, TeacherConfig
from vlopd.data.capitals import CapitalsDataset
from vlopd.data.dataset import ConcatenatedDataset, FileDataset, StoredDataset
from vlopd.data.emoji import EmojiDataset
from vlopd.data.emoji import folder as emoji_folder
from vlopd.data.functions import FunctionDataset
from vlopd.data.mixture import MixtureDataset
from vlopd.data.order import shuffled
from vlopd.data.reasoning import ReasoningDataset
from vlopd.data.shapes import ShapesDataset
from vlopd.errors import ConfigError, UserError
from vlopd.files import is_first_process
from vlopd.types import Example

NOTED: set[str] = set()
"""Notes on the data that were printed."""
Item = TypeVar("Item")


def load_data(
    data: DataConfig, size: int, seed: int = 1, teachers: Iterable[TeacherConfig] = ()
) -> Sequence[Example]:
    """The examples of a data section. Built-in worlds and functions get a size and a seed; a file has its own examples.

    Columns with pictures for one of the `teachers` alone (its image context) are opened too.
    """
    match data:
        case ShapesData():
            size = size if data.limit is None else min(size, data.limit)
            return ShapesDataset(data.split, size, seed, data.modality)
        case CapitalsData():
            return CapitalsDataset(data.split, size, seed)
        case ReasoningData():
            return ReasoningDataset(data.split, size, seed, data.subjects)
        case EmojiData():
            return EmojiDataset(data.split, size, seed, data.artists)
        case FileData():
            paths = paths_of(data)
            pictures = picture_columns(teachers)
            if len(paths) > 1:
                return noted(ConcatenatedDataset(data, paths, pictures))
            return noted(FileDataset(data.model_copy(update={"path": paths[0]}), pictures))
        case FunctionData():
            return FunctionDataset(data, size, seed)
        case MixtureData():
            teachers = tuple(teachers)
            sources = {}
            for name, source in data.sources.items():
                try:
                    sources[name] = load_data(source, size, seed, teachers)
                except UserError as error:
                    raise type(error)(f"data.sources.{name}: {error}") from None
            return MixtureDataset(sources, data.weights)


def noted(data: StoredDataset) -> StoredDataset:
    """The same data, after its notes were printed, once a process."""
    for note in data.notes:
        if note not in NOTED and is_first_process():
            print(f"vlopd: {note}", file=sys.stderr)
        NOTED.add(note)
    return data


def paths_of(data: FileData) -> list[str]:
    """The files, folders or hub ids that `path` names. Raises ConfigError for a pattern that matches no file."""
    found = []
    for path in (data.path,) if isinstance(data.path, str) else data.path:
        if Path(path).exists() or not glob.has_magic(path):
            found.append(path)
        elif matched := sorted(glob.glob(path, recursive=True)):
            found += matched
        else:
            raise ConfigError(f"no file matches {path!r} (data.path)")
    return found


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
            paths = list(map(Path, paths_of(data)))
            pictures = data.has_images or picture_columns(teachers)
            if all(path.is_file() for path in paths) and not pictures:
                return paths  # without reading their rows, for every arm anew
            source = load_data(data, 0, 0, teachers)
            assert isinstance(source, StoredDataset)
            return source.files()
        case MixtureData():
            parts = data.sources.values()
            return list(dict.fromkeys(path for part in parts for path in files_of(part, teachers)))
        case EmojiData():
            return [path for path in sorted(emoji_folder().rglob("*")) if path.is_file()]
    return []


def order(data: Sequence[Item], start: int, count: int, seed: int) -> list[int]:
    """Indices of the examples `start` to `start + count` of the endless training stream over `data`.

    A function of its arguments alone, so that a resumed run needs no saved position.
    """
    if isinstance(data, MixtureDataset):
        return data.order(start, count, seed)
    return shuffled(len(data), start, count, seed)


def pick(data: Sequence[Item], start: int, count: int, seed: int) -> list[Item]:
    """Examples `start` to `start + count` of an endless stream over `data`: reshuffled every epoch, or, of a mixture,
    drawn by weight.
    """
    return [data[index] for index in order(data, start, count, seed)]
