"""A model's distribution at each token, from its logits; accurate and fast for large vocabularies."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)


class Distribution(NamedTuple):
    """A model's distribution at each token: log-probs and probabilities [N, V], and log sum_v e^logit_v [N, 1]."""

    logprobs: Tensor
    probs: Tensor
    normaliser: Tensor

    def at(self, columns: Tensor) -> Tensor:
        """[N] columns -> [N] log-probs."""
        return self.logprobs.gather(1, columns[:, None])[:, 0]

    def entropy(self) -> Tensor:
        """-sum_v p_v log p_v, [N] nats."""
        finite = self.logprobs.clamp(min=torch.finfo(self.logprobs.dtype).min)  # 0 log 0 = 0
        return -torch.linalg.vecdot(self.probs, finite)


def distribution(logits: Tensor) -> Distribution:
    """Softmax and log-softmax over the last dimension, accurate for large vocabularies; a row of -inf has no mass.

    Over 152,064 fp32 logits of standard deviation 3 the normaliser of torch's log_softmax is off by 1.6e-5 nats on a
    CPU, which `sum` is not. (There 2^x takes a third of the time of e^x, too.)
    """
    highest = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    logprobs = logits - highest
    probs = (logprobs * LOG2_E).exp2_()
    total = probs.sum(-1, keepdim=True)
    probs.mul_(1.0 / total.clamp(min=torch.finfo(logits.dtype).tiny))
    return Distribution(logprobs.sub_(total.log()), probs, highest + total.log())


def logprobs_at(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits, [N] columns -> [N] log-probs, nats, fp32 (or wider)."""
    logits = widened(logits)
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def widened(logits: Tensor) -> Tensor:
    """In fp32, or wider if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


BLOCK = 64
"""Columns of which `top` first takes the largest."""


def top(values: Tensor, k: int) -> Tensor:
    """Columns [N, k] of each row's k largest of [N, V] (all where k is more), in order.

    Over 150k columns a tenth of the time of torch's topk: the k largest are in the k blocks of the largest maxima.
    """
    n, size = values.shape
    k, blocks = min(k, size), size // BLOCK
    if k >= blocks // 4:
        return values.topk(k).indices
    end = blocks * BLOCK
    best = values[:, :end].unflatten(1, (blocks, BLOCK)).amax(-1).topk(k).indices
    within = torch.arange(BLOCK, device=values.device)
    rest = torch.arange(end, size, device=values.device).expand(n, -1)
    columns = torch.cat([(best[:, :, None] * BLOCK + within).flatten(1), rest], 1)
    return columns.gather(1, values.gather(1, columns).topk(k).indices)
