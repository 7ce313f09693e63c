"""Outputs of many styles in mathematics and numbers are graded as they were labelled."""

import pytest

from tests.styles.mathematics import STYLES as OF_MATHEMATICS
from tests.styles.mathematics import mathematics
from tests.styles.numbers import STYLES as OF_NUMBERS
from tests.styles.numbers import numbers
from vlopd.grading.equality import same_math, same_number
from vlopd.grading.extraction import math_answer, number_answer


@pytest.mark.parametrize(
    ("made", "read", "same"),
    [(mathematics, math_answer, same_math), (numbers, number_answer, same_number)],
    ids=["mathematics", "numbers"],
)
def test_outputs_are_graded_as_labelled(made, read, same):
    """At least 300 outputs: right, wrong, or without an answer; every miss is shown."""
    missed = []
    for _, gold, output, label in made():
        found = read(output)
        graded = "unreadable" if found is None else "right" if same(found, gold) else "wrong"
        if graded != label:
            missed.append((output, gold, label, found))
    assert len(made()) >= 300
    assert not missed, f"{len(missed)} of {len(made())}: " + "\n".join(map(repr, missed))


def test_styles_are_different():
    """At least 60 of each family, no two alike."""
    for styles in (OF_MATHEMATICS, OF_NUMBERS):
        assert len(set(styles)) == len(styles) >= 60
