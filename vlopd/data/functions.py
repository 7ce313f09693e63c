"""Examples of a plug-in data source, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

from vlopd.config.data import FunctionData
from vlopd.errors import DataError
from vlopd.plugins import call, item, wrong_value
from vlopd.types import Example


class FunctionDataset(Sequence[Example]):
    """What the function of a data section returns for a size and a seed.

    Raises PluginError where that is not a sequence, and, where it is read, for an example that is none; DataError for
    one whose images do not match its messages or the section.
    """

    def __init__(self, config: FunctionData, size: int, seed: int):
        self.config = config
        config.use("data").check()
        where = f"size {size}, seed {seed}"
        found = call(config.type, where, size, seed, **config.arguments)
        if not isinstance(found, Sized) or isinstance(found, str | bytes | Mapping | Set):
            raise wrong_value(config.type, where, found, "a sequence of vlopd.types.Example")
        self.found: Any = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        plugin, size = self.config.type, len(self.found)
        if not -size <= index < size:
            raise IndexError(f"index {index} of {size} examples")
        example = item(plugin, f"index {index}", self.found, index)
        if not isinstance(example, Example):
            raise wrong_value(plugin, f"index {index}", example, "vlopd.types.Example at each")
        if not all({"role", "content"} <= set(message) for message in example.messages):
            raise DataError(
                f"{plugin}: example {example.id!r} has a message without role or content"
            )
        refuse_unlike_images(f"{plugin}: example {example.id!r}", example)
        if example.images and not self.config.images:
            raise DataError(f"{plugin}: example {example.id!r} has images; set data.images = true")
        return example


def refuse_unlike_images(where: str, example: Example) -> None:
    """Raises DataError where an example's images are not as many as the image parts of its messages."""
    parts = [
        part for m in example.messages if not isinstance(m["content"], str) for part in m["content"]
    ]
    marked = sum(part["type"] == "image" for part in parts)
    if marked != len(example.images):
        raise DataError(
            f"{where} has {len(example.images)} images and {marked} image parts in its messages; give as many"
        )
