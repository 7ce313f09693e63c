"""Arms -> lm-eval -> results.json and per-question rows.

One model at a time, task by task. What is there is not asked again: a task is evaluated when its checkpoint, its
definition or its settings are new. (lm-eval's own cache is keyed by request alone and would hand one arm another's
answers, so it is off.)
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from evals import stats
from evals.lm import PLACEHOLDER, ArmLM
from vlopd.checkpoint import (
    RunError,
    RunFolder,
    digest_files,
    digest_json,
    digest_text,
    read_json,
    read_jsonl,
    up_to_date,
    write_json,
    write_jsonl,
)
from vlopd.config import (
    CheckpointArm,
    ConfigError,
    EvalConfig,
    ExperimentConfig,
    ImportedArm,
    TeacherArm,
    UserError,
)
from vlopd.distill import Evaluate
from vlopd.models.load import DTYPES, LoadedModel, first_line, load_configured
from vlopd.processes import accelerator
from vlopd.stages import scores_of, teacher_folder

TASKS = Path(__file__).parent / "tasks"
INCLUDE = re.compile(r"^include:\s*(\S+)", re.MULTILINE)
FUNCTION = re.compile(r"!function\s+(\w+)\.")
MERGED = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""Of lm-eval's results, what has an entry a task."""
PER_TASK = (
    *("data_digest", "prompt_digest", "primary_metric", "chance", "extraction_failure_fraction"),
    *("pass_at", "not_compared"),
)
"""Of ours."""


# ------------------------------------------------------------------------------------------- an arm


@dataclass(frozen=True)
class Subject:
    """What is evaluated: `open` loads it, `about` goes into its results.json."""

    name: str
    digest: str
    compute: str
    open: Callable[[], LoadedModel]
    about: Mapping[str, Any]


def evaluate_arm(run: RunFolder, config: ExperimentConfig, arm: str) -> bool:
    """Scores one arm of a run on the config's tasks; returns whether there was anything to do."""
    record = read_json(run.arm_record(arm))
    its = config.arms.get(arm)
    if isinstance(its, ImportedArm):
        folder = Path(its.results)
        return import_scores(folder, arm, record["checkpoint_digest"], config.eval, run.eval(arm))
    about = {"mask": record.get("mask"), "other_source": record.get("other_source")}
    subject = Subject(
        arm,
        record["checkpoint_digest"],
        config.precision.compute,
        lambda: open_arm(run, config, arm),
        about,
    )
    return evaluate(subject, config.eval, run.eval(arm), run.root / "evals" / "images")


def evaluate(subject: Subject, config: EvalConfig, out: Path, images: Path) -> bool:
    """Scores a model on tasks; returns whether there was anything to do.

    Writes out/samples_<task>.jsonl and, after each task, out/results.json. Raises ConfigError for an unknown
    task and RunError for one that nothing can be scored on.
    """
    manager = Tasks.of(config.tasks)
    wanted = {task: inputs_of(manager, task, config, subject) for task in config.tasks}
    inputs = {"checkpoint": subject.digest, "tasks": wanted}
    record = out / "results.json"
    if up_to_date(record, inputs):
        return False
    merged = kept_results(record, inputs)
    lm = None
    for task, own in wanted.items():
        if task in merged["inputs"]["tasks"]:
            continue
        if lm is None:
            title = f"eval {subject.name}"
            lm = ArmLM(subject.open(), config.batch_size, title, sampled=config.sampled)
            merged |= {**subject.about, "arm": subject.name, "checkpoint_digest": subject.digest}
            merged |= {"precision": subject.compute, **digests_of(lm.loaded)}
        results = score(lm, task, manager, config, config.limit, subject.name)
        for leaf, rows in results.pop("samples").items():
            add_task(merged, results, leaf, rows, manager, config, out, images)
        for key in MERGED:
            merged.setdefault(key, {}).update(results.pop(key))
        merged |= results
        merged["inputs"]["tasks"][task] = {**own}
        plain = json.loads(json.dumps(merged, default=handle_non_serializable))
        write_json(record, without_nan(plain))
    return True


def import_scores(folder: Path, name: str, digest: str, config: EvalConfig, out: Path) -> bool:
    """Another lm-eval run's answers as an arm; returns whether there was anything to do.

    Raises RunError where it lacks a task of the config.
    """
    inputs = {"checkpoint": digest, "tasks": list(config.tasks)}
    if up_to_date(out / "results.json", inputs):
        return False
    last, *samples = scores_of(folder)
    merged: dict[str, Any] = {**read_json(last), "arm": name, "checkpoint_digest": digest}
    merged |= {key: {} for key in PER_TASK}
    by_task = {task_of(path): path for path in samples}
    for task in config.tasks:
        if task not in by_task:
            raise RunError(
                f"{folder} has no samples of task {task}; it has {', '.join(sorted(by_task))}"
            )
        rows = one_row_a_question(task, read_jsonl(by_task[task]))
        write_jsonl(out / f"samples_{task}.jsonl", [tidy(row, {}) for row in rows])
        for key, value in about_rows(rows, config).items():
            merged[key][task] = value
    write_json(out / "results.json", without_nan({**merged, "inputs": inputs}))
    return True


def task_of(samples: Path) -> str:
    """samples_<task>_<time>.jsonl -> task"""
    return samples.stem.removeprefix("samples_").rpartition("_")[0]


def kept_results(record: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier results of the same checkpoint, without the tasks that are to be evaluated again."""
    fresh: dict[str, Any] = {"inputs": {**inputs, "tasks": {}}}
    if not record.exists():
        return fresh
    old = read_json(record)
    if old["inputs"].get("checkpoint") != inputs["checkpoint"]:
        return fresh
    same = {t: i for t, i in old["inputs"].get("tasks", {}).items() if inputs["tasks"].get(t) == i}
    if set(same) != set(old["inputs"].get("tasks", {})):
        return fresh  # some task has gone or changed: what belonged to it cannot be told apart
    return {**old, "inputs": {**inputs, "tasks": same}}


def inputs_of(manager: Tasks, task: str, config: EvalConfig, subject: Subject) -> dict[str, Any]:
    """What decides a task's results for a checkpoint."""
    settings = config.model_dump(
        mode="json", include={"limit", "batch_size", "fewshot", "chat_template", "sampled"}
    )
    return {"definition": manager.digest(task), "compute": subject.compute, **settings}


def digests_of(loaded: LoadedModel) -> dict[str, str | None]:
    """Digests of what turns a question into a model's input."""
    processor = loaded.processor.to_json_string() if loaded.sees_images else None
    template = loaded.chat_template
    return {
        "chat_template_digest": template and digest_text(str(template)),
        "processor_digest": processor and digest_text(processor),
    }


def open_arm(run: RunFolder, config: ExperimentConfig, name: str) -> LoadedModel:
    """An arm's model as training would load it, in the compute precision."""
    arm, model = config.arms.get(name), config.student
    folder: Path | None = run.checkpoint(name)
    if isinstance(arm, TeacherArm):
        teacher = config.teacher_of(arm)
        model = config.loaded_as(teacher)
        folder = teacher_folder(run, config, teacher) if teacher.is_student else None
    elif isinstance(arm, CheckpointArm):
        model, folder = config.student.model_copy(update={"model": arm.model}), None
    return load_configured(model, DTYPES[config.precision.compute], accelerator().device, folder)


# ------------------------------------------------------------------------------------------ lm-eval


class Tasks(TaskManager):
    """lm-eval's tasks, ours among them. Few-shot examples bring their pictures."""

    loaded: dict[str, Any]

    @classmethod
    def of(cls, tasks: Sequence[str]) -> Tasks:
        """Our tasks; lm-eval's fourteen thousand are scanned only when one of them is asked for.

        Raises ConfigError for a task that neither has.
        """
        ours = cls(include_path=str(TASKS), include_defaults=False)
        if all(ours.has(task) for task in tasks):
            return ours
        every = every_task()
        for task in tasks:
            if not every.has(task):
                known = ", ".join(ours.all_tasks)
                raise ConfigError(f"eval.tasks: no task {task!r}; ours are {known}")
        return every

    def has(self, task: str) -> bool:
        return task in self.task_index

    def load(self, task_list: Any) -> Any:
        found = super().load(task_list)
        self.loaded = found["tasks"]
        for task in self.loaded.values():
            if (
                task.config.doc_to_image is not None
                and task.config.output_type != "loglikelihood_rolling"
            ):
                show_pictures_of_examples(task)
        return found

    def digest(self, task: str) -> str:
        """Of a task's YAML, what it includes and the modules whose functions it names; lm-eval's version."""
        path = self.task_index[task].yaml_path
        files: set[Path] = set()
        queue = [] if path is None else [Path(path)]
        while queue:
            path = queue.pop()
            if path in files or not path.exists():
                continue
            files.add(path)
            if path.suffix != ".py":
                text = path.read_text()
                queue += [path.parent / name for name in INCLUDE.findall(text)]
                queue += [path.parent / f"{name}.py" for name in FUNCTION.findall(text)]
        return digest_json([task, lm_eval.__version__, digest_files(list(files))])


@cache
def every_task() -> Tasks:
    """Ours and lm-eval's own, which take ten seconds to list: once a process."""
    return Tasks(include_path=str(TASKS))


def show_pictures_of_examples(task: Any) -> None:
    """Makes a task hand out the pictures of a question's few-shot examples before its own.

    lm-eval puts the examples' text into the prompt and forgets their pictures (its issue 2948). It builds one
    question at a time, the examples first, so that the last that were drawn are the question's.
    """
    draw, picture = task.sampler.sample, task.doc_to_image
    drawn: list[Any] = []

    def remembering(*args: Any, **kwargs: Any) -> Any:
        drawn[:] = draw(*args, **kwargs)
        return list(drawn)

    def with_examples(doc: Any, *args: Any) -> list[Any]:
        shown = drawn if task.config.num_fewshot else []
        return [image for each in (*shown, doc) for image in as_list(picture(each, *args))]

    task.sampler.sample, task.doc_to_image, task.own_image = remembering, with_examples, picture


def as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def score(
    lm: ArmLM, task: str, manager: Tasks, config: EvalConfig, limit: int | None, name: str
) -> dict[str, Any]:
    """lm-eval's results of a model on a task, with every question's sample; no random state is touched.

    With `config.sampled` a pass a sample: each sample's row has lists in `completion` and in every metric.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    templated = config.chat_template
    if templated is None:
        templated = lm.loaded.chat_template is not None
    passes = []
    for draw in range(config.sampled.n if config.sampled else 1):
        lm.draw = draw
        with untouched_randomness():
            loaded = load_task(manager, task, config.fewshot)
            # not simple_evaluate, which also asks pip for every package's version, a second each time
            results = lm_eval.evaluate(
                lm,
                loaded,
                limit=limit,
                apply_chat_template=templated,
                fewshot_as_multiturn=templated,
                bootstrap_iters=1,  # closed-form errors only; ours are in compare.json
                log_samples=True,
            )
        assert results is not None
        results["config"] = {"model": name, "limit": limit, "batch_size": lm.batch_size}
        passes.append(results)
    for results in passes:
        for leaf, rows in results["samples"].items():
            results["samples"][leaf] = one_row_a_question(leaf, rows)
    return passes[0] if config.sampled is None else over_samples(passes)


def load_task(manager: Tasks, task: str, fewshot: int | None) -> Any:
    """The task (or group of tasks) as lm-eval's simple_evaluate prepares it, with its default seeds.

    Raises RunError where it cannot be had: its data, a column, a split.
    """
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        loaded = manager.load([task])
    except UserError:
        raise
    except IndexError:  # lm-eval looks at the first
        raise RunError(f"task {task} has no questions: its split is empty") from None
    except Exception as error:  # datasets, templates and task files raise what they like
        raise RunError(
            f"task {task} cannot be had: {first_line(error)}; {manager.task_index[task].yaml_path} says where "
            "its data are, and names their columns"
        ) from None
    for its in loaded["tasks"].values():
        own = its.get_config("num_fewshot")
        if own != 0 and (fewshot is not None or own is None):
            its.set_config("num_fewshot", fewshot or 0)
        its.set_fewshot_seed(1234)
    return loaded


def one_row_a_question(task: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's rows, a filter each, joined: the first filter's metrics as they are, others as `metric,filter`."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        metrics = {m: row[m] for m in row["metrics"] if is_number(row[m])}
        first = found.get(row["doc_id"])
        if first is None:
            found[row["doc_id"]] = {**row, "completion": completion_of(row), "numbers": metrics}
        else:
            first["numbers"] |= {f"{m},{row['filter']}": v for m, v in metrics.items()}
    return [found[doc_id] for doc_id in sorted(found)]


def over_samples(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several passes: metrics are means over them, completions lists, pass@k beside a 0/1 metric."""
    first = passes[0]
    n = len(passes)
    for task, rows in first["samples"].items():
        others = [p["samples"][task] for p in passes]
        for row, same in zip(rows, zip(*others, strict=True), strict=True):
            row["completion"] = json.dumps([each["completion"] for each in same])
            primary = next(iter(row["numbers"]), None)
            values = {m: [float(each["numbers"][m]) for each in same] for m in row["numbers"]}
            row["numbers"] = {m: float(np.mean(v)) for m, v in values.items()}
            if primary is not None and set(values[primary]) <= {0.0, 1.0}:
                right = int(sum(values[primary]))
                for k in powers_of_two(n):
                    row["numbers"][f"pass@{k}"] = float(stats.pass_at_k([right], n, k)[0])
        for metric in rows[0]["numbers"]:
            mean = float(np.mean([row["numbers"][metric] for row in rows]))
            first["results"][task][f"{metric},none"] = mean
    return first


def powers_of_two(n: int) -> list[int]:
    """2, 4, 8... up to n, and n."""
    return sorted({n, *(2**i for i in range(1, n.bit_length()) if 2**i <= n)})


def held_out_scores(config: ExperimentConfig) -> Evaluate:
    """For the training loop: the means of a student on the questions of eval.during, {task: {metric: mean}}."""
    during = config.eval.during
    assert during is not None
    manager = Tasks.of(during.tasks)  # an unknown task is an error before any training

    def evaluate(student: LoadedModel) -> dict[str, dict[str, float]]:
        lm = ArmLM(student, config.eval.batch_size, "held-out", True, config.eval.sampled)
        found = {}
        for task in during.tasks:
            results = score(lm, task, manager, config.eval, during.limit, student.name)
            for leaf, rows in results["samples"].items():
                found[leaf] = {
                    metric: float(np.mean([row["numbers"][metric] for row in rows]))
                    for metric in rows[0]["numbers"]
                }
        return found

    return evaluate


# --------------------------------------------------------------------------------------------- rows


def add_task(
    merged: dict[str, Any],
    results: Mapping[str, Any],
    task: str,
    rows: list[dict[str, Any]],
    manager: Tasks,
    config: EvalConfig,
    out: Path,
    images: Path,
) -> None:
    """Writes a task's rows, and what results.json says of them beyond lm-eval's own."""
    declared = results["configs"][task].get("metadata") or {}
    declared.pop("pictures", None)
    chance = declared.pop("chance", None)  # a function that the YAML names
    kept = keep_images(manager.loaded[task], images / task, config.keep_images, rows)
    about = about_rows(rows, config)
    if chance:
        about["chance"] = chance([row["doc"] for row in rows])
    for key in PER_TASK:
        merged.setdefault(key, {}).pop(task, None)
    for key, value in about.items():
        merged[key][task] = value
    write_jsonl(out / f"samples_{task}.jsonl", [tidy(row, kept) for row in rows])


def about_rows(rows: Sequence[Mapping[str, Any]], config: EvalConfig) -> dict[str, Any]:
    """What results.json says of a task's rows: digests, the metric to compare by, failures to answer."""
    numbers = list(rows[0]["numbers"])
    about: dict[str, Any] = {
        "data_digest": digest_json([row["doc_hash"] for row in rows]),
        "prompt_digest": digest_json([row["prompt_hash"] for row in rows]),
    }
    if numbers:
        about["primary_metric"] = numbers[0]
    else:
        about["not_compared"] = "its metrics are of all questions at once"
    if passes := [metric for metric in numbers if metric.startswith("pass@")]:
        about["pass_at"] = passes
    if "extraction_failure" in numbers:
        failures = [row["numbers"]["extraction_failure"] for row in rows]
        about["extraction_failure_fraction"] = float(np.mean(failures))
    return about


def tidy(row: Mapping[str, Any], images: Mapping[int, str]) -> dict[str, Any]:
    """One question of one arm: what was asked, what came, what it scored."""
    doc = row["doc"]
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "question": question_of(row),
        "target": str(row["target"]),
        "completion": row["completion"],
        **{metric: float(value) for metric, value in row["numbers"].items()},
        "group": doc.get("kind"),
        "cluster": doc.get("cluster"),
        "image": images.get(row["doc_id"]),
    }


def question_of(row: Mapping[str, Any]) -> str:
    """The question as the data has it, or the prompt where the data has no such column."""
    asked = row["doc"].get("question")
    if asked is None:
        asked = argument(row, 0, 0)
    return str(asked).replace(PLACEHOLDER, "").strip()


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number)) and bool(np.isfinite(value))


def completion_of(row: Mapping[str, Any]) -> str:
    """The generated text; of several choices the likeliest; else the responses as JSON."""
    responses = row["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    if isinstance(responses[0], (list, tuple)) and len(responses) > 1:
        best = max(range(len(responses)), key=lambda i: float(responses[i][0]))
        return str(argument(row, best, 1)).strip()
    return json.dumps(responses)


def argument(row: Mapping[str, Any], request: int, place: int) -> Any:
    """An argument of one of a question's requests: (prompt, continuation or settings, ...)."""
    arguments = row["arguments"]
    if isinstance(arguments, Mapping):  # as lm-eval writes them to a file
        return arguments[f"gen_args_{request}"][f"arg_{place}"]
    return arguments[request][place]


def keep_images(
    task: Any, folder: Path, count: int, rows: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Saves the first picture of the first questions, once for all arms; {doc_id: path inside the run folder}."""
    if task.config.doc_to_image is None:
        return {}
    kept = {}
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows[:count]:
        path = folder / f"{row['doc_id']}.png"
        if not path.exists():
            own = as_list(task.own_image(row["doc"]))
            if not own:
                continue
            own[0].convert("RGB").save(path)
        kept[row["doc_id"]] = str(path.relative_to(folder.parents[2]))
    return kept


def without_nan(value: Any) -> Any:
    """NaN and infinities as null, since JSON has neither."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """lm-eval reseeds python's, numpy's and torch's global generators; this puts them back."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
