"""RetNet, its Transformer twin, a hybrid of both, their configs, states and costs; and peers to compare with.

build(config_of("retnet", "5m", vocab_size=257))      a model by its name and size
"""

from dataclasses import fields
from typing import Any

from retentive.models.base import LanguageModel
from retentive.models.config import (
    PRESETS,
    HybridConfig,
    OwnConfig,
    RetNetConfig,
    TransformerConfig,
    of_one_kind,
    preset,
    twin,
)
from retentive.models.hybrid import Hybrid
from retentive.models.peers import KINDS as PEERS
from retentive.models.peers import Peer, PeerConfig, peer
from retentive.models.retnet import RetNet
from retentive.models.state import HybridState, KVCache, RetentionState, load_state
from retentive.models.transformer import Transformer

__all__ = [
    "MODELS",
    "PRESETS",
    "Config",
    "Hybrid",
    "HybridConfig",
    "HybridState",
    "KVCache",
    "LanguageModel",
    "Peer",
    "PeerConfig",
    "RetNet",
    "RetNetConfig",
    "RetentionState",
    "Transformer",
    "TransformerConfig",
    "build",
    "config_of",
    "load_state",
    "matching",
    "of_one_kind",
    "peer",
    "preset",
    "twin",
]


Config = OwnConfig | PeerConfig
"""The config of any model that `build` makes."""
MODELS = {RetNetConfig: RetNet, TransformerConfig: Transformer, HybridConfig: Hybrid, PeerConfig: Peer}


def build(config: Config) -> LanguageModel:
    """The model of a config, freshly initialised. (A peer keeps no state: it can be trained and scored only.)"""
    return MODELS[type(config)](config)


def config_of(name: str, size: str, *, vocab_size: int, **changes: Any) -> Config:
    """The config of a model in a named size.

    Args:
        name: "retnet", "transformer" (its twin), "hybrid", or the kind of a peer.
        changes: fields of the RetNet's config, or of the hybrid's, that differ from the size's. Twins and peers are
            made as wide as the RetNet with these changes.

    Raises:
        ValueError: an unknown name, size or field; the known ones are named.
    """
    kind = HybridConfig if name == "hybrid" else RetNetConfig
    return matching(name, preset(size, vocab_size=vocab_size, kind=kind, **changes))


def matching(name: str, config: RetNetConfig) -> Config:
    """The config of the model `name` that is as wide and deep as this RetNet and has about as many parameters."""
    if name == "retnet":
        return config
    if name == "transformer":
        return twin(config)
    if name == "hybrid":
        if isinstance(config, HybridConfig):
            return config
        shared = {f.name: getattr(config, f.name) for f in fields(config)}
        return HybridConfig(**shared, attention_every=min(HybridConfig.attention_every, config.layers))
    if name in PEERS:
        return peer(config, name)
    raise ValueError(f"unknown model {name!r}, expected one of retnet, transformer, hybrid, {', '.join(PEERS)}")
