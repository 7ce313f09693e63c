"""Outputs made of styles and contents, with labels known by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Output(NamedTuple):
    """An output with its reference answer, and what a person says of it: right, wrong or unreadable."""

    id: str
    gold: str
    output: str
    label: str


def outputs(
    family: str,
    styles: Sequence[str],
    contents: Sequence[tuple[str, str]],
    unreadable: Sequence[str],
) -> list[Output]:
    """Every style with every content, a wrong one in every third; and texts without an answer. @ is the answer."""
    made = [
        Output(
            f"{family}-{s}-{c}",
            right,
            style.replace("@", wrong if (s + c) % 3 == 0 else right),
            "wrong" if (s + c) % 3 == 0 else "right",
        )
        for s, style in enumerate(styles)
        for c, (right, wrong) in enumerate(contents)
    ]
    return made + [
        Output(f"{family}-none-{k}", contents[0][0], text, "unreadable")
        for k, text in enumerate(unreadable)
    ]
