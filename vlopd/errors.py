"""Errors that a user can fix: one line with the name and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix; the message is one line with the name and the remedy."""


class ConfigError(UserError):
    """An invalid configuration; the message names the key and the remedy."""


class DataError(UserError):
    """An invalid row of the user's data; the message names the row and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, to append to a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    # a KeyError's text is the key alone
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text


class RunError(UserError):
    """An invalid or missing file of a run; the message names the file and the remedy."""


class PluginError(UserError):
    """A plug-in that cannot be used; the message names it ("module:function") and what is wrong."""
