"""Scores one model on one task through lm-eval: task lookup, few-shot images, sampled passes, one row per question.

lm-eval's own cache is keyed by request alone and would return another model's answers, so it is off.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lm_eval
import lm_eval.api.task
import numpy as np
import torch
from lm_eval import evaluator_utils
from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string

from evals import blind, stats
from evals import lm as models
from evals.lm import ArmLM
from evals.task_code import FAILURES, is_packaged, note_replaced, only_trusted, refuse_name
from evals.task_definition import files_of_task, members_of
from evals.task_index import STOCK, index_of
from evals.task_schema import members_named, refuse_malformed
from vlopd.config.analysis import EvalConfig, GenerationConfig
from vlopd.data.images import shorten
from vlopd.digests import digest_json, file_digest
from vlopd.errors import ConfigError, RunError, UserError, first_line, shown
from vlopd.progress import progress

TASKS = Path(__file__).parent / "tasks"
LM = models.__file__


class Tasks(TaskManager):
    """lm-eval's task manager with our tasks; adds images of few-shot examples."""

    loaded: dict[str, Any]
    _index: dict[str, Any]

    def __init__(self, include_path: str | list[str], include_defaults: bool = True):
        named = [include_path] if isinstance(include_path, str) else include_path
        try:
            super().__init__(include_path=include_path, include_defaults=False)
        except TypeError:  # of names that lm-eval cannot sort
            own = ", ".join(folder for folder in named if not is_packaged(folder))
            raise ConfigError(
                f"{own}: a task's name is no text; put quotes around what `task` is in its YAML files"
            ) from None
        self.folders = [path for path in map(Path, named) if not is_packaged(path)]
        """Folders of tasks that are not installed with this package or lm-eval."""
        theirs = index_of(STOCK) if include_defaults else {}
        known = {**theirs, **(_our_tasks().task_index if self.folders else {})}
        self.replaced = {n for n in known.keys() & self._index if self._is_own(self._index[n])}
        """Tasks of `folders` with the name of one that is installed."""
        if include_defaults:  # as lm-eval has it: ours take precedence
            self._index = {**theirs, **self._index}
            self._all_tasks = sorted(self._index)
        self._index = blind.Index(self._index)

    @classmethod
    def of(cls, tasks: Sequence[str], include: str | None = None) -> Tasks:
        """Our tasks and those in the folder `include`; lm-eval's fourteen thousand are scanned only when needed.

        Raises ConfigError for an unknown task, and for a missing folder.
        """
        if include is not None and not Path(include).is_dir():
            why = "; it is a file: give its folder" if Path(include).is_file() else ""
            if not Path(include).is_absolute():
                why = f" in {Path.cwd()}, the working directory{why}"
            raise ConfigError(f"eval.include: no folder {include!r}{why}")
        ours = (
            _our_tasks()
            if include is None
            else cls(include_path=_folders(include), include_defaults=False)
        )
        for task in tasks:
            blind.refuse_unknown_variant(task, ours.task_index)
            ours.check(blind.variant_of(task)[0])
        if all(ours.has(task) and ours.has_members(task) for task in tasks):
            return ours
        _refuse_broken([task for task in tasks if not ours.has(task)], include)
        every = all_tasks(include)
        for task in tasks:
            if not every.has(task):
                near = difflib.get_close_matches(blind.variant_of(task)[0], every.all_tasks, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                own = "" if include else "; a task of your own needs eval.include, its folder"
                raise ConfigError(
                    f"eval.tasks: no task {task!r}{hint} (`vlopd tasks --all` lists all){own}"
                )
            entry = every.task_index[task]
            unknown = [each for each in members_of(every.task_index, task) if not every.has(each)]
            if unknown and every._is_own(entry):
                raise ConfigError(
                    f"eval.tasks: no task {unknown[0]!r}, which {task} names; fix {entry.yaml_path}"
                )
        return every

    def has(self, task: str) -> bool:
        return task in self.task_index

    def has_members(self, task: str) -> bool:
        """Whether the members that a group names are known; it may name lm-eval's."""
        return all(
            self.has(each) and self.has_members(each)
            for each in members_named(self.task_index[task].cfg or {})
        )

    def check(self, task: str, above: tuple[str, ...] = ()) -> None:
        """Checks a task file of `folders` and its members'. Raises ConfigError for one of another shape, and for a
        group within itself."""
        if not self.has(task) or not self._is_own(entry := self.task_index[task]):
            return
        refuse_malformed(task, entry)
        for each in members_named(entry.cfg or {}):
            if each in (*above, task):
                raise ConfigError(
                    f"task {task}: the group {each} is a member of itself; fix {entry.yaml_path}"
                )
            self.check(each, (*above, task))

    def load(self, task_list: Any) -> Any:
        """Loads tasks and groups; a variant without pictures (evals/blind.py) by the name of its task."""
        base, variant = task_list, ""
        if isinstance(task_list, list) and len(task_list) == 1:
            name, variant = blind.variant_of(task_list[0])
            base = [name] if variant else base
        entries = self._entries(base)
        for name, entry in entries.items():
            if name in self.replaced:
                note_replaced(name, entry.yaml_path)
        own = any(self._is_own(entry) for entry in entries.values())
        with only_trusted(self.folders, own):
            found = super().load(base)
        for name in (*found["tasks"], *found["groups"]):
            refuse_name(name, f"eval.tasks: {base}")
        if variant:
            found = blind.rename(found, variant)
        self.loaded = found["tasks"]
        for task in self.loaded.values():
            if (
                task.config.doc_to_image is not None
                and task.config.output_type != "loglikelihood_rolling"
            ):
                _add_fewshot_images(task)
            blind.apply(task)
        return found

    def _entries(self, tasks: Any) -> dict[str, Any]:
        """{name: entry} of tasks and of the members of groups."""
        index = self.task_index
        named = [tasks] if isinstance(tasks, str) else tasks
        members = {member for task in named for member in members_of(index, task)}
        return {name: index[name] for name in sorted(members) if name in index}

    def _is_own(self, entry: Any) -> bool:
        """Whether a task is of `folders`."""
        return entry.yaml_path is not None and not is_packaged(entry.yaml_path)

    def overrides(self, task: str, config: EvalConfig) -> dict[str, GenerationConfig]:
        """{task or member of a group: its overrides in eval.generation}, of those that have any.

        A member's own settings count more than those of the groups that it is in, the innermost first.
        """
        found = {}
        for name, path in members_of(self.task_index, task).items():
            own = GenerationConfig()
            for key in (name, *reversed(path), "*"):
                for each in dict.fromkeys((key, blind.variant_of(key)[0])):
                    if each in config.generation:
                        own = own.over(config.generation[each])
            if own != GenerationConfig():
                found[name] = own
        return found

    def refuse_unknown_names(self, config: EvalConfig) -> None:
        """Raises ConfigError where eval.generation or eval.metric names no task, group or member of the evaluation."""
        during = config.during.tasks if config.during else ()
        tasks = (*config.tasks, *during)
        names = {name for task in tasks for name in members_of(self.task_index, task)}
        names |= {blind.variant_of(name)[0] for name in names}
        for key, given in (("generation", {*config.generation} - {"*"}), ("metric", config.metric)):
            for name in given:
                if name not in names:
                    known = names if len(names) < 9 else tasks
                    raise ConfigError(
                        f"eval.{key}: {name!r} is no task of this evaluation{nearest_hint(name, names, known)}"
                    )

    def digest(self, task: str) -> str:
        """Digest of a task's files (questions and scoring) and lm-eval's version."""
        files = sorted(files_of_task(self.task_index, task))
        if blind.variant_of(task)[1]:
            files.append(Path(blind.__file__))
        contents = [[path.name, file_digest(path)] for path in files]
        return digest_json([task, lm_eval.__version__, sorted(contents)])


def _folders(include: str | None) -> list[str]:
    return [str(TASKS), *([include] if include else [])]


def _refuse_broken(tasks: Sequence[str], include: str | None) -> None:
    """Raises ConfigError for an invalid YAML file that names one of the tasks; lm-eval silently skips it."""
    for path in sorted(Path(include).rglob("*.yaml")) if include else ():
        text = path.read_text(errors="replace")
        for task in tasks:
            if task != path.stem and task not in text:
                continue
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:  # an included file may be missing too
                raise ConfigError(
                    f"eval.tasks: {path}, which names task {task!r}, cannot be read as YAML: {first_line(error)}"
                ) from None


@cache
def _our_tasks() -> Tasks:
    return Tasks(include_path=_folders(None), include_defaults=False)


def all_tasks(include: str | None) -> Tasks:
    """Our tasks and lm-eval's; cached per process and working directory."""
    return _all_tasks(include, Path.cwd())


@cache
def _all_tasks(include: str | None, _: Path) -> Tasks:
    return Tasks(include_path=_folders(include))


def _add_fewshot_images(task: Any) -> None:
    """Patches a task to return the images of a question's few-shot examples before its own.

    lm-eval adds the examples' text to the prompt but not their images (its issue 2948). It builds one
    question at a time, examples first, so the examples drawn last are the question's.
    """
    draw, picture = task.sampler.sample, task.doc_to_image
    drawn: list[Any] = []

    def remembering(*args: Any, **kwargs: Any) -> Any:
        drawn[:] = draw(*args, **kwargs)
        return list(drawn)

    def own(doc: Any) -> list[Any]:
        return as_list(picture(doc))

    def with_examples(doc: Any, *column: Any) -> Any:
        if column:  # lm-eval's own call for each of several columns
            return picture(doc, *column)
        shown = drawn if task.config.num_fewshot else []
        images = [image for each in shown for image in own(each)]
        return images + task.own_image(doc)  # which a variant replaces (evals/blind.py)

    task.sampler.sample, task.doc_to_image, task.own_image = remembering, with_examples, own


def as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def score_task(
    lm: ArmLM, task: str, manager: Tasks, config: EvalConfig, limit: int | None, name: str
) -> dict[str, Any]:
    """lm-eval's results of a model on a task, with one row per question; preserves all random states.

    With `config.sampled` one pass per sample, merged by `_merge_passes`; one where the task generates nothing, or only
    greedily (eval.generation).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    templated = config.chat_template
    if templated is None:
        templated = lm.loaded.chat_template is not None
    own = manager.overrides(task, config)
    passes: list[dict[str, Any]] = []
    draws = 1
    while len(passes) < draws:
        lm.draw, lm.generated, lm.largest_picture = len(passes), {}, {}
        with preserve_random_state():
            loaded = load_task(manager, task, config.fewshot)
            lm.overrides = {
                leaf: own.get(leaf, own.get(task, GenerationConfig())) for leaf in loaded["tasks"]
            }
            if config.sampled is not None and is_sampled(loaded["tasks"], lm.overrides):
                draws = config.sampled.n
            # lm-eval's own bar, of the prompts, has neither a name nor a switch
            lm_eval.api.task.tqdm = partial(
                progress, title=f"{lm.title}: prompts of {task}", leave=False, disable=lm.quiet
            )
            # not simple_evaluate, which queries pip for all package versions, one second per call
            try:
                with closed_form_errors():
                    results = lm_eval.evaluate(
                        lm,
                        loaded,
                        limit=limit,
                        apply_chat_template=templated,
                        fewshot_as_multiturn=templated,
                        bootstrap_iters=1,  # of which none is made
                        log_samples=True,
                    )
            except UserError:
                raise
            except FAILURES as error:  # filters, metrics and task files raise arbitrary exceptions
                if any(f.f_code.co_filename == LM for f, _ in walk_tb(error.__traceback__)):
                    raise  # raised by the model, not the task
                raise RunError(
                    f"task {task} cannot be scored: {type(error).__name__}: {first_line(error)}; fix "
                    f"{manager.task_index[task].yaml_path}"
                ) from None
        assert results is not None
        results["config"] = {"model": name, "limit": limit, "batch_size": lm.batch_size}
        for leaf, rows in results["samples"].items():
            declared = list(loaded["tasks"][leaf].aggregation())
            for row in rows:
                row["metrics"] = in_order(row["metrics"], declared)
                row["doc_hash"] = _content_hash(row["doc"])
                row["generated"] = lm.generated.get((leaf, row["doc_id"]), [])
        passes.append(results)
    for results in passes:
        for leaf, rows in results["samples"].items():
            results["samples"][leaf] = one_row_a_question(leaf, rows)
    found = passes[0] if draws == 1 else _merge_passes(passes)
    found["metrics"] = {
        leaf: {
            column: {
                **metric_facts(loaded["tasks"][leaf], column, draws > 1),
                "filter": rows[0]["filter"],
            }
            for column in columns_of(rows)
        }
        for leaf, rows in found["samples"].items()
    }
    found["totals"] = {
        each.name: total
        for each in loaded["groups"].values()
        if each.name == task and (total := group_total(each)) is not None
    }
    return found


def in_order(metrics: Sequence[str], declared: Sequence[str]) -> list[str]:
    """A row's metrics as the task's metric_list has them, which lm-eval's own rows need not follow; then others."""
    return sorted(metrics, key=lambda m: declared.index(m) if m in declared else len(declared))


@contextmanager
def closed_form_errors() -> Iterator[None]:
    """Makes lm-eval give standard errors of means alone, and none by a bootstrap, which compare.json has.

    With 0 iterations it gives neither, with 1 it divides by 0.
    """
    original = evaluator_utils.stderr_for_metric

    def error_of(metric: Any, bootstrap_iters: int) -> Any:
        return {mean: mean_stderr, acc_all: acc_all_stderr}.get(metric)

    evaluator_utils.stderr_for_metric = error_of
    try:
        yield
    finally:
        evaluator_utils.stderr_for_metric = original


def is_sampled(tasks: Mapping[str, Any], overrides: Mapping[str, GenerationConfig]) -> bool:
    """Whether any of the tasks generates, and not greedily by its eval.generation."""
    return any(
        task.OUTPUT_TYPE == "generate_until" and overrides[name].temperature != 0
        for name, task in tasks.items()
    )


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of a task's rows: the first filter's in the order of the task, then those of others, and pass@k."""
    names = dict.fromkeys(name for row in rows for name in (*row["columns"], *row["numbers"]))
    return [
        name
        for name in names
        if any(name in row["numbers"] or name in row["items"] for row in rows)
    ]


def metric_facts(task: Any, column: str, sampled: bool) -> dict[str, Any]:
    """How a metric is aggregated over questions, and whether more is better, as results.json has it.

    The aggregation is lm-eval's name of it or, of a function, `FILE.py:FUNCTION`, the file from the folder of our or
    lm-eval's package; null if it is neither.
    """
    metric = column.partition(",")[0]
    total = task.aggregation().get(metric, mean)
    better = task.higher_is_better().get(metric, True)
    name = name_of_aggregation(total)
    if sampled and name != "mean":
        name = None
    return {"aggregation": name, "higher_is_better": better is not False}


@cache
def metric_aggregations() -> dict[str, Any]:
    return {str(name): aggregation_registry.get(name) for name in aggregation_registry}


def name_of_aggregation(total: Any) -> str | None:
    for name, each in metric_aggregations().items():
        if total is each:
            return name
    if not inspect.isfunction(total):
        return None
    file = Path(total.__code__.co_filename)
    for package in (TASKS.parents[1], Path(lm_eval.__file__).parents[1]):
        if file.is_relative_to(package):
            file = file.relative_to(package)
    return f"{file.as_posix()}:{total.__name__}"


def group_total(group: Any) -> dict[str, Any] | None:
    """A group's members and how its total is made, as results.json has it; None for a group without a total."""
    if not group.aggregate_metric_list:
        return None
    first = group.aggregate_metric_list[0]
    members = [task.task_name for task in group.get_all_tasks()]
    return {
        "members": list(dict.fromkeys(members)),
        "metric": first.metric,
        "filter": first.filter_list[0] if first.filter_list else None,
        "weight_by_size": bool(first.weight_by_size),
    }


def _content_hash(doc: Any) -> str:
    """lm-eval's hash of a question whose images it has replaced by theirs; its own has their addresses in memory."""
    return hash_string(
        json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    )


def load_task(manager: Tasks, task: str, fewshot: int | None) -> Any:
    """Loads a task (or group of tasks) as lm-eval's simple_evaluate does, with its default seeds.

    Raises RunError where its data, a column or a split is missing.
    """
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        loaded = manager.load([task])
    except UserError:
        raise
    except IndexError as error:  # lm-eval checks the first question
        found = {k: v for f, _ in walk_tb(error.__traceback__) for k, v in f.f_locals.items()}
        if "test_target" in found:
            raise RunError(
                f"task {task}, question 0 (from 0): {digit_target_message(found['test_target'], found['test_choice'])}"
            ) from None
        raise RunError(f"task {task} has no questions: its split is empty") from None
    except FAILURES as error:  # datasets, templates and task files raise arbitrary exceptions
        entry = manager.task_index[task]
        for name in _metrics_of(entry.cfg or {}):
            if isinstance(error, KeyError) and name not in metric_registry:
                raise RunError(unknown_metric(task, name, entry.yaml_path)) from None
        choices = (entry.cfg or {}).get("doc_to_choice")
        if isinstance(error, ValueError) and isinstance(choices, str) and choices.isidentifier():
            raise RunError(
                f"task {task}: doc_to_choice names a column {choices!r}, which the rows lack; fix {entry.yaml_path}"
            ) from None
        raise RunError(
            f"task {task} could not be loaded: {first_line(error)}; its data, columns and settings are in "
            f"{manager.task_index[task].yaml_path}"
        ) from None
    for its in loaded["tasks"].values():
        own = its.get_config("num_fewshot")
        if own != 0 and (fewshot is not None or own is None):
            its.set_config("num_fewshot", fewshot or 0)
        its.set_fewshot_seed(1234)
    return loaded


def digit_target_message(target: Any, choices: Any) -> str:
    """The error message for a target of digits, which lm-eval reads as the index of a choice."""
    return (
        f"its target {target!r} is read as an index (from 0) into its {len(choices)} choices {choices}; "
        "if it is the choice itself, name the column (doc_to_target: COLUMN, text and no template)"
    )


def _metrics_of(settings: Mapping[str, Any]) -> list[str]:
    listed = settings.get("metric_list") or []
    return [
        str(each["metric"]) for each in listed if isinstance(each, Mapping) and "metric" in each
    ]


def unknown_metric(task: str, name: str, yaml: Any) -> str:
    return f"task {task}: no metric {name!r}{nearest_hint(name, metric_registry)}; fix metric_list in {yaml}"


def nearest_hint(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """The nearest known name, or else the `listed` names (all known)."""
    found = difflib.get_close_matches(name, list(known), 1)
    names = sorted(known if listed is None else listed)
    return f", did you mean {found[0]!r}?" if found else f"; there are {', '.join(names)}"


def one_row_a_question(task: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins lm-eval's rows, one per filter: the first filter's metrics by name, others as `metric,filter`.

    `numbers` has those that are a number per question, `items` what corpus metrics are computed from. Raises RunError
    with the question for a metric that is NaN, infinite or missing.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        metrics, items = _numeric_metrics(task, row), _corpus_items(row)
        first = found.get(row["doc_id"])
        if first is None:
            own = {"numbers": metrics, "items": items, "columns": list(row["metrics"])}
            found[row["doc_id"]] = {**row, "completion": _completion_of(row), **own}
        else:
            first["columns"] += [f"{metric},{row['filter']}" for metric in row["metrics"]]
            first["numbers"] |= {f"{m},{row['filter']}": v for m, v in metrics.items()}
            first["items"] |= {f"{m},{row['filter']}": v for m, v in items.items()}
    joined = [found[doc_id] for doc_id in sorted(found)]
    every = dict.fromkeys(metric for row in joined for metric in row["numbers"])
    for row in joined:
        for metric in every:
            if metric not in row["numbers"]:
                raise RunError(
                    f"task {task}, {_question_label(row)}: no {metric}, which other questions have"
                )
    return joined


def _numeric_metrics(task: str, row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numeric metrics. Raises RunError with the question for one that is NaN or infinite."""
    numbers = {
        metric: row[metric] for metric in row["metrics"] if not is_corpus_metric(row[metric])
    }
    for metric, value in numbers.items():
        if not is_finite(value):
            raise RunError(
                f"task {task}, {_question_label(row)}: its {metric} is {shown(value)}; fix how the task scores it "
                "(its process_results), or leave the question out"
            )
    return numbers


def chance_of(task: str, chance: Any, docs: Sequence[Any], yaml: Any) -> dict[str, float]:
    """The accuracies of guessing, by kind of question and of `all`. Raises RunError where the function gives others."""
    try:
        found = chance(docs)
    except FAILURES as error:
        raise RunError(
            f"task {task}: its chance level fails: {type(error).__name__}: {first_line(error)}; fix {yaml}"
        ) from None
    is_table = isinstance(found, Mapping) and "all" in found
    if not is_table or not all(
        isinstance(x, (int, float)) and is_finite(x) for x in found.values()
    ):
        raise RunError(
            f"task {task}: its chance level is {shown(found)}; give accuracies by kind and of all, as in "
            f'{{"all": 0.25}}, in {yaml}'
        )
    return {str(kind): float(value) for kind, value in found.items()}


def is_finite(value: Any) -> bool:
    """Whether a number is one that float64 holds."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _corpus_items(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's inputs of corpus metrics as JSON values; those that JSON cannot hold are left out."""
    found = {}
    for metric in row["metrics"]:
        if is_corpus_metric(row[metric]):
            with suppress(TypeError, ValueError):
                found[metric] = json.loads(
                    json.dumps(row[metric], default=_plain_number, allow_nan=False)
                )
    return found


def _plain_number(value: Any) -> Any:
    if isinstance(value, (np.number, np.ndarray)):
        return value.tolist()
    raise TypeError


def _question_label(row: Mapping[str, Any]) -> str:
    """A label of a question for messages: its number and first words."""
    asked = row["doc"].get("question") if isinstance(row["doc"], Mapping) else None
    return f"question {row['doc_id']} (from 0{f', {shorten(str(asked), 60)!r}' if asked else ''})"


def _merge_passes(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges sampled passes: metrics are means over them, completions lists, with pass@k for a 0/1 primary metric."""
    first = passes[0]
    n = len(passes)
    for task, rows in first["samples"].items():
        others = [p["samples"][task] for p in passes]
        for row, same in zip(rows, zip(*others, strict=True), strict=True):
            row["completion"] = json.dumps([each["completion"] for each in same])
            row["generated"] = [its for each in same for its in each["generated"]]
            row["items"] = {}  # of one pass each, so no corpus metric is compared
            row["each"] = [each["numbers"] for each in same]
            primary = next(iter(row["numbers"]), None)
            values = {m: [float(each["numbers"][m]) for each in same] for m in row["numbers"]}
            row["numbers"] = {m: float(np.mean(v)) for m, v in values.items()}
            if primary is not None and set(values[primary]) <= {0.0, 1.0}:
                right = int(sum(values[primary]))
                for k in _powers_of_two(n):
                    row["numbers"][f"pass@{k}"] = float(stats.pass_at_k([right], n, k)[0])
        totals = [p["results"][task] for p in passes]
        for key, value in totals[0].items():
            if isinstance(value, float):  # also of corpus metrics, which are no means of rows
                first["results"][task][key] = float(np.mean([each[key] for each in totals]))
        for k in _powers_of_two(n):
            if (name := f"pass@{k}") in rows[0]["numbers"]:
                own = [row["numbers"][name] for row in rows]
                first["results"][task][f"{name},none"] = float(np.mean(own))
    return first


def _powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... up to n, and n."""
    return sorted({n, *(2**i for i in range(1, n.bit_length()) if 2**i <= n)})


def is_corpus_metric(value: Any) -> bool:
    """Whether a row's metric is not a number but an input of a corpus-level metric."""
    return not isinstance(value, (bool, int, float, np.number))


def _completion_of(row: Mapping[str, Any]) -> str:
    """The generated text, or the most likely choice, or else the responses as JSON."""
    responses = row["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    if isinstance(responses[0], (list, tuple)) and len(responses) > 1:
        best = max(range(len(responses)), key=lambda i: float(responses[i][0]))
        return str(argument(row, best, 1)).strip()
    return json.dumps(responses)


def argument(row: Mapping[str, Any], request: int, place: int) -> Any:
    """One argument of one of a question's requests: (prompt, continuation or settings, ...)."""
    arguments = row["arguments"]
    if isinstance(arguments, Mapping):  # as lm-eval writes them to a file
        return arguments[f"gen_args_{request}"][f"arg_{place}"]
    return arguments[request][place]


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restores python's, numpy's and torch's global random states, which lm-eval reseeds."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
