"""Jinja's sandbox for the templates of task files and teachers, with a bound on what an expression makes."""

from __future__ import annotations

from typing import Any

from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

LARGEST = 10_000_000
"""Characters, items or bits of a product or power."""


class Sandbox(ImmutableSandboxedEnvironment):
    """No attribute of Python's internals, no change of a value, no product of more than LARGEST."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > LARGEST:
            raise SecurityError(
                f"an expression with {operator} makes more than {LARGEST:,} characters"
            )
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits of the result, about."""
    if operator == "**":
        both = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * max(right, 0) if both else 0
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            return len(many) * max(times, 0)
    both = isinstance(left, int) and isinstance(right, int)
    return left.bit_length() + right.bit_length() if both else 0
