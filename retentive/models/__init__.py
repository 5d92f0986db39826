"""RetNet, its Transformer twin, a hybrid of both, their configs, states and costs; and peers to compare with."""

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
    "Model",
    "Peer",
    "PeerConfig",
    "RetNet",
    "RetNetConfig",
    "RetentionState",
    "Transformer",
    "TransformerConfig",
    "build",
    "load_state",
    "of_one_kind",
    "peer",
    "preset",
    "twin",
]


Config = OwnConfig | PeerConfig
"""The config of any model that `build` makes."""
Model = LanguageModel
"""The short name, for annotations."""
MODELS = {RetNetConfig: RetNet, TransformerConfig: Transformer, HybridConfig: Hybrid, PeerConfig: Peer}


def build(config: Config) -> LanguageModel:
    """The model of a config, freshly initialised. (A peer keeps no state: it can be trained and scored only.)"""
    return MODELS[type(config)](config)
