"""Layouts of hybrids with lightning attention, which is retention with fixed decays: HypeNet and MiniCPM-SALA.

    lightning   QK-norm, rotation, gamma_h = exp(-slope_h), RMSNorm over all heads, sigmoid gate
    attention   grouped heads, no rotation, sigmoid gate; in HypeNet QK-norm, and scores scaled by position

MiniCPM-SALA multiplies embeddings, the output of every layer and the logits by constants (muP). Here these are part of
the weights. Its attention skips blocks of keys in texts of `sparse_config.dense_len` tokens and more, which is not
done here: shorter texts give its own logits.
Sources: arXiv 2601.22156 (HypeNet), arXiv 2602.11761 (MiniCPM-SALA); slopes: ALiBi, arXiv 2108.12409.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retentive.checkpoint.keys import flip, refuse, rename
from retentive.layers.config import AttentionConfig, FeedForwardConfig, RetentionConfig
from retentive.models import BlockConfig, ModelConfig

COMMON = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ("blocks.{i}.ffn.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    ("blocks.{i}.ffn.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    ("blocks.{i}.ffn.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight"),
]
MIXER = [(f"{name}_proj", f"{name}_proj") for name in "qkv"]
MIXER += [("out_proj", "o_proj"), ("q_norm", "q_norm"), ("k_norm", "k_norm")]
"""Weights of both kinds of mixers, ours and theirs."""
OWN = {"retention": [("g_proj", "z_proj"), ("head_norm", "o_norm")], "attention": [("g_proj", "o_gate")]}
"""Weights of one kind alone."""
KINDS = {"lightning": "retention", "lightning_attn": "retention", "lightning-attn": "retention"}
KINDS |= {"attn": "attention", "minicpm4": "attention"}
"""Kinds of mixers by their names in `mixer_types`."""
LOGARITHM = 362.0
"""Default of HypeNet's scores by position: log(p + a) / log(a)."""


def recognises(config: dict) -> bool:
    """True if a config.json is from one of these models."""
    return config.get("model_type") in ("hypenet", "minicpm_sala")


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of theirs.

    Raises:
        ValueError: it needs something that is not supported here; all of it is named.
        KeyError: a field is missing.
    """
    hypenet = config["model_type"] == "hypenet"
    gate, norm, qk = (
        ("lightning_use_output_gate", "lightning_use_output_norm", "lightning_use_qk_norm")
        if hypenet
        else ("use_output_gate", "use_output_norm", "qk_norm")
    )
    refuse(
        config, config["model_type"], hidden_act="silu", attention_bias=False, rope_scaling=None,
        lightning_rope_scaling=None, lightning_use_short_conv=False, lightning_scale="1/sqrt(d)",
        tie_word_embeddings=config.get("tie_word_embeddings", False) if hypenet else False, **{norm: True},
    )  # fmt: skip
    types = config["mixer_types"]
    if unknown := sorted({str(name) for name in types if name not in KINDS}):
        raise ValueError(f"mixers of {', '.join(unknown)} are not supported, those of {', '.join(KINDS)} are")
    eps, dim, heads = config["rms_norm_eps"], config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or dim // heads
    H, K = config.get("lightning_nh") or heads, config.get("lightning_head_dim") or width
    base: dict[str, Any] = {"dim": dim, "norm_eps": eps, "rotary_base": float(config.get("rope_theta", 10000.0))}
    lightning = RetentionConfig(
        **base, heads=H, kv_heads=config.get("lightning_nkv") or config["num_key_value_heads"], key_dim=H * K,
        value_dim=H * K, decay=tuple(-slope for slope in slopes(H)), qk_norm=config.get(qk, False),
        rotary="half" if config.get("lightning_use_rope", True) else "none", head_norm=True, head_norm_affine=True,
        head_norm_joint=True, gate=config.get(gate, False), gate_activation="sigmoid",
    )  # fmt: skip
    attention = AttentionConfig(
        **base, heads=heads, kv_heads=config["num_key_value_heads"], head_dim=width, qk_norm=hypenet,
        rotary="half" if config.get("attn_use_rope", hypenet) else "none",
        output_gate=config.get("attn_use_output_gate", not hypenet), position_scale=_by_position(config),
    )  # fmt: skip
    mixers: dict[str, Any] = {"retention": lightning, "attention": attention}
    ffn = FeedForwardConfig(config["intermediate_size"])
    blocks = tuple(BlockConfig(mixers[KINDS[name]], ffn) for name in types)
    tied = config.get("tie_word_embeddings", False)
    return ModelConfig(config["vocab_size"], dim, blocks, norm_eps=eps, tie_embeddings=tied)


def _by_position(config: dict) -> float:
    """Returns the number in the logarithm of `attn_logits_scaling`, such as "log 362"; 0 without one."""
    said = config.get("attn_logits_scaling")
    if said is None:
        return 0.0
    if not isinstance(said, str):
        raise ValueError(f"hypenet config has attn_logits_scaling={said!r} (supported: a text with a number, or null)")
    return float(said.split()[1]) if len(said.split()) > 1 else LOGARITHM


def slopes(heads: int) -> list[float]:
    """Returns ALiBi's slope of each head: 2^(-8 (h + 1) / H) for powers of 2; others take every second of 2 H too."""
    whole = 2 ** math.floor(math.log2(heads))
    found = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
    return found if whole == heads else found + slopes(2 * whole)[0::2][: heads - whole]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Raises ValueError: these layouts are read only."""
    raise ValueError("models are not written as HypeNet or MiniCPM-SALA: take `to='hf'`, which transformers loads")


def _table(config: ModelConfig) -> list[tuple[str, str]]:
    """Returns (our name, their name) of all weights."""
    table = list(COMMON)
    for i, kind in enumerate(config.kinds):
        names = MIXER + OWN[kind]
        table += [(f"blocks.{i}.{kind}.{a}.weight", f"model.layers.{i}.self_attn.{b}.weight") for a, b in names]
        table.append((f"blocks.{i}.{kind}_norm.weight", f"model.layers.{i}.input_layernorm.weight"))
    return table


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns their tensors by our names, with MiniCPM-SALA's constants in the weights."""
    kept = {name: x for name, x in tensors.items() if not (config.tie_embeddings and name == "lm_head.weight")}
    found = rename(kept, flip(_table(config)))
    if raw["model_type"] == "hypenet":
        return found
    layer = raw.get("scale_depth", 1.4) / math.sqrt(raw.get("mup_denominator") or config.layers)
    factors = {"embed": raw.get("scale_emb", 12.0), "head": raw.get("dim_model_base", 256) / config.dim}
    factors |= {"out_proj": layer, "down_proj": layer}
    # float64: the weights' own dtype rounds only once
    return {name: _times(x, factors.get(name.split(".")[-2], 1.0)) for name, x in found.items()}


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else (x.double() * factor).to(x.dtype)


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Raises ValueError: as `write_config`."""
    raise ValueError("models are not written as HypeNet or MiniCPM-SALA")
