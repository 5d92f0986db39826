"""Divergence from a teacher against torch's own, in any number of chunks."""

import pytest
import torch
import torch.nn.functional as F

from retentive.ops.distillation import kl_divergence


def drawn(dtype=torch.float64):
    """Hidden states of 7 tokens and output matrices of a student of width 6 and a teacher of width 5, 11 words."""
    x, w, y, u = (torch.randn(n, d, dtype=dtype) for n, d in ((7, 6), (11, 6), (7, 5), (11, 5)))
    return x.requires_grad_(), w.requires_grad_(), y, u


def plain(x, w, y, u):
    q, p = (F.log_softmax(a @ b.T, -1) for a, b in ((x, w), (y, u)))
    return F.kl_div(q, p, reduction="sum", log_target=True)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_value_and_gradients_are_those_of_torch(chunk):
    given = drawn()
    for scale in (1.0, -3.0):  # the incoming gradient is a factor
        want = torch.autograd.grad(scale * plain(*given), given[:2])
        have = torch.autograd.grad(scale * kl_divergence(*given, chunk=chunk), given[:2])
        torch.testing.assert_close(kl_divergence(*given, chunk=chunk), plain(*given), rtol=1e-12, atol=0)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_frozen_output_matrix_gets_no_gradient_and_a_teacher_never_does():
    x, w, y, u = drawn()
    kl_divergence(x, w.detach(), y.requires_grad_(), u.requires_grad_()).backward()
    assert x.grad is not None and w.grad is None and y.grad is None and u.grad is None


def test_it_is_zero_for_the_teacher_itself():
    _, _, y, u = drawn()
    assert kl_divergence(y, u, y, u).item() == 0
    assert kl_divergence(y[None], u, y[None] + 1, u).shape == ()


def test_autocast_rounds_the_products_only():
    x, w, y, u = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = kl_divergence(x, w, y, u)
    assert total.dtype == torch.float32
    # logits of 8 bits around 1 to 5 are off by some 1 %, and so is their divergence
    torch.testing.assert_close(total, plain(x, w, y, u), rtol=0.05, atol=0)
