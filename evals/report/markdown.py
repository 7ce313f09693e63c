"""Converts the report's HTML to Markdown: headings, paragraphs, tables, and links to figure files."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### ", "p": "", "caption": "", "li": "- "}
CELLS = ("th", "td")
TERMS = ("dt", "dd")
SPECIAL = re.compile(
    r"[\\`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)|(?<=\])[(\[]|(?<![^\W_])_|_(?![^\W_])"
)
"""Characters that would make code, emphasis, HTML, entities, images and links of a text."""
ENTITIES = {"<": "&lt;", "&": "&amp;"}
OPENING = re.compile(
    r"(\[(?=[^\]]*\]:)|#{1,6}(?= |$)|[>|]|[-+](?= |$)|[-=~]{3,}|\d{1,9}[.)](?= |$))"
)
"""Beginnings of a block that would make a heading, quotation, list, rule, table or link of it."""
HIDDEN = ("head", "nav", "svg", "pre", "script", "noscript", "style")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: names, questions and answers may hold its marks, and HTML."""
    return SPECIAL.sub(lambda mark: ENTITIES.get(mark[0], f"\\{mark[0]}"), text)


def _as_block(text: str) -> str:
    """Escaped text as a block of its own."""
    if not (mark := OPENING.match(text)):
        return text
    at = mark.end() - 1 if mark[0][0].isdigit() else 0
    return f"{text[:at]}\\{text[at:]}"


def markdown(page: str) -> str:
    parser = _Page()
    parser.feed(page)
    return "\n\n".join(parser.blocks) + "\n"


class _Page(HTMLParser):
    """Parser of report.html.j2's output, in which all text is in a block, a cell or a figcaption."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.text = self.term = ""
        self.rows: list[list[str]] = []
        self.rule: list[str] = []
        self.figure: str | None = None
        self.hidden = 0
        self.code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.hidden += tag in HIDDEN
        if tag in BLOCKS or tag in CELLS or tag in TERMS or tag == "figcaption":
            self.text = ""
        if tag == "figure":
            self.figure = attributes["data-name"]
        elif tag == "table":
            self.rows, self.rule = [], []
        elif tag == "tr":
            self.rows.append([])
        elif attributes.get("scope") == "col":
            self.rule.append("---:" if self.rule and attributes.get("class") != "text" else "---")
        elif tag in ("br", "code"):
            self.text += {"br": " ", "code": "`"}[tag]
            self.code |= tag == "code"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data.replace("`", "'") if self.code else escaped(data)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN
        text = " ".join(self.text.split())
        if tag in BLOCKS:
            self.blocks.append(BLOCKS[tag] + _as_block(text))
        elif tag == "figcaption":
            self.blocks.append(f"![{text}](figures/{self.figure}.svg)")
        elif tag == "dt":
            self.term = text
        elif tag == "dd":
            self.blocks.append(f"- {self.term}: {text}")
        elif tag in CELLS:
            self.rows[-1].append(text.replace("|", "\\|"))
        elif tag == "table":
            head, *rest = self.rows
            lines = [f"| {' | '.join(cells)} |" for cells in (head, self.rule, *rest)]
            self.blocks.append("\n".join(lines))
        elif tag == "code":
            self.text += "`"
            self.code = False
