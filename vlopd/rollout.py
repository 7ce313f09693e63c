"""Sampling completions from a model: the student while distilling, any arm while evaluating.

A plain key-value-cache loop rather than `generate`, for three reasons: the random numbers come from a
generator that we own (so a resumed run samples what an uninterrupted one would), the sampler's own
log-probs come with the tokens, and no default of a checkpoint's generation config can slip in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from vlopd.models import families
from vlopd.models.load import LoadedModel
from vlopd.types import Completions, Prompts


@torch.no_grad()
def sample(
    loaded: LoadedModel,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None = None,
    columns: int | Tensor | None = None,
) -> Completions:
    """Samples one completion a prompt; temperature 0 takes the likeliest token (the first of equals).

    `columns` limits sampling to a part of the vocabulary (what the teachers have too): the first so many
    tokens, or these ids [V]. Image placeholders and padding are never sampled. `logprobs` are the model's
    own over the columns at temperature 1 with nothing banned, so that they equal what re-scoring gives.
    """
    model, body = loaded.model, families.body(loaded.model)
    columns = loaded.vocabulary_rows if columns is None else columns
    allowed = (
        torch.arange(columns, device=loaded.device)
        if isinstance(columns, int)
        else columns.to(loaded.device)
    )  # [V] ids
    unsampleable = torch.tensor(loaded.unsampleable_ids, device=loaded.device)
    banned = torch.isin(allowed, unsampleable)
    ends = torch.tensor(loaded.end_ids, device=loaded.device)
    attention, ids = prompts.attention_mask, prompts.input_ids
    extra = {**prompts.per_token, **prompts.per_image}
    cache = DynamicCache(config=model.config.get_text_config())
    alive = torch.ones(len(prompts), dtype=torch.bool, device=loaded.device)
    tokens, logprobs, masks = [], [], []
    where = families.position_ids(model, prompts, max_new_tokens)
    for _ in range(max_new_tokens):
        now = slice(attention.shape[1] - ids.shape[1], attention.shape[1])
        out = body(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=cache,
            use_cache=True,
            **{name: values[..., now] for name, values in where.items()},
            **extra,
        )
        logits = loaded.logits(out.last_hidden_state[:, -1], columns).float()  # [B, V]
        column = draw(logits, temperature, banned, generator)
        logprob = logits.gather(1, column[:, None])[:, 0] - logits.logsumexp(-1)
        token = torch.where(alive, allowed[column], loaded.pad_id)
        tokens.append(token)
        logprobs.append(logprob * alive)
        masks.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if not alive.any():
            break
        ids, extra = token[:, None], {}
        attention = torch.cat([attention, attention.new_ones(len(prompts), 1)], 1)
    return Completions(
        torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1), ended=~alive
    )


def draw(
    logits: Tensor, temperature: float, banned: Tensor, generator: torch.Generator | None
) -> Tensor:
    """[B, V] logits, [V] banned -> [B] columns, by inverting the cumulative distribution at one uniform a row.

    (`torch.multinomial` draws an exponential for every vocabulary entry: a fifth of the time of a
    rollout at 49,000 entries.)
    """
    logits = logits.masked_fill(banned, -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    uniform = torch.rand(
        len(logits), 1, generator=generator, device=logits.device, dtype=torch.float64
    )
    # `right=True`: the first entry whose cumulative probability exceeds the draw, so never one of mass 0
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return picked.clamp(max=logits.shape[1] - 1)
