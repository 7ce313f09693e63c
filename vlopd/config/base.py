"""Base class and field types of the configuration."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlopd.config.explain import explain_errors
from vlopd.errors import ConfigError, shown

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
"""File names that some systems reserve for devices, with any extension."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as Explaining
else:

    class Explaining(type(BaseModel)):
        """Metaclass of sections: constructing one in Python raises a one-line ConfigError, as a TOML file does.

        Not an `__init__`, which pydantic would also call for nested tables, whose errors would then lose their path.
        """

        def __call__(cls, *args: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*args, **settings)
            except ValidationError as error:
                message = f"{cls.__name__}: {explain_errors(error, cls)}"
            raise ConfigError(message)


class Section(BaseModel, metaclass=Explaining):
    """A frozen table of settings. Values are not converted (`true` is not a number, "3" not an integer), numbers are
    finite, strings not empty; an integer is accepted as a float, a list as a tuple."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,  # for the configuration reference
    )

    @model_validator(mode="before")
    @classmethod
    def take_lists(cls, table: Any) -> Any:
        """Converts the lists of TOML and JSON to tuples."""
        if not isinstance(table, Mapping):
            return table
        return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}


def between(low: float, high: float, or_zero: bool = False) -> AfterValidator:
    """Validator: low <= value <= high, or 0 with `or_zero`."""

    def check(value: float) -> float:
        if not low <= value <= high and not (or_zero and value == 0):
            zero = "0 or " if or_zero else ""
            raise ValueError(f"must be {zero}between {low:.3g} and {high:.8g}; got {shown(value)}")
        return value

    return AfterValidator(check)


SMALLEST, LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
"""Range of the positive float32 numbers, the dtype of trained values and losses."""


Count = Annotated[int, Field(gt=0, lt=2**31)]


Size = Annotated[int, Field(gt=0, le=2**20)]
"""Prompts, completions or tokens that are held in memory together: a million."""


Draws = Annotated[int, Field(gt=0, le=1_000_000)]
"""Draws of a resampling: a million give an interval's ends to a hundredth of its width."""


Number = Annotated[int, Field(ge=0, lt=2**31)]


Seed = Annotated[int, Field(ge=0, lt=2**63)]


Positive = Annotated[float, between(SMALLEST, LARGEST)]


NonNegative = Annotated[float, between(SMALLEST, LARGEST, or_zero=True)]


def _not_zero(value: float) -> float:
    if not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"must be a number other than 0, up to {LARGEST:.3g}; got {shown(value)}")
    return value


Signed = Annotated[float, AfterValidator(_not_zero)]
"""Of either sign, not 0."""


Temperature = Annotated[float, between(0.01, 100)]
"""Logits divided by less overflow; divided by more they are uniform."""


Weight = Annotated[float, between(1e-6, 1e6, or_zero=True)]
"""A relative weight."""


Share = Annotated[float, between(1e-9, 1)]


Part = Annotated[float, between(1e-6, 1 - 1e-6)]
"""A fraction strictly between 0 and 1."""


PartOrZero = Annotated[float, between(1e-6, 1 - 1e-6, or_zero=True)]


def as_type(value: Any) -> Any:
    """A section's name in place of its table: `source = "data"` is short for `source = {type = "data"}`."""
    return {"type": value} if isinstance(value, str) else value


def later(default: Any) -> Any:
    """A field that came after runs were made without it: dumps, and so digests of inputs, omit its default."""
    return Field(default, exclude_if=lambda value: value == default)


Item = TypeVar("Item", bound=Hashable)


def without_repeats(values: tuple[Item, ...]) -> tuple[Item, ...]:
    """Raises ValueError for a repeated value."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value!r} is given twice")
    return values


Unique = AfterValidator(without_repeats)
"""As in Annotated[tuple[str, ...], Unique]."""


def _usable_name(name: str) -> str:
    """Raises ValueError for a name that is not valid on every file system."""
    if name.split(".")[0].lower() in RESERVED or name.endswith("."):
        raise ValueError(f"{name!r} is not a valid file name on every system; choose another")
    return name


LONGEST_NAME = 100
"""Characters of a name."""


Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME), AfterValidator(_usable_name)]
"""The name of an experiment, an arm or a mask, used for files and folders."""


def distinct_names(names: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for two names that differ only by case, which are one file on some systems."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"{where}: {other!r} and {name!r} differ only by case; rename one")
