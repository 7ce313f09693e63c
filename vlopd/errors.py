"""What a user can mend: one line that names the thing and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """The user can mend this; the message is one line that names the thing and the remedy."""


class ConfigError(UserError):
    """The user's configuration is wrong; the message names the key and the remedy."""


class DataError(UserError):
    """A row of the user's data is broken; the message names the row and the remedy."""


def first_line(error: BaseException) -> str:
    """What a library says, as the end of one of our lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    # a KeyError's text is the key alone
    return (
        f"{type(error).__name__} {said}".strip()
        if isinstance(error, KeyError) or not said
        else said
    )


class RunError(UserError):
    """Something on disk is not what the run needs; the message names the file and the remedy."""
