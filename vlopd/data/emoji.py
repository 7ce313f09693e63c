"""Emoji drawn by two artists, which of five groups each is of: for recognition across artists and concepts.

The drawings are Twitter's (Twemoji) and Google's (Noto), fetched by scripts/download_emoji.py into data/emoji, or
the folder that VLOPD_EMOJI names. Training shows Twitter's drawings of the training concepts only. What is held
out is the other artist, and concepts, by a hash of their names, `cat` and `cat2` being one, twelve clocks too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from vlopd.data.images import open_picture
from vlopd.data.synthetic import Split, World
from vlopd.errors import ConfigError, DataError
from vlopd.types import Example

Artist = Literal["twitter", "google"]

FOLDER, DEFAULT = "VLOPD_EMOJI", "data/emoji"
GROUPS = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
}
"""Unicode's categories of things that we ask about, and the word for each."""

QUESTION = "Which group is this emoji of: nature, food, travel, activity or object?"


class Emoji(NamedTuple):
    """One concept, e.g. ("fries", "FRENCH FRIES", "food", "1f35f.png")."""

    short_name: str
    name: str
    group: str
    file: str


def folder() -> Path:
    """Where the drawings are. Raises ConfigError where they were not fetched."""
    path = Path(os.environ.get(FOLDER, DEFAULT))
    if not (path / "emoji.json").is_file():
        raise ConfigError(
            f"no emoji.json in {path}: run `python scripts/download_emoji.py`, or name its folder in {FOLDER}"
        )
    return path


@functools.lru_cache(maxsize=4)
def every_emoji(path: Path) -> tuple[Emoji, ...]:
    """All concepts that both artists drew, in Unicode's order; skin tones are variants, not concepts."""
    entries = json.loads((path / "emoji.json").read_text())
    return tuple(
        Emoji(entry["short_name"], entry["name"], GROUPS[entry["category"]], entry["image"])
        for entry in sorted(entries, key=lambda entry: entry["sort_order"])
        if entry["category"] in GROUPS and entry["has_img_twitter"] and entry["has_img_google"]
    )


def split_of(emoji: Emoji) -> Split:
    """By the short name without its number: seven tenths train, one tenth validation, two tenths test."""
    concept = emoji.short_name.rstrip("0123456789")
    share = hashlib.sha256(concept.encode()).digest()[0] % 10
    return "train" if share < 7 else "validation" if share == 7 else "test"


def of_split(split: Split) -> tuple[Emoji, ...]:
    return concepts(folder(), split)


@functools.lru_cache(maxsize=12)
def concepts(path: Path, split: Split) -> tuple[Emoji, ...]:
    """A split's concepts of the drawings in a folder."""
    return tuple(emoji for emoji in every_emoji(path) if split_of(emoji) == split)


def drawing(emoji: Emoji, artist: Artist) -> Path:
    """The file of a drawing, 64 x 64 pixels. Raises DataError where it is not there."""
    path = folder() / "img" / artist / "64" / emoji.file
    if not path.is_file():
        raise DataError(
            f"emoji {emoji.short_name!r}: no {path}; run scripts/download_emoji.py again"
        )
    return path


def open_drawing(emoji: Emoji, artist: Artist) -> Image.Image:
    """The drawing on white, RGB."""
    path = drawing(emoji, artist)
    try:
        return open_picture(path.name, path.parent)
    except DataError as error:
        raise DataError(f"emoji {emoji.short_name!r}: {path} {error}") from None


def row_of(emoji: Emoji, artist: Artist) -> dict[str, Any]:
    """A drawing and its question as a plain row; the digest is of the file."""
    return {
        "id": f"emoji-{artist}-{emoji.short_name}",
        "artist": artist,
        "question": QUESTION,
        "answer": emoji.group,
        "choices": list(GROUPS.values()),
        "cluster": emoji.short_name,
        "digest": hashlib.sha256(drawing(emoji, artist).read_bytes()).hexdigest()[:16],
        **emoji._asdict(),
    }


def held_out(split: Split) -> list[dict[str, Any]]:
    """Questions that training never asks, by what is new in them; validation has the trained artist only.

    test: `artist` (Google's drawings of training concepts), `concept` (Twitter's of test concepts), `both`.
    """
    twitter: Artist = "twitter"
    asked: list[tuple[str, Split, Artist]] = [("concept", split, twitter)]
    if split == "test":
        asked = [("artist", "train", "google"), *asked, ("both", split, "google")]
    return [
        {"kind": new, **row_of(emoji, artist)}
        for new, concepts, artist in asked
        for emoji in of_split(concepts)
    ]


@dataclass(frozen=True)
class EmojiWorld(World):
    """Twitter's drawings of a split's concepts, drawn with replacement; example `i` depends on (split, seed, i)."""

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        emoji = random.Random(f"emoji {self.split} {self.seed} {index}").choice(
            of_split(self.split)
        )
        return Example.ask(
            f"emoji-{self.split}-{self.seed}-{index}",
            QUESTION,
            (open_drawing(emoji, "twitter"),),
            emoji.group,
            row_of(emoji, "twitter"),
        )
