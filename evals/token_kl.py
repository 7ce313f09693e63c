"""KL at every token of an arm's greedy answers, to its teacher and to the base it was trained from.

evals/<arm>/tokens_<task>.jsonl has KL(arm || teacher) by token, evals/<arm>/base_kl.json the mean KL(arm || base), both
for the first eval.keep_images questions of each generative task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import lm_eval
import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from evals.harness import unchanged_tasks
from evals.lm import Decoding, GenerationSettings, image_parts, images_of, within_pixels
from evals.scoring import Tasks, load_task, preserve_random_state
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import BaseArm, CheckpointArm, ImportedArm, TeacherArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.models import TeacherConfig
from vlopd.config.objective import ReverseKL
from vlopd.distributed import accelerator, in_step, share, share_of
from vlopd.errors import UserError
from vlopd.files import is_first_process, write_jsonl
from vlopd.progress import progress
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import (
    arm_content,
    arm_digest,
    plugin_content,
    teacher_content,
)
from vlopd.run.stage import Stage, stage
from vlopd.train.generation import sample
from vlopd.train.pair import LoadedTeachers, ModelPair, load_pair
from vlopd.types import Completions, Example

T = TypeVar("T")

TOKENS = 256
"""Maximum tokens per answer."""


def write_token_kl(run: RunFolder, config: ExperimentConfig, arm: str) -> bool:
    """Writes KL(arm || teacher) at every token of the arm's greedy answers; returns whether anything was done.

    Skips runs without a teacher, arms that are not students of this run, and tasks whose questions a teacher cannot
    read (they lack the field of its context); tokens.json records the reason.
    """
    if not has_tokens(config, arm):
        if is_first_process():
            forget_tokens(run, arm)
        return False
    state = accelerator()
    with in_step(state), stage(run, f"tokens/{arm}") as its:
        if its.is_due_in_all(state, lambda _: token_inputs(run, config, arm)):
            write_tokens(its, config, arm, state)
    return its.made


def forget_tokens(run: RunFolder, arm: str) -> None:
    """Deletes the token KLs of an earlier config, which the report would show beside later answers."""
    if not run.checksums.record(f"tokens/{arm}").exists():
        return
    with run.lock_artifact(f"tokens/{arm}"):
        run.checksums.start(f"tokens/{arm}")
        for path in run.eval(arm).glob("tokens_*.jsonl"):
            path.unlink()


def has_tokens(config: ExperimentConfig, arm: str) -> bool:
    """Whether token KL applies: the arm is a student of this run, and the run has a teacher and keeps questions."""
    foreign = isinstance(config.arms.get(arm), (TeacherArm, CheckpointArm, ImportedArm))
    return not foreign and bool(config.eval.keep_images) and config.teacher is not None


def token_inputs(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    """The inputs that determine an arm's token KL, as digests."""
    teachers = {n: teacher_content(run, config, its) for n, its in config.teachers.items()}
    contexts = plugin_content(use for use in config.plugins if use.key.startswith("teacher"))
    return {
        **_answer_inputs(run, config, arm),
        **({"plugins": contexts} if contexts else {}),
        "teacher": config.model_dump(mode="json", include={"teacher", "precision"}),
        "files": teachers,
    }


def _answer_inputs(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    """The inputs that determine an arm's greedy answers, as digests."""
    manager = Tasks.of(config.eval.tasks, config.eval.include)
    overrides = {
        name: own.model_dump(mode="json", exclude_none=True)
        for task in config.eval.tasks
        for name, own in manager.overrides(task, config.eval).items()
    }
    later = {"generation": overrides, "max_pixels": config.eval.max_pixels}
    return {
        **{key: value for key, value in later.items() if value},
        "checkpoint": arm_content(run, config, arm),
        "template_arguments": config.student.template_arguments,
        "tasks": {task: manager.digest(task) for task in config.eval.tasks},
        "settings": config.eval.model_dump(
            mode="json", include={"limit", "keep_images", "fewshot"}
        ),
    }


def write_tokens(its: Stage, config: ExperimentConfig, arm: str, state: Accelerator) -> None:
    """Writes tokens_<task>.jsonl of new and changed tasks, and keeps those of unchanged ones.

    Processes share the batches of questions; the first writes.
    """
    run, out = its.run, its.run.eval(arm)
    kept = unchanged_tasks(its.reusable.get("inputs", {}), its.inputs)
    leaves: dict[str, list[str]] = {task: its.reusable["leaves"][task] for task in kept}
    names = {leaf for task in kept for leaf in leaves[task]}
    skipped = {leaf: why for leaf, why in its.reusable.get("skipped", {}).items() if leaf in names}
    for path in out.glob("tokens_*.jsonl") if state.is_main_process else ():
        if path.stem.removeprefix("tokens_") not in names:
            path.unlink()
    asked: dict[str, list[Example]] = {}
    for task in config.eval.tasks:
        if task not in kept:
            asked |= (of_task := _recorded_prompts(task, config.eval))
            leaves[task] = sorted(of_task)
    if any(asked.values()):
        pair = load_pair(
            config.student,
            config.teacher,
            compute=config.precision.resolved,
            device=state.device,
            images=config.data.has_images,
            student_folder=run.checkpoint(arm),
        )
        for task, examples in asked.items():
            try:
                rows = _kl_of_answers(
                    pair,
                    examples,
                    config.eval.batch_size,
                    f"{arm}: token KL of {task}",
                    partial(_rows_of, pair),
                    state,
                )
            except UserError as error:
                skipped[task] = str(error)
            else:
                if state.is_main_process:
                    write_jsonl(out / f"tokens_{task}.jsonl", [row for its in rows for row in its])
    if state.is_main_process:
        its.finish({"skipped": skipped, "leaves": leaves}, sorted(out.glob("tokens_*.jsonl")))


def _kl_of_answers(
    pair: ModelPair,
    examples: Sequence[Example],
    batch_size: int,
    title: str,
    of_batch: Callable[[Sequence[Example], Completions, torch.Tensor], T],
    state: Accelerator,
) -> list[T]:
    """`of_batch` of each batch: its examples, the student's greedy answers, KL(student || teacher) at their tokens [N].

    Processes share the batches, and each gets all results.
    """
    batches = [examples[k : k + batch_size] for k in range(0, len(examples), batch_size)]
    total, quiet = len(share_of(state, batches)), not state.is_main_process
    shown = progress(title=title, total=total, unit="batch", leave=False, disable=quiet)

    def work(batch: Sequence[Example]) -> T:
        with torch.no_grad():
            prompts = pair.student.render(batch)
            longest = max(int(example.fields["tokens"]) for example in batch)
            completions = sample(
                pair.student, prompts, min(longest, TOKENS), 0, columns=pair.vocabulary.student
            )
            kl = pair.divergence(ReverseKL(), batch, prompts, completions, False).loss
        shown.update(1)
        return of_batch(batch, completions, kl)

    with shown:
        return share(state, work, batches)


def write_base_kl(
    run: RunFolder, config: ExperimentConfig, arm: str, kept: LoadedTeachers | None = None
) -> bool:
    """Writes KL(arm || base), nats a token of the arm's greedy answers: the mean over all of them and by task.

    How far an arm went from the base in behaviour, which forgetting follows (arXiv 2509.04259). Needs no teacher.
    `kept` keeps the loaded base from one arm to the next. Returns whether anything was done.
    """
    if not has_base_kl(config, arm):
        return False
    state = accelerator()
    with in_step(state), stage(run, f"base_kl/{arm}") as its:
        if its.is_due_in_all(state, lambda _: base_kl_inputs(run, config, arm)):
            content = _base_kl(run, config, arm, {} if kept is None else kept, state)
            if state.is_main_process:
                its.finish(content, ())
    return its.made


def has_base_kl(config: ExperimentConfig, arm: str) -> bool:
    """Whether KL to the base applies: the arm is a student of this run that was changed, and questions are kept."""
    foreign = isinstance(config.arms[arm], (BaseArm, TeacherArm, CheckpointArm, ImportedArm))
    return not foreign and bool(config.eval.keep_images)


def base_kl_inputs(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Any]:
    """The inputs that determine an arm's KL to the base, as digests."""
    base = arm_digest(run, config.base_arm)
    return {**_answer_inputs(run, config, arm), "base": base, "compute": config.precision.resolved}


def _base_kl(
    run: RunFolder, config: ExperimentConfig, arm: str, kept: LoadedTeachers, state: Accelerator
) -> dict[str, Any]:
    """The content of base_kl.json; processes share the batches of questions."""
    own = {"model": str(run.checkpoint(config.base_arm)), "revision": None}
    pair = load_pair(
        config.student,
        TeacherConfig.model_validate({**config.student.model_dump(), **own}),
        compute=config.precision.resolved,
        device=state.device,
        student_folder=run.checkpoint(arm),
        kept=kept,
    )
    tasks: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    total, tokens = 0.0, 0
    for task in config.eval.tasks:
        for leaf, examples in _recorded_prompts(task, config.eval).items():
            title = f"{arm}: KL to the base, {leaf}"
            try:
                size = config.eval.batch_size
                kl = torch.cat(_kl_of_answers(pair, examples, size, title, _values_of, state))
            except UserError as error:
                skipped[leaf] = str(error)
                continue
            total, tokens = total + float(kl.sum()), tokens + len(kl)
            mean = float(kl.mean())
            tasks[leaf] = {"kl_to_base": mean, "tokens": len(kl), "questions": len(examples)}
    mean_of_all = total / tokens if tokens else None
    return {"kl_to_base": mean_of_all, "tokens": tokens, "tasks": tasks, "skipped": skipped}


def _values_of(_: Sequence[Example], completions: Completions, kl: torch.Tensor) -> torch.Tensor:
    return kl.double().cpu()


def _rows_of(
    pair: ModelPair, batch: Sequence[Example], completions: Completions, kl: torch.Tensor
) -> list[dict[str, Any]]:
    counts = completions.mask.sum(1).tolist()
    rows = []
    for k, (example, own) in enumerate(zip(batch, kl.split(counts), strict=True)):
        ids = completions.ids[k][completions.mask[k]].tolist()
        rows.append(
            {
                "doc_id": int(example.id),
                "tokens": pair.student.tokenizer.convert_ids_to_tokens(ids),
                "kl": [round(x, 4) for x in own.tolist()],
            }
        )
    return rows


class PromptRecorder(LM):
    """An lm-eval model that records the prompts as chat messages and returns empty answers."""

    MULTIMODAL = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Instance] = []

    @property
    def tokenizer_name(self) -> str:
        return "questions"

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        return json.dumps(chat_history)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.asked += requests
        return [""] * len(requests)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return [0.0] * len(requests)


def _recorded_prompts(task: str, config: EvalConfig) -> Mapping[str, list[Example]]:
    """{task or member of a group: its first questions as examples}, for generative tasks only."""
    return _prompts_by_config(task, config.model_dump_json())


@cache
def _prompts_by_config(task: str, settings: str) -> Mapping[str, list[Example]]:
    """`_recorded_prompts`, which are the same for every arm, so cached per process; settings: the config as JSON."""
    config = EvalConfig.model_validate_json(settings)
    manager = Tasks.of([task], config.include)
    lm = PromptRecorder()
    limit = min(config.keep_images, config.limit or config.keep_images)
    with preserve_random_state():
        lm_eval.evaluate(
            lm,
            load_task(manager, task, config.fewshot),
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=False,
        )
    overrides = manager.overrides(task, config)
    found: dict[str, list[Example]] = {}
    for request in lm.asked:
        turns = json.loads(request.args[0])
        messages = tuple({**turn, "content": image_parts(turn["content"])} for turn in turns)
        name = str(request.task_name)
        asked = GenerationSettings.parse(name, request.args[1])
        longest = Decoding.of(asked, overrides.get(name, overrides.get(task))).tokens
        images = [within_pixels(image, config.max_pixels) for image in images_of(request)]
        fields = {**request.doc, "tokens": longest}
        example = Example(str(request.doc_id), messages, tuple(images), fields=fields)
        found.setdefault(name, []).append(example)
    return found
