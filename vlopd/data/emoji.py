"""Emoji by two artists, classified into five groups: tests generalisation across artists and concepts.

The drawings are Twitter's (Twemoji) and Google's (Noto), downloaded by scripts/download_emoji.py into data/emoji, or
the folder in VLOPD_EMOJI. Training uses Twitter's drawings of the training concepts, unless `artists` names Google's
too. Held out are the other artist, and concepts, by a hash of their names without numbers (`cat` and `cat2`, and all
twelve clocks, are one).
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
from vlopd.data.synthetic import Split, SyntheticDataset
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
"""Unicode's categories in the data set, and the answer word for each."""

QUESTION = "Which group is this emoji of: nature, food, travel, activity or object?"


class Emoji(NamedTuple):
    """One concept, e.g. ("fries", "FRENCH FRIES", "food", "1f35f.png")."""

    short_name: str
    name: str
    group: str
    file: str


def folder() -> Path:
    """The folder of the drawings. Raises ConfigError where they were not downloaded."""
    path = Path(os.environ.get(FOLDER, DEFAULT))
    if not (path / "emoji.json").is_file():
        raise ConfigError(
            f"no emoji.json in {path}: run `python scripts/download_emoji.py`, or set {FOLDER} to its folder"
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
    """Split by a hash of the short name without its number: seven tenths train, one validation, two test."""
    concept = emoji.short_name.rstrip("0123456789")
    share = hashlib.sha256(concept.encode()).digest()[0] % 10
    return "train" if share < 7 else "validation" if share == 7 else "test"


def of_split(split: Split) -> tuple[Emoji, ...]:
    return _concepts(folder(), split)


@functools.lru_cache(maxsize=12)
def _concepts(path: Path, split: Split) -> tuple[Emoji, ...]:
    """The concepts of a split, from the drawings in a folder."""
    return tuple(emoji for emoji in every_emoji(path) if split_of(emoji) == split)


def _drawing_path(emoji: Emoji, artist: Artist) -> Path:
    """The file of a drawing, 64 x 64 pixels. Raises DataError where it is missing."""
    path = folder() / "img" / artist / "64" / emoji.file
    if not path.is_file():
        raise DataError(
            f"emoji {emoji.short_name!r}: no {path}; run scripts/download_emoji.py again"
        )
    return path


def open_drawing(emoji: Emoji, artist: Artist) -> Image.Image:
    """Opens a drawing on white, RGB."""
    path = _drawing_path(emoji, artist)
    try:
        return open_picture(path.name, path.parent)
    except DataError as error:
        raise DataError(f"emoji {emoji.short_name!r}: {path} {error}") from None


def _emoji_row(emoji: Emoji, artist: Artist) -> dict[str, Any]:
    """A drawing and its question as a plain row; `digest` is the file's."""
    return {
        "id": f"emoji-{artist}-{emoji.short_name}",
        "artist": artist,
        "question": QUESTION,
        "answer": emoji.group,
        "choices": list(GROUPS.values()),
        "cluster": emoji.short_name,
        "digest": hashlib.sha256(_drawing_path(emoji, artist).read_bytes()).hexdigest()[:16],
        **emoji._asdict(),
    }


def held_out(split: Split) -> list[dict[str, Any]]:
    """Held-out questions, by what is new in them; validation has the trained artist only.

    test: `artist` (Google's drawings of training concepts), `concept` (Twitter's of test concepts), `both`.
    """
    twitter: Artist = "twitter"
    asked: list[tuple[str, Split, Artist]] = [("concept", split, twitter)]
    if split == "test":
        asked = [("artist", "train", "google"), *asked, ("both", split, "google")]
    return [
        {"kind": new, **_emoji_row(emoji, artist)}
        for new, concepts, artist in asked
        for emoji in of_split(concepts)
    ]


@dataclass(frozen=True)
class EmojiDataset(SyntheticDataset):
    """Drawings of a split's concepts, sampled with replacement; example `i` depends on (split, seed, i, artists)."""

    artists: tuple[Artist, ...] = ("twitter",)

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        draw = random.Random(f"emoji {self.split} {self.seed} {index}")
        emoji = draw.choice(of_split(self.split))
        artist = draw.choice(self.artists)
        return Example.ask(
            f"emoji-{self.split}-{self.seed}-{index}",
            QUESTION,
            (open_drawing(emoji, artist),),
            emoji.group,
            _emoji_row(emoji, artist),
        )
