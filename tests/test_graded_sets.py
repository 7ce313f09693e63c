"""Outputs that people wrote and labelled without sight of the extractor are graded as they say (tests/graded)."""

import re

import pytest

from scripts.grading_rates import ROOT, grade, sets

SETS = [(name, family, rows) for name, family, rows in sets() if name.startswith("tests/graded/")]
LISTED = {
    tuple(found) for found in re.findall(r"^- `(\w+)/([\w-]+)`: ", (ROOT / "tests/graded/README.md").read_text(), re.M)
}  # fmt: skip


@pytest.mark.parametrize(("name", "family", "rows"), SETS, ids=lambda value: str(value)[:40])
def test_graded_as_labelled_but_for_the_listed_misses(name, family, rows):
    """At least 97 of 100 (94 of the fourth set, which mended nothing), and no other miss than README.md lists."""
    missed = {str(row["id"]) for row in rows if grade(family, row)[0] != row["label"]}
    held_out = name.endswith("fourth")
    assert len(missed) <= (0.06 if held_out else 0.03) * len(rows)
    assert {(name.rpartition("/")[2], each) for each in missed} <= LISTED
