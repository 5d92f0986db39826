"""Configs of version 0.1.0: one flat set of fields for each of three kinds of model.

`read_version_1` reads its config.json. `version_1` returns what that version would have written, which fingerprints of
models still hash, so that its memory files stay valid.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from retentive.layers.config import AttentionConfig, FeedForwardConfig, RetentionConfig
from retentive.models.config import LATER, BlockConfig, Mixer, ModelConfig, check_layers
from retentive.models.presets import ARCHITECTURES, FEED_FORWARD, HYBRID, RETENTION, SHARED, hybrid, retnet

NEW = ("rotary_base", "head_dim", "sinks", *LATER)
"""Fields of mixers that version did not have."""
TRANSFORMER = ("kv_heads", "rotary", "qk_norm", "forget_gate", "attention_window", "ffn_dim")
"""Fields of its Transformer beside those that all models share."""
OWN_NORMS = ("embed_scale", "embed_norm", "final_norm")
"""Fields of a whole model that its Transformer did not have."""


def read_version_1(kind: Any, raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the config of a "retnet", "transformer" or "hybrid" with these fields.

    Raises:
        TypeError: the kind is unknown, or did not have one of the fields.
        ValueError: values are invalid.
    """
    kinds = ("retnet", "transformer", "hybrid")
    if kind not in list(kinds):  # a list, since JSON values may not be hashable
        raise TypeError(f'expected "kind" to be one of {", ".join(kinds)}, got {kind!r}')
    known = {*SHARED, *RETENTION, *FEED_FORWARD}
    known |= {"hybrid": {*HYBRID} - {"attention", "attention_forget"}, "transformer": {*TRANSFORMER}}.get(kind, set())
    if unknown := sorted(set(raw) - known):
        raise TypeError(f"a {kind} has no field {', '.join(unknown)}")
    if kind == "transformer":
        return _transformer(dict(raw))
    # A missing field did not exist when the file was written, when all RetNets were the paper's.
    made = ARCHITECTURES["retnet-paper"] | dict(raw)
    if kind == "retnet":
        return retnet(**made)
    return hybrid(**{"attention_every": 4, "attention_window": None} | made, attention_forget=False, convolution=0)


def _transformer(raw: dict[str, Any]) -> ModelConfig:
    layers, width, window = raw.pop("layers", 6), raw.pop("ffn_dim", 0), raw.pop("attention_window", None)
    check_layers(layers)
    of_model = ("vocab_size", "tie_embeddings", "dropout")
    model = {"vocab_size": 257, **{name: raw.pop(name) for name in of_model if name in raw}}
    mixer = AttentionConfig(**raw, window=window)
    block = BlockConfig(mixer, FeedForwardConfig(width or 8 * -(-mixer.dim // 3)))
    return ModelConfig(**model, dim=mixer.dim, norm_eps=mixer.norm_eps, blocks=(block,) * layers)


def version_1(config: ModelConfig) -> tuple[str, dict[str, Any]] | None:
    """Returns (class, fields) as that version described a RetNet, Transformer or Hybrid; None if it could not."""
    if any(block.ffn is None for block in config.blocks):
        return None
    shared = {name: getattr(config, name) for name in SHARED}
    block = config.blocks[config.kinds.index(RetentionConfig.kind)] if config.retains else config.blocks[0]
    if isinstance(block.mixer, AttentionConfig):
        flat = _flat(block.mixer) | {"attention_window": block.mixer.window, "ffn_dim": block.ffn.width}
        del flat["window"]
        flat |= {name: value for name, value in shared.items() if name not in OWN_NORMS}
        name, read = "Transformer", "transformer"
    else:
        own = {name: getattr(block.ffn, of) for name, (of, _) in FEED_FORWARD.items()}
        flat, name, read = _flat(block.mixer) | own | shared, "RetNet", "retnet"
        attention = config.attention
        if attention is not None:
            flat |= {"attention_every": config.kinds.index(AttentionConfig.kind) + 1}
            flat |= {"attention_window": attention.window, "attention_rotary": attention.rotary}
            name, read = "Hybrid", "hybrid"
    try:
        again = read_version_1(read, flat)
    except ValueError:
        return None
    return (name, flat) if again == config else None


def _flat(mixer: Mixer) -> dict[str, Any]:
    return {name: value for name, value in asdict(mixer).items() if name not in NEW}
