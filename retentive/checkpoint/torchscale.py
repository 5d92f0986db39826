"""Layout of torchscale's RetNetDecoder (microsoft/torchscale, architecture/retnet.py): config fields, tensor names.

Our models compute what its recurrent mode does. Its parallel mode also divides the scores by max(1, sum of magnitudes),
which has no recurrent form. Where that is active, its own two modes differ (by 2e-3 in the logits we have seen).
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from retentive.checkpoint.keys import flip, refuse, rename, require
from retentive.models import ARCHITECTURES, ModelConfig, retnet
from retentive.models.presets import flat
from retentive.ops import decay

TABLE = [
    ("embed.weight", "embed_tokens.weight"),
    ("embed_norm.weight", "layernorm_embedding.weight"),
    ("norm.weight", "layer_norm.weight"),
    ("head.weight", "output_projection.weight"),
    ("blocks.{i}.retention_norm.weight", "layers.{i}.retention_layer_norm.weight"),
    ("blocks.{i}.ffn_norm.weight", "layers.{i}.final_layer_norm.weight"),
    ("blocks.{i}.retention.q_proj.weight", "layers.{i}.retention.q_proj.weight"),
    ("blocks.{i}.retention.k_proj.weight", "layers.{i}.retention.k_proj.weight"),
    ("blocks.{i}.retention.v_proj.weight", "layers.{i}.retention.v_proj.weight"),
    ("blocks.{i}.retention.g_proj.weight", "layers.{i}.retention.g_proj.weight"),
    ("blocks.{i}.retention.out_proj.weight", "layers.{i}.retention.out_proj.weight"),
    # torchscale's "gate" is the multiplied matrix; fc1 goes through the activation
    ("blocks.{i}.ffn.gate_proj.weight", "layers.{i}.ffn.fc1.weight"),
    ("blocks.{i}.ffn.up_proj.weight", "layers.{i}.ffn.gate.weight"),
    ("blocks.{i}.ffn.down_proj.weight", "layers.{i}.ffn.fc2.weight"),
]
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")
"""Buffers stored beside its parameters, computed from the config."""


def recognises(config: dict) -> bool:
    """True if a config.json is from this project."""
    return "decoder_retention_heads" in config


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of its RetNetConfig; missing fields get its defaults.

    Raises:
        ValueError: it needs something that is not supported here.
    """
    refuse(config, "torchscale", moe_freq=0, deepnorm=False, multiway=False, no_output_layer=False, xpos_rel_pos=False)
    return retnet(
        vocab_size=config["vocab_size"],
        dim=config.get("decoder_embed_dim", 768),
        layers=config.get("decoder_layers", 12),
        heads=config["decoder_retention_heads"],
        value_dim=config.get("decoder_value_embed_dim", 1280),
        ffn_dim=config.get("decoder_ffn_embed_dim", 1280),
        activation=config.get("activation_fn", "gelu"),
        **ARCHITECTURES["torchscale"] | dict(embed_scale=not config.get("no_scale_embedding", True)),
        norm_eps=config.get("layernorm_eps", 1e-6),
        embed_norm=config.get("layernorm_embedding", False),
        final_norm=config.get("decoder_normalize_before", True),
        tie_embeddings=config.get("share_decoder_input_output_embed", False),
        dropout=config.get("dropout", 0.0),
    )


def write_config(config: ModelConfig) -> dict:
    """Returns the fields of its config.json for one of our configs.

    Raises:
        ValueError: its architecture cannot express the config; the message names all fields that differ.
    """
    c = SimpleNamespace(**flat(config, "torchscale"))
    meant = {name: value for name, value in ARCHITECTURES["torchscale"].items() if name != "embed_scale"}  # a field
    widths = dict(kv_heads=c.heads, key_dim=c.dim)
    require(c, "torchscale", **meant, head_norm_affine=False, gate=True, ffn_gate=True, rotary_base=10000.0, **widths)
    return {
        "vocab_size": c.vocab_size,
        "decoder_embed_dim": c.dim,
        "decoder_layers": c.layers,
        "decoder_retention_heads": c.heads,
        "decoder_value_embed_dim": c.value_dim,
        "decoder_ffn_embed_dim": c.ffn_dim,
        "activation_fn": c.activation,
        "layernorm_eps": c.norm_eps,
        "no_scale_embedding": not c.embed_scale,
        "layernorm_embedding": c.embed_norm,
        "decoder_normalize_before": c.final_norm,
        "share_decoder_input_output_embed": c.tie_embeddings,
        "dropout": c.dropout,
    }


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by our names, without its buffers of angles and decays: ours are computed in float64."""
    tensors = {name: x for name, x in tensors.items() if name not in BUFFERS}
    if config.tie_embeddings:
        tensors.pop("output_projection.weight", None)
    return rename(tensors, flip(TABLE))


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors by its names, with the buffers that its strict loading expects."""
    out = rename(tensors, TABLE)
    if config.tie_embeddings:  # its state_dict has both names; safetensors cannot store two names of one memory
        out["output_projection.weight"] = out["embed_tokens.weight"].clone()
    # One angle per pair of neighbouring features, as in `ops.rotary`; computed in float64, stored in float32.
    mixer = config.all_retention("torchscale")
    half = mixer.key_dim // mixer.heads // 2
    angle = 10000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    out["retnet_rel_pos.angle"] = angle.repeat_interleave(2).float()
    out["retnet_rel_pos.decay"] = decay.log_decay("paper", mixer.heads)
    return out
