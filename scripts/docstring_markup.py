"""griffe's extension for the site: what our docstrings write plainly, as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).parents[1] / "docs"


def _link(match: re.Match[str]) -> str:
    """docs/NAME.md -> a link to it, or to the page of that name in reference/."""
    name = match[1]
    return f"[{name}]({'../' if (DOCS / f'{name}.md').exists() else ''}{name}.md)"


class DocstringMarkup(griffe.Extension):
    """Examples (`>>> ...` up to an empty line) become code blocks, and docs/NAME.md a link, as from reference/."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(
                r"(?:^>>> .+\n?)(?:^.+\n?)*",
                r"```pycon\n\g<0>\n```\n",
                obj.docstring.value,
                flags=re.M,
            )
            obj.docstring.value = re.sub(r"\bdocs/([\w-]+)\.md", _link, text)
