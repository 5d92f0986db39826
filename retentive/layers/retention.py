"""Gated multi-scale retention: the layer in place of attention.

    q, k = rotate(x Wq), rotate(x Wk)      v, g = x Wv, x Wg
    y = head_norm(retention(q / sqrt(K) * row_norm, k, v))
    out = (swish(g) * y) Wo

Source: arXiv 2307.08621 equation 8; torchscale's multiscale_retention.py for details that the paper leaves open. With
decay "gated", log(gamma) of each token is log sigmoid(x Wd) / 16 (ops/decay.py has others).
"""

import math
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retentive.layers.config import RetentionConfig
from retentive.layers.mixer import Mixer
from retentive.layers.norm import RMSNorm
from retentive.layers.positions import Positions, positions_of
from retentive.ops import Ring, retention, rotary
from retentive.ops import decay as decays
from retentive.ops.rows import gated, rotate
from retentive.options import check_names


class Phases(NamedTuple):
    """Functions of the positions, computed once for all layers; float32, or float64 in a float64 model."""

    cos: Tensor  # [T, K/2] or [B, T, K/2]
    sin: Tensor
    q_scale: Tensor  # [T or 1, H] or [B, T, H]: K^-1/2, times the row norm
    log_decay: Tensor  # [H]; empty if each layer computes its own from x


@dataclass
class LayerState:
    """State of a layer that is called by itself. A call may write later tokens into it: `clone` it to branch."""

    memory: Tensor | Ring
    """State `[B,H,K,V]`, or with its newest tokens."""
    position: int
    """Number of tokens that it has read."""
    used: bool = False
    """True after a call that wrote into it."""

    def clone(self) -> "LayerState":
        """Returns a copy that later calls leave alone."""
        copied = self.memory.clone() if isinstance(self.memory, Tensor) else self.memory.map(torch.clone)
        return LayerState(copied, self.position, self.used)


class MultiScaleRetention(Mixer):
    """`(x [B,T,D], state)` -> `(out [B,T,D], state)`, with one decay per head.

        layer = MultiScaleRetention(256, 4)             dim and heads; any field of RetentionConfig follows by name
        out, state = layer(x)                           all tokens at once
        out, state = layer(more, state)                 tokens after those, also one by one

    Models call it with `positions` and `phases`, computed once for all layers, and with a state `[N,H,K,V]` or Ring.
    A call with one token and without gradients is a decode step: the state becomes a Ring, which later tokens update in
    place. Decays and phases are computed in each call instead of stored as buffers, so `.half()` cannot round them.
    """

    kind = RetentionConfig.kind

    def __init__(self, config: RetentionConfig | int, heads: int | None = None, **fields: Any):
        """
        Args:
            config: the whole config; or the model width, with other fields of RetentionConfig by name.

        Raises:
            TypeError: a field beside a whole config, or one that does not exist.
            ValueError: an invalid value.
        """
        super().__init__()
        if alone := not isinstance(config, RetentionConfig):
            check_names("MultiScaleRetention", fields, {field.name for field in fields_of(RetentionConfig)})
            config = RetentionConfig(config, **(fields if heads is None else fields | {"heads": heads}))
        elif heads is not None or fields:
            raise TypeError("a config has all fields: give either a config, or dim, heads and other fields")
        self.config = c = config
        self.H, self.kv_heads, self.K, self.V = c.heads, c.kv_heads, c.key_dim // c.heads, c.value_dim // c.heads
        self.q_proj = nn.Linear(c.dim, c.key_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, self.K * c.kv_heads, bias=False)
        self.v_proj = nn.Linear(c.dim, self.V * c.kv_heads, bias=False)
        self.g_proj = nn.Linear(c.dim, c.value_dim, bias=False) if c.gate else None
        self.decay_proj = nn.Linear(c.dim, c.heads, bias=c.decay_bias) if c.per_token else None
        self.q_norm = RMSNorm(self.K, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(self.K, eps=c.norm_eps) if c.qk_norm else None
        # ones, so that a new head also reads what its decay alone weighs, independent of the tokens
        self.q_bias = nn.Parameter(torch.ones(c.key_dim)) if c.qk_bias else None
        self.k_bias = nn.Parameter(torch.ones(self.K * c.kv_heads)) if c.qk_bias else None
        normed = c.value_dim if c.head_norm_joint else self.V
        self.head_norm = RMSNorm(normed, eps=c.norm_eps, affine=c.head_norm_affine) if c.head_norm else None
        self.out_proj = nn.Linear(c.value_dim, c.dim, bias=False)
        if alone:
            self.reset_parameters()
        self.context: Any = None  # has another operator: over several ranks (`train.parallel.context`), or in pages

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases:
        """Computes phases, scales and decays for these positions, once for all layers."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        device = positions.of_token.device
        cos, sin = rotary.phases(
            positions.of_token, self.K, self.config.rotary, base=self.config.rotary_base, dtype=wide
        )
        q_scale = torch.full((1, self.H), self.K**-0.5, dtype=wide, device=device)
        if self.decay_proj is not None:
            return Phases(cos, sin, q_scale, q_scale.new_empty(0))
        log_decay = torch.tensor(self.config.log_decay(), dtype=wide, device=device)
        if self.config.score_norm:
            q_scale = q_scale * decays.row_norm(log_decay, positions.of_token + 1)
        return Phases(cos, sin, q_scale, log_decay)

    def forward(
        self, x: Tensor, state: Any = None, positions: Positions | None = None, phases: Phases | None = None
    ) -> tuple[Tensor, Any]:
        """Returns (out `[B,T,D]`, state after x).

        Args:
            state: that of the last call; None for the beginning.
            positions: positions of the tokens, with padding or borders of packed sequences; by default those after the
                state.
            phases: `phases` of these positions, if several layers share them.

        Raises:
            ValueError: without `positions`: x is not `[B,T,D]`, or the state is of another layer or batch.
        """
        if positions is None:
            return self._alone(x, state)
        phases = self.phases(positions, x.dtype) if phases is None else phases
        q_BTHK = self._rotated(x, self.q_proj, self.q_norm, self.q_bias, phases, phases.q_scale)
        k_BTHK = self._rotated(x, self.k_proj, self.k_norm, self.k_bias, phases)
        v_BTHV = self.v_proj(x).unflatten(-1, (self.kv_heads, self.V))
        log_decay = phases.log_decay
        if self.decay_proj is not None:
            log_decay = self.decay_of(x, phases.cos.dtype)
        if positions.valid is not None:  # k = 0 and no decay: padding does not change the state
            k_BTHK = k_BTHK * positions.valid[..., None, None]
            log_decay = log_decay * positions.valid[..., None]
        if self.kv_heads != self.H:  # kv head j serves query heads j * groups … (j + 1) * groups - 1
            k_BTHK, v_BTHV = (y.repeat_interleave(self.H // self.kv_heads, 2) for y in (k_BTHK, v_BTHV))

        if x.shape[1] == 1 and positions.cu_seqlens is None and not torch.is_grad_enabled():
            state = Ring.over(state, k_BTHK, v_BTHV)
        # scale 1: q_scale includes 1/sqrt(K), and the row norm, which depends on the position
        operator = retention if self.context is None else self.context.retention(positions)
        o, state = operator(q_BTHK, k_BTHK, v_BTHV, log_decay, scale=1.0, state=state, cu_seqlens=positions.cu_seqlens)
        return self.out(x, o), state

    def _alone(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Calls the layer with the positions after those of the state."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor [B, T, {self.config.dim}], got {type(x).__name__}")
        if x.ndim != 3 or x.shape[-1] != self.config.dim or not x.numel():
            raise ValueError(f"x must be [B, T, {self.config.dim}] with tokens, got {list(x.shape)}")
        dtype = self.q_proj.weight.dtype
        if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x is {x.dtype}, the layer {dtype}: convert either".replace("torch.", ""))
        B, T = x.shape[:2]
        if state is not None:
            if not isinstance(state, LayerState):
                raise ValueError(f"the state must be one that the layer returned, got {type(state).__name__}")
            if state.used:
                raise ValueError("the state was used: pass the one that came back, or clone() it before you pass it")
            memory = state.memory.state if isinstance(state.memory, Ring) else state.memory
            got, want = list(memory.shape), [B, *self.config.head_shape]
            if got != want:
                raise ValueError(f"the state must be of [B, H, K, V] = {want}, got {got}: of another layer or batch?")
        before = 0 if state is None else state.position
        positions = positions_of(B, T, torch.full((B,), before, device=x.device), None, None, x.device)
        out, after = self(x, None if state is None else state.memory, positions)
        if state is not None:
            state.used = isinstance(after, Ring)
        return out, LayerState(after, before + T)

    def query(self, x: Tensor) -> Tensor:
        """Returns the queries `[…,H,K]` before rotation: projected, normalised and shifted as configured."""
        return self._feature(x, self.q_proj, self.q_norm, self.q_bias)

    def key(self, x: Tensor) -> Tensor:
        """Returns the keys `[…,kv_heads,K]`, computed like the queries."""
        return self._feature(x, self.k_proj, self.k_norm, self.k_bias)

    def decay_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the tokens' log decays `[…,H]`, if each token has its own."""
        assert self.decay_proj is not None and isinstance(self.config.decay, str)
        return decays.of_tokens(self.config.decay, self.decay_proj(x).to(dtype), self.config.decay_scale)

    def out(self, x: Tensor, o: Tensor) -> Tensor:
        """Returns `[…,D]` from the heads' outputs `[…,H,V]`: normalised, gated by x, and projected."""
        if self.head_norm is not None and not self.config.head_norm_joint:
            o = self.head_norm(o)
        o = o.flatten(-2)
        if self.head_norm is not None and self.config.head_norm_joint:
            o = self.head_norm(o)
        if self.g_proj is not None:
            o = gated(self.g_proj(x), o, self.config.gate_activation)
        return self.out_proj(o)

    def _feature(self, x: Tensor, proj: nn.Linear, norm: RMSNorm | None, bias: Tensor | None) -> Tensor:
        y = proj(x).unflatten(-1, (-1, self.K))
        if norm is not None:
            y = norm(y)
        if bias is not None:
            y = y + bias.to(y.dtype).unflatten(-1, (-1, self.K))
        return y

    def _rotated(
        self,
        x: Tensor,
        proj: nn.Linear,
        norm: RMSNorm | None,
        bias: Tensor | None,
        phases: Phases,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Returns q or k `[B,T,heads,K]`, rotated and scaled. A norm that no bias follows takes its pass with it."""
        before = None
        if norm is not None and bias is None:
            before, norm = (norm.gain, norm.eps), None
        y = self._feature(x, proj, norm, bias)
        return rotate(y, phases.cos, phases.sin, self.config.rotary, scale, before)

    def reset_parameters(self) -> None:
        """Initialises as torchscale since 2023-11-24: Xavier, gain 2^-2.5 for input and 2^-1 for output projections.

        A decay bias is set such that a new model, whose projections are near 0, has the decays of decay_range.
        """
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.decay_proj):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight, gain=math.pow(2, -2.5))
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)
        if self.decay_proj is not None and self.decay_proj.bias is not None:
            c, first = (
                self.config,
                decays.log_decay("lm", self.H, dtype=torch.float64, lm_range=self.config.decay_range),
            )
            with torch.no_grad():
                self.decay_proj.bias.copy_(decays.bias_for(str(c.decay), first, c.decay_scale))
        for vector in (self.q_bias, self.k_bias):
            if vector is not None:
                nn.init.ones_(vector)
