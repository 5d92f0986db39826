"""A model of each kind for the tests of decoding, all with one vocabulary and width."""

from typing import Any

from retentive.models import ARCHITECTURES, ModelConfig, twin
from tests.configs import changed, hybrid


def kinds(config: ModelConfig) -> dict[str, Any]:
    """Configs by name: decays per token, fixed decays, a growing cache, a window, and hybrids."""
    heads = config.all_retention("tests").heads
    mixed = hybrid(vocab_size=config.vocab_size, dim=config.dim, layers=2, heads=heads, attention_every=2)
    return {
        "retnet": config,
        "retnet-paper": changed(config, **ARCHITECTURES["retnet-paper"]),
        "transformer": twin(config),
        "hybrid": mixed,
        "transformer-window": changed(twin(config), attention_window=7, forget_gate=True, qk_norm=True),
        "hybrid-window": changed(mixed, attention_window=5, attention_sinks=2),
        "hybrid-convolution": changed(mixed, attention_window=5).with_convolutions(4),
    }
