"""Losses between student and teacher, as pure functions on flat completion tokens.

Inputs are logits over the shared vocabulary and, for the estimators, the sampled column: no prompts, no padding,
no images. Everything is computed in fp32 (or wider), in nats. Values and gradients are tested against float64
references.

A divergence is composed of three independent parts:

    temperature    both models' logits are divided by their own; the loss is not multiplied by T^2
    support        the columns that are compared, and the treatment of the tail (supports.py)
    divergence     sum_v f(q_v, p_v), of two distributions or of their restriction to a support (loss_formulas.py)

A loss of the sampled token uses one column instead. A reward's policy gradient is mixed in with weight 1 - alpha.
Diagnostics are always exact: over the full vocabulary, at temperature 1, at all tokens, also where only some have a
loss (token_selection.py). Without a teacher, which nll, constant_advantage and a pure reward do not need, those that
compare with it are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlopd.config.objective import (
    K1,
    Divergence,
    FullSupport,
    FunctionLoss,
    LossConfig,
    ReverseKL,
    RewardConfig,
    SampledToken,
)
from vlopd.train.distributions import Distribution, distribution, logprobs_at, top, widened
from vlopd.train.loss_formulas import NO_TEACHER, of_sampled, policy_gradient
from vlopd.train.summed_gradients import SummedGradients
from vlopd.train.supports import Slope, kl_terms, slope_on_support

TOP_K = 16
"""Top tokens of each model that the overlap diagnostics compare (as arXiv 2604.13016 does)."""
SUMMED = 8
"""Chunks whose head gradients are added up in less than fp32, before they are added to others in fp32."""


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
    top_overlap: Tensor | None = None
    """Fraction of the two models' TOP_K top tokens that they share."""
    student_shared_mass: Tensor | None = None
    """The student's probability of the shared ones, a fraction."""
    teacher_shared_mass: Tensor | None = None


class Sampled(NamedTuple):
    """The tokens of the completions: columns [N] of the shared vocabulary, the sampler's log-probs [N], nats.

    `advantages` [N] are the reward's, a completion's value at each of its tokens; empty, [0], without a reward.
    """

    columns: Tensor
    logprobs: Tensor
    advantages: Tensor = torch.empty(0)

    def at(self, rows: slice | Tensor) -> Sampled:
        """Those of some of the tokens."""
        return Sampled(*(column[rows] if len(column) else column for column in self))


class TokenInputs(NamedTuple):
    """What the loss of N completion tokens reads, and what it back-propagates through.

    The hidden states [N, H] and [N, H'] are mapped to logits [*, V] by their heads; both of the teacher's are None
    without one. With `weights` [N] the sum of weight * loss is back-propagated.
    """

    student_hidden: Tensor
    student_head: Callable[[Tensor], Tensor]
    teacher_hidden: Tensor | None
    teacher_head: Callable[[Tensor], Tensor] | None
    sampled: Sampled
    weights: Tensor | None = None

    def at(self, rows: slice | Tensor) -> TokenInputs:
        """Those of some of the tokens."""
        return self._replace(
            student_hidden=self.student_hidden[rows],
            teacher_hidden=None if self.teacher_hidden is None else self.teacher_hidden[rows],
            sampled=self.sampled.at(rows),
            weights=None if self.weights is None else self.weights[rows],
        )

    def detached(self) -> TokenInputs:
        """The same, for a pass without gradients."""
        return self._replace(student_hidden=self.student_hidden.detach(), weights=None)


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
                    sampled.at(part),
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


def chunked_divergence(
    loss: LossConfig,
    inputs: TokenInputs,
    reward: RewardConfig | None = None,
    diagnostics: bool = True,
) -> TokenDivergence:
    """The loss from hidden states, `loss.chunk_tokens` rows of logits at once. Equal to the unchunked loss.

    With weights, the sum of weight * loss is back-propagated here: each chunk through the head at once, so that no
    more than one chunk's logits are ever in memory, and all through `student_hidden` at the end. Without, the loss
    carries its gradient, and memory for it [N, V].
    """
    student_hidden, weights = inputs.student_hidden, inputs.weights
    n, size = len(student_hidden), loss.chunk_tokens
    in_hidden = torch.zeros_like(student_hidden) if student_hidden.requires_grad else None
    pieces, head_gradients = [], SummedGradients()
    for start in range(0, max(1, n), size):
        part = slice(start, start + size)
        its = inputs.at(part)
        theirs = None
        if its.teacher_hidden is not None and its.teacher_head is not None:
            with torch.no_grad():
                theirs = its.teacher_head(its.teacher_hidden)
        if weights is None:
            ours = its.student_head(its.student_hidden)
            pieces.append(token_divergence(loss, ours, theirs, its.sampled, reward, diagnostics))
            continue
        leaf = its.student_hidden.detach().requires_grad_()
        with head_gradients:
            ours = its.student_head(leaf)
        piece, gradient = evaluate(
            loss, ours.detach(), theirs, its.sampled, reward, its.weights, diagnostics
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


def by_column(
    join: Callable[[list[Tensor]], Tensor], pieces: Sequence[TokenDivergence]
) -> TokenDivergence:
    """Joins the pieces column by column; a column without a teacher stays None."""
    columns = zip(*pieces, strict=True)
    joined: Any = (None if c[0] is None else join(list(c)) for c in columns)
    return TokenDivergence(*joined)
