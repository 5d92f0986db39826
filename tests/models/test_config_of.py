"""A model by its name: every kind in a named size, the changes it takes, and names that are none."""

from dataclasses import replace

import pytest

from retentive.models import PeerConfig, config_of, cost, retnet, twin
from retentive.models.presets import flat
from tests.configs import changed


def test_every_name_in_one_size_has_about_as_many_parameters():
    base = config_of("retnet", "1m", vocab_size=99, dropout=0.1)
    assert base == retnet("1m", vocab_size=99, dropout=0.1)
    assert config_of("transformer", "1m", vocab_size=99, dropout=0.1) == twin(base)
    hybrid = config_of("hybrid", "1m", vocab_size=99, attention_every=2)
    assert hybrid.without_convolutions().kinds == ("retention", "attention") * 2 + ("retention",)
    assert hybrid.vocab_size == 99
    # and the gates of more heads, and the convolutions
    assert cost.parameters(hybrid) == pytest.approx(cost.parameters(base), rel=0.02)
    llama = config_of("llama", "1m", vocab_size=99)
    assert isinstance(llama, PeerConfig) and (llama.kind, llama.dim, llama.layers) == ("llama", 128, 5)


def test_changes_reach_the_retnet_that_others_are_fitted_to():
    assert config_of("transformer", "1m", vocab_size=99, dim=64).dim == 64
    assert config_of("rwkv", "1m", vocab_size=99, layers=2).layers == 2


def test_a_change_of_a_twin_is_of_the_twin_where_it_has_such_a_field():
    """And of the RetNet whose twin it is where it has none, or both have it."""
    twin_4 = config_of("transformer", "1m", vocab_size=99, heads=4)
    assert twin_4 == twin(retnet("1m", vocab_size=99, heads=4))
    other = config_of("transformer", "1m", vocab_size=99, heads=4, qk_norm=True, kv_heads=2, ffn_dim=8)
    assert other == changed(twin_4, qk_norm=True, kv_heads=2, ffn_dim=8)
    narrow = config_of("transformer", "1m", vocab_size=99, value_dim=64)
    assert narrow.blocks[0].ffn.width < twin_4.blocks[0].ffn.width


def test_a_hybrid_attends_to_a_window_in_every_second_block_and_convolves():
    hybrid = config_of("hybrid", "1m", vocab_size=99, layers=3, decay="none")
    mixing = ("convolution",)
    assert hybrid.kinds == (*mixing, "retention", *mixing, *mixing, "attention", *mixing, *mixing, "retention", *mixing)
    assert hybrid.retention.decay == "none" and hybrid.convolution.taps == 4 and hybrid.constant_state
    assert hybrid.retention.head_shape == (4, 32, 56) and hybrid.attention.heads == 4  # RetNet's are (2, 64, 112)
    assert hybrid.attention.window == 256 and hybrid.attention.forget_gate and hybrid.attention.qk_norm
    assert [block.ffn is None for block in hybrid.blocks] == [True, True, False] * 3
    bare = config_of("hybrid", "1m", vocab_size=99, layers=3, decay="none", convolution=0)
    assert hybrid.without_convolutions() == bare and bare.with_convolutions(4) == hybrid
    assert twin(hybrid) == twin(bare)
    assert config_of("hybrid", "1m", vocab_size=99, heads=2).retention.heads == 2
    assert config_of("hybrid", "1m", vocab_size=99, dim=132).retention.heads == 2  # 33 features each would be odd


def test_a_hybrid_attends_where_it_is_told(refuses):
    config = config_of("hybrid", "1m", vocab_size=99, attention=[0, 3])
    kinds = config.without_convolutions().kinds
    assert kinds == ("attention", "retention", "retention", "attention", "retention")
    gated = config_of("hybrid", "1m", vocab_size=99, attention=[1], attention_window=9, attention_forget=True)
    assert gated.attention.forget_gate and gated.attention.window == 9
    with refuses("attention names block 5, but those that are no convolutions are 0 to 4"):
        config_of("hybrid", "1m", vocab_size=99, attention=[0, 5])
    with refuses("attention names block -1, but those that are no convolutions are 0 to 4"):
        config_of("hybrid", "1m", vocab_size=99, attention=[-1])
    with refuses("attention names no block: name one or more of 0 to 4, but not all, or take a RetNet"):
        config_of("hybrid", "1m", vocab_size=99, attention=[])
    with refuses("attention names every block: name one or more of 0 to 4, but not all, or take a Transformer"):
        config_of("hybrid", "1m", vocab_size=99, attention=range(5))
    with refuses("attention_every=2 counts them: give one"):
        config_of("hybrid", "1m", vocab_size=99, attention=[1], attention_every=2)
    with refuses("attention_every must be from 2 to layers, 5, for blocks of both kinds to be there, got 0"):
        config_of("hybrid", "1m", vocab_size=99, attention_every=0)


PAPER = dict(decay="lm", score_norm=True, head_norm=True, head_norm_affine=False, rotary="interleaved", qk_norm=False)
NAMED = {
    "retnet-paper": PAPER | dict(embed_scale=False, decay_range=(1 / 32, 1 / 512)),
    "torchscale": PAPER | dict(decay="paper", embed_scale=True),
    "fla": PAPER | dict(decay="paper", rotary="half", score_norm=False, head_norm_affine=True, embed_scale=False),
}
OTHERS = dict(qk_bias=False, decay_bias=False, gate=True, gate_activation="swish", ffn_gate=True, activation="swish")


@pytest.mark.parametrize("name", NAMED)
def test_named_architectures_stand_for_what_was_published(name, refuses):
    """In every field, whatever the defaults of this package are."""
    config = config_of(name, "1m", vocab_size=99)
    assert {field: flat(config, name)[field] for field in NAMED[name] | OTHERS} == NAMED[name] | OTHERS
    assert config_of(name, "1m", vocab_size=99, decay=NAMED[name]["decay"], dropout=0.1) == replace(config, dropout=0.1)
    with refuses(f"{name} stands for qk_norm=False (got True)"):
        config_of(name, "1m", vocab_size=99, qk_norm=True)


def test_published_sizes_have_the_architecture_that_they_were_published_with(refuses):
    for size, name in (("paper-1.3b", "retnet-paper"), ("torchscale-base", "torchscale"), ("fla-340m", "fla")):
        config = config_of("retnet", size, vocab_size=99)
        assert {field: flat(config, name)[field] for field in NAMED[name]} == NAMED[name]
        assert config_of(name, size, vocab_size=99) == config
        with refuses(f"{name} stands for qk_norm=False (got True)"):
            config_of("retnet", size, vocab_size=99, qk_norm=True)
    with refuses("size fla-340m is of the architecture fla, got torchscale"):
        config_of("torchscale", "fla-340m", vocab_size=99)


def test_what_is_unknown_is_named(refuses):
    with refuses(
        "unknown model 'lstm', expected one of retnet, retnet-paper, torchscale, fla, retnet-portable, "
        "transformer, hybrid, llama"
    ):
        config_of("lstm", "1m", vocab_size=99)
    with refuses("unknown size '3m', expected one of 1m, 2m"):
        config_of("retnet", "3m", vocab_size=99)
    with refuses("a RetNet has no field widths"):
        config_of("retnet", "1m", vocab_size=99, widths=3)
