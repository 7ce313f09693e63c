"""On-policy distillation: the training loop. Start reading here.

Each step: 1. the student samples completions of the step's prompts; 2. the teacher's forward pass over them, on the
same examples in its own template and resolution; 3. the loss at the completion tokens, averaged over the whole step,
is back-propagated through the student's log-probs only (not through the sampling); 4. the optimizer updates the
trained coordinates' fp32 values, which are rounded into the model (train.master: and themselves to bf16).

The baselines are this same loop: completions may be the teacher's or the data's (train/rollouts.py), and a reward's
advantages may be mixed into the loss or replace it (train/rewards.py); where nothing is learned from a teacher, none
is needed. Retraining a subnetwork is this loop with a mask.

A signal null (train/signal_nulls.py) is this loop with the gradient of a signal that carries nothing.

There is no replay buffer (a step's completions are used in that step, once unless train.updates_per_rollout says
more; train/replay.py repeats a whole training's), no reference model besides the teacher, and no `Trainer` subclass:
the loop is short enough to edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor

from vlopd import distributed, interrupts
from vlopd.config.input import value_of
from vlopd.config.lora import Lora
from vlopd.config.objective import FunctionLoss, LossConfig
from vlopd.config.recipe import Recipe, training_of
from vlopd.config.signal_nulls import SignalNull, SignalNullConfig
from vlopd.data.load import pick
from vlopd.errors import ConfigError, Interrupted, RunError, one_line_out_of_memory
from vlopd.files import read_json, write_json
from vlopd.masks.importing import in_parameter_names
from vlopd.models import parameter_names
from vlopd.models.loaded import LoadedModel
from vlopd.models.save import save
from vlopd.train.arguments import (
    refuse_other_kinds,
    refuse_other_mask,
    refuse_other_rows,
    refuse_trained,
)
from vlopd.train.checkpointing import recomputed, refuse_without_layers
from vlopd.train.checks import TrainingError, refuse_broken, refuse_not_finite, refuse_overflow
from vlopd.train.log import Stopwatch, TrainingLog, sample_rows
from vlopd.train.lora import LoraTrainable, refuse_unlike
from vlopd.train.losses import TokenDivergence
from vlopd.train.memory_use import MemoryUse
from vlopd.train.metrics import summarise
from vlopd.train.offload import HOST, Resting
from vlopd.train.optimizer_statistics import UpdateStatistics
from vlopd.train.optimizers import build_optimizer, learning_rate
from vlopd.train.packing import sampling_budget
from vlopd.train.pair import ModelPair
from vlopd.train.prefetch import read_ahead
from vlopd.train.replay import Replay
from vlopd.train.resume import Averages, BackgroundWriter, chosen_before, resume, save_state
from vlopd.train.rollout_engine import rollout_engine
from vlopd.train.rollouts import Batch, collect, sampling_notes
from vlopd.train.rollouts_ahead import RolloutsAhead
from vlopd.train.sharding import ShardedTrainable
from vlopd.train.signal_nulls import Forwards, NullSignal, NullUpdate
from vlopd.train.sparse import Trainable
from vlopd.train.teacher_cache import TeacherCache
from vlopd.train.token_selection import loss_tokens, token_weights
from vlopd.train.trainables import refuse_unsharded, trainable_of
from vlopd.types import Completions, Example, Prompts
from vlopd.weights.stored import rounded_on_load, stored_tensors
from vlopd.weights.subspace import Projection

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Evaluate = Callable[[LoadedModel], Mapping[str, Mapping[str, float]]]
"""Scores a model on held-out questions: {task: {metric: mean}}."""


@dataclass(frozen=True)
class Hooks:
    """What observes a training run; nothing here affects its numbers. Called in the first of several processes."""

    keep: Callable[[int, Trainable], None] | None = None
    """Called after each of train.keep_steps, with its number."""
    evaluate: Evaluate | None = None
    """Scores the student, for heldout.jsonl: before the first step, after the last, and every `evaluate_every`."""
    evaluate_every: int | None = None
    trackers: Sequence[GeneralTracker] = ()
    """Started trackers of accelerate, finished with the training (train/log.py: open_trackers)."""

    def evaluates(self, done: int, steps: int) -> bool:
        """Whether the student is scored after `done` of `steps` steps."""
        every = self.evaluate_every
        is_due = done in (0, steps) or bool(every and done % every == 0)
        return self.evaluate is not None and is_due


@dataclass(frozen=True, repr=False)
class Trained:
    """A finished training run: the student, its trained coordinates, the folder with the logs.

    The frames need pandas, the plot matplotlib; both load on first use.
    """

    student: LoadedModel
    trainable: Trainable
    out: Path
    recipe: Recipe
    temporary: TemporaryDirectory[str] | None = None
    """The folder where `distill` got none; removed with this object."""

    @property
    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl, one row a step (docs/run-folder.md): loss, kl, rewards, entropies, norms, seconds."""
        from vlopd.train.curves import read_frame

        return read_frame(self.out / "metrics.jsonl")

    @property
    def samples(self) -> pd.DataFrame:
        """samples.jsonl, one row a sampled completion: step, id, question, reference, completion, log-probs."""
        from vlopd.train.curves import read_frame

        return read_frame(self.out / "samples.jsonl")

    @property
    def held_out(self) -> pd.DataFrame:
        """heldout.jsonl, one row a step and task; empty where `hooks.evaluate` was not given."""
        from vlopd.train.curves import read_frame

        return read_frame(self.out / "heldout.jsonl")

    @property
    def memory(self) -> dict[str, Any]:
        """memory.json: bytes by part, as `vlopd check` predicts them, and peaks by phase (docs/run-folder.md)."""
        return read_json(self.out / "memory.json")

    def plot(self) -> Figure:
        """Draws loss, KL, reward and held-out scores by optimizer step."""
        from vlopd.train.curves import plot_curves

        return plot_curves(self.metrics, self.held_out, repr(self))

    def __repr__(self) -> str:
        n, total = self.trainable.count, self.trainable.total
        return (
            f"Trained({self.student.name}: {training_of(self.recipe)}, {self.recipe.train.steps} steps, "
            f"{n:,} of {total:,} coordinates, {self.out})"
        )

    def _repr_html_(self) -> str:
        from vlopd.train.curves import curves_html

        return curves_html(self.metrics, self.held_out, repr(self))

    def save(self, folder: Path | str) -> None:
        """Writes the student as a Hugging Face folder, each tensor in the dtype of the checkpoint it came from."""
        model = self.student.model
        with stored_tensors(self.student) as stored:
            state = {**model.state_dict(), **self.trainable.merged(dict(stored))}
        own = {name for name, _ in model.named_parameters()}
        for name, _ in model.named_parameters(remove_duplicate=False):
            if name not in own:  # tied to another, under whose name alone the trained values are
                del state[name]
        save(self.student, Path(folder), f"{self.student.name}, trained by vlopd.\n", state)

    def save_adapter(self, folder: Path | str) -> None:
        """Writes the LoRA as an adapter folder of PEFT. Raises ConfigError where the weights were trained."""
        if not isinstance(self.trainable, LoraTrainable):
            raise ConfigError("no LoRA was trained: distill(..., lora={...}), or save(folder)")
        self.trainable.save_adapter(Path(folder), self.student.name)


@one_line_out_of_memory("start")
def distill(
    pair: ModelPair,
    data: Sequence[Example],
    recipe: Recipe,
    out: Path | str | None = None,
    seed: int = 1,
    mask: Mapping[str, Tensor] | None = None,
    hooks: Hooks = Hooks(),
    *,
    projections: Mapping[str, Projection] | None = None,
    lora: Lora | Mapping[str, Any] | None = None,
    identity: str | None = None,
    title: str | None = None,
    accelerator: Accelerator | None = None,
    null: SignalNull | str | None = None,
    replay: Path | str | None = None,
    teacher_cache: Path | str | None = None,
) -> Trained:
    """Trains the pair's student in place; each training needs a newly loaded pair.

    Args:
        pair: student and teachers of `load_pair`, loaded anew for each training; the teachers stay fixed, but for
            moving averages of the student.
        data: the prompts, a sequence of examples (`load_data`), drawn in an order that depends on `seed` alone; a
            thread reads those of the next step ahead.
        recipe: where completions come from, loss, reward, optimizer, steps.
        out: folder for metrics.jsonl, samples.jsonl and, where asked for, optimizer.jsonl and heldout.jsonl, which
            replace those of an earlier training there; None: a temporary one that lives as long as the result.
        seed: of the data order and the sampling.
        mask: {parameter: bool tensor of its shape}, or by the names and shapes of the student's checkpoint; only its
            true coordinates train. One of `make_mask` must be of the student's checkpoint.
        hooks: what observes the training.
        projections: of the gradients, by parameter.
        lora: a table as an arm's `lora`: a LoRA trains in place of the weights, and is merged into the student at the
            end (`Trained.save_adapter` writes it alone).
        identity: a digest of everything that decides the result; with it the state is saved every train.save_every
            steps in `out`, and training resumes from a saved state whose `identity` matches.
        title: name of the run in messages; by default the folder's.
        accelerator: of this process; by default a GPU if there is one.
        null: a signal null, such as "rademacher" (docs/geometry.md): trains on a signal that carries nothing.
        replay: the folder of a training with train.keep_completions, whose completions are taken instead of sampled;
            it needs the same data, seed and rollout.
        teacher_cache: the folder where train.teacher_cache_gb keeps hidden states; by default in `out`.

    Returns a Trained. Raises ConfigError for a pair, data, mask and recipe that do not fit together; TrainingError
    when the loss, a gradient, a log-prob or an updated value is not finite; OutOfMemory. Of several processes all
    raise where one does.

    >>> pair = load_pair("builtin:shapes-text-student", "builtin:shapes-text-teacher")
    >>> data = load_data("shapes", modality="text", size=1000)
    >>> distill(pair, data, Recipe(train={"steps": 20, "prompts_per_step": 8}), "out/full").plot()
    """
    refuse_other_kinds(pair, data, recipe, seed)
    temporary = None
    if out is None:
        temporary = TemporaryDirectory(prefix="vlopd-")
        out, title = temporary.name, title or pair.student.name
    out = Path(out)
    if out.is_file():
        raise ConfigError(f"out = {out} is a file; give a folder")
    title = out.name if title is None else title
    accelerator = accelerator or distributed.accelerator()
    train, optim, group = recipe.train, recipe.optim, recipe.rollout.completions_per_prompt
    main = accelerator.is_main_process
    replayed = None if replay is None else Replay(Path(replay))
    kept = Replay(out) if train.keep_completions else None
    with distributed.together(accelerator):
        null = usable_null(null, recipe, replay)
        if null is not None and null.type == "random_gradient":
            pair = pair.without_teachers()
        elif recipe.needs_teacher and not pair.teachers:
            raise ConfigError(
                f"{recipe.needs_teacher} needs a teacher: load_pair(student, teacher)"
            )
        if len(data) == 0:
            raise ConfigError(
                f"{title}: the data has no examples; load_data(source, size=...) loads some"
            )
        refuse_other_rows(data)
        for use in recipe.plugins:
            use.check()
        if mask is not None:
            refuse_other_mask(mask, pair.student)
            mask = in_parameter_names(mask, pair.student, partial=True)
        if lora is not None:
            low_rank: Lora = value_of(Lora, lora, "lora")
            is_average = any(its.ema is not None for its in pair.teachers)
            others = {"a mask": mask is not None, "projections": projections is not None}
            refuse_unlike(low_rank, {**others, "a teacher that averages the student": is_average})
        if train.sharding != "none":
            refuse_unsharded(recipe, lora is not None)
        refuse_trained(pair.student)
        parameter_names.freeze(pair.student.model, train.freeze)
        offload = train.offload_optimizer
        if lora is not None:
            trainable: Trainable = LoraTrainable(pair.student, low_rank, seed, offload)
        else:
            with rounded_on_load(pair.student) as stored:
                trainable = trainable_of(
                    pair.student.model, recipe, accelerator, mask, projections, stored
                )
        if trainable.count == 0:
            raise ConfigError(
                f"{title}: nothing is left to train: the mask has no coordinate outside of train.freeze = "
                f"{list(train.freeze)}; the arm would be the base under another name"
            )
        pair = replace(pair, student=trainable.student(pair.student))
        optimizer = build_optimizer(optim, trainable)
        averages = follow_student(pair, recipe, accelerator, mask)
        if train.activation_checkpointing:
            refuse_without_layers(pair.student.model)
        start, chosen = 0, {}
        if identity is not None:
            start = resume(out / "state", trainable, optimizer, averages, identity)
            chosen = chosen_before(out / "state") if start > 0 else {}
        share = split_evenly(train.prompts_per_step, accelerator)
        refuse_other_teachers(pair, recipe)
        if recipe.needs_teacher:
            pair = pair.for_loss(recipe.loss)
        if train.teacher_cache_gb is not None:
            if replay is None and "student" in recipe.rollout.source.shares:
                raise ConfigError(
                    "train.teacher_cache_gb keeps what a teacher made of completions that come again, and the "
                    "student's do not; leave it out, or take completions from the data, the teacher or a replay"
                )
            kept_in, most = Path(teacher_cache or out / "teacher-cache"), train.teacher_cache_gb
            pair = pair.with_teacher_cache(TeacherCache(kept_in, int(1e9 * most)))
        if lora is not None and not isinstance(recipe.rollout.engine, str):
            raise ConfigError(
                "rollout.engine sends trained weights, and a LoRA has none; leave it out"
            )
        pair.check_teachers_prompt(pick(data, 0, 1, seed))
        signal = None if null is None else NullSignal.of(null, pair, recipe, seed, share)
        measured = recipe if signal is None else signal.measured
        log = TrainingLog(out, title, train.steps, start, main, hooks.trackers)
        if kept is not None and start == 0 and main:
            kept.clear()
    refuse_other_starts(start, out, accelerator)
    engine = None
    samples = replayed is None and "student" in recipe.rollout.source.shares
    if samples:
        probes = partial(pick, data, 0, min(2, len(data)), seed)
        engine = rollout_engine(pair, recipe.rollout.engine, trainable, accelerator, probes)
    samples_here = samples and engine is None
    if engine is not None:
        pair = replace(pair, sampler=engine.sample)
        with distributed.together(accelerator):
            engine.follow(start, main)
    chosen = chosen or {"sampling_bytes": sampling_budget(accelerator, recipe, trainable.count)}
    read = read_ahead(pair, data, share, train.prompts_per_step, seed, range(start, train.steps))
    remedy = "a lower optim.learning_rate may help"
    if isinstance(recipe.loss, FunctionLoss):
        remedy = f"check the loss {recipe.loss.type}, or lower optim.learning_rate"
    has_gradient = start > 0  # whether any trained value has had one
    teachers = Resting(pair.teachers, pair.student.device, train.offload_teacher)
    followers = [average for average, _ in averages]
    memory = MemoryUse(pair, recipe.rollout, trainable, optimizer, followers)
    pending, ahead = Replay(out / "state" / "ahead"), None
    if engine is not None and recipe.rollout.max_lag:
        coming = range(start, train.steps)
        size = chosen["sampling_bytes"]
        ahead = RolloutsAhead(pair, engine, recipe, share, seed, coming, read, size)
    with (
        log,
        closing(read),
        trainable,
        memory,
        ahead or nullcontext(),
        BackgroundWriter() as writer,
    ):
        for note in recipe.notes:
            log.note(note)
        memory.enter("evaluation")
        if start == 0:
            evaluate_held_out(hooks, 0, train.steps, pair.student, log, accelerator)
        if ahead is not None:
            with distributed.together(accelerator):
                ahead.begin(pending if start > 0 else None)
        for step in range(start, train.steps):
            clock, lag = Stopwatch(memory.enter), {}
            clock.start("data")
            if samples_here:
                trainable.assemble()
            with distributed.together(accelerator):
                given = None
                if ahead is None:
                    rendered = next(read)
                else:
                    clock.start("rollout")
                    rendered, given, behind = ahead.next()
                    lag = {"rollout_lag": behind}
                rate = learning_rate(optim, step, train.steps)

                # 1. the student samples (or the teacher or the data writes)
                clock.start("rollout")
                trainable.zero_grad()  # sampling gets their memory
                size = chosen["sampling_bytes"]
                with teachers.awake("teacher" in recipe.rollout.source.shares):
                    if step == start:
                        for note in sampling_notes(pair, recipe, rendered, size):
                            log.note(note)
                    where = (share, seed, step, size)
                    if replayed is not None:
                        ids = [each.example.id for each in rendered for _ in range(group)]
                        places = range(share.start * group, share.stop * group)
                        given = replayed.read(step, places, ids, pair.student.device)
                    batches = collect(pair, recipe, rendered, *where, memory.sampled, given)
                memory.rolled_out(batches)
            if kept is not None:
                kept.write(step, batches, accelerator)
            if signal is not None:
                batches = signal.rewarded(step, batches)

            rows: list[dict[str, Any]] = []
            forwards: Forwards | None = {} if train.updates_per_rollout > 1 else None
            if train.offload_teacher or (signal is not None and signal.needs_forwards):
                # the teachers' phase first, over all micro-batches, so that they move once a step
                clock.start("teacher")
                with distributed.together(accelerator), teachers.awake():
                    forwards = teacher_forwards(pair, batches)
            for update in range(train.updates_per_rollout):
                # 2. and 3. the teacher's forward pass, the loss, the student's backward pass
                trainable.zero_grad()
                drawn = None if signal is None else signal.update(step, update, batches, forwards)
                loss, tokens = backward(
                    *(pair, measured, batches, accelerator, clock),
                    *(forwards, memory, drawn, trainable),
                )
                clock.start("update")
                if signal is not None and signal.is_gradient:
                    given_norm = None if replayed is None else replayed.norm(step)
                    signal.draw_gradients(trainable, step, update, given_norm)
                    norm = trainable.clip(optim.max_grad_norm or math.inf)
                else:
                    norm = gather_gradients(trainable, optim.max_grad_norm, accelerator)
                has_gradient |= any(value.grad is not None for value in trainable.parameters())
                rows.append(summarise(step, loss, norm, batches, tokens, group, accelerator))
                refuse_not_finite(rows[-1], batches, tokens, out, title, accelerator, remedy)

                # 4. the update
                with distributed.together(accelerator):
                    if update == 0 and step % train.sample_every == 0:
                        log.samples(step, *sample_rows(pair.student, batches, tokens, group))
                    is_due = train.evidence_every and step % train.evidence_every == 0
                    statistics = UpdateStatistics(trainable) if is_due and update == 0 else None
                    optimizer.step(rate)
                    refuse_overflow(
                        step, rate, trainable, optimizer, out, title, optim.weight_decay
                    )
                    if train.master != "fp32":
                        stochastic = train.master == "bf16_stochastic"
                        stream = ("rounding", seed, step, update)
                        trainable.round_to_bf16(*stream, stochastic=stochastic)
                    if statistics is not None:
                        log.append("optimizer.jsonl", statistics.rows(step, trainable, optimizer))
                trainable.write_back()  # of sharded values a collective call
            for average, decay in averages:
                average.move_towards(trainable, 1.0 - decay)
            done = step + 1
            sent: dict[str, float] = {}
            stops = distributed.on_any(accelerator, interrupts.asked())
            keeps = done in train.keep_steps
            saves = done % train.save_every == 0 or stops
            with distributed.together(accelerator):
                if done in (start + 1, train.steps):
                    about_memory = memory.about()  # in every process: it ends the counting
                    if main:
                        write_json(out / "memory.json", about_memory)
            is_last = done == train.steps
            if (
                engine is not None
                or keeps
                or saves
                or is_last
                or hooks.evaluates(done, train.steps)
            ):
                trainable.assemble()
            if engine is not None and done < train.steps:
                clock.start("synchronise")
                with distributed.together(accelerator):
                    if ahead is not None:
                        ahead.wait()
                    sent = engine.follow(done, main)
            clock.start(None)
            memory.enter("evaluation")

            if keeps or saves or done == train.steps:
                with distributed.together(accelerator):
                    chunk = recipe.loss.chunk_tokens
                    refuse_broken(done, pair, batches[0], tokens[0], chunk, optim, out, title)
                    if done == train.steps and not has_gradient:
                        refuse_untrained(done, trainable, title)
            row = rows[0]  # of the weights that sampled the completions
            with distributed.together(accelerator):
                log.step(
                    {
                        **row,
                        "learning_rate": rate,
                        **sent,
                        **lag,
                        **clock.seconds(row["completion_tokens"]),
                    }
                )
            evaluate_held_out(hooks, done, train.steps, pair.student, log, accelerator)
            if keeps or done == train.steps:
                trainable.collect()
            with distributed.together(accelerator):
                if hooks.keep and keeps and main:
                    hooks.keep(done, trainable)
                if saves:
                    writer.wait()  # for the state before
            if saves and identity is not None:
                if ahead is not None:
                    ahead.save(pending, accelerator)
                folder, about = out / "state", (identity, chosen, writer if main else None, main)
                # of sharded values collective: no process may leave it for another's error
                sharded = isinstance(trainable, ShardedTrainable)
                with nullcontext() if sharded else distributed.together(accelerator):
                    save_state(folder, done, trainable, optimizer, averages, *about)
            if stops and not is_last:
                with distributed.together(accelerator):
                    writer.wait()
                raise Interrupted(
                    f"{title}: stopped after step {done} of {train.steps}; run the same command again to go on"
                )
        with distributed.together(accelerator):
            writer.wait()
    if isinstance(trainable, LoraTrainable):
        trainable.fold()
    return Trained(pair.student, trainable, out, recipe, temporary)


def backward(
    pair: ModelPair,
    recipe: Recipe,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    clock: Stopwatch,
    forwards: Forwards | None = None,
    memory: MemoryUse | None = None,
    drawn: NullUpdate | None = None,
    trainable: Trainable | None = None,
) -> tuple[float, list[TokenDivergence]]:
    """Accumulates the gradient of the step's loss over this process's micro-batches, each in chunks of tokens.

    `forwards` caches the teachers' forward passes from one update to the next: within a step teachers do not change.
    `memory` counts what the student's forward pass keeps. With a signal null the gradient is that of `drawn`.
    Returns this process's part of the loss, and loss and diagnostics of every token, by micro-batch.
    """
    n_tokens, n_completions = count(batches, recipe.loss, accelerator)
    longest = recipe.rollout.max_new_tokens
    found: dict[int, TokenDivergence] = {}
    loss = 0.0

    def idle(prompts: Prompts, completions: Completions) -> None:
        with student_forward(pair, recipe, memory), torch.set_grad_enabled(learns):
            hidden = pair.student.completion_hidden(prompts, completions)
            if learns:
                hidden.backward(torch.zeros_like(hidden))

    learns = drawn is None or not drawn.is_measured_alone
    passes: AbstractContextManager[Iterable[int]] = nullcontext(range(len(batches)))
    if trainable is not None:
        passes = trainable.passes(batches, accelerator, idle)
    with distributed.together(accelerator), passes as order:
        for k in order:
            batch = batches[k]
            completions = batch.completions
            theirs = None if forwards is None else forwards.get(k)
            if theirs is not None:
                theirs = [each.to(pair.student.device) for each in theirs]
            else:
                clock.start("teacher")
                theirs = pair.teacher_forward(batch.examples, completions, batch.rendered)
                if forwards is not None:
                    forwards[k] = theirs
            clock.start("student")
            weights = token_weights(recipe.loss, completions.mask, n_tokens, n_completions, longest)
            signed = weights if drawn is None else drawn.weighted(batch, weights)
            with student_forward(pair, recipe, memory), torch.set_grad_enabled(signed is not None):
                tokens = pair.loss_of(
                    recipe.loss,
                    theirs,
                    batch.prompts,
                    completions,
                    recipe.reward,
                    batch.advantages,
                    signed,
                    learned=None if drawn is None else drawn.learned(k, theirs),
                )
            loss += float((tokens.loss * weights).sum())
            found[k] = tokens
    return loss, [found[k] for k in range(len(batches))]


def teacher_forwards(pair: ModelPair, batches: Sequence[Batch]) -> Forwards:
    """The teachers' forward passes over all of a step's micro-batches, their hidden states in host memory."""
    return {
        k: [
            each.to(HOST)
            for each in pair.teacher_forward(batch.examples, batch.completions, batch.rendered)
        ]
        for k, batch in enumerate(batches)
    }


def student_forward(
    pair: ModelPair, recipe: Recipe, memory: MemoryUse | None
) -> AbstractContextManager[None]:
    """What the student's forward pass runs in: activation checkpointing, and the count of what it keeps."""
    on = recipe.train.activation_checkpointing
    return recomputed(pair.student.model, on) if memory is None else memory.saved(on)


def gather_gradients(
    trainable: Trainable, max_norm: float | None, accelerator: Accelerator
) -> float:
    """Sums gradients over processes and clips them; returns their norm before clipping.

    A process without a gradient of a value (none of its rows has a picture, say) adds zeros. Where no process has
    one, the value has none, as with a single process: optimizers skip it, weight decay included.
    """
    trainable.wait()
    values = list(trainable.parameters())
    if isinstance(trainable, ShardedTrainable):
        trainable.free_unused(accelerator)
    elif accelerator.num_processes > 1:
        has = [float(value.grad is not None) for value in values]
        anywhere = accelerator.reduce(torch.tensor(has, device=accelerator.device), "sum").tolist()
        for value, processes_with in zip(values, anywhere, strict=True):
            if processes_with:
                own = torch.zeros_like(value) if value.grad is None else value.grad
                total = accelerator.reduce(own.to(accelerator.device), "sum")
                value.grad = total.to(value.device)
    return trainable.clip(max_norm or math.inf)


def usable_null(
    null: SignalNull | str | None, recipe: Recipe, replay: Path | str | None
) -> SignalNull | None:
    """The signal null. Raises ConfigError where the recipe has nothing that it could replace."""
    if null is None:
        return None
    found: SignalNull = value_of(SignalNullConfig, null, "null")
    if replay is not None and found.replay is None:
        found = found.model_copy(update={"replay": str(replay)})
    if replay is None and found.replay is not None:
        raise ConfigError(f"null.replay = {found.replay!r}: give distill the folder as `replay`")
    try:
        found.refuse_other_recipes(recipe)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return found


def follow_student(
    pair: ModelPair,
    recipe: Recipe,
    accelerator: Accelerator,
    mask: Mapping[str, Tensor] | None,
) -> Averages:
    """Teachers that are moving averages of the student. Only the trained coordinates differ and are averaged."""
    averages = []
    trains = {name: p.requires_grad for name, p in pair.student.model.named_parameters()}
    for teacher in pair.teachers:
        if teacher.ema is not None:
            for name, parameter in teacher.loaded.model.named_parameters():
                parameter.requires_grad_(trains[name])
            with rounded_on_load(teacher.loaded) as stored:
                own = (teacher.loaded.model, recipe, accelerator, mask, None, stored)
                average = trainable_of(*own, is_average=True)
            average.close()  # it has no gradients
            averages.append((average, teacher.ema))
            teacher.loaded.model.requires_grad_(False)
    return averages


def refuse_other_teachers(pair: ModelPair, recipe: Recipe) -> None:
    """Raises ConfigError where the pair was loaded with other teachers than the recipe's, or other contexts of them."""
    loaded = [(its.loaded.name, its.context, its.ema) for its in pair.teachers]
    student = pair.student.name
    wanted = [
        (student if its.is_student else its.model, its.context, its.ema)
        for its in recipe.teachers.values()
    ]
    if loaded and wanted and loaded != wanted:
        raise ConfigError(
            f"the pair's teachers are {[name for name, *_ in loaded]}, the recipe's {[name for name, *_ in wanted]}, "
            "or in another context: load_pair(student, recipe.teacher)"
        )


def split_evenly(prompts: int, accelerator: Accelerator) -> range:
    """This process's share of a step's prompts. Raises ConfigError where they do not divide."""
    each, left = divmod(prompts, accelerator.num_processes)
    if left:
        raise ConfigError(
            f"train.prompts_per_step = {prompts} does not divide among {accelerator.num_processes} processes"
        )
    return range(accelerator.process_index * each, (accelerator.process_index + 1) * each)


def count(batches: Sequence[Batch], loss: LossConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Completion tokens with a loss and completions of the step, over all processes."""
    tokens = sum(int(loss_tokens(loss, b.completions.mask.sum(1)).sum()) for b in batches)
    own = [tokens, sum(len(b.examples) for b in batches)]
    sums = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum")
    return int(sums[0]), int(sums[1])


def evaluate_held_out(
    hooks: Hooks,
    done: int,
    steps: int,
    student: LoadedModel,
    log: TrainingLog,
    accelerator: Accelerator,
) -> None:
    """Scores the student after `done` of `steps` steps, if due; the first process writes the scores."""
    if hooks.evaluate is not None and hooks.evaluates(done, steps):
        with distributed.in_step(accelerator):
            scores = hooks.evaluate(student)
            if accelerator.is_main_process:
                log.held_out(done, scores)


def refuse_other_starts(start: int, out: Path, accelerator: Accelerator) -> None:
    """Raises RunError where the processes did not find the same saved state."""
    starts = distributed.gathered(accelerator, start)
    if len(set(starts)) > 1:
        raise RunError(
            f"the processes would resume from steps {starts}: they do not see the same {out / 'state'}; "
            "put the run folder where all of them see it"
        )


def refuse_untrained(done: int, trainable: Trainable, title: str) -> None:
    """Raises TrainingError: no trained parameter was used in any forward pass."""
    raise TrainingError(
        f"{title}: in {done} steps no trained parameter got a gradient, so this arm would be the base; the data does "
        f"not use {next(iter(trainable.slots))}, for one: see train.freeze, the arm's mask and data.image"
    )
