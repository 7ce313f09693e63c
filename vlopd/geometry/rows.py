"""The shape of every geometry result: a row a measure; thresholds are values, not column names."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number about one delta.

    status: `ok`; `zero`, undefined because nothing moved (0/0); `skipped`, not computed. The last
    two have no value, say why in `reason`, and are counted in every aggregate.
    """

    metric: str
    parameter: str
    value: float | None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One line of geometry.csv: a measure of one tensor, or of a group, beside its null model.

    excess = value - null_mean; null_sd is the sample deviation over draws (None for fewer than
    two).
    """

    name: str
    component: str
    layer: int | None
    module: str
    shape: str
    metric: str
    parameter: str
    value: float | None
    null: str
    null_mean: float | None
    null_sd: float | None
    excess: float | None
    status: str
    reason: str


def parameters(**values: float) -> str:
    """>>> parameters(ratio=0.1, atol=0)
    "ratio=0.1,atol=0"
    """
    return ",".join(f"{name}={value:g}" for name, value in values.items())


def beside_null(
    observed: Measure,
    draws: Sequence[Measure],
    name: str,
    component: str = "",
    layer: int | None = None,
    module: str = "",
    shape: str = "",
) -> Row:
    """The row of a measure and of the same measure under each draw of the null."""
    values = [draw.value for draw in draws if draw.value is not None]
    mean = statistics.fmean(values) if values else None
    return Row(
        name=name,
        component=component,
        layer=layer,
        module=module,
        shape=shape,
        metric=observed.metric,
        parameter=observed.parameter,
        value=observed.value,
        null="iid" if values else "",
        null_mean=mean,
        null_sd=statistics.stdev(values) if len(values) > 1 else None,
        excess=observed.value - mean if observed.value is not None and mean is not None else None,
        status=observed.status,
        reason=observed.reason,
    )
