"""Merged memories against the layer's formula, and against reading in a row."""

from dataclasses import replace

import pytest
import torch

from retentive.infer.memory import Memory
from retentive.infer.merge import chain, chain_errors, keep_size, merge
from retentive.models import build, twin
from retentive.ops import decay, rotary
from tests.configs import changed
from tests.infer.memories import CONFIG, after, ids, remember

EXACT = 1e-12  # float64, sums of some hundred terms
LENGTHS = (5, 40, 23)
FIXED = changed(CONFIG, decay="lm", decay_range=(1 / 8, 1 / 64))
"""Config with fixed decays: only such memories can be chained."""


@pytest.fixture(params=["interleaved", "half"])
def retnet(request):
    """A RetNet in float64, with states of all sizes in all layers."""
    out = build(changed(FIXED, rotary=request.param)).double().eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


def layers(memory: Memory) -> list[torch.Tensor]:
    return [part.value for part in memory.state.memories]


def by_hand(model, tokens: list[int], first: int) -> torch.Tensor:
    """The first layer's state `[H,K,V]` after `tokens` at positions first, first + 1, …: sum of gamma^age k v^T."""
    c, layer = model.config.retention, model.blocks[0].retention
    x = model.blocks[0].retention_norm(model.embed(torch.tensor(tokens)))
    k = layer.k_norm(layer.k_proj(x).view(len(tokens), c.heads, -1))
    v = layer.v_proj(x).view(len(tokens), c.heads, -1)
    log_decay = decay.log_decay(c.decay, c.heads, dtype=torch.float64, lm_range=c.decay_range)
    state = torch.zeros(c.heads, k.shape[-1], v.shape[-1], dtype=torch.float64)
    for n in range(len(tokens)):
        cos, sin = rotary.phases(torch.tensor([first + n]), k.shape[-1], c.rotary, dtype=torch.float64)
        turned = rotary.rotate(k[n : n + 1], cos, sin, c.rotary)[0]
        age = len(tokens) - 1 - n
        state += (age * log_decay).exp()[:, None, None] * turned[:, :, None] * v[n][:, None, :]
    return state


@torch.no_grad()
def test_the_first_layer_of_a_merge_is_the_sum_of_groups_that_end_together(retnet, same):
    groups = [ids(n, n) for n in LENGTHS]
    merged = merge([remember(retnet, g) for g in groups], weight=lambda states: 1)
    assert int(merged.state.position[0]) == max(LENGTHS) and merged.tokens == sum(LENGTHS)
    want = sum(by_hand(retnet, g, max(LENGTHS) - len(g)) for g in groups)
    same(layers(merged)[0][0], want, EXACT)


@torch.no_grad()
def test_the_first_layer_of_a_chain_is_that_of_reading_on(retnet, same):
    groups = [ids(n, n) for n in LENGTHS]
    parts = [remember(retnet, g) for g in groups]
    whole = None
    for g in groups:
        whole = remember(retnet, g, whole)
    chained = chain(parts)
    assert torch.equal(chained.state.position, whole.state.position) and chained.tokens == whole.tokens
    same(layers(chained)[0], layers(whole)[0], EXACT)
    first, *others = chain_errors(parts, whole)
    assert first < EXACT and all(1e-3 < error < 3 for error in others)
    distance = (layers(chained)[2] - layers(whole)[2]).norm() / layers(whole)[2].norm()
    assert others[1] == pytest.approx(float(distance))


@torch.no_grad()
def test_where_a_memory_is_turned_to_does_not_matter(same):
    """Only differences of positions count; score_norm scales q by position, which the head norm all but takes out."""
    model = build(changed(CONFIG, score_norm=False)).double().eval()
    memory, nothing = remember(model, ids(20)), remember(model, ids(70, 1))
    for x in layers(nothing):
        x.zero_()
    turned = merge([memory, nothing], weight=lambda states: 1)
    assert int(turned.state.position[0]) == 70
    same(after(model, turned, [1, 2, 3]), after(model, memory, [1, 2, 3]), 1e-10)


def test_merging_copies_of_a_memory_gives_that_memory(retnet, same):
    memory = remember(retnet, ids(30))
    same(layers(merge([memory] * 5)), layers(memory), EXACT)


def test_a_merged_state_is_as_large_as_its_parts(retnet):
    parts = [remember(retnet, ids(n, n)) for n in LENGTHS]
    merged = merge(parts)
    for layer, *states in zip(layers(merged), *(layers(p) for p in parts), strict=True):
        norms = torch.stack([s.square().sum((-2, -1)) for s in states]).mean(0).sqrt()
        torch.testing.assert_close(layer.square().sum((-2, -1)).sqrt(), norms)


def test_weights_of_equal_and_of_unrelated_states():
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(keep_size(x.expand(7, -1, -1, -1)), torch.full((2, 1, 1), 1 / 7))
    apart = torch.zeros(4, 2, 4, 4)
    for n in range(4):
        apart[n, :, n] = 3
    torch.testing.assert_close(keep_size(apart), torch.full((2, 1, 1), 0.5))
    assert torch.equal(keep_size(torch.zeros(3, 2, 4, 4)), torch.zeros(2, 1, 1))


def test_a_merge_says_which_document_was_in_which_part(retnet):
    parts = [remember(retnet, ids(4, 4), remember(retnet, ids(3, 3))), remember(retnet, ids(5, 5))]
    for merged in (merge(parts), chain(parts)):
        assert [s["part"] for s in merged.sources] == [0, 0, 1]
        assert [s["tokens"] for s in merged.sources] == [3, 4, 5] and merged.tokens == 12


def test_merges_that_have_no_meaning_are_refused(refuses):
    model = build(FIXED).eval()
    memory, foreign = remember(model, ids(5)), remember(build(FIXED).eval(), ids(5))
    transformer = remember(build(twin(CONFIG)).eval(), ids(5))
    gated = remember(build(changed(CONFIG, decay="gated")).eval(), ids(5))
    for merging in (merge, chain):
        for memories, words in (
            ([], "merging needs at least one memory"),
            ([memory, foreign], "memories of different models cannot be merged"),
            ([transformer, transformer], "memories of attention cannot be merged"),
            ([memory, replace(memory, pending=[3])], "tokens still to be read ([3]) cannot be merged"),
            ([replace(memory, config={})], "needs the model's config"),
        ):
            with refuses(words):
                merging(memories)
    with refuses("a decay per token cannot be chained"):
        chain([gated, gated])
    assert merge([gated, gated]).tokens == 10
    with refuses(
        "expected a memory of the same 2 documents (10 tokens) read in a row, got one of 1 document (5 tokens)"
    ):
        chain_errors([memory, memory], memory)
