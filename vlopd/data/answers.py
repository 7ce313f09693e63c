"""Text normalisation and matching of answers, for rewards and the built-in tasks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Normalises text: lower case, no accents, apostrophes or punctuation, single spaces, "saint" as "st".

    >>> normalise("Saint George's, São Tomé!")
    "st georges sao tome"
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    bare = re.sub(r"['`\u2019\u02bb]", "", bare.lower())
    return " ".join(re.findall(r"\w+", re.sub(r"\bsaint\b", "st", bare)))


def mentions_any(text: str, names: Iterable[str]) -> bool:
    """Whether the text contains one of the names as whole words, ignoring case, accents and punctuation."""
    spaced = f" {normalise(text)} "
    return any(f" {normalise(name)} " in spaced for name in names)


def after_last_colon(text: str) -> str:
    """The text after the last colon, or all of it without one."""
    return text.split(":")[-1].strip()
