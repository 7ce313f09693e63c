"""Losses against float64 references written from their formulas."""

import math
import weakref

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from vlopd.config.input import load_config
from vlopd.config.objective import (
    JSD,
    K1,
    K2,
    K3,
    NLL,
    ConstantAdvantage,
    LossConfig,
    ReverseKL,
    RewardConfig,
    TokenSelection,
)
from vlopd.errors import ConfigError
from vlopd.train import losses
from vlopd.train.distributions import top
from vlopd.train.losses import Sampled, TokenDivergence, TokenInputs, chunked_divergence
from vlopd.train.token_selection import at_selected, loss_tokens, selected, token_weights

INF = float("inf")

DIVERGENCES = {
    "reverse_kl": {"type": "reverse_kl"},
    "forward_kl": {"type": "forward_kl"},
    "jsd 0.5": {"type": "jsd"},
    "jsd 0.1": {"type": "jsd", "beta": 0.1},
    "jsd 0.9": {"type": "jsd", "beta": 0.9},
    **{
        f"normalised jsd {beta}": {"type": "jsd", "beta": beta, "normalised": True}
        for beta in (0, 1e-3, 0.5, 0.7, 1 - 1e-3, 1)
    },
    "skew_reverse_kl": {"type": "skew_reverse_kl"},
    "skew_reverse_kl 0.7": {"type": "skew_reverse_kl", "alpha": 0.7},
    "skew_forward_kl": {"type": "skew_forward_kl"},
    "skew_forward_kl 0.7": {"type": "skew_forward_kl", "alpha": 0.7},
}
TAILS = ("bucket", "renormalise", "none")
SUPPORTS = {
    "full": {"type": "full"},
    **{
        f"{kind} {tail}": {"type": kind, "k": 8, "tail": tail}
        for kind in ("teacher_top_k", "student_top_k", "union", "intersection")
        for tail in TAILS
    },
}
by_divergence = pytest.mark.parametrize("name", DIVERGENCES)
by_support = pytest.mark.parametrize("support", SUPPORTS)
by_estimator = pytest.mark.parametrize("kind", ["k1", "k2", "k3"])


def make(name: str, support: str = "full", **more) -> LossConfig:
    """The config class of a table such as a user writes."""
    table = DIVERGENCES.get(name, {"type": name})
    if name in DIVERGENCES:
        more["support"] = SUPPORTS[support]
    return TypeAdapter(LossConfig).validate_python({**table, **more})


def token_divergence(loss, student, teacher, sampled=None, reward=None) -> TokenDivergence:
    """The function under test; where the loss does not look at the sampled tokens, some are made up."""
    n = len(student)
    made_up = Sampled(torch.arange(n) % student.shape[1], torch.zeros(n))
    return losses.token_divergence(loss, student, teacher, sampled or made_up, reward)


# ------------------------------------------------------------------------------------ the reference


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_v a_v log(a_v / b_v) over the entries where a_v is not 0."""
    there = a > 0
    return (a[there] * (a[there] / b[there]).log()).sum()


def formula(loss, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The loss of one token from two vectors of probabilities (which need not sum to 1)."""
    if loss.type == "jsd":
        beta = loss.beta
        if (
            beta == 0
        ):  # the limits, for measures: with sum_v (b_v - a_v), which is 0 for probabilities
            return kl(p, q) + (q - p).sum()
        if beta == 1:
            return kl(q, p) + (p - q).sum()
        m = beta * p + (1 - beta) * q
        usual = beta * kl(p, m) + (1 - beta) * kl(q, m)
        return usual / (beta * (1 - beta)) if loss.normalised else usual
    if loss.type == "skew_reverse_kl":
        return kl(q, loss.alpha * q + (1 - loss.alpha) * p)
    if loss.type == "skew_forward_kl":
        return kl(p, loss.alpha * p + (1 - loss.alpha) * q)
    return kl(q, p) if loss.type == "reverse_kl" else kl(p, q)


def columns(support, student: torch.Tensor, teacher: torch.Tensor) -> list[int]:
    """The support of one token as a set of columns, from both models' logits."""
    ours, theirs = (
        set(sorted(range(len(logits)), key=lambda v: -logits[v])[: support.k])
        for logits in (student.tolist(), teacher.tolist())
    )
    chosen = {
        "teacher_top_k": theirs,
        "student_top_k": ours,
        "union": ours | theirs,
        "intersection": ours & theirs,
    }
    return sorted(chosen[support.type])


def reference(loss, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The loss of every token in float64, token by token, with the support as a set of indices."""
    losses = []
    for x, y in zip(student, teacher, strict=True):
        q = (x.double() / loss.student_temperature).softmax(0)
        p = (y.double() / loss.teacher_temperature).softmax(0)
        if loss.support.type != "full":
            inside = columns(loss.support, x.detach(), y)
            outside = sorted(set(range(len(x))) - set(inside))
            if loss.support.tail == "bucket":
                q, p = (torch.cat([a[inside], a[outside].sum()[None]]) for a in (q, p))
            elif loss.support.tail == "none" or not inside:
                q, p = q[inside], p[inside]
            else:
                q, p = q[inside] / q[inside].sum(), p[inside] / p[inside].sum()
        losses.append(formula(loss, q, p))
    return torch.stack(losses)


def logits(kind: str, n: int = 6, size: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Fp32 logits [n, size] of student and teacher."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, size), torch.randn(n, size)
    if kind == "near one-hot":
        student, teacher = 8 * student, 8 * teacher
    if kind == "close":
        teacher = student + 0.05 * teacher
    if kind == "identical":
        teacher = student.clone()
    if kind == "masked":  # the same columns in both, as where a model bans tokens
        student[:, 5:20] = teacher[:, 5:20] = -INF
    return student, teacher


def compare(loss, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Value and gradient agree with float64: to 1e-5, of a token's largest gradient for the gradient.

    Beside that an fp32 log-prob's own rounding (4 ulp of the largest logit, or 2e-7), which is all that is
    left where the models agree and the loss is 0.
    """
    wide = student.double().requires_grad_()
    expected = reference(loss, wide, teacher.double())
    expected.sum().backward()
    narrow = student.clone().requires_grad_()
    value = token_divergence(loss, narrow, teacher).loss
    value.sum().backward()
    largest = max(float(x[x.isfinite()].abs().max()) for x in (student, teacher))
    rounding = 4 * 2**-24 * max(1.0, largest)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=rounding)
    error = (narrow.grad.double() - wide.grad).abs().amax(-1)
    assert bool((error <= 1e-5 * wide.grad.abs().amax(-1) + rounding).all()), error


# -------------------------------------------------------------------------------------- divergences


@by_divergence
@by_support
def test_value_and_gradient_match_float64(name, support):
    """In fp32, every divergence on every support, and its gradient, agrees with float64 to 1e-5."""
    for kind in ("random", "near one-hot", "close", "identical", "masked"):
        compare(make(name, support), *logits(kind))


@by_divergence
def test_value_and_gradient_match_float64_over_a_large_vocabulary(name):
    """The same at V = 152,064, where sums are long and probabilities small.

    (For which torch's own fp32 log_softmax, off by 1.6e-5 nats at a spread of 3 on a CPU, would not do.)
    """
    student, teacher = logits("random", 1, 152_064)
    for spread in (1, 3):
        for support in ("full", "teacher_top_k bucket"):
            compare(make(name, support), spread * student, spread * teacher)


@by_divergence
@pytest.mark.parametrize("support", ["full", "union bucket", "teacher_top_k renormalise"])
@pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.0), (0.7, 1.3)])
def test_each_temperature_divides_its_own_logits(name, support, temperatures):
    """With student and teacher temperatures, the loss is that of the divided logits, diagnostics as without."""
    ours, theirs = temperatures
    loss = make(name, support, student_temperature=ours, teacher_temperature=theirs)
    student, teacher = logits("random")
    compare(loss, student, teacher)
    got, plain = (token_divergence(x, student, teacher) for x in (loss, make("reverse_kl")))
    for a, b in zip(got[1:], plain[1:], strict=True):
        assert torch.equal(a, b)


def test_reverse_kl_gradient_is_the_closed_form():
    """The gradient of KL(q||p) in the logits is q_v [log(q_v / p_v) - KL]."""
    torch.manual_seed(1)
    student = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 11, dtype=torch.float64)
    value = token_divergence(ReverseKL(), student, teacher).loss
    value.sum().backward()
    q = student.detach().softmax(-1)
    ratio = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(student.grad, q * (ratio - value.detach()[:, None]))


@by_divergence
@by_support
def test_divergence_of_a_model_from_itself_is_zero(name, support):
    """D(p, p) = 0 and its gradient is 0, on whatever support; bf16 logits too."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = torch.randn(4, 30).to(dtype).requires_grad_()
        value = token_divergence(make(name, support), leaf, leaf.detach()).loss
        value.sum().backward()
        assert float(value.detach().abs().max()) < 1e-6
        if support.endswith("none") and name not in ("jsd 0.5", "jsd 0.1", "jsd 0.9"):
            continue  # a part of a divergence is not stationary there
        assert float(leaf.grad.abs().max()) < 1e-6


@by_divergence
@by_support
def test_divergence_is_not_negative(name, support):
    """Divergences are at least 0 up to rounding; without a tail, KLs of parts may not be, JSDs are still."""
    torch.manual_seed(2)
    value = token_divergence(make(name, support), torch.randn(300, 30), torch.randn(300, 30)).loss
    if "jsd" in name or not support.endswith("none"):
        assert float(value.min()) >= -1e-6


@by_divergence
@pytest.mark.parametrize("kind", ["random", "masked"])
def test_a_bucket_loses_information_and_all_of_k_loses_none(name, kind):
    """A tail bucket's divergence is at most the full one; with k = V it is the full one, in any support."""
    student, teacher = logits(kind, 40)
    full = token_divergence(make(name), student, teacher).loss
    for support, about in SUPPORTS.items():
        if support.endswith("bucket"):
            part = token_divergence(make(name, support), student, teacher).loss
            assert bool((part <= full + 1e-6).all())
        if support != "full":
            leaf = student.clone().requires_grad_()
            whole = TypeAdapter(LossConfig).validate_python(
                {**DIVERGENCES[name], "support": {**about, "k": 50}}
            )
            value = token_divergence(whole, leaf, teacher).loss
            value.sum().backward()
            torch.testing.assert_close(value, full, rtol=1e-5, atol=1e-6)
            assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_intersection_says_nothing(tail):
    """Where the two models' likeliest tokens have none in common, the loss and its gradient are 0."""
    student = torch.arange(20.0).repeat(2, 1).requires_grad_()
    loss = make("reverse_kl", f"intersection {tail}")
    value = token_divergence(loss, student, -student.detach()).loss
    value.sum().backward()
    assert float(value.detach().abs().max()) < 1e-6
    assert float(student.grad.abs().max()) < 1e-6


@by_divergence
@pytest.mark.parametrize("tail", TAILS)
def test_banned_tokens_are_in_no_support(name, tail):
    """Which of a model's banned tokens a top-k would take is chance, so none are: with k beyond its tokens, the
    support is those it has, wherever in the vocabulary they stand."""
    student, teacher = hostile()["student has three tokens"]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    values = [
        token_divergence(make(name, f"student_top_k {tail}"), x, y).loss
        for x, y in ((student, teacher), (student[:, order], teacher[:, order]))
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", [0, 1])
def test_the_normalised_jsd_is_continuous_at_its_ends(end):
    """It tends to the forward KL as beta -> 0 and to the reverse KL as beta -> 1; the usual form to 0."""
    student, teacher = (x.double() for x in logits("random", 20))
    limit = token_divergence(
        make("reverse_kl" if end else "forward_kl"), student, teacher
    ).loss.double()
    exact = token_divergence(JSD(beta=end, normalised=True), student, teacher).loss
    torch.testing.assert_close(exact, limit, rtol=1e-12, atol=1e-12)
    before = INF
    for small in (1e-2, 1e-4, 1e-6):
        beta = 1 - small if end else small
        gap = (
            token_divergence(JSD(beta=beta, normalised=True), student, teacher).loss - limit
        ).abs()
        assert float(gap.max()) < 10 * small * float(limit.max())
        assert float(gap.max()) < before
        before = float(gap.max())
        usual = token_divergence(JSD(beta=beta), student, teacher).loss
        assert float(usual.max()) < 2 * small * float(limit.max())


def test_the_normalised_jsd_is_as_steep_for_every_beta():
    """Close to the teacher it is the KL for every beta, to first order in the distance."""
    student, teacher = (x.double() for x in logits("close", 20))
    expected = token_divergence(make("reverse_kl"), student, teacher).loss
    for beta in (0, 0.01, 0.3, 0.5, 0.9, 1):
        got = token_divergence(JSD(beta=beta, normalised=True), student, teacher).loss
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0)


def hostile(n: int = 1, size: int = 24) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits [n, size] of student and teacher as bans and narrow floats make them."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, size), torch.randn(n, size)

    def ban(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return logits.scatter(1, columns, -INF)

    lower, upper = torch.arange(size).expand(n, size).split(size // 2, 1)
    all_but_three = torch.arange(3, size).expand(n, -1)
    opposite = 1e4 * student.sign()
    return {
        "teacher bans the student's likeliest": (student, ban(teacher, student.topk(8).indices)),
        "and half of them": (student, ban(teacher, student.topk(4).indices)),
        "student bans the teacher's likeliest": (ban(student, teacher.topk(8).indices), teacher),
        "student has three tokens": (ban(student, all_but_three), teacher),
        "teacher has three tokens": (student, ban(teacher, all_but_three)),
        "no token in common": (ban(student, lower), ban(teacher, upper)),
        "far apart": (student + opposite, teacher - opposite),
        "fp16": ((2e4 * student).clamp(-65504, 65504).half(), (2e4 * teacher).half()),
        "bf16": ((1e4 * student).bfloat16(), (1e4 * teacher).bfloat16()),
    }


def from_logs(loss, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of one token from both models' logits [V] in float64, from logarithms throughout: of banned tokens
    nothing is computed, and a model that bans all of a renormalised support makes the loss 0."""
    q = (x.double() / loss.student_temperature).log_softmax(0)
    p = (y.double() / loss.teacher_temperature).log_softmax(0)
    support = loss.support
    if support.type != "full":
        ours, theirs = (
            {v for v in sorted(range(len(a)), key=lambda v: -a[v])[: support.k] if a[v] > -INF}
            for a in (x.detach(), y)
        )
        inside = {
            "teacher_top_k": theirs,
            "student_top_k": ours,
            "union": ours | theirs,
            "intersection": ours & theirs,
        }[support.type]
        outside = sorted(set(range(len(x))) - inside)
        kept = [a[sorted(inside)] for a in (q, p)]
        if support.tail == "renormalise":
            if any(not bool((a > -INF).any()) for a in kept):
                return 0.0 * q[q > -INF].sum()
            kept = [a - a[a > -INF].logsumexp(0) for a in kept]
        elif support.tail == "bucket":
            tails = [a[outside][a[outside] > -INF] for a in (q, p)]
            tails = [a.logsumexp(0) if len(a) else torch.tensor(-INF).double() for a in tails]
            kept = [torch.cat([a, tail[None]]) for a, tail in zip(kept, tails, strict=True)]
        q, p = kept
    either = (q > -INF) | (p > -INF)
    q, p = q[either], p[either]

    def kl(a, b):
        there = a.exp() > 0
        return (a[there].exp() * (a[there] - b[there])).sum()

    def mixed(share):  # log(share p + (1 - share) q)
        ours, theirs = torch.tensor([1 - share, share], dtype=torch.float64).log()
        return torch.logaddexp(theirs + p, ours + q)

    if loss.type == "jsd":
        beta = loss.beta
        if beta in (0, 1):
            a, b = (q, p) if beta else (p, q)
            return kl(a, b) + b.exp().sum() - a.exp().sum()
        usual = beta * kl(p, mixed(beta)) + (1 - beta) * kl(q, mixed(beta))
        return usual / (beta * (1 - beta)) if loss.normalised else usual
    if loss.type == "skew_reverse_kl":
        return kl(q, mixed(1 - loss.alpha))
    if loss.type == "skew_forward_kl":
        return kl(p, mixed(loss.alpha))
    return kl(q, p) if loss.type == "reverse_kl" else kl(p, q)


@by_divergence
@by_support
def test_bans_and_extremes_give_a_number_or_infinity(name, support):
    """Where models ban tokens or are 1e4 nats apart, in fp32, fp16 or bf16, the loss is the float64 one: infinite
    where a KL says so, 0 where one model bans all of a renormalised support, never NaN. Where it is finite so is
    its gradient, which is the float64 one."""
    for what, (student, teacher) in hostile().items():
        for k in (8, 24) if "three" in what else (8,):
            loss = make(name, support)
            if support != "full":
                loss = loss.model_copy(update={"support": loss.support.model_copy(update={"k": k})})
            leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
            value = token_divergence(loss, leaf, teacher).loss
            expected = torch.stack(
                [from_logs(loss, x, y) for x, y in zip(wide, teacher, strict=True)]
            )
            finite = expected.detach().isfinite()
            assert not bool(expected.detach().isnan().any()), what
            largest = max(float(x[x.isfinite()].abs().max()) for x in (student, teacher))
            rounding = 4 * 2**-24 * max(1.0, largest)
            torch.testing.assert_close(
                value.detach().double(), expected.detach(), rtol=1e-5, atol=rounding
            )
            if not bool(finite.any()):
                continue
            value[finite].sum().backward()
            expected[finite].sum().backward()
            got, want = leaf.grad[finite].double(), wide.grad[finite]
            precision = 1e-5 if student.dtype == torch.float32 else 0.01  # that of leaf.grad
            bound = precision * want.abs().amax(-1) + rounding
            assert bool(((got - want).abs().amax(-1) <= bound).all()), (what, k)
            assert bool(leaf.grad.isfinite().all()), (what, k)


@by_divergence
@pytest.mark.parametrize("banned", ["student", "teacher"])
def test_tokens_that_one_model_bans(name, banned):
    """Of -inf in one model's logits alone: the KL to it is infinite, all else finite and equal to float64."""
    student, teacher = logits("random")
    (student if banned == "student" else teacher)[:, 3:6] = -INF
    infinite = {
        "student": ("forward_kl", "normalised jsd 0"),
        "teacher": ("reverse_kl", "normalised jsd 1"),
    }
    loss = make(name)
    if name in infinite[banned]:
        value = token_divergence(loss, student, teacher).loss
        assert bool((value == INF).all())
    else:
        compare(loss, student, teacher)


@pytest.mark.parametrize(
    "name", [*DIVERGENCES, "nll", "k1", "k2", "k3", "union", "intersection", "teacher_top_k"]
)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_chunks_change_nothing(name, alpha, chunk):
    """Back-propagated chunk by chunk, value, diagnostics and gradients (hidden states and head) equal those of all
    logits at once under autograd, of both models and with a reward; heads with and without a bias."""
    torch.manual_seed(3)
    head, teacher_head = (
        torch.nn.Linear(8, 20, chunk == 4).double(),
        torch.nn.Linear(6, 20).double(),
    )
    hidden, teacher_hidden = torch.randn(11, 8).double(), torch.randn(11, 6).double()
    weights = torch.rand(11).double()
    sampled = Sampled(torch.randint(0, 20, (11,)), -3 * torch.rand(11), torch.randn(11))
    tables = {"student_temperature": 0.8} if name in DIVERGENCES else {}
    if name in ("union", "intersection", "teacher_top_k"):
        loss = make("reverse_kl", f"{name} bucket")
    else:
        loss = make(name, **tables)
    reward = None if alpha is None else RewardConfig(rule="exact_match", alpha=alpha)

    def run(size: int, at_once: bool):
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        both = (leaf, head, teacher_hidden, teacher_head, sampled)
        cut = loss.model_copy(update={"chunk_tokens": size})
        if at_once:
            out = chunked_divergence(cut, TokenInputs(*both), reward)
            (out.loss * weights).sum().backward()
        else:
            out = chunked_divergence(cut, TokenInputs(*both, weights), reward)
        return *(column.detach() for column in out), leaf.grad, head.weight.grad.clone()

    for ours, whole in zip(run(chunk, False), run(1000, True), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
    assert teacher_head.weight.grad is None


def test_many_chunks_lose_no_digits_in_bf16():
    """The head's gradient over 256 chunks, of which each is rounded to bf16, is as near to float64's as that of one."""
    torch.manual_seed(0)
    hidden, teacher_logits = torch.randn(256, 32), torch.randn(256, 100)
    sampled = Sampled(torch.randint(0, 100, (256,)), torch.zeros(256))
    weight = (torch.randn(100, 32) / 3).bfloat16()

    def gradient(size: int, dtype: torch.dtype) -> torch.Tensor:
        head = torch.nn.Parameter(weight.to(dtype))
        total = torch.zeros(head.shape, dtype=torch.float64)

        def collect(parameter):
            total.add_(parameter.grad)
            parameter.grad = None

        head.register_post_accumulate_grad_hook(collect)
        leaf = hidden.bfloat16().to(dtype).requires_grad_()
        inputs = TokenInputs(
            leaf,
            lambda x: torch.nn.functional.linear(x, head),
            teacher_logits,
            lambda x: x,
            sampled,
            torch.full((256,), 1 / 256),
        )
        chunked_divergence(ReverseKL(chunk_tokens=size), inputs)
        return total

    exact = gradient(256, torch.float64)
    one, many = ((gradient(n, torch.bfloat16) - exact).norm() for n in (256, 1))
    assert float(one) > 0
    assert float(many) < 1.3 * float(one)


def test_chunks_hold_no_more_than_a_chunk_of_logits():
    """What autograd holds at any time in a back-propagated loss does not grow with the tokens' number times V."""
    head = torch.nn.Linear(4, 500)
    alive = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor
            alive.add(self)

    def most(tokens: int, chunk: int) -> int:
        sizes = []

        def measured(x: torch.Tensor) -> torch.Tensor:
            logits = head(x)
            sizes.append(sum(each.tensor.numel() for each in alive) + logits.numel())
            return logits

        hidden = torch.randn(tokens, 4, requires_grad=True)
        sampled = Sampled(torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens))
        inputs = TokenInputs(hidden, measured, hidden.detach(), head, sampled, torch.ones(tokens))
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            chunked_divergence(ReverseKL(chunk_tokens=chunk), inputs)
        return max(sizes)

    assert most(40, 40) >= 40 * 500
    assert most(40, 8) < 2 * 8 * 500


@pytest.mark.parametrize("k", [1, 16, 40])
def test_the_largest_are_found_by_blocks(k):
    """The k largest of each row, in order, also where they stand together or in the columns after the last block."""
    torch.manual_seed(0)
    values = torch.randn(5, 64 * 170 + 9)
    values[1, 64:84] += 10
    values[2, -9:] += 10
    values[3, :] = -INF
    values[3, 5:100:7] = 1.5
    values[4] = values[4].bfloat16()
    expected = values.topk(k).values
    assert torch.equal(values.gather(1, top(values, k)), expected)


# --------------------------------------------------------------------------------------- estimators


def surrogate(advantage, ratio, clip) -> torch.Tensor:
    """PPO's surrogate token by token, in float64."""
    if clip is None:
        return -advantage * ratio
    low, high = torch.tensor(1.0 - clip), torch.tensor(1.0 + clip)
    return torch.stack(
        [-min(w * a, min(max(w, low), high) * a) for w, a in zip(ratio, advantage, strict=True)]
    )


def estimator_reference(loss, student, teacher, columns, old) -> torch.Tensor:
    """The estimators at each token in float64, from probabilities."""
    rows = torch.arange(len(columns))
    q, p = student.softmax(-1)[rows, columns], teacher.softmax(-1)[rows, columns]
    if loss.type == "nll":
        return -q.log()
    if loss.type == "constant_advantage":
        return surrogate(torch.full_like(p, loss.advantage), q / old.exp(), loss.clip)
    if loss.type == "k2":
        return (q / p).log() ** 2 / 2
    if loss.type == "k3":
        return p / q - 1 - (p / q).log()
    return surrogate((p / q).log().detach(), q / old.exp(), loss.clip)


ESTIMATORS = (
    *(NLL(), K1(), K1(clip=None), K1(clip=0.05), K2(), K3()),
    *(ConstantAdvantage(), ConstantAdvantage(advantage=0.5, clip=None)),
)


@pytest.mark.parametrize("loss", ESTIMATORS, ids=str)
@pytest.mark.parametrize("kind", ["random", "near one-hot", "close", "identical", "masked"])
def test_estimators_match_float64(loss, kind):
    """Value and gradient of every estimator agree with float64, also of tokens of an older student."""
    student, teacher = logits(kind, 40)
    torch.manual_seed(4)
    columns = student.softmax(-1).multinomial(1)[:, 0]
    old = student.log_softmax(-1)[torch.arange(40), columns] + 0.3 * torch.randn(40)
    wide = student.double().requires_grad_()
    expected = estimator_reference(loss, wide, teacher.double(), columns, old.double())
    expected.sum().backward()
    narrow = student.clone().requires_grad_()
    value = token_divergence(loss, narrow, teacher, Sampled(columns, old)).loss
    value.sum().backward()
    largest = max(float(x[x.isfinite()].abs().max()) for x in (student, teacher))
    rounding = 1e-6 * max(1.0, largest)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=rounding)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=rounding)


@by_estimator
def test_estimators_means_are_what_they_estimate(kind):
    """Over 20,000 samples, within 3 standard errors: values of k1 and k3 average to the reverse KL, and that
    of k2 to its own expectation; gradients of k1 and k2 to the reverse KL's, those of k3 to the forward KL's."""
    n = 20_000
    torch.manual_seed(5)
    student, teacher = torch.randn(1, 12).double(), torch.randn(1, 12).double()
    q, p = student.softmax(-1)[0], teacher.softmax(-1)[0]
    drawn = q.multinomial(n, replacement=True)
    leaf = student.repeat(n, 1).requires_grad_()
    out = token_divergence(make(kind), leaf, teacher.repeat(n, 1), Sampled(drawn, q.log()[drawn]))
    out.loss.sum().backward()

    whole = student.clone().requires_grad_()
    exact = token_divergence(make("forward_kl" if kind == "k3" else "reverse_kl"), whole, teacher)
    exact.loss.sum().backward()
    value = (q * (q / p).log() ** 2 / 2).sum() if kind == "k2" else exact.reverse_kl[0]
    for samples, expected in (
        (out.loss.detach()[:, None], value[None]),
        (leaf.grad, whole.grad[0]),
    ):
        error = samples.std(0) / n**0.5
        assert bool(((samples.mean(0) - expected).abs() <= 3 * error).all())
        assert bool((3 * error < 0.2 * expected.abs().max()).all())  # the test could fail


def test_tokens_that_are_used_once_have_ratio_one():
    """Where the sampler is the student itself, clipping changes nothing and k1's value is d."""
    student, teacher = logits("random", 30)
    columns = student.argmax(-1)
    old = student.log_softmax(-1).gather(1, columns[:, None])[:, 0]
    values = []
    for loss in (K1(clip=0.01), K1(clip=None)):
        leaf = student.clone().requires_grad_()
        value = token_divergence(loss, leaf, teacher, Sampled(columns, old)).loss
        value.sum().backward()
        values.append((value.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    other = teacher.log_softmax(-1).gather(1, columns[:, None])[:, 0]
    torch.testing.assert_close(values[0][0], old - other)


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("name", ["reverse_kl", "jsd 0.5", "k1", "k3"])
@pytest.mark.parametrize(("alpha", "clip"), [(0.0, 0.2), (0.3, 0.2), (0.3, None), (0.7, 0.05)])
def test_a_rewards_policy_gradient_is_mixed_in_by_its_share(name, alpha, clip):
    """Value and gradient are alpha * loss + (1 - alpha) * surrogate in float64; under k1 the advantages mix."""
    student, teacher = logits("random", 40)
    torch.manual_seed(6)
    columns = student.softmax(-1).multinomial(1)[:, 0]
    rows = torch.arange(40)
    old = student.log_softmax(-1)[rows, columns] + 0.3 * torch.randn(40)
    advantages = torch.randn(40)
    loss, reward = make(name), RewardConfig(rule="exact_match", alpha=alpha, clip=clip)
    wide, theirs = student.double().requires_grad_(), teacher.double()
    q, p = wide.softmax(-1)[rows, columns], theirs.softmax(-1)[rows, columns]
    ratio = q / old.double().exp()
    if name == "k1":
        both = alpha * (p / q).log().detach() + (1 - alpha) * advantages.double()
        expected = surrogate(both, ratio, clip)
    else:
        own = (
            reference(loss, wide, theirs)
            if name in DIVERGENCES
            else estimator_reference(loss, wide, theirs, columns, old.double())
        )
        expected = alpha * own + (1 - alpha) * surrogate(advantages.double(), ratio, clip)
    expected.sum().backward()
    narrow = student.clone().requires_grad_()
    value = token_divergence(loss, narrow, teacher, Sampled(columns, old, advantages), reward).loss
    value.sum().backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd 0.5", "nll", "k1", "k2", "k3"])
def test_what_a_teacher_bans_is_not_looked_at_without_its_share(name):
    """Of a token that the teacher bans, the estimators are infinite, nll is not; with a reward alone (alpha = 0)
    every loss is the policy gradient, finite in value and gradient."""
    student, teacher = logits("random", 5)
    columns = torch.arange(5)
    teacher[columns, columns] = -INF
    old = student.log_softmax(-1)[columns, columns]
    sampled = Sampled(columns, old, torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5]))
    leaf = student.clone().requires_grad_()
    rewarded = token_divergence(
        make(name), leaf, teacher, sampled, RewardConfig(rule="exact_match")
    )
    torch.testing.assert_close(rewarded.loss.detach(), -sampled.advantages)
    rewarded.loss.sum().backward()
    assert bool(leaf.grad.isfinite().all())
    assert float(leaf.grad.abs().max()) > 0.1
    if name in ("k1", "k2", "k3"):
        assert bool((token_divergence(make(name), student, teacher, sampled).loss == INF).all())
    if name == "nll":
        plain = token_divergence(make(name), student, teacher, sampled).loss
        torch.testing.assert_close(plain, -old)


def test_a_rewards_gradient_climbs_the_expected_reward():
    """Over 20,000 samples of one token, the mean gradient is minus that of the expected reward (3 errors)."""
    n = 20_000
    torch.manual_seed(7)
    student, rewards = torch.randn(1, 12).double(), torch.randn(12).double()
    q = student.softmax(-1)[0]
    drawn = q.multinomial(n, replacement=True)
    leaf = student.repeat(n, 1).requires_grad_()
    sampled = Sampled(drawn, q.log()[drawn], rewards[drawn])
    reward = RewardConfig(rule="exact_match")
    token_divergence(ReverseKL(), leaf, leaf.detach(), sampled, reward).loss.sum().backward()
    whole = student.clone().requires_grad_()
    (whole.softmax(-1) * rewards).sum().backward()
    error = leaf.grad.std(0) / n**0.5
    assert bool(((leaf.grad.mean(0) + whole.grad[0]).abs() <= 3 * error).all())
    assert bool((3 * error < 0.3 * whole.grad.abs().max()).all())  # the test could fail


# ------------------------------------------------------------------------------------- normalisation


def test_weights_are_what_the_normalisation_says():
    """Of completions of 1, 3 and 4 tokens, limit 5: over tokens, over each completion's own, over the limit."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    values = torch.arange(1.0, 9.0).double()

    def mean(normalisation: str) -> float:
        loss = ReverseKL(normalisation=normalisation)
        return float((token_weights(loss, mask, 8, 3, 5) * values).sum())

    assert mean("token_mean") == pytest.approx(36 / 8)
    assert mean("sequence_mean") == pytest.approx((1 + 9 / 3 + 26 / 4) / 3)
    assert mean("fixed_length") == pytest.approx(36 / 15)


# ------------------------------------------------------------------------------------ chosen tokens

BY = ("student_entropy", "divergence", "position", "least_likely")
LENGTHS = (1, 3, 7, 4)
"""Tokens of the completions, 15 in all; of a fraction of 0.3 have a loss 1, 1, 3 and 2."""


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd 0.5", "constant_advantage"])
@pytest.mark.parametrize("chunk", [2, 100])
def test_the_loss_is_on_the_chosen_tokens_alone(by, name, chunk):
    """Value and gradients (hidden states and head) of the weighted sum are those of the chosen tokens' losses in
    float64, each token chosen by hand; the diagnostics are of all tokens, to the bit. Whole or in chunks."""
    torch.manual_seed(8)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    head, theirs = (torch.nn.Linear(width, 20, False) for width in (8, 6))
    hidden, teacher_hidden = torch.randn(15, 8), torch.randn(15, 6)
    columns = torch.randint(0, 20, (15,))
    with torch.no_grad():
        x = head(hidden).double()
        q, p = x.softmax(-1), theirs(teacher_hidden).double().softmax(-1)
        old = x.log_softmax(-1)[torch.arange(15), columns].float() + 0.1 * torch.randn(15)
    scores = {
        "student_entropy": -(q * q.log()).sum(-1),
        "divergence": (q * (q / p).log()).sum(-1),
        "position": -torch.arange(15.0),
        "least_likely": -old,
    }[by].tolist()
    chosen, start = [], 0
    for length in LENGTHS:
        order = sorted(range(start, start + length), key=lambda n: -scores[n])
        chosen += sorted(order[: math.ceil(0.3 * length)])
        start += length
    assert len(chosen) == 7
    loss = make(name, chunk_tokens=chunk, tokens=TokenSelection(by=by, fraction=0.3))
    weights = token_weights(loss, mask, 7, 4, 9)
    torch.testing.assert_close(weights, torch.full((15,), 1 / 7, dtype=torch.float64))

    leaf = hidden.clone().requires_grad_()
    inputs = TokenInputs(leaf, head, teacher_hidden, theirs, Sampled(columns, old), weights)
    got = at_selected(loss, mask, inputs)
    with torch.no_grad():
        plain = chunked_divergence(ReverseKL(chunk_tokens=chunk), inputs.detached())
    for ours, whole in zip(got[1:], plain[1:], strict=True):
        assert torch.equal(ours, whole)

    wide, matrix = hidden.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    logits, taught = (wide @ matrix.T)[chosen], p.log()[chosen]
    if name == "constant_advantage":
        rows = (logits, taught, columns[chosen], old.double()[chosen])
        expected = estimator_reference(loss, *rows)
    else:
        expected = reference(loss, logits, taught)
    (expected.sum() / 7).backward()
    found = torch.zeros(15, dtype=torch.float64)
    found[chosen] = expected.detach()
    torch.testing.assert_close(got.loss.double(), found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), matrix.grad, rtol=1e-4, atol=1e-6)


def test_means_are_over_the_chosen_tokens():
    """Of 1, 3 and 10 tokens with a fraction of 0.3: 1, 1 and 3 (0.3 * 10 is not rounded up); of a limit of 12, 4."""
    lengths = torch.tensor([1, 3, 10])
    mask = torch.arange(10) < lengths[:, None]
    loss = ReverseKL(tokens=TokenSelection(by="position", fraction=0.3))
    assert loss_tokens(loss, lengths).tolist() == [1, 1, 3]
    first = selected(loss, mask, torch.zeros(14))  # ties go to the earlier
    assert first.nonzero().flatten().tolist() == [0, 1, 4, 5, 6]

    def weights(normalisation: str) -> list[float]:
        its = loss.model_copy(update={"normalisation": normalisation})
        return token_weights(its, mask, 5, 3, 12)[first].tolist()

    assert weights("token_mean") == pytest.approx([1 / 5] * 5)
    assert weights("sequence_mean") == pytest.approx([1 / 3, 1 / 3, 1 / 9, 1 / 9, 1 / 9])
    assert weights("fixed_length") == pytest.approx([1 / 12] * 5)


# -------------------------------------------------------------------------------------- diagnostics


def test_overlap_is_that_of_the_sixteen_likeliest():
    """Identical models share all of them; models that share 4 of 16 have an overlap of 1/4, and its mass."""
    student = torch.full((2, 40), -4.0)
    student[:, :16] = 2.0
    teacher = torch.full((2, 40), -4.0)
    teacher[:, 12:28] = 1.0
    teacher[1] = student[1]
    out = token_divergence(make("forward_kl"), student, teacher)
    torch.testing.assert_close(out.top_overlap, torch.tensor([0.25, 1.0]))
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(
        out.student_shared_mass, torch.stack([q[0, 12:16].sum(), q[1, :16].sum()])
    )
    torch.testing.assert_close(
        out.teacher_shared_mass, torch.stack([p[0, 12:16].sum(), p[1, :16].sum()])
    )


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "jsd", "beta": 0}, "forward KL"),
        ({"type": "jsd", "beta": 1}, "reverse KL"),
        (
            {"type": "jsd", "support": {"type": "teacher_top_k", "k": 1, "tail": "renormalise"}},
            "always 0",
        ),
    ],
)
def test_losses_that_are_always_zero_are_refused(table, message):
    """A usual JSD at its ends and one renormalised token teach nothing: refused, with the remedy."""
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(LossConfig).validate_python(table)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('loss={type="jsd", betta=0.5}', "did you mean 'beta'"),
        ('loss={type="k1", support={type="full"}}', "unknown key 'loss.support'"),
        ('loss.support={type="teacher_top_k", kk=3}', "did you mean 'k'"),
        ('loss.support={type="top"}', "teacher_top_k"),
        ("loss.teacher_temperature=0", "must be between 0.01 and 100"),
    ],
)
def test_config_errors_name_the_key(override, message):
    """An unknown or impossible key of a loss or its support is named, with the nearest or the known ones."""
    with pytest.raises(ConfigError, match=message):
        load_config("configs/quickstart.toml", [override])
