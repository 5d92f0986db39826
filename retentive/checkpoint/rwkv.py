"""RetNets in the tensors of RWKV architectures of llama.cpp, which runs them exactly as they are.

    arwkv7        fixed decays with gamma in (0.5452, 1], and decay "sigmoid"
    rwkv6qwen2    fixed decays with gamma up to 0.999, and biases of q and k

Both graphs can more than a RetNet: pre-norm blocks with an outer-product state, a decay for each channel, a gate and
SwiGLU. The rest is switched off by constants: delta rule, bonus, token shift, value residual. A file also holds our
config, so that it is read back to the same model.

Formulas: RWKV-7, arXiv 2503.14456; RWKV-6, arXiv 2404.05892; llama.cpp's src/models/rwkv7-base.cpp and rwkv6-base.cpp.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from retentive.layers import RetentionConfig
from retentive.models import ModelConfig
from retentive.ops import decay as decays

ARCHITECTURES = ("arwkv7", "rwkv6qwen2")
"""Architectures of llama.cpp that are written and read, the first that fits a model."""
CONFIG = "retentive.config"
"""Key of a file's metadata that holds our config as JSON."""
HEAD_DIM = 64
"""Features of a head. Of other numbers 32 gives NaN without an error, and some backends know 64 only."""
OFF = -1e4
"""Number whose sigmoid is 0 in float32."""
SMALL = 2.0**-11
"""Factor before tanh, by which is divided afterwards: tanh(SMALL a) / SMALL is a, but for (SMALL a)^2 / 3 of it."""
RANK = 32
"""Rank of unused low-rank products: the smallest number that kernels for quantised types divide."""
LARGEST = math.log1p(-1e-3)
"""rwkv6qwen2: largest log(gamma), since k is multiplied by 1 - gamma in float32."""
FFN = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


class Item(NamedTuple):
    """A tensor of the file."""

    name: str
    values: Tensor
    kind: Literal["float", "matrix", "output", "identity"]
    """float: float32 in every file. The others are matrices, of the type that the file is written in."""


def unfit(config: ModelConfig, arch: str) -> list[str]:
    """Returns all that keeps a model from an architecture, as fields to set; empty if it fits."""
    if config.library:
        return ["a RetNet of this package"]
    found = [] if config.final_norm else ["final_norm=True"]
    found += ["embed_norm=False"] if config.embed_norm else []
    if config.convolution:
        found, config = [*found, "convolution=0"], config.without_convolutions()
    if len({block.ffn for block in config.blocks}) > 1 or len(set(config.mixers)) > 1:
        return [*found, "blocks that are all alike"]
    c, ffn = config.retention, config.blocks[0].ffn
    if c is None or ffn is None:
        return [*found, "blocks of retention, each with a feed-forward layer"]
    wanted: dict[str, Any] = dict(rotary="none", qk_norm=False, score_norm=False, head_norm=False)
    wanted |= dict(gate=True, gate_activation="sigmoid")
    wanted |= dict(qk_bias=False) if arch == "arwkv7" else {}
    found += [f"{name}={value!r}" for name, value in wanted.items() if getattr(c, name) != value]
    found += [] if ffn.gate else ["ffn_gate=True"]
    found += [] if ffn.activation == "swish" else ["activation='swish'"]
    if not c.key_dim == c.value_dim == c.dim == HEAD_DIM * c.heads:
        found.append(f"key_dim and value_dim {c.dim}, the model width, and a head for each {HEAD_DIM} of it")
    return found + _unfit_decay(c, arch)


def _unfit_decay(c: RetentionConfig, arch: str) -> list[str]:
    if c.per_token:
        if arch != "arwkv7":
            return ["a decay that no token changes"]
        return [
            f"{name}={value!r}"
            for name, value in (("decay", "sigmoid"), ("decay_bias", True))
            if getattr(c, name) != value
        ]
    least, most = min(c.log_decay()), max(c.log_decay())
    if arch == "arwkv7" and least <= -decays.FASTEST:
        return [f"gamma above {math.exp(-decays.FASTEST):.4f} in every head (got {math.exp(least):.4f})"]
    if arch != "arwkv7" and most > LARGEST:
        return [f"gamma at most {math.exp(LARGEST):.3f} in every head (got {math.exp(most):.4f})"]
    return []


def architecture_for(config: ModelConfig) -> str:
    """Returns the first architecture that the model fits.

    Raises:
        ValueError: it fits none; the message names all that the first one needs.
    """
    for arch in ARCHITECTURES:
        if not unfit(config, arch):
            return arch
    raise ValueError(
        f"llama.cpp cannot run this {config.name}; its architecture {ARCHITECTURES[0]} needs "
        f"{'; '.join(unfit(config, ARCHITECTURES[0]))}. A model that fits is trained by `model=retnet-portable`"
    )


def metadata(config: ModelConfig, arch: str) -> dict[str, int | float | str]:
    """Returns the numbers that llama.cpp reads, by key, and our config."""
    block = config.blocks[0]
    c: Any = block.mixer
    ffn = block.ffn
    assert ffn is not None
    numbers: dict[str, int | float] = {
        "context_length": 1 << 20,
        "embedding_length": config.dim,
        "block_count": config.layers,
        "feed_forward_length": ffn.width,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "wkv.head_size": HEAD_DIM,
        "token_shift_count": 1,
        "attention.head_count": 0,
        "vocab_size": config.vocab_size,
    }
    if arch == "arwkv7":
        numbers |= {
            "attention.decay_lora_rank": max(RANK, c.heads),  # a decay per token needs one for each head
            "attention.iclr_lora_rank": RANK,
            "attention.value_residual_mix_lora_rank": RANK,
            "attention.gate_lora_rank": config.dim,
        }
    else:
        numbers |= {"attention.head_count_kv": c.kv_heads, "time_mix_extra_dim": RANK, "time_decay_extra_dim": RANK}
    return {**{f"{arch}.{name}": number for name, number in numbers.items()}, CONFIG: json.dumps(config.written())}


def items(config: ModelConfig, weights: Mapping[str, Tensor], arch: str) -> Iterator[Item]:
    """Yields the tensors of a model one by one, from its own by name; float64 where numbers are computed."""
    embed = weights["embed.weight"]
    yield Item("token_embd.weight", embed * config.dim**0.5 if config.embed_scale else embed, "matrix")
    yield Item("output.weight", weights.get("head.weight", embed), "output")  # never tied there
    yield Item("output_norm.weight", weights["norm.weight"], "float")
    mix = _arwkv7 if arch == "arwkv7" else _rwkv6qwen2
    for i, block in enumerate(config.blocks):
        own = {name.removeprefix(f"blocks.{i}."): x for name, x in weights.items() if name.startswith(f"blocks.{i}.")}
        yield Item(f"blk.{i}.attn_norm.weight", own["retention_norm.weight"], "float")
        yield Item(f"blk.{i}.ffn_norm.weight", own["ffn_norm.weight"], "float")
        for theirs, ours in FFN.items():
            yield Item(f"blk.{i}.{theirs}.weight", own[f"ffn.{ours}.weight"], "matrix")
        for name, values, *kind in mix(block.mixer, own):
            yield Item(f"blk.{i}.time_mix_{name}", values, kind[0] if kind else "float")


def _arwkv7(c: Any, own: Mapping[str, Tensor]) -> Iterator[tuple]:
    """Retention of one block as (name, values, kind if it is no "float")."""
    D, H = c.dim, c.heads
    yield "receptance.weight", own["retention.q_proj.weight"] * HEAD_DIM**-0.5, "matrix"
    yield "key.weight", _for_each_head(own["retention.k_proj.weight"], c), "matrix"
    yield "value.weight", _for_each_head(own["retention.v_proj.weight"], c), "matrix"
    yield "output.weight", own["retention.out_proj.weight"], "matrix"
    yield "g1.weight", own["retention.g_proj.weight"], "matrix"
    yield "g2.weight", torch.eye(D), "identity"  # of the gate g2 sigmoid(g1 x)
    rank = max(RANK, H)
    w1, w2 = torch.zeros(rank, D), torch.zeros(D, rank)
    if c.per_token:
        w0 = own["retention.decay_proj.bias"]
        w1[:H] = own["retention.decay_proj.weight"] * SMALL
        w2[:, :H] = torch.eye(H).repeat_interleave(HEAD_DIM, 0) / SMALL
    else:
        log_decay = torch.tensor(c.log_decay(), dtype=torch.float64)
        w0 = decays.bias_for("sigmoid", log_decay, 1.0).clamp(min=OFF)  # -inf for gamma = 1
    yield "w0.weight", w0.repeat_interleave(HEAD_DIM)
    yield "w1.weight", w1
    yield "w2.weight", w2
    for name in ("a", "v"):  # learning rate in context, and values mixed with those of the first layer: both off
        yield f"{name}0.weight", torch.full((D,), OFF)
        yield f"{name}1.weight", torch.zeros(RANK, D)
        yield f"{name}2.weight", torch.zeros(D, RANK)
    yield "lerp_fused.weight", torch.zeros(6, 1, 1, D)  # tokens mixed with those before: off
    yield "k_k.weight", torch.ones(D)  # not 0: keys times this are divided by their norm
    yield "k_a.weight", torch.zeros(D)
    yield "r_k.weight", torch.zeros(D)


def _rwkv6qwen2(c: Any, own: Mapping[str, Tensor]) -> Iterator[tuple]:
    """The same; k is multiplied by 1 - gamma there, by which q is divided here, since heads may share their keys."""
    D, lift = c.dim, _lift(c)
    yield "receptance.weight", own["retention.q_proj.weight"] * lift[:, None], "matrix"
    yield "key.weight", own["retention.k_proj.weight"], "matrix"
    yield "value.weight", own["retention.v_proj.weight"], "matrix"
    yield "output.weight", own["retention.out_proj.weight"], "matrix"
    yield "gate.weight", own["retention.g_proj.weight"], "matrix"
    if c.qk_bias:
        yield "receptance.bias", own["retention.q_bias"] * lift
        yield "key.bias", own["retention.k_bias"]
        yield "value.bias", torch.zeros(HEAD_DIM * c.kv_heads)
    yield "decay.weight", _rate(c).repeat_interleave(HEAD_DIM)
    yield "decay_w1.weight", torch.zeros(RANK, D)
    yield "decay_w2.weight", torch.zeros(D, RANK)
    yield "w1.weight", torch.zeros(5 * RANK, D)
    yield "w2.weight", torch.zeros(5, D, RANK)
    yield "lerp_x.weight", torch.zeros(1, 1, D)
    yield "lerp_fused.weight", torch.zeros(5, 1, 1, D)


def _for_each_head(weight: Tensor, c: RetentionConfig) -> Tensor:
    """Key or value projection with the rows of each shared head repeated for all that share it."""
    return weight.unflatten(0, (c.kv_heads, HEAD_DIM)).repeat_interleave(c.heads // c.kv_heads, 0).flatten(0, 1)


def _rate(c: RetentionConfig) -> Tensor:
    """log(-log(gamma)) of each head, float64."""
    return torch.tensor(c.log_decay(), dtype=torch.float64).neg().log()


def _lift(c: RetentionConfig) -> Tensor:
    """1 / (1 - gamma) for each feature of q, float64; gamma as float32 arithmetic gives it, as in llama.cpp."""
    gamma = (-_rate(c).float().exp()).exp()
    return (1 / (1 - gamma.double())).repeat_interleave(HEAD_DIM)


def recognises(raw: dict) -> bool:
    """True if a config is that of a GGUF file which holds a RetNet."""
    return raw.get("model_type") in ARCHITECTURES and CONFIG in raw


def read_config(raw: dict) -> ModelConfig:
    """Returns the config in the metadata; raises as `ModelConfig.read`."""
    return ModelConfig.read(json.loads(raw[CONFIG]))


def read_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns our tensors by name from those of a file, the inverse of `items`.

    What was multiplied by a number that is no power of 2 may differ in its last bit: q_proj and q_bias of rwkv6qwen2,
    and scaled embeddings.

    Raises:
        ValueError: a tensor is missing, or has another shape than the config says.
    """

    def read(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing: the file is damaged")
        return tensors[name]

    arch, c = raw["model_type"], config.retention
    if c is None or unfit(config, arch):
        raise ValueError(f"{arch} does not hold a {config.name}: the file is damaged")
    embed = read("token_embd.weight")
    found = {"embed.weight": embed / config.dim**0.5 if config.embed_scale else embed}
    found["norm.weight"] = read("output_norm.weight")
    if not config.tie_embeddings:
        found["head.weight"] = read("output.weight")
    shared = c.heads // c.kv_heads
    for i in range(config.layers):
        blk, own, mix = f"blk.{i}.", f"blocks.{i}.", f"blk.{i}.time_mix_"
        found[f"{own}retention_norm.weight"] = read(f"{blk}attn_norm.weight")
        found[f"{own}ffn_norm.weight"] = read(f"{blk}ffn_norm.weight")
        for theirs, ours in FFN.items():
            found[f"{own}ffn.{ours}.weight"] = read(f"{blk}{theirs}.weight")
        own += "retention."
        q, k, v = (read(f"{mix}{name}.weight") for name in ("receptance", "key", "value"))
        found[f"{own}out_proj.weight"] = read(f"{mix}output.weight")
        if arch == "arwkv7":
            q = q * HEAD_DIM**0.5
            k, v = (x.unflatten(0, (-1, HEAD_DIM))[::shared].flatten(0, 1) for x in (k, v))
            found[f"{own}g_proj.weight"] = read(f"{mix}g1.weight")
            if c.per_token:
                found[f"{own}decay_proj.weight"] = read(f"{mix}w1.weight")[: c.heads] / SMALL
                found[f"{own}decay_proj.bias"] = read(f"{mix}w0.weight")[::HEAD_DIM]
        else:
            lift = _lift(c)
            q = (q / lift[:, None]).to(q.dtype)
            found[f"{own}g_proj.weight"] = read(f"{mix}gate.weight")
            if c.qk_bias:
                bias = read(f"{mix}receptance.bias")
                found |= {f"{own}q_bias": (bias / lift).to(bias.dtype), f"{own}k_bias": read(f"{mix}key.bias")}
        found |= {f"{own}q_proj.weight": q, f"{own}k_proj.weight": k, f"{own}v_proj.weight": v}
    return found
