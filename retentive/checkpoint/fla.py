"""Layout of flash-linear-attention's RetNetForCausalLM (fla-hub/retnet-*): config fields, tensor names old and new."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from retentive.checkpoint.keys import flip, refuse, rename, require
from retentive.models import ARCHITECTURES, ModelConfig, retnet
from retentive.models.presets import flat

TABLE = [
    ("embed.weight", "model.embeddings.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{i}.retention_norm.weight", "model.layers.{i}.attn_norm.weight"),
    ("blocks.{i}.ffn_norm.weight", "model.layers.{i}.mlp_norm.weight"),
    ("blocks.{i}.retention.q_proj.weight", "model.layers.{i}.attn.q_proj.weight"),
    ("blocks.{i}.retention.k_proj.weight", "model.layers.{i}.attn.k_proj.weight"),
    ("blocks.{i}.retention.v_proj.weight", "model.layers.{i}.attn.v_proj.weight"),
    ("blocks.{i}.retention.g_proj.weight", "model.layers.{i}.attn.g_proj.weight"),
    ("blocks.{i}.retention.out_proj.weight", "model.layers.{i}.attn.o_proj.weight"),
    ("blocks.{i}.retention.head_norm.weight", "model.layers.{i}.attn.g_norm_swish_gate.weight"),
    ("blocks.{i}.ffn.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    ("blocks.{i}.ffn.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    ("blocks.{i}.ffn.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight"),
]
# name of the head norm if fla does not fuse it with the gate (fuse_norm false, or no gate)
UNFUSED = ("blocks.{i}.retention.head_norm.weight", "model.layers.{i}.attn.g_norm.weight")


def recognises(config: dict) -> bool:
    """True if a config.json is from this project."""
    return config.get("model_type") == "retnet" and "hidden_size" in config


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of its RetNetConfig; missing fields get its defaults.

    Raises:
        ValueError: it needs something that is not supported here.
    """
    # use_short_conv and conv_size are fields that its model never passes to its layers
    refuse(config, "fla", attn=None, feature_map=None, attnres_block_size=None)
    dim = config.get("hidden_size", 2048)
    ffn = config.get("intermediate_size")
    if ffn is None:
        ffn = 256 * -(-int(dim * config.get("hidden_ratio", 2) * 2 / 3) // 256)  # fla's rule: rounded up to 256
    activation = config.get("hidden_act", "swish")
    return retnet(
        vocab_size=config.get("vocab_size", 32000),
        dim=dim,
        layers=config.get("num_hidden_layers", 24),
        heads=config.get("num_heads", 8),
        kv_heads=config.get("num_kv_heads") or 0,
        key_dim=int(dim * config.get("expand_k", 1)),
        value_dim=int(dim * config.get("expand_v", 2)),
        ffn_dim=ffn,
        activation="swish" if activation == "silu" else activation,
        **ARCHITECTURES["fla"] | dict(head_norm_affine=config.get("elementwise_affine", True)),
        gate=config.get("use_output_gate", True),
        norm_eps=config.get("norm_eps", config.get("rms_norm_eps", 1e-6)),  # its name before 2024-04-28
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _ratio(width: int, dim: int) -> float:
    """Returns width / dim, or the next float above: fla's int(dim * ratio) rounds down, and must give width again."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else math.nextafter(ratio, math.inf)


def write_config(config: ModelConfig) -> dict:
    """Returns the fields of its config.json for one of our configs.

    Raises:
        ValueError: its architecture cannot express the config; the message names all fields that differ.
    """
    c = SimpleNamespace(**flat(config, "fla"))
    meant = {name: value for name, value in ARCHITECTURES["fla"].items() if name != "head_norm_affine"}  # a field
    others = dict(
        ffn_gate=True, activation="swish", embed_scale=False, embed_norm=False, final_norm=True, rotary_base=10000.0
    )
    require(c, "fla", **meant, **others)
    return {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_heads": c.heads,
        "num_kv_heads": None if c.kv_heads == c.heads else c.kv_heads,
        "expand_k": _ratio(c.key_dim, c.dim),
        "expand_v": _ratio(c.value_dim, c.dim),
        "intermediate_size": c.ffn_dim,
        "hidden_act": c.activation,
        "elementwise_affine": c.head_norm_affine,
        "use_output_gate": c.gate,
        "norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
    }


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by our names. Files before 2025-02-09 hold gate and up in one matrix [2 F, D], gate first."""
    out, width = {}, config.blocks[0].ffn.width
    for name, x in tensors.items():
        if name.endswith("rotary.inv_freq"):
            continue  # a buffer of angles, computed here
        if name.endswith("mlp.gate_proj.weight") and x.shape[0] == 2 * width:
            out[name], out[name.replace("gate_proj", "up_proj")] = (y.contiguous() for y in x.chunk(2))
        else:
            out[name] = x
    if config.tie_embeddings:
        out.pop("lm_head.weight", None)  # a copy of the embedding, if stored at all
    return rename(out, flip([*TABLE, UNFUSED]))


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors by its names."""
    return rename(tensors, TABLE if config.all_retention("fla").gate else [UNFUSED, *TABLE])
