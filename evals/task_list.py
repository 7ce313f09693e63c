"""Lists tasks with source, metric, chance level, size, modality and whether their data are here; downloads nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from huggingface_hub import constants
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

from evals.blind import VARIANTS, full_name, variant_of
from evals.scoring import TASKS, Tasks, all_tasks, load_task
from evals.tasks.benchmarks import documents
from evals.tasks.benchmarks.registry import BENCHMARKS
from vlopd.data import emoji
from vlopd.errors import UserError

FILES = ("json", "csv", "parquet", "text", "arrow")
"""`dataset_path` of a task whose rows are in the files of `dataset_kwargs.data_files`."""
UNKNOWN = "-"


class TaskRow(NamedTuple):
    """One task, as text."""

    task: str
    source: str
    """built-in, the data set's hub id, a file, or "group of N tasks"."""
    modality: str
    metric: str
    """The first metric, on which arms are compared."""
    chance: str
    """Chance level of that metric; "measured" where only the questions tell."""
    questions: str
    reachable: str
    """yes, "from the hub", or "no: " and what is missing."""


def list_tasks(
    pattern: str = "*", include: str | None = None, every: bool = False, load: bool = False
) -> list[TaskRow]:
    """The tasks whose name matches a shell pattern or contains it: ours, those in `include`, with `every` lm-eval's.

    A pattern with @ is matched with the variants of image tasks without their pictures (evals/blind.py).

    load: reads the questions of tasks whose data are on disk, for their exact number and chance level.
    """
    manager = all_tasks(include) if every else Tasks.of((), include)
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = list(manager.task_index)
    if "@" in pattern:
        seen = [n for n in names if _modality_of(manager.task_index[n].cfg or {}) == "image"]
        names = [full_name(name, variant) for name in seen for variant in VARIANTS]
    names = sorted(name for name in names if fnmatch(name, wanted))
    rows = [_row(name, manager) for name in names]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return [_loaded(row, manager) if load else row for row in rows]


def _row(name: str, manager: Tasks) -> TaskRow:
    entry = manager.task_index[name]
    settings = entry.cfg or {}
    members = settings.get("task") if entry.kind.name == "GROUP" else entry.tags
    if entry.kind.name in ("GROUP", "TAG"):
        kind = f"{entry.kind.name.lower()} of {len(members or ())}"
        return TaskRow(name, kind, *[UNKNOWN] * (len(TaskRow._fields) - 2))
    output = settings.get("output_type", "generate_until")
    metrics = settings.get("metric_list") or [
        {"metric": metric} for metric in DEFAULT_METRIC_REGISTRY.get(output, (UNKNOWN,))
    ]
    metadata, choices = settings.get("metadata") or {}, settings.get("doc_to_choice")
    chance = UNKNOWN
    if output == "multiple_choice":
        chance = f"{1 / len(choices):.3g}" if isinstance(choices, list) and choices else "measured"
    if isinstance(metadata, Mapping) and "chance" in metadata:
        chance = "measured"
    size = metadata.get("size") if isinstance(metadata, Mapping) else None
    source, reachable = _source_of(settings, entry.yaml_path)
    return TaskRow(
        name,
        source,
        "text" if variant_of(name)[1] == "no_picture" else _modality_of(settings),
        str(metrics[0]["metric"]),
        chance,
        f"{size:,}" if isinstance(size, int) else UNKNOWN,
        reachable,
    )


def _modality_of(settings: Mapping[str, Any]) -> str:
    return next((m for m in ("image", "audio") if settings.get(f"doc_to_{m}")), "text")


def _source_of(settings: Mapping[str, Any], yaml: Any) -> tuple[str, str]:
    """(source, reachable) of a task."""
    ours = yaml is not None and TASKS in Path(yaml).parents
    about = settings.get("metadata")
    benchmark = about.get("benchmark") if isinstance(about, Mapping) else None
    if ours and benchmark in BENCHMARKS:
        local = Path(os.environ.get(documents.FOLDER, "")) / benchmark
        if documents.FOLDER in os.environ and local.is_dir():
            return str(local), "yes"
        source = BENCHMARKS[benchmark].source
        return source, _hub(source)
    if ours:
        return "built-in", _built_in(Path(str(settings.get("custom_dataset"))).name)
    path, arguments = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    if not isinstance(path, str):
        own = yaml is not None and Path(lm_eval.__file__).parent not in Path(yaml).parents
        return f"code beside {yaml}" if yaml else UNKNOWN, "yes" if own else UNKNOWN
    if path in FILES and "data_files" in arguments:
        files = _strings(arguments["data_files"])
        missing = [file for file in files if "://" not in file and not Path(file).exists()]
        return ", ".join(files), f"no: {missing[0]} is missing" if missing else "yes"
    return path, "yes" if Path(path).is_dir() else _hub(path)


def _built_in(function: str) -> str:
    """Whether the data of a task of ours are here, by the function that makes them (`emoji.dataset`)."""
    module = function.partition(".")[0]
    if module == "reasoning" and find_spec("reasoning_gym") is None:
        return "no: pip install 'vlopd[reasoning]'"
    if module == "emoji":
        folder = Path(os.environ.get(emoji.FOLDER, emoji.DEFAULT))
        if not (folder / "emoji.json").is_file():
            return f"no: {folder} is missing"
    return "yes"


def _hub(data_set: str) -> str:
    """Whether a hub data set is in one of the two caches, or could be downloaded."""
    if documents.is_cached(data_set):
        return "yes"
    return (
        "no: not cached, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "from the hub"
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts: Sequence[Any] = list(value.values()) if isinstance(value, Mapping) else value
    return [text for part in parts for text in _strings(part)]


def _loaded(row: TaskRow, manager: Tasks) -> TaskRow:
    """The row with number and chance level of the questions, or with the error of loading them."""
    if row.reachable != "yes":
        return row
    try:
        (task,) = load_task(manager, row.task, None)["tasks"].values()
        docs = list(task.eval_docs)
        chance = (task.config.metadata or {}).get("chance")
        if callable(chance):
            row = row._replace(chance=f"{chance(docs)['all']:.3g}")
        elif row.chance == "measured":
            shares = [1 / len(task.doc_to_choice(doc)) for doc in docs]
            row = row._replace(chance=f"{sum(shares) / len(shares):.3g}")
    except UserError as error:
        return row._replace(reachable=f"no: {error}")
    return row._replace(questions=f"{len(docs):,}")
