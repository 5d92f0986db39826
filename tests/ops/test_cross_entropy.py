"""Chunked cross-entropy against torch's own on all logits: value, gradients, allocations."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retentive.models import build, retnet, transformer
from retentive.ops.cross_entropy import IGNORE, cross_entropy

T, D, VOCAB = 37, 12, 53
# float64 has 53 bits, 1e-16: sums over 37 tokens and 53 logits in another order lose a few hundred times that
EXACT = 1e-12
SMALL = dict(vocab_size=VOCAB, dim=16, layers=1, heads=2)


def inputs(dtype=torch.float64):
    x, weight = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(VOCAB, D, dtype=dtype)
    return x, weight.requires_grad_(), torch.randint(VOCAB, (T,))


def plain(x, weight, targets):
    """Cross-entropy in its simplest form, with all logits at once."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("ignored", ["none", "some", "a-whole-chunk", "all-but-one"])
def test_value_and_gradients_are_torchs(chunk, ignored, same):
    x, weight, targets = inputs()
    where = {"none": [], "some": [0, 3, 17, 36], "a-whole-chunk": range(5, 10), "all-but-one": range(1, 37)}[ignored]
    targets[list(where)] = IGNORE
    got, want = cross_entropy(x, weight, targets, chunk=chunk), plain(x, weight, targets)
    same(got, want, EXACT)
    # an incoming gradient other than 1: the mean over tokens, as in training
    same(torch.autograd.grad(got / 7, (x, weight)), torch.autograd.grad(want / 7, (x, weight)), EXACT)
    with torch.no_grad():
        same(cross_entropy(x, weight, targets, chunk=chunk), want, EXACT)


def test_leading_dimensions_are_flattened(same):
    x, weight, targets = inputs()
    got = cross_entropy(x[:36].reshape(3, 4, 3, D), weight, targets[:36].reshape(3, 4, 3), chunk=10)
    same(got, plain(x[:36], weight, targets[:36]), EXACT)


def test_all_ignored_is_zero_with_zero_gradients():
    x, weight, targets = inputs()
    targets[:] = IGNORE
    loss = cross_entropy(x, weight, targets, chunk=8)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert loss.item() == 0 and not dx.any() and not dw.any()
    with torch.no_grad():
        assert float(cross_entropy(x, weight, targets, chunk=8)) == 0


def test_huge_logits_neither_overflow_nor_vanish(same):
    x, weight, targets = inputs()
    got, want = cross_entropy(1e4 * x, weight, targets, chunk=8), plain(1e4 * x, weight, targets)
    same(got, want, EXACT)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, (x, weight)))


class Largest(TorchDispatchMode):
    """Records the largest number of elements in any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no-grad"])
def test_the_logits_of_all_tokens_never_exist(grad):
    tokens, width, vocab, chunk = 512, 8, 300, 32

    def largest(loss) -> int:
        x, weight = torch.randn(tokens, width, requires_grad=grad), torch.randn(vocab, width, requires_grad=grad)
        with Largest() as mode, torch.set_grad_enabled(grad):
            value = loss(x, weight, torch.randint(vocab, (tokens,)))
            if grad:
                value.backward()
        return mode.elements

    assert largest(plain) >= tokens * vocab, "the observer sees what it should"
    assert largest(lambda *args: cross_entropy(*args, chunk=chunk)) <= max(chunk * vocab, tokens * width)


def test_under_autocast_it_is_as_close_to_the_truth_as_plain_torch(gold_rule):
    """Uses losses of single tokens, so that rounding errors do not average out in a sum."""
    x, weight, targets = inputs(torch.float32)
    gold = torch.stack([plain(x.double()[t : t + 1], weight.double(), targets[t : t + 1]) for t in range(T)])
    gold_dx, gold_dw = torch.autograd.grad(gold.sum(), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        want = torch.stack([plain(x[t : t + 1], weight, targets[t : t + 1]) for t in range(T)])
        got = torch.stack([cross_entropy(x[t : t + 1], weight, targets[t : t + 1]) for t in range(T)])
        whole = cross_entropy(x, weight, targets, chunk=10)
        with torch.no_grad():
            quiet = torch.stack([cross_entropy(x[t : t + 1], weight, targets[t : t + 1]) for t in range(T)])
        want_dx, want_dw = torch.autograd.grad(plain(x, weight, targets), (x, weight))
    got_dx, got_dw = torch.autograd.grad(whole, (x, weight))
    assert got.dtype == whole.dtype == torch.float32 and got_dx.dtype == got_dw.dtype == torch.float32
    # both sides round x, weight and logits alike; sums in another order change some of the roundings
    gold_rule(gold, got, want, 0.05, "loss")
    gold_rule(gold, quiet, want, 0.05, "loss without gradient")
    gold_rule(gold_dx, got_dx, want_dx, 0.15, "gradient of x")
    gold_rule(gold_dw, got_dw, want_dw, 0.15, "gradient of the output matrix")


@pytest.mark.parametrize("config", [retnet, transformer], ids=["retnet", "transformer"])
def test_tied_weights_get_the_gradients_of_both_their_uses(config, same):
    model = build(config(**SMALL, tie_embeddings=True)).double()
    ids = torch.randint(VOCAB, (2, 9))
    x, _ = model.hidden(ids[:, :-1])
    (got,) = torch.autograd.grad(cross_entropy(x, model.head.weight, ids[:, 1:], chunk=5), [model.embed.weight])
    logits, _ = model(ids[:, :-1])
    want_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (want,) = torch.autograd.grad(want_loss, [model.embed.weight])
    same(got, want, EXACT)
    x, _ = model.hidden(ids[:, :-1])
    (alone,) = torch.autograd.grad(
        cross_entropy(x, model.head.weight.detach(), ids[:, 1:], chunk=5), [model.embed.weight]
    )
    assert (alone - want).norm() > 0.1 * want.norm(), "each use has a share of its own"
