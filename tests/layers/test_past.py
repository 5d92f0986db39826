"""Attention that continues from a cache while gradients pass: split in calls it is the whole text, gradients included.

The oracle is the layer's formula on whole texts (test_attention_variants.py). Caches that were passed in stay as they
were, since a backward pass still reads them.
"""

import pytest
import torch

from tests.layers.test_attention_variants import EXACT, D, as_one, formula, make, run, variants

TEXTS = (11, 7, 9)
"""Lengths of the texts: several windows long."""
CALLS = [
    [(0, 4), (0, 1), (0, 0)],  # the third text has not begun
    [(4, 5), (1, 7), (0, 6)],
    [(5, 11), (7, 7), (6, 9)],  # the second has ended
]
"""In each call, the tokens of each text."""


def empty(layer, N: int) -> tuple[torch.Tensor, ...]:
    """A cache without slots, as a state before the first token has it."""
    cache = torch.zeros(2, N, 0, layer.kv_heads, layer.K, dtype=torch.float64).unbind()
    return (*cache, torch.zeros(N, 0, layer.H, dtype=torch.float64)) if layer.config.forget_gate else cache


def in_calls(layer, texts, arranged) -> list[torch.Tensor]:
    """The outputs of the texts, whose tokens come in several calls; `arranged` makes a call's arguments of its parts.

    A text that a call has no token of is left out of it, and its cache waits.
    """
    caches, outs = [empty(layer, 1) for _ in texts], [[] for _ in texts]
    for call in CALLS:
        there = [n for n, (a, b) in enumerate(call) if b > a]
        S = max(caches[n][0].shape[1] for n in there)
        joined = tuple(
            torch.cat([torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, S - x.shape[1])) for x in column])
            for column in zip(*(caches[n] for n in there), strict=True)
        )
        if layer.window and min(caches[n][0].shape[1] for n in there) < S:
            # a ring of fewer slots holds whole texts: the token at position p is in slot p of a larger one as well
            assert all(call[n][0] <= caches[n][0].shape[1] for n in there if caches[n][0].shape[1] < S)
        before = [x.clone() for x in joined]
        parts = [texts[n][:, slice(*call[n])] for n in there]
        x, how, places = arranged(parts)
        y, after = run(layer, x, joined, [call[n][0] for n in there], **how)
        assert all(torch.equal(a, b) for a, b in zip(joined, before, strict=True)), "nothing is written in place"
        assert not layer.window or after[0].shape[1] <= layer.slots
        for row, (n, place) in enumerate(zip(there, places, strict=True)):
            outs[n].append(y[place])
            caches[n] = tuple(x[row : row + 1] for x in after)
    return [torch.cat(out, 1) for out in outs]


def packed(parts):
    ends = torch.tensor([0, *(x.shape[1] for x in parts)]).cumsum(0)
    places = [(slice(None), slice(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    return torch.cat(parts, 1), {"cu": ends.to(torch.int32)}, places


def padded(parts):
    """On the left, on the right, and on both sides by turns; what stands there is no matter."""
    T = max(x.shape[1] for x in parts) + 2
    x, spans = 9 * torch.randn(len(parts), T, D, dtype=torch.float64), []
    for n, part in enumerate(parts):
        first = (n % 3) * (T - part.shape[1]) // 2
        spans.append((first, first + part.shape[1]))
    x = torch.stack([torch.cat((row[:a], p[0], row[b:])) for row, p, (a, b) in zip(x, parts, spans, strict=True)])
    return x, {"lengths": torch.tensor(spans)}, [(slice(n, n + 1), slice(a, b)) for n, (a, b) in enumerate(spans)]


@variants
@pytest.mark.parametrize("arranged", [packed, padded])
@pytest.mark.parametrize("rows", [1024, 3], ids=["one-mask", "masks"])
def test_texts_in_several_calls_are_the_texts(variant, arranged, rows, same, monkeypatch):
    monkeypatch.setattr("retentive.layers.attention.ROWS", rows)
    layer = make(variant)
    texts = [torch.randn(1, T, D, dtype=torch.float64, requires_grad=True) for T in TEXTS]
    toward = [torch.randn_like(x) for x in texts]
    want, got = [formula(layer, x) for x in texts], in_calls(layer, texts, arranged)
    inputs = [*texts, *layer.parameters()]
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        same(a, b, EXACT, f"text {n}")
    gradients = [torch.autograd.grad(out, inputs, toward) for out in (got, want)]
    same(as_one(gradients[0]), as_one(gradients[1]), EXACT)


@variants
def test_the_cache_is_the_one_that_is_written_in_place(variant, same):
    """Slot by slot: a text that was read with gradients is decoded on without."""
    layer, x = make(variant), torch.randn(2, 11, D, dtype=torch.float64)
    _, cache = run(layer, x[:, :4], empty(layer, 2), 0)
    _, cache = run(layer, x[:, 4:9], cache, 4)
    with torch.no_grad():
        _, kept = run(layer, x[:, :9])
    same(cache, kept, EXACT)


def test_autocast_keeps_the_dtype_of_the_cache():
    layer, x = make("window", torch.float32), torch.randn(1, 6, D)
    cache = tuple(torch.zeros(1, 0, layer.kv_heads, layer.K) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = run(layer, x[:, :3], cache, 0)
        y, cache = run(layer, x[:, 3:], cache, 3)
    assert [x.dtype for x in cache] == [torch.float32] * 2 and y.dtype == torch.bfloat16
