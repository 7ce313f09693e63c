"""A divergence and its gradient in the student's logits, over the whole vocabulary or on a support."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlopd.config.objective import (
    Divergence,
    ForwardKL,
    FullSupport,
    IntersectionTopK,
    ReverseKL,
    StudentTopK,
    TeacherTopK,
    TopK,
)
from vlopd.train.distributions import Distribution, distribution, top
from vlopd.train.loss_formulas import divergence


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
