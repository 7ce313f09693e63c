"""Reads the JSON records of a run and the rows of its logs: a file that is no such record is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vlopd.config.explain import explain_errors
from vlopd.errors import RunError, first_line
from vlopd.files import json_lines, parse_json, read_json, read_jsonl
from vlopd.run.schemas.arms import (
    ArmRecord,
    CompletionRow,
    EvidenceRow,
    HeldOutRow,
    LogRow,
    MaskRecord,
    MemoryRecord,
    SweepRecord,
)
from vlopd.run.schemas.base import Entry, Record, RunRecord
from vlopd.run.schemas.comparison import Comparison
from vlopd.run.schemas.evaluation import (
    AnswerRow,
    BaseKlRecord,
    EvalRecord,
    Results,
    ScoredRow,
    TokenKlRecord,
    TokenRow,
    VisionRecord,
)
from vlopd.run.schemas.geometry import GeometryRecord, GroupsRecord, OverlapRecord

RECORDS: dict[str, type[Entry]] = {
    r".*/run\.json": RunRecord,
    r".*/arms/[^/]+/record\.json": ArmRecord,
    r".*/arms/[^/]+/memory\.json": MemoryRecord,
    r".*/masks/[^/]+\.json": MaskRecord,
    r".*/sweeps/[^/]+\.json": SweepRecord,
    r".*/summary\.json": GeometryRecord,
    r".*/geometry/overlap\.json": OverlapRecord,
    r".*/geometry/groups\.json": GroupsRecord,
    r".*/results\.json": EvalRecord,
    r".*/tokens\.json": TokenKlRecord,
    r".*/base_kl\.json": BaseKlRecord,
    r".*/evals/vision\.json": VisionRecord,
    r".*/compare\.json": Comparison,
}
LOGS: dict[str, type[BaseModel]] = {
    r"metrics": LogRow,
    r"heldout": HeldOutRow,
    r"optimizer": EvidenceRow,
    r"samples": CompletionRow,
    r"samples_.+": AnswerRow,
    r"tokens_.+": TokenRow,
}
"""Schemas by a record's path and by the name of a log (docs/run-folder.md)."""


def schema_of(path: Path) -> type[Entry]:
    """The schema of a record, by its place in a run folder; that of any record for others."""
    where = path.absolute().as_posix()
    return next((its for form, its in RECORDS.items() if re.fullmatch(form, where)), Record)


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a stage. Raises RunError, with the entry, for a file that is missing or not its record."""
    value: dict[str, Any] = read_json(path)
    if why := _first_fault(path.read_bytes(), schema_of(path)):
        raise RunError(
            f"{path} is not a record of this version of vlopd: {why}; restore it, or "
            "delete it and run its stage again"
        )
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of a run, none where it does not exist. Raises RunError, with the line, for others."""
    if not path.exists():
        return []
    (schema,) = (its for form, its in LOGS.items() if re.fullmatch(form, path.stem))
    rows, remedy = [], f"restore it, or delete {path.parent} and run again"
    for number, line in json_lines(path):
        try:
            row, why = parse_json(line), _first_fault(line, schema)
        except ValueError as error:
            row, why = None, first_line(error)
        if why:
            raise _other_row(path, number, why, remedy)
        rows.append(row)
    return rows


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples file, of lm-eval or of a run. Raises RunError, with the line, for others."""
    rows = read_jsonl(path)
    schema = ScoredRow if rows and "metrics" in rows[0] else AnswerRow
    for number, line in json_lines(path):
        if why := _first_fault(line, schema):
            raise _other_row(path, number, why, "evaluate the model again with --log_samples")
    return rows


def read_lm_eval_results(path: Path) -> dict[str, Any]:
    """The results of lm-eval, or of a run. Raises RunError, with the entry, for a file of another kind."""
    value: dict[str, Any] = read_json(path)
    if why := _first_fault(path.read_bytes(), Results):
        raise RunError(f"{path} is not lm-eval's results: {why}; evaluate the model again")
    return value


def _other_row(path: Path, number: int, why: str, remedy: str) -> RunError:
    return RunError(f"{path} line {number} is not a row of this file: {why}; {remedy}")


def _first_fault(text: bytes, schema: type[BaseModel]) -> str | None:
    """The first fault of JSON that is not of a schema."""
    try:
        schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        return explain_errors(error, schema).split("; ")[0]
    return None
