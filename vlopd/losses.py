"""Divergences between student and teacher, as pure functions on flat completion tokens.

They see logits over the shared vocabulary and nothing else: no prompts, no padding, no images. Everything
is computed in fp32 (or wider), in nats. Checked in value and gradient against float64 references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Divergence = Callable[[Tensor, Tensor], Tensor]
"""([N, V] student log-probs, [N, V] teacher log-probs) -> [N] nats."""


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v q_v (log q_v - log p_v), [N]. Mode-seeking; the objective of OPD."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v), [N]. Mass-covering; that of KD."""
    return (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)


DIVERGENCES: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}


class TokenDivergence(NamedTuple):
    """What is known of each completion token, [N] each, in nats; only `loss` carries a gradient."""

    loss: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def entropy(logprobs: Tensor) -> Tensor:
    """-sum_v p_v log p_v, [N] nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


def logprobs_at(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits, [N] columns -> [N] log-probs, nats, fp32."""
    logits = logits.float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def token_divergence(
    divergence: Divergence, student_logits: Tensor, teacher_logits: Tensor
) -> TokenDivergence:
    """[N, V] logits of both, in any precision -> the divergence and diagnostics of every token."""
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = torch.log_softmax(student_logits.to(wide), -1)
    teacher = torch.log_softmax(teacher_logits.to(wide), -1)
    loss = divergence(student, teacher)
    with torch.no_grad():
        return TokenDivergence(
            loss, reverse_kl(student, teacher), entropy(student), entropy(teacher)
        )


def chunked_divergence(
    divergence: Divergence,
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    chunk_tokens: int,
) -> TokenDivergence:
    """The divergence from hidden states, holding at most `chunk_tokens` rows of logits at once.

    `student_hidden` [N, H] and `teacher_hidden` [N, H'] are mapped by their heads to [*, V]. Each chunk's
    logits are computed again in the backward pass rather than kept. Equal to the unchunked divergence.
    """

    def piece(student: Tensor, teacher: Tensor) -> TokenDivergence:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return token_divergence(divergence, student_head(student), teacher_logits)

    n = len(student_hidden)
    if n <= chunk_tokens:
        return piece(student_hidden, teacher_hidden)
    pieces = [
        checkpoint(piece, student, teacher, use_reentrant=False)
        for student, teacher in zip(
            student_hidden.split(chunk_tokens), teacher_hidden.split(chunk_tokens), strict=True
        )
    ]
    return TokenDivergence(*(torch.cat(column) for column in zip(*pieces, strict=True)))
