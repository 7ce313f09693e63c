"""Losses between student and teacher, as pure functions on flat completion tokens.

They see logits over the shared vocabulary and, for the estimators, which column was sampled: no prompts, no
padding, no images. Everything is computed in fp32 (or wider), in nats. Checked in value and gradient against
float64 references. Throughout: q the student, p the teacher, 0 log 0 = 0.

A loss is put together from three parts, each of which knows nothing of the others:

    temperature    both models' logits are divided by their own; the loss is not multiplied by T^2
    support        which columns count, and what becomes of the rest (`on_support`)
    divergence     sum_v f(q_v, p_v), of two distributions or of what a support leaves of them

A sampled-token estimator (k1, k2, k3) looks at one column instead. Diagnostics are always exact: over the full
vocabulary, at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlopd.config import (
    JSD,
    K1,
    K2,
    Divergence,
    Estimator,
    ForwardKL,
    FullSupport,
    IntersectionTopK,
    LossConfig,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    StudentTopK,
    TeacherTopK,
    TopK,
)


class TokenDivergence(NamedTuple):
    """What is known of each completion token, [N] each, in nats; only `loss` carries a gradient."""

    loss: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


class Sampled(NamedTuple):
    """The tokens of the completions: columns [N] of the shared vocabulary, the sampler's log-probs [N], nats."""

    columns: Tensor
    logprobs: Tensor


# ------------------------------------------------------------------------------------- divergences


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v), from log-probs [N, V] to [N]; infinite where b lacks a's mass.

    Of the student from the teacher it is mode-seeking, the objective of OPD; the other way round mass-covering,
    that of KD.
    """
    weights = a.exp()
    return (weights * (a - b).masked_fill_(weights == 0, 0.0)).sum(-1)


def skewed_kl(a: Tensor, b: Tensor, share: float) -> Tensor:
    """KL(a || (1 - share) a + share b), from log-probs [N, V] to [N]; at most -log(1 - share).

    Source: DistiLLM, arXiv 2402.03898, where alpha = 1 - share. Computed from r = log(b / a) as
    -sum_v a_v log(1 + share (e^r - 1)), which loses no digits where `share` is small.
    """
    if share == 1:
        return kl(a, b)
    weights = a.exp()
    ratio = (b - a).masked_fill_(weights == 0, 0.0)
    if share > 0.5:
        kept = ratio.new_tensor(math.log1p(-share))
        mixed = torch.logaddexp(kept, ratio + math.log(share))
    else:  # beyond 60 nats only e^r counts, which would overflow
        mixed = torch.log1p(share * torch.expm1(ratio.clamp(max=60.0))) + (ratio - 60.0).clamp(
            min=0
        )
    return -(weights * mixed).sum(-1)


def skewed_kl_rate(a: Tensor, b: Tensor, share: float) -> Tensor:
    """skewed_kl / share and, at share 0, its limit sum_v (a_v - b_v), which is 0 for whole distributions."""
    if share == 0:
        return a.exp().sum(-1) - b.exp().sum(-1)
    return skewed_kl(a, b, share) / share


def jsd(student: Tensor, teacher: Tensor, beta: float, normalised: bool = False) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, [N, V] log-probs to [N].

    Source: GKD, arXiv 2306.13649, for 0 < beta < 1. That form tends to 0 at both ends, where its authors put
    the KLs themselves: a jump, and near the ends beta is a learning rate. `normalised` divides by
    beta (1 - beta):

        D_beta = KL(p || m) / (1 - beta) + KL(q || m) / beta

    - beta -> 0: m -> q, so the first term tends to KL(p || q); m = q + beta (p - q) makes the second
      -(1/beta) sum_v q_v log(1 + beta (p_v - q_v) / q_v) -> -sum_v (p_v - q_v) = 0: the forward KL.
    - beta -> 1: by symmetry (swap p and q, beta and 1 - beta) the reverse KL.
    - p -> q, any beta: with x = sum_v (p_v - q_v)^2 / q_v, KL(p || m) -> (1 - beta)^2 x / 2 and
      KL(q || m) -> beta^2 x / 2, so the usual form tends to beta (1 - beta) x / 2 and D_beta to x / 2, as both
      KLs do: close to the teacher the loss, and so the step, is the same for all beta.
    """
    forward, reverse = (
        skewed_kl_rate(teacher, student, 1.0 - beta),
        skewed_kl_rate(student, teacher, beta),
    )
    both = forward + reverse
    return both if normalised else beta * (1.0 - beta) * both


def divergence(loss: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The configured divergence of log-probs [N, V], whatever support they are of: [N] nats."""
    if isinstance(loss, JSD):
        return jsd(student, teacher, loss.beta, loss.normalised)
    if isinstance(loss, SkewReverseKL):
        return skewed_kl(student, teacher, 1.0 - loss.alpha)
    if isinstance(loss, SkewForwardKL):
        return skewed_kl(teacher, student, 1.0 - loss.alpha)
    if isinstance(loss, ForwardKL):
        return kl(teacher, student)
    return kl(student, teacher)


def entropy(logprobs: Tensor) -> Tensor:
    """-sum_v p_v log p_v, [N] nats."""
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0 log 0 = 0
    return -(logprobs.exp() * finite).sum(-1)


def logprobs_at(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits, [N] columns -> [N] log-probs, nats, fp32."""
    logits = logits.float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


# ---------------------------------------------------------------------------------------- supports


def on_support(loss: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence on the configured support S, from log-probs [N, V] to [N].

    The tail, which is V without S: `bucket` counts it as one more token, of mass 1 - sum_S q and 1 - sum_S p (a
    divergence again, at most the full one); `renormalise` divides q and p by their masses on S; `none` leaves it
    out (no divergence: the KLs can be negative). Gradients flow through q on S and in its tail, not through
    the choice of S. Where an intersection is empty, `bucket`, `renormalise` and `none` are all 0.
    """
    support = loss.support
    if isinstance(support, FullSupport):
        return divergence(loss, student, teacher)
    chosen = choose(support, student.detach(), teacher)
    inside = [logprobs.masked_fill(~chosen, -torch.inf) for logprobs in (student, teacher)]
    if support.tail == "renormalise":
        empty = ~chosen.any(-1, keepdim=True)
        inside = [torch.log_softmax(part.masked_fill(empty, 0.0), -1) for part in inside]
    total = divergence(loss, *inside)
    if support.tail == "bucket":
        total = total + divergence(loss, log_mass(student, ~chosen), log_mass(teacher, ~chosen))
    return total


def choose(support: TopK, student: Tensor, teacher: Tensor) -> Tensor:
    """The support's columns as [N, V] bool, from log-probs [N, V]; all of them where k is V or more."""
    ours, theirs = (
        torch.zeros_like(logprobs, dtype=torch.bool).scatter_(
            1, logprobs.topk(min(support.k, logprobs.shape[1])).indices, True
        )
        for logprobs in (student, teacher)
    )
    if isinstance(support, TeacherTopK):
        return theirs
    if isinstance(support, StudentTopK):
        return ours
    return ours & theirs if isinstance(support, IntersectionTopK) else ours | theirs


def log_mass(logprobs: Tensor, where: Tensor) -> Tensor:
    """log sum_{v in where} p_v, [N, V] to [N, 1]; -inf, of gradient 0, where that is nothing.

    Summed rather than taken from 1, which leaves no digits of a small tail.
    """
    nothing = torch.finfo(
        logprobs.dtype
    ).min  # finite: logsumexp of -inf alone has a gradient of NaN
    mass = logprobs.masked_fill(~where, nothing).logsumexp(-1, keepdim=True)
    return mass.masked_fill(mass < nothing / 2, -torch.inf)


# -------------------------------------------------------------------------------------- estimators


def estimate(loss: Estimator, student: Tensor, teacher: Tensor, old: Tensor) -> Tensor:
    """The loss of the sampled tokens from log-probs [N] of student, teacher and sampler, to [N] nats.

    With d = log q - log p at the token sampled from q (names: http://joschu.net/blog/kl-approx.html):

        k1  d; the mean is the reverse KL, but its own gradient has mean 0. So it is a policy gradient: the
            surrogate max(-A w, -A clip(w)) of the fixed advantage A = -d and the importance ratio
            w = q / q_old (PPO, arXiv 1707.06347). Where data are used once w is 1, and the gradient's mean is
            that of the reverse KL.
        k2  d^2 / 2; its gradient's mean is that of the reverse KL, its value's only as p -> q.
        k3  1 / e^d - 1 + d, not negative; the mean is the reverse KL, its gradient's that of the forward KL.
    """
    difference = student - teacher
    if isinstance(loss, K1):
        advantage, ratio = -difference.detach(), (student - old).exp()
        surrogate = -advantage * ratio
        if loss.clip is None:
            return surrogate
        return torch.maximum(surrogate, -advantage * ratio.clamp(1 - loss.clip, 1 + loss.clip))
    if isinstance(loss, K2):
        return difference.square() / 2
    return torch.expm1(-difference) + difference


# ---------------------------------------------------------------------------------- of whole batches


def token_divergence(
    loss: LossConfig,
    student_logits: Tensor,
    teacher_logits: Tensor,
    sampled: Sampled | None = None,
) -> TokenDivergence:
    """[N, V] logits of both, in any precision -> the loss and diagnostics of every token.

    Estimators need `sampled`; divergences do not look at it.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits, teacher_logits = student_logits.to(wide), teacher_logits.to(wide)
    student = torch.log_softmax(student_logits, -1)
    teacher = torch.log_softmax(teacher_logits, -1)
    if isinstance(loss, Estimator):
        assert sampled is not None, f"{loss.type} is about sampled tokens"
        q, p = (x.gather(1, sampled.columns[:, None])[:, 0] for x in (student, teacher))
        value = estimate(loss, q, p, sampled.logprobs.to(wide))
    else:
        ours, theirs = student, teacher
        if loss.student_temperature != 1:
            ours = torch.log_softmax(student_logits / loss.student_temperature, -1)
        if loss.teacher_temperature != 1:
            theirs = torch.log_softmax(teacher_logits / loss.teacher_temperature, -1)
        value = on_support(loss, ours, theirs)
    with torch.no_grad():
        plain = loss == ReverseKL(chunk_tokens=loss.chunk_tokens)
        exact = value.detach() if plain else kl(student, teacher)
        return TokenDivergence(value, exact, entropy(student), entropy(teacher))


def chunked_divergence(
    loss: LossConfig,
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    sampled: Sampled | None = None,
) -> TokenDivergence:
    """The loss from hidden states, holding at most `loss.chunk_tokens` rows of logits at once.

    `student_hidden` [N, H] and `teacher_hidden` [N, H'] are mapped by their heads to [*, V]. Each chunk's
    logits are computed again in the backward pass rather than kept. Equal to the unchunked loss.
    """

    def piece(student: Tensor, teacher: Tensor, *token: Tensor) -> TokenDivergence:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        tokens = Sampled(*token) if token else None
        return token_divergence(loss, student_head(student), teacher_logits, tokens)

    columns = (student_hidden, teacher_hidden, *(sampled or ()))
    if len(student_hidden) <= loss.chunk_tokens:
        return piece(*columns)
    pieces = [
        checkpoint(piece, *chunk, use_reentrant=False)
        for chunk in zip(*(column.split(loss.chunk_tokens) for column in columns), strict=True)
    ]
    return TokenDivergence(*(torch.cat(column) for column in zip(*pieces, strict=True)))
