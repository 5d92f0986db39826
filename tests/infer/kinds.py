"""A model of each kind, all of one vocabulary and width: what the tests of decoding run over."""

from dataclasses import replace
from typing import Any

from retentive.models import ARCHITECTURES, HybridConfig, RetNetConfig, twin


def kinds(config: RetNetConfig) -> dict[str, Any]:
    """Their configs by name: decays per token and fixed ones, a growing cache, a window, and hybrids."""
    hybrid = HybridConfig(vocab_size=config.vocab_size, dim=config.dim, layers=2, heads=config.heads, attention_every=2)
    return {
        "retnet": config,
        "retnet-paper": replace(config, **ARCHITECTURES["retnet-paper"]),
        "transformer": twin(config),
        "hybrid": hybrid,
        "transformer-window": replace(twin(config), attention_window=7, forget_gate=True, qk_norm=True),
        "hybrid-window": replace(hybrid, attention_window=5),
    }
