"""Arithmetic, sorting and spelling from the package reasoning-gym (the extra `reasoning`).

Its generators produce unlimited questions with many duplicates, also across seeds (of 20,000 sums, 12,370 differ). So
the split is decided by the question's text, whatever the seed: a test question never occurs in training. Answers are
scored by evals/tasks/reasoning.py, not by the package's rules, which give partial credit and evaluate text.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlopd.data.synthetic import Split, SyntheticDataset
from vlopd.errors import ConfigError
from vlopd.types import Example

Subject = Literal["arithmetic", "sorting", "spelling"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)

GENERATORS: Mapping[Subject, tuple[str, Mapping[str, Any]]] = {
    "arithmetic": ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    "sorting": ("word_sorting", {"min_words": 3, "max_words": 5, "transformation": "lowercase"}),
    "spelling": ("spell_backward", {"min_word_len": 3, "max_word_len": 6}),
}
"""The package's data set of each subject, and its settings."""

SHORT = "\nReply with the answer alone."
STREAM = 2**31 - 1
"""Questions per generator, by index."""


@functools.lru_cache(maxsize=len(SUBJECTS))
def generator(subject: Subject) -> Sequence[Mapping[str, Any]]:
    """The package's data set of a subject. Raises ConfigError where the package is missing."""
    try:
        import reasoning_gym  # 2 s, and an extra
        from reasoning_gym.algorithmic.word_sorting import TextTransformation
    except ImportError as error:
        raise ConfigError(
            f"{subject} questions need the package reasoning-gym ({error}); "
            "pip install -c constraints.txt -e '.[reasoning]'"
        ) from None
    name, settings = GENERATORS[subject]
    if "transformation" in settings:
        settings = {**settings, "transformation": TextTransformation(settings["transformation"])}
    return reasoning_gym.create_dataset(name, seed=0, size=STREAM, **settings)


def split_of(question: str) -> Split:
    """Split by a hash of the question's text: eight tenths train, one tenth validation, one tenth test."""
    share = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if share == 0 else "validation" if share == 1 else "train"


def _draw_question(subject: Subject, split: Split, rng: random.Random) -> dict[str, str]:
    """Draws a question of a split as a plain row: kind, question, answer."""
    source = generator(subject)
    while True:
        entry = source[rng.randrange(STREAM)]
        question = entry["question"].strip() + SHORT
        if split_of(question) == split:
            return {"kind": subject, "question": question, "answer": entry["answer"]}


def unique_questions(subject: Subject, split: Split, size: int, seed: int) -> list[dict[str, str]]:
    """`size` distinct questions of a split, in an order that depends on the seed.

    Raises ConfigError where a hundred draws in a row give no new one.
    """
    rng = random.Random(f"unique {subject} {split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    idle = 0
    while len(rows) < size:
        row = _draw_question(subject, split, rng)
        idle = idle + 1 if row["question"] in rows else 0
        if idle == 100:
            raise ConfigError(
                f"{subject} has too few distinct questions in split {split!r}: {len(rows)} found, "
                f"{size} requested; lower the size"
            )
        rows.setdefault(row["question"], row)
    return [{"id": f"{subject}-{split}-{seed}-{k}", **row} for k, row in enumerate(rows.values())]


@dataclass(frozen=True)
class ReasoningDataset(SyntheticDataset):
    """Questions of one split, sampled with replacement, subjects at equal rates.

    Example `i` depends on (split, seed, subjects, i) and the package's version alone.
    """

    subjects: tuple[Subject, ...] = SUBJECTS

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        rng = random.Random(f"reasoning {self.split} {self.seed} {index}")
        row = _draw_question(rng.choice(self.subjects), self.split, rng)
        name = f"{row['kind']}-{self.split}-{self.seed}-{index}"
        return Example.ask(name, row["question"], answer=row["answer"], fields=row)
