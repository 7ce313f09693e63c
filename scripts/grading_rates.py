"""How often answers are graded as their labels say: per family and set, with the misses.

    python scripts/grading_rates.py [--table]

Sets are the outputs made by tests/styles and the labelled rows of tests/graded/<set>/<family>.jsonl: question, choices
(optional), gold, output, label (right, wrong or unreadable). --table prints the table of docs/tasks.md alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.styles.mathematics import mathematics  # noqa: E402
from tests.styles.numbers import numbers  # noqa: E402
from vlopd.grading.equality import same_math, same_number  # noqa: E402
from vlopd.grading.extraction import (  # noqa: E402
    choice_letter,
    math_answer,
    number_answer,
    short_answer,
    states,
    yes_or_no,
)

Row = Mapping[str, Any]


class Grader(NamedTuple):
    read: Callable[[Row], str | None]
    same: Callable[[str, Row], bool]


GRADERS = {
    "mathematics": Grader(
        lambda row: math_answer(row["output"], row.get("question", "")),
        lambda a, row: same_math(a, row["gold"]),
    ),
    "numbers": Grader(
        lambda row: number_answer(row["output"], row.get("question", "")),
        lambda a, row: same_number(a, row["gold"]),
    ),
    "choices": Grader(
        lambda row: choice_letter(row["output"], row["choices"]),
        lambda answer, row: answer == row["gold"].strip("() .").upper(),
    ),
    "yes_no": Grader(
        lambda row: yes_or_no(row["output"], row["question"]),
        lambda a, row: a == row["gold"].lower(),
    ),
    "short_answers": Grader(
        lambda row: short_answer(row["output"], row["question"]),
        lambda answer, row: states(row["output"], row["gold"], row["question"]),
    ),
}
FAMILIES = {"number": "numbers", "math": "mathematics", "choice": "choices",
            "short": "short_answers", "short_answer": "short_answers", "yesno": "yes_no",
            "pope": "yes_no", "chartqa": "short_answers"}  # fmt: skip
"""Other names of files."""


def sets() -> Iterator[tuple[str, str, Sequence[Row]]]:
    """(set, family, rows)."""
    for made in (mathematics, numbers):
        yield "tests/styles", made.__name__, [output._asdict() for output in made()]
    for file in sorted(ROOT.glob("tests/graded/*/*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        yield str(file.parent.relative_to(ROOT)), file.stem, rows


def grade(family: str, row: Row) -> tuple[str, str | None]:
    """What the grader says of a row, and what it read."""
    grader = GRADERS[FAMILIES.get(family, family)]
    read = grader.read(row)
    if read is None:
        return "unreadable", None
    return "right" if grader.same(read, row) else "wrong", read


def main() -> None:
    lines = ["| set | family | outputs | as labelled | taken for right | right missed |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, family, rows in sets():
        if FAMILIES.get(family, family) not in GRADERS:
            print(f"{name}/{family}: no grader of that name", file=sys.stderr)
            continue
        said = [(row, *grade(family, row)) for row in rows]
        missed = [(row, verdict, read) for row, verdict, read in said if verdict != row["label"]]
        taken = sum(verdict == "right" for _, verdict, _ in missed)
        lost = sum(row["label"] == "right" for row, _, _ in missed)
        share = 1 - len(missed) / len(rows)
        lines.append(f"| {name} | {family} | {len(rows)} | {share:.1%} | {taken} | {lost} |")
        for row, verdict, read in missed if "--table" not in sys.argv else ():
            about = f"{row['id']}: {verdict}, labelled {row['label']}; gold {row['gold']!r}"
            print(f"{about}, read {read!r}: {row['output']!r}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
