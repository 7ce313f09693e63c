"""Where prompts come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlopd.config.base import Section


class ShapesData(Section):
    """The built-in visual world; `modality = "text"` gives the scene in words."""

    type: Literal["shapes"] = "shapes"
    modality: Literal["image", "text"] = "image"
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return self.modality == "image"


class FileData(Section):
    """A JSONL or parquet file, a folder, or a hub data set, through `datasets`; columns by name."""

    type: Literal["file"] = "file"
    path: str
    """A .jsonl, .json or .parquet file (relative to the working directory), or a hub data set id."""
    split: str = "train"
    subset: str | None = None
    question: str = "question"
    answer: str | None = None
    image: str | None = None
    """Column with an image, a list of images, or file names relative to the data file's folder."""
    image_mark: str | None = Field(None, min_length=1)
    """What stands in the question where an image goes (`<image>` in many data sets), as often as the row has
    images; null puts images before the text and takes the text as it is."""
    id: str | None = None
    system: str | None = None
    """A system prompt put before every question."""

    @property
    def has_images(self) -> bool:
        return self.image is not None


class CapitalsData(Section):
    """Questions on the capitals of the world's countries, split by country."""

    type: Literal["capitals"] = "capitals"
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return False


class ReasoningData(Section):
    """Arithmetic, sorting and spelling of the package reasoning-gym, split by question."""

    type: Literal["reasoning"] = "reasoning"
    subjects: tuple[Literal["arithmetic", "sorting", "spelling"], ...] = Field(
        ("arithmetic", "sorting", "spelling"), min_length=1
    )
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return False


class EmojiData(Section):
    """One artist's emoji and what kind of thing they are, split by concept (scripts/download_emoji.py)."""

    type: Literal["emoji"] = "emoji"
    split: Literal["train", "validation", "test"] = "train"

    @property
    def has_images(self) -> bool:
        return True


DataConfig = Annotated[
    ShapesData | FileData | CapitalsData | ReasoningData | EmojiData, Field(discriminator="type")
]
