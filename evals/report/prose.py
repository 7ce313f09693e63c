"""Text of models and data as safe HTML: everything is escaped, light Markdown is set, and mathematics becomes MathML.

A container with `white-space: pre-wrap` keeps the line breaks.
"""

from __future__ import annotations

import re
import time
from html import escape, unescape
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element

LONGEST = 20_000
"""Characters of a text that are shown; of a longer one the beginning and the end."""
LONGEST_FORMULA = 600
SEGMENTS = re.compile(
    r"```[^\n`]*\n(?P<block>.{1,6000}?)```"
    r"|`(?P<code>[^`\n]{1,300})`"
    r"|\$\$(?P<dollars>.{1,2000}?)\$\$"
    r"|\\\[(?P<brackets>.{1,2000}?)\\\]"
    r"|(?P<environment>\\begin\{(?P<name>(?:align|equation|gather)\*?)\}.{1,2000}?\\end\{(?P=name)\})"
    r"|\\\((?P<parentheses>.{1,1000}?)\\\)"
    r"|(?<![\\$])\$(?!\s)(?P<dollar>(?:\\[^\n]|[^$\\\n]){1,1000}?)(?<!\s)\$(?!\d)"
    r"|(?P<boxed>\\boxed\{(?:[^{}\n]|\{[^{}\n]{0,300}\}){1,300}\})",
    re.DOTALL,
)
"""Code and mathematics in a text, of bounded length. A dollar opens a formula before text, and closes one behind text
where no digit follows, so that prices stay prices."""
DISPLAYED = ("dollars", "brackets", "environment")
KEPT = re.compile("[\ue000-\ue002\x00]")
"""Characters of a text that are dropped: those of PLACE, and null, which HTML forbids."""
PLACE = re.compile("\n?\ue000(\\d+)\ue002\n?|\ue000(\\d+)\ue001")
"""Where a kept segment stands; a displayed formula is a block, and takes the line breaks beside it with it."""
HEADING = re.compile(r"^#{1,6} +(.+?)#*$", re.MULTILINE)
BOLD = re.compile(r"\*\*(?=\S)(.{1,600}?)(?<=\S)\*\*")
ITALIC = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]{1,300}?)(?<=[^\s*])\*(?![\w*])")
BULLET = re.compile(r"^( *)[-*] (?=\S)", re.MULTILINE)
TAGS = frozenset(
    (
        *(
            "math",
            "mrow",
            "mi",
            "mn",
            "mo",
            "mtext",
            "mspace",
            "ms",
            "mfrac",
            "msqrt",
            "mroot",
            "mstyle",
        ),
        *(
            "msub",
            "msup",
            "msubsup",
            "munder",
            "mover",
            "munderover",
            "mtable",
            "mtr",
            "mtd",
            "none",
        ),
        *("mmultiscripts", "mprescripts", "mpadded", "mphantom"),
    )
)
ATTRIBUTES = frozenset(
    (
        *("display", "mathvariant", "displaystyle", "scriptlevel", "stretchy", "fence", "form"),
        *("separator", "lspace", "rspace", "width", "height", "depth", "minsize", "maxsize"),
        *("columnalign", "columnspacing", "rowspacing", "linethickness", "accent", "accentunder"),
        *("movablelimits", "largeop", "symmetric"),
    )
)
PLAIN_VALUE = re.compile(r"[\w .%+-]{1,40}")
ENVIRONMENTS = (
    ("aligned", "align*"),
    ("split", "align*"),
    ("gathered", "gather*"),
    ("equation*", ""),
)
"""Environments that latex2mathml lacks, and those that read the same."""


class Typesetter:
    """Texts as HTML; formulas are converted once each, for at most `seconds` in all, later ones are as written."""

    def __init__(self, seconds: float = 20.0):
        self.left = seconds
        self.known: dict[tuple[str, bool], str] = {}

    def html(self, text: str) -> str:
        """A text as HTML without any tag of its own; a long one loses its middle, and says so."""
        kept: list[str] = []

        def keep(found: re.Match[str]) -> str:
            kept.append(self._segment(found))
            end = "\ue002" if '<math display="block"' in kept[-1] else "\ue001"
            return f"\ue000{len(kept) - 1}{end}"

        text = SEGMENTS.sub(keep, KEPT.sub("", shortened(text)))
        text = escape(text)
        text = HEADING.sub(r"<strong>\1</strong>", text)
        text = BOLD.sub(r"<strong>\1</strong>", text)
        text = ITALIC.sub(r"<em>\1</em>", text)
        text = BULLET.sub("\\1\u2022 ", text)
        return PLACE.sub(lambda place: kept[int(place[1] or place[2])], text)

    def _segment(self, found: re.Match[str]) -> str:
        kind = str(found.lastgroup)
        content = found[kind]
        if kind in ("block", "code"):
            return f"<code>{escape(content.rstrip())}</code>"
        return self.formula(content, kind in DISPLAYED) or escape(found[0])

    def formula(self, latex: str, displayed: bool = False) -> str:
        """A formula as MathML; empty where it is too long, cannot be parsed, or the time is used up."""
        key = (latex, displayed)
        if key not in self.known:
            if self.left <= 0:
                return ""
            before = time.perf_counter()
            self.known[key] = mathml(latex, displayed)
            self.left -= time.perf_counter() - before
        return self.known[key]


def shortened(text: str) -> str:
    """At most LONGEST characters of a text, in valid Unicode."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        left_out = f"\n\n[... {len(text) - 2 * half:,} characters left out ...]\n\n"
        text = text[:half] + left_out + text[-half:]
    return text.encode("utf-8", "replace").decode()


def mathml(latex: str, displayed: bool) -> str:
    """LaTeX as a <math> element of known tags and attributes; empty for what latex2mathml cannot read."""
    latex = latex.strip()
    bare = re.sub(r"\\[{}]", "", latex)
    if not latex or len(latex) > LONGEST_FORMULA or bare.count("{") != bare.count("}"):
        return ""
    for name, known in ENVIRONMENTS:
        for side in ("begin", "end"):
            latex = latex.replace(f"\\{side}{{{name}}}", f"\\{side}{{{known}}}" if known else "")
    try:
        element = convert_to_element(latex, display="block" if displayed else "inline")
        return _serialised(element)
    except Exception:  # of many types; the formula is then shown as written
        return ""


def _serialised(element: Element) -> str:
    """An element as HTML; its texts have entities. Raises ValueError for a command or a separator left in it."""
    tag, attributes = element.tag, ""
    if tag == "menclose":  # browsers have no MathML box
        tag, attributes = "mrow", ' class="boxed"'
    if tag not in TAGS:
        raise ValueError(tag)
    text = unescape(element.text or "")
    if (text.startswith("\\") and text != "\\") or text == "&":
        raise ValueError(text)
    for name, value in element.attrib.items():
        if name in ATTRIBUTES and value != "inline" and PLAIN_VALUE.fullmatch(value):
            attributes += f' {name}="{value}"'
    inner = escape(text) + "".join(map(_serialised, element))
    if tag == "mrow" and not attributes and len(element) == 1 and not text:
        return inner
    return f"<{tag}{attributes}>{inner}</{tag}>"
