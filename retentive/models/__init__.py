"""RetNet, its Transformer twin, a hybrid of both, their configs, states and costs."""

from retentive.models.config import PRESETS, HybridConfig, RetNetConfig, TransformerConfig, preset, twin
from retentive.models.hybrid import Hybrid
from retentive.models.retnet import RetNet
from retentive.models.state import HybridState, KVCache, RetentionState, load_state
from retentive.models.transformer import Transformer

__all__ = [
    "PRESETS",
    "Hybrid",
    "HybridConfig",
    "HybridState",
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


Model = RetNet | Transformer | Hybrid
"""Any of the models: the same calls, a state each."""

MODELS = {RetNetConfig: RetNet, TransformerConfig: Transformer, HybridConfig: Hybrid}


def build(config: RetNetConfig | TransformerConfig) -> Model:
    """The model of a config, freshly initialised."""
    return MODELS[type(config)](config)
