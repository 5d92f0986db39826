"""A model by its name: every kind in a named size, the changes it takes, and names that are none."""

from dataclasses import replace

import pytest

from retentive.models import HybridConfig, PeerConfig, config_of, cost, matching, preset, twin


def test_every_name_in_one_size_has_about_as_many_parameters():
    retnet = config_of("retnet", "1m", vocab_size=99, dropout=0.1)
    assert retnet == preset("1m", vocab_size=99, dropout=0.1)
    assert config_of("transformer", "1m", vocab_size=99, dropout=0.1) == twin(retnet)
    hybrid = config_of("hybrid", "1m", vocab_size=99, attention_every=2)
    assert isinstance(hybrid, HybridConfig) and (hybrid.attention_every, hybrid.vocab_size) == (2, 99)
    assert cost.parameters(hybrid) == pytest.approx(cost.parameters(retnet), rel=0.01)
    llama = config_of("llama", "1m", vocab_size=99)
    assert isinstance(llama, PeerConfig) and (llama.kind, llama.dim, llama.layers) == ("llama", 128, 5)


def test_changes_reach_the_retnet_that_others_are_fitted_to():
    assert config_of("transformer", "1m", vocab_size=99, dim=64).dim == 64
    assert config_of("rwkv", "1m", vocab_size=99, layers=2).layers == 2


def test_a_hybrid_beside_a_retnet_keeps_its_widths():
    """With fewer blocks than four, the last one attends."""
    retnet = preset("1m", vocab_size=99, layers=3, decay="paper")
    hybrid = matching("hybrid", retnet)
    assert (hybrid.attention_every, hybrid.decay, hybrid.value_dim) == (3, "paper", retnet.value_dim)
    assert matching("hybrid", hybrid) is hybrid and matching("retnet", retnet) is retnet
    assert matching("hybrid", replace(retnet, layers=8)).attention_every == 4


def test_what_is_unknown_is_named(refuses):
    with refuses("unknown model 'lstm', expected one of retnet, transformer, hybrid, llama"):
        config_of("lstm", "1m", vocab_size=99)
    with refuses("unknown size '3m', expected one of 1m, 2m"):
        config_of("retnet", "3m", vocab_size=99)
    with refuses("RetNetConfig has no field widths"):
        config_of("retnet", "1m", vocab_size=99, widths=3)
