"""The twin's attention, and the feed-forward layer and norm of both, against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from retentive.layers import Attention, FeedForward, FeedForwardConfig, RMSNorm, positions_of
from retentive.layers.config import AttentionConfig

D, H, K, T = 24, 4, 6, 11
EXACT = 1e-12  # float64 has 53 bits, 1e-16; a layer is some hundred products and sums in a row


def formula(layer: Attention, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K), no future) V Wo, one head after the other."""
    angles = [[t * 10000.0 ** (-2 * i / K) for i in range(K // 2)] for t in range(x.shape[1])]
    angle = torch.tensor(angles, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k, v = (x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = []
    for h in range(H):
        g = h * kv_heads // H
        q_h, k_h, v_h = q[..., h * K : (h + 1) * K], k[..., g * K : (g + 1) * K], v[..., g * K : (g + 1) * K]
        q_h, k_h = (torch.complex(y[..., : K // 2], y[..., K // 2 :]) * turn for y in (q_h, k_h))
        scores = (q_h @ k_h.mH).real / math.sqrt(K)
        weights = scores.exp().tril()
        out.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    return torch.cat(out, -1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_its_formula_whole_and_from_a_cache(kv_heads, same):
    layer = Attention(AttentionConfig(dim=D, heads=H, kv_heads=kv_heads)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=D**-0.5)
    x = torch.randn(2, T, D, dtype=torch.float64)
    want = formula(layer, x, kv_heads)
    positions = positions_of(2, T, None, None, None, x.device)
    out, (keys, values) = layer(x, None, positions, layer.phases(positions, x.dtype))
    same(out, want, EXACT)
    assert keys.shape == values.shape == (2, T, kv_heads, K)
    cache = (torch.zeros(2, T, kv_heads, K).double(), torch.zeros(2, T, kv_heads, K).double())
    for a, b in ((0, 5), (5, 6), (6, T)):
        positions = positions_of(2, b - a, torch.full((2,), a), None, None, x.device)
        out, cache = layer(x[:, a:b], cache, positions, layer.phases(positions, x.dtype))
        same(out, want[:, a:b], EXACT, f"tokens {a} to {b}")
    same(cache, (keys, values), EXACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(window=0), "at least 1 token, got 0; without one all earlier tokens are seen"),
        (dict(window=-3), "at least 1 token"),
        (dict(window=2.5), "window must be a whole number or null, got 2.5"),
        (dict(window=True), "window must be a whole number or null, got True"),
        (dict(window=2**40), "window must be at most"),
        (dict(sinks=-1), "sinks must be at least 0, got -1"),
        (dict(sinks=4), "sinks 4 without a window"),
        (dict(sinks=4, window=8, forget_gate=True), "sinks 4 with a forget gate"),
        (dict(moving_sinks=True, window=8), "moving_sinks without sinks"),
        (dict(forget_gate=True, kv_heads=2), "forget_gate needs keys of its own for every head"),
        (dict(rotary="full"), "unknown rotary 'full'"),
        (dict(heads=5), "dim 24 must divide by heads 5"),
    ],
)
def test_fields_that_are_none_or_contradict_each_other_are_refused(changes, message, refuses):
    with refuses(message):
        AttentionConfig(**dict(dim=D, heads=H) | changes)


@pytest.mark.parametrize("activation", ["swish", "gelu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_feed_forward_is_its_formula(activation, gated, same):
    layer = FeedForward(5, FeedForwardConfig(7, activation, gated)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    y = x @ layer.gate_proj.weight.T
    y = y / (1 + torch.exp(-y)) if activation == "swish" else y * (1 + torch.erf(y / math.sqrt(2))) / 2
    if gated:
        y = y * (x @ layer.up_proj.weight.T)
    same(layer(x), y @ layer.down_proj.weight.T, EXACT)


affine = pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])


@affine
def test_norm_is_its_formula_with_and_without_gradients(affine, same):
    norm = RMSNorm(6, eps=0.1, affine=affine).double()
    gain = torch.nn.init.normal_(norm.weight) if affine else 1
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    want = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain
    same(norm(x), want, EXACT)
    with torch.no_grad():
        same(norm(x), want, EXACT)


@affine
def test_gradients_of_the_norm_are_those_of_finite_differences(affine):
    norm = RMSNorm(4, eps=0.1, affine=affine).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    if affine:
        torch.nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))


@affine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_norm_is_as_close_to_the_truth_as_pytorchs(dtype, affine, gold_rule):
    norm = RMSNorm(64, eps=1e-6, affine=affine).to(dtype)
    if affine:
        torch.nn.init.normal_(norm.weight)
    x, weight = 100 * torch.randn(50, 64).to(dtype), torch.randn(50, 64).to(dtype)

    def run(f, x, *parameters):
        x = x.detach().requires_grad_()
        y = f(x)
        return [y, *torch.autograd.grad(y, [x, *parameters], weight.to(y.dtype))]

    test = run(norm, x, *norm.parameters())
    plain = run(lambda x: F.rms_norm(x, (64,), norm.weight, 1e-6), x, *norm.parameters())
    norm = norm.double()
    gold = run(lambda x: F.rms_norm(x, (64,), norm.weight, 1e-6), x.double(), *norm.parameters())
    for what, *three in zip(("y", "dx", "dweight"), gold, test, plain, strict=False):
        gold_rule(*three, 0.3, what)  # a few roundings each, in another order
    assert len(test) == 2 + affine


def test_norm_under_autocast_has_the_dtype_of_its_input():
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert norm(x.float()).dtype == torch.float32
