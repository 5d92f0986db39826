"""Attention with a window, a forget gate, QK-norm and other rotations, against its formula in float64.

The formula is written token by token and head by head. Everything that makes the layer fast (blocks, rings, extra
columns) must give the same results.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from retentive.layers import Attention, positions_of
from retentive.layers.config import AttentionConfig
from retentive.ops import decay

D, H, K, EPS = 24, 4, 6, 1e-6
EXACT = 1e-12  # float64 has 53 bits, 1e-16; a layer is some hundred products and sums in a row

VARIANTS = {
    "no-rotation": dict(rotary="none"),
    "interleaved": dict(rotary="interleaved"),
    "qk-norm": dict(qk_norm=True, kv_heads=2),
    "qkv-bias": dict(qkv_bias=True, qk_norm=True, kv_heads=2),
    "forget-gate": dict(forget_gate=True),
    "window": dict(window=4),
    "window-1": dict(window=1),
    "window-as-long-as-a-chunk": dict(window=5),
    "window-kv-heads": dict(window=3, kv_heads=2),
    "window-gate": dict(window=4, forget_gate=True),
    "window-1-gate": dict(window=1, forget_gate=True),
    "window-as-long-as-the-text": dict(window=11, forget_gate=True),
    "sinks": dict(window=4, sinks=2),
    "sinks-window-1": dict(window=1, sinks=1, qk_norm=True),
    "more-sinks-than-window": dict(window=3, sinks=5, kv_heads=2),
    "moving-sinks": dict(window=4, sinks=2, moving_sinks=True, kv_heads=2),
    "moving-sinks-window-1": dict(window=1, sinks=3, moving_sinks=True, rotary="interleaved", qk_norm=True),
    "output-gate": dict(output_gate=True, kv_heads=2),
    "position-scale": dict(position_scale=5.0),
    "position-scale-window-sinks": dict(position_scale=5.0, window=4, sinks=2, moving_sinks=True),
    "position-scale-forget-gate": dict(position_scale=5.0, forget_gate=True, output_gate=True),
    "all": dict(window=5, forget_gate=True, qk_norm=True, rotary="none"),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, dtype=torch.float64, **changes) -> Attention:
    """A layer whose every weight matters: matrices N(0, 1/width), gains and biases around 1."""
    layer = Attention(AttentionConfig(**dict(dim=D, heads=H) | VARIANTS[variant] | changes))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return layer.to(dtype)


def formula(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(K) + sum of log f after the key, no future, no further back than window and sinks) V Wo."""
    c, T = layer.config, x.shape[1]
    half = c.rotary == "half"
    K = c.dim // c.heads
    powers = [i / (K // 2) if half else i / (K // 2 - 1) for i in range(K // 2)]
    angle = torch.tensor([[t * 10000.0**-p for p in powers] for t in range(T)], dtype=x.dtype)
    turn = torch.polar(torch.ones_like(angle), angle * (c.rotary != "none"))

    def projected(proj):
        return x @ proj.weight.T + (proj.bias if c.qkv_bias else 0)

    def feature(proj, heads, h, norm, turn=turn):
        y = projected(proj).unflatten(-1, (heads, K))[:, :, h * heads // H]
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
        pairs = y.unflatten(-1, (2, -1)).mT if half else y.unflatten(-1, (-1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(-2)

    lag = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (lag < 0) | ((lag >= (c.window or T)) & (torch.arange(T) >= c.sinks))
    out = []
    for h in range(H):
        q = feature(layer.q_proj, H, h, layer.q_norm)
        k = feature(layer.k_proj, c.kv_heads, h, layer.k_norm)
        v = projected(layer.v_proj).unflatten(-1, (c.kv_heads, K))[:, :, h * c.kv_heads // H]
        by_position = torch.ones(T, 1, dtype=x.dtype)
        if c.position_scale:
            by_position = torch.tensor([[math.log(t + 5) / math.log(5)] for t in range(T)], dtype=x.dtype)
        scores = q @ k.mT / math.sqrt(K) * by_position
        if c.moving_sinks:  # queries far from them stand where the first full window ends
            last = torch.arange(T).clamp(max=c.slots - 1)
            q = feature(layer.q_proj, H, h, layer.q_norm, turn[last])
            scores = torch.where(torch.arange(T) < c.sinks, q @ k.mT / math.sqrt(K) * by_position, scores)
        if c.forget_gate:
            since = torch.sigmoid(x @ layer.forget_proj.weight[h] + layer.forget_proj.bias[h]).log().cumsum(1)
            scores = scores + since[..., :, None] - since[..., None, :]
        out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    gate = torch.sigmoid(x @ layer.g_proj.weight.T) if c.output_gate else 1
    return torch.cat(out, -1) * gate @ layer.out_proj.weight.T


def run(layer, x, cache=None, start=None, lengths=None, cu=None):
    N = len(x) if cu is None else len(cu) - 1
    start = None if start is None else torch.as_tensor(start).expand(N)
    positions = positions_of(len(x), x.shape[1], start, lengths, cu, x.device)
    return layer(x, cache, positions, layer.phases(positions, x.dtype))


def slots(layer, N: int, S: int, dtype=torch.float64):
    """An empty cache; what is in a slot before it is written must not matter, but must be finite.

    A gate that was summed up all the same would cancel out but for the digits that so large a sum drops.
    """
    cache = torch.full((2, N, S, layer.kv_heads, layer.K), 7.0, dtype=dtype).unbind()
    wide = torch.promote_types(dtype, torch.float32)
    return (*cache, torch.full((N, S, H), -1e9, dtype=wide)) if layer.config.forget_gate else cache


@variants
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 11])
def test_whole_it_is_its_formula(variant, T, same):
    layer, x = make(variant), torch.randn(2, T, D, dtype=torch.float64)
    same(run(layer, x)[0], formula(layer, x), EXACT)


def as_one(gradients):
    """All of them in one vector: where a token sees itself alone that of queries is 0, or on some CPUs its rounding."""
    return torch.cat([g.flatten() for g in gradients])


@variants
def test_its_gradients_are_those_of_the_formula(variant, same):
    layer, x = make(variant), torch.randn(2, 11, D, dtype=torch.float64, requires_grad=True)
    inputs, toward = [x, *layer.parameters()], torch.randn(2, 11, D, dtype=torch.float64)
    want = torch.autograd.grad(formula(layer, x), inputs, toward)
    same(as_one(torch.autograd.grad(run(layer, x)[0], inputs, toward)), as_one(want), EXACT)
    one, cache = run(layer, x[:, :5])
    if not layer.window:
        cache = tuple(torch.cat((c, c.new_zeros(2, 6, *c.shape[2:])), 1) for c in cache)
    elif layer.slots > 5:
        cache = tuple(torch.cat((c, c.new_zeros(2, layer.slots - 5, *c.shape[2:])), 1) for c in cache)
    two, _ = run(layer, x[:, 5:], cache, 5)
    got = torch.autograd.grad(torch.cat((one, two), 1), inputs, toward)
    same(as_one(got), as_one(want), EXACT, "through the cache")


PIECES = ([1] * 11, [11], [5, 1, 5], [2, 2, 3, 4], [1, 9, 1], [3, 8])


@variants
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("slack", [0, 1, 3])
@torch.no_grad()
def test_from_a_cache_in_pieces(variant, pieces, slack, same):
    """Any pieces, shorter and longer than the ring, which wraps; with slots to spare as for taking tokens back."""
    layer, x = make(variant), torch.randn(2, 11, D, dtype=torch.float64)
    cache, at, out = slots(layer, 2, (layer.slots or 11) + slack), 0, []
    for n in pieces:
        y, cache = run(layer, x[:, at : at + n], cache, at)
        out.append(y)
        at += n
    same(torch.cat(out, 1), formula(layer, x), EXACT)
    S = cache[0].shape[1]
    _, kept = run(layer, x)
    s = layer.sinks

    def slot(p, S):
        return p if p < s else s + (p - s) % (S - s)

    for held, want in zip(cache, kept, strict=True):  # the sinks and the last tokens lie in their slots
        for p in (*range(s), *range(11 - min(11 - s, layer.window or 11), 11)):
            same(held[:, slot(p, S)], want[:, slot(p, want.shape[1])], EXACT, f"position {p}")


@variants
@pytest.mark.parametrize("S", [0, 2], ids=["tight", "slack"])
@torch.no_grad()
def test_rows_at_different_positions_and_padded_on_any_side(variant, S, same):
    layer = make(variant)
    x, starts = torch.randn(4, 24, D, dtype=torch.float64), [0, 3, 9, 6]
    wants = formula(layer, x)
    cache = slots(layer, 4, (layer.slots or 24) + S)
    for n, start in enumerate(starts):
        if start:
            run(layer, x[n : n + 1, :start], tuple(c[n : n + 1] for c in cache), 0)
    position = torch.tensor(starts)
    # a chunk longer than any window here, a short one, one token each
    for T, spans in (
        (12, [(0, 12), (0, 5), (8, 12), (2, 9)]),
        (3, [(1, 3), (0, 0), (0, 1), (0, 3)]),
        (1, [(0, 1), (0, 1), (0, 0), (0, 1)]),
        (2, [(1, 2), (1, 2), (0, 2), (0, 0)]),
    ):
        padded = 9 * torch.randn(4, T, D, dtype=torch.float64)
        for n, (a, b) in enumerate(spans):
            padded[n, a:b] = x[n, position[n] : position[n] + b - a]
        y, cache = run(layer, padded, cache, position, torch.tensor(spans))
        assert y.isfinite().all()
        for n, (a, b) in enumerate(spans):
            if b > a:
                same(y[n, a:b], wants[n, position[n] : position[n] + b - a], EXACT, f"row {n} of the chunk of {T}")
        position = position + torch.tensor(spans).diff(dim=1)[:, 0]


@variants
@torch.no_grad()
def test_padded_from_the_beginning(variant, same):
    layer, x = make(variant), torch.randn(4, 13, D, dtype=torch.float64)
    spans = [(0, 13), (0, 6), (7, 13), (3, 8)]
    y, _ = run(layer, x, lengths=torch.tensor(spans))
    for n, (a, b) in enumerate(spans):
        same(y[n : n + 1, a:b], formula(layer, x[n : n + 1, a:b]), EXACT, f"row {n}")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "window" in VARIANTS[name]])
@pytest.mark.parametrize("T", [13, 3])
@torch.no_grad()
def test_no_query_is_left_without_a_key(variant, T, monkeypatch):
    """Padding too, which may stand far from its row's own tokens: where a softmax of nothing is NaN depends on SDPA."""
    layer, x, seen = make(variant), torch.randn(4, T, D, dtype=torch.float64), []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **how):
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        seen.append(mask is None or bool(mask.any(-1).all()))
        return plain(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    lengths = torch.tensor([(0, T), (0, 1), (T - 1, T), (0, 0)])
    run(layer, x, lengths=lengths)
    for more in (slots(layer, 4, layer.slots), slots(layer, 4, layer.slots + 13)):
        run(layer, x, more, torch.tensor([0, 5, 2, 0]), lengths)
    assert len(seen) >= 3 and all(seen)


@variants
@pytest.mark.parametrize("T", [13, 3])
def test_gradients_beside_padding(variant, T, same):
    layer, x = make(variant), torch.randn(4, T, D, dtype=torch.float64, requires_grad=True)
    spans = [(0, T), (0, T // 2), (T - 1, T), (0, 0)]
    toward, inputs = torch.randn(4, T, D, dtype=torch.float64), [x, *layer.parameters()]
    y, _ = run(layer, x, lengths=torch.tensor(spans))
    got = torch.autograd.grad(sum((y[n, a:b] * toward[n, a:b]).sum() for n, (a, b) in enumerate(spans)), inputs)
    parts = [(formula(layer, x[n : n + 1, a:b]) * toward[n, a:b]).sum() for n, (a, b) in enumerate(spans) if b > a]
    same(as_one(got), as_one(torch.autograd.grad(sum(parts), inputs)), EXACT)


@variants
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@torch.no_grad()
def test_packed_sequences_are_the_sequences_and_go_on(variant, training, same):
    layer = make(variant).train(training)
    texts = [torch.randn(1, n, D, dtype=torch.float64) for n in (14, 2, 9)]
    cuts = [(6, 13), (1, 2), (7, 8)]  # where each text is cut: a chunk longer than the window, none left, one token
    want = [formula(layer, x) for x in texts]

    def packed(parts, cache=None, start=None):
        cu = torch.tensor([0, *(x.shape[1] for x in parts)]).cumsum(0)
        y, cache = run(layer, torch.cat(parts, 1), cache, start, cu=cu)
        return y.split([x.shape[1] for x in parts], 1), cache

    if training:
        got, cache = packed(texts)
        same(got, want, EXACT)
        assert cache is None
        return
    got, cache = packed([x[:, :a] for x, (a, _) in zip(texts, cuts, strict=True)])
    same(got, [y[:, :a] for y, (a, _) in zip(want, cuts, strict=True)], EXACT)
    if not layer.window or cache[0].shape[1] < layer.slots:  # as a memory reserves them
        room = (layer.slots or 14) - cache[0].shape[1]
        cache = tuple(torch.cat((c, c.new_zeros(3, room, *c.shape[2:])), 1) for c in cache)
    got, _ = packed(
        [x[:, a:b] for x, (a, b) in zip(texts, cuts, strict=True)], cache, torch.tensor([a for a, _ in cuts])
    )
    same(got, [y[:, a:b] for y, (a, b) in zip(want, cuts, strict=True)], EXACT)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
def test_a_window_trains_in_memory_linear_in_the_length(gate):
    """No tensor has more numbers than blocks of W queries with 2 W keys have in all heads: fewer than T x T of one."""
    layer, T, W = make("window", window=32, forget_gate=gate), 1024, 32
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for y in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, y.numel() if isinstance(y, torch.Tensor) else 0)
            return out

    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), Sizes():  # which shows every score
        run(layer, x)[0].sum().backward()
    assert T * D <= largest <= 2 * T * H * 2 * W < T * T


def in_pieces(layer, x, cuts):
    """The layer's output over `x`, from a cache, piece by piece."""
    cache, out = slots(layer, len(x), layer.window or x.shape[1], x.dtype), []
    for a, b in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, cache = run(layer, x[:, a:b], cache, a)
        out.append(y)
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["forget-gate", "window-gate", "all"])
@torch.no_grad()
def test_long_texts_keep_their_gates(variant, dtype, same):
    """If sums of log gates reach thousands, a score is as exact as the last bit of the largest of its sums.

    Those of a window are of its own tokens alone, and so is the one that a single token takes from its cache.
    """
    layer, x = make(variant), torch.randn(1, 900, D, dtype=torch.float64)
    layer.forget_proj.bias.sub_(3)
    largest = -F.logsigmoid(layer.forget_proj(x)).sum(1).min()
    assert 2000 < largest < 4096
    want = formula(layer, x)
    layer, x = layer.to(dtype), x.to(dtype)
    # of the layer's other sums; in float64 the formula's own differences of large sums are no more exact
    small = EXACT if dtype == torch.float64 else 50 * torch.finfo(dtype).eps
    large = small if layer.window else small + 4096 * torch.finfo(dtype).eps / 2
    same(run(layer, x)[0].double(), want, large, "whole")
    got = in_pieces(layer, x, [500, *range(501, 900)]).double()
    same(got[:, :500], want[:, :500], large, "a chunk")
    same(got[:, 500:], want[:, 500:], small, "token by token")


@pytest.mark.parametrize("variant", ["window", "forget-gate", "window-gate", "all"])
@torch.no_grad()
def test_in_bf16_it_is_as_close_to_the_truth_as_plain_torch(variant, gold_rule):
    """At the end of a long text, where the gates' sums are in the hundreds: bf16 alone would be off by whole units.

    The measure: scores and softmax of the bf16 features in bf16, their bias built in float64.
    """
    T = 600
    layer = make(variant, torch.bfloat16, dim=128)
    if layer.forget_proj is not None:
        layer.forget_proj.bias.fill_(0)
    x = torch.randn(1, T, 128).bfloat16()
    positions = positions_of(1, T, None, None, None, x.device)
    phases = layer.phases(positions, x.dtype)
    q = layer._feature(layer.q_proj(x), layer.q_norm, phases).transpose(1, 2)
    k = layer._feature(layer.k_proj(x), layer.k_norm, phases).transpose(1, 2)
    v = layer.v_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    bias = torch.zeros(1, H, T, T, dtype=torch.float64)
    if layer.forget_proj is not None:
        since = F.logsigmoid(layer.forget_proj(x).double()).cumsum(1).mT
        assert since.min() < -300
        bias = since[..., :, None] - since[..., None, :]
    bias = bias.masked_fill((lag < 0) | (lag >= (layer.window or T)), -torch.inf)

    def plain(dtype):
        a, b, c = (y.to(dtype) for y in (q, k, v))
        weights = (a @ b.mT * a.shape[-1] ** -0.5 + bias.to(dtype)).softmax(-1)
        return (weights @ c).transpose(1, 2).flatten(-2) @ layer.out_proj.weight.to(dtype).T

    gold, measure = plain(torch.float64), plain(torch.bfloat16)
    # scaling q before its rounding moves one rounding of a few, which may cost as much as it saves
    gold_rule(gold, run(layer, x)[0], measure, 0.1, "whole")
    cached = in_pieces(layer, x, [500, *range(501, 560)])
    for a, b, what in ((0, 500, "a chunk"), (500, 560, "token by token"), (560, 600, "a chunk after others")):
        gold_rule(gold[:, a:b], cached[:, a:b], measure[:, a:b], 0.1, what)


def test_a_fresh_forget_gate_has_the_decays_of_retentions_heads():
    layer = Attention(AttentionConfig(dim=D, heads=H, forget_gate=True))
    layer.reset_parameters()
    want = torch.tensor(decay.values("lm", H))
    torch.testing.assert_close(F.logsigmoid(layer.forget_proj.bias), want, rtol=1e-5, atol=0)  # float32 parameters


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused(refuses):
    layer, x = make("window"), torch.randn(1, 6, D, dtype=torch.float64)
    with refuses("the cache has 3 slots, 4 are needed"):
        run(layer, x, slots(layer, 1, 3), 0)
    with refuses("the cache has 5 slots, 6 are needed"):
        run(make("no-rotation"), x, slots(layer, 1, 5), 0)
    with refuses("this model has no forget gate"):
        run(layer, x, slots(make("window-gate"), 1, 4), 0)
    with refuses("this model has a forget gate"):
        run(make("window-gate"), x, slots(layer, 1, 4), 0)
