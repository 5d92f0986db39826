"""RetNet, its Transformer twin, their configs, states and costs."""

from retentive.models.config import PRESETS, RetNetConfig, TransformerConfig, preset, twin
from retentive.models.retnet import RetNet
from retentive.models.state import KVCache, RetentionState, load_state
from retentive.models.transformer import Transformer

__all__ = [
    "PRESETS",
    "KVCache",
    "Model",
    "RetNet",
    "RetNetConfig",
    "RetentionState",
    "Transformer",
    "TransformerConfig",
    "build",
    "load_state",
    "preset",
    "twin",
]


Model = RetNet | Transformer
"""Either model: the same calls, a state each."""


def build(config: RetNetConfig | TransformerConfig) -> Model:
    """The model of a config, freshly initialised."""
    return RetNet(config) if isinstance(config, RetNetConfig) else Transformer(config)
