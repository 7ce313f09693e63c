"""The schema of summary.json of a measurement."""

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
