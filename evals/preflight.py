"""Checks evaluation tasks before anything is trained.

Reads a task's rows as the evaluation will: prompt, target, choices and images of every question, the full chat prompt
of a few, and the score of each target as an answer. Every problem is reported in one line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import aggregation_registry

from evals.blind import variant_of
from evals.corpus_metrics import why_not
from evals.harness import read_scored_rows, results_of, samples_of
from evals.lm import PLACEHOLDER, ArmLM, Decoding, GenerationSettings, within_pixels
from evals.paired_scores import chosen_metric
from evals.scoring import (
    TASKS,
    Tasks,
    as_list,
    chance_of,
    digit_target_message,
    is_corpus_metric,
    is_finite,
    load_task,
    metric_facts,
    nearest_hint,
    preserve_random_state,
    unknown_metric,
)
from evals.task_code import FAILURES
from evals.task_columns import VerbatimRows, differs_from_file, empty_cell, unknown_column
from vlopd.config.analysis import EvalConfig, GenerationConfig
from vlopd.errors import RunError, UserError, first_line, shown
from vlopd.models import families
from vlopd.models.loaded import LoadedModel

FEW = 4
"""Questions whose full prompt is built, with few-shot examples and images."""
SHOWN = 16
"""Questions whose images are counted."""
LM_EVAL = Path(lm_eval.__file__).parent


def find_problems(config: EvalConfig, models: Mapping[str, LoadedModel]) -> list[str]:
    """Problems of evaluating these models on the config's tasks, including those of `during`; empty without any.

    models: by their name in the config; their weights are not used.
    """
    during = config.during
    wanted = {task: config.limit for task in config.tasks}
    for task in during.tasks if during else ():
        wanted.setdefault(task, during.limit if during else None)
    try:
        manager = Tasks.of(list(wanted), config.include)
        manager.refuse_unknown_names(config)
    except UserError as error:
        return [str(error)]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: list[str] = []
    comparable = generates = False
    for task, limit in wanted.items():
        try:
            refuse_text_only(task, manager, models)
            overrides = manager.overrides(task, config)
            with preserve_random_state():
                loaded = load_task(manager, task, config.fewshot)["tasks"]
                for leaf, its in loaded.items():
                    generates |= its.OUTPUT_TYPE == "generate_until"
                    check = TaskCheck(leaf, its, config, limit, manager.task_index[task].yaml_path)
                    check.override = overrides.get(leaf, overrides.get(task))
                    check.refuse_unknown_metric()
                    comparable |= check.refuse_bad_rows()
                    for name, model in models.items():
                        check.refuse_unreadable(name, model)
        except UserError as error:
            found.append(" ".join(str(error).split()))
    if not found and config.sampled and not generates:
        found.append(
            f"eval.sampled: no task of {', '.join(wanted)} generates answers that could be sampled; leave it out"
        )
    if not found and not comparable:
        found.append(
            f"eval.tasks: no metric of {', '.join(wanted)} is a number per question or has a known aggregation, so "
            "nothing could be compared; add a task that has one"
        )
    return found


def refuse_text_only(task: str, manager: Tasks, models: Mapping[str, LoadedModel]) -> None:
    """Raises RunError for a text-only model and a group that names, as `text_only`, another one for such models."""
    metadata = (manager.task_index[task].cfg or {}).get("metadata")
    instead = metadata.get("text_only") if isinstance(metadata, Mapping) else None
    for name, model in models.items():
        if instead and not model.sees_images and variant_of(task)[1] != "no_picture":
            raise RunError(
                f"task {task} has pictures, but {name} ({model.name}) is text-only; choose {instead}, or leave that "
                "arm out"
            )


def find_import_problems(tasks: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Problems of importing finished evaluations, to be compared with each other."""
    first: dict[str, tuple[Path, set[Any]]] = {}
    try:
        for folder in folders:
            results_of(folder)  # raises for a file of another kind
            for task, path in samples_of(folder, tasks).items():
                rows = read_scored_rows(task, path)
                asked = {(row["doc_id"], row["doc_hash"]) for row in rows}
                of, others = first.setdefault(task, (path, asked))
                if others != asked:
                    raise RunError(
                        f"{of} ({len(others)} questions) and {path} ({len(asked)}) differ in "
                        f"{len(asked ^ others)} questions of {task}; evaluate both on the same"
                    )
    except UserError as error:
        return [" ".join(str(error).split())]
    return []


class TaskCheck:
    """Checks one task's rows up to the limit."""

    def __init__(self, name: str, task: Any, config: EvalConfig, limit: int | None, yaml: Any):
        self.name, self.task, self.config = name, task, config
        self.yaml = yaml
        self.override: GenerationConfig | None = None
        self.refuse_bad_settings()
        self.docs: list[Any] = list(islice(task.eval_docs, limit))
        split = task.config.test_split or task.config.validation_split
        text = all(isinstance(value, str) for doc in self.docs for value in doc.values())
        self.written = None if text else VerbatimRows(task, split)
        self.texts: list[Any] = [self.of(i, task.doc_to_text) for i in range(len(self.docs))]

    def is_in(self, folder: Path) -> bool:
        return self.yaml is not None and folder in Path(self.yaml).parents

    @property
    def new_tokens(self) -> int:
        """Maximum tokens of an answer; 0 if the task does not generate."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return 0
        asked = GenerationSettings.parse(self.name, self.task.config.generation_kwargs)
        return Decoding.of(asked, self.override).tokens

    @property
    def compares_target(self) -> bool:
        """Whether lm-eval compares answers with the target, rather than the task's own function."""
        kind = self.task.OUTPUT_TYPE
        return self.task.config.process_results is None and kind != "loglikelihood_rolling"

    def refuse_bad_settings(self) -> None:
        """Raises RunError or ConfigError for invalid settings, independent of the rows."""
        task, config = self.task, self.task.config
        where = f"fix {self.yaml}"
        if task.OUTPUT_TYPE == "generate_until":
            GenerationSettings.parse(self.name, config.generation_kwargs)
        if config.process_results is None:
            for metric, function in task._metric_fn_list.items():
                if function is None:
                    raise RunError(unknown_metric(self.name, metric, self.yaml))
        for metric, function in task.aggregation().items():
            if function is None:
                named = [
                    m.get("aggregation") for m in config.metric_list or () if m["metric"] == metric
                ]
                aggregation = str(named[0] if named else None)
                raise RunError(
                    f"task {self.name}: {metric}'s aggregation {aggregation!r} is unknown to lm-eval"
                    f"{nearest_hint(aggregation, aggregation_registry)}; {where}"
                )
        if self.is_in(LM_EVAL):
            return
        for setting, least in (("repeats", 1), ("num_fewshot", 0)):
            value = config[setting]
            if value is not None and (type(value) is not int or value < least):
                raise RunError(
                    f"task {self.name}: {setting} is {value!r}; it must be an integer of at least {least}: {where}"
                )
        if self.compares_target and config.doc_to_target in (None, "", []):
            raise RunError(
                f"task {self.name}: its doc_to_target is empty, but answers are compared with it; name the column "
                f"of the right answers in {self.yaml}"
            )
        settings = ["doc_to_text", "doc_to_image"]
        settings += (
            ["doc_to_target"] if self.compares_target and config.doc_to_choice is None else []
        )
        for setting in settings:
            if (name := unknown_column(task, setting)) is not None:
                raise RunError(
                    f"task {self.name}: {setting} names a column {name!r}, but the rows have "
                    f"{', '.join(task.features)}; {where}"
                )

    def refuse_unknown_metric(self) -> None:
        """Raises ConfigError for a metric of eval.metric that the task's own list lacks, if it has no own function."""
        if self.task.config.process_results is not None:
            return
        names = list(self.task.aggregation())
        filters = [its.name for its in self.task._filters]
        columns = [*names, *(f"{name},{its}" for its in filters for name in names)]
        chosen_metric(self.name, {}, columns, self.config.metric)

    def refuse_unwritten(self, index: int) -> None:
        """Raises RunError where question, target or choices differ from the data file, or read an empty cell."""
        config, doc = self.task.config, self.docs[index]
        makes = {"doc_to_text": self.task.doc_to_text}
        if self.compares_target:
            makes["doc_to_target"] = self.task.doc_to_target
        if config.doc_to_choice is not None:
            makes["doc_to_choice"] = self.task.doc_to_choice
        own = doc if self.written is None else self.written.row(index, doc)
        for setting, make in makes.items():
            if own is not doc and (pair := differs_from_file(make, doc, own)):
                raise self.error(
                    index,
                    f"its {setting} is {pair[0]!r} where the data file has {pair[1]!r}: `datasets` infers the type "
                    "of a column; write its values as text: in quotes in a JSON-lines file, or, if they look like "
                    "dates, in a parquet file",
                )
            if (column := empty_cell(self.task, config[setting], doc)) is not None:
                raise self.error(
                    index,
                    f"its {setting} reads {column}, which is empty (null or NaN); fill it in or leave the row out",
                )

    def of(self, index: int, make: Any, *args: Any) -> Any:
        """Applies one of the task's functions to a question. Raises RunError with the question's number."""
        try:
            return make(self.docs[index], *args)
        except UserError:
            raise
        except FAILURES as error:  # templates and task files raise arbitrary exceptions
            raise self.error(
                index, f"cannot be read: {first_line(error)}; {self.yaml} names its columns"
            ) from None

    def error(self, index: int, what: str) -> RunError:
        return RunError(f"task {self.name}, question {index} (from 0): {what}")

    def refuse_bad_chance(self) -> None:
        """Raises RunError where metadata.chance is no function that gives accuracies by kind and of all."""
        chance = (self.task.config.metadata or {}).get("chance")
        if chance is None:
            return
        if not callable(chance):
            raise RunError(
                f"task {self.name}: metadata.chance is {shown(chance)}; name a function of the questions "
                f"(!function FILE.NAME) in {self.yaml}"
            )
        chance_of(self.name, chance, self.docs, self.yaml)

    def refuse_bad_rows(self) -> bool:
        """Raises RunError for invalid targets, mismatched image placeholders and invalid scores.

        Returns whether a metric can be compared.
        """
        if not self.is_in(LM_EVAL) and not self.is_in(TASKS):
            self.refuse_bad_chance()
        comparable = True
        for i, text in enumerate(self.texts):
            if i < SHOWN and isinstance(text, str):
                self.refuse_unmarked_pictures(i, text)
            if self.task.OUTPUT_TYPE == "loglikelihood_rolling":
                continue
            if not self.is_in(LM_EVAL):
                self.refuse_unwritten(i)
            target = self.of(i, self.task.doc_to_target)
            if self.task.OUTPUT_TYPE == "multiple_choice":
                self.refuse_no_choice(i, target)
            elif self.task.config.doc_to_target not in (None, "") and not _has_content(target):
                raise self.error(i, f"its target is {target!r}; fill it in or leave the row out")
            if self.task.config.filter_list and self.task.OUTPUT_TYPE == "generate_until":
                self.refuse_bad_filters(i, target)
            if self.is_scored(i):
                comparable &= self.refuse_bad_scores(i, target)
        return comparable

    def is_scored(self, index: int) -> bool:
        """Whether a target can be scored as an answer: without filters and, for lm-eval's own tasks, without code."""
        config = self.task.config
        if config.filter_list or (config.repeats or 1) > 1:
            return False
        if "acc_mutual_info" in self.task.aggregation():
            return False
        return not self.is_in(LM_EVAL) or (index == 0 and config.process_results is None)

    def refuse_unmarked_pictures(self, index: int, text: str) -> None:
        if self.task.config.doc_to_image is None:
            return
        images = as_list(self.of(index, self.task.own_image))
        if text.count(PLACEHOLDER) != len(images):
            raise self.error(
                index,
                f"doc_to_text marks {text.count(PLACEHOLDER)} pictures with {PLACEHOLDER} and doc_to_image returns "
                f"{len(images)}; fix {self.yaml}",
            )

    def refuse_bad_filters(self, index: int, target: Any) -> None:
        """Raises RunError where a filter fails on the target as an answer, or on an empty answer."""
        config = self.task.config
        scored = self.is_scored(0) or not self.is_in(LM_EVAL)
        for answer in (str(target[0] if isinstance(target, list) and target else target), ""):
            asked = Instance("generate_until", self.docs[index], ("", {}), 0)
            asked.resps = [answer] * (config.repeats or 1)
            for ensemble in self.task._filters:
                try:
                    ensemble.apply([asked])
                    if scored and (config.repeats or 1) == 1:
                        filtered = asked.filtered_resps[ensemble.name]
                        self.task.process_results(self.docs[index], [filtered])
                except FAILURES as error:  # filters raise arbitrary exceptions
                    raise RunError(
                        f"task {self.name}: its filter {ensemble.name!r} (filter_list) fails on the answer "
                        f"{answer!r}: {type(error).__name__}: {first_line(error)}; fix {self.yaml}"
                    ) from None

    def refuse_no_choice(self, index: int, target: Any) -> None:
        """Raises RunError where the target is none of the choices."""
        choices = self.of(index, self.task.doc_to_choice)
        if self.task.multiple_input:
            target = self.texts[index]
        for gold in target if isinstance(target, list) else [target]:
            is_place = isinstance(gold, int) and not isinstance(gold, bool)
            column = self.task.config.doc_to_target
            word = self.docs[index].get(str(column).strip("{} "))
            is_word = isinstance(word, str) and is_place and word in choices
            if is_word and (gold >= len(choices) or choices[gold] != word):
                raise self.error(index, digit_target_message(gold, choices))
            if not (0 <= gold < len(choices) if is_place else gold in choices):
                raise self.error(
                    index,
                    f"its target is {gold!r}, which is none of its {len(choices)} choices {choices}; "
                    "a target is a choice, or its index from 0",
                )

    def refuse_bad_scores(self, index: int, target: Any) -> bool:
        """Raises RunError where the target, scored as an answer, gets a score that is not finite.

        Returns whether any score can be compared.
        """
        kind = self.task.OUTPUT_TYPE
        answers: list[list[Any]] = [[(-1.0, True)]]
        if kind == "multiple_choice":
            answers = [
                [(-float(k), k == 0) for k in range(len(self.task.doc_to_choice(self.docs[index])))]
            ]
        elif kind == "generate_until":
            answer = str(target[0] if isinstance(target, list) and target else target)
            answers = [[answer], [f"\\boxed{{{answer}}}"], [f"The answer is {answer}."]]
        best: list[float] = []
        for results in answers:
            scores = self.of(index, self.task.process_results, results)
            if not isinstance(scores, Mapping) or not all(isinstance(m, str) for m in scores):
                raise self.error(
                    index,
                    f"process_results gives {shown(scores)}, which is no table of scores by metric; fix {self.yaml}",
                )
            numbers = {m: x for m, x in scores.items() if not is_corpus_metric(x)}
            for metric, value in numbers.items():
                if not is_finite(value):
                    raise self.error(
                        index,
                        f"its {metric} is {shown(value)} for its own target {target!r}; fix {self.yaml}",
                    )
            numbers = {m: float(x) for m, x in numbers.items()}
            if not self.is_in(LM_EVAL):
                self.refuse_no_sum(numbers)
            best += list(numbers.values())[:1]
            if 1 in best:
                break
        if best and max(best) == 0 and kind == "generate_until" and self.is_in(TASKS):
            raise self.error(
                index,
                f"its target {target!r} scores 0 as an answer, so no answer would be right; fix the row",
            )
        return bool(best) or any(self.is_compared(metric) for metric in scores)

    def is_compared(self, metric: str) -> bool:
        """Whether a metric without a number per question has an aggregation that is computed again."""
        facts = metric_facts(self.task, metric, False)
        return facts["aggregation"] != "mean" and why_not(metric, facts) is None

    def refuse_no_sum(self, numbers: Mapping[str, float]) -> None:
        """Raises RunError for a metric that cannot be aggregated."""
        for metric, value in numbers.items():
            total = self.task.aggregation().get(metric)
            if total is None:  # not listed: lm-eval uses the mean
                continue
            try:
                total([value])
            except FAILURES as error:  # a task's functions raise arbitrary exceptions
                raise RunError(
                    f"task {self.name}: {metric} is a number per question, but its aggregation fails on it "
                    f"({type(error).__name__}: {first_line(error)}); fix metric_list in {self.yaml}"
                ) from None

    # ---- by model

    def refuse_unreadable(self, name: str, loaded: LoadedModel) -> None:
        """Raises RunError for images and a text-only model, a template that fails, or too long prompts."""
        images = [self.images(i) for i in range(min(FEW, len(self.docs)))]
        if any(images) and not loaded.sees_images:
            raise RunError(
                f"task {self.name} has pictures, but {name} ({loaded.name}) is text-only; choose other eval.tasks, "
                "or leave that arm out"
            )
        lm = ArmLM(loaded, quiet=True)
        templated = self.config.chat_template
        templated = loaded.chat_template is not None if templated is None else templated
        limit = loaded.context_length
        if limit is not None and self.new_tokens >= limit:
            raise RunError(
                f"task {self.name} needs up to {self.new_tokens} new tokens (max_gen_toks), but {name} "
                f"({loaded.name}) has {limit} positions; choose another task or model, or a smaller "
                f"eval.generation.{self.name}.max_tokens"
            )
        sample = range(min(FEW, len(self.docs)))
        overhead = 0
        for i in sample:
            prompt = self.prompt(i, lm, templated)
            if self.task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
                lm.refuse_open_thought(self.name, _prompt_text(prompt))
            length = self.tokens(i, prompt, lm, images[i])
            self.refuse_too_long(i, length, name, loaded)
            overhead = max(overhead, length - len(lm.text_ids(_prompt_text(self.texts[i]))))
        if limit is None:
            return
        for i, text in enumerate(self.texts):
            words = _prompt_text(text)
            if len(words.encode()) + overhead + self.new_tokens > limit:
                self.refuse_too_long(i, len(lm.text_ids(words)) + overhead, name, loaded)

    def images(self, index: int) -> list[Any]:
        if self.task.config.doc_to_image is None:
            return []
        return as_list(self.of(index, self.task.doc_to_image))

    def prompt(self, index: int, lm: ArmLM, templated: bool) -> Any:
        """The prompt that lm-eval builds, with few-shot examples."""
        shots = self.task.config.num_fewshot or 0

        def ask(doc: Any) -> Any:
            try:
                return self.task.fewshot_context(
                    doc,
                    num_fewshot=shots,
                    apply_chat_template=templated,
                    fewshot_as_multiturn=templated,
                    chat_template=lm.apply_chat_template if templated else None,
                    gen_prefix=self.task.doc_to_prefix(doc),
                )
            except (ValueError, AssertionError) as error:
                if shots == 0 or shots < len(self.task.sampler.df):
                    raise
                raise self.error(
                    index,
                    f"there are {len(self.task.sampler.df)} rows, too few to draw {shots} examples and a spare from "
                    f"({first_line(error)}); lower eval.fewshot, or the task's num_fewshot",
                ) from None

        return self.of(index, ask)

    def tokens(self, index: int, prompt: Any, lm: ArmLM, images: Sequence[Any]) -> int:
        loaded = lm.loaded
        if not images:
            return len(lm.text_ids(_prompt_text(prompt)))
        most = self.config.max_pixels
        shown = [
            within_pixels(image.convert("RGB"), most) for image in self.images(index)
        ]  # examples' too
        encoded = self.of(
            index,
            lambda _: families.encode(loaded.processor, [prompt], [shown], loaded.sees_images),
        )
        return encoded.input_ids.shape[1]

    def refuse_too_long(self, index: int, length: int, name: str, loaded: LoadedModel) -> None:
        limit = loaded.context_length
        if limit is not None and length + self.new_tokens > limit:
            raise self.error(
                index,
                f"{length} prompt tokens and up to {self.new_tokens} of an answer (max_gen_toks) are "
                f"{length + self.new_tokens}, but {name} ({loaded.name}) has {limit} positions; choose another task "
                f"or model, a smaller eval.generation.{self.name}.max_tokens, or fewer eval.fewshot",
            )


def _prompt_text(prompt: Any) -> str:
    """A prompt as text, or the longest of several (a question whose choices are prompts)."""
    return max(map(str, prompt), key=len, default="") if isinstance(prompt, list) else str(prompt)


def _has_content(target: Any) -> bool:
    """Whether a target is not null, NaN, or an empty text or list."""
    if isinstance(target, float):
        return math.isfinite(target)
    return target is not None and (not isinstance(target, (str, list, tuple)) or len(target) > 0)
