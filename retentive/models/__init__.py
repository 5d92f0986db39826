"""RetNet, its Transformer twin, a hybrid of both, their configs, states and costs; and peers to compare with."""

from retentive.models.config import PRESETS, HybridConfig, RetNetConfig, TransformerConfig, of_one_kind, preset, twin
from retentive.models.hybrid import Hybrid
from retentive.models.peers import Peer, PeerConfig, peer
from retentive.models.retnet import RetNet
from retentive.models.state import HybridState, KVCache, RetentionState, load_state
from retentive.models.transformer import Transformer

__all__ = [
    "MODELS",
    "PRESETS",
    "Hybrid",
    "HybridConfig",
    "HybridState",
    "KVCache",
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


Model = RetNet | Transformer | Hybrid
"""Any of the models: the same calls, a state each."""
Config = RetNetConfig | TransformerConfig | PeerConfig
MODELS = {RetNetConfig: RetNet, TransformerConfig: Transformer, HybridConfig: Hybrid, PeerConfig: Peer}


def build(config: Config) -> Model:
    """The model of a config, freshly initialised. (A peer can be trained and scored only.)"""
    return MODELS[type(config)](config)
