"""Arms -> lm-eval -> results.json and per-question rows.

One arm at a time, each from its checkpoint folder; nothing is cached between arms (lm-eval's own cache is
keyed by request alone and would hand one arm another's answers). Skipped when the arm's record, the tasks
and the settings are those of the last time.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from PIL import Image

from evals.lm import PLACEHOLDER, ArmLM
from vlopd.checkpoint import (
    RunFolder,
    digest_json,
    read_json,
    up_to_date,
    write_json,
    write_jsonl,
)
from vlopd.config import ConfigError, ExperimentConfig, TeacherArm
from vlopd.distill import Evaluate
from vlopd.models.load import DTYPES, LoadedModel, load_configured
from vlopd.processes import accelerator
from vlopd.stages import teacher_folder

TASKS = Path(__file__).parent / "tasks"


def evaluate_arm(run: RunFolder, config: ExperimentConfig, arm: str) -> bool:
    """Scores one arm on the config's tasks; returns whether there was anything to do.

    Writes evals/<arm>/samples_<task>.jsonl, then results.json. Raises ConfigError for an unknown task.
    """
    record = read_json(run.arm_record(arm))
    settings = {
        "tasks": list(config.eval.tasks),
        "limit": config.eval.limit,
        "batch_size": config.eval.batch_size,
        "compute": config.precision.compute,
    }
    inputs = {"checkpoint": record["checkpoint_digest"], "settings": settings}
    out = run.eval(arm)
    if up_to_date(out / "results.json", inputs):
        return False
    lm = ArmLM(open_arm(run, config, arm), config.eval.batch_size, title=f"eval {arm}")
    results = score(lm, config.eval.tasks, config.eval.limit, arm)
    samples = results.pop("samples")
    about = {
        "arm": arm,
        "inputs": inputs,
        "checkpoint_digest": record["checkpoint_digest"],
        "other_source": record.get("other_source"),
        "data_digest": {},
        "primary_metric": {},
        "chance": {},
        "extraction_failure_fraction": {},
    }
    for task, rows in samples.items():
        metrics = list(results["higher_is_better"][task])
        primary = metrics[0]
        rows = sorted(rows, key=lambda row: row["doc_id"])
        declared = results["configs"][task].get("metadata", {})  # functions that its YAML names
        chance, pictures = declared.pop("chance", None), declared.pop("pictures", None)
        images = keep_images(run, config, task, rows, pictures) if pictures else {}
        write_jsonl(out / f"samples_{task}.jsonl", [tidy(row, metrics, images) for row in rows])
        about["data_digest"][task] = digest_json([row["doc_hash"] for row in rows])
        about["primary_metric"][task] = primary
        if chance:
            about["chance"][task] = chance([row["doc"] for row in rows])
        if "extraction_failure" in metrics:
            failures = [row["extraction_failure"] for row in rows]
            about["extraction_failure_fraction"][task] = float(np.mean(failures))
    plain = json.loads(json.dumps({**results, **about}, default=handle_non_serializable))
    write_json(out / "results.json", without_nan(plain))
    return True


def score(lm: ArmLM, tasks: tuple[str, ...], limit: int | None, name: str) -> dict[str, Any]:
    """lm-eval's results of a model on the tasks, with every question's sample; no random state is touched."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with untouched_randomness():
        results = lm_eval.simple_evaluate(
            model=lm,
            model_args={"pretrained": name},
            tasks=list(tasks),
            task_manager=task_manager(tasks),
            limit=limit,
            apply_chat_template=True,
            bootstrap_iters=1,  # closed-form errors only; ours are in compare.json
            log_samples=True,
        )
    assert results is not None
    return results


def held_out_scores(config: ExperimentConfig) -> Evaluate:
    """For the training loop: the means of a student on the questions of eval.during, {task: {metric: mean}}."""
    during = config.eval.during
    assert during is not None
    task_manager(during.tasks)  # an unknown task is an error before any training

    def evaluate(student: LoadedModel) -> dict[str, dict[str, float]]:
        lm = ArmLM(student, config.eval.batch_size, title="held-out", quiet=True)
        results = score(lm, during.tasks, during.limit, student.name)
        return {
            task: {
                metric: float(np.mean([row[metric] for row in rows]))
                for metric in results["higher_is_better"][task]
            }
            for task, rows in results["samples"].items()
        }

    return evaluate


def open_arm(run: RunFolder, config: ExperimentConfig, name: str) -> LoadedModel:
    """An arm's model as training would load it, in the compute precision."""
    arm, model = config.arms.get(name), config.student
    folder: Path | None = run.checkpoint(name)
    if isinstance(arm, TeacherArm):
        teacher = config.teacher_of(arm)
        model = config.loaded_as(teacher)
        folder = teacher_folder(run, config, teacher) if teacher.is_student else None
    return load_configured(model, DTYPES[config.precision.compute], accelerator().device, folder)


def task_manager(tasks: tuple[str, ...]) -> TaskManager:
    """Our tasks; lm-eval's fourteen thousand are scanned only when one of them is asked for."""
    ours = TaskManager(include_path=str(TASKS), include_defaults=False)
    if all(task in ours.all_tasks for task in tasks):
        return ours
    every = TaskManager(include_path=str(TASKS))
    for task in tasks:
        if task not in every.all_tasks:
            raise ConfigError(f"eval.tasks: no task {task!r}; ours are {', '.join(ours.all_tasks)}")
    return every


def tidy(row: dict[str, Any], metrics: list[str], images: dict[int, str]) -> dict[str, Any]:
    """One question of one arm: what was asked, what came, what it scored."""
    doc = row["doc"]
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt_hash": row["prompt_hash"],
        "question": str(doc.get("question", "")).replace(PLACEHOLDER, "").strip(),
        "target": str(row["target"]),
        "completion": completion_of(row),
        **{metric: float(row[metric]) for metric in metrics},
        "group": doc.get("kind"),
        "cluster": doc.get("cluster"),
        "image": images.get(row["doc_id"]),
    }


def completion_of(row: dict[str, Any]) -> str:
    """The generated text; for log-likelihood tasks, the per-choice log-probs as JSON."""
    first = row["filtered_resps"][0]
    return first if isinstance(first, str) else json.dumps(row["filtered_resps"])


def keep_images(
    run: RunFolder,
    config: ExperimentConfig,
    task: str,
    rows: list[dict[str, Any]],
    pictures: Callable[[dict[str, Any]], list[Image.Image]],
) -> dict[int, str]:
    """Saves the first picture of the first questions, once for all arms; {doc_id: path inside the run folder}."""
    kept = {}
    folder = run.root / "evals" / "images" / task
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows[: config.eval.keep_images]:
        path = folder / f"{row['doc_id']}.png"
        if not path.exists():
            pictures(row["doc"])[0].save(path)
        kept[row["doc_id"]] = str(path.relative_to(run.root))
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
