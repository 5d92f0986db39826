"""Variants: as many parameters as the baseline, and what they say."""

import math

import pytest

from retentive.models import HybridConfig, RetNetConfig, cost, preset, twin
from retentive.studies.compare.variants import VARIANTS, changes, config_of


@pytest.mark.parametrize("size", ["1m", "5m", "60m"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].model in ("retnet", "transformer", "hybrid")])
def test_variants_have_the_parameters_of_the_baseline(variant, size):
    config = preset(size, vocab_size=1000)
    changed = config_of(variant, config)
    # the feed-forward width is whole: half a unit of it in each of three matrices and every block is what may be off
    unit = 3 * config.dim * config.layers
    assert abs(cost.block_parameters(changed) - cost.block_parameters(config)) <= unit / 2 + 2


def test_variants_are_what_they_say():
    config = RetNetConfig(vocab_size=100, dim=64, layers=8, heads=4)
    assert changes("retnet", config) == {}
    assert config_of("transformer", config) == twin(config)
    assert config_of("no-gate", config).gate is False
    assert config_of("one-decay", config).decay == (math.log(127 / 128),) * 4
    assert config_of("no-decay", config).decay == "none"
    small = config_of("small-heads", config)
    assert (small.heads, small.kv_heads, small.key_dim, small.value_dim) == (16, 16, 64, config.value_dim)
    hybrid = config_of("hybrid", config)
    assert isinstance(hybrid, HybridConfig) and [hybrid.attends(i) for i in range(8)] == [False, False, False, True] * 2
    assert config_of("gated", config).decay == "gated"
    assert config_of("short-head", config).decay[0] == -1
