"""Language models: one class whose config is a list of blocks, with states and costs; and peers for comparisons.

build(retnet("5m", vocab_size=257))                    a RetNet by its size
build(config_of("transformer", "5m", vocab_size=257))  any model by its name
"""

from typing import Any

from retentive.models.config import BlockConfig, ModelConfig
from retentive.models.memory import AttentionMemory, ConvolutionMemory, RetentionMemory
from retentive.models.model import LanguageModel
from retentive.models.peers import KINDS as PEERS
from retentive.models.peers import Peer, PeerConfig, peer
from retentive.models.presets import ARCHITECTURES, FIELDS, PRESETS, hybrid, mixed, retnet, transformer, twin
from retentive.models.state import State, load_state

__all__ = [
    "ARCHITECTURES",
    "FIELDS",
    "NAMES",
    "PRESETS",
    "AttentionMemory",
    "BlockConfig",
    "Config",
    "ConvolutionMemory",
    "LanguageModel",
    "ModelConfig",
    "Peer",
    "PeerConfig",
    "RetentionMemory",
    "State",
    "build",
    "config_of",
    "hybrid",
    "load_state",
    "mixed",
    "peer",
    "retnet",
    "transformer",
    "twin",
]


Config = ModelConfig | PeerConfig
"""Config of any model that `build` makes."""
NAMES = (*ARCHITECTURES, "transformer", "hybrid", *PEERS)
"""Names of models that `config_of` knows."""


def build(config: Config) -> LanguageModel:
    """Returns a model of this config, newly initialised. A peer keeps no state: it can be trained and scored only."""
    return Peer(config) if isinstance(config, PeerConfig) else LanguageModel(config)


def config_of(name: str, size: str | None = None, **changes: Any) -> Config:
    """Returns the config of a model in a named size.

    Args:
        name: "retnet", another of ARCHITECTURES, "transformer" (the RetNet's twin), "hybrid", or the kind of a peer.
        changes: fields that differ from the size's: see `retnet`, `transformer` and `hybrid`; for a peer those of the
            RetNet whose size it has.

    Raises:
        ValueError: an unknown name, size or field (known ones are listed), or a change that contradicts the name.
    """
    if name == "hybrid":
        return hybrid(size, **changes)
    if name == "transformer":
        return transformer(size, **changes)
    if name in ARCHITECTURES:
        return retnet(size, architecture=name, **changes)
    if name in PEERS:
        return peer(retnet(size, **changes), name)
    raise ValueError(f"unknown model {name!r}, expected one of {', '.join(NAMES)}")
