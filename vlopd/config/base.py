"""What every part of the configuration is built of, and the errors that a user can mend."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
"""File names that some systems keep for devices, with any ending."""


class Section(BaseModel):
    """A frozen table of settings. Nothing is converted (`true` is no number, "3" no integer), no number is NaN or
    infinite, no text is empty; an integer may stand for a float, a list for a tuple."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def take_lists(cls, table: Any) -> Any:
        """TOML and JSON have lists where we have tuples."""
        if not isinstance(table, Mapping):
            return table
        return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}


def between(low: float, high: float, or_zero: bool = False) -> AfterValidator:
    """Refuses numbers outside of [low, high], but for 0 where that is allowed."""

    def check(value: float) -> float:
        if not low <= value <= high and not (or_zero and value == 0):
            zero = "0 or " if or_zero else ""
            raise ValueError(f"{value!r} is not {zero}between {low:.3g} and {high:.8g}")
        return value

    return AfterValidator(check)


SMALLEST, LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
"""Of the positive numbers of float32, which trained values and losses are held in."""


Count = Annotated[int, Field(gt=0, lt=2**31)]


Number = Annotated[int, Field(ge=0, lt=2**31)]


Seed = Annotated[int, Field(ge=0, lt=2**63)]


Positive = Annotated[float, between(SMALLEST, LARGEST)]


NonNegative = Annotated[float, between(SMALLEST, LARGEST, or_zero=True)]


Temperature = Annotated[float, between(0.01, 100)]
"""Logits divided by less overflow, and by more are all alike."""


Weight = Annotated[float, between(1e-6, 1e6, or_zero=True)]
"""Relative to others of its kind."""


Share = Annotated[float, between(1e-9, 1)]


Part = Annotated[float, between(1e-6, 1 - 1e-6)]
"""A share that is neither nothing nor all."""


PartOrZero = Annotated[float, between(1e-6, 1 - 1e-6, or_zero=True)]


Item = TypeVar("Item", bound=Hashable)


def without_repeats(values: tuple[Item, ...]) -> tuple[Item, ...]:
    """Raises ValueError where a value comes twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value!r} is given twice")
    return values


Unique = AfterValidator(without_repeats)
"""As in Annotated[tuple[str, ...], Unique]."""


def usable_name(name: str) -> str:
    """Raises ValueError for a name that not every file system takes."""
    if name.split(".")[0].lower() in RESERVED or name.endswith("."):
        raise ValueError(f"{name!r} is no file name on every system; choose another")
    return name


Name = Annotated[str, Field(pattern=NAME, max_length=100), AfterValidator(usable_name)]
"""Of an experiment, an arm, a mask: folders and files are called so."""


def distinct_names(names: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for two names that differ in nothing but case: one file on some systems."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"{where}: {other!r} and {name!r} differ only by case; rename one")
