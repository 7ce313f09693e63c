"""Sampling completions from a model: the student in training, any arm in evaluation.

A plain key-value-cache loop rather than `generate`, for three reasons: random numbers are arguments (so a resumed
run samples what an uninterrupted one would, and micro-batches sample what one batch would), the sampler's own
log-probs come with the tokens, and no default of a checkpoint's generation config applies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlopd.models.loaded import LoadedModel
from vlopd.models.packed_linears import packed_linears
from vlopd.train.decoding import (
    SHRINK,
    Decoder,
    Engine,
    accepts_prepared_masks,
    chosen_engine,
)
from vlopd.train.draws import pick
from vlopd.types import Completions, Prompts

CHECK_EVERY = 8
"""Tokens between calls of `enough`, and between looks at which rows are unfinished: each waits for the device."""

LOOK_EVERY = {"cpu": 1}
"""Device type -> tokens between looks, where a look is free."""


@torch.no_grad()
def sample(
    loaded: LoadedModel,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float,
    uniforms: Tensor | None = None,
    columns: int | Tensor | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    banned_ids: Sequence[int] = (),
    enough: Callable[[Tensor, Tensor], Tensor] | None = None,
    rows: Sequence[int] | None = None,
    engine: Engine = "eager",
) -> Completions:
    """Samples completions; temperature 0 is greedy (the first of equal tokens).

    `rows` [B'] are indices of prompts, one for each completion (a prompt is read once, whatever their number); default:
    one a prompt. `uniforms` [B', max_new_tokens] decide the draws (seeding.uniforms); temperature 0 needs none. `top_k`
    and `top_p` truncate the distribution, after the temperature. `columns` restricts sampling to a part of the
    vocabulary (the tokens shared with the teachers): the first `columns` tokens, or ids [V]. Image placeholders,
    padding and `banned_ids` are never sampled. `logprobs` are the model's own over the columns at temperature 1,
    nothing truncated or banned, and so equal to re-scoring however the tokens were drawn. `enough` gets ids and mask
    [B', C] every CHECK_EVERY tokens and returns the rows [B'] to stop. `engine` runs the decode steps (decoding.py).

    Finished rows leave the batch once they are many enough; what is returned is in the order of `rows`.
    """
    device = loaded.device
    columns = loaded.vocabulary_rows if columns is None else columns
    allowed = (
        torch.arange(columns, device=device) if isinstance(columns, int) else columns.to(device)
    )  # [V] ids
    unsampleable = torch.tensor([*loaded.unsampleable_ids, *banned_ids], device=device)
    banned = torch.isin(allowed, unsampleable).nonzero()[:, 0]
    ends = torch.tensor(loaded.end_ids, device=device)
    index = torch.arange(len(prompts)) if rows is None else torch.tensor(rows, dtype=torch.long)
    n, look_every = len(index), LOOK_EVERY.get(device.type, CHECK_EVERY)
    if uniforms is not None:
        uniforms = uniforms.to(device)

    engine = chosen_engine(loaded, engine)[0]
    prepares_masks = engine == "eager" and max_new_tokens > 1 and accepts_prepared_masks(loaded)
    ids = torch.full((n, max_new_tokens), loaded.pad_id, device=device)
    mask = torch.zeros(n, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(n, max_new_tokens, device=device)
    ended = torch.ones(n, dtype=torch.bool, device=device)  # those that have left
    batch = torch.arange(n, device=device)  # [b] the rows that are in the batch
    alive = torch.ones(n, dtype=torch.bool, device=device)  # [b] the unfinished of these
    with packed_linears(loaded, n, max_new_tokens):
        decoder = Decoder(loaded, prompts, max_new_tokens, engine, prepares_masks)
        hidden = decoder.prefill()  # [b, H] of the b rows in the batch
        if not torch.equal(index, torch.arange(len(prompts))):
            index = index.to(device)
            decoder.select(index)
            hidden = hidden.index_select(0, index)
        for position in range(max_new_tokens):
            logits = loaded.logits(hidden, columns).float()  # [b, V]
            uniform = None if uniforms is None else uniforms[batch, position]
            column, logprob = pick(logits, temperature, banned, uniform, top_k, top_p)
            del logits  # not to be there with the next step's
            token = torch.where(alive, allowed[column], loaded.pad_id)
            ids[batch, position], mask[batch, position] = token, alive
            logprobs[batch, position] = torch.where(alive, logprob, 0.0)
            alive = alive & ~(token[:, None] == ends).any(1)
            if enough is not None and position % CHECK_EVERY == CHECK_EVERY - 1:
                stopped = enough(ids[:, : position + 1], mask[:, : position + 1])
                alive = alive & ~stopped[batch]
            if position == max_new_tokens - 1:
                break
            if position % look_every == look_every - 1:
                unfinished = int(alive.sum())
                if not unfinished:
                    break
                if unfinished <= SHRINK[engine] * len(batch):
                    staying = alive.nonzero()[:, 0]
                    decoder.select(staying)
                    batch, alive, token = batch[staying], alive[staying], token[staying]
            hidden = decoder.step(token)
    ended[batch] = ~alive
    longest = int(mask.sum(1).max()) if look_every > 1 else position + 1
    return Completions(ids[:, :longest], mask[:, :longest], logprobs[:, :longest], ended)
