"""The formulas of losses, from log-probs in nats; throughout, q the student, p the teacher, 0 log 0 = 0.

A divergence is sum_v f(q_v, p_v) of two distributions or of their restriction to a support, [N, V] to [N]; a loss of
the sampled token (nll, k1, k2, k3, constant_advantage) takes the log-probs of one column, [N] to [N].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlopd.config.objective import (
    JSD,
    K1,
    K2,
    NLL,
    ConstantAdvantage,
    Divergence,
    ForwardKL,
    FunctionLoss,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
)
from vlopd.errors import PluginError
from vlopd.plugins import call, wrong_value

NO_TEACHER = "Recipe refuses a loss that needs a teacher without one"


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
    if isinstance(loss, FunctionLoss):
        return of_function(loss, student, teacher)
    return kl(student, teacher)


def of_function(loss: FunctionLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of a plug-in, from log-probs [N, V] to [N] nats.

    Raises PluginError where it fails, changes its inputs in place, or returns another shape or no gradient.
    """
    n, columns = student.shape
    where = f"log-probs [{n}, {columns}]"
    versions = student._version, teacher._version
    value = call(loss.type, where, student, teacher, **loss.arguments)
    wanted = f"a floating-point tensor [{n}], the loss of each token in nats"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise wrong_value(loss.type, where, value, wanted)
    if value.shape != (n,):
        raise wrong_value(loss.type, where, list(value.shape), f"{wanted}; this is a shape")
    if (student._version, teacher._version) != versions:
        raise PluginError(
            f"{loss.type} changes its inputs in place, which later diagnostics read; use the out-of-place operation"
        )
    if student.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
        raise PluginError(
            f"{loss.type} returned a loss without a gradient; compute it from student_logprobs, not detached"
        )
    return value


def policy_gradient(advantage: Tensor, student: Tensor, old: Tensor, clip: float | None) -> Tensor:
    """The surrogate max(-A w, -A clip(w, 1 - c, 1 + c)) of fixed advantages A [N], w = q / q_old; to [N].

    From log-probs [N] of the student and of the sampler at the sampled token. Source: PPO, arXiv 1707.06347.
    Where data are used once w is 1, and the gradient is that of -A log q.
    """
    ratio = (student - old).exp()
    surrogate = -advantage * ratio
    if clip is None:
        return surrogate
    return torch.maximum(surrogate, -advantage * ratio.clamp(1 - clip, 1 + clip))


def of_sampled(loss: SampledToken, student: Tensor, teacher: Tensor | None, old: Tensor) -> Tensor:
    """The loss at the sampled tokens from log-probs [N] of student, teacher and sampler, to [N] nats.

    nll is -log q, whoever wrote the token, and needs no teacher. With d = log q - log p at a token sampled from q
    (names: http://joschu.net/blog/kl-approx.html):

        k1  d; the mean is the reverse KL, but its own gradient has mean 0. So it is a policy gradient with the
            fixed advantage -d, whose mean is the reverse KL's gradient where data are used once.
        k2  d^2 / 2; its gradient's mean is that of the reverse KL, its value's only as p -> q.
        k3  1 / e^d - 1 + d, not negative; the mean is the reverse KL, its gradient's that of the forward KL.

    constant_advantage is a policy gradient too, without a teacher.
    """
    if isinstance(loss, NLL):
        return -student
    if isinstance(loss, ConstantAdvantage):
        advantage = torch.full_like(student, loss.advantage).detach()
        return policy_gradient(advantage, student, old, loss.clip)
    assert teacher is not None, NO_TEACHER
    difference = student - teacher
    if isinstance(loss, K1):
        return policy_gradient(-difference.detach(), student, old, loss.clip)
    if isinstance(loss, K2):
        return difference.square() / 2
    return torch.expm1(-difference) + difference
