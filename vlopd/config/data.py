"""Data sets of prompts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from vlopd.config.base import Count, Name, Section, Unique, Weight, later, without_repeats
from vlopd.config.functions import IS_BUILT_IN, IS_OWN, KIND, Function

QUESTION = "question"
"""Default column of the prompt."""


def _path_or_paths(value: Any) -> Any:
    """Raises ValueError for anything but a path or a list of different paths, in one line for both."""
    paths = value if isinstance(value, list | tuple) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"must be a path, or a list of paths; got {value!r}")
    without_repeats(tuple(paths))
    return value


class ShapesData(Section):
    """The built-in visual data set; `modality = "text"` describes the scene in words."""

    type: Literal["shapes"] = "shapes"
    modality: Literal["image", "text"] = "image"
    """Whether a scene is shown as an image or described in words."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the scenes; no scene is in two."""
    limit: Count | None = later(None)
    """Different questions to train on, drawn by the arm's seed and repeated as often as needed; null: each prompt is
    another question."""

    @property
    def has_images(self) -> bool:
        return self.modality == "image"


class FileData(Section):
    """JSONL, JSON, CSV or parquet files, a folder, or a hub data set; columns by name (docs/data.md).

    Dotted names select nested columns (`reward_model.ground_truth`); a column with the exact name takes precedence.
    """

    type: Literal["file"] = "file"
    path: Annotated[str | tuple[str, ...], BeforeValidator(_path_or_paths)]
    """A .jsonl, .json, .csv or .parquet file, or a folder (relative to the working directory), or a hub data set id; a
    pattern (`data/*.jsonl`) or a list names several, which are read one after the other."""
    split: str = "train"
    """Split of a folder or hub data set, in the syntax of `datasets` (`train[:90%]`, `train+test`). A file has only
    `train`."""
    subset: str | None = None
    """Configuration name of a folder or hub data set that has several."""
    question: str = QUESTION
    """Column with the prompt: a text, or a list of turns that ends with the user's. An assistant turn after it is the
    answer, unless `answer` names a column. A file without a column `question` is read by the first that it has of
    `messages`, `prompt`, `conversations`."""
    answer: str | None = None
    """Column with a text, a number (verbatim digits) or one assistant turn; null and empty CSV cells mean no answer."""
    image: str | None = None
    """Column with an image, a list of images, or file names relative to the data file's folder. The column of
    `question` itself: the images are inside its turns' parts."""
    image_folders: Annotated[tuple[str, ...], Unique] = later(())
    """Folders outside of the data file's own in which file names of images may lie, whether written as absolute paths,
    with `..`, or as links; names that lead anywhere else are refused."""
    image_mark: str | None = Field(None, min_length=1)
    """Image placeholder in user turns (`<image>` in many data sets), once per image of the row; null inserts images at
    image parts, or else before the first user text, and leaves the text unchanged."""
    id: str | None = None
    """Column with a unique text or number; null numbers the rows."""
    system: str | None = None
    """System prompt prepended to every question. A row that has a system turn is refused."""
    skip: Count | None = None
    """Rows to leave out at the beginning (of all files together); null leaves none out."""
    limit: Count | None = None
    """Rows to read at most, after those skipped; null reads all."""

    @property
    def has_images(self) -> bool:
        return self.image is not None


class CapitalsData(Section):
    """Questions on the capitals of the world's countries, split by country."""

    type: Literal["capitals"] = "capitals"
    split: Literal["train", "validation", "test"] = "train"
    """Split of the countries."""

    @property
    def has_images(self) -> bool:
        return False


class ReasoningData(Section):
    """Arithmetic, sorting and spelling from the package reasoning-gym, split by question."""

    type: Literal["reasoning"] = "reasoning"
    subjects: tuple[Literal["arithmetic", "sorting", "spelling"], ...] = Field(
        ("arithmetic", "sorting", "spelling"), min_length=1
    )
    """Kinds of questions, drawn at equal rates."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the questions."""

    @property
    def has_images(self) -> bool:
        return False


class EmojiData(Section):
    """Emoji, classified into groups, split by concept (scripts/download_emoji.py)."""

    type: Literal["emoji"] = "emoji"
    split: Literal["train", "validation", "test"] = "train"
    """Split of the concepts."""
    artists: Annotated[tuple[Literal["twitter", "google"], ...], Unique, Field(min_length=1)] = (
        later(("twitter",))
    )
    """Whose drawings are shown, at equal rates; Google's drawings are what the tasks hold out."""

    @property
    def has_images(self) -> bool:
        return True


class FunctionData(Function):
    """A function (size, seed, **arguments) -> Sequence[Example] (docs/plugins.md)."""

    model_config = ConfigDict(extra="allow")
    takes: ClassVar[tuple[str, ...]] = ("size", "seed")
    images: bool = False
    """Whether the examples have images."""

    @property
    def has_images(self) -> bool:
        return self.images


BuiltInData = Annotated[
    ShapesData | FileData | CapitalsData | ReasoningData | EmojiData, Field(discriminator="type")
]
DataSource = Annotated[Annotated[BuiltInData, IS_BUILT_IN] | Annotated[FunctionData, IS_OWN], KIND]
"""Data of a single kind."""


class MixtureData(Section):
    """Several sources, of which each prompt is drawn by weight; a source that is used up is reshuffled."""

    type: Literal["mixture"] = "mixture"
    sources: dict[Name, DataSource] = Field(min_length=1)
    """Data sections by name, which is put before the ids of their examples."""
    weights: dict[str, Annotated[Weight, Field(gt=0)]] = Field(default_factory=dict)
    """Relative weights by source; equal by default."""

    @model_validator(mode="after")
    def check_weights(self) -> MixtureData:
        if self.weights and self.weights.keys() != self.sources.keys():
            raise ValueError(
                f"weights are for {sorted(self.weights)}, sources are {sorted(self.sources)}"
            )
        return self

    @property
    def has_images(self) -> bool:
        return any(source.has_images for source in self.sources.values())


_BuiltInOrMixture = Annotated[
    ShapesData | FileData | CapitalsData | ReasoningData | EmojiData | MixtureData,
    Field(discriminator="type"),
]
DataConfig = Annotated[
    Annotated[_BuiltInOrMixture, IS_BUILT_IN] | Annotated[FunctionData, IS_OWN], KIND
]
