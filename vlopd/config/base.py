"""What every part of the configuration is built of, and the errors that a user can mend."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class UserError(ValueError):
    """The user can mend this; the message is one line that names the thing and the remedy."""


class ConfigError(UserError):
    """The user's configuration is wrong; the message names the key and the remedy."""


class DataError(UserError):
    """A row of the user's data is broken; the message names the row and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
