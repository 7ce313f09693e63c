"""Opens any JSONL, JSON, CSV or parquet file, saved data set, folder or hub data set as a table of verbatim rows."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice, repeat
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from vlopd.config.data import FileData
from vlopd.data.arrow import ArrowTable, open_parquet
from vlopd.data.images import shorten
from vlopd.data.text_files import Row, open_csv, open_json, open_lines
from vlopd.errors import ConfigError
from vlopd.files import is_inside

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z")


class Table(Protocol):
    """Rows by index, all columns in each."""

    columns: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """A row; text that is not UTF-8 has surrogate escapes."""

    def has(self, column: str) -> bool:
        """Whether the column exists, possibly nested under dotted names."""

    def values(self, column: str) -> Iterator[Any]:
        """The values of an existing column; None where a row lacks it."""

    def check_verbatim(self, column: str) -> None:
        """Raises DataError, without the column, where the values' original text is lost."""

    def files(self) -> list[Path]: ...

    def named_pictures(self, column: str) -> Iterator[str]:
        """The file names in a column of images, without decoding; embedded images have none."""


class ConcatenatedTable:
    """Concatenated row ranges of several tables; a column that a table lacks is None in its rows."""

    def __init__(self, parts: Sequence[tuple[Table, range]]):
        self.parts = [(table, rows) for table, rows in parts if len(rows)]
        self.columns = list(dict.fromkeys(c for table, _ in self.parts for c in table.columns))
        self.ends = list(accumulate(len(rows) for _, rows in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self.ends, index)
        table, rows = self.parts[part]
        row = table[rows[index - self.ends[part]]]
        return {**dict.fromkeys(self.columns), **row}

    def has(self, column: str) -> bool:
        return any(table.has(column) for table, _ in self.parts)

    def values(self, column: str) -> Iterator[Any]:
        for table, rows in self.parts:
            values = table.values(column) if table.has(column) else repeat(None, len(table))
            yield from islice(values, rows.start, rows.stop)

    def check_verbatim(self, column: str) -> None:
        for table, _ in self.parts:
            if table.has(column):
                table.check_verbatim(column)

    def files(self) -> list[Path]:
        return [path for table, _ in self.parts for path in table.files()]

    def named_pictures(self, column: str) -> Iterator[str]:
        for table, _ in self.parts:
            if table.has(column):
                yield from table.named_pictures(column)


OPENERS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": open_lines,
    ".json": open_json,
    ".parquet": open_parquet,
    ".csv": open_csv,
}


def open_table(config: FileData) -> Table:
    """Opens the rows of `path`, `subset` and `split`. Raises ConfigError with the reason and the remedy."""
    assert isinstance(config.path, str), "one path; vlopd/data/load.py opens several"
    path = Path(config.path)
    loudness = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised below instead
    try:
        if path.is_dir():
            return _open_folder(path, config)
        if path.exists() or path.suffix.lower() in (*OPENERS, *PACKED):
            return _select_split({"train": lambda: _open_file(path)}, config)
        rows = load_dataset(config.path, config.subset, split=config.split)
        return ArrowTable(rows, [Path(file["filename"]) for file in rows.cache_files])
    except ConfigError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for unreadable input
        cause = error.__cause__ or error
        reason = shorten(str(cause) or type(cause).__name__, 300)
        raise ConfigError(f"cannot read data.path {config.path!r}: {reason}") from None
    finally:
        datasets.logging.set_verbosity(loudness)


def _open_file(path: Path) -> Table:
    """Opens one data file. Raises ConfigError, and what the readers raise."""
    suffix = path.suffix.lower()
    if suffix not in OPENERS:
        known = f"supported are {', '.join(OPENERS)}, a folder, or a hub data set"
        remedy = f"unpack it ({known})" if suffix in PACKED else known
        raise ConfigError(f"data.path {str(path)!r} ends in {path.suffix!r}; {remedy}")
    if not path.is_file():
        raise ConfigError(f"no data file {path} (data.path)")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} has no rows")
    return OPENERS[suffix](path)


def open_files(paths: Sequence[Path]) -> Table:
    """Opens several data files as one table. Raises ConfigError, and ValueError with the file at fault."""
    tables = []
    for path in paths:
        try:
            tables.append(_open_file(path))
        except ConfigError:
            raise
        except Exception as error:  # pyarrow raises arbitrary exceptions
            raise ValueError(f"{path.name}: {error}") from None
    return ConcatenatedTable([(table, range(len(table))) for table in tables])


def _open_folder(path: Path, config: FileData) -> Table:
    """Opens a folder of `save_to_disk`, or one laid out as on the hub, whose splits `datasets` finds."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            saved = load_from_disk(str(path))
        except IndexError:  # `datasets` cannot load an empty split
            raise ConfigError(f"{config.path} has no rows, or a split without") from None
        each = saved.values() if isinstance(saved, DatasetDict) else [saved]
        _refuse_outside(path, [Path(file["filename"]) for its in each for file in its.cache_files])
        if not isinstance(saved, DatasetDict):  # a single split, which `train` selects
            name = "train" if config.split == "train" else str(saved.split or "train")
            return _select_split({name: partial(_open_saved, path, saved)}, config)
        splits = {name: partial(_open_saved, path / name, rows) for name, rows in saved.items()}
        return _select_split(splits, config)
    builder = load_dataset_builder(str(path), config.subset)
    found = (builder.config.data_files or {}).items()
    files = {str(split): [Path(name) for name in names] for split, names in found}
    every = [file for each in files.values() for file in each]
    _refuse_outside(path, every)
    if all(file.suffix.lower() in (*OPENERS, *PACKED) and file.is_file() for file in every):
        return _select_split(
            {name: partial(open_files, each) for name, each in files.items()}, config
        )
    rows = load_dataset(str(path), config.subset, split=config.split)
    return ArrowTable(rows, every)


def _refuse_outside(folder: Path, files: Iterable[Path]) -> None:
    """Raises ConfigError for a file that a folder's README, state.json or link names elsewhere; in the hub's cache
    files are links to others of the data set."""
    inside = [folder, *(its.parent for its in folder.resolve().parents if its.name == "snapshots")]
    for file in files:
        if not is_inside(file, inside):
            raise ConfigError(f"{folder} names {file}, which leads out of it; put that file there")


def _open_saved(folder: Path, rows: Dataset) -> Table:
    about = [folder / "state.json", folder / "dataset_info.json"]
    return ArrowTable(rows, [*(Path(file["filename"]) for file in rows.cache_files), *about])


def _select_split(splits: Mapping[str, Callable[[], Table]], config: FileData) -> Table:
    """Selects the rows of `data.split` (`train`, `train[:90%]`, `train+test`). Raises ConfigError if unknown."""
    wanted = [re.split(r"[\[(]", part)[0].strip() for part in config.split.split("+")]
    for name in wanted:
        if name not in splits:
            raise ConfigError(
                f"{config.path} has no split {name!r} (data.split); it has {', '.join(splits)}"
            )
    tables = {name: splits[name]() for name in dict.fromkeys(wanted)}
    if config.split in tables:
        return tables[config.split]
    lengths = {name: len(table) for name, table in tables.items()}
    cuts = ReadInstruction.from_spec(config.split).to_absolute(lengths)
    return ConcatenatedTable([(tables[cut.splitname], range(cut.from_, cut.to)) for cut in cuts])
