"""Sampling completions from a model: the student in training, any arm in evaluation.

A plain key-value-cache loop rather than `generate`, for three reasons: random numbers are arguments (so a resumed
run samples what an uninterrupted one would, and micro-batches sample what one batch would), the sampler's own
log-probs come with the tokens, and no default of a checkpoint's generation config applies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from vlopd.models import families
from vlopd.models.loaded import LoadedModel
from vlopd.types import Completions, Prompts

CHECK_EVERY = 8
"""Tokens between calls of `enough`."""


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
) -> Completions:
    """Samples one completion a prompt, or of the prompts `rows`; temperature 0 is greedy (the first of equal tokens).

    `uniforms` [B, max_new_tokens] decide the draws (seeding.uniforms); temperature 0 needs none. `top_k` and
    `top_p` truncate the distribution, after the temperature. `columns` restricts sampling to a part of the
    vocabulary (the tokens shared with the teachers): the first `columns` tokens, or ids [V]. Image placeholders,
    padding and `banned_ids` are never sampled. `logprobs` are the model's own over the columns at temperature 1,
    nothing truncated or banned, and so equal to re-scoring however the tokens were drawn. `enough` gets ids and mask
    [B, C] every CHECK_EVERY tokens and returns the rows [B] to stop.
    """
    model, body = loaded.model, families.backbone(loaded.model)
    columns = loaded.vocabulary_rows if columns is None else columns
    allowed = (
        torch.arange(columns, device=loaded.device)
        if isinstance(columns, int)
        else columns.to(loaded.device)
    )  # [V] ids
    unsampleable = torch.tensor([*loaded.unsampleable_ids, *banned_ids], device=loaded.device)
    banned = torch.isin(allowed, unsampleable)
    ends = torch.tensor(loaded.end_ids, device=loaded.device)
    attention, ids = prompts.attention_mask, prompts.input_ids
    extra = {**prompts.per_token, **prompts.per_image}
    cache = DynamicCache(config=model.config.get_text_config())
    alive = torch.ones(len(prompts), dtype=torch.bool, device=loaded.device)
    tokens, logprobs, masks = [], [], []
    where = families.position_ids(model, prompts, max_new_tokens)
    if uniforms is not None:
        uniforms = uniforms.to(loaded.device)
    for position in range(max_new_tokens):
        now = slice(attention.shape[1] - ids.shape[1], attention.shape[1])
        out = body(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=cache,
            use_cache=True,
            **{name: values[..., now] for name, values in where.items()},
            **extra,
        )
        last = out.last_hidden_state[:, -1]
        if position == 0 and rows is not None:
            index = torch.tensor(rows, device=loaded.device)
            cache.batch_select_indices(index)
            last, attention = last[index], attention[index]
            where = {name: values[..., index, :] for name, values in where.items()}
            alive = torch.ones(len(rows), dtype=torch.bool, device=loaded.device)
        logits = loaded.logits(last, columns).float()  # [B, V]
        uniform = None if uniforms is None else uniforms[:, position]
        column = draw(logits, temperature, banned, uniform, top_k, top_p)
        logprob = logits.gather(1, column[:, None])[:, 0] - logits.logsumexp(-1)
        token = torch.where(alive, allowed[column], loaded.pad_id)
        tokens.append(token)
        logprobs.append(logprob * alive)
        masks.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if enough is not None and position % CHECK_EVERY == CHECK_EVERY - 1:
            alive = alive & ~enough(torch.stack(tokens, 1), torch.stack(masks, 1))
        if not alive.any():
            break
        ids, extra = token[:, None], {}
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
    return Completions(
        torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1), ended=~alive
    )


def draw(
    logits: Tensor,
    temperature: float,
    banned: Tensor,
    uniform: Tensor | None,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """[B, V] logits, [V] banned, [B] uniforms -> [B] columns, by inverting the cumulative distribution.

    (`torch.multinomial` draws an exponential for every vocabulary entry: a fifth of the time of a
    rollout at 49,000 entries.)
    """
    logits = logits.masked_fill(banned, -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "sampling needs uniforms"
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if top_k is not None or top_p < 1:
        probabilities = truncated(probabilities, top_k, top_p)
    cumulative = probabilities.cumsum(-1)
    # `right=True`: the first entry whose cumulative probability exceeds the draw, so never one of mass 0
    wanted = uniform[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return picked.clamp(max=logits.shape[1] - 1)


def truncated(probabilities: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[B, V] probabilities, set to 0 outside the top k and then outside the nucleus `top_p`; not renormalised.

    The nucleus (arXiv 1904.09751) is the smallest set of the most likely tokens whose share of the mass in the top k
    reaches top_p, the token that reaches it included.
    """
    ordered, columns = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0.0
    return torch.zeros_like(probabilities).scatter_(-1, columns, ordered)
