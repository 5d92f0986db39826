"""Layout of Transformers like Llama: Llama, SmolLM, Mistral, Qwen2, Qwen3, as the transformers library saves them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retentive.checkpoint.keys import flip, refuse, rename, require
from retentive.layers.config import AttentionConfig, FeedForwardConfig
from retentive.models import BlockConfig, ModelConfig
from retentive.ops.rotary import Scaling

TABLE = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    ("blocks.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ("blocks.{i}.attention.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    ("blocks.{i}.attention.k_proj.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    ("blocks.{i}.attention.v_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    ("blocks.{i}.attention.q_proj.bias", "model.layers.{i}.self_attn.q_proj.bias"),
    ("blocks.{i}.attention.k_proj.bias", "model.layers.{i}.self_attn.k_proj.bias"),
    ("blocks.{i}.attention.v_proj.bias", "model.layers.{i}.self_attn.v_proj.bias"),
    ("blocks.{i}.attention.out_proj.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    ("blocks.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    ("blocks.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    ("blocks.{i}.ffn.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    ("blocks.{i}.ffn.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    ("blocks.{i}.ffn.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight"),
]
TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Values of model_type, with their classes in transformers."""
KV_HEADS = {"llama": 0, "mistral": 8, "qwen2": 32, "qwen3": 32}
"""Key and value heads of a config that does not name them; 0: as many as query heads."""
BIASED = ("llama", "qwen3")
"""Models whose config may ask for biases of q, k, v and the output projection, `attention_bias`."""
QWEN = ("qwen2", "qwen3")
"""Models whose config has a window for the last layers, and says whether to use it."""
OUT_BIAS = ".self_attn.o_proj.bias"
"""End of the name of the one bias that is not supported, unless it is zero."""
ACTIVATIONS = {"silu": "swish", "swish": "swish", "gelu": "gelu"}


def recognises(config: dict) -> bool:
    """True if a config.json is from one of these models."""
    return config.get("model_type") in TYPES and "hidden_size" in config


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of theirs; missing fields get transformers' defaults.

    Raises:
        ValueError: it needs something that is not supported here.
    """
    kind = config["model_type"]
    refuse(config, kind, **{"attention_bias": False} if kind == "mistral" else {}, mlp_bias=False, pretraining_tp=1)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{kind} config has hidden_act={activation!r} (supported: {', '.join(ACTIVATIONS)})")
    dim, eps = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
    mixer = AttentionConfig(
        dim=dim,
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", KV_HEADS[kind]) or 0,
        head_dim=config.get("head_dim", 128 if kind == "qwen3" else 0) or 0,
        rotary="half",
        rotary_base=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rotary_scaling=_scaling(config, rope),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or (kind in BIASED and bool(config.get("attention_bias"))),
        window=_window(config),
        norm_eps=eps,
    )
    ffn = FeedForwardConfig(width=config["intermediate_size"], activation=ACTIVATIONS[activation], gate=True)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        dim=dim,
        blocks=(BlockConfig(mixer, ffn),) * config["num_hidden_layers"],
        norm_eps=eps,
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _scaling(config: dict, rope: dict) -> Scaling | None:
    """Returns the rope scaling, of the fields `rope`; raises ValueError if it is not supported."""
    kind, found = config["model_type"], rope.get("rope_type", rope.get("type", "default"))
    if found not in ("default", "linear", "llama3"):
        raise ValueError(f"{kind} config has rope scaling {found!r} (supported: default, linear, llama3)")
    for fields in (config, rope):
        refuse(fields, kind, partial_rotary_factor=1.0)
    if found == "default":
        return None
    factor = float(rope["factor"])
    if found == "linear":
        return Scaling(factor)
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048)
    return Scaling(factor, float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original)


def _written_scaling(scaling: Scaling | None) -> dict[str, Any]:
    """Returns the fields of their config.json for a rope scaling."""
    if scaling is None:
        return {}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if not scaling.original:
        return {"rope_scaling": rope}
    rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    rope |= {"original_max_position_embeddings": scaling.original}
    return {"rope_scaling": rope, "max_position_embeddings": int(scaling.original * scaling.factor)}


def _window(config: dict) -> int | None:
    """Returns the window of all layers; raises ValueError if only some of them have one."""
    kind = config["model_type"]
    if kind == "llama" or (kind in QWEN and not config.get("use_sliding_window", False)):
        return None
    first = config.get("max_window_layers", 28) if kind in QWEN else 0
    named = ("full_attention" if i < first else "sliding_attention" for i in range(config["num_hidden_layers"]))
    kinds = set(config.get("layer_types") or named)
    if len(kinds) > 1:
        raise ValueError(f"{kind} config has layer_types {', '.join(sorted(kinds))} (supported: one)")
    return None if kinds == {"full_attention"} else config.get("sliding_window", 4096)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of their config.json for one of our Transformers.

    Raises:
        ValueError: their architecture cannot express the config; the message names all fields that differ.
    """
    c: Any = config.all_alike("llama").mixer
    if c.kind != AttentionConfig.kind:
        raise ValueError("llama has attention only, this model has retention: take torchscale or fla")
    require(c, "llama", rotary="half", forget_gate=False, sinks=0, norm_eps=config.norm_eps)
    require(config, "llama", embed_scale=False, embed_norm=False, final_norm=True)
    require(config.blocks[0].ffn, "llama", gate=True)
    if c.qk_norm:
        require(c, "llama (here: qwen3)", qkv_bias=False)
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "mistral" if c.window else "llama"
    windowed = {"use_sliding_window": c.window is not None, "max_window_layers": 0} if kind in QWEN else {}
    return {
        "architectures": [TYPES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": config.blocks[0].ffn.width,
        "hidden_act": "silu" if config.blocks[0].ffn.activation == "swish" else "gelu",
        "rope_theta": c.rotary_base,
        **_written_scaling(c.rotary_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **({} if kind == "llama" else {"sliding_window": c.window, **windowed}),
    }


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by our names; raises ValueError for a bias of an output projection that is not zero."""
    skipped = {"lm_head.weight"} if config.tie_embeddings else set()  # a copy of the embedding, if stored at all
    for name in [name for name in tensors if name.endswith(OUT_BIAS)]:
        if bool(tensors[name].any()):
            raise ValueError(f"{name} is not zero: of the biases of attention only those of q, k and v are supported")
        skipped.add(name)
    kept = {n: x for n, x in tensors.items() if n not in skipped and not n.endswith("rotary_emb.inv_freq")}
    return rename(kept, flip(TABLE))


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors by their names."""
    return rename(tensors, TABLE)
