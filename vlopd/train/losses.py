"""Losses between student and teacher, as pure functions on flat completion tokens.

Inputs are logits over the shared vocabulary and, for the estimators, the sampled column: no prompts, no padding,
no images. Everything is computed in fp32 (or wider), in nats. Values and gradients are tested against float64
references. Throughout: q the student, p the teacher, 0 log 0 = 0.

A divergence is composed of three independent parts:

    temperature    both models' logits are divided by their own; the loss is not multiplied by T^2
    support        the columns that are compared, and the treatment of the tail (`on_support`)
    divergence     sum_v f(q_v, p_v), of two distributions or of their restriction to a support

A loss of the sampled token (nll, k1, k2, k3) uses one column instead. A reward's policy gradient is mixed in
with weight 1 - alpha. Diagnostics are always exact: over the full vocabulary, at temperature 1. Without a teacher,
which nll and a pure reward do not need, those that compare with it are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlopd.config.objective import (
    JSD,
    K1,
    K2,
    NLL,
    Divergence,
    ForwardKL,
    FullSupport,
    FunctionLoss,
    IntersectionTopK,
    LossConfig,
    ReverseKL,
    RewardConfig,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    StudentTopK,
    TeacherTopK,
    TopK,
)
from vlopd.errors import PluginError
from vlopd.plugins import call, wrong_value

TOP_K = 16
"""Top tokens of each model that the overlap diagnostics compare (as arXiv 2604.13016 does)."""

NO_TEACHER = "Recipe refuses a loss that needs a teacher without one"


class TokenDivergence(NamedTuple):
    """Loss and diagnostics of each completion token, [N] each, in nats unless stated; only `loss` carries a gradient.

    Those with a teacher in them are None where there is no teacher.
    """

    loss: Tensor
    student_entropy: Tensor
    student_logprobs: Tensor  # of the sampled token, at temperature 1
    reverse_kl: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    top_overlap: Tensor | None = (
        None  # fraction of the two models' TOP_K top tokens that they share
    )
    student_shared_mass: Tensor | None = (
        None  # the student's probability of the shared ones, a fraction
    )
    teacher_shared_mass: Tensor | None = None


class Sampled(NamedTuple):
    """The tokens of the completions: columns [N] of the shared vocabulary, the sampler's log-probs [N], nats.

    `advantages` [N] are the reward's, a completion's value at each of its tokens; empty, [0], without a reward.
    """

    columns: Tensor
    logprobs: Tensor
    advantages: Tensor = torch.empty(0)


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


LONG_SUM = 2**14
"""Terms beyond which a sum in fp32 loses digits that count."""


def log_softmax(logits: Tensor) -> Tensor:
    """torch's log_softmax over the last dimension, accurate for large vocabularies.

    Over 152,064 fp32 logits of standard deviation 3 torch's normaliser is off by 1.6e-5 nats on a CPU. What the
    probabilities miss of 1, summed in float64, is taken out; the gradient is that of the corrected value.
    """
    first = torch.log_softmax(logits, -1)
    if logits.shape[-1] <= LONG_SUM or logits.dtype == torch.float64:
        return first
    return first - first.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(first.dtype)


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
    the choice of S. Where an intersection is empty, `bucket`, `renormalise` and `none` are all 0. So is
    `renormalise` where one model bans all of S: there is nothing of it to compare.
    """
    support = loss.support
    if isinstance(support, FullSupport):
        return divergence(loss, student, teacher)
    chosen = choose(support, student.detach(), teacher)
    inside = [logprobs.masked_fill(~chosen, -torch.inf) for logprobs in (student, teacher)]
    if support.tail == "renormalise":
        nothing = torch.stack([(part == -torch.inf).all(-1, keepdim=True) for part in inside]).any(
            0
        )
        inside = [torch.log_softmax(part.masked_fill(nothing, 0.0), -1) for part in inside]
    total = divergence(loss, *inside)
    if support.tail == "bucket":
        total = total + divergence(loss, log_mass(student, ~chosen), log_mass(teacher, ~chosen))
    return total


def choose(support: TopK, student: Tensor, teacher: Tensor) -> Tensor:
    """The support's columns as [N, V] bool, from log-probs [N, V]; all that a model does not ban where k is more.

    (Which of the banned columns, all -inf, a top-k takes, is left to chance.)
    """
    ours, theirs = (
        torch.zeros_like(logprobs, dtype=torch.bool)
        .scatter_(1, logprobs.topk(min(support.k, logprobs.shape[1])).indices, True)
        .logical_and_(logprobs > -torch.inf)
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


# ---------------------------------------------------------------------------------- sampled tokens


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
    """
    if isinstance(loss, NLL):
        return -student
    assert teacher is not None, NO_TEACHER
    difference = student - teacher
    if isinstance(loss, K1):
        return policy_gradient(-difference.detach(), student, old, loss.clip)
    if isinstance(loss, K2):
        return difference.square() / 2
    return torch.expm1(-difference) + difference


# ---------------------------------------------------------------------------------- of whole batches


def token_divergence(
    loss: LossConfig,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
) -> TokenDivergence:
    """[N, V] logits of both models, in any precision -> loss and diagnostics of every token.

    With a reward the loss is alpha * loss + (1 - alpha) * the policy gradient of `sampled.advantages`; under k1
    it is the policy gradient of both advantages together. `teacher_logits` are None without a teacher.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(wide)
    student = log_softmax(student_logits)
    q = student.gather(1, sampled.columns[:, None])[:, 0]
    teacher = p = None
    if teacher_logits is not None:
        teacher_logits = teacher_logits.to(wide)
        teacher = log_softmax(teacher_logits)
        p = teacher.gather(1, sampled.columns[:, None])[:, 0]
    old = sampled.logprobs.to(wide)
    if reward is not None and reward.alpha == 0:
        value = torch.zeros_like(q)
    elif isinstance(loss, SampledToken):
        value = of_sampled(loss, q, p, old)
    else:
        assert teacher is not None and teacher_logits is not None, NO_TEACHER
        ours, theirs = student, teacher
        if loss.student_temperature != 1:
            ours = log_softmax(student_logits / loss.student_temperature)
        if loss.teacher_temperature != 1:
            theirs = log_softmax(teacher_logits / loss.teacher_temperature)
        value = on_support(loss, ours, theirs)
    if reward is not None:
        advantages, alpha = sampled.advantages.to(wide), reward.alpha
        if isinstance(loss, K1):
            both = (1 - alpha) * advantages
            if (
                alpha > 0
            ):  # at 0 the teacher is a diagnostic and may ban the token: 0 times infinity
                assert p is not None, NO_TEACHER
                both = alpha * (p - q).detach() + both
            value = policy_gradient(both, q, old, reward.clip)
        else:
            rewarded = policy_gradient(advantages, q, old, reward.clip)
            value = alpha * value + (1 - alpha) * rewarded
    with torch.no_grad():
        own = TokenDivergence(value, entropy(student), q.detach())
        if teacher is None:
            return own
        plain = reward is None and is_plain_reverse_kl(loss)
        overlap, student_mass, teacher_mass = top_overlap(student, teacher)
        return own._replace(
            reverse_kl=value.detach() if plain else kl(student, teacher),
            teacher_entropy=entropy(teacher),
            teacher_logprobs=p,
            top_overlap=overlap,
            student_shared_mass=student_mass,
            teacher_shared_mass=teacher_mass,
        )


def is_plain_reverse_kl(loss: LossConfig) -> bool:
    """Whether the loss is the reverse KL of the diagnostics, which is then not computed twice."""
    return (
        isinstance(loss, ReverseKL)
        and isinstance(loss.support, FullSupport)
        and loss.student_temperature == loss.teacher_temperature == 1
    )


def top_overlap(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From log-probs [N, V]: the fraction of the TOP_K top tokens that both models have in common, and the
    probability mass that student and teacher give to these; [N] each.
    """
    k = min(TOP_K, student.shape[1])
    ours, theirs = student.topk(k).indices, teacher.topk(k).indices
    shared = (ours[:, :, None] == theirs[:, None, :]).any(-1)  # [N, k], of the student's

    def mass(logprobs: Tensor) -> Tensor:
        return (logprobs.gather(1, ours).exp() * shared).sum(-1).clamp(max=1.0)

    return shared.float().mean(-1), mass(student), mass(teacher)


def token_weights(
    loss: LossConfig, mask: Tensor, n_tokens: int, n_completions: int, longest: int
) -> Tensor:
    """[B, C] mask of a micro-batch -> [N] weights of its token losses in the step's loss, by `normalisation`.

    `n_tokens` and `n_completions` are the whole step's, over all micro-batches and processes, so that the sum of
    weight * loss over all of them is the same however the step is split. `longest` is rollout.max_new_tokens.
    """
    lengths = mask.sum(1, keepdim=True).expand_as(mask)[mask]  # [N], of each token's completion
    if loss.normalisation == "sequence_mean":
        return 1.0 / (n_completions * lengths.double())
    size = n_tokens if loss.normalisation == "token_mean" else n_completions * longest
    return torch.full_like(lengths, 1.0 / size, dtype=torch.float64)


def chunked_divergence(
    loss: LossConfig,
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
) -> TokenDivergence:
    """The loss from hidden states, holding at most `loss.chunk_tokens` rows of logits at once.

    `student_hidden` [N, H] and `teacher_hidden` [N, H'] are mapped by their heads to [*, V]; None for both of the
    teacher's without one. Each chunk's logits are recomputed in the backward pass rather than kept. Equal to the
    unchunked loss.
    """

    def piece(student: Tensor, teacher: Tensor | None, *token: Tensor) -> TokenDivergence:
        teacher_logits = None
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                teacher_logits = teacher_head(teacher)
        tokens = Sampled(*token)
        return token_divergence(loss, student_head(student), teacher_logits, tokens, reward)

    n, size = len(student_hidden), loss.chunk_tokens
    if n <= size:
        return piece(student_hidden, teacher_hidden, *sampled)
    columns = (student_hidden, teacher_hidden, *sampled)
    pieces = [
        checkpoint(
            piece, *(c if c is None else c[i : i + size] for c in columns), use_reentrant=False
        )
        for i in range(0, n, size)
    ]
    return by_column(torch.cat, pieces)


def by_column(
    join: Callable[[list[Tensor]], Tensor], pieces: Sequence[TokenDivergence]
) -> TokenDivergence:
    """Joins the pieces column by column; a column without a teacher stays None."""
    columns = zip(*pieces, strict=True)
    joined: Any = (None if c[0] is None else join(list(c)) for c in columns)
    return TokenDivergence(*joined)
