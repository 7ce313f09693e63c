"""What an answer's text says, compared with another's: for rewards and for the built-in tasks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def words(text: str) -> str:
    """Lower case without accents, apostrophes and punctuation, single spaces; "saint" is "st".

    >>> words("Saint George's, São Tomé!")
    "st georges sao tome"
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    bare = re.sub(r"['`\u2019\u02bb]", "", bare.lower())
    return " ".join(re.findall(r"\w+", re.sub(r"\bsaint\b", "st", bare)))


def names_one_of(text: str, names: Iterable[str]) -> bool:
    """Whether one of the names stands in the text as whole words; case, accents and punctuation are ignored."""
    said = f" {words(text)} "
    return any(f" {words(name)} " in said for name in names)


def after_last_colon(text: str) -> str:
    """The part after the last colon, or all of it where there is none."""
    return text.split(":")[-1].strip()
