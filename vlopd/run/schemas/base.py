"""What the schemas of a run's records share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Count = Annotated[int, Field(ge=0, lt=2**63)]
Value = float | None
"""A number, or null where it is not defined."""
Table = dict[str, JsonValue]


class Entry(BaseModel):
    """A table of a record, whose numbers are finite; entries that are not read of it are left as they are."""

    model_config = ConfigDict(allow_inf_nan=False)


class Record(Entry):
    """The record of any stage."""

    inputs: Table


class OpenEntry(Entry):
    """A table with further entries, whose values a subclass types as `__pydantic_extra__`."""

    model_config = ConfigDict(extra="allow")


class RunRecord(Entry):
    """run.json, besides its format and config (RunFolder.read)."""

    versions: dict[str, str | None] = Field(default_factory=dict)
    git: Table | None = None
    machine: Table = Field(default_factory=dict)
    created: str = ""
    history: tuple[Table, ...] = ()
