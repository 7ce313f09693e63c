"""On-policy distillation: the loop. Start reading here.

Each step: 1. the student samples completions of the step's prompts; 2. the teacher, reading the same
examples in its own template and resolution, grades every token of them; 3. the loss at the completion tokens,
averaged over the whole step, is back-propagated through the student's log-probs only (not through the
sampling); 4. the optimizer moves the trained coordinates' fp32 values, which are rounded into the model.

The baselines are this same loop: completions may be the teacher's or the data's (sources.py), and a
reward's advantages may be mixed in or stand alone (rewards.py). Retraining a subnetwork is it with a mask.

What it does not do, and why: no replay buffer (a step's completions are used in that step, once unless
train.updates_per_rollout says more) and no reference model (the teacher is the only other opinion); no
`Trainer` subclass and no callbacks (the loop is short enough to edit).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from vlopd import distributed
from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.data.load import pick
from vlopd.errors import ConfigError, RunError, UserError
from vlopd.files import whole_folder
from vlopd.models import names
from vlopd.models.loaded import LoadedModel
from vlopd.train.log import TrainingLog, open_trackers
from vlopd.train.losses import TokenDivergence, token_weights
from vlopd.train.metrics import finite, summarise
from vlopd.train.optimizer_statistics import MOMENTS, Look
from vlopd.train.optimizers import Optimizers, build_optimizer, learning_rate
from vlopd.train.pair import Graded, ModelPair
from vlopd.train.resume import Averages, resume, save_state
from vlopd.train.rollouts import Batch, collect
from vlopd.train.sparse import Trainable
from vlopd.types import Example
from vlopd.weights.stored import rounded_on_load
from vlopd.weights.subspace import Projection

Evaluate = Callable[[LoadedModel], Mapping[str, Mapping[str, float]]]
"""Scores a model on the held-out questions of eval.during: {task: {metric: mean}}."""

Grades = dict[int, list[Graded]]
"""What the teachers make of a step's micro-batches, by their place."""


class TrainingError(UserError):
    """Training cannot go on; the last good state is intact."""


def distill(
    pair: ModelPair,
    data: Sequence[Example],
    config: ExperimentConfig,
    arm: DistillArm,
    folder: Path,
    title: str,
    mask: Mapping[str, Tensor] | None = None,
    identity: str = "",
    accelerator: Accelerator | None = None,
    projections: Mapping[str, Projection] | None = None,
    keep: Callable[[int, Trainable], None] | None = None,
    evaluate: Evaluate | None = None,
) -> Trainable:
    """Trains the pair's student in place and returns its trained coordinates.

    `config` is the experiment as the arm sees it (`ExperimentConfig.of_arm`). Writes metrics.jsonl,
    samples.jsonl and a resumable state/ into `folder`, and optimizer.jsonl and heldout.jsonl where they are
    asked for; a state left there by a killed run with the same `identity` (a digest of everything that
    decides the result) is gone on from. `projections` are of the gradients, by parameter; `keep` gets the number
    of each of train.keep_steps. `evaluate` only looks: no later number of the training depends on it.

    Raises TrainingError when the loss, a gradient, a log-prob or an updated value is not finite. Of several
    processes all raise where one does.
    """
    accelerator = accelerator or distributed.accelerator()
    train, rollout = config.train, config.rollout
    main = accelerator.is_main_process
    with distributed.together(accelerator):
        names.freeze(pair.student.model, train.freeze)
        with rounded_on_load(pair.student) as stored:
            trainable = Trainable(pair.student.model, mask, projections, stored=stored)
        if trainable.count == 0:
            raise ConfigError(
                f"{title}: nothing is left to train: mask {arm.mask!r} has no coordinate outside of train.freeze = "
                f"{list(train.freeze)}; the arm would be the base under another name"
            )
        optimizer = build_optimizer(config.optim, trainable)
        averages = follow_student(pair, mask)
        start = resume(folder / "state", trainable, optimizer, averages, identity)
        share = split_evenly(train.prompts_per_step, accelerator)
        pair.check_teachers_prompt(pick(data, 0, 1, arm.seed))
        trackers = open_trackers(config, folder, title) if main else []
        log = TrainingLog(folder, title, train.steps, start, main, trackers)
    refuse_other_starts(start, folder, accelerator)
    reached = start > 0  # whether anything that trains has had a gradient
    with log:
        for note in config.notes:
            log.note(note)
        if start == 0:
            look_at_held_out(config, 0, pair, log, accelerator, evaluate)
        for step in range(start, train.steps):
            clock = Stopwatch()
            with distributed.together(accelerator):
                examples = pick(
                    data, step * train.prompts_per_step + share.start, len(share), arm.seed
                )
                rate = learning_rate(config.optim, step, train.steps)
                clock.lap("data")

                # 1. the student samples (or whoever else writes)
                batches = collect(pair, config, examples, share, arm.seed, step)
                clock.lap("rollout")

            rows: list[dict[str, Any]] = []
            grades: Grades | None = {} if train.updates_per_rollout > 1 else None
            for _ in range(train.updates_per_rollout):
                # 2. and 3. the teacher grades, the student learns
                trainable.zero_grad()
                loss, graded = backward(pair, config, batches, accelerator, clock, grades)

                # 4. the update
                norm = gather_gradients(trainable, config.optim.max_grad_norm, accelerator)
                reached |= any(value.grad is not None for value in trainable.parameters())
                group = rollout.completions_per_prompt
                rows.append(summarise(step, loss, norm, batches, graded, group, accelerator))
                refuse_not_finite(rows[-1], batches, graded, folder, title, accelerator)
                with distributed.together(accelerator):
                    if len(rows) == 1 and step % train.sample_every == 0:
                        log_samples(log, step, pair, batches[0], graded[0], group)
                    is_due = train.evidence_every and step % train.evidence_every == 0
                    look = Look(trainable) if is_due and len(rows) == 1 else None
                    optimizer.step(rate)
                    refuse_overflow(
                        step, rate, trainable, optimizer, folder, title, config.optim.weight_decay
                    )
                    if look is not None:
                        log.append("optimizer.jsonl", look.rows(step, trainable, optimizer))
                    trainable.write_back()
                    clock.lap("update")
            for average, decay in averages:
                average.move_towards(trainable, 1.0 - decay)
            clock.lap("update")

            done = step + 1
            keeps, saves = done in train.keep_steps, done % train.save_every == 0
            if keeps or saves or done == train.steps:
                with distributed.together(accelerator):
                    refuse_broken(done, pair, batches[0], graded[0], config, folder, title)
                    if done == train.steps and not reached:
                        raise TrainingError(
                            f"{title}: in {done} steps nothing that trains got a gradient, so this arm would be the "
                            f"base; the data does not read {next(iter(trainable.slots))}, say: see train.freeze, "
                            "the arm's mask and data.image"
                        )
            row = rows[0]  # of the weights that wrote the completions
            with distributed.together(accelerator):
                log.step({**row, "learning_rate": rate, **clock.seconds(row["completion_tokens"])})
            look_at_held_out(config, done, pair, log, accelerator, evaluate)
            with distributed.together(accelerator):
                if keep and keeps and main:
                    keep(done, trainable)
                if saves and main:
                    save_state(folder / "state", done, trainable, optimizer, averages, identity)
    return trainable


def backward(
    pair: ModelPair,
    config: ExperimentConfig,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    clock: Stopwatch,
    grades: Grades | None = None,
) -> tuple[float, list[TokenDivergence]]:
    """Adds up the gradient of the step's loss over this process's micro-batches.

    `grades` keeps what the teachers make of each from one update to the next: within a step they do not move.
    Returns this process's part of the loss, and what is known of every token, micro-batch by micro-batch.
    """
    n_tokens, n_completions = count(batches, accelerator)
    longest = config.rollout.max_new_tokens
    graded: list[TokenDivergence] = []
    loss = 0.0
    with distributed.together(accelerator):
        for k, batch in enumerate(batches):
            completions = batch.completions
            theirs = grades.get(k) if grades else None
            if theirs is None:
                theirs = pair.grade(batch.examples, completions)
                if grades is not None:
                    grades[k] = theirs
            clock.lap("teacher")
            tokens = pair.loss_of(
                config.loss, theirs, batch.prompts, completions, config.reward, batch.advantages
            )
            weights = token_weights(config.loss, completions.mask, n_tokens, n_completions, longest)
            part = (tokens.loss * weights).sum()
            if part.requires_grad:  # not where nothing that trains was read: eyes alone, no picture
                part.backward()
            loss += part.item()
            graded.append(TokenDivergence(*(column.detach() for column in tokens)))
            clock.lap("student")
    return loss, graded


def gather_gradients(
    trainable: Trainable, max_norm: float | None, accelerator: Accelerator
) -> float:
    """Sums gradients over processes and clips them; returns their norm before that.

    A process that has no gradient of a value (no row of its own with a picture, say) adds zeros. Where none
    has, there is none, as with one process: optimizers pass such a value by, weight decay included.
    """
    values = list(trainable.parameters())
    if accelerator.num_processes > 1:
        has = [float(value.grad is not None) for value in values]
        anywhere = accelerator.reduce(torch.tensor(has, device=accelerator.device), "sum").tolist()
        for value, processes_with in zip(values, anywhere, strict=True):
            if processes_with:
                own = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = accelerator.reduce(own, "sum")
    return float(torch.nn.utils.clip_grad_norm_(values, max_norm or math.inf))


def follow_student(pair: ModelPair, mask: Mapping[str, Tensor] | None) -> Averages:
    """Teachers that follow the student: only the trained coordinates move, so only those are averaged."""
    averages = []
    trains = {name: p.requires_grad for name, p in pair.student.model.named_parameters()}
    for teacher in pair.teachers:
        if teacher.ema is not None:
            for name, parameter in teacher.loaded.model.named_parameters():
                parameter.requires_grad_(trains[name])
            with rounded_on_load(teacher.loaded) as stored:
                average = Trainable(teacher.loaded.model, mask, stored=stored)
            averages.append((average, teacher.ema))
            teacher.loaded.model.requires_grad_(False)
    return averages


def split_evenly(prompts: int, accelerator: Accelerator) -> range:
    """This process's share of a step's prompts. Raises ConfigError where they do not divide."""
    each, left = divmod(prompts, accelerator.num_processes)
    if left:
        raise ConfigError(
            f"train.prompts_per_step = {prompts} does not divide among {accelerator.num_processes} processes"
        )
    return range(accelerator.process_index * each, (accelerator.process_index + 1) * each)


def count(batches: Sequence[Batch], accelerator: Accelerator) -> tuple[int, int]:
    """Completion tokens and completions of the step, over all processes."""
    own = [sum(b.completions.n_tokens for b in batches), sum(len(b.examples) for b in batches)]
    sums = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum")
    return int(sums[0]), int(sums[1])


def look_at_held_out(
    config: ExperimentConfig,
    step: int,
    pair: ModelPair,
    log: TrainingLog,
    accelerator: Accelerator,
    evaluate: Evaluate | None,
) -> None:
    """Scores the student after `step` steps, if that is due; the first process does, the others wait."""
    during = config.eval.during
    if evaluate is None or during is None:
        return
    if step % during.every and step != config.train.steps:
        return
    with distributed.together(accelerator):
        if accelerator.is_main_process:
            log.held_out(step, evaluate(pair.student))


# --------------------------------------------------------------------------------------- bookkeeping


class Stopwatch:
    """Seconds by name; what a name takes in several laps adds up."""

    def __init__(self) -> None:
        self.started = self.last = self.now()
        self.laps: dict[str, float] = {}

    @staticmethod
    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # kernels are still under way when their calls return
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now, key = self.now(), f"{name}_seconds"
        self.laps[key] = self.laps.get(key, 0.0) + now - self.last
        self.last = now

    def seconds(self, tokens: int) -> dict[str, float]:
        total = self.last - self.started
        return {
            **{name: round(each, 4) for name, each in self.laps.items()},
            "seconds": round(total, 4),
            "tokens_per_second": round(tokens / total, 1),
        }


def refuse_other_starts(start: int, folder: Path, accelerator: Accelerator) -> None:
    """Raises RunError where the processes did not find the same state."""
    starts = distributed.gathered(accelerator, start)
    if len(set(starts)) > 1:
        raise RunError(
            f"the processes would go on from steps {starts}: they do not see the same {folder / 'state'}; "
            "put the run folder where all of them see it"
        )


def refuse_not_finite(
    row: Mapping[str, Any],
    batches: Sequence[Batch],
    graded: Sequence[TokenDivergence],
    folder: Path,
    title: str,
    accelerator: Accelerator,
) -> None:
    """Raises TrainingError where a loss, gradient or log-prob is not finite, on all processes if on one.

    Each process saves its batches first.
    """
    own: list[str] = []
    for batch, tokens in zip(batches, graded, strict=True):
        mask = batch.completions.mask
        fine = torch.ones_like(mask)
        fine[mask] = tokens.loss.isfinite() & batch.completions.logprobs[mask].isfinite()
        own += [e.id for e, ok in zip(batch.examples, fine.all(1).tolist(), strict=True) if not ok]
    # loss and norm are of all processes, and so the same on each
    sound = finite(row["loss"]) and finite(row["grad_norm"])
    if sound and not distributed.on_any(accelerator, bool(own)):
        return
    every = [example for batch in batches for example in batch.examples]
    where = folder / "not-finite"
    with (
        distributed.together(accelerator),
        whole_folder(where / f"process-{accelerator.process_index}") as temporary,
    ):
        for k, (batch, tokens) in enumerate(zip(batches, graded, strict=True)):
            about = {"ids": batch.completions.ids, "mask": batch.completions.mask}
            about |= {"sampler_logprobs": batch.completions.logprobs, **tokens._asdict()}
            save_file(
                {name: x.clone() for name, x in about.items()},
                temporary / f"batch-{k}.safetensors",
            )
        told = [{"id": e.id, "question": e.question, "answer": e.answer} for e in every]
        examples = {"step": row["step"], "not_finite": own, "examples": told}
        (temporary / "examples.json").write_text(json.dumps(examples, indent=1))
    several = accelerator.num_processes > 1
    bad = [
        f"{id} (process {k})" if several else id
        for k, ids in enumerate(distributed.gathered(accelerator, own))
        for id in ids
    ]
    shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    raise TrainingError(
        f"{title}: at step {row['step']} the loss is {row['loss']} and the gradient's norm "
        f"{row['grad_norm']}; not finite are the tokens of "
        f"{shown or f'no example among {every[0].id} to {every[-1].id}, so the gradient alone'}; the batch is "
        f"in {where}, the last good state in {folder / 'state'}; a lower optim.learning_rate may help"
    )


def refuse_overflow(
    step: int,
    rate: float,
    trainable: Trainable,
    optimizer: Optimizers,
    folder: Path,
    title: str,
    decay: float = 0.0,
) -> None:
    """Raises TrainingError where an update left a value, or what the optimizer keeps of it, not finite.

    An infinite second moment, which a gradient beyond 1.8e19 gives, would stop its coordinate for good and say
    nothing. All tensors go through one norm, and so through one wait for the device.
    """
    left = {f"the values of {name}": values for name, values in trainable.state().items()}
    for name, entries in optimizer.state().items():
        for key in MOMENTS:
            if isinstance(moment := entries.get(key), Tensor):
                left[f"{key} of {name}"] = moment
    tensors = [tensor for tensor in left.values() if tensor.numel()]
    if bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite()):
        return
    what, tensor = next((w, x) for w, x in left.items() if not bool(x.isfinite().all()))
    raise TrainingError(
        f"{title}: the update of step {step}, at learning rate {rate:g}, left "
        f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers in {what} not finite; the last good "
        f"state is in {folder / 'state'}; {lower(rate, decay)}, or set optim.max_grad_norm"
    )


def lower(rate: float, decay: float) -> str:
    """Which setting to lower: decay, where it alone makes values grow with every update (|1 - rate * decay| > 1)."""
    if rate * decay > 2:
        return f"lower optim.weight_decay, under which values are multiplied by 1 - {rate:g} * {decay:g}"
    return "lower optim.learning_rate"


def refuse_broken(
    done: int,
    pair: ModelPair,
    batch: Batch,
    tokens: TokenDivergence,
    config: ExperimentConfig,
    folder: Path,
    title: str,
) -> None:
    """Raises TrainingError where the student, after `done` steps, gives a log-prob that is no longer finite.

    Of the step's first micro-batch, whose `tokens` are known: what the next step's loss would find, for weights
    that are kept before there is one.
    """
    mask, chunk = batch.completions.mask, config.loss.chunk_tokens
    logprobs = pair.student_logprobs(batch.prompts, batch.completions, chunk)
    fine = torch.ones_like(mask)
    fine[mask] = logprobs.isfinite() | ~tokens.student_logprobs.isfinite()
    bad = [e.id for e, ok in zip(batch.examples, fine.all(1).tolist(), strict=True) if not ok]
    if bad:
        raise TrainingError(
            f"{title}: after {done} steps the student's log-probs of {', '.join(bad[:5])} are not finite, so these "
            f"weights are not kept; the last good state is in {folder / 'state'}; "
            f"{lower(config.optim.learning_rate, config.optim.weight_decay)}"
        )


def log_samples(
    log: TrainingLog,
    step: int,
    pair: ModelPair,
    batch: Batch,
    tokens: TokenDivergence,
    group: int,
    most: int = 4,
) -> None:
    """A few completions of this step, of different prompts, with both models' log-prob of every token."""
    completions, tokenizer = batch.completions, pair.student.tokenizer
    counts = completions.mask.sum(1).tolist()
    ours, theirs = (
        column.split(counts) for column in (tokens.student_logprobs, tokens.teacher_logprobs)
    )
    chosen = range(0, len(batch.examples), group)[:most]
    rows = []
    for k in chosen:
        ids = completions.ids[k][completions.mask[k]].tolist()
        row = {
            "writer": batch.writers[k],
            "completion": pair.student.transcript(ids),
            "tokens": tokenizer.convert_ids_to_tokens(ids),
            "student_logprobs": [rounded(x) for x in ours[k].tolist()],
            "teacher_logprobs": [rounded(x) for x in theirs[k].tolist()],
        }
        if batch.rewards is not None:
            row["reward"] = float(batch.rewards[k])
        rows.append(row)
    log.samples(step, [batch.examples[k] for k in chosen], rows)


def rounded(logprob: float) -> float | None:
    """For JSON, which has no infinity: a teacher may ban a token."""
    return round(logprob, 4) if math.isfinite(logprob) else None
