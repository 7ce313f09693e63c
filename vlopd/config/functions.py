"""Sections whose `type` is a plug-in, "module:function" (docs/plugins.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, Discriminator, Tag, model_validator

from vlopd.config.base import Section
from vlopd.config.explain import BUILT_IN, OWN
from vlopd.plugins import Plugin, Use


class Function(Section):
    """A plug-in; keys of the table that are not settings below are its keyword arguments."""

    model_config = ConfigDict(extra="allow")

    takes: ClassVar[tuple[str, ...]] = ()
    """Names of the positional arguments that it is called with."""

    type: Plugin
    """`module:function`, of a file in the working folder or an installed module."""

    @model_validator(mode="after")
    def check_arguments(self) -> Function:
        for name, value in (self.model_extra or {}).items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"argument {name!r} must be text, finite numbers, true or false, lists or tables of them; "
                    f"got {value!r}"
                ) from None
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The function's keyword arguments, as JSON gives them; a new copy."""
        return json.loads(json.dumps(self.model_extra or {}))

    def use(self, key: str) -> Use:
        """The function at its place `key` in the config."""
        fields = type(self).model_fields
        settings = tuple(name for name in fields if name != "type")
        return Use(key, self.type, self.takes, self.arguments, settings)


def _kind(value: Any) -> str:
    """Whether a table, a section or a name is of a plug-in."""
    name = value.get("type") if isinstance(value, Mapping) else value
    if isinstance(value, Function) or isinstance(name, Plugin) or callable(name):
        return OWN
    return OWN if isinstance(name, str) and ":" in name else BUILT_IN


IS_BUILT_IN, IS_OWN, KIND = Tag(BUILT_IN), Tag(OWN), Discriminator(_kind)
"""As in Annotated[Annotated[BuiltIn, IS_BUILT_IN] | Annotated[OwnFunction, IS_OWN], KIND]."""


def with_names(value: Any) -> Any:
    """A table in which functions, also in tables and lists within it, are Plugins, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: with_names(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_names(each) for each in value]
    return Plugin.of(value) if callable(value) else value
