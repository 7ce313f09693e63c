"""What can be known of an evaluation before anything is trained or loaded, and is refused then.

A task's rows are read as they will be asked: prompt, target, choices and pictures of every question, a chat prompt of
a few, and the score of each target as an answer. Every finding is one line.
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

from evals.harness import samples_of
from evals.lm import PLACEHOLDER, ArmLM, Asked
from evals.scoring import (
    TASKS,
    Tasks,
    as_list,
    digits,
    is_corpus_metric,
    load_task,
    near,
    one_row_a_question,
    unknown_metric,
    untouched_randomness,
)
from evals.task_columns import Written, changed, empty_cell, unknown_column
from vlopd.config.analysis import EvalConfig
from vlopd.errors import RunError, UserError, first_line
from vlopd.files import read_jsonl
from vlopd.models import families
from vlopd.models.loaded import LoadedModel

FEW = 4
"""Questions whose whole prompt is made, few-shot examples and pictures included; and the longest."""
SHOWN = 16
"""Questions whose pictures are counted."""
LM_EVAL = Path(lm_eval.__file__).parent


def findings(config: EvalConfig, models: Mapping[str, LoadedModel]) -> list[str]:
    """What would stop these models on the config's tasks, those of `during` included; empty where nothing would.

    models: as they will be evaluated, by what the config calls them; their weights are not used.
    """
    during = config.during
    wanted = {task: config.limit for task in config.tasks}
    for task in during.tasks if during else ():
        wanted.setdefault(task, during.limit if during else None)
    try:
        manager = Tasks.of(list(wanted), config.include)
    except UserError as error:
        return [str(error)]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: list[str] = []
    comparable = False
    for task, limit in wanted.items():
        try:
            with untouched_randomness():
                loaded = load_task(manager, task, config.fewshot)["tasks"]
                for leaf, its in loaded.items():
                    look = Look(leaf, its, config, limit, manager.task_index[task].yaml_path)
                    comparable |= look.refuse_bad_rows()
                    for name, model in models.items():
                        look.refuse_unreadable(name, model)
        except UserError as error:
            found.append(" ".join(str(error).split()))
    if not found and not comparable:
        found.append(
            f"eval.tasks: no metric of {', '.join(wanted)} is a number a question, so that nothing could be "
            "compared; add a task whose metric_list begins with one"
        )
    return found


def imported_findings(tasks: Sequence[str], folder: Path) -> list[str]:
    """What would stop another lm-eval run's answers from being an arm."""
    try:
        for task, path in samples_of(folder, tasks).items():
            one_row_a_question(task, read_jsonl(path))
    except UserError as error:
        return [" ".join(str(error).split())]
    return []


class Look:
    """One task's rows up to the limit, each with its prompt."""

    def __init__(self, name: str, task: Any, config: EvalConfig, limit: int | None, yaml: Any):
        self.name, self.task, self.config = name, task, config
        self.yaml = yaml
        self.refuse_bad_settings()
        self.docs: list[Any] = list(islice(task.eval_docs, limit))
        split = task.config.test_split or task.config.validation_split
        text = all(isinstance(value, str) for doc in self.docs for value in doc.values())
        self.written = None if text else Written(task, split)
        self.texts: list[Any] = [self.of(i, task.doc_to_text) for i in range(len(self.docs))]

    def is_in(self, folder: Path) -> bool:
        return self.yaml is not None and folder in Path(self.yaml).parents

    @property
    def new_tokens(self) -> int:
        """The most tokens of an answer, 0 where none is generated."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return 0
        return Asked.by(self.name, self.task.config.generation_kwargs).tokens

    @property
    def is_graded(self) -> bool:
        """Whether lm-eval compares answers with the target; else the task's own function scores."""
        kind = self.task.OUTPUT_TYPE
        return self.task.config.process_results is None and kind != "loglikelihood_rolling"

    def refuse_bad_settings(self) -> None:
        """Raises RunError or ConfigError for settings that would fail, or mean nothing, whatever the rows."""
        task, config = self.task, self.task.config
        where = f"mend {self.yaml}"
        if task.OUTPUT_TYPE == "generate_until":
            Asked.by(self.name, config.generation_kwargs)
        if config.process_results is None:
            for metric, function in task._metric_fn_list.items():
                if function is None:
                    raise RunError(unknown_metric(self.name, metric, self.yaml))
        for metric, function in task.aggregation().items():
            if function is None:
                named = [
                    m.get("aggregation") for m in config.metric_list or () if m["metric"] == metric
                ]
                said = str(named[0] if named else None)
                raise RunError(
                    f"task {self.name}: {metric}'s aggregation {said!r} is none that lm-eval knows"
                    f"{near(said, aggregation_registry)}; {where}"
                )
        if self.is_in(LM_EVAL):
            return
        for setting, least in (("repeats", 1), ("num_fewshot", 0)):
            value = config[setting]
            if value is not None and (type(value) is not int or value < least):
                raise RunError(
                    f"task {self.name}: {setting} is {value!r}; it is a whole number from {least} up: {where}"
                )
        if self.is_graded and config.doc_to_target in (None, "", []):
            raise RunError(
                f"task {self.name}: its doc_to_target is empty, and answers are compared with it; name the column "
                f"of the right answers in {self.yaml}"
            )
        settings = ["doc_to_text", "doc_to_image"]
        settings += ["doc_to_target"] if self.is_graded and config.doc_to_choice is None else []
        for setting in settings:
            if (name := unknown_column(task, setting)) is not None:
                raise RunError(
                    f"task {self.name}: {setting} names a column {name!r}, and the rows have "
                    f"{', '.join(task.features)}; {where}"
                )

    def refuse_unwritten(self, index: int) -> None:
        """Raises RunError where what is asked, or right, is not what the file says, or is an empty cell's."""
        config, doc = self.task.config, self.docs[index]
        makes = {"doc_to_text": self.task.doc_to_text}
        if self.is_graded:
            makes["doc_to_target"] = self.task.doc_to_target
        if config.doc_to_choice is not None:
            makes["doc_to_choice"] = self.task.doc_to_choice
        own = doc if self.written is None else self.written.row(index, doc)
        for setting, make in makes.items():
            if own is not doc and (pair := changed(make, doc, own)):
                raise self.error(
                    index,
                    f"its {setting} is {pair[0]!r} where the data file says {pair[1]!r}: `datasets` guesses the type "
                    "of a column; write its values as text: in quotes in a JSON-lines file, or, if they look like "
                    "dates, in a parquet file",
                )
            if (column := empty_cell(self.task, config[setting], doc)) is not None:
                raise self.error(
                    index,
                    f"its {setting} reads {column}, which is empty (null or NaN); fill it in or leave the row out",
                )

    def of(self, index: int, make: Any, *args: Any) -> Any:
        """What one of the task's functions makes of a question. Raises RunError with its number."""
        try:
            return make(self.docs[index], *args)
        except UserError:
            raise
        except Exception as error:  # templates and task files raise what they like
            raise self.error(
                index, f"cannot be read: {first_line(error)}; {self.yaml} names its columns"
            ) from None

    def error(self, index: int, what: str) -> RunError:
        return RunError(f"task {self.name}, question {index} (from 0): {what}")

    def refuse_bad_rows(self) -> bool:
        """Raises RunError for a target that is no answer, marks that are not the pictures', a score that is no number.

        Returns whether a metric is a number a question.
        """
        comparable = not self.docs or self.task.OUTPUT_TYPE != "loglikelihood_rolling"
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
            elif self.task.config.doc_to_target not in (None, "") and not readable(target):
                raise self.error(i, f"its target is {target!r}; fill it in or leave the row out")
            if self.task.config.filter_list and self.task.OUTPUT_TYPE == "generate_until":
                self.refuse_bad_filters(i, target)
            if self.is_scored(i):
                comparable &= self.refuse_bad_scores(i, target)
        return comparable

    def is_scored(self, index: int) -> bool:
        """Whether a target can be graded as an answer: it takes no filter and, of lm-eval's own tasks, no code."""
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
                f"doc_to_text marks {text.count(PLACEHOLDER)} pictures with {PLACEHOLDER} and doc_to_image gives "
                f"{len(images)}; mend {self.yaml}",
            )

    def refuse_bad_filters(self, index: int, target: Any) -> None:
        """Raises RunError where a filter fails on the target as an answer, or on an answer that says nothing."""
        config = self.task.config
        graded = self.is_scored(0) or not self.is_in(LM_EVAL)
        for answer in (str(target[0] if isinstance(target, list) and target else target), ""):
            asked = Instance("generate_until", self.docs[index], ("", {}), 0)
            asked.resps = [answer] * (config.repeats or 1)
            for ensemble in self.task._filters:
                try:
                    ensemble.apply([asked])
                    if graded and (config.repeats or 1) == 1:
                        said = asked.filtered_resps[ensemble.name]
                        self.task.process_results(self.docs[index], [said])
                except Exception as error:  # filters raise what they like
                    raise RunError(
                        f"task {self.name}: its filter {ensemble.name!r} (filter_list) fails on the answer "
                        f"{answer!r}: {type(error).__name__}: {first_line(error)}; mend {self.yaml}"
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
                raise self.error(index, digits(gold, choices))
            if not (0 <= gold < len(choices) if is_place else gold in choices):
                raise self.error(
                    index,
                    f"its target is {gold!r}, which is none of its {len(choices)} choices {choices}; "
                    "a target is a choice, or its place from 0",
                )

    def refuse_bad_scores(self, index: int, target: Any) -> bool:
        """Raises RunError where the target, as an answer, has a score that is not finite, or no first score at all.

        Returns whether any score is a number.
        """
        kind = self.task.OUTPUT_TYPE
        said: list[list[Any]] = [[(-1.0, True)]]
        if kind == "multiple_choice":
            said = [
                [(-float(k), k == 0) for k in range(len(self.task.doc_to_choice(self.docs[index])))]
            ]
        elif kind == "generate_until":
            answer = str(target[0] if isinstance(target, list) and target else target)
            said = [[answer], [f"\\boxed{{{answer}}}"], [f"The answer is {answer}."]]
        best: list[float] = []
        for results in said:
            scores = self.of(index, self.task.process_results, results)
            numbers = {m: float(x) for m, x in scores.items() if not is_corpus_metric(x)}
            for place, (metric, value) in enumerate(numbers.items()):
                where = f"its {metric} is {value} for its own target {target!r}"
                if not math.isfinite(value):
                    raise self.error(index, f"{where}; mend {self.yaml}")
                if place == 0 and not 0 <= value <= 1:
                    raise self.error(
                        index,
                        f"{where}; scores that are compared lie in [0, 1]: list such a metric first in {self.yaml}",
                    )
            if not self.is_in(LM_EVAL):
                self.refuse_no_sum(numbers)
            best += list(numbers.values())[:1]
            if 1 in best:
                break
        if best and max(best) == 0 and kind == "generate_until" and self.is_in(TASKS):
            raise self.error(
                index,
                f"its target {target!r} is graded 0 as an answer: no answer would be right; mend the row",
            )
        return bool(best)

    def refuse_no_sum(self, numbers: Mapping[str, float]) -> None:
        """Raises RunError for a metric that cannot be aggregated."""
        for metric, value in numbers.items():
            total = self.task.aggregation().get(metric)
            if total is None:  # one that is not listed: lm-eval takes its mean
                continue
            try:
                total([value])
            except Exception as error:  # a task's own functions raise what they like
                raise RunError(
                    f"task {self.name}: {metric} is a number a question, and its aggregation fails on it "
                    f"({type(error).__name__}: {first_line(error)}); mend metric_list in {self.yaml}"
                ) from None

    # ---- by model

    def refuse_unreadable(self, name: str, loaded: LoadedModel) -> None:
        """Raises RunError where a model sees no pictures, its template takes no prompt, or its context is too short."""
        images = [self.images(i) for i in range(min(FEW, len(self.docs)))]
        if any(images) and not loaded.sees_images:
            raise RunError(
                f"task {self.name} shows pictures, and {name} ({loaded.name}) is text-only; choose other eval.tasks, "
                "or leave that arm out"
            )
        lm = ArmLM(loaded, quiet=True)
        templated = self.config.chat_template
        templated = loaded.chat_template is not None if templated is None else templated
        limit = loaded.context_length
        if limit is not None and self.new_tokens >= limit:
            raise RunError(
                f"task {self.name} asks for up to {self.new_tokens} new tokens (max_gen_toks), and {name} "
                f"({loaded.name}) has {limit} positions; choose another task or model"
            )
        sample = range(min(FEW, len(self.docs)))
        overhead = 0
        for i in sample:
            prompt = self.prompt(i, lm, templated)
            if self.task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
                lm.refuse_open_thought(self.name, prompt_text(prompt))
            length = self.tokens(i, prompt, lm, images[i])
            self.refuse_too_long(i, length, name, loaded)
            overhead = max(overhead, length - len(lm.text_ids(prompt_text(self.texts[i]))))
        if limit is None:
            return
        for i, text in enumerate(self.texts):
            words = prompt_text(text)
            if len(words.encode()) + overhead + self.new_tokens > limit:
                self.refuse_too_long(i, len(lm.text_ids(words)) + overhead, name, loaded)

    def images(self, index: int) -> list[Any]:
        if self.task.config.doc_to_image is None:
            return []
        return as_list(self.of(index, self.task.doc_to_image))

    def prompt(self, index: int, lm: ArmLM, templated: bool) -> Any:
        """The question as lm-eval would ask it, few-shot examples included."""
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
                    f"there are {len(self.task.sampler.df)} rows to draw {shots} examples and a spare from "
                    f"({first_line(error)}); lower eval.fewshot, or the task's num_fewshot",
                ) from None

        return self.of(index, ask)

    def tokens(self, index: int, prompt: Any, lm: ArmLM, images: Sequence[Any]) -> int:
        loaded = lm.loaded
        if not images:
            return len(lm.text_ids(prompt_text(prompt)))
        shown = [image.convert("RGB") for image in self.images(index)]  # examples' too
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
                f"{length + self.new_tokens}, and {name} ({loaded.name}) has {limit} positions; choose another task "
                "or model, or fewer eval.fewshot",
            )


def prompt_text(prompt: Any) -> str:
    """A prompt, or the longest of several (a question whose choices are prompts)."""
    return max(map(str, prompt), key=len, default="") if isinstance(prompt, list) else str(prompt)


def readable(target: Any) -> bool:
    """Whether a target holds anything: no null, no NaN, no empty text or list."""
    if isinstance(target, float):
        return math.isfinite(target)
    return target is not None and (not isinstance(target, (str, list, tuple)) or len(target) > 0)
