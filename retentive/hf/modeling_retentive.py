"""RetNets, hybrids and Transformers of the package `retentive`, as models of the transformers library, in one file.

    block    x + mixer(norm(x)), then x + ffn(norm(x)) where there is a feed-forward layer
    mixer    retention: a state S_t = gamma_t S_{t-1} + k_t v_t^T of constant size, read by o_t = q_t S_t
             attention: all keys and values, or the last ones (a window) and the first ones (sinks)
             convolution: each feature mixed with the same feature of the few tokens before

The file needs torch and transformers only. Where `retentive` is installed, its operator computes retention.
Decays and angles are computed in float32 or float64 in each call. They are no buffers, which a cast would round.
Padding is exact: positions count real tokens, and a token of padding neither fades the state nor writes to it.
Sources: Retentive Network (arXiv 2307.08621), YOCO (arXiv 2405.05254) for decays of each token, StreamingLLM (arXiv
2309.17453) for sinks, Forgetting Transformer (arXiv 2503.02130) for forget gates, H3 (arXiv 2212.14052) for
convolutions.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

if [int(part) for part in transformers.__version__.split(".")[:2]] < [5, 16]:
    raise ImportError(f"transformers {transformers.__version__} is too old: pip install 'transformers>=5.16'")

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

try:
    from retentive.ops import retention as operator
except ImportError:
    operator = None

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""Name of the cache among the arguments of `forward`: "cache" since transformers 5.24."""
CHUNK = 64
"""Tokens that are computed in parallel in the chunkwise form."""
ACTIVATIONS = {"swish": F.silu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
PER_TOKEN = ("gated", "sigmoid")  # decays
LAYER_TYPES = {"retention": "linear_attention", "convolution": "conv"}
"""Names of transformers for blocks by their kind; attention has two."""


class RetentiveConfig(PreTrainedConfig):
    """Config of a model: its blocks, as the package `retentive` writes them, and the fields of transformers."""

    model_type = "retentive"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 256,
        blocks: list[dict[str, Any]] | None = None,
        norm_eps: float = 1e-6,
        embed_scale: bool = False,
        embed_norm: bool = False,
        final_norm: bool = True,
        tie_word_embeddings: bool = False,
        dropout: float = 0.0,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        **others: Any,
    ):
        """
        Args:
            hidden_size: model width D.
            blocks: [{"repeat": n, "mixer": {"kind": one of MIXERS, …}, "ffn": {…} or None}].
            embed_scale: multiply embeddings by sqrt(D).
            embed_norm: RMSNorm after the embedding.
            final_norm: RMSNorm before the output matrix.
        """
        self.vocab_size, self.hidden_size, self.blocks = vocab_size, hidden_size, blocks or []
        self.norm_eps, self.embed_scale, self.embed_norm, self.final_norm = (
            norm_eps,
            embed_scale,
            embed_norm,
            final_norm,
        )
        self.dropout, self.use_cache, self.initializer_range = dropout, use_cache, initializer_range
        each = [block["mixer"] for block in self.blocks for _ in range(block.get("repeat", 1))]
        self.num_hidden_layers = len(each)
        self.num_attention_heads = next((m["heads"] for m in each if "heads" in m), 1)
        self.layer_types = [
            LAYER_TYPES.get(m["kind"]) or ("sliding_attention" if m["window"] else "full_attention") for m in each
        ]
        for name in ("num_hidden_layers", "num_attention_heads", "layer_types"):
            others.pop(name, None)  # of a saved config: they follow from the blocks
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    def each_block(self) -> list[dict[str, Any]]:
        """Returns the blocks one by one."""
        return [block for block in self.blocks for _ in range(block.get("repeat", 1))]


# ---- cache ----


class RetentionMemory:
    """State of a block of retention, `[B,H,K,V]` in float32; constant in size but while it records."""

    is_compileable = False
    is_sliding = is_linear = False  # not linear for transformers: it then slices off tokens that were read

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None
        self.record_past = False
        self.before: Tensor | None = None
        self.since: list[tuple[Tensor, Tensor, Tensor]] = []

    def filled(self, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> None:
        """Takes the state after more tokens, with what made it of the state before."""
        if self.record_past:
            self.since.append((k, v, log_decay))
        self.state = state

    def activate_past_recording(self) -> None:
        if not self.record_past:
            self.record_past, self.before = True, self.state

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens, exactly: computes the state before them once more."""
        if count:
            k, v, log_decay = (torch.cat(x, 1)[:, : -count or None] for x in zip(*self.since, strict=True))
            self.state = self.before
            if k.shape[1]:
                self.state = absorb(k, v, log_decay, self.before)
        self.before, self.since = self.state, []

    def change(self, rows: Any) -> None:
        """Applies `rows` to every tensor, whose first axis is the batch."""
        self.state = None if self.state is None else rows(self.state)
        self.before = None if self.before is None else rows(self.before)
        self.since = [tuple(map(rows, each)) for each in self.since]

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


class AttentionMemory:
    """Keys and values `[B,S,heads,K]` with the position of each, below 0 for padding; and gates `[B,S,H]`."""

    is_compileable = False
    is_sliding = is_linear = False

    def __init__(self, window: int | None, sinks: int) -> None:
        self.window, self.sinks = window, sinks
        self.reset()

    def reset(self) -> None:
        self.tensors: list[Tensor] = []
        self.record_past = False

    def added(self, *new: Tensor) -> list[Tensor]:
        """Returns all that is kept with the new tokens after it, (positions, keys, values, perhaps gates)."""
        found = [torch.cat(both, 1) for both in zip(self.tensors, new, strict=True)] if self.tensors else list(new)
        self.tensors = found
        if not self.record_past:
            self.trim()
        return found

    def trim(self) -> None:
        """Forgets what no later token sees, once it is more than half of all."""
        if not self.window or not self.tensors or self.tensors[0].shape[1] <= 2 * (self.window + self.sinks):
            return
        at = self.tensors[0]
        seen = (at > at.amax(1, keepdim=True) - self.window) | ((at >= 0) & (at < self.sinks))
        kept = seen.any(0).nonzero()[:, 0]
        self.tensors = [x[:, kept] for x in self.tensors]

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, count: int) -> None:
        if count:
            self.tensors = [x[:, :-count] for x in self.tensors]
        self.trim()

    def change(self, rows: Any) -> None:
        self.tensors = [rows(x) for x in self.tensors]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)


class ConvolutionMemory:
    """The last tokens that a block of convolution has read, `[B,n-1,D]`; constant in size but while it records."""

    is_compileable = False
    is_sliding = is_linear = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: Tensor | None = None
        self.record_past = False
        self.before: Tensor | None = None
        self.since: list[tuple[Tensor, Tensor]] = []

    def filled(self, x: Tensor, valid: Tensor | None, rows: Tensor) -> None:
        """Takes the last tokens after x `[B,T,D]`, and x itself while it records."""
        if self.record_past:
            self.since.append((x, torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid))
        self.rows = rows

    def activate_past_recording(self) -> None:
        if not self.record_past:
            self.record_past, self.before = True, self.rows

    def crop(self, count: int) -> None:
        """Takes back the last `count` tokens: lays those before them out once more."""
        if count and self.rows is not None:
            x, valid = (torch.cat(each, 1)[:, :-count] for each in zip(*self.since, strict=True))
            before = torch.zeros_like(self.rows) if self.before is None else self.before
            self.rows = after_padding(before, x, valid)[:, -before.shape[1] :].clone()
        self.before, self.since = self.rows, []

    def change(self, rows: Any) -> None:
        self.rows = None if self.rows is None else rows(self.rows)
        self.before = None if self.before is None else rows(self.before)
        self.since = [(rows(x), rows(valid)) for x, valid in self.since]

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes


def memory_of(mixer: dict[str, Any]) -> RetentionMemory | AttentionMemory | ConvolutionMemory:
    """Returns the memory of a block before its first token."""
    if mixer["kind"] == "attention":
        return AttentionMemory(mixer["window"], mixer["sinks"])
    return RetentionMemory() if mixer["kind"] == "retention" else ConvolutionMemory()


class RetentiveCache(Cache):
    """Memories of all blocks, and the number of real tokens of each row. Beams reorder it, and it can be cropped."""

    is_compileable = False

    def __init__(self, config: RetentiveConfig):
        self.blocks = config.each_block()
        super().__init__(layers=[memory_of(block["mixer"]) for block in self.blocks])
        self.columns = 0
        """Tokens of every row so far, padding among them."""
        self.count: Tensor | None = None
        """Real tokens of each row, `[B]`."""
        self.recorded: list[Tensor] = []
        """Which tokens `[B,T]` of each call since `activate_past_recording` are real."""

    def advance(self, valid: Tensor) -> None:
        """Counts more tokens `[B,T]`, once all blocks have read them."""
        self.columns += valid.shape[1]
        self.count = valid.sum(1) if self.count is None else self.count + valid.sum(1)
        if any(layer.record_past for layer in self.layers):
            self.recorded.append(valid)

    def activate_past_recording(self, **kwargs: Any) -> None:
        """Lets `crop` take back every token from here on, however many `recurrent_states_to_keep` asks for."""
        for layer in self.layers:
            layer.activate_past_recording()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        return -1 if self.count is None else len(self.count)

    @property
    def nbytes(self) -> int:
        """Bytes that all blocks remember."""
        return sum(layer.nbytes for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: `-n` removes n, 0 only keeps them for good, n > 0 leaves n.

        Raises:
            RuntimeError: they were read before `activate_past_recording`.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.columns - tokens_to_remove, 0)
        have = sum(x.shape[1] for x in self.recorded)
        if count > have:
            raise RuntimeError(
                f"cannot take back {count} tokens, {have} are recorded: call activate_past_recording first"
            )
        for layer in self.layers:
            layer.crop(count)
        if count:
            self.columns -= count
            self.count = self.count - torch.cat(self.recorded, 1)[:, -count:].sum(1)
        self.recorded = []

    def _change(self, rows: Any) -> None:
        for layer in self.layers:
            layer.change(rows)
        self.count = None if self.count is None else rows(self.count)
        self.recorded = [rows(x) for x in self.recorded]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.columns, self.count, self.recorded = 0, None, []


# ---- layers ----


class Sight(NamedTuple):
    """Position, padding and text of each token: they decide which tokens see which."""

    position: Tensor
    """`[B,T]`, counted in real tokens of their text."""
    valid: Tensor | None
    """`[B,T]`, False for padding; None: there is none."""
    text: Tensor | None
    """`[B,T]`, number of the text of each token in a packed row; None: a row is one text."""


class RetentiveRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y if self.weight is None else y * self.weight.float()).to(x.dtype)


def frequencies(K: int, how: dict[str, Any], device: torch.device) -> Tensor:
    """Returns radians a token of each pair, float64 `[K/2]`."""
    half = K // 2
    if how["rotary"] == "interleaved":
        power = torch.linspace(0, 1, half, dtype=torch.float64, device=device)
    else:
        power = torch.arange(half, dtype=torch.float64, device=device) / half
    frequency, scaling = how["rotary_base"] ** -power, how.get("rotary_scaling")
    if scaling and scaling["original"]:
        turns = frequency * scaling["original"] / (2 * math.pi)
        kept = ((turns - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
        return frequency * (kept + (1 - kept) / scaling["factor"])
    return frequency / scaling["factor"] if scaling else frequency


def rotate(x: Tensor, position: Tensor, how: dict[str, Any], scale: Tensor | float = 1.0) -> Tensor:
    """Returns x `[B,T,heads,K]` turned by its positions and scaled, in the dtype of x."""
    y = x.float()
    if how["rotary"] != "none":
        angle = position.double()[..., None, None] * frequencies(x.shape[-1], how, x.device)
        cos, sin = angle.cos().float(), angle.sin().float()
        interleaved = how["rotary"] == "interleaved"
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else y.chunk(2, -1)
        turned = a * cos - b * sin, b * cos + a * sin
        y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return (y * scale).to(x.dtype)


def absorb(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> Tensor:
    """Returns the state after the tokens k `[B,T,H,K]`, v `[B,T,H,V]`, with their log decays `[B,T,H]`."""
    since = log_decay.cumsum(1)
    added = torch.einsum("bthk,bth,bthv->bhkv", k.float(), (since[:, -1:] - since).exp(), v.float())
    return added if state is None else state * since[:, -1].exp()[..., None, None] + added


def retain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (outputs `[B,T,H,V]`, state after the last token): retention in chunks; texts do not see each other."""
    if operator is not None:
        return with_operator(q, k, v, log_decay, state, text)
    out, of_state = [], None if text is None else text[:, 0]
    for begin in range(0, q.shape[1], CHUNK):
        c = slice(begin, begin + CHUNK)
        qc, kc, vc, since = q[:, c].float(), k[:, c].float(), v[:, c].float(), log_decay[:, c].cumsum(1)
        lag = since[:, :, None] - since[:, None]  # [B,T,S,H]
        hidden = torch.ones(lag.shape[1:3], dtype=torch.bool, device=q.device).triu(1)[None]
        fresh, ending = since.exp(), (since[:, -1:] - since).exp()
        if text is not None and of_state is not None:
            own = text[:, c]
            hidden = hidden | (own[:, :, None] != own[:, None])
            fresh = fresh * (own == of_state[:, None])[..., None]
            ending = ending * (own == own[:, -1:])[..., None]
        # masked before exp: the exponent of a later token is positive, and large
        weight = lag.masked_fill(hidden[..., None], -torch.inf).exp()
        o = torch.einsum("bthk,bshk,btsh,bshv->bthv", qc, kc, weight, vc)
        if state is not None:
            o = o + torch.einsum("bthk,bhkv,bth->bthv", qc, state, fresh)
            state = state * fresh[:, -1][..., None, None]
        added = torch.einsum("bthk,bth,bthv->bhkv", kc, ending, vc)
        state = added if state is None else state + added
        of_state = None if text is None else text[:, c][:, -1]
        out.append(o)
    assert state is not None
    return torch.cat(out, 1).to(v.dtype), state


def with_operator(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes `retain` by the package's operator."""
    if text is None:
        return operator(q, k, v, log_decay, scale=1.0, state=state)
    B, T = text.shape
    starts = torch.ones_like(text, dtype=torch.bool)
    starts[:, 1:] = text[:, 1:] != text[:, :-1]
    begins = starts.flatten().nonzero()[:, 0]
    borders = F.pad(begins, (0, 1), value=B * T)
    flat = (x.flatten(0, 1)[None] for x in (q, k, v, log_decay))
    o, states = operator(*flat, scale=1.0, cu_seqlens=borders)
    last = torch.searchsorted(begins, torch.arange(1, B + 1, device=q.device) * T) - 1
    return o[0].unflatten(0, (B, T)), states[last]


class RetentiveRetention(nn.Module):
    """Gated multi-scale retention."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, self.H, self.kv_heads = c, c["heads"], c["kv_heads"]
        self.K, self.V = c["key_dim"] // self.H, c["value_dim"] // self.H
        dim, eps = c["dim"], c["norm_eps"]
        self.q_proj = nn.Linear(dim, c["key_dim"], bias=False)
        self.k_proj = nn.Linear(dim, self.K * self.kv_heads, bias=False)
        self.v_proj = nn.Linear(dim, self.V * self.kv_heads, bias=False)
        self.g_proj = nn.Linear(dim, c["value_dim"], bias=False) if c["gate"] else None
        self.decay_proj = nn.Linear(dim, self.H, bias=c["decay_bias"]) if c["decay"] in PER_TOKEN else None
        self.q_norm = RetentiveRMSNorm(self.K, eps) if c["qk_norm"] else None
        self.k_norm = RetentiveRMSNorm(self.K, eps) if c["qk_norm"] else None
        self.q_bias = nn.Parameter(torch.ones(c["key_dim"])) if c["qk_bias"] else None
        self.k_bias = nn.Parameter(torch.ones(self.K * self.kv_heads)) if c["qk_bias"] else None
        self.joint = c.get("head_norm_joint", False)
        normed = c["value_dim"] if self.joint else self.V
        self.head_norm = RetentiveRMSNorm(normed, eps, c["head_norm_affine"]) if c["head_norm"] else None
        self.out_proj = nn.Linear(c["value_dim"], dim, bias=False)

    def forward(self, x: Tensor, sight: Sight, memory: RetentionMemory | None) -> Tensor:
        scale: Tensor | float = self.K**-0.5
        log_decay = self.log_decay(x)
        if self.c["score_norm"]:
            scale = scale * row_norm(log_decay, sight.position + 1)[..., None]
        q = rotate(feature(self.q_proj(x), self.K, self.q_norm, self.q_bias), sight.position, self.c, scale)
        k = rotate(feature(self.k_proj(x), self.K, self.k_norm, self.k_bias), sight.position, self.c)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.V))
        log_decay = log_decay.expand(*x.shape[:2], self.H)
        if sight.valid is not None:
            k, log_decay = k * sight.valid[..., None, None], log_decay * sight.valid[..., None]
        if self.kv_heads != self.H:
            k, v = (y.repeat_interleave(self.H // self.kv_heads, 2) for y in (k, v))
        o, state = retain(q, k, v, log_decay, None if memory is None else memory.state, sight.text)
        if memory is not None:
            memory.filled(k, v, log_decay, state)
        o = o.flatten(-2) if self.joint else o
        o = o if self.head_norm is None else self.head_norm(o)
        o = o if self.joint else o.flatten(-2)
        if self.g_proj is not None:
            o = ACTIVATIONS[self.c["gate_activation"]](self.g_proj(x)) * o
        return self.out_proj(o.to(x.dtype))

    def log_decay(self, x: Tensor) -> Tensor:
        """Returns log gamma, float32: `[B,T,H]` from the tokens, or `[H]`."""
        if self.decay_proj is not None:
            z = self.decay_proj(x).float()
            gated = self.c["decay"] == "gated"
            return F.logsigmoid(z) / self.c["decay_scale"] if gated else -math.exp(-0.5) * z.sigmoid()
        decay, H = self.c["decay"], self.H
        if decay == "paper":
            decay = [math.log1p(-(2.0 ** (-5 - h))) for h in range(H)]
        elif decay == "lm":
            first, last = (math.log(y) for y in self.c["decay_range"])
            decay = [math.log1p(-math.exp(first + (last - first) * h / max(H - 1, 1))) for h in range(H)]
        elif decay == "none":
            decay = [0.0] * H
        return torch.tensor(decay, device=x.device)


def feature(y: Tensor, K: int, norm: nn.Module | None, bias: Tensor | None) -> Tensor:
    """Returns queries or keys `[B,T,heads,K]` from their projection."""
    y = y.unflatten(-1, (-1, K))
    y = y if norm is None else norm(y)
    return y if bias is None else y + bias.to(y.dtype).unflatten(-1, (-1, K))


def row_norm(log_decay: Tensor, count: Tensor) -> Tensor:
    """Returns 1 / sqrt(1 + gamma + … + gamma^(n - 1)), `[B,T,H]`, for n = `count` `[B,T]`."""
    n, forgets = count.to(log_decay.dtype).clamp(min=1)[..., None], log_decay < 0
    safe = torch.where(forgets, log_decay, -1.0)
    return torch.where(forgets, torch.expm1(n * safe) / torch.expm1(safe), n).rsqrt()


class RetentiveAttention(nn.Module):
    """Softmax attention to all tokens, or to a window of them and to sinks."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, self.H, self.kv_heads, self.K = c, c["heads"], c["kv_heads"], c["head_dim"]
        self.window, self.sinks, dim, eps = c["window"], c["sinks"], c["dim"], c["norm_eps"]
        biased = c.get("qkv_bias", False)
        self.q_proj = nn.Linear(dim, self.K * self.H, bias=biased)
        self.k_proj = nn.Linear(dim, self.K * self.kv_heads, bias=biased)
        self.v_proj = nn.Linear(dim, self.K * self.kv_heads, bias=biased)
        self.q_norm = RetentiveRMSNorm(self.K, eps) if c["qk_norm"] else None
        self.k_norm = RetentiveRMSNorm(self.K, eps) if c["qk_norm"] else None
        self.g_proj = nn.Linear(dim, self.K * self.H, bias=False) if c.get("output_gate") else None
        self.forget_proj = nn.Linear(dim, self.H) if c["forget_gate"] else None
        self.out_proj = nn.Linear(self.K * self.H, dim, bias=False)

    def forward(self, x: Tensor, sight: Sight, memory: AttentionMemory | None) -> Tensor:
        y, position = feature(self.q_proj(x), self.K, self.q_norm, None), sight.position
        scale: Tensor | float = 1.0
        if a := self.c.get("position_scale", 0.0):
            scale = ((position + a).float().log() / math.log(a))[..., None, None]
        q = rotate(y, position, self.c, scale)
        k = rotate(feature(self.k_proj(x), self.K, self.k_norm, None), position, self.c)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.K))
        new = [position if sight.valid is None else position.masked_fill(~sight.valid, -1), k, v]
        if self.forget_proj is not None:
            gate = F.logsigmoid(self.forget_proj(x).float())
            new.append(gate if sight.valid is None else gate * sight.valid[..., None])
        plain = self.forget_proj is None and not self.window and sight.valid is None and sight.text is None
        if memory is None or not memory.tensors:
            at, k, v, *gates = new if memory is None else memory.added(*new)
            if plain:
                return self.out(x, attend(q, k, v, causal=True))
        else:
            at, k, v, *gates = memory.added(*new)
            if plain and x.shape[1] == 1 and (at >= 0).all():
                return self.out(x, attend(q, k, v))
        if self.c.get("moving_sinks"):  # their distance grows no further than in a text of as many tokens as are kept
            far = rotate(y, position.clamp(max=self.window + self.sinks - 1), self.c, scale)
            sink = ((at >= 0) & (at < self.sinks))[..., None, None]
            q, k = torch.cat((q, far), -1), torch.cat((k.masked_fill(sink, 0), k.masked_fill(~sink, 0)), -1)
        seen = self.seen(at, sight, x.shape[1])
        if gates:  # log gates after each key, up to the last: a query's own constant changes no softmax
            fade = F.pad(gates[0].flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1)).mT[:, :, None]
            mask, (q, k, v) = fade.masked_fill(~seen, -torch.inf), (z.float() for z in (q, k, v))
        else:
            mask = seen
        return self.out(x, attend(q, k, v, mask, scale=self.K**-0.5).to(x.dtype))

    def seen(self, at: Tensor, sight: Sight, T: int) -> Tensor:
        """Returns `[B,1,T,S]`: whether a token sees a key, by their positions."""
        key, query = at[:, None], sight.position[..., None]
        seen = (key >= 0) & (key <= query)
        if self.window:
            seen &= (key > query - self.window) | (key < self.sinks)
        if sight.text is not None:
            seen &= sight.text[:, None] == sight.text[..., None]
        own = torch.arange(at.shape[1], device=at.device) - (at.shape[1] - T)
        return (seen | (own == torch.arange(T, device=at.device)[:, None]))[:, None]  # padding sees itself: no NaN

    def out(self, x: Tensor, o: Tensor) -> Tensor:
        o = o.flatten(-2)
        return self.out_proj(o if self.g_proj is None else torch.sigmoid(self.g_proj(x)) * o)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Calls scaled_dot_product_attention for tensors with tokens before heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return o.transpose(1, 2)


class RetentiveConvolution(nn.Module):
    """out_t = sum_i weight[n - 1 - i] x_{t-i}, i = 0 … n - 1: each feature, over the last n tokens of its text."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.before = c["taps"] - 1
        self.weight = nn.Parameter(torch.zeros(c["taps"], c["dim"]))  # last: of the token itself

    def forward(self, x: Tensor, sight: Sight, memory: ConvolutionMemory | None) -> Tensor:
        (B, T, D), n, valid, text = x.shape, self.before, sight.valid, sight.text
        rows = None if memory is None else memory.rows
        laid = after_padding(x.new_zeros(B, n, D) if rows is None else rows.to(x.dtype), x, valid)
        own = None  # text of each token
        if text is not None:
            own = after_padding(text.new_full((B, n, 1), -1), text[..., None], valid)
        weight = self.weight.to(x.dtype)
        out = laid[:, n:] * weight[-1]
        for i in range(n):
            other = laid[:, i : i + T]
            other = other if own is None else other * (own[:, i : i + T] == own[:, n:])
            out = torch.addcmul(out, other, weight[i])
        if memory is not None:
            last = laid[:, -n:].clone()  # a view would keep all tokens
            memory.filled(x, valid, last if own is None else last * (own[:, -n:] == own[:, -1:]))
        if valid is None:
            return out
        place = (T - valid.sum(1, keepdim=True) + valid.cumsum(1) - 1).clamp(min=0)  # that of padding is any
        return out.gather(1, place[..., None].expand_as(out))


def after_padding(rows: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
    """Returns `[B,S+T,D]`: S rows and the real tokens of x one after the other; padding, if any, is before all."""
    laid = torch.cat((rows, x), 1)
    if valid is None:
        return laid
    order = F.pad(valid.long(), (rows.shape[1], 0), value=1).argsort(dim=1, stable=True)
    return laid.gather(1, order[..., None].expand_as(laid))


class RetentiveFeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(gate(x)))."""

    def __init__(self, dim: int, c: dict[str, Any]):
        super().__init__()
        self.activation = ACTIVATIONS[c["activation"]]
        self.gate_proj = nn.Linear(dim, c["width"], bias=False)
        self.up_proj = nn.Linear(dim, c["width"], bias=False) if c["gate"] else None
        self.down_proj = nn.Linear(c["width"], dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.gate_proj(x))
        return self.down_proj(y if self.up_proj is None else y * self.up_proj(x))


MIXERS = {"retention": RetentiveRetention, "attention": RetentiveAttention, "convolution": RetentiveConvolution}


class RetentiveBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + ffn(norm(x)). The mixer's kind is its name, so that names of weights show it."""

    def __init__(self, config: RetentiveConfig, block: dict[str, Any]):
        super().__init__()
        self.kind, self.dropout, dim = block["mixer"]["kind"], config.dropout, config.hidden_size
        self.add_module(f"{self.kind}_norm", RetentiveRMSNorm(dim, config.norm_eps))
        self.add_module(self.kind, MIXERS[self.kind](block["mixer"]))
        self.ffn_norm = RetentiveRMSNorm(dim, config.norm_eps) if block["ffn"] else None
        self.ffn = RetentiveFeedForward(dim, block["ffn"]) if block["ffn"] else None

    def forward(self, x: Tensor, sight: Sight, memory: Any = None) -> Tensor:
        norm, mixer = self.get_submodule(f"{self.kind}_norm"), self.get_submodule(self.kind)
        x = x + F.dropout(mixer(norm(x), sight, memory), self.dropout, self.training)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x


# ---- models ----


class RetentivePreTrainedModel(PreTrainedModel):
    config_class = RetentiveConfig
    config: RetentiveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetentiveBlock"]
    _skip_keys_device_placement = ["memory"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises a module that the checkpoint does not hold; only by `transformers.initialization`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RetentiveRMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, RetentiveConvolution):
            init.zeros_(module.weight)  # with the residual, a new block changes nothing
        elif isinstance(module, RetentiveRetention):
            for bias in (module.q_bias, module.k_bias):
                if bias is not None:
                    init.ones_(bias)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class RetentiveModel(RetentivePreTrainedModel):
    """The model without its output matrix."""

    def __init__(self, config: RetentiveConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = RetentiveRMSNorm(config.hidden_size, config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(RetentiveBlock(config, block) for block in config.each_block())
        self.norm = RetentiveRMSNorm(config.hidden_size, config.norm_eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.embed = value

    def check_cache(self, cache: Any) -> None:
        """Raises TypeError for a cache of another class, ValueError for one of another model."""
        if not isinstance(cache, RetentiveCache):
            raise TypeError(f"the cache must be a RetentiveCache, got a {type(cache).__name__}")
        if cache.blocks != (own := self.config.each_block()):
            raise ValueError(
                f"the cache is of another model, with {len(cache.blocks)} blocks, expected the {len(own)} blocks of "
                "this one: make a RetentiveCache of its config"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RetentiveCache | None = None,
        past_key_values: RetentiveCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            attention_mask: `[B, past + T]`, 0 for padding on either side.
            position_ids: without a mask, positions that begin anew within a row say where packed texts begin. Nothing
                else is read of them: positions follow from the mask.
            cache: memories of the tokens before; `past_key_values` is its name before transformers 5.24.
        """
        cache = cache if cache is not None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = RetentiveCache(self.config)
        if cache is not None:
            self.check_cache(cache)
        sight = sight_of(x, attention_mask, position_ids, cache, kwargs)
        if self.config.embed_scale:
            x = x * self.config.hidden_size**0.5
        x = F.dropout(self.embed_norm(x), self.config.dropout, self.training)
        every = [x] if kwargs.get("output_hidden_states") else None
        for i, block in enumerate(self.blocks):
            x = block(x, sight, None if cache is None else cache.layers[i])
            if every is not None:
                every.append(x)
        x = self.norm(x)
        if cache is not None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if sight.valid is None else sight.valid
            cache.advance(valid)
        hidden = None if every is None else (*every[:-1], x)
        kept = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **kept)


def sight_of(
    x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: RetentiveCache | None, kwargs: dict[str, Any]
) -> Sight:
    """Returns the positions, the padding and the packed texts of x `[B,T,D]`.

    Raises:
        ValueError: a mask of another shape, or packed texts beside a cache that has read something.
    """
    B, T = x.shape[:2]
    past = 0 if cache is None else cache.columns
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T):
        raise ValueError(f"the attention mask must be [{B}, {past + T}], 0 for padding, got {list(mask.shape)}")
    valid = None if mask is None else mask[:, -T:].bool()
    text = texts_of(position_ids if mask is None else None, kwargs, B, T)
    if text is not None:
        if past:
            raise ValueError("packed texts cannot go on from a cache: give each text its own row")
        first = F.pad(text[:, 1:] != text[:, :-1], (1, 0), value=True)
        index = torch.arange(T, device=x.device).expand(B, T)
        return Sight(index - torch.where(first, index, 0).cummax(1).values, valid, text)
    before = 0 if cache is None or cache.count is None else cache.count[:, None]
    if valid is None:
        return Sight((torch.arange(T, device=x.device).expand(B, T) + before), None, None)
    return Sight((valid.long().cumsum(1) - 1 + before).clamp(min=0), valid, None)


def texts_of(position_ids: Tensor | None, kwargs: dict[str, Any], B: int, T: int) -> Tensor | None:
    """Returns the number of each token's text `[B,T]` in packed rows; None if rows are not packed."""
    if (text := kwargs.get("seq_idx")) is not None:
        return text
    if (borders := kwargs.get("cu_seq_lens_q")) is not None and B == 1:
        at = torch.arange(T, device=borders.device)
        return (torch.searchsorted(borders.contiguous(), at, right=True) - 1)[None]
    if position_ids is None or position_ids.shape != (B, T) or T == 1:
        return None
    begins = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return begins.cumsum(1) if begins.any() else None


class RetentiveForCausalLM(RetentivePreTrainedModel, GenerationMixin):
    """The model with its output matrix: `generate`, `Trainer`, TRL and PEFT take it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: RetentiveConfig):
        super().__init__(config)
        self.model = RetentiveModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **more: Any
    ) -> None:
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = RetentiveCache(self.config)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RetentiveCache | None = None,
        past_key_values: RetentiveCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits, the loss if there are labels, and the cache; arguments as for `RetentiveModel`."""
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache if cache is not None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: getattr(found, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states, **kept)


class RetentiveForSequenceClassification(GenericForSequenceClassification, RetentivePreTrainedModel):
    """The model with a score for each label, read at the last token that is no padding."""
