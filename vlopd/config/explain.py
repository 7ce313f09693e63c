"""Formats pydantic's validation errors as plain lines with the keys that a user writes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vlopd.errors import shown

BUILT_IN, OWN = "[built-in]", "[function]"
"""Tags of built-in variants and plug-ins in pydantic's error locations; like its "[key]", no key
can be one."""
NAME, TABLE = "[name]", "[table]"
"""The same of a setting that is a name or a table."""

TYPES = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "string_type": "a string",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
LENGTHS = {
    "too_short": ("at least", "min_length", "item"),
    "too_long": ("at most", "max_length", "item"),
    "string_too_short": ("at least", "min_length", "character"),
    "string_too_long": ("at most", "max_length", "character"),
}


def explain_errors(error: ValidationError, root: Any) -> str:
    """All errors of a validation against `root` (a section or a union of sections), in one line."""
    return "; ".join(_explain(each, root) for each in error.errors())


def _explain(error: ErrorDetails, root: Any) -> str:
    """One error: the key, the problem and the value; for an unknown key, the nearest known one."""
    keys, known, annotation = _walk(error["loc"], root)
    where = ".".join(keys)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], known, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {shown(where)}{hint}"
    if error["type"] == "union_tag_not_found":
        tags = [tag for cls in _sections_in(annotation) for tag in _variant_tags(cls)]
        return f"{_joined(where, 'type')} is missing; it is one of {', '.join(tags)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "union_tag_invalid":
        keys = [*keys, "type"]
        where = _joined(where, "type")
    problem = _problem(error, error["loc"][-1:] == (BUILT_IN,))
    return f"{where}: {problem}" if where else problem


def _problem(error: ErrorDetails, or_function: bool) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        value, rule = context["tag"], f"must be one of {context['expected_tags']}"
        rule += ', or "module:function"' if or_function else ""
    elif kind == "literal_error":
        expected = context["expected"].replace(" or ", ", ")
        rule = f"must be one of {expected}" if "," in expected else f"must be {expected}"
        rule += ', or "module:function"' if or_function else ""
    elif kind in TYPES:
        rule = f"must be {TYPES[kind]}"
    elif kind in BOUNDS:
        words, name = BOUNDS[kind]
        rule = f"must be {words} {context[name]}"
    elif kind in LENGTHS:
        words, name, unit = LENGTHS[kind]
        count = context[name]
        rule = f"must have {words} {count} {unit}{'' if count == 1 else 's'}"
    elif kind == "string_pattern_mismatch":
        rule = f"must match {context['pattern']}"
    else:
        rule = error["msg"].replace("Input should be", "must be", 1)
    return f"{rule}; got {shown(value)}" if isinstance(value, str | int | float | None) else rule


def _joined(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _walk(location: Sequence[int | str], root: Any) -> tuple[list[str], list[str], Any]:
    """(keys that the user writes, known keys beside the last, annotation there) of a pydantic error path.

    pydantic's path also holds the `type` of a section, "[built-in]", "[function]", "[name]" or "[table]" and, for a
    table's key, "[key]"; these are dropped.
    """
    here: Any = root
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        variants = _sections_in(here)
        tagged = [cls for cls in variants if part in _variant_tags(cls)]
        if part in ("[key]", BUILT_IN, OWN, NAME, TABLE):
            continue
        if get_origin(_bare(here)) is dict:
            here = get_args(_bare(here))[1]
        elif len(variants) > 1 and tagged:
            here = tagged[0]
            continue
        elif get_origin(_bare(here)) is tuple:
            here = get_args(_bare(here))[0]
        else:
            known = sorted({key for cls in variants for key in cls.model_fields})
            fields = [cls.model_fields[part] for cls in variants if part in cls.model_fields]
            here = fields[0].annotation if fields else None
        keys.append(str(part))
    return keys, known, here


def _bare(annotation: Any) -> Any:
    """A type without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    others = [each for each in get_args(annotation) if each is not type(None)]
    if type(None) in get_args(annotation) and len(others) == 1:
        return _bare(others[0])
    return annotation


def _variant_tags(cls: type[BaseModel]) -> tuple[str, ...]:
    field = cls.model_fields.get("type")
    return get_args(field.annotation) if field is not None else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes of a union of variants; empty for a table or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (dict, tuple):
        return []
    return [cls for part in get_args(annotation) for cls in _sections_in(part)]
