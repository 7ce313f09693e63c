"""Schemas of the records of measurements."""

from __future__ import annotations

from vlopd.run.schemas.base import Count, Entry, Record, Value


class HeadlineRow(Entry):
    """A row of the headline of a measurement."""

    name: str
    metric: str
    parameter: str
    value: Value
    null: str = ""
    null_mean: Value = None
    null_sd: Value = None
    p: Value = None


class LeftOut(Entry):
    """What a measurement leaves out."""

    summary: str


class OverlapInputs(Entry):
    """What the overlap of updates was made from."""

    base: str
    arms: dict[str, str]


class OverlapRecord(Entry):
    """geometry/overlap.json."""

    inputs: OverlapInputs


class GroupsInputs(Entry):
    """What the comparison of groups was made from."""

    tables: dict[str, str]


class GroupsRecord(Entry):
    """geometry/groups.json."""

    inputs: GroupsInputs


class GeometryRecord(Record):
    """geometry/NAME/summary.json."""

    left_out: LeftOut
    headline: tuple[HeadlineRow, ...]
    nulls: tuple[str, ...] = ()
    null_draws: Count = 0
    no_p: str | None = None
    matrices: Count = 0
    matrices_not_moved: Count = 0
    tensors: Count = 0
