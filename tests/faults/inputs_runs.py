"""Malformed files of a run folder, of a measurement and of finished evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.harness import Case, Cut, Edit, Put, Remove, edits, sets

PARTS = ("c.toml", "rows.jsonl", "student", "teacher", "run")
JSONS: dict[str, str | bytes] = {
    "object": "{}",
    "list": "[]",
    "null": "null",
    "number": "7",
    "text": '"run"',
    "empty": "",
    "truncated": '{"config": {',
    "deep": "[" * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "binary": b"\xff\xfe\x00",
}
"""Contents that are no record."""
OPEN = {
    "run": ("run", "run"),
    "eval": ("eval", "run"),
    "show": ("show", "run"),
    "report": ("report", "run"),
    "geometry": ("geometry", "run"),
    "compare": ("compare", "run"),
    "paper": ("paper", "run"),
    "retrain": ("retrain", "run"),
    "mask make": ("mask", "make", "run"),
    "push": ("push", "run", "--arm", "sub", "--repo", "a/b", "--dry-run"),
    "over a config": ("run", "c.toml", "--out", "run"),
}
"""Commands that open a run folder."""
SOME = ("run", "eval", "report")


def unvouched(path: str) -> Edit:
    """Removes the checksums of the artifact that a file is of: it is then taken as it is."""
    inside = Path(path).parts[1:]
    if len(inside) == 1:
        return Remove(f"run/checksums/{Path(path).stem}.sha256")
    return Remove(f"run/checksums/{inside[0]}--{Path(inside[1]).stem}.sha256")


def run_json(**entries: Any) -> Edit:
    return sets("run/run.json", {key.replace("__", "."): value for key, value in entries.items()})


CONFIGS: dict[str, Edit] = {
    "format-old": run_json(format=1),
    "format-new": run_json(format=99),
    "format-text": run_json(format="2"),
    "format-true": run_json(format=True),
    "format-missing": run_json(format=None),
    "config-missing": run_json(config=None),
    "config-list": run_json(config=[]),
    "config-text": run_json(config="c.toml"),
    "config-empty": run_json(config={}),
    "arms-missing": run_json(config__arms=None),
    "arms-list": run_json(config__arms=[]),
    "steps-text": run_json(config__train__steps="one"),
    "steps-true": run_json(config__train__steps=True),
    "steps-negative": run_json(config__train__steps=-1),
    "student-list": run_json(config__student=[]),
    "mask-unknown": run_json(config__masks__top__type="best"),
    "arm-unknown": run_json(config__arms__full__type="magic"),
    "extra-key": run_json(config__surprise=1),
    "name-up": run_json(config__name="../up"),
}


@dataclass(frozen=True)
class Rows:
    """Replaces text in a file."""

    path: str
    old: str
    new: str

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        text = path.read_text()
        assert self.old in text, self.old
        path.write_text(text.replace(self.old, self.new))


RECORDS: list[tuple[str, str, tuple[str, ...]]] = [
    # file, what the line names, the commands that read it
    ("run/compare.json", "compare.json", ("show run", "paper run")),
    (
        "run/arms/full/record.json",
        "record.json",
        ("show run", "report run", "paper run"),
    ),
    (
        "run/arms/sub/record.json",
        "record.json",
        ("show run", "compare run"),
    ),
    (
        "run/evals/full/results.json",
        "results.json",
        ("show run", "compare run", "report run", "compare run/evals/base run/evals/full --out c"),
    ),
    ("run/geometry/full/summary.json", "summary.json", ("report run", "geometry run")),
    ("run/masks/top.json", "top.json", ("report run",)),
    (
        "geometry/summary.json",
        "summary.json",
        ("geometry student run/arms/full --set null_draws=0 --out geometry",),
    ),
    ("compared/compare.json", "compare.json", ()),
]
EDITED: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("tasks-missing", "run/compare.json", ("show run", "paper run"), {"tasks": None}),
    ("tasks-list", "run/compare.json", ("show run", "paper run"), {"tasks": []}),
    ("tasks-text", "run/compare.json", ("show run",), {"tasks": "shapes_text"}),
    ("task-number", "run/compare.json", ("show run",), {"tasks.shapes_text": 3}),
    ("task-empty", "run/compare.json", ("show run",), {"tasks.shapes_text": {}}),
    ("arms-missing", "run/compare.json", ("show run",), {"tasks.shapes_text.arms": None}),
    ("arms-list", "run/compare.json", ("show run",), {"tasks.shapes_text.arms": []}),
    ("mean-text", "run/compare.json", ("show run",), {"tasks.shapes_text.arms.full.mean": "half"}),
    ("mean-missing", "run/compare.json", ("show run",), {"tasks.shapes_text.arms.full.mean": None}),
    ("contrasts-missing", "run/compare.json", ("show run",), {"tasks.shapes_text.contrasts": None}),
    ("contrasts-table", "run/compare.json", ("show run",), {"tasks.shapes_text.contrasts": {}}),
    ("contrast-number", "run/compare.json", ("show run",), {"tasks.shapes_text.contrasts": [1]}),
    ("contrast-empty", "run/compare.json", ("show run",), {"tasks.shapes_text.contrasts": [{}]}),
    (
        "metric-missing",
        "run/compare.json",
        ("show run", "paper run"),
        {"tasks.shapes_text.metric": None},
    ),
    ("roles-missing", "run/compare.json", ("show run",), {"arms": None}),
    (
        "digest-missing",
        "run/arms/full/record.json",
        ("show run",),
        {"checkpoint_digest": None},
    ),
    (
        "digest-number",
        "run/arms/full/record.json",
        ("show run",),
        {"checkpoint_digest": 5},
    ),
    ("density-text", "run/arms/sub/record.json", ("show run",), {"density": "half"}),
    ("steps-text", "run/arms/sub/record.json", ("show run",), {"steps": "one"}),
    ("seconds-text", "run/arms/sub/record.json", ("show run",), {"seconds": "long"}),
    ("counts-text", "run/arms/sub/record.json", ("show run",), {"on_mask": "all"}),
    ("counts-empty", "run/arms/sub/record.json", ("show run",), {"on_mask": {}}),
    ("inputs-missing", "run/arms/full/record.json", ("show run",), {"inputs": None}),
    ("inputs-list", "run/arms/full/record.json", ("run run",), {"inputs": []}),
    (
        "digest-missing",
        "run/evals/full/results.json",
        ("show run", "compare run"),
        {"checkpoint_digest": None},
    ),
    ("leaves-list", "run/evals/full/results.json", ("compare run",), {"leaves": []}),
    ("inputs-missing", "run/evals/full/results.json", ("eval run",), {"inputs": None}),
    ("primary-missing", "run/evals/full/results.json", ("compare run",), {"primary_metric": None}),
    ("primary-list", "run/evals/full/results.json", ("compare run",), {"primary_metric": []}),
    ("data-digest-missing", "run/evals/full/results.json", ("compare run",), {"data_digest": None}),
    ("headline-missing", "run/geometry/full/summary.json", ("report run",), {"headline": None}),
    ("headline-text", "run/geometry/full/summary.json", ("report run",), {"headline": "big"}),
    ("headline-numbers", "run/geometry/full/summary.json", ("report run",), {"headline": [1]}),
    ("left-out-missing", "run/geometry/full/summary.json", ("report run",), {"left_out": None}),
    ("left-out-list", "run/geometry/full/summary.json", ("report run",), {"left_out": []}),
]
LINES: dict[str, str] = {
    "empty": "",
    "no-json": "rows\n",
    "list": "[1]\n",
    "number": "7\n",
    "object": "{}\n",
    "deep": "[" * 100_000 + "\n",
}
LOGS: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "run/evals/full/samples_shapes_text.jsonl",
        "samples_shapes_text.jsonl",
        ("compare run", "compare run/evals/base run/evals/full --out c"),
    ),
    ("run/arms/full/metrics.jsonl", "metrics.jsonl", ("report run",)),
    ("run/arms/full/samples.jsonl", "samples.jsonl", ("report run",)),
]
ROWS = "run/evals/full/samples_shapes_text.jsonl"
CSV = "run/geometry/full/geometry.csv"
TABLES: dict[str, Edit] = {
    "empty": Put(CSV, ""),
    "header-alone-cut": Put(CSV, "name,met"),
    "truncated": Cut(CSV, 0.43),
    "binary": Put(CSV, b"\xff\xfe\x00\x01"),
    "json": Put(CSV, "{}"),
    "other-columns": Put(CSV, "a,b\n1,2\n"),
    "open-quote": Put(CSV, 'name,metric\n"a,b\n'),
    "more-cells": Put(CSV, "name,metric\n" + "a,b,c,d\n"),
}
SAMPLES: dict[str, Edit] = {
    "score-text": Rows(
        "run/evals/full/samples_shapes_text.jsonl", '"exact_match": 0', '"exact_match": "no"'
    ),
    "score-nan": Rows(
        "run/evals/full/samples_shapes_text.jsonl", '"exact_match": 0', '"exact_match": NaN'
    ),
    "id-missing": Rows("run/evals/full/samples_shapes_text.jsonl", '"doc_id"', '"nr"'),
    "hash-other": Rows(
        "run/evals/full/samples_shapes_text.jsonl", '"doc_hash": "', '"doc_hash": "0'
    ),
}
ARM = "run/arms/full"
SAMPLE = '{"step": 0, "question": "q", "image": null, "completion": "c", "tokens": ["c"], "student_logprobs": %s}\n'
ARM_LOGS: dict[str, Edit] = {
    "metrics a list": Put(f"{ARM}/metrics.jsonl", '{"step": 0, "kl": [1]}\n'),
    "metrics a table": Put(f"{ARM}/metrics.jsonl", '{"step": 0, "kl": {"a": 1}}\n'),
    "metrics a text": Put(f"{ARM}/metrics.jsonl", '{"step": 0, "kl": "../../x"}\n'),
    "metrics a negative step": Put(f"{ARM}/metrics.jsonl", '{"step": -1, "kl": 1.0}\n'),
    "samples without question": Put(f"{ARM}/samples.jsonl", '{"step": 0}\n'),
    "samples with few log-probs": Put(f"{ARM}/samples.jsonl", SAMPLE % "[]"),
    "samples with words as log-probs": Put(f"{ARM}/samples.jsonl", SAMPLE % '["low"]'),
    "held-out without task": Put(f"{ARM}/heldout.jsonl", '{"step": 1, "exact_match": 0.5}\n'),
    "held-out a text": Put(
        f"{ARM}/heldout.jsonl", '{"step": 1, "task": "t", "exact_match": "x"}\n'
    ),
}
SUMS: dict[str, str | bytes] = {
    "empty": "",
    "text": "sums",
    "binary": b"\xff\xfe",
    "short": "abc  run.json\n",
}


def cases() -> list[Case]:
    found = []

    def add(name: str, words: str | tuple[str, ...], says: str, edit: Edit) -> None:
        parts = (*PARTS, *("geometry", "compared"))
        words = tuple(words.split()) if isinstance(words, str) else words
        found.append(Case(words, says, edit, parts=parts, name=name))

    for label, content in JSONS.items():
        for command, words in OPEN.items():
            if (
                command == "show"
                or (label in ("object", "null") and command in SOME)
                or label == "list"
            ):
                edit = edits(unvouched("run/run.json"), Put("run/run.json", content))
                add(f"run.json {label}, {command}", words, "run.json", edit)
    for label, edit in CONFIGS.items():
        for command in ("show", "report"):
            add(
                f"run.json {label}, {command}",
                OPEN[command],
                "run",
                edits(unvouched("run/run.json"), edit),
            )
    for command in ("run", "eval", "report"):
        add(f"run.json edited, {command}", OPEN[command], "run.json", run_json(seeds={"full": 7}))
        add(f"run.json gone, {command}", OPEN[command], "run", Remove("run/run.json"))
    for path, says, commands in RECORDS:
        for label, content in JSONS.items():
            for words in commands if label in ("object", "list", "truncated") else commands[:1]:
                edit = (
                    edits(unvouched(path), Put(path, content))
                    if path.startswith("run")
                    else Put(path, content)
                )
                add(f"{path} {label}, {words}", words, says, edit)
    for label, path, commands, entries in EDITED:
        for words in commands:
            edit = edits(unvouched(path), sets(path, entries))
            add(f"{path} {label}, {words}", words, Path(path).name, edit)
    for path, says, commands in LOGS:
        for label, text in LINES.items():
            if label == "empty" and "samples_" not in path:
                continue  # a log of nothing yet
            for words in commands:
                add(
                    f"{path} {label}, {words}", words, says, edits(unvouched(path), Put(path, text))
                )
    for label, edit in SAMPLES.items():
        add(f"samples {label}", "compare run", "shapes_text", edits(unvouched(ROWS), edit))
    for label, edit in ARM_LOGS.items():
        says = f"{label.split()[0].replace('held-out', 'heldout')}.jsonl line 1"
        add(f"log: {label}", "report run", says, edits(unvouched(ARM), edit))
    for label, edit in TABLES.items():
        for words in ("report run", "paper run"):
            add(
                f"geometry.csv {label}, {words}",
                words,
                "geometry.csv",
                edits(unvouched(CSV), Remove("run/report/record.json"), edit),
            )
    for label, content in SUMS.items():
        for words in ("run run", "report run"):
            add(
                f"checksums {label}, {words}",
                words,
                "run",
                Put("run/checksums/run.sha256", content),
            )
    return found
