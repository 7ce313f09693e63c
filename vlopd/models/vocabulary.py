"""The vocabulary that student and teachers share, from their tokenizers alone, before any weights are read.

The models share the completion. They must therefore agree on its tokens, but not on their ids, nor
on the padding rows of their output layers, nor on special tokens that only one of them has:

    same strings, same ids       the rows common to all (output layers may be padded to different sizes)
    same strings, other ids      the teacher's columns are permuted to the student's order, completions translated
    added tokens of one model    left out of the loss, never sampled (e.g. image placeholders)
    other end-of-turn token      the student's end token is mapped to the teacher's
    other ordinary tokens        refused, with the first ten
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlopd.config.models import ModelConfig
from vlopd.errors import ConfigError
from vlopd.models import families
from vlopd.models.load import load_generation_config, load_model_config, load_processor
from vlopd.models.tokenizers import end_ids
from vlopd.types import Completions

Columns = int | Tensor
"""Vocabulary columns of one model: the first n (int), or the given ids [V]."""


@dataclass(frozen=True)
class Vocabulary:
    """One model's tokens: ids by string, added (special) tokens, end-of-turn tokens."""

    name: str
    ids: dict[str, int]
    added: frozenset[str]
    ends: tuple[str, ...]
    rows: int  # of the output layer, padding included


@dataclass(frozen=True)
class SharedVocabulary:
    """The V tokens that the loss is over, as columns of the student and of each teacher, in one order.

    Worked example: student {a: 0, b: 1, c: 2}, teacher {b: 0, a: 1, c: 2, <image>: 3}:
        size 3, student 3, teachers (tensor([1, 0, 2]),)
    """

    size: int
    student: Columns  # ascending where it is a tensor
    teachers: tuple[Columns, ...]
    notes: tuple[str, ...] = ()
    """Tokens mapped or left out, for the pre-flight table."""

    def targets(self, completions: Completions) -> Tensor:
        """The sampled tokens as columns of the shared vocabulary, [N]."""
        return self.columns_of(completions.ids[completions.mask])

    def columns_of(self, ids: Tensor) -> Tensor:
        """Maps student ids, all of them shared, to columns of the shared vocabulary."""
        if isinstance(self.student, int):
            return ids
        return torch.searchsorted(self.student.to(ids.device), ids)

    def in_teacher(self, ids: Tensor, teacher: int) -> Tensor:
        """Maps student ids, all of them shared, to a teacher's ids."""
        columns, targets = self.teachers[teacher], self.columns_of(ids)
        return targets if isinstance(columns, int) else columns.to(ids.device)[targets]

    def translate(self, completions: Completions, teacher: int, pad_id: int) -> Completions:
        """Translates the student's completions to a teacher's ids."""
        columns = self.teachers[teacher]
        if isinstance(columns, int) and isinstance(self.student, int):
            return completions
        ids = torch.full_like(completions.ids, pad_id)
        ids[completions.mask] = self.in_teacher(completions.ids[completions.mask], teacher)
        return Completions(ids, completions.mask, completions.logprobs, completions.ended)

    def translate_back(self, completions: Completions, teacher: int, pad_id: int) -> Completions:
        """Translates a teacher's completions, of shared tokens, to the student's ids."""
        columns = self.teachers[teacher]
        if isinstance(columns, int) and isinstance(self.student, int):
            return completions
        ids = torch.full_like(completions.ids, pad_id)
        targets = completions.ids[completions.mask]
        if not isinstance(columns, int):
            ascending, order = columns.to(ids.device).sort()
            targets = order[torch.searchsorted(ascending, targets)]
        ids[completions.mask] = (
            targets if isinstance(self.student, int) else self.student.to(ids.device)[targets]
        )
        return Completions(ids, completions.mask, completions.logprobs, completions.ended)

    def contains(self, ids: Tensor) -> Tensor:
        """Whether each student id is shared, bool of the same shape."""
        if isinstance(self.student, int):
            return ids < self.student
        return torch.isin(ids, self.student.to(ids.device))


def read_vocabulary(model: ModelConfig) -> Vocabulary:
    """Reads a model's vocabulary from its folder or hub id, without weights. Raises ConfigError where that fails."""
    where = (model.model, model.revision, model.trust_remote_code)
    config = load_model_config(*where)
    tokenizer = families.tokenizer_of(
        load_processor(*where, model.template, model.template_arguments)
    )
    rows = config.get_text_config().vocab_size
    generation = load_generation_config(model.model, config, model.revision)
    ends = end_ids(model.model, generation, tokenizer, rows)
    words = [word for word in tokenizer.convert_ids_to_tokens(ends) if word]
    if not words:
        raise ConfigError(
            f"{model.model}: its end tokens {ends} are not in its tokenizer; set eos_token_id in its "
            "generation_config.json"
        )
    return Vocabulary(
        model.model,
        tokenizer.get_vocab(),
        frozenset(tokenizer.get_added_vocab()),
        tuple(words),
        rows,
    )


def share_vocabulary(student: Vocabulary, teachers: Sequence[Vocabulary]) -> SharedVocabulary:
    """Aligns the teachers' vocabularies with the student's.

    Raises ConfigError with the first ten disagreements where ordinary tokens differ.
    """
    notes: list[str] = []
    aligned = [_align_teacher(student, teacher, notes) for teacher in teachers]
    own = {i for i in student.ids.values() if i < student.rows}
    common = sorted(own.intersection(*aligned))
    if all(teacher.ids == student.ids for teacher in teachers):
        rows = min(each.rows for each in (student, *teachers))
        if common == list(range(len(common))) and all(
            row[i] == i for row in aligned for i in common
        ):
            # nothing to map: the leading rows, including those padded in every model
            return SharedVocabulary(rows, rows, (rows,) * len(teachers), tuple(notes))
    return SharedVocabulary(
        len(common),
        _as_columns(common),
        tuple(_as_columns([row[i] for i in common]) for row in aligned),
        tuple(notes),
    )


def _align_teacher(student: Vocabulary, teacher: Vocabulary, notes: list[str]) -> dict[int, int]:
    """{student id: teacher id} of every token that both have. Appends what was mapped or left out to `notes`."""
    _refuse_other_tokens(student, teacher)
    row = {
        i: teacher.ids[word]
        for word, i in student.ids.items()
        if i < student.rows and teacher.ids.get(word, teacher.rows) < teacher.rows
    }
    moved = sum(i != j for i, j in row.items())
    if moved:
        notes.append(f"{moved} tokens have other ids in {teacher.name}: remapped")
    alone = [word for word in student.ids if word not in teacher.ids]
    alone += [word for word in teacher.ids if word not in student.ids]
    if not set(student.ends) & set(teacher.ends):
        ours, theirs = student.ends[0], teacher.ends[0]
        # exchange the two, so that no column is used twice
        ours_there, theirs_here = teacher.ids.get(ours), student.ids.get(theirs)
        row[student.ids[ours]] = teacher.ids[theirs]
        if theirs_here is not None:
            row.pop(theirs_here, None)
            if ours_there is not None:
                row[theirs_here] = ours_there
        notes.append(f"the end token {ours!r} is mapped to {theirs!r} of {teacher.name}")
        alone = [word for word in alone if word not in (ours, theirs)]
    if alone:
        few = ", ".join(map(repr, alone[:5])) + (", ..." if len(alone) > 5 else "")
        notes.append(
            f"{len(alone)} added tokens that {student.name} or {teacher.name} lacks are left out: {few}"
        )
    return row


def _refuse_other_tokens(student: Vocabulary, teacher: Vocabulary) -> None:
    """Raises ConfigError where an ordinary (not added) token is in one vocabulary only."""
    alone = [w for w in student.ids if w not in teacher.ids and w not in student.added]
    alone += [w for w in teacher.ids if w not in student.ids and w not in teacher.added]
    if not alone:
        return
    alone.sort(key=lambda word: (student.ids.get(word, teacher.ids.get(word, 0)), word))
    some = ", ".join(
        f"{w!r}: {student.ids.get(w, '-')} / {teacher.ids.get(w, '-')}" for w in alone[:10]
    )
    raise ConfigError(
        f"student {student.name} and teacher {teacher.name} disagree on {len(alone)} of "
        f"{len(student.ids.keys() | teacher.ids.keys())} tokens (id in student / teacher): {some}; "
        "use a teacher with the student's tokenizer"
    )


def _as_columns(ids: list[int]) -> Columns:
    """A count where the ids are 0, 1, 2, ...; a tensor otherwise."""
    return len(ids) if ids == list(range(len(ids))) else torch.tensor(ids)
