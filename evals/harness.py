"""Evaluates arms with lm-eval: results.json and one row per question.

One model at a time, task by task. A task is evaluated only when its checkpoint, definition or settings have changed.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable

from evals.imported import imported_facts, leaves_of, metric_list_of, totals_of
from evals.lm import PLACEHOLDER, ArmLM, Generated, within_pixels
from evals.paired_scores import NOT_METRICS, metric_of, outcome_of
from evals.scoring import (
    Tasks,
    argument,
    chance_of,
    columns_of,
    in_order,
    one_row_a_question,
    score_task,
)
from vlopd import interrupts
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import CheckpointArm, ImportedArm, TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.models import ModelConfig
from vlopd.digests import digest_json, digest_text, digest_weights, file_digest
from vlopd.distributed import accelerator, in_step
from vlopd.errors import RunError, UserError, one_line_out_of_memory
from vlopd.files import (
    is_first_process,
    whole_file,
    without_nan,
    write_jsonl,
)
from vlopd.loop import Evaluate
from vlopd.models.load import DTYPES, load_configured
from vlopd.models.loaded import LoadedModel
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import arm_content, samples_by_task, score_files, teacher_folder
from vlopd.run.schemas.read import read_answers, read_lm_eval_results, read_record
from vlopd.run.stage import Stage, stage

MERGED = (
    *("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"),
    *("groups", "group_subtasks", "metrics", "totals"),
)
"""Entries of lm-eval's results, and ours beside them, that are keyed by task or group."""
PER_TASK = (
    *("data_digest", "prompt_digest", "primary_metric", "chance", "extraction_failure_fraction"),
    *("thought_truncated_fraction", "pass_at", "not_compared", "mean_tokens"),
    *("truncated_fraction", "mean_thought_tokens", "thinking", "picture_size"),
)
"""Our entries that are keyed by task."""
LENGTHS = ("tokens", "thought_tokens", "stop", "truncated", "outcome")
"""Columns of samples_<task>.jsonl on generated answers; null for tasks that generate none."""
PACKAGED = re.compile(r".*/(?=(evals|lm_eval)/tasks/)")
"""Where the file of an installed task is, before its package."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+>")
"""Where in this process a function lies, as lm-eval writes those of a task; equal evaluations give equal files."""
MANY_CUT = 0.1
"""Truncated fraction above which a model's answers to a task are called cut off."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: `open` loads it, `about` is copied into its results.json.

    `content(whole)` returns {file: sha256} of its files; with `whole`, every file is read.
    """

    name: str
    content: Callable[[bool], Mapping[str, str]]
    compute: str
    open: Callable[[], LoadedModel]
    about: Mapping[str, Any]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def evaluate_arm(run: RunFolder, config: ExperimentConfig, arm: str) -> bool:
    """Evaluates one arm of a run on the config's tasks; returns whether anything was done."""
    its = config.arms.get(arm)
    if isinstance(its, ImportedArm):
        return import_scores(run, Path(its.results), arm, config.eval)
    record = read_record(run.arm_record(arm))
    about = {"mask": record.get("mask"), "other_base": record.get("other_base")}
    return evaluate(run, subject_of(run, config, arm, about), config.eval)


def eval_inputs(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    """The inputs that determine an arm's results, as digests."""
    its = config.arms.get(arm)
    if isinstance(its, ImportedArm):
        return imported_inputs(Path(its.results), config.eval)
    manager = Tasks.of(config.eval.tasks, config.eval.include)
    return evaluation_inputs(manager, subject_of(run, config, arm, {}), config.eval, False)


def subject_of(
    run: RunFolder, config: ExperimentConfig, arm: str, about: Mapping[str, Any]
) -> Subject:
    """The subject of an arm that has a model."""
    return Subject(
        arm,
        lambda whole: arm_content(run, config, arm, whole),
        config.precision.resolved,
        lambda: open_arm(run, config, arm),
        about,
        _model_config_of(config, arm).template_arguments,
    )


@one_line_out_of_memory("evaluation")
def evaluate(run: RunFolder, subject: Subject, config: EvalConfig, kind: str = "evals") -> bool:
    """Evaluates a model on tasks; returns whether anything was done.

    Processes share each task's batches of questions; the first writes the results, those of one process.
    Writes KIND/<name>/samples_<task>.jsonl in the run and, after each task, results.json there. Results of tasks with
    unchanged inputs are kept. Raises ConfigError for an unknown task and RunError for one that cannot be scored.
    """
    manager = Tasks.of(config.tasks, config.include)
    manager.refuse_unknown_names(config)
    state = accelerator()
    first = state.is_main_process
    with in_step(state), stage(run, f"{kind}/{subject.name}") as its:
        record = run.checksums.record(its.artifact)
        if first and record.exists() and not _images_exist(run, read_record(record)):
            run.checksums.start(its.artifact)  # remade together with the rows that show them
        inputs = partial(evaluation_inputs, manager, subject, config)
        if not its.is_due_in_all(state, inputs):
            return False
        merged = _reusable_results(its)
        lm = None
        for task, own in its.inputs["tasks"].items():
            if task in merged["inputs"]["tasks"]:
                continue
            if lm is None:
                if first and merged["inputs"]["tasks"]:  # reused results survive a kill
                    _write_results(its, merged)
                lm = ArmLM(
                    subject.open(),
                    config.batch_size,
                    subject.name,
                    quiet=not first,
                    sampled=config.sampled,
                    max_pixels=config.max_pixels,
                    processes=state,
                )
                merged |= {**subject.about, "arm": subject.name}
                merged["checkpoint_digest"] = digest_weights(its.inputs["checkpoint"])
                merged |= {"precision": subject.compute, **_digests_of(lm.loaded)}
            results = score_task(lm, task, manager, config, config.limit, subject.name)
            if not first:
                continue
            merged["leaves"][task] = sorted({*results["samples"], *results["results"]})
            for leaf, rows in results.pop("samples").items():
                _add_task(merged, results, leaf, rows, manager, config, its)
                if (size := lm.largest_picture.get(leaf)) is not None:
                    about = {"max_pixels": config.max_pixels, "largest": list(size)}
                    merged["picture_size"][leaf] = about
            for key in MERGED:
                merged.setdefault(key, {}).update(results.pop(key, {}))
            merged |= results
            merged["inputs"]["tasks"][task] = {**own}
            _write_results(its, merged)
            interrupts.stop_after(f"{its.artifact}: {task}")
        if first and lm is None:  # tasks were only dropped
            _write_results(its, merged)
    return True


def evaluation_inputs(
    manager: Tasks, subject: Subject, config: EvalConfig, whole: bool
) -> dict[str, Any]:
    """The inputs that determine a model's results, as digests; `whole` as in digests.file_digest."""
    tasks = {task: _inputs_of(manager, task, config, subject) for task in config.tasks}
    return {"checkpoint": dict(subject.content(whole)), "tasks": tasks}


def _write_results(its: Stage, merged: Mapping[str, Any]) -> None:
    """Writes results.json of the tasks evaluated so far, with checksums of it and of the rows."""
    out = its.run.root / its.artifact
    text = json.dumps(without_places(merged), default=handle_non_serializable)
    plain = json.loads(ADDRESS.sub(">", text))
    rows = [out / f"samples_{leaf}.jsonl" for leaf in merged["results"]]
    present = [path for path in rows if path.exists()]  # a group of tasks has no rows
    its.run.checksums.finish(its.artifact, without_nan(plain), present)


def without_places(results: Any) -> Any:
    """lm-eval's results without what is of the machine that made them: its description, and the folders of task files.

    A task's file is from its package, as in `evals/tasks/shapes.yaml`, or else its name alone.
    """
    if isinstance(results, list):
        return [without_places(each) for each in results]
    if not isinstance(results, dict):
        return results
    found = {k: without_places(v) for k, v in results.items() if k != "pretty_env_info"}
    if isinstance(where := found.get("config_source"), str):
        found["config_source"] = (
            PACKAGED.sub("", where) if PACKAGED.match(where) else Path(where).name
        )
    return found


def _images_exist(run: RunFolder, results: Mapping[str, Any]) -> bool:
    """Whether the rows' saved images still exist. Raises RunError where one was changed."""
    for leaf in results.get("pictures", ()):
        if not (run.root / "evals" / "images" / leaf).is_dir():
            return False
        run.checksums.check(f"images/{leaf}", whole=False)
    return True


def import_scores(run: RunFolder, where: Path, name: str, config: EvalConfig) -> bool:
    """Imports finished evaluations (resolve.score_files) as an arm; returns whether anything was done.

    Raises RunError where they lack a task of the config.
    """
    samples = samples_of(where, config.tasks)  # raises before existing results are withdrawn
    if not is_first_process():
        return False
    with stage(run, f"evals/{name}") as its:
        if its.is_due(lambda _: imported_inputs(where, config)):
            out = run.eval(name)
            results = results_of(where)
            merged: dict[str, Any] = {**results, "arm": name, "pictures": []}
            merged["checkpoint_digest"] = digest_json(its.inputs["checkpoint"])
            merged |= {key: {} for key in PER_TASK}
            for key in ("chance", "picture_size"):
                merged[key] = dict(results.get(key) or {})
            merged |= {"metrics": {}, "totals": totals_of(results)}
            for task, path in samples.items():
                rows = read_scored_rows(task, path, list(metric_list_of(results, task)))
                facts = imported_facts(results, task, columns_of(rows))
                merged["metrics"][task] = facts
                for key, value in _task_entries(task, rows, facts, config.metric).items():
                    merged[key][task] = value
                primary = merged["primary_metric"].get(task)
                write_jsonl(
                    out / f"samples_{task}.jsonl", [_sample_row(row, {}, primary) for row in rows]
                )
            rows_written = [out / f"samples_{task}.jsonl" for task in samples]
            its.finish(without_nan(without_places(merged)), rows_written)
    return its.made


def read_scored_rows(task: str, path: Path, declared: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a samples file of lm-eval or of a run, one per question, as `scoring.one_row_a_question` has them.

    `declared`: the task's metrics in their order, where results have them.
    Raises RunError for a file of another kind.
    """
    rows = read_answers(path)
    if not rows:
        raise RunError(f"{path} has no rows; evaluate the model again with --log_samples")
    try:
        if "metrics" not in rows[0]:
            if len({(row["doc_id"], row["doc_hash"]) for row in rows}) < len(rows):
                raise RunError(f"{path} has several rows per question; evaluate the model again")
            return list(map(_own_row, rows))
        asked = [(row["doc_id"], row.get("filter")) for row in rows]
        if twice := next((x for x, n in Counter(asked).items() if n > 1), None):
            raise RunError(
                f"{path} has several rows of question {twice[0]} (doc_id); evaluate the model again"
            )
        ordered = [{**row, "metrics": in_order(row["metrics"], declared)} for row in rows]
        return one_row_a_question(task, ordered)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} is not samples of lm-eval or of a run: {type(error).__name__} {error}; evaluate the model again "
            "with the installed lm-eval"
        ) from None


def _own_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a run's samples file, as `scoring.one_row_a_question` has it."""
    metrics = {key: value for key, value in row.items() if key not in NOT_METRICS}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    return {
        "prompt": "",  # of an earlier version
        **row,
        "columns": list(metrics),
        "doc": {
            "question": row["question"],
            "kind": row.get("group"),
            "cluster": row.get("cluster"),
        },
        "numbers": numbers,
        "items": {key: value for key, value in metrics.items() if isinstance(value, (list, dict))},
    }


def imported_inputs(where: Path, config: EvalConfig) -> dict[str, Any]:
    """The inputs of imported scores: their files and the tasks."""
    files = {path.name: file_digest(path) for path in score_files(where)}
    return {"checkpoint": files, "tasks": list(config.tasks)}


def samples_of(where: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The samples file of each task, or of each member of a group, in finished evaluations.

    Raises RunError for a missing one.
    """
    by_task = samples_by_task(where)
    found = {}
    for task in tasks:
        members = [task] if task in by_task else leaves_of(results_of(where), task)
        for member in members or [task]:
            if member not in by_task:
                raise RunError(
                    f"{where} has no samples of task {member}; it has {', '.join(sorted(by_task))}"
                )
            found[member] = by_task[member]
    return found


def results_of(where: Path) -> dict[str, Any]:
    """The results file of finished evaluations; empty where there are samples alone.

    Raises RunError for a file of another kind.
    """
    first = score_files(where)[0]
    return read_lm_eval_results(first) if first.suffix == ".json" else {}


def _reusable_results(its: Stage) -> dict[str, Any]:
    """Earlier results of the same checkpoint that are still valid; rows of other tasks are deleted."""
    out = its.run.root / its.artifact
    old = its.reusable
    kept = unchanged_tasks(old["inputs"], its.inputs) if old else {}
    leaves = {task: old["leaves"][task] for task in kept}
    names = {leaf for task in kept for leaf in leaves[task]}
    for path in out.glob("samples_*.jsonl") if is_first_process() else ():
        if path.stem.removeprefix("samples_") not in names:
            path.unlink()
    if not kept:
        return {"inputs": {**its.inputs, "tasks": {}}, "leaves": {}}
    merged = {**old, "inputs": {**its.inputs, "tasks": kept}, "leaves": leaves}
    for key in (*MERGED, *PER_TASK):
        merged[key] = {leaf: value for leaf, value in old.get(key, {}).items() if leaf in names}
    merged["pictures"] = [leaf for leaf in old.get("pictures", ()) if leaf in names]
    return merged


def unchanged_tasks(before: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """{task: its inputs} of the tasks with unchanged inputs; none if inputs shared by all tasks changed."""
    if not before or any(before.get(key) != inputs[key] for key in inputs if key != "tasks"):
        return {}
    return {t: i for t, i in inputs["tasks"].items() if before["tasks"].get(t) == i}


def _inputs_of(manager: Tasks, task: str, config: EvalConfig, subject: Subject) -> dict[str, Any]:
    """The inputs that determine a task's results for a checkpoint.

    Those of later versions are named only where they are set, so that earlier results stay valid.
    """
    overrides = manager.overrides(task, config)
    own = {
        name: each.model_dump(mode="json", exclude_none=True) for name, each in overrides.items()
    }
    later = {"generation": own, "max_pixels": config.max_pixels}
    return {
        "definition": manager.digest(task),
        "compute": subject.compute,
        "template_arguments": dict(subject.template_arguments),
        **config.of_task,
        **{key: value for key, value in later.items() if value},
    }


def _digests_of(loaded: LoadedModel) -> dict[str, Any]:
    """Digests of the chat template and processor, and the template arguments."""
    processor = loaded.processor.to_json_string() if loaded.sees_images else None
    template = loaded.chat_template
    return {
        "chat_template_digest": template and digest_text(str(template)),
        "processor_digest": processor and digest_text(processor),
        "template_arguments": dict(loaded.template_arguments),
    }


def open_arm(run: RunFolder, config: ExperimentConfig, name: str) -> LoadedModel:
    """Loads an arm's model as for training, in the compute precision."""
    arm = config.arms.get(name)
    folder: Path | None = run.checkpoint(name)
    if isinstance(arm, TeacherArm):
        teacher = config.teacher_of(arm)
        folder = teacher_folder(run, config, teacher) if teacher.is_student else None
    elif isinstance(arm, CheckpointArm):
        folder = None
    return load_configured(
        _model_config_of(config, name),
        DTYPES[config.precision.resolved],
        accelerator().device,
        folder,
    )


def _model_config_of(config: ExperimentConfig, name: str) -> ModelConfig:
    """The loading settings of an arm's model: the student's, its teacher's, or its checkpoint's."""
    arm = config.arms.get(name)
    if isinstance(arm, TeacherArm):
        return config.teacher_of(arm).loaded_from(config.student)
    if isinstance(arm, CheckpointArm):
        return config.checkpoint_of(arm)
    return config.student


def held_out_scores(config: ExperimentConfig) -> Evaluate:
    """A function for the training loop: mean scores of a student on eval.during, {task: {metric: mean}}.

    Processes share the questions, within `in_step`.
    """
    during = config.eval.during
    assert during is not None
    # resolved here, so that an unknown task raises before training
    manager = Tasks.of(during.tasks, config.eval.include)

    def evaluate(student: LoadedModel) -> dict[str, dict[str, float]]:
        its = config.eval
        how = (its.sampled, its.max_pixels, accelerator())
        lm = ArmLM(student, its.batch_size, "held-out", True, *how)
        found = {}
        for task in during.tasks:
            results = score_task(lm, task, manager, config.eval, during.limit, student.name)
            for leaf, rows in results["samples"].items():
                # of lm-eval's, since a corpus metric such as F1 is no mean
                whole, first = results["results"][leaf], rows[0]["filter"]
                found[leaf] = {
                    metric: whole[key]
                    for metric in columns_of(rows)
                    for key in (metric, f"{metric},{first}", f"{metric},none")
                    if key in whole
                }
        return found

    return evaluate


def _add_task(
    merged: dict[str, Any],
    results: Mapping[str, Any],
    task: str,
    rows: list[dict[str, Any]],
    manager: Tasks,
    config: EvalConfig,
    its: Stage,
) -> None:
    """Writes a task's rows, and adds our entries on them to the results."""
    declared = results["configs"][task].get("metadata") or {}
    chance = declared.pop("chance", None)  # a function that the YAML names
    with its.run.lock_artifact(f"images/{task}"):
        kept = _save_images(
            manager.loaded[task], its.run, task, config.keep_images, config.max_pixels, rows
        )
    pictures = [name for name in merged.get("pictures", ()) if name != task]
    merged["pictures"] = [*pictures, task] if kept else pictures
    about = _task_entries(task, rows, results["metrics"][task], config.metric)
    if chance:
        docs = [row["doc"] for row in rows]
        about["chance"] = chance_of(task, chance, docs, manager.task_index[task].yaml_path)
    for key in PER_TASK:
        merged.setdefault(key, {}).pop(task, None)
    for key, value in about.items():
        merged[key][task] = value
    primary = about.get("primary_metric")
    write_jsonl(
        its.run.root / its.artifact / f"samples_{task}.jsonl",
        [_sample_row(row, kept, primary) for row in rows],
    )


def _task_entries(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, str],
) -> dict[str, Any]:
    """Our entries of results.json on a task's rows: digests, primary metric, extraction failures, lengths."""
    about: dict[str, Any] = {
        "data_digest": digest_json([row["doc_hash"] for row in rows]),
        "prompt_digest": digest_json([row["prompt_hash"] for row in rows]),
    }
    primary, why = metric_of(task, metrics, columns_of(rows), chosen)
    about |= {"not_compared": why} if primary is None else {"primary_metric": primary}
    numbers = list(rows[0]["numbers"])
    if passes := [metric for metric in numbers if metric.startswith("pass@")]:
        about["pass_at"] = passes
    if "extraction_failure" in numbers:
        failures = [row["numbers"]["extraction_failure"] for row in rows]
        about["extraction_failure_fraction"] = float(np.mean(failures))
    return about | _length_entries(rows, primary)


def _length_entries(rows: Sequence[Mapping[str, Any]], primary: str | None) -> dict[str, Any]:
    """Lengths of generated answers; of a model that thinks, also the fractions answered, stopped and right."""
    answers: list[Generated] = [each for row in rows for each in row.get("generated") or ()]
    if not answers:
        return {}
    about: dict[str, Any] = {
        "mean_tokens": float(np.mean([each.tokens for each in answers])),
        "truncated_fraction": float(np.mean([each.stop == "length" for each in answers])),
        "mean_thought_tokens": float(np.mean([each.thought_tokens for each in answers])),
    }
    if any(each.reading.thought is not None for each in answers):
        about["thought_truncated_fraction"] = float(
            np.mean([not each.reading.closed for each in answers])
        )
        right = [row["numbers"].get(primary) for row in rows]
        scored = all(value is not None and 0 <= value <= 1 for value in right)
        about["thinking"] = {
            "answered_fraction": float(np.mean([each.answered for each in answers])),
            "correct_fraction": float(np.mean(right)) if scored else None,
            "stopped_fraction": float(np.mean([each.stop != "length" for each in answers])),
        }
    return about


def cut_answers(results: Mapping[str, Any]) -> list[str]:
    """One line per task that cut off more than MANY_CUT of a thinking model's answers, with the remedy."""
    return [
        f"{task}: {100 * results['truncated_fraction'][task]:.0f} % of {results['arm']}'s answers were cut off at the "
        f"largest length, {100 * results['thought_truncated_fraction'][task]:.0f} % within the thought; raise "
        f"eval.generation.{task}.max_tokens"
        for task in results.get("thinking", ())
        if results["truncated_fraction"][task] > MANY_CUT
    ]


def _sample_row(
    row: Mapping[str, Any], images: Mapping[int, list[str]], primary: str | None
) -> dict[str, Any]:
    """One row of samples_<task>.jsonl: question, prompt, target, completion, lengths, scores."""
    doc = row["doc"]
    scores = {**row["items"], **{name: float(value) for name, value in row["numbers"].items()}}
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "question": _question_of(row),
        "prompt": row["prompt"] if "prompt" in row else str(argument(row, 0, 0)),
        "target": str(row["target"]),
        "completion": row["completion"],
        **_generated_columns(row, primary),
        **{name: scores[name] for name in columns_of([row])},
        "group": doc.get("kind"),
        "cluster": doc.get("cluster"),
        "images": images.get(row["doc_id"], []),
    }


def _generated_columns(row: Mapping[str, Any], primary: str | None) -> dict[str, Any]:
    """The reasoning, if any, and LENGTHS: of several samples their means, `stop` and `outcome` JSON lists."""
    answers: Sequence[Generated] = row.get("generated") or ()
    if not answers:  # of a run's own rows, what these have
        return {name: row.get(name) for name in LENGTHS}
    several = "each" in row
    scores = row["each"] if several else [row["numbers"]]
    stops = [its.stop for its in answers]
    outcomes = [
        outcome_of(
            numbers.get(primary), its.stop == "length", numbers.get("extraction_failure", 0) == 1
        )
        for its, numbers in zip(answers, scores, strict=False)  # several with `repeats`
    ]
    found: dict[str, Any] = {}
    if any(its.reading.thought is not None for its in answers):
        thoughts = [its.reading.thought for its in answers]
        found["thought"] = thoughts[0] if len(thoughts) == 1 else json.dumps(thoughts)
        cut = [not its.reading.closed for its in answers]
        found["thought_truncated"] = float(np.mean(cut))
    found |= {
        "tokens": float(np.mean([its.tokens for its in answers])),
        "thought_tokens": float(np.mean([its.thought_tokens for its in answers])),
        "stop": json.dumps(stops) if len(stops) > 1 else stops[0],
        "truncated": float(np.mean([stop == "length" for stop in stops])),
    }
    if several:
        unclear = None in outcomes
        return found | {"outcome": None if unclear else json.dumps(outcomes)}
    whole = {name: int(found[name]) for name in ("tokens", "thought_tokens", "truncated")}
    return found | (whole if len(stops) == 1 else {}) | {"outcome": outcomes[0]}


def _question_of(row: Mapping[str, Any]) -> str:
    """The `question` column of the data, or the prompt where there is none."""
    asked = row["doc"].get("question")
    if asked is None:
        asked = row["prompt"] if "prompt" in row else argument(row, 0, 0)
    return str(asked).replace(PLACEHOLDER, "").strip()


def _save_images(
    task: Any,
    run: RunFolder,
    name: str,
    count: int,
    max_pixels: int | None,
    rows: Sequence[Mapping[str, Any]],
) -> dict[int, list[str]]:
    """Saves the images of the first questions as they are shown, shared by all arms.

    Returns {doc_id: paths in the run folder}: `<doc_id>.png`, then `<doc_id>-2.png`, ...
    """
    if task.config.doc_to_image is None:
        return {}
    folder = run.root / "evals" / "images" / name
    kept: dict[int, list[Path]] = {}
    changed = False
    # not the rows' own questions, in which lm-eval has replaced images by their hashes
    for row, doc in zip(rows[:count], task.eval_docs, strict=False):
        for place, picture in enumerate(task.own_image(doc), 1):
            path = folder / f"{row['doc_id']}{'' if place == 1 else f'-{place}'}.png"
            image = io.BytesIO()
            within_pixels(picture.convert("RGB"), max_pixels).save(image, "PNG")
            # another arm may have saved it already, and be shown with it
            if not path.exists() or path.read_bytes() != image.getvalue():
                changed = True
                with whole_file(path) as temporary:
                    temporary.write_bytes(image.getvalue())
            kept.setdefault(row["doc_id"], []).append(path)
    if kept and (changed or not run.checksums.path(f"images/{name}").exists()):
        # with those that rows of other arms show
        run.checksums.write(f"images/{name}", folder.glob("*.png"))
    return {doc_id: [run.checksums.name(path) for path in paths] for doc_id, paths in kept.items()}
