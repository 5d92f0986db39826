"""Bidirectional retention against the quadratic form in float64, with gradients, in one dimension and over a grid."""

import pytest
import torch

from retentive.ops import bidirectional as module
from retentive.ops import reference, using
from retentive.ops.bidirectional import bidirectional, over_grid

EXACT = 1e-12


def tensors(*shape: int, K: int = 4, V: int = 6, H: int = 3, per_token: bool = False):
    made = [torch.randn(*shape, H, n, dtype=torch.float64, requires_grad=True) for n in (K, K, V)]
    decay = -torch.rand(*(shape if per_token else ()), H, dtype=torch.float64)
    return [*made, decay.requires_grad_()]


@pytest.mark.parametrize("per_token", [False, True], ids=["head", "token"])
@pytest.mark.parametrize("T", [1, 2, 7, 65])
@pytest.mark.parametrize("form", ["all pairs", "parallel", "chunkwise"])
def test_it_is_the_quadratic_form(T, per_token, form, same, monkeypatch):
    pairs = form == "all pairs"
    monkeypatch.setattr(module, "SHORT", T if pairs else 0)
    given = tensors(2, T, per_token=per_token)
    with using(form="auto" if pairs else form):
        found = bidirectional(*given)
    want = reference.bidirectional(*given, scale=0.5)
    same(found, want, EXACT)
    weights = torch.randn_like(want)
    for got, wanted in zip(
        torch.autograd.grad((found * weights).sum(), given, allow_unused=True),
        torch.autograd.grad((want * weights).sum(), given, allow_unused=True),
        strict=True,
    ):
        same(got, wanted, 10 * EXACT)


def by_pairs(q, k, v, log_decay):
    """Computes one axis after the other, with explicit loops over every pair of cells of a row and of a column."""
    scale, (_, Y, X) = q.shape[-1] ** -0.5, q.shape[:3]
    for axis, n in ((2, X), (1, Y)):
        out = torch.zeros_like(v)
        for a in range(n):
            for b in range(n):
                at, of = (x.select(axis, i) for x, i in ((q, a), (k, b)))
                if log_decay.ndim == 1:
                    gaps = log_decay * abs(a - b)
                else:
                    gaps = log_decay.narrow(axis, min(a, b) + 1, abs(a - b)).sum(axis)
                weight = scale * (at * of).sum(-1) * gaps.exp()
                out.select(axis, a).add_(weight[..., None] * v.select(axis, b))
        v = out
    return v


@pytest.mark.parametrize("short", [0, 64])
@pytest.mark.parametrize("per_token", [False, True], ids=["head", "token"])
def test_over_a_grid_it_decays_along_each_axis(per_token, short, same, monkeypatch):
    monkeypatch.setattr(module, "SHORT", short)
    given = [x.detach() for x in tensors(2, 5, 3, per_token=per_token)]
    same(over_grid(*given), by_pairs(*given), EXACT)
    # for a single row, it is one direction applied twice: along it, and across it, where each cell is alone
    q, k, v, decay = [x.detach() for x in tensors(2, 1, 7)]
    own = 0.5 * (q * k).sum(-1, keepdim=True)
    same(
        over_grid(q, k, v, decay),
        own * reference.bidirectional(q[:, 0], k[:, 0], v[:, 0], decay, scale=0.5)[:, None],
        EXACT,
    )


def test_a_grid_is_rotated_by_its_axes():
    seen = []

    def rotated(x, axis):
        seen.append((axis, tuple(x.shape)))
        return x

    over_grid(*[x.detach() for x in tensors(2, 5, 3)], rotated=rotated)
    assert seen == [(1, (10, 3, 3, 4))] * 2 + [(0, (6, 5, 3, 4))] * 2


def test_everybody_sees_everybody():
    q, k, v, decay = tensors(1, 9)
    for n in (0, 4, 8):
        (reached,) = torch.autograd.grad(bidirectional(q, k, v, decay)[0, n].sum(), [v], retain_graph=True)
        assert (reached[0].abs().sum((-1, -2)) > 0).all()
