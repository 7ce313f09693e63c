"""`load_data`: examples of a built-in data set, a file, a hub data set, or rows in memory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vlopd.config.base import Section
from vlopd.config.data import BuiltInData, DataConfig, FileData
from vlopd.config.input import value_of
from vlopd.data.dataset import FileDataset
from vlopd.data.load import load_data as load_section
from vlopd.data.load import noted
from vlopd.data.memory import open_rows
from vlopd.errors import ConfigError
from vlopd.plugins import NAME
from vlopd.types import Example

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 1000
"""Examples of a built-in data set where no size is given."""

Rows = Sequence[Mapping[str, Any]]


def load_data(
    source: str | Path | Section | Mapping[str, Any] | Rows | Dataset | Callable[..., Any],
    *,
    size: int | None = None,
    seed: int = 1,
    **settings: Any,
) -> Sequence[Example]:
    """Loads prompts, with images and answers where they have some.

    Args:
        source: a built-in data set ("shapes", "capitals", "reasoning", "emoji"); a .jsonl, .json, .csv or .parquet
            file, a folder or a hub id; a config's [data] section or the same as a dict; a plug-in, a function or its
            "module:function" (docs/plugins.md); or rows in memory, a list of dicts or a datasets.Dataset, whose
            images are PIL images, bytes or file names.
        size: number of examples; by default 1,000 of a built-in data set, which is unlimited, and all others'.
        seed: of a built-in data set's examples.
        settings: of the data section (docs/data.md): for a file or rows the columns, `question=`, `answer=`,
            `image=`, `id=`, and `split=`, `image_mark=`, `system=`; `modality="text"` for "shapes". Answers and images
            are read from named columns only, whatever the columns are called.

    Returns a sequence of Examples; rows are read and images decoded on access. Raises ConfigError for an unknown
    setting, file or column; reading a malformed row raises DataError with the row.

    >>> load_data("train.jsonl", question="problem", answer="solution", image="picture")[0]
    >>> load_data("shapes", modality="text", size=200)
    >>> load_data([{"question": "2 + 2", "answer": "4"}], answer="answer")[0].answer
    '4'
    """
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"size = {size!r}: must be an integer of at least 1")
    if isinstance(source, Mapping) and not {"type", "path"} & source.keys():
        raise ConfigError(
            f"a dict is a data section with a `type`; this one has {', '.join(map(str, source))}; of a DatasetDict "
            'give one split, as in data["train"], and of columns a list of rows'
        )
    if isinstance(source, Section | Mapping | str | Path) or callable(source):
        return load_section(_cut(_section(source, settings), size), size or SIZE, seed)
    section = value_of(FileData, {"path": "rows", **settings}, "load_data")
    return noted(FileDataset(_cut(section, size), table=open_rows(source)))


def _cut(section: Any, size: int | None) -> Any:
    """A data section with at most `size` rows of a file."""
    if size is None or not isinstance(section, FileData):
        return section
    limit = size if section.limit is None else min(size, section.limit)
    return section.model_copy(update={"limit": limit})


def _section(
    source: str | Path | Section | Mapping[str, Any] | Callable[..., Any],
    settings: Mapping[str, Any],
) -> Any:
    """The data section of a source. Raises ConfigError for an unknown setting."""
    if isinstance(source, Section):
        source = source.model_dump()
    elif not isinstance(source, Mapping) and not isinstance(source, str | Path):
        source = {"type": source}
    elif not isinstance(source, Mapping):
        name = str(source)
        near = difflib.get_close_matches(name, _built_in_types(), 1, 0.8)
        if near and near != [name] and not Path(name).exists():
            raise ConfigError(f"no file {name!r}; did you mean the built-in data set {near[0]!r}?")
        is_type = name in _built_in_types() or NAME.fullmatch(name)
        built_in = is_type and not Path(name).exists()
        source = {"type": name} if built_in else {"type": "file", "path": name}
    return value_of(DataConfig, {**source, **settings}, "load_data")


def _built_in_types() -> set[str]:
    """The values of `type` of data sections that need no path."""
    variants = get_args(get_args(BuiltInData)[0])
    return {
        cls.model_fields["type"].default
        for cls in variants
        if not any(field.is_required() for field in cls.model_fields.values())
    }
