"""Stops training at the first number that is not finite, with the examples or the parameter that have it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from vlopd import distributed
from vlopd.config.training import OptimConfig
from vlopd.errors import UserError
from vlopd.files import whole_folder
from vlopd.train.eight_bits import SCALES
from vlopd.train.losses import TokenDivergence
from vlopd.train.metrics import finite
from vlopd.train.optimizer_statistics import MOMENTS
from vlopd.train.optimizers import Optimizers
from vlopd.train.pair import ModelPair
from vlopd.train.rollouts import Batch
from vlopd.train.sparse import Trainable


class TrainingError(UserError):
    """Training cannot continue; the last saved state is intact."""


def refuse_not_finite(
    row: Mapping[str, Any],
    batches: Sequence[Batch],
    tokens: Sequence[TokenDivergence],
    out: Path,
    title: str,
    accelerator: Accelerator,
    remedy: str = "a lower optim.learning_rate may help",
) -> None:
    """Raises TrainingError where a loss, gradient or log-prob is not finite, on all processes if on one.

    Each process saves its batches first. `remedy` ends the message.
    """
    own: list[str] = []
    for batch, each in zip(batches, tokens, strict=True):
        mask = batch.completions.mask
        own += bad_examples(
            batch, each.loss.isfinite() & batch.completions.logprobs[mask].isfinite()
        )
    # loss and norm are sums over all processes, and so the same on each
    sound = finite(row["loss"]) and finite(row["grad_norm"])
    if sound and not distributed.on_any(accelerator, bool(own)):
        return
    every = [example for batch in batches for example in batch.examples]
    where = out / "not-finite"
    with (
        distributed.together(accelerator),
        whole_folder(where / f"process-{accelerator.process_index}") as temporary,
    ):
        for k, (batch, each) in enumerate(zip(batches, tokens, strict=True)):
            columns = {"ids": batch.completions.ids, "mask": batch.completions.mask}
            columns |= {"sampler_logprobs": batch.completions.logprobs}
            columns |= {name: x for name, x in each._asdict().items() if x is not None}
            save_file(
                {name: x.clone() for name, x in columns.items()},
                temporary / f"batch-{k}.safetensors",
            )
        asked = [{"id": e.id, "question": e.question, "answer": e.answer} for e in every]
        about = {"step": row["step"], "not_finite": own, "examples": asked}
        (temporary / "examples.json").write_text(json.dumps(about, indent=1))
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
        f"in {where}, the last good state in {out / 'state'}; {remedy}"
    )


def refuse_overflow(
    step: int,
    rate: float,
    trainable: Trainable,
    optimizer: Optimizers,
    out: Path,
    title: str,
    decay: float = 0.0,
) -> None:
    """Raises TrainingError where an update left a value, or a moment of the optimizer, not finite.

    An infinite second moment, which a gradient beyond 1.8e19 gives, would silently stop its coordinate for good. All
    tensors go through one norm, and so through one device synchronisation: the 2-norm, a fifteenth of the time of the
    largest magnitude on a CPU. Where that overflows, the numbers themselves are looked at.
    """
    left = {f"the values of {name}": values for name, values in trainable.state().items()}
    for name, entries in optimizer.state().items():
        for key in (*MOMENTS, *SCALES):
            if isinstance(moment := entries.get(key), Tensor):
                left[f"{key} of {name}"] = moment
    tensors = [tensor for tensor in left.values() if tensor.numel()]
    if bool(torch.nn.utils.get_total_norm(tensors).isfinite()):
        return
    bad = [(what, tensor) for what, tensor in left.items() if not bool(tensor.isfinite().all())]
    if not bad:
        return
    what, tensor = bad[0]
    raise TrainingError(
        f"{title}: the update of step {step}, at learning rate {rate:g}, left "
        f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers in {what} not finite; the last good "
        f"state is in {out / 'state'}; {lower(rate, decay)}, or set optim.max_grad_norm"
    )


def refuse_broken(
    done: int,
    pair: ModelPair,
    batch: Batch,
    tokens: TokenDivergence,
    chunk_tokens: int,
    optim: OptimConfig,
    out: Path,
    title: str,
) -> None:
    """Raises TrainingError where the student, after `done` steps, has a log-prob that is no longer finite.

    Checked on the step's first micro-batch, whose `tokens` are known, before weights are saved: the next step's loss
    would find it too late.
    """
    logprobs = pair.student_logprobs(batch.prompts, batch.completions, chunk_tokens)
    bad = bad_examples(batch, logprobs.isfinite() | ~tokens.student_logprobs.isfinite())
    if bad:
        raise TrainingError(
            f"{title}: after {done} steps the student's log-probs of {', '.join(bad[:5])} are not finite, so these "
            f"weights are not kept; the last good state is in {out / 'state'}; "
            f"{lower(optim.learning_rate, optim.weight_decay)}"
        )


def bad_examples(batch: Batch, fine: Tensor) -> list[str]:
    """The ids of the examples with a completion token that is not `fine` [N]."""
    by_row = torch.ones_like(batch.completions.mask)
    by_row[batch.completions.mask] = fine
    rows = zip(batch.examples, by_row.all(1).tolist(), strict=True)
    return [example.id for example, ok in rows if not ok]


def lower(rate: float, decay: float) -> str:
    """The setting to lower: decay where it alone makes values grow with every update (|1 - rate * decay| > 1)."""
    if rate * decay > 2:
        return f"lower optim.weight_decay, under which values are multiplied by 1 - {rate:g} * {decay:g}"
    return "lower optim.learning_rate"
