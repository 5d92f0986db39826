"""Configs of models with some fields changed in all of their blocks."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retentive.checkpoint.quantize import matrices
from retentive.models import ModelConfig
from retentive.models import hybrid as preset
from retentive.models.presets import ATTENTION, FEED_FORWARD, RETENTION

ATTENTION = ATTENTION | {name: (name, Any) for name in ("rotary_scaling", "moving_sinks")}
"""Fields of attention, with those that no name of a model takes."""


def changed(config: ModelConfig, *, layers: int = 0, **fields: Any) -> ModelConfig:
    """Returns the config with fields changed in all blocks that have them, named as for `retnet` and `transformer`."""
    heads = {name: fields[name] for name in ("norm_eps", "heads") if name in fields}
    of_all = {"dim": fields["dim"]} if "dim" in fields else {}
    of_kind = {
        "retention": {name: fields[name] for name in RETENTION if name in fields} | heads,
        "attention": {own: fields[name] for name, (own, _) in ATTENTION.items() if name in fields} | heads,
        "convolution": {},
    }
    ffn = {own: fields[name] for name, (own, _) in FEED_FORWARD.items() if name in fields}
    blocks = [
        replace(b, mixer=replace(b.mixer, **of_kind[b.mixer.kind] | of_all), ffn=b.ffn and replace(b.ffn, **ffn))
        for b in config.blocks
    ]
    rest = set(fields) - {"heads", *RETENTION, *ATTENTION, *FEED_FORWARD}
    blocks = blocks[:1] * layers if layers else blocks
    return replace(config, blocks=tuple(blocks), **{name: fields[name] for name in rest})


def hybrid(**fields: Any) -> ModelConfig:
    """Returns a hybrid with nothing but what is asked for: attention to all tokens, no gates, no convolutions."""
    return preset(**{"attention_window": None, "attention_forget": False, "convolution": 0} | fields)


def stacked(config: ModelConfig) -> ModelConfig:
    """Returns the config with no feed-forward layer in the attention blocks: two mixers, one after the other."""
    blocks = [replace(b, ffn=None) if b.mixer.kind == "attention" else b for b in config.blocks]
    return replace(config, blocks=tuple(blocks))


@torch.no_grad()
def on_levels(model: nn.Module) -> nn.Module:
    """Gives half of a model's matrices 16 levels in each group of 32, from the minimum to the maximum, as Q4_1 has."""
    for _, layer in matrices(model)[::2]:
        if layer.weight.shape[1] % 32 == 0:
            layer.weight.copy_(levels(layer.weight))
    return model


def levels(w: Tensor) -> Tensor:
    """Returns the nearest such matrix."""
    parts = w.unflatten(1, (-1, 32))
    minimum = parts.amin(2, keepdim=True).half().float()
    scale = ((parts.amax(2, keepdim=True) - minimum) / 15).half().float()
    return (((parts - minimum) / scale).round().clamp(0, 15) * scale + minimum).flatten(1)
