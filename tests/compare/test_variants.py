"""Variants: as many parameters as the size's RetNet, and what they say; `retentive train` makes the same models."""

import math

import pytest

from retentive.compare.variants import VARIANTS, changes, config_of_variant, own_variant
from retentive.models import ARCHITECTURES, PEERS, config_of, cost, retnet, twin

SHAPE = dict(dim=64, layers=8, heads=4)


def made(name: str):
    return config_of_variant(VARIANTS[name], "1m", vocab_size=100, **SHAPE)


@pytest.mark.parametrize("size", ["1m", "5m", "60m"])
@pytest.mark.parametrize("name", [v for v in VARIANTS if VARIANTS[v].model not in PEERS])
def test_variants_have_the_parameters_of_the_sizes_retnet(name, size):
    base = cost.block_parameters(retnet(size, vocab_size=1000))
    changed = config_of_variant(VARIANTS[name], size, vocab_size=1000)
    # within 1/400, by which a model may be off and keep its own width; a fitted one is off by half a unit of it
    assert abs(cost.block_parameters(changed) - base) <= base / 400
    assert config_of(VARIANTS[name].model, size, vocab_size=1000, **changes(VARIANTS[name], size)) == changed


@pytest.mark.parametrize("name", ["retnet", "retnet-paper", "transformer"])
def test_what_goes_by_a_models_name_is_that_model(name):
    for size in ("1m", "2m", "5m", "10m"):
        assert changes(VARIANTS[name], size) == {}


def test_variants_are_what_they_say():
    base = retnet("1m", vocab_size=100, **SHAPE)
    assert made("retnet") == base and made("transformer") == twin(base)
    assert made("no-gate").retention.gate is False and made("no-gate").retention.head_norm is True
    assert made("one-decay").retention.decay == (math.log(127 / 128),) * 4
    assert made("no-decay").retention.decay == "none"
    small = made("small-heads").retention
    assert (small.heads, small.kv_heads, small.key_dim, small.value_dim) == (16, 16, 64, base.retention.value_dim)
    assert made("hybrid-window").kinds == ("retention", "retention", "retention", "attention") * 2
    assert made("hybrid").without_convolutions().kinds == ("retention", "attention") * 4
    gated = made("gated").retention
    assert gated.decay == "gated" and gated.head_norm is ARCHITECTURES["retnet-paper"]["head_norm"]
    assert made("short-head").retention.decay[0] == -1
    forgets = made("transformer-qk-norm-forget").attention
    assert forgets.qk_norm and forgets.forget_gate


def test_ones_own_variant_is_a_model_with_fields_changed():
    config = config_of_variant(own_variant({"model": "transformer", "kv_heads": 1}), "1m", vocab_size=9)
    assert config.attention.kv_heads == 1
    assert config.blocks[0].ffn.width > twin(retnet("1m", vocab_size=9)).blocks[0].ffn.width  # the parameters are kept
    assert config_of_variant(own_variant({"rotary": "none"}), "1m", vocab_size=9).retention.rotary == "none"
