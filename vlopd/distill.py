"""On-policy distillation: the loop. Start reading here.

Each step: 1. the student samples one completion a prompt; 2. the teacher, reading the same example in its
own template and resolution, grades every token of it; 3. the divergence at the completion tokens, averaged
over the whole step, is back-propagated through the student's log-probs only (not through the sampling);
4. the optimizer moves the trained coordinates' fp32 values, which are rounded into the model.

What it does not do, and why: no replay buffer and no importance ratios (each sample is used once, by the
weights that drew it); no reward and no reference model (the teacher's KL is the whole signal); no
`Trainer` subclass and no callbacks (the loop is short enough to edit). Retraining a subnetwork is this
same function with a mask.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlopd import processes, seeding
from vlopd.checkpoint import RunError, whole_file
from vlopd.config import ConfigError, DistillArm, ExperimentConfig, UserError
from vlopd.data import pick
from vlopd.log import TrainingLog
from vlopd.losses import TokenDivergence
from vlopd.models import atlas
from vlopd.optimizers import Optimizers, build_optimizer, learning_rate
from vlopd.pair import ModelPair
from vlopd.trainable import Projection, Trainable
from vlopd.types import Completions, Example, Prompts


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
) -> Trainable:
    """Trains the pair's student in place and returns its trained coordinates.

    Writes metrics.jsonl, samples.jsonl and a resumable state/ into `folder`; a state left there by a
    killed run with the same `identity` (a digest of everything that decides the result) is gone on from.
    `projections` are of the gradients, by parameter; `keep` gets the number of each of train.keep_steps.

    Raises TrainingError when the loss or a gradient is not finite.
    """
    accelerator = accelerator or processes.accelerator()
    train, loss_config = config.train, config.loss
    atlas.freeze(pair.student.model, train.freeze)
    trainable = Trainable(pair.student.model, mask, projections)
    if trainable.count == 0:
        return trainable  # an empty mask trains nothing: the source, as it is
    optimizer = build_optimizer(config.optim, trainable)
    averages = follow_student(pair, mask)
    start = resume(folder / "state", trainable, optimizer, averages, identity)
    share = split_evenly(train.prompts_per_step, accelerator)
    pair.check_teachers_prompt(pick(data, 0, 1, arm.seed))
    with TrainingLog(folder, title, train.steps, start, accelerator.is_main_process) as log:
        for step in range(start, train.steps):
            clock = Stopwatch()
            first = step * train.prompts_per_step + share.start
            mine = pick(data, first, len(share), arm.seed)
            size = train.micro_batch or len(mine)
            batches = [mine[i : i + size] for i in range(0, len(mine), size)]
            draws = seeding.generator(
                accelerator.device, "rollout", arm.seed, step, accelerator.process_index
            )
            clock.lap("data")

            # 1. the student samples
            rollouts: list[tuple[Prompts, Completions]] = []
            for examples in batches:
                prompts = pair.student.render(examples)
                completions = pair.sample(
                    prompts, config.rollout.max_new_tokens, config.rollout.temperature, draws
                )
                rollouts.append((prompts, completions))
            n_tokens = accelerator.reduce(
                torch.tensor(sum(c.n_tokens for _, c in rollouts), device=accelerator.device), "sum"
            )
            clock.lap("rollout")

            # 2. and 3. the teacher grades, the student learns: mean over the step's completion tokens
            trainable.zero_grad()
            graded: list[TokenDivergence] = []
            for examples, (prompts, completions) in zip(batches, rollouts, strict=True):
                tokens = pair.divergence(loss_config, examples, prompts, completions)
                (tokens.loss.sum() / n_tokens).backward()
                graded.append(TokenDivergence(*(column.detach() for column in tokens)))
            clock.lap("gradient")

            # 4. the update
            values = list(trainable.parameters())
            for value in values:
                if accelerator.num_processes > 1 and value.grad is not None:
                    value.grad = accelerator.reduce(value.grad, "sum")
            norm = torch.nn.utils.clip_grad_norm_(values, config.optim.max_grad_norm or math.inf)
            row = summarise(step, graded, [c for _, c in rollouts], float(norm), accelerator)
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                ids = [example.id for example in mine]
                raise TrainingError(
                    f"{title}: loss {row['loss']} and gradient norm {row['grad_norm']} at step {step} "
                    f"(examples {ids[0]} to {ids[-1]}); lower optim.learning_rate; the state of the "
                    f"last {train.save_every} steps is in {folder / 'state'}"
                )
            rate = learning_rate(config.optim, step, train.steps)
            optimizer.step(rate)
            trainable.write_back()
            for average, decay in averages:
                average.move_towards(trainable, 1.0 - decay)
            clock.lap("update")

            log.step({**row, "learning_rate": rate, **clock.seconds(row["completion_tokens"])})
            if step % train.sample_every == 0 and accelerator.is_main_process:
                log_samples(log, step, pair, batches[0][:4], rollouts[0])
            if keep and step + 1 in train.keep_steps and accelerator.is_main_process:
                keep(step + 1, trainable)
            if (step + 1) % train.save_every == 0 and accelerator.is_main_process:
                save_state(folder / "state", step + 1, trainable, optimizer, averages, identity)
    return trainable


# ---------------------------------------------------------------------------------- moving averages

Averages = list[tuple[Trainable, float]]
"""Fp32 values of teachers that are moving averages of the student, each with its decay a step."""


def follow_student(pair: ModelPair, mask: Mapping[str, Tensor] | None) -> Averages:
    """Teachers that follow the student: only the trained coordinates move, so only those are averaged."""
    averages = []
    trains = {name: p.requires_grad for name, p in pair.student.model.named_parameters()}
    for teacher in pair.teachers:
        if teacher.ema is not None:
            for name, parameter in teacher.loaded.model.named_parameters():
                parameter.requires_grad_(trains[name])
            averages.append((Trainable(teacher.loaded.model, mask), teacher.ema))
            teacher.loaded.model.requires_grad_(False)
    return averages


# -------------------------------------------------------------------------------------------- resume


def save_state(
    folder: Path,
    step: int,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
) -> None:
    """One safetensors file: values, the optimizer's state, averages and the step, whole or not at all."""
    tensors = {f"values/{n}": values.contiguous() for n, values in trainable.state().items()}
    plain: dict[str, dict[str, Any]] = {}  # what is no tensor goes to the header, as JSON
    for name, entries in optimizer.state().items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}/{name}"] = value.contiguous()
            else:
                plain.setdefault(name, {})[key] = value
    for k, (average, _) in enumerate(averages):
        tensors |= {
            f"average-{k}/{n}": values.contiguous() for n, values in average.state().items()
        }
    about = {"step": str(step), "identity": identity, "optimizer": json.dumps(plain)}
    with whole_file(folder / "state.safetensors") as temporary:
        save_file(tensors, temporary, about)


def resume(
    folder: Path,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
) -> int:
    """Loads the state, if there is one, and returns the step to go on from.

    Raises RunError for a damaged state or one of another configuration.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it to train this arm from its start"
        ) from None
    if about.get("identity") != identity:
        raise RunError(
            f"{path} is of another configuration; delete it to train this arm from its start"
        )
    trainable.load_state({name: tensors[f"values/{name}"] for name in trainable.slots})
    state: dict[str, dict[str, Any]] = json.loads(about["optimizer"])
    for label, tensor in tensors.items():
        kind, name = label.split("/", 1)
        if kind.startswith("optimizer."):
            state.setdefault(name, {})[kind.removeprefix("optimizer.")] = tensor
    optimizer.load_state(state)
    for k, (average, _) in enumerate(averages):
        average.load_state({name: tensors[f"average-{k}/{name}"] for name in average.slots})
    return int(about["step"])


# --------------------------------------------------------------------------------------- bookkeeping


def split_evenly(count: int, accelerator: Accelerator) -> range:
    """This process's share of a step's prompts. Raises ConfigError where they do not divide."""
    each, left = divmod(count, accelerator.num_processes)
    if left:
        raise ConfigError(
            f"train.prompts_per_step = {count} does not divide among {accelerator.num_processes} processes"
        )
    return range(accelerator.process_index * each, (accelerator.process_index + 1) * each)


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"{name}_seconds"] = round(now - self.last, 4)
        self.last = now

    def seconds(self, tokens: int) -> dict[str, float]:
        total = self.last - self.started
        return {
            **self.laps,
            "seconds": round(total, 4),
            "tokens_per_second": round(tokens / total, 1),
        }


def summarise(
    step: int,
    graded: Sequence[TokenDivergence],
    completions: Sequence[Completions],
    norm: float,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The step's numbers, over all processes: means over completion tokens, in nats."""
    loss, kl, student, teacher = (
        torch.cat(column).double().sum() for column in zip(*graded, strict=True)
    )
    tokens = sum(c.n_tokens for c in completions)
    rows = sum(len(c.ids) for c in completions)
    cut = sum(int((~c.ended).sum()) for c in completions)
    sums = torch.stack([loss, kl, student, teacher, *torch.tensor([tokens, rows, cut]).to(loss)])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    loss, kl, student, teacher, n_tokens, n_rows, n_cut = sums.tolist()
    return {
        "step": step,
        "loss": loss / n_tokens,
        "kl": kl / n_tokens,
        "student_entropy": student / n_tokens,
        "teacher_entropy": teacher / n_tokens,
        "completion_tokens": int(n_tokens),
        "mean_completion_tokens": n_tokens / n_rows,
        "truncated_fraction": n_cut / n_rows,
        "grad_norm": norm,
    }


def log_samples(
    log: TrainingLog,
    step: int,
    pair: ModelPair,
    examples: Sequence[Example],
    rollout: tuple[Prompts, Completions],
) -> None:
    """A few completions of this step with both models' log-prob of every token."""
    completions = rollout[1]
    n = len(examples)
    few = Completions(
        completions.ids[:n], completions.mask[:n], completions.logprobs[:n], completions.ended[:n]
    )
    graded = pair.teacher_logprobs(examples, few)
    counts = few.mask.sum(1).tolist()
    rows = []
    for k, teacher in enumerate(graded.split(counts)):
        ids = few.ids[k][few.mask[k]].tolist()
        own = few.logprobs[k][few.mask[k]].tolist()
        rows.append(
            {
                "completion": pair.student.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "tokens": pair.student.tokenizer.convert_ids_to_tokens(ids),
                "student_logprobs": [round(x, 4) for x in own],
                "teacher_logprobs": [round(x, 4) for x in teacher.tolist()],
            }
        )
    log.samples(step, examples, rows)
