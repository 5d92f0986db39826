"""Variants: as many parameters as the size's RetNet, and what they say; `retentive train` makes the same models."""

import math

import pytest

from retentive.compare.variants import VARIANTS, changes, config_of_variant, own_variant
from retentive.models import ARCHITECTURES, PEERS, HybridConfig, config_of, cost, preset, twin

SHAPE = dict(dim=64, layers=8, heads=4)


def made(name: str):
    return config_of_variant(VARIANTS[name], "1m", vocab_size=100, **SHAPE)


@pytest.mark.parametrize("size", ["1m", "5m", "60m"])
@pytest.mark.parametrize("name", [v for v in VARIANTS if VARIANTS[v].model not in PEERS])
def test_variants_have_the_parameters_of_the_sizes_retnet(name, size):
    base = cost.block_parameters(preset(size, vocab_size=1000))
    changed = config_of_variant(VARIANTS[name], size, vocab_size=1000)
    # within 1/400, by which a model may be off and keep its own width; a fitted one is off by half a unit of it
    assert abs(cost.block_parameters(changed) - base) <= base / 400
    assert config_of(VARIANTS[name].model, size, vocab_size=1000, **changes(VARIANTS[name], size)) == changed


@pytest.mark.parametrize("name", ["retnet", "retnet-paper", "transformer", "hybrid"])
def test_what_goes_by_a_models_name_is_that_model(name):
    for size in ("1m", "2m", "5m", "10m"):
        assert changes(VARIANTS[name], size) == {}


def test_variants_are_what_they_say():
    base = preset("1m", vocab_size=100, **SHAPE)
    assert made("retnet") == base and made("transformer") == twin(base)
    assert made("no-gate").gate is False and made("no-gate").head_norm is True
    assert made("one-decay").decay == (math.log(127 / 128),) * 4
    assert made("no-decay").decay == "none"
    small = made("small-heads")
    assert (small.heads, small.kv_heads, small.key_dim, small.value_dim) == (16, 16, 64, base.value_dim)
    hybrid = made("hybrid")
    assert isinstance(hybrid, HybridConfig) and [hybrid.attends(i) for i in range(8)] == [False, False, False, True] * 2
    gated = made("gated")
    assert gated.decay == "gated" and gated.head_norm is ARCHITECTURES["retnet-paper"]["head_norm"]
    assert made("short-head").decay[0] == -1
    assert made("transformer-qk-norm-forget").qk_norm and made("transformer-qk-norm-forget").forget_gate


def test_ones_own_variant_is_a_model_with_fields_changed():
    config = config_of_variant(own_variant({"model": "transformer", "kv_heads": 1}), "1m", vocab_size=9)
    assert config.kv_heads == 1 and config.ffn_dim > twin(preset("1m", vocab_size=9)).ffn_dim  # the parameters are kept
    assert config_of_variant(own_variant({"rotary": "none"}), "1m", vocab_size=9).rotary == "none"
