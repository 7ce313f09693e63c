"""Divergences against float64 references written from their formulas."""

import pytest
import torch

from vlopd.losses import DIVERGENCES, chunked_divergence, token_divergence


def reference(kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum_v a_v (log a_v - log b_v) in float64, term by term."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    a, b = (q, p) if kind == "reverse_kl" else (p, q)
    return (a * (a.log() - b.log())).sum(-1)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 12.0])
def test_value_and_gradient_match_float64(kind, scale):
    """In fp32, every divergence and its gradient agree with float64 to 1e-5, also where nearly one-hot."""
    torch.manual_seed(0)
    student, teacher = scale * torch.randn(7, 50), scale * torch.randn(7, 50)
    wide = student.double().requires_grad_()
    expected = reference(kind, wide, teacher)
    expected.sum().backward()
    narrow = student.clone().requires_grad_()
    loss = token_divergence(DIVERGENCES[kind], narrow, teacher).loss
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-5 * scale)


def test_reverse_kl_gradient_is_the_closed_form():
    """The gradient of KL(q||p) in the logits is q_v [log(q_v / p_v) - KL]."""
    torch.manual_seed(1)
    student = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 11, dtype=torch.float64)
    kl = token_divergence(DIVERGENCES["reverse_kl"], student, teacher).loss
    kl.sum().backward()
    q = student.detach().softmax(-1)
    ratio = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(student.grad, q * (ratio - kl.detach()[:, None]))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_of_a_model_from_itself_is_zero(kind):
    """KL(p, p) = 0 and its gradient is 0."""
    logits = torch.randn(4, 9, requires_grad=True)
    loss = token_divergence(DIVERGENCES[kind], logits, logits.detach()).loss
    loss.sum().backward()
    assert float(loss.detach().abs().max()) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_is_not_negative(kind):
    """Both KLs are at least 0 up to rounding."""
    torch.manual_seed(2)
    loss = token_divergence(DIVERGENCES[kind], torch.randn(500, 30), torch.randn(500, 30)).loss
    assert float(loss.min()) >= 0


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 4, 10, 11])
def test_chunks_change_nothing(kind, chunk):
    """Chunked value and gradients (hidden states and head) equal the unchunked ones."""
    torch.manual_seed(3)
    head, teacher_head = torch.nn.Linear(8, 20).double(), torch.nn.Linear(6, 20).double()
    hidden, teacher_hidden = torch.randn(11, 8).double(), torch.randn(11, 6).double()
    weights = torch.rand(11).double()

    def run(size: int):
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        out = chunked_divergence(DIVERGENCES[kind], leaf, head, teacher_hidden, teacher_head, size)
        (out.loss * weights).sum().backward()
        return *(column.detach() for column in out), leaf.grad, head.weight.grad.clone()

    for ours, whole in zip(run(chunk), run(1000), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
    assert teacher_head.weight.grad is None
