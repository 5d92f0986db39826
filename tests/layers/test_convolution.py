"""Convolutions against the formula, in one call and in many, packed, padded, and with gradients through the state."""

import pytest
import torch
from torch.testing import assert_close

from retentive.layers import Convolution, ConvolutionConfig, RMSNorm, positions_of
from retentive.layers.mixer import Mixer

D, T = 6, 11
EXACT = dict(rtol=0, atol=1e-12)  # float64 has 53 bits; sums of four products in one order


def layer(taps: int = 4) -> Convolution:
    made = Convolution(ConvolutionConfig(D, taps)).double()
    torch.nn.init.normal_(made.weight)
    return made


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[T,D]`: each token's sum over itself and those before it."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for i in range(min(len(weight), t + 1)):
            out[t] += weight[-1 - i] * x[t - i]
    return out


def call(made: Convolution, x, rows=None, *, start=None, lengths=None, cu_seqlens=None):
    positions = positions_of(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)
    return made(x, rows, positions, made.phases(positions, x.dtype))


@pytest.mark.parametrize("taps", [2, 4, 20])
def test_it_computes_the_formula(taps):
    made, x = layer(taps), torch.randn(2, T, D, dtype=torch.float64)
    out, rows = call(made, x)
    for n in range(2):
        assert_close(out[n], formula(x[n], made.weight), **EXACT)
        kept = torch.cat((torch.zeros(taps, D, dtype=torch.float64), x[n]))[1 - taps :]
        assert_close(rows[n], kept, rtol=0, atol=0)


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("splits", [(1,) * T, (5, 1, 5), (2, 9)])
def test_calls_one_after_another_equal_one(splits, taps):
    made, x, rows, parts = layer(taps), torch.randn(2, T, D, dtype=torch.float64), None, []
    with torch.no_grad():
        for piece in x.split(splits, 1):
            out, rows = call(made, piece, rows)
            parts.append(out)
    assert_close(torch.cat(parts, 1), call(made, x)[0], **EXACT)


def test_packed_sequences_are_apart_and_go_on():
    made = layer()
    x, lengths = [torch.randn(1, n, D, dtype=torch.float64) for n in (5, 1, 2, 7)], (5, 1, 2, 7)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        out, rows = call(made, torch.cat(x, 1), cu_seqlens=cu)
        more = torch.randn(1, 15, D, dtype=torch.float64)
        start = torch.tensor(lengths)
        again, after = call(made, more, rows.clone(), start=start, cu_seqlens=torch.tensor([0, 1, 4, 13, 15]))
    for n, (one, a, b) in enumerate(zip(x, cu[:-1], cu[1:], strict=True)):
        assert_close(out[0, a:b], formula(one[0], made.weight), rtol=0, atol=1e-12)
        begin, end = ((0, 1), (1, 4), (4, 13), (13, 15))[n]
        whole = torch.cat((one[0], more[0, begin:end]))
        assert_close(again[0, begin:end], formula(whole, made.weight)[len(one[0]) :], **EXACT)
        kept = torch.cat((torch.zeros(3, D, dtype=torch.float64), whole))[-3:]
        assert_close(after[n], kept, rtol=0, atol=0)


def test_padding_on_either_side_changes_nothing():
    made, x = layer(), torch.randn(3, T, D, dtype=torch.float64)
    lengths = torch.tensor([[0, T], [4, T], [3, 5]])
    with torch.no_grad():
        out, rows = call(made, x, lengths=lengths)
        for n, (a, b) in enumerate(lengths.tolist()):
            assert_close(out[n, a:b], formula(x[n, a:b], made.weight), rtol=0, atol=1e-12)
            kept = torch.cat((torch.zeros(3, D, dtype=torch.float64), x[n, a:b]))[-3:]
            assert_close(rows[n], kept, rtol=0, atol=0)
        nothing = call(made, x[:1], rows[:1].clone(), start=torch.tensor([T]), lengths=torch.tensor([[2, 2]]))[1]
        assert_close(nothing, rows[:1], rtol=0, atol=0)


def test_gradients_pass_through_rows():
    made = layer()
    positions = positions_of(1, 7, torch.tensor([2, 1]), None, torch.tensor([0, 2, 7]), torch.device("cpu"))
    phases = made.phases(positions, torch.float64)

    def of(x, rows, weight):
        return torch.func.functional_call(made, {"weight": weight}, (x, rows, positions, phases))

    shapes = ((1, 7, D), (2, 3, D), (4, D))
    assert torch.autograd.gradcheck(of, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


@pytest.mark.parametrize("grad", [True, False], ids=["training", "not"])
@pytest.mark.parametrize("laid", ["rows", "packed", "padded", "after others", "dropped", "short"])
def test_a_branch_is_the_stream_and_the_output_of_its_norm(laid, grad, same):
    """In float32: two orders of a sum of five numbers."""
    made, norm = layer().float(), RMSNorm(D, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1 if laid == "packed" else 3, 2 if laid == "short" else T, D, requires_grad=grad)
    before = torch.randn(3, 3, D) if laid == "after others" else None
    lengths = torch.tensor([[0, T], [4, T], [3, 5]]) if laid == "padded" else None
    positions = positions_of(
        x.shape[0], x.shape[1], None, lengths, torch.tensor([0, 4, T]) if laid == "packed" else None, x.device
    )
    phases, found = made.phases(positions, x.dtype), []
    for branch in (made.branch, lambda *args, **drops: Mixer.branch(made, *args, **drops)):
        with torch.set_grad_enabled(grad):
            rows = None if before is None else before.clone()
            whole, out, rows = branch(x, norm, rows, positions, phases, drops=laid == "dropped")
            whole = whole if out is None else whole + out
        found.append([whole, rows])
        if grad:
            found[-1] += torch.autograd.grad(whole, [x, made.weight, norm.weight], torch.ones_like(whole))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other, 1e-6)


def test_a_new_layer_adds_nothing(refuses):
    made = Convolution(ConvolutionConfig(D))
    made.reset_parameters()
    assert not call(made, torch.randn(1, T, D))[0].any()
    for taps in (1, 65):
        with refuses(f"a convolution has from 2 to 64 taps (tokens that it mixes), got {taps}"):
            ConvolutionConfig(D, taps)
