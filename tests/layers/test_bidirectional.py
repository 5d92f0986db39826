"""The layer in both directions: its formula by hand over a line and a grid, and that neither end is the first."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from retentive.layers import BidirectionalRetention
from retentive.layers.config import RetentionConfig
from retentive.ops import reference, rotary

EXACT = 1e-12
CONFIGS = {
    "default": RetentionConfig(dim=16, heads=2),
    "plain": RetentionConfig(dim=16, heads=4, kv_heads=2, decay="lm", rotary="half", qk_norm=False, head_norm=True),
    "bare": RetentionConfig(dim=16, heads=2, rotary="none", gate=False, decay_bias=True, qk_bias=True),
}


def made(name: str, **changes) -> BidirectionalRetention:
    torch.manual_seed(0)
    layer = BidirectionalRetention(replace(CONFIGS[name], **changes)).double()
    layer.reset_parameters()
    return layer


def normed(x, norm):
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if norm.weight is None else norm.weight)


def by_hand(layer, x):
    """Axis by axis, cell by cell with Python's loops over rows; all pairs of a row at once."""
    c, H = layer.config, layer.H
    q, k = (x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj))
    q, k = (y.unflatten(-1, (-1, layer.K)) for y in (q, k))
    q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    if c.qk_bias:
        q, k = (y + bias.unflatten(-1, (-1, layer.K)) for y, bias in ((q, layer.q_bias), (k, layer.k_bias)))
    v = (x @ layer.v_proj.weight.T).unflatten(-1, (-1, layer.V))
    k, v = (torch.stack([y[..., h * c.kv_heads // H, :] for h in range(H)], -2) for y in (k, v))
    decay = torch.tensor(c.log_decay(), dtype=torch.float64) if c.decay != "gated" else None
    if decay is None:
        decay = F.logsigmoid(layer.decay_proj(x)) / 16
    for axis in reversed(range(1, x.ndim - 1)):
        n = x.shape[axis]
        cos, sin = rotary.phases(torch.arange(n), layer.K, c.rotary, dtype=torch.float64)
        o = torch.empty_like(v)
        for row in range(x.numel() // (len(x) * n * c.dim)):
            at = (slice(None), slice(None), row) if axis == 1 else (slice(None), row)
            at = (slice(None),) if x.ndim == 3 else at
            here = [rotary.rotate(y[at], cos, sin, c.rotary) for y in (q, k)]
            gaps = decay if decay.ndim == 1 else decay[at]
            o[at] = reference.bidirectional(*here, v[at], gaps, scale=layer.K**-0.5)
        v = o
    o = normed(v, layer.head_norm).flatten(-2)
    return (F.silu(x @ layer.g_proj.weight.T) * o if c.gate else o) @ layer.out_proj.weight.T


@pytest.mark.parametrize("grid", [(9,), (1,), (4, 3)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layer_is_its_formula(name, grid, same):
    layer, x = made(name), torch.randn(2, *grid, 16, dtype=torch.float64)
    same(layer(x), by_hand(layer, x), EXACT)


@torch.no_grad()
def test_a_line_read_backwards_gives_the_same_backwards(same):
    # rotated, who is before differs from who is after
    layer, x = made("plain", rotary="none"), torch.randn(2, 9, 16, dtype=torch.float64)
    same(layer(x.flip(1)), layer(x).flip(1), EXACT)


def test_one_direction_alone_has_a_score_norm(refuses):
    with refuses("score_norm is for one direction"):
        BidirectionalRetention(RetentionConfig(dim=16, heads=2, decay="lm", score_norm=True))
