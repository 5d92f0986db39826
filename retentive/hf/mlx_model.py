"""A model of the package `retentive` for mlx-lm, in one file that needs mlx and mlx-lm only.

    model, tokenizer = mlx_lm.load("folder", trust_remote_code=True)         a folder of `retentive export --to mlx`

Blocks of retention (all variants), of attention (whole, or a window; perhaps with forget gates) and of short
convolutions. The state of retention, its decays and the forget gates are float32, whatever the weights are: in bfloat16
a decay above 0.998 would be 1. A prompt is read in chunks by matrix products, not token by token. Padding on either
side, as mlx-lm puts it into batches, changes nothing.

Formulas: arXiv 2307.08621; forget gates: arXiv 2503.02130. Names of weights are those of transformers' classes in the
same folder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

CHUNK = 64
"""Tokens of a chunk."""
ACTIVATIONS = {"swish": nn.silu, "gelu": nn.gelu, "sigmoid": mx.sigmoid}
FAR = 1024
"""Positions are split into multiples of this and the rest, so that float32 angles stay exact."""


@dataclass
class ModelArgs(BaseModelArgs):
    """Fields of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    blocks: list
    norm_eps: float = 1e-6
    embed_scale: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    tie_word_embeddings: bool = False


def frequencies(K: int, how: Mapping[str, Any]) -> list[float]:
    """Returns radians a token of each pair, for positions that are turned as `how` says."""
    half, scaling = K // 2, how.get("rotary_scaling")
    steps = max(half - 1, 1) if how["rotary"] == "interleaved" else half
    found = [how["rotary_base"] ** -(i / steps) for i in range(half)]
    if not scaling:
        return found
    if not scaling["original"]:
        return [x / scaling["factor"] for x in found]
    slower = []
    for x in found:
        turns = x * scaling["original"] / (2 * math.pi)
        kept = min(max((turns - scaling["low"]) / (scaling["high"] - scaling["low"]), 0.0), 1.0)
        slower.append(x * (kept + (1 - kept) / scaling["factor"]))
    return slower


def turns_of(position: mx.array, K: int, how: Mapping[str, Any]) -> tuple[mx.array, mx.array]:
    """Returns cos and sin `[B,1,T,K/2]` of the angles at positions `[B,T]`, float32."""
    each = frequencies(K, how)
    near, far = mx.array(each), mx.array([x * FAR % (2 * math.pi) for x in each])
    times, rest = position // FAR, position % FAR
    angle = times[..., None] * far + rest[..., None] * near
    return mx.cos(angle)[:, None], mx.sin(angle)[:, None]


def rotate(x: mx.array, cos: mx.array, sin: mx.array, how: Mapping[str, Any]) -> mx.array:
    """Returns x `[B,heads,T,K]` with each pair of features turned, float32."""
    x = x.astype(mx.float32)
    if how["rotary"] == "interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return mx.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = mx.split(x, 2, -1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def retain(q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Returns (outputs `[B,H,T,V]`, state after the last token): retention chunk by chunk, float32.

    Args:
        q, k: `[B,H,T,K]`.
        log_decay: `[B,H,T]`, at most 0.
        state: `[B,H,K,V]`.
    """
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        q_c, k_c, v_c, since = q[:, :, part], k[:, :, part], v[:, :, part], mx.cumsum(log_decay[:, :, part], -1)
        T = since.shape[-1]
        seen = mx.tri(T, dtype=mx.bool_)
        fade = mx.exp(mx.where(seen, since[..., :, None] - since[..., None, :], -mx.inf))
        inside = (q_c @ k_c.swapaxes(-1, -2) * fade) @ v_c
        outputs.append(inside + mx.exp(since)[..., None] * (q_c @ state))
        left = mx.exp(since[..., -1:] - since)[..., None]
        state = mx.exp(since[..., -1])[..., None, None] * state + (k_c * left).swapaxes(-1, -2) @ v_c
    return (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, 2)), state


def heads_of(x: mx.array, width: int) -> mx.array:
    """Returns `[B,heads,T,width]` of `[B,T,heads * width]`."""
    return x.reshape(*x.shape[:2], -1, width).swapaxes(1, 2)


class Norm(nn.Module):
    """RMSNorm in float32, perhaps without a gain."""

    def __init__(self, width: int, eps: float, affine: bool = True):
        super().__init__()
        self.eps = eps
        if affine:
            self.weight = mx.ones((width,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)


class Retention(nn.Module):
    """Gated multi-scale retention."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, self.H, self.kv = MappingProxyType(c), c["heads"], c["kv_heads"]  # a dict would count as weights
        self.K, self.V, eps = c["key_dim"] // self.H, c["value_dim"] // self.H, c["norm_eps"]
        self.q_proj = nn.Linear(c["dim"], c["key_dim"], bias=False)
        self.k_proj = nn.Linear(c["dim"], self.K * self.kv, bias=False)
        self.v_proj = nn.Linear(c["dim"], self.V * self.kv, bias=False)
        self.out_proj = nn.Linear(c["value_dim"], c["dim"], bias=False)
        if c["gate"]:
            self.g_proj = nn.Linear(c["dim"], c["value_dim"], bias=False)
        if c["decay"] in ("gated", "sigmoid"):
            self.decay_proj = nn.Linear(c["dim"], self.H, bias=c["decay_bias"])
        if c["qk_norm"]:
            self.q_norm, self.k_norm = Norm(self.K, eps), Norm(self.K, eps)
        if c["qk_bias"]:
            self.q_bias, self.k_bias = mx.ones((c["key_dim"],)), mx.ones((self.K * self.kv,))
        self.joint = c.get("head_norm_joint", False)
        if c["head_norm"]:
            self.head_norm = Norm(c["value_dim"] if self.joint else self.V, eps, c["head_norm_affine"])

    def log_decay(self, x: mx.array) -> mx.array:
        """Returns log gamma, float32: `[B,H,T]` of the tokens, or `[1,H,1]`."""
        c, H = self.c, self.H
        if "decay_proj" in self:
            z = self.decay_proj(x).astype(mx.float32).swapaxes(1, 2)
            gated = c["decay"] == "gated"
            return -mx.logaddexp(0.0, -z) / c["decay_scale"] if gated else -math.exp(-0.5) * mx.sigmoid(z)
        fixed = c["decay"]
        if fixed == "paper":
            fixed = [math.log1p(-(2.0 ** (-5 - h))) for h in range(H)]
        elif fixed == "lm":
            first, last = (math.log(y) for y in c["decay_range"])
            fixed = [math.log1p(-math.exp(first + (last - first) * h / max(H - 1, 1))) for h in range(H)]
        elif fixed == "none":
            fixed = [0.0] * H
        return mx.array(fixed)[None, :, None]

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        (B, T), c = x.shape[:2], self.c
        valid = None if cache is None else cache.make_mask(T)
        state = None if cache is None else cache[0]
        first = mx.zeros((B,), mx.int32) if state is None else cache[1]
        if state is None:
            state = mx.zeros((B, self.H, self.K, self.V))
        real = mx.ones((B, T), mx.int32) if valid is None else mx.broadcast_to(valid, (B, T)).astype(mx.int32)
        position = first[:, None] + mx.cumsum(real, 1) - real
        q, k, v = (heads_of(p(x), width) for p, width in self.projections())
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        if "q_bias" in self:
            q, k = (y + b.reshape(-1, 1, self.K) for y, b in ((q, self.q_bias), (k, self.k_bias)))
        if c["rotary"] != "none":
            cos, sin = turns_of(position, self.K, c)
            q, k = rotate(q, cos, sin, c), rotate(k, cos, sin, c)
        q, k, v = q.astype(mx.float32) * self.K**-0.5, k.astype(mx.float32), v.astype(mx.float32)
        log_decay = self.log_decay(x)
        if c["score_norm"]:
            q = q * row_norm(log_decay, position[:, None] + 1)[..., None]
        log_decay = mx.broadcast_to(log_decay, (B, self.H, T))
        if valid is not None:
            k, log_decay = k * real[:, None, :, None], log_decay * real[:, None]
        if self.kv != self.H:
            k, v = (mx.repeat(y, self.H // self.kv, 1) for y in (k, v))
        o, state = retain(q, k, v, log_decay, state)
        if cache is not None:
            cache[0], cache[1] = state, first + real.sum(1)
            cache.advance(T)
        return self.out_proj(self.normed(o.swapaxes(1, 2), x).astype(x.dtype))

    def projections(self) -> list[tuple[Any, int]]:
        """Projections of q, k and v, each with the width of its heads."""
        return [(self.q_proj, self.K), (self.k_proj, self.K), (self.v_proj, self.V)]

    def normed(self, o: mx.array, x: mx.array) -> mx.array:
        """Returns `[B,T,H V]` from the heads' outputs `[B,T,H,V]`: normalised and gated."""
        o = o if self.joint or "head_norm" not in self else self.head_norm(o)
        o = o.flatten(-2)
        o = self.head_norm(o) if self.joint else o
        return ACTIVATIONS[self.c["gate_activation"]](self.g_proj(x)) * o if "g_proj" in self else o


def row_norm(log_decay: mx.array, count: mx.array) -> mx.array:
    """Returns 1 / sqrt(1 + gamma + … + gamma^(n - 1)) for n = `count`."""
    n, forgets = mx.maximum(count, 1).astype(mx.float32), log_decay < 0
    safe = mx.where(forgets, log_decay, -1.0)
    return mx.rsqrt(mx.where(forgets, mx.expm1(n * safe) / mx.expm1(safe), n))


class Attention(nn.Module):
    """Softmax attention to all tokens, or to a window of them.

    With a forget gate the score of token j falls by its log f of all tokens after j, up to the query's. The cache is
    then a list of two: keys and values, and the log f of each token, in the same slots.
    """

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, self.K, bias = MappingProxyType(c), c["head_dim"], c.get("qkv_bias", False)
        width, shared = self.K * c["heads"], self.K * c["kv_heads"]
        self.q_proj = nn.Linear(c["dim"], width, bias=bias)
        self.k_proj = nn.Linear(c["dim"], shared, bias=bias)
        self.v_proj = nn.Linear(c["dim"], shared, bias=bias)
        self.out_proj = nn.Linear(width, c["dim"], bias=False)
        if c["qk_norm"]:
            self.q_norm, self.k_norm = Norm(self.K, c["norm_eps"]), Norm(self.K, c["norm_eps"])
        if c.get("output_gate"):
            self.g_proj = nn.Linear(c["dim"], width, bias=False)
        if c["forget_gate"]:
            self.forget_proj = nn.Linear(c["dim"], c["heads"])

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        T, c, gates, forgets = x.shape[1], self.c, None, "forget_proj" in self
        if forgets and cache is not None:
            cache, gates = cache[0], cache[1]
        q, k, v = (heads_of(p(x), self.K) for p in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        first = mx.array(0 if cache is None else cache.offset).reshape(-1, 1)
        position = mx.maximum(first + mx.arange(T), 0)  # below 0: padding
        if c["rotary"] != "none":
            cos, sin = turns_of(position, self.K, c)
            q, k = rotate(q, cos, sin, c).astype(x.dtype), rotate(k, cos, sin, c).astype(x.dtype)
        if a := c.get("position_scale", 0.0):
            q = (q * (mx.log(position + a) / math.log(a))[:, None, :, None]).astype(x.dtype)
        mask = create_attention_mask(x, cache, window_size=c["window"], return_array=forgets)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if forgets:
            o = self.fading(q, k, v, mask, *self.log_gates(x, gates))
        else:
            o = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.K**-0.5, mask=mask)
        o = o.swapaxes(1, 2).flatten(-2)
        return self.out_proj(mx.sigmoid(self.g_proj(x)) * o if "g_proj" in self else o)

    def log_gates(self, x: mx.array, cache: Any) -> tuple[mx.array, int]:
        """Returns log f of all keys, float32 `[B,H,S]`, and the number of the first slots that hold the newest tokens.

        0: the slots are in the order of the tokens. A full window is a ring: only the last slots are older.
        """
        log = -mx.logaddexp(0.0, -self.forget_proj(x).astype(mx.float32)).swapaxes(1, 2)[..., None]
        if cache is None:
            return log[..., 0], 0
        log, _ = cache.update_and_fetch(log, log)  # twice: mlx-lm's caches are pairs
        return log[..., 0], cache._idx if x.shape[1] == 1 and self.c["window"] else 0

    def fading(
        self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, log_gates: mx.array, newest: int
    ) -> mx.array:
        """Attends in chunks of queries, each with sums of the gates from its own last token backwards.

        Near keys then have small sums, which are exact however long the text is, in half precision too.
        """
        outputs, T, S, window = [], q.shape[2], k.shape[2], self.c["window"]
        for begin in range(0, T, CHUNK):
            end = min(begin + CHUNK, T)
            last = S - T + end
            keys = slice(
                max(last - (end - begin) - window + 1, 0) if window else 0, last
            )  # those that any of them sees
            log = mx.roll(log_gates[..., keys], -newest, -1)
            since = mx.cumsum(log, -1, reverse=True, inclusive=False)
            # above 0 for later keys, which the mask hides
            bias = mx.roll(since[..., None, :] - since[..., begin - end :, None], newest, -1)
            if mask is not None:  # a finite number, or a row of padding, which sees nothing, would be NaN
                bias = mx.where(mask[..., begin:end, keys], bias, mx.finfo(q.dtype).min / 2)
            part = (q[:, :, begin:end], k[:, :, keys], v[:, :, keys])
            outputs.append(mx.fast.scaled_dot_product_attention(*part, scale=self.K**-0.5, mask=bias.astype(q.dtype)))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, 2)


class Convolution(nn.Module):
    """out_t = sum_i weight[n - 1 - i] x_{t-i}, i = 0 … n - 1: each feature, over the last n tokens of a text."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = MappingProxyType(c)
        self.weight = mx.zeros((c["taps"], c["dim"]))  # last: of the token itself

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        (B, T), n = x.shape[:2], self.c["taps"] - 1
        valid = None if cache is None else cache.make_mask(T)
        rows = None if cache is None else cache[0]
        laid = mx.concatenate([mx.zeros((B, n, x.shape[2]), x.dtype) if rows is None else rows.astype(x.dtype), x], 1)
        end = mx.full((B, 1), T)
        if valid is not None:  # the rows move to the first token, over the padding on its left
            real, place = mx.broadcast_to(valid, (B, T)).astype(mx.int32), mx.arange(n + T)
            first = mx.argmax(real, 1, keepdims=True)
            end = first + real.sum(1, keepdims=True)
            source = mx.where(place >= n + first, place, mx.maximum(place - first, 0))
            laid = mx.take_along_axis(laid, source[..., None], 1)
        if cache is not None:
            cache[0] = mx.take_along_axis(laid, (end + mx.arange(n))[..., None], 1)
            cache.advance(T)
        out = laid[:, n:] * self.weight[n]
        for i in range(n):
            out = out + laid[:, i : i + T] * self.weight[i]
        return out


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(gate(x)))."""

    def __init__(self, dim: int, c: dict[str, Any]):
        super().__init__()
        self.activation = ACTIVATIONS[c["activation"]]
        self.gate_proj = nn.Linear(dim, c["width"], bias=False)
        self.down_proj = nn.Linear(c["width"], dim, bias=False)
        if c["gate"]:
            self.up_proj = nn.Linear(dim, c["width"], bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.activation(self.gate_proj(x))
        return self.down_proj(y * self.up_proj(x) if "up_proj" in self else y)


MIXERS = {"retention": Retention, "attention": Attention, "convolution": Convolution}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, args: ModelArgs, block: dict[str, Any]):
        super().__init__()
        self.kind, dim = block["mixer"]["kind"], args.hidden_size
        self[f"{self.kind}_norm"] = Norm(dim, args.norm_eps)
        self[self.kind] = MIXERS[self.kind](block["mixer"])
        if block["ffn"]:
            self.ffn_norm, self.ffn = Norm(dim, args.norm_eps), FeedForward(dim, block["ffn"])

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        x = x + self[self.kind](self[f"{self.kind}_norm"](x), cache)
        return x + self.ffn(self.ffn_norm(x)) if "ffn" in self else x


class Body(nn.Module):
    """The model without its output matrix."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed = nn.Embedding(args.vocab_size, args.hidden_size)
        self.scale = args.hidden_size**0.5 if args.embed_scale else 1.0
        if args.embed_norm:
            self.embed_norm = Norm(args.hidden_size, args.norm_eps)
        self.blocks = [Block(args, block) for block in args.blocks for _ in range(block.get("repeat", 1))]
        if args.final_norm:
            self.norm = Norm(args.hidden_size, args.norm_eps)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        x = self.embed(ids) * self.scale
        x = self.embed_norm(x) if "embed_norm" in self else x
        for block, own in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, own)
        return self.norm(x) if "norm" in self else x


class Model(nn.Module):
    """The language model, as mlx-lm loads it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Body(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        return self.model.embed.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def layers(self) -> list[Block]:
        """Blocks, first to last."""
        return self.model.blocks

    def make_cache(self) -> list[Any]:
        """Returns an empty memory for each block.

        (state, position) of retention, keys and values of attention, perhaps beside its gates, the last rows of a
        convolution.
        """
        return [memory_of(block[block.kind].c) for block in self.layers]

    @property
    def quant_predicate(self) -> Any:
        """Returns True for layers that may be quantised: all but decays and gates, a thousandth of the weights."""
        return lambda path, module: not path.endswith(("decay_proj", "forget_proj"))


def memory_of(c: Mapping[str, Any]) -> Any:
    """Returns the empty memory of a block with this mixer."""
    if c["kind"] != "attention":
        return ArraysCache(size=2 if c["kind"] == "retention" else 1)
    slots = [RotatingKVCache(c["window"]) if c["window"] else KVCache() for _ in range(1 + c["forget_gate"])]
    return CacheList(*slots) if c["forget_gate"] else slots[0]
