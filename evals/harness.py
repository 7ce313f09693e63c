"""Evaluates arms with lm-eval: results.json and one row per question.

One model at a time, task by task. A task is evaluated only when its checkpoint, definition or settings have changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable

from evals.lm import PLACEHOLDER, ArmLM
from evals.scoring import Tasks, argument, one_row_a_question, score_task
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import CheckpointArm, ImportedArm, TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.models import ModelConfig
from vlopd.digests import digest_json, digest_text, digest_weights, file_digest
from vlopd.distributed import accelerator
from vlopd.errors import RunError, UserError, one_line_out_of_memory
from vlopd.files import read_json, read_jsonl, whole_file, without_nan, write_jsonl
from vlopd.loop import Evaluate
from vlopd.models.load import DTYPES, load_configured
from vlopd.models.loaded import LoadedModel
from vlopd.models.thinking import Reading
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import arm_content, samples_by_task, score_files, teacher_folder
from vlopd.run.stage import Stage, stage

MERGED = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""Entries of lm-eval's results that are keyed by task."""
PER_TASK = (
    *("data_digest", "prompt_digest", "primary_metric", "chance", "extraction_failure_fraction"),
    *("thought_truncated_fraction", "pass_at", "not_compared"),
)
"""Our entries that are keyed by task."""
NOT_METRICS = (
    *("doc_id", "doc_hash", "prompt_hash", "question", "target", "completion", "thought"),
    *("thought_truncated", "group", "cluster", "image"),
)
"""Columns of samples_<task>.jsonl besides the metrics."""


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
    record = read_json(run.arm_record(arm))
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
def evaluate(run: RunFolder, subject: Subject, config: EvalConfig) -> bool:
    """Evaluates a model on tasks; returns whether anything was done.

    Writes evals/<name>/samples_<task>.jsonl in the run and, after each task, results.json there. Results of tasks with
    unchanged inputs are kept. Raises ConfigError for an unknown task and RunError for one that cannot be scored.
    """
    manager = Tasks.of(config.tasks, config.include)
    with stage(run, f"evals/{subject.name}") as its:
        record = run.checksums.record(its.artifact)
        if record.exists() and not _images_exist(run, read_json(record)):
            run.checksums.start(its.artifact)  # remade together with the rows that show them
        if not its.is_due(lambda whole: evaluation_inputs(manager, subject, config, whole)):
            return False
        merged = _reusable_results(its)
        lm = None
        for task, own in its.inputs["tasks"].items():
            if task in merged["inputs"]["tasks"]:
                continue
            if lm is None:
                if merged["inputs"]["tasks"]:  # reused results survive a kill
                    _write_results(its, merged)
                lm = ArmLM(subject.open(), config.batch_size, subject.name, sampled=config.sampled)
                merged |= {**subject.about, "arm": subject.name}
                merged["checkpoint_digest"] = digest_weights(its.inputs["checkpoint"])
                merged |= {"precision": subject.compute, **_digests_of(lm.loaded)}
            results = score_task(lm, task, manager, config, config.limit, subject.name)
            merged["leaves"][task] = sorted({*results["samples"], *results["results"]})
            for leaf, rows in results.pop("samples").items():
                _add_task(merged, results, leaf, rows, manager, config, run)
            for key in MERGED:
                merged.setdefault(key, {}).update(results.pop(key))
            merged |= results
            merged["inputs"]["tasks"][task] = {**own}
            _write_results(its, merged)
        if lm is None:  # tasks were only dropped
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
    plain = json.loads(json.dumps(merged, default=handle_non_serializable))
    rows = [out / f"samples_{leaf}.jsonl" for leaf in merged["results"]]
    present = [path for path in rows if path.exists()]  # a group of tasks has no rows
    its.run.checksums.finish(its.artifact, without_nan(plain), present)


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
    with stage(run, f"evals/{name}") as its:
        if its.is_due(lambda _: imported_inputs(where, config)):
            out = run.eval(name)
            first = score_files(where)[0]
            results = read_json(first) if first.suffix == ".json" else {}
            if not isinstance(results, dict):
                raise RunError(f"{first} is not lm-eval's results: it holds no object")
            merged: dict[str, Any] = {**results, "arm": name, "pictures": []}
            merged["checkpoint_digest"] = digest_json(its.inputs["checkpoint"])
            merged |= {key: {} for key in PER_TASK}
            merged["chance"] = dict(results.get("chance") or {})
            for task, path in samples.items():
                rows = read_scored_rows(task, path)
                write_jsonl(out / f"samples_{task}.jsonl", [_sample_row(row, {}) for row in rows])
                for key, value in _task_entries(rows).items():
                    merged[key][task] = value
            rows_written = [out / f"samples_{task}.jsonl" for task in config.tasks]
            its.finish(without_nan(merged), rows_written)
    return its.made


def read_scored_rows(task: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a samples file of lm-eval or of a run, one per question, as `scoring.one_row_a_question` has them.

    Raises RunError for a file of another kind.
    """
    rows = read_jsonl(path)
    if not all(isinstance(row, dict) and {"doc_id", "doc_hash"} <= row.keys() for row in rows):
        raise RunError(f"{path} has rows without doc_id and doc_hash; it is not lm-eval's samples")
    if not rows:
        raise RunError(f"{path} has no rows; evaluate the model again with --log_samples")
    try:
        return one_row_a_question(task, rows) if "metrics" in rows[0] else list(map(_own_row, rows))
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} is not samples of lm-eval or of a run: {type(error).__name__} {error}; evaluate the model again "
            "with the installed lm-eval"
        ) from None


def _own_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a run's samples file, as `scoring.one_row_a_question` has it."""
    return {
        **row,
        "doc": {"question": row["question"], "kind": row["group"], "cluster": row["cluster"]},
        "numbers": {key: value for key, value in row.items() if key not in NOT_METRICS},
    }


def imported_inputs(where: Path, config: EvalConfig) -> dict[str, Any]:
    """The inputs of imported scores: their files and the tasks."""
    files = {path.name: file_digest(path) for path in score_files(where)}
    return {"checkpoint": files, "tasks": list(config.tasks)}


def samples_of(where: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The samples file of each task in finished evaluations. Raises RunError for a missing one."""
    by_task = samples_by_task(where)
    for task in tasks:
        if task not in by_task:
            raise RunError(
                f"{where} has no samples of task {task}; it has {', '.join(sorted(by_task))}"
            )
    return {task: by_task[task] for task in tasks}


def _reusable_results(its: Stage) -> dict[str, Any]:
    """Earlier results of the same checkpoint that are still valid; rows of other tasks are deleted."""
    out = its.run.root / its.artifact
    old = its.before
    kept = unchanged_tasks(old["inputs"], its.inputs) if old else {}
    leaves = {task: old["leaves"][task] for task in kept}
    names = {leaf for task in kept for leaf in leaves[task]}
    for path in out.glob("samples_*.jsonl"):
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
    """The inputs that determine a task's results for a checkpoint."""
    settings = config.model_dump(
        mode="json", include={"limit", "batch_size", "fewshot", "chat_template", "sampled"}
    )
    return {
        "definition": manager.digest(task),
        "compute": subject.compute,
        "template_arguments": dict(subject.template_arguments),
        **settings,
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
    """A function for the training loop: mean scores of a student on eval.during, {task: {metric: mean}}."""
    during = config.eval.during
    assert during is not None
    # resolved here, so that an unknown task raises before training
    manager = Tasks.of(during.tasks, config.eval.include)

    def evaluate(student: LoadedModel) -> dict[str, dict[str, float]]:
        lm = ArmLM(student, config.eval.batch_size, "held-out", True, config.eval.sampled)
        found = {}
        for task in during.tasks:
            results = score_task(lm, task, manager, config.eval, during.limit, student.name)
            for leaf, rows in results["samples"].items():
                whole = results["results"][leaf]  # a corpus-level metric such as F1 is not a mean
                found[leaf] = {
                    metric: whole.get(
                        f"{metric},none", float(np.mean([r["numbers"][metric] for r in rows]))
                    )
                    for metric in rows[0]["numbers"]
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
    run: RunFolder,
) -> None:
    """Writes a task's rows, and adds our entries on them to the results."""
    declared = results["configs"][task].get("metadata") or {}
    chance = declared.pop("chance", None)  # a function that the YAML names
    kept = _save_images(manager.loaded[task], run, task, config.keep_images, rows)
    pictures = [name for name in merged.get("pictures", ()) if name != task]
    merged["pictures"] = [*pictures, task] if kept else pictures
    about = _task_entries(rows)
    if chance:
        about["chance"] = chance([row["doc"] for row in rows])
    for key in PER_TASK:
        merged.setdefault(key, {}).pop(task, None)
    for key, value in about.items():
        merged[key][task] = value
    write_jsonl(
        run.eval(merged["arm"]) / f"samples_{task}.jsonl", [_sample_row(row, kept) for row in rows]
    )


def _task_entries(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our entries of results.json on a task's rows: digests, primary metric, extraction failures."""
    numbers = list(rows[0]["numbers"])
    about: dict[str, Any] = {
        "data_digest": digest_json([row["doc_hash"] for row in rows]),
        "prompt_digest": digest_json([row["prompt_hash"] for row in rows]),
    }
    if numbers:
        about["primary_metric"] = numbers[0]
    else:
        about["not_compared"] = "its metrics are corpus-level"
    if passes := [metric for metric in numbers if metric.startswith("pass@")]:
        about["pass_at"] = passes
    if "extraction_failure" in numbers:
        failures = [row["numbers"]["extraction_failure"] for row in rows]
        about["extraction_failure_fraction"] = float(np.mean(failures))
    if cut_off := [not r.closed for row in rows for r in row.get("readings") or []]:
        about["thought_truncated_fraction"] = float(np.mean(cut_off))
    return about


def _sample_row(row: Mapping[str, Any], images: Mapping[int, str]) -> dict[str, Any]:
    """One row of samples_<task>.jsonl: question, target, completion, scores."""
    doc = row["doc"]
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "question": _question_of(row),
        "target": str(row["target"]),
        "completion": row["completion"],
        **_reasoning_columns(row.get("readings")),
        **{metric: float(value) for metric, value in row["numbers"].items()},
        "group": doc.get("kind"),
        "cluster": doc.get("cluster"),
        "image": images.get(row["doc_id"]),
    }


def _reasoning_columns(readings: Sequence[Reading] | None) -> dict[str, Any]:
    """Columns of a reasoning model: the reasoning, and the fraction of samples cut off within it."""
    if not readings:
        return {}
    thoughts = [reading.thought for reading in readings]
    return {
        "thought": thoughts[0] if len(thoughts) == 1 else json.dumps(thoughts),
        "thought_truncated": float(np.mean([not reading.closed for reading in readings])),
    }


def _question_of(row: Mapping[str, Any]) -> str:
    """The `question` column of the data, or the prompt where there is none."""
    asked = row["doc"].get("question")
    if asked is None:
        asked = argument(row, 0, 0)
    return str(asked).replace(PLACEHOLDER, "").strip()


def _save_images(
    task: Any, run: RunFolder, name: str, count: int, rows: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Saves the first image of the first questions, shared by all arms; returns {doc_id: path in the run folder}."""
    if task.config.doc_to_image is None:
        return {}
    kept: dict[int, Path] = {}
    changed = False
    # not the rows' own questions, in which lm-eval has replaced images by their hashes
    for row, doc in zip(rows[:count], task.eval_docs, strict=False):
        if own := task.own_image(doc):
            path = run.root / "evals" / "images" / name / f"{row['doc_id']}.png"
            image = io.BytesIO()
            own[0].convert("RGB").save(image, "PNG")
            # another arm may have saved it already, and be shown with it
            if not path.exists() or path.read_bytes() != image.getvalue():
                changed = True
                with whole_file(path) as temporary:
                    temporary.write_bytes(image.getvalue())
            kept[row["doc_id"]] = path
    if kept and (changed or not run.checksums.path(f"images/{name}").exists()):
        # with those that rows of other arms show
        run.checksums.write(f"images/{name}", (run.root / "evals" / "images" / name).glob("*.png"))
    return {doc_id: run.checksums.name(path) for doc_id, path in kept.items()}
