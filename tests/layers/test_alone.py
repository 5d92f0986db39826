"""A retention layer by itself: `MultiScaleRetention(dim, heads)(x, state)`, in all forms the same."""

import re

import numpy as np
import pytest
import torch

from retentive.layers import MultiScaleRetention, RetentionConfig, positions_of

VARIANTS = {
    "default": {},
    "paper": dict(decay="paper", score_norm=True, head_norm=True, qk_norm=False),
    "sigmoid": dict(decay="sigmoid", decay_bias=True, rotary="none"),
    "shared": dict(kv_heads=1, qk_bias=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [True, False])
def test_in_pieces_and_step_by_step_it_gives_the_same(variant, grad):
    torch.manual_seed(0)
    layer = MultiScaleRetention(32, 4, **VARIANTS[variant])
    x = torch.randn(2, 12, 32)
    with torch.set_grad_enabled(grad):
        whole, last = layer(x)
        assert last.position == 12 and whole.shape == x.shape
        for sizes in ((5, 7), (1,) * 12, (4, 1, 1, 6), (3, 1, 1, 1, 6)):
            state, parts = None, []
            for part in x.split(list(sizes), 1):
                out, state = layer(part, state)
                parts.append(out)
            # two forms in float32
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
            assert state.position == 12


def test_positions_without_phases_are_kept():
    layer, x = MultiScaleRetention(16, 2), torch.randn(2, 6, 16)
    lengths = torch.tensor([6, 4])
    padded, state = layer(x, None, positions_of(2, 6, None, lengths, None, x.device))
    alone, last = layer(x[1:, :4])
    torch.testing.assert_close(padded[1:, :4], alone, rtol=1e-4, atol=1e-5)  # two forms in float32
    torch.testing.assert_close(state[1:], last.memory, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_the_state():
    layer, x = MultiScaleRetention(16, 2).double(), torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(layer(x)[0][:, -1].sum(), x)[0]
    _, state = layer(x[:, :3])
    then, _ = layer(x[:, 3:], state)
    torch.testing.assert_close(torch.autograd.grad(then[:, -1].sum(), x)[0], whole, rtol=1e-9, atol=1e-12)


def test_a_config_and_its_fields_make_the_same_layer():
    torch.manual_seed(0)
    one = MultiScaleRetention(32, 4, decay="paper")
    torch.manual_seed(0)
    other = MultiScaleRetention(RetentionConfig(32, 4, decay="paper"))
    other.reset_parameters()
    assert one.config == other.config and MultiScaleRetention(32).config == RetentionConfig(32)
    with pytest.raises(TypeError, match="give either a config, or dim, heads"):
        MultiScaleRetention(RetentionConfig(32, 4), heads=2)
    with pytest.raises(TypeError, match="hedas"):
        MultiScaleRetention(32, hedas=2)


@torch.no_grad()
def test_a_state_that_was_used_is_refused_and_its_clone_is_not():
    layer, x = MultiScaleRetention(16, 2), torch.randn(1, 4, 16)
    _, state = layer(x)
    _, ring = layer(x[:, :1], state)
    with pytest.raises(ValueError, match="the state was used"):
        layer(x[:, :1], state)
    kept = ring.clone()
    first, _ = layer(x[:, 1:2], ring)
    again, _ = layer(x[:, 1:2], kept)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("x", "state", "words"),
    [
        (torch.zeros(4, 16), None, r"x must be \[B, T, 16\] with tokens, got \[4, 16\]"),
        (torch.zeros(1, 4, 8), None, r"x must be \[B, T, 16\] with tokens, got \[1, 4, 8\]"),
        (torch.zeros(1, 0, 16), None, r"x must be \[B, T, 16\] with tokens"),
        (torch.zeros(1, 1, 16), torch.zeros(1), "the state must be one that the layer returned, got Tensor"),
        (torch.zeros(2, 1, 16), "other", r"of \[B, H, K, V\] = \[2, 2, 8, 16\], got \[1, 2, 8, 16\]"),
    ],
)
def test_bad_input(x, state, words):
    layer = MultiScaleRetention(16, 2)
    if state == "other":
        _, state = layer(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match=words):
        layer(x, state)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "x must be a tensor [B, T, 32], got NoneType"),
        (np.zeros((1, 2, 32), np.float32), "x must be a tensor [B, T, 32], got ndarray"),
        (torch.zeros(1, 2, 31), "x must be [B, T, 32] with tokens, got [1, 2, 31]"),
        (torch.zeros(1, 2, 32, dtype=torch.float64), "x is float64, the layer float32: convert either"),
        (torch.zeros(1, 2, 32, dtype=torch.int64), "x is int64, the layer float32"),
        (torch.zeros(1, 2, 32, dtype=torch.bfloat16), "x is bfloat16, the layer float32"),
    ],
    ids=lambda x: None if isinstance(x, str) else type(x).__name__,
)
def test_a_layer_by_itself_names_what_it_cannot_read(x, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        MultiScaleRetention(32, 2)(x)


def test_a_layer_by_itself_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = MultiScaleRetention(32, 2)(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert out.shape == (1, 3, 32)


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="MultiScaleRetention has no option 'decey': did you mean decay"):
        MultiScaleRetention(32, 2, decey="paper")
