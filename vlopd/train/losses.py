"""Losses between student and teacher, as pure functions on flat completion tokens.

Inputs are logits over the shared vocabulary and, for the estimators, the sampled column: no prompts, no padding,
no images. Everything is computed in fp32 (or wider), in nats. Values and gradients are tested against float64
references. Throughout: q the student, p the teacher, 0 log 0 = 0.

A divergence is composed of three independent parts:

    temperature    both models' logits are divided by their own; the loss is not multiplied by T^2
    support        the columns that are compared, and the treatment of the tail (`on_support`)
    divergence     sum_v f(q_v, p_v), of two distributions or of their restriction to a support

A loss of the sampled token (nll, k1, k2, k3, constant_advantage) uses one column instead. A reward's policy gradient
is mixed in with weight 1 - alpha. Diagnostics are always exact: over the full vocabulary, at temperature 1, at all
tokens, also where only some have a loss (`at_selected`). Without a teacher, which nll, constant_advantage and a pure
reward do not need, those that compare with it are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlopd.config.objective import (
    JSD,
    K1,
    K2,
    NLL,
    ConstantAdvantage,
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


class Slope(NamedTuple):
    """A divergence's value [N] and, where wanted, its gradient [N, V] in the student's logits (divided by their
    temperature)."""

    value: Tensor
    gradient: Tensor | None


def full_slope(
    loss: Divergence, student: Distribution, teacher: Distribution, wanted: bool
) -> Slope:
    """The divergence over the whole vocabulary. With g_v its derivative in log q_v, the gradient is g - q sum_v g_v."""
    if isinstance(loss, ReverseKL):
        value, terms = kl_terms(student, teacher)
        gradient = terms.addcmul_(student.probs, value[:, None], value=-1.0) if wanted else None
        return Slope(value, gradient)
    if isinstance(loss, ForwardKL):
        value, terms = kl_terms(teacher, student)
        gradient = torch.sub(student.probs, teacher.probs, out=terms) if wanted else None
        return Slope(value, gradient)
    value, slope = sloped(loss, student.logprobs, teacher.logprobs, wanted)
    if slope is not None:
        slope = slope.addcmul_(student.probs, slope.sum(-1, keepdim=True), value=-1.0)
    return Slope(value, slope)


def kl_terms(a: Distribution, b: Distribution) -> tuple[Tensor, Tensor]:
    """KL(a || b) [N] and its terms a_v (log a_v - log b_v) [N, V]; 0 where a_v is, whatever b_v."""
    terms = (a.logprobs - b.logprobs).mul_(a.probs)
    terms.nan_to_num_(0.0, torch.inf, -torch.inf)  # 0 * inf
    # a row of NaN logits stays NaN
    return terms.sum(-1) + 0.0 * (a.normaliser + b.normaliser)[:, 0], terms


def sloped(
    loss: Divergence, student: Tensor, teacher: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence [N] of log-probs [N, V] and, where wanted, its derivative in each of the student's."""
    with torch.set_grad_enabled(wanted):
        leaf = student.detach().requires_grad_(wanted)
        value = divergence(loss, leaf, teacher)
        slope = torch.autograd.grad(value.sum(), leaf)[0] if wanted else None
    return value.detach(), slope


# ---------------------------------------------------------------------------------------- supports


def slope_on_support(
    loss: Divergence, student: Distribution, teacher: Distribution, wanted: bool
) -> Slope:
    """The divergence on the configured support S.

    The tail, which is V without S: `bucket` counts it as one more token, of mass 1 - sum_S q and 1 - sum_S p (a
    divergence again, at most the full one); `renormalise` divides q and p by their masses on S; `none` leaves it
    out (no divergence: the KLs can be negative). Gradients flow through q on S and in its tail, not through
    the choice of S. Where an intersection is empty, `bucket`, `renormalise` and `none` are all 0. So is
    `renormalise` where one model bans all of S: there is nothing of it to compare.
    """
    support = loss.support
    if isinstance(support, FullSupport):
        return full_slope(loss, student, teacher, wanted)
    columns, kept = choose(support, student.logprobs, teacher.logprobs)
    ours, theirs = (
        each.logprobs.gather(1, columns).masked_fill_(~kept, -torch.inf)
        for each in (student, teacher)
    )
    tail = None
    if support.tail == "bucket":
        tail, other = (outside(each, columns, kept) for each in (student, teacher))
        ours, theirs = (
            torch.cat([ours, tail.normaliser], 1),
            torch.cat([theirs, other.normaliser], 1),
        )
    elif support.tail == "renormalise":
        nothing = ((ours == -torch.inf).all(-1) | (theirs == -torch.inf).all(-1))[:, None]
        theirs = torch.log_softmax(theirs.masked_fill(nothing, 0.0), -1)
    with torch.set_grad_enabled(wanted):
        leaf = inside = ours.requires_grad_(wanted)
        if support.tail == "renormalise":
            inside = torch.log_softmax(leaf.masked_fill(nothing, 0.0), -1)
        value = divergence(loss, inside, theirs)
        if not wanted:
            return Slope(value, None)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    # of log q_v on S the gradient is that of v less q; of the tail's log-mass, its own distribution less q
    gradient = student.probs * -slope.sum(-1, keepdim=True)
    if tail is not None:
        gradient.addcmul_(tail.probs, slope[:, -1:])
    gradient.scatter_add_(1, columns, slope[:, : columns.shape[1]])
    return Slope(value.detach(), gradient)


def choose(support: TopK, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The support from log-probs [N, V]: columns [N, k] (of the union [N, 2k]), and which of these are in it.

    All that a model does not ban where k is more. (Which of the banned columns, all -inf, a top-k takes, is left to
    chance.)
    """

    def likeliest(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        columns = top(logprobs, support.k)
        return columns, logprobs.gather(1, columns) > -torch.inf

    if isinstance(support, TeacherTopK):
        return likeliest(teacher)
    ours, allowed = likeliest(student)
    if isinstance(support, StudentTopK):
        return ours, allowed
    theirs, also = likeliest(teacher)
    if isinstance(support, IntersectionTopK):
        return ours, allowed & marked(student, theirs, also).gather(1, ours)
    new = also & ~marked(student, ours, allowed).gather(1, theirs)
    return torch.cat([ours, theirs], 1), torch.cat([allowed, new], 1)


def marked(like: Tensor, columns: Tensor, which: Tensor) -> Tensor:
    """[N, V] bool, true at those of the columns [N, k] that `which` [N, k] marks."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, columns, which)


def outside(whole: Distribution, columns: Tensor, kept: Tensor) -> Distribution:
    """The distribution of the tail, given that it is one: its normaliser is the log of the tail's mass.

    Summed rather than taken from 1, which leaves no digits of a small tail; -inf where that is nothing.
    """
    never = torch.where(kept, -torch.inf, torch.inf).to(whole.logprobs.dtype)
    return distribution(whole.logprobs.scatter_reduce(1, columns, never, "amin"))


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


# ---------------------------------------------------------------------------------- of whole batches


def token_divergence(
    loss: LossConfig,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
    diagnostics: bool = True,
) -> TokenDivergence:
    """[N, V] logits of both models, in any precision -> loss and diagnostics of every token.

    With a reward the loss is alpha * loss + (1 - alpha) * the policy gradient of `sampled.advantages`; under k1
    it is the policy gradient of both advantages together. `teacher_logits` are None without a teacher. Without
    `diagnostics` those that compare with a teacher are None.
    """
    wanted = student_logits.requires_grad and torch.is_grad_enabled()
    ones = torch.ones(len(student_logits), device=student_logits.device) if wanted else None
    tokens, gradient = evaluate(
        loss, student_logits.detach(), teacher_logits, sampled, reward, ones, diagnostics
    )
    if gradient is None:
        return tokens
    return tokens._replace(loss=_WithGradient.apply(student_logits, tokens.loss, gradient))


class _WithGradient(torch.autograd.Function):
    """[N] values with their known gradients [N, V] in logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None


def evaluate(
    loss: LossConfig,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
    weights: Tensor | None = None,
    diagnostics: bool = True,
) -> tuple[TokenDivergence, Tensor | None]:
    """As `token_divergence`, and with `weights` [N] the gradient [N, V] of sum_n weights_n loss_n in the student's
    logits, in their dtype.

    Rows are taken few at a time, so that what is kept of them in fp32 stays in a CPU's cache and small on a GPU.
    """
    n, size = student_logits.shape
    rows = max(1, BLOCK_NUMEL[student_logits.device.type == "cpu"] // size)
    if isinstance(loss, FunctionLoss):
        rows = max(1, n)  # a function sees all of the chunk's tokens
    gradient = None if weights is None else torch.empty_like(student_logits)
    pieces = []
    with torch.no_grad():
        for start in range(0, max(1, n), rows):
            part = slice(start, start + rows)
            pieces.append(
                evaluate_rows(
                    loss,
                    widened(student_logits[part]),
                    None if teacher_logits is None else widened(teacher_logits[part]),
                    Sampled(*(column[part] for column in sampled)),
                    reward,
                    None if weights is None else weights[part],
                    diagnostics,
                    None if gradient is None else gradient[part],
                )
            )
    return by_column(torch.cat, pieces), gradient


BLOCK_NUMEL = {True: 1 << 20, False: 1 << 25}
"""Logits of the rows that are evaluated at once, on a CPU and elsewhere."""


def evaluate_rows(
    loss: LossConfig,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    sampled: Sampled,
    reward: RewardConfig | None,
    weights: Tensor | None,
    diagnostics: bool,
    gradient: Tensor | None,
) -> TokenDivergence:
    """Loss and diagnostics of the rows; writes their gradient, if there is one to write."""
    student, wanted = distribution(student_logits), gradient is not None
    columns, old = sampled.columns, sampled.logprobs.to(student_logits.dtype)
    q, p, teacher = student.at(columns), None, None
    is_compared = isinstance(loss, Divergence) and (reward is None or reward.alpha > 0)
    if teacher_logits is not None:
        if is_compared or diagnostics:
            teacher = distribution(teacher_logits)
            p = teacher.at(columns)
        else:
            p = logprobs_at(teacher_logits, columns)
    slope = Slope(torch.zeros_like(q), None)
    if is_compared and isinstance(loss, Divergence):
        assert teacher is not None and teacher_logits is not None, NO_TEACHER
        ours = at_temperature(student, student_logits, loss.student_temperature)
        theirs = at_temperature(teacher, teacher_logits, loss.teacher_temperature)
        slope = slope_on_support(loss, ours, theirs, wanted)
        if slope.gradient is not None and loss.student_temperature != 1:
            slope.gradient.div_(loss.student_temperature)
    with torch.set_grad_enabled(wanted):  # of [N] alone
        compared, at_token = (x.detach().requires_grad_(wanted) for x in (slope.value, q.clone()))
        value = combined(loss, compared, at_token, p, old, reward, sampled.advantages)
    if gradient is not None and weights is not None:
        in_compared, in_token = torch.autograd.grad(
            value,
            (compared, at_token),
            weights.to(value.dtype),
            allow_unused=True,
            materialize_grads=True,
        )
        if slope.gradient is None:
            total = student.probs * -in_token[:, None]
        else:
            total = slope.gradient.mul_(in_compared[:, None])
        if slope.gradient is not None and reward is not None:
            total.addcmul_(student.probs, in_token[:, None], value=-1.0)
        if slope.gradient is None or reward is not None:
            total.scatter_add_(1, columns[:, None], in_token[:, None])
        gradient.copy_(total)
    own = TokenDivergence(value.detach(), student.entropy(), q, teacher_logprobs=p)
    if teacher is None or not diagnostics:
        return own
    plain = reward is None and is_plain_reverse_kl(loss)
    overlap, student_mass, teacher_mass = top_overlap(student, teacher)
    return own._replace(
        reverse_kl=own.loss if plain else kl_terms(student, teacher)[0],
        teacher_entropy=teacher.entropy(),
        top_overlap=overlap,
        student_shared_mass=student_mass,
        teacher_shared_mass=teacher_mass,
    )


def at_temperature(plain: Distribution, logits: Tensor, temperature: float) -> Distribution:
    """The distribution of the logits at a temperature, which `plain` is at 1."""
    return plain if temperature == 1 else distribution(logits / temperature)


def combined(
    loss: LossConfig,
    compared: Tensor,
    q: Tensor,
    p: Tensor | None,
    old: Tensor,
    reward: RewardConfig | None,
    advantages: Tensor,
) -> Tensor:
    """The loss of each token [N], from its divergence and its log-probs by student, teacher and sampler."""
    value = compared
    if isinstance(loss, SampledToken) and (reward is None or reward.alpha > 0):
        value = of_sampled(loss, q, p, old)
    if reward is None:
        return value
    advantages, alpha = advantages.to(q), reward.alpha
    if isinstance(loss, K1):
        if alpha > 0:  # at 0 the teacher is a diagnostic and may ban the token: 0 times infinity
            assert p is not None, NO_TEACHER
            advantages = alpha * (p - q).detach() + (1 - alpha) * advantages
        return policy_gradient(advantages, q, old, reward.clip)
    return alpha * value + (1 - alpha) * policy_gradient(advantages, q, old, reward.clip)


def is_plain_reverse_kl(loss: LossConfig) -> bool:
    """Whether the loss is the reverse KL of the diagnostics, which is then not computed twice."""
    return (
        isinstance(loss, ReverseKL)
        and isinstance(loss.support, FullSupport)
        and loss.student_temperature == loss.teacher_temperature == 1
    )


def top_overlap(student: Distribution, teacher: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """The fraction of the TOP_K top tokens that both models have in common, and the probability mass that student
    and teacher give to these; [N] each.
    """
    ours, theirs = (top(each.logprobs, TOP_K) for each in (student, teacher))
    shared = (ours[:, :, None] == theirs[:, None, :]).any(-1)  # [N, k], of the student's

    def mass(its: Distribution) -> Tensor:
        return (its.probs.gather(1, ours) * shared).sum(-1).clamp(max=1.0)

    return shared.float().mean(-1), mass(student), mass(teacher)


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
    ranks = padded.argsort(dim=1, descending=True, stable=True).argsort(
        dim=1
    )  # ties: the earlier first
    return (ranks < loss_tokens(loss, mask.sum(1, keepdim=True)))[mask]


def chunked_divergence(
    loss: LossConfig,
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
    weights: Tensor | None = None,
    diagnostics: bool = True,
) -> TokenDivergence:
    """The loss from hidden states, `loss.chunk_tokens` rows of logits at once. Equal to the unchunked loss.

    `student_hidden` [N, H] and `teacher_hidden` [N, H'] are mapped by their heads to [*, V]; None for both of the
    teacher's without one. With `weights` [N], the sum of weight * loss is back-propagated here: each chunk through
    the head at once, so that no more than one chunk's logits are ever in memory, and all through `student_hidden`
    at the end. Without, the loss carries its gradient, and memory for it [N, V].
    """
    n, size = len(student_hidden), loss.chunk_tokens
    in_hidden = torch.zeros_like(student_hidden) if student_hidden.requires_grad else None
    pieces, head_gradients = [], SummedGradients()
    for start in range(0, max(1, n), size):
        part = slice(start, start + size)
        tokens = Sampled(*(column[part] for column in sampled))
        theirs = None
        if teacher_hidden is not None and teacher_head is not None:
            with torch.no_grad():
                theirs = teacher_head(teacher_hidden[part])
        if weights is None:
            ours = student_head(student_hidden[part])
            pieces.append(token_divergence(loss, ours, theirs, tokens, reward, diagnostics))
            continue
        leaf = student_hidden[part].detach().requires_grad_()
        with head_gradients:
            ours = student_head(leaf)
        piece, gradient = evaluate(
            loss, ours.detach(), theirs, tokens, reward, weights[part], diagnostics
        )
        del theirs
        ours.backward(gradient)
        del ours, gradient
        if in_hidden is not None and leaf.grad is not None:
            in_hidden[part] = leaf.grad
        pieces.append(piece)
        if torch.finfo(leaf.dtype).bits < 32 and len(pieces) % SUMMED == 0:
            head_gradients.backward()
    head_gradients.backward()
    if weights is not None and in_hidden is not None:
        student_hidden.backward(in_hidden)
    return by_column(torch.cat, pieces)


def at_selected(
    loss: LossConfig,
    mask: Tensor,
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    sampled: Sampled,
    reward: RewardConfig | None = None,
    weights: Tensor | None = None,
    diagnostics: bool = True,
) -> TokenDivergence:
    """As `chunked_divergence`, of completions with the [B, C] `mask`, where `loss.tokens` have a loss and the others 0.

    A first pass without gradients, from the same hidden states, has the diagnostics of all tokens and the scores by
    which they are selected; the second is of the selected alone.
    """
    assert loss.tokens is not None
    plain = (NLL if teacher_hidden is None else ReverseKL)(chunk_tokens=loss.chunk_tokens)
    both = (teacher_hidden, teacher_head)
    with torch.no_grad():
        every = chunked_divergence(
            plain, student_hidden.detach(), student_head, *both, sampled, diagnostics=diagnostics
        )
    match loss.tokens.by:
        case "student_entropy":
            scores = every.student_entropy
        case "divergence":
            assert teacher_hidden is not None, NO_TEACHER
            scores = every.loss  # of `plain`
        case "position":
            scores = -torch.arange(len(sampled.columns), device=mask.device, dtype=torch.float64)
        case "least_likely":
            scores = -sampled.logprobs
    chosen = selected(loss, mask, scores)
    its = chunked_divergence(
        loss,
        student_hidden[chosen],
        student_head,
        None if teacher_hidden is None else teacher_hidden[chosen],
        teacher_head,
        Sampled(*(column[chosen] if len(column) else column for column in sampled)),
        reward,
        None if weights is None else weights[chosen],
        diagnostics=False,
    )
    value = torch.zeros_like(every.loss).index_put((chosen,), its.loss.to(every.loss))
    return every._replace(loss=value)


SUMMED = 8
"""Chunks whose head gradients are added up in less than fp32, before they are added to others in fp32."""


class SummedGradients(TorchFunctionMode):
    """Adds up the gradients of trained weights [V, H] over several calls of a linear map, and then back-propagates
    their sums: a weight's hooks run once, and its gradient is added to in place rather than written for each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and torch.is_grad_enabled():
            weight, bias = args[1], args[2] if len(args) > 2 else None
            if weight.requires_grad and weight.is_leaf and bias is None and args[0].dim() == 2:
                return _SummedLinear.apply(args[0], (weight, self.sums))
        return func(*args, **(kwargs or {}))

    def backward(self) -> None:
        """Passes the sums on to the weights, whose hooks run."""
        while self.sums:
            weight, total = self.sums.popitem()
            weight.backward(total)


class _SummedLinear(torch.autograd.Function):
    """torch.nn.functional.linear [N, H] -> [N, V], whose weight's gradient is added to `sums`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight_and_sums: tuple[Tensor, dict[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.sums = weight_and_sums  # in a tuple, autograd does not see the weight
        return torch.nn.functional.linear(inputs, ctx.weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (inputs,), (gradient,) = ctx.saved_tensors, upstream
        if ctx.weight in ctx.sums:
            ctx.sums[ctx.weight].addmm_(gradient.t(), inputs)
        else:
            ctx.sums[ctx.weight] = gradient.t().mm(inputs)
        return gradient.mm(ctx.weight), None


def by_column(
    join: Callable[[list[Tensor]], Tensor], pieces: Sequence[TokenDivergence]
) -> TokenDivergence:
    """Joins the pieces column by column; a column without a teacher stays None."""
    columns = zip(*pieces, strict=True)
    joined: Any = (None if c[0] is None else join(list(c)) for c in columns)
    return TokenDivergence(*joined)
