"""The tokens that have a loss (`loss.tokens`), and the weights of their losses in the step's (`loss.normalisation`)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlopd.config.objective import NLL, LossConfig, ReverseKL, RewardConfig
from vlopd.train.loss_formulas import NO_TEACHER
from vlopd.train.losses import TokenDivergence, TokenInputs, chunked_divergence


def token_weights(
    loss: LossConfig, mask: Tensor, n_tokens: int, n_completions: int, longest: int
) -> Tensor:
    """[B, C] mask of a micro-batch -> [N] weights of its token losses in the step's loss, by `normalisation`.

    `n_tokens` with a loss (`loss_tokens`) and `n_completions` are the whole step's, over all micro-batches and
    processes, so that the sum of weight * loss over all of them is the same however the step is split. `longest` is
    rollout.max_new_tokens. Tokens without a loss have their completion's weight too, and loss 0.
    """
    lengths = mask.sum(1, keepdim=True).expand_as(mask)[mask]  # [N], of each token's completion
    lengths = loss_tokens(loss, lengths)
    if loss.normalisation == "sequence_mean":
        return 1.0 / (n_completions * lengths.double())
    longest = int(loss_tokens(loss, torch.tensor(longest)))
    size = n_tokens if loss.normalisation == "token_mean" else n_completions * longest
    return torch.full_like(lengths, 1.0 / size, dtype=torch.float64)


def loss_tokens(loss: LossConfig, lengths: Tensor) -> Tensor:
    """Lengths of completions -> the tokens of each that have a loss: all, or `loss.tokens.fraction`, rounded up."""
    if loss.tokens is None:
        return lengths
    exact = loss.tokens.fraction * lengths.double()
    return (exact - 1e-9).ceil().to(lengths).clamp(min=1)  # 0.3 * 10 is more than 3


def selected(loss: LossConfig, mask: Tensor, scores: Tensor) -> Tensor:
    """[B, C] mask, [N] scores -> [N] bool: of each completion the `loss_tokens` tokens of the highest scores."""
    padded = scores.new_full(mask.shape, -torch.inf)
    padded[mask] = scores
    # ties: the earlier first
    ranks = padded.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < loss_tokens(loss, mask.sum(1, keepdim=True)))[mask]


def at_selected(
    loss: LossConfig,
    mask: Tensor,
    inputs: TokenInputs,
    reward: RewardConfig | None = None,
    diagnostics: bool = True,
) -> TokenDivergence:
    """As `chunked_divergence`, of completions with the [B, C] `mask`, where `loss.tokens` have a loss and the others 0.

    A first pass without gradients, from the same hidden states, has the diagnostics of all tokens and the scores by
    which they are selected; the second is of the selected alone.
    """
    assert loss.tokens is not None
    plain = (NLL if inputs.teacher_hidden is None else ReverseKL)(chunk_tokens=loss.chunk_tokens)
    with torch.no_grad():
        every = chunked_divergence(plain, inputs.detached(), diagnostics=diagnostics)
    match loss.tokens.by:
        case "student_entropy":
            scores = every.student_entropy
        case "divergence":
            assert inputs.teacher_hidden is not None, NO_TEACHER
            scores = every.loss  # of `plain`
        case "position":
            scores = -torch.arange(len(every.loss), device=mask.device, dtype=torch.float64)
        case "least_likely":
            scores = -inputs.sampled.logprobs
    chosen = selected(loss, mask, scores)
    its = chunked_divergence(loss, inputs.at(chosen), reward, diagnostics=False)
    value = torch.zeros_like(every.loss).index_put((chosen,), its.loss.to(every.loss))
    return every._replace(loss=value)
