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
    """A JSONL, JSON, CSV or parquet file, a folder, or a hub data set; columns by name (docs/data.md).

    A name may lead into nested columns (`reward_model.ground_truth`); a column of that very name goes first.
    """

    type: Literal["file"] = "file"
    path: str
    """A .jsonl, .json, .csv or .parquet file, or a folder (relative to the working directory), or a hub data set id."""
    split: str = "train"
    """Of a folder or hub data set; `train[:90%]` and `train+test` as `datasets` reads them. A file is all `train`."""
    subset: str | None = None
    """The configuration of a folder or hub data set that has several."""
    question: str = "question"
    """Column with the prompt: a text, or a list of turns that ends with the user's (`messages`, `prompt`,
    `conversations`). An assistant turn after it is the answer, unless `answer` names a column."""
    answer: str | None = None
    """Column with a text, a number (its digits as the file has them) or one assistant turn; null and, in a CSV, an
    empty cell are no answer."""
    image: str | None = None
    """Column with an image, a list of images, or file names relative to the data file's folder."""
    image_mark: str | None = Field(None, min_length=1)
    """What stands in the user's turns where an image goes (`<image>` in many data sets), as often as the row has
    images; null puts images where turns have parts for them, or else before the (first) user's text, and takes the
    text as it is."""
    id: str | None = None
    """Column with a text or number that no two rows share; null numbers the rows."""
    system: str | None = None
    """A system prompt put before every question. A row with a system turn of its own is refused."""

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
