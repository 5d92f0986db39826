"""RetNet, its Transformer twin, a hybrid of both, their configs, states and costs; and peers to compare with.

build(config_of("retnet", "5m", vocab_size=257))      a model by its name and size
"""

from dataclasses import fields, replace
from typing import Any

from retentive.models.base import LanguageModel
from retentive.models.config import (
    ARCHITECTURES,
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
    "ARCHITECTURES",
    "MODELS",
    "NAMES",
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


COMMON = {"vocab_size", "dim", "layers", "heads", "norm_eps", "tie_embeddings", "dropout"}
"""Fields in which a RetNet and its twin are the same."""
NAMES = (*ARCHITECTURES, "transformer", "hybrid", *PEERS)
"""The models that `config_of` knows."""


def config_of(name: str, size: str, *, vocab_size: int, **changes: Any) -> Config:
    """The config of a model in a named size.

    Args:
        name: "retnet", another of ARCHITECTURES, "transformer" (the RetNet's twin), "hybrid", or the kind of a peer.
        changes: fields of the config that differ from the size's. Of a twin: its own fields, and those of the RetNet
            that it is as wide and as large as. Of a peer: of that RetNet.

    Raises:
        ValueError: an unknown name, size or field (the known ones are named), or a change that contradicts the name.
    """
    if name == "hybrid":
        return preset(size, vocab_size=vocab_size, kind=HybridConfig, **changes)
    if name in ARCHITECTURES:
        return preset(size, vocab_size=vocab_size, architecture=name, **changes)
    if name == "transformer":
        own = {f.name for f in fields(TransformerConfig)} - COMMON
        base = preset(size, vocab_size=vocab_size, **{k: v for k, v in changes.items() if k not in own})
        return replace(twin(base), **{k: v for k, v in changes.items() if k in own})
    if name in PEERS:
        return peer(preset(size, vocab_size=vocab_size, **changes), name)
    raise ValueError(f"unknown model {name!r}, expected one of {', '.join(NAMES)}")
