"""The configuration reference: every setting with type, default and sentence, from the classes and their docstrings.

    python scripts/config_reference.py          # Markdown, to stdout

scripts/site_pages.py makes a page of the site of it.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlopd.config import base, training
from vlopd.config.experiment import ExperimentConfig

KINDS = [
    (base.Count, "integer > 0"),
    (base.Number, "integer >= 0"),
    (base.Seed, "integer >= 0"),
    (base.Positive, "number > 0"),
    (base.NonNegative, "number >= 0"),
    (base.Temperature, "number, 0.01 to 100"),
    (base.Weight, "number >= 0"),
    (base.Share, "fraction in (0, 1]"),
    (base.Part, "fraction in (0, 1)"),
    (base.PartOrZero, "fraction in [0, 1)"),
    (base.Name, "name"),
    (training.Factor, "number > 0"),
    (training.WeightDecay, "number >= 0"),
    (training.Epsilon, "number > 0"),
    (bool, "true or false"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
    (type(None), "null"),
    (Any, "any value"),
    (JsonValue, "any value"),
]
"""Types as a user writes their values; the order does not matter."""


SPELLED = {"Plugin": '"module:function"'}
"""Classes of the configuration that are written as text."""

COUNTED = re.compile(
    r"(ulps|steps|completion tokens|tokens|prompts|completions|questions|answers|examples|resamples|draws|rollouts|"
    r"updates|rows|directions|layer numbers|rank|pixels|attempts|requests)\b",
    re.IGNORECASE,
)
"""What an integer counts: the first of these in its sentence."""


FILLED = {"arms.NAME.seed": "`1`, or `2` with a mask"}
"""Defaults that depend on other settings."""


class Setting(NamedTuple):
    """One field of a section."""

    key: str
    type: str
    default: str
    unit: str
    sentence: str


class Part(NamedTuple):
    """A section, or one variant of it; what several variants share is a part of its own."""

    classes: list[type[BaseModel]]
    title: str
    level: int
    text: str
    settings: list[Setting]


HEAD = """# Configuration

Every setting of a config file, generated from `vlopd/config/`. Write it in TOML (`vlopd run mine.toml`), on the command
line (`vlopd run mine.toml optim.learning_rate=5e-7`), or as keyword arguments of `vlopd.Recipe`. `NAME` stands for a
name of your own. TOML has no null: leave the key out. An unknown key or a value out of range is refused with the
nearest known key or the bounds.

Units: fractions are in [0, 1], log-probs and KL in nats, times in seconds; a count is of what its sentence names. Steps
are optimizer steps of `train.steps`, numbered from 1 (`full@12` is after 12 steps); the column `step` of the logs
counts the steps before, from 0.
"""


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in a type: variants of a union, values of a table, items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [cls for part in get_args(annotation) for cls in sections_in(part)]
    return list(dict.fromkeys(found))


def spell(kind: Any) -> str:
    """A type as a user writes its values."""
    for known, words in KINDS:
        if kind is known or (get_origin(known) is Annotated and kind == known):
            return words
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return spell(args[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        words = [spell(arg) for arg in args if arg is not type(None)]
        null = ["null"] if type(None) in args else []
        return " or ".join(dict.fromkeys([*words, *null]))
    if origin is tuple:
        return (
            f"list of {spell(args[0])}"
            if args[1:] == (...,)
            else f"list of {len(args)}, each a {spell(args[0])}"
        )
    if origin is dict:
        return f"table of {spell(args[1])}".replace("of table", "of tables")
    if sections_in(kind):
        return "table"
    return SPELLED.get(kind.__name__, kind.__name__)


def show_default(field: FieldInfo) -> str:
    """A default as TOML, or nothing where the value is required."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return f"`{as_toml(value)}`"


def as_toml(value: Any) -> str:
    """A value in TOML's inline form; null for None."""
    if isinstance(value, BaseModel):
        set_ = {k: v for k, v in value if k == "type" or k in value.model_fields_set}
        return as_toml(set_)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (
        f'"{value}"'
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def hints_of(cls: type[BaseModel]) -> dict[str, Any]:
    """The fields' types as written, with the names of their aliases' bounds."""
    return typing.get_type_hints(cls, include_extras=True)


def setting(cls: type[BaseModel], path: str, name: str) -> Setting:
    field = cls.model_fields[name]
    key = f"{path}.{name}" if path else name
    sentence = " ".join((field.description or "").split())
    kind = spell(hints_of(cls)[name])
    return Setting(
        key, kind, FILLED.get(key, show_default(field)), unit_of(kind, sentence, name), sentence
    )


def unit_of(kind: str, sentence: str, name: str) -> str:
    """The unit of a number: from its type, or as its sentence says; a seed has none."""
    if "fraction" in kind:
        return "fraction"
    if "integer" in kind and "seed" not in name:
        counted = COUNTED.search(sentence)
        return counted[0].lower() if counted else "?"
    if "number" in kind and "temperature" in name:
        return "divisor of logits"
    if "number" in kind and name.endswith("_seconds"):
        return "seconds"
    if "number" in kind and name.endswith("_gb"):
        return "GB (1e9 bytes)"
    if "number" in kind:
        scale = re.search(r"units of the (\w+)|(multiplications)", sentence)
        return (scale[1] or scale[2]) if scale else "ratio"
    return ""


def step_into(hint: Any, path: str) -> str:
    """The key path of the sections in a type: a table of them is by NAME."""
    if get_origin(hint) is Annotated:
        return step_into(get_args(hint)[0], path)
    if get_origin(hint) in (Union, UnionType):
        return max((step_into(arg, path) for arg in get_args(hint) if sections_in(arg)), key=len)
    return f"{path}.NAME" if get_origin(hint) is dict else path


def parts(path: str, classes: list[type[BaseModel]], level: int, seen: set[type]) -> Iterator[Part]:
    """The parts of a section: what all variants share, each variant, and the sections within."""
    shared = [
        name
        for name in classes[0].model_fields
        if name != "type" and all(owner(cls, name) is owner(classes[0], name) for cls in classes)
    ]
    inside = [(classes[0], name) for name in (shared if classes[1:] else classes[0].model_fields)]
    if len(classes) == 1:
        yield Part(classes, path, level, text_of(classes), own_settings(classes[0], path, ()))
    else:
        common = [
            each for each in bases_of(classes[0]) if all(issubclass(c, each) for c in classes)
        ]
        variants = ", ".join(f"`{tag}`" for cls in classes for tag in tags(cls))
        text = f"`type` is one of {variants}.\n\n{text_of(common)}".strip()
        yield Part(classes, path, level, text, [setting(classes[0], path, name) for name in shared])
        for cls in classes:
            names = ", ".join(f'"{tag}"' for tag in tags(cls))
            text = text_of([cls, *(each for each in bases_of(cls) if each not in common)])
            settings = own_settings(cls, path, shared)
            yield Part([cls], f"{path}.type = {names}", level + 1, text, settings)
            inside += [(cls, name) for name in cls.model_fields if name not in shared]
    seen |= set(classes)
    for cls, name in inside:
        hint = hints_of(cls)[name]
        new = [found for found in sections_in(hint) if found not in seen]
        if new:
            yield from parts(step_into(hint, f"{path}.{name}"), new, min(level + 1, 4), seen)


def owner(cls: type[BaseModel], name: str) -> type | None:
    """The class that declares a field."""
    return next((each for each in cls.__mro__ if name in inspect.get_annotations(each)), None)


def tags(cls: type[BaseModel]) -> tuple[str, ...]:
    """The values of `type` that select this variant."""
    kind = cls.model_fields["type"].annotation if "type" in cls.model_fields else Literal[()]
    return get_args(kind) if get_origin(kind) is Literal else ("module:function",)


def bases_of(cls: type) -> list[type]:
    """The sections that a section derives from, nearest first."""
    return [
        each
        for each in cls.__mro__[1:]
        if issubclass(each, base.Section) and each is not base.Section
    ]


def text_of(classes: Sequence[type]) -> str:
    """The classes' docstrings."""
    return "\n\n".join(filter(None, (inspect.getdoc(cls) for cls in classes)))


def own_settings(cls: type[BaseModel], path: str, without: Any) -> list[Setting]:
    names = [name for name in cls.model_fields if name != "type" and name not in without]
    return [setting(cls, path, name) for name in names]


def all_parts() -> list[Part]:
    """The whole reference: the config's own fields first, then section by section."""
    found = [
        Part(
            [ExperimentConfig],
            "Top level",
            2,
            text_of([ExperimentConfig]),
            own_settings(ExperimentConfig, "", ()),
        )
    ]
    seen: set[type] = set()
    hints = hints_of(ExperimentConfig)
    for name in ExperimentConfig.model_fields:
        if classes := sections_in(hints[name]):
            found += parts(step_into(hints[name], name), classes, 2, seen)
    return found


def markdown() -> str:
    lines = [HEAD]
    for part in all_parts():
        title = part.title if part.title == "Top level" else f"`{part.title}`"
        lines += [f"{'#' * part.level} {title}", "", part.text, ""]
        if part.settings:
            lines += ["| setting | type | default | unit | meaning |", "|---|---|---|---|---|"]
            lines += [f"| {' | '.join(map(cell, row))} |" for row in escaped(part.settings)]
            lines.append("")
    return "\n".join(lines)


def escaped(settings: list[Setting]) -> Iterator[tuple[str, ...]]:
    for each in settings:
        yield (f"`{each.key}`", each.type, each.default, each.unit, each.sentence)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown())
