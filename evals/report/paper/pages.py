"""The tables of `vlopd paper` laid out: lines and footnotes, and as Markdown, CSV and LaTeX."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from evals.report.markdown import escaped
from evals.report.paper.numbers import Number, Table
from evals.report.verdict import p_value
from vlopd.errors import without_controls
from vlopd.files import write_text

KINDS = {"update": "", "drawn": "drawn null", "signal": "signal null"}
HOW = (
    "Brackets: 95 % intervals over arms (training seeds, draws of a mask) where there are several, over questions for "
    "the test score of one; of overlaps, the range of pairs. Null lines: mean ± standard deviation over draws of a "
    "drawn null, over arms of a signal null; p: the update against it; `equal`: equivalent at the margin of groups.csv."
)


class Laid(NamedTuple):
    """A table as texts: lines of (pair, row, cells), and footnotes in the order of their letters."""

    columns: tuple[str, ...]
    lines: list[tuple[str, str, list[str]]]
    notes: list[str]


def lay_out(table: Table) -> Laid:
    """The lines of a table: each row's update, then its drawn and signal nulls; reasons become footnotes."""
    letters = _letters()
    marks: dict[str, str] = {}

    def text(number: Number | None) -> str:
        if number is None:
            number = Number("", "", "", "", "", "", reason="not in this run")
        if number.reason and number.reason not in marks:
            marks[number.reason] = next(letters)
        mark = f" ({marks[number.reason]})" if number.reason else ""
        return (_cell(number) or "-") + mark

    rows: dict[tuple[str, str], dict[tuple[str, str], dict[str, Number]]] = {}
    for number in table.numbers:
        lines = rows.setdefault((number.pair, number.row), {})
        lines.setdefault((number.kind, number.null), {})[number.column] = number
    found = []
    for (pair, row), lines in rows.items():
        for kind, words in KINDS.items():
            unnamed = lines.get((kind, ""), {})
            own = {null: its for (k, null), its in lines.items() if k == kind and null}
            if kind == "update" or (unnamed and not own):
                own = {"": unnamed}
            for null, its in own.items():
                cells = {**unnamed, **its}
                head = (
                    row if kind == "update" else f"{words}: {null.replace('_', ' ')}".rstrip(": ")
                )
                found.append((pair, head, [text(cells.get(column)) for column in table.columns]))
    notes = [f"({mark}) {reason}." for reason, mark in marks.items()]
    return Laid(table.columns, found, notes)


def _letters() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    for length in count(1):
        yield from map("".join, product(string.ascii_lowercase, repeat=length))


def _cell(number: Number) -> str:
    """A number as text; empty without a value."""
    if number.value is None:
        return ""
    if number.kind == "update":
        has_ends = number.low is not None and number.high is not None
        return f"{number.value:.3g}" + (
            f" [{number.low:.3g}, {number.high:.3g}]" if has_ends else ""
        )
    words = f"{number.value:.3g}" + ("" if number.sd is None else f" ± {number.sd:.1g}")
    if number.p is not None:
        p = p_value(number.p)
        words += f", p {p if p.startswith('<') else '= ' + p}"
    return words + (", equal" if number.equivalent else "")


def numbers(table: Table) -> pd.DataFrame:
    """The numbers of a table, one row each, with all of their fields."""
    return pd.DataFrame(table.numbers, columns=list(Number._fields)).drop(columns="table")


def wide(table: Table) -> pd.DataFrame:
    """The table as texts, one row a line."""
    laid = lay_out(table)
    rows = [[pair, row, *cells] for pair, row, cells in laid.lines]
    return pd.DataFrame(rows, columns=["pair", "row", *laid.columns])


def to_markdown(table: Table) -> str:
    frame = wide(table)
    head = [_md(column) for column in frame.columns]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    lines += [list(map(_md, row)) for row in frame.itertuples(index=False)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(frame) else ""
    parts = [f"## {table.title}", body, *_remarks(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(value: object) -> str:
    return escaped(str(value)).replace("|", "\\|")


def to_latex(table: Table, name: str) -> str:
    """A booktabs table, and its footnotes below as text."""
    frame = wide(table)
    below = "\n\n".join(_latex(line) for line in _remarks(table))
    if frame.empty:
        return below + "\n"
    tidy = frame.map(lambda text: _latex(text)).rename(columns=_latex)
    body = tidy.to_latex(
        index=False, escape=False, caption=_latex(table.title), label=f"tab:{name}",
        column_format="ll" + "r" * len(table.columns), position="t",
    )  # fmt: skip
    return f"{body}\n{{\\footnotesize\n{below}\n}}\n"


LATEX = (
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    | {"±": r"$\pm$", "|": r"$|$", "<": r"$<$", "`": "'"}
)


def _latex(text: object) -> str:
    return "".join(LATEX.get(c, c) for c in str(text))


def _remarks(table: Table) -> list[str]:
    """How the table is read, its footnotes, and what it lacks."""
    laid = lay_out(table)
    lacking = [f"{pair}: {reason}." for pair, reason in table.lacking.items()]
    return [*([HOW] if laid.lines else []), *table.notes, *laid.notes, *lacking]


def remarks(table: Table) -> list[str]:
    """The lines below a table in a terminal: footnotes, and what it lacks with the reason."""
    return _remarks(table)[bool(table.numbers) :]


def write(tables: Mapping[str, Table], out: Path) -> list[Path]:
    """Writes NAME.md, NAME.csv (all fields of each number) and NAME.tex of every table; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in tables.items():
        for ending, text in (
            ("md", to_markdown(table)),
            ("csv", numbers(table).to_csv(index=False)),
            ("tex", to_latex(table, name)),
        ):
            path = out / f"{name}.{ending}"
            write_text(path, without_controls(text))
            files.append(path)
    return files
