"""Any JSONL, JSON or parquet file, or hub data set, as examples, through `datasets` and a column map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image, UnidentifiedImageError

from vlopd.config import ConfigError, FileData, UserError
from vlopd.types import Example

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class DataError(UserError):
    """A row of the user's data is broken; the message names the row and the remedy."""


class FileSource(Sequence[Example]):
    """Rows by index, images opened when a row is asked for.

    Raises ConfigError for a missing file or column when made, DataError with the row's id when a row is read.
    """

    def __init__(self, config: FileData):
        self.config = config
        path = Path(config.path)
        self.folder = path.parent
        try:
            if path.suffix in BUILDERS:
                if not path.is_file():
                    raise ConfigError(f"no data file {path} (data.path)")
                self.rows = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
            else:
                self.rows = load_dataset(config.path, config.subset, split=config.split)
        except ConfigError:
            raise
        except Exception as error:  # `datasets` raises a dozen kinds for unreadable input
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"cannot read data.path {config.path!r}: {reason}") from None
        columns = [config.question, config.answer, config.image, config.id]
        for column in columns:
            if column is not None and column not in self.rows.column_names:
                raise ConfigError(
                    f"{config.path} has no column {column!r}; it has {self.rows.column_names}; "
                    "name them in [data]: question, answer, image, id"
                )
        if len(self.rows) == 0:
            raise ConfigError(f"{config.path} has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        config, row = self.config, self.rows[index]
        name = str(row[config.id]) if config.id else f"{Path(config.path).stem}-{index}"
        question = row[config.question]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{config.path}, row {name}: column {config.question!r} holds no text")
        answer = None if config.answer is None else row[config.answer]
        images = self.open_images(row.get(config.image), name) if config.image else ()
        example = Example.ask(name, question, images, None if answer is None else str(answer), row)
        if config.system is None:
            return example
        system: Mapping[str, Any] = {
            "role": "system",
            "content": [{"type": "text", "text": config.system}],
        }
        return Example(name, (system, *example.messages), images, example.answer, row)

    def open_images(self, value: Any, name: str) -> tuple[Image.Image, ...]:
        """Images as `datasets` decoded them, or file names relative to the data file's folder."""
        if value is None:
            raise DataError(
                f"{self.config.path}, row {name}: column {self.config.image!r} is empty"
            )
        images = []
        for each in value if isinstance(value, list) else [value]:
            try:
                image = each if isinstance(each, Image.Image) else Image.open(self.folder / each)
                images.append(image.convert("RGB"))
            except (
                OSError,
                UnidentifiedImageError,
                Image.DecompressionBombError,
                TypeError,
            ) as error:
                raise DataError(
                    f"{self.config.path}, row {name}: image {each!r}: {error}"
                ) from None
        return tuple(images)
