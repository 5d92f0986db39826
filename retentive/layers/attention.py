"""Softmax attention for the Transformer twin: rotary positions, grouped heads, a cache of keys and values.

A strong modern baseline: PyTorch's scaled_dot_product_attention does the work. Source: Vaswani et al.,
arXiv 1706.03762; rotation as in Llama (`half`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers.config import AttentionConfig
from retentive.layers.positions import Positions, positions_of
from retentive.ops import rotary
from retentive.ops.rows import rotate


class Phases(NamedTuple):
    """What depends on positions alone, computed once for all layers."""

    cos: Tensor  # [T, K/2] or [B, T, K/2]
    sin: Tensor
    starts: list[int]  # [N], position of each sequence's first token; Python integers, to slice the slots of a cache


class Attention(nn.Module):
    """`(x [B,T,D], cache)` -> `(out [B,T,D], cache)`; a cache is (keys, values), each `[N,S,kv_heads,K]`, S slots.

    The token at position p lies in slot p. A cache that is passed in is written in place and must have enough slots.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        D, heads, kv_heads = config.dim, config.heads, config.kv_heads
        self.H, self.kv_heads, self.K = heads, kv_heads, D // heads
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, self.K * kv_heads, bias=False)
        self.v_proj = nn.Linear(D, self.K * kv_heads, bias=False)
        self.out_proj = nn.Linear(D, D, bias=False)

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases:
        """Phases for these positions, once for all layers."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        starts = [0] * len(positions.end) if positions.start is None else positions.start.tolist()
        return Phases(*rotary.phases(positions.of_token, self.K, "half", dtype=wide), starts)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None, positions: Positions, phases: Phases
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        q_BTHK = self.q_proj(x).unflatten(-1, (self.H, self.K))
        k_BTHK = self.k_proj(x).unflatten(-1, (self.kv_heads, self.K))
        v_BTHK = self.v_proj(x).unflatten(-1, (self.kv_heads, self.K))
        q_BTHK = rotate(q_BTHK, phases.cos, phases.sin, "half")
        k_BTHK = rotate(k_BTHK, phases.cos, phases.sin, "half")
        if cache is not None and cache[0].shape[2:] != k_BTHK.shape[2:]:
            want, got = list(k_BTHK.shape[2:]), list(cache[0].shape[2:])
            raise ValueError(f"the cache must be of kv_heads, K = {want}, got {got}: another model's state?")
        if positions.cu_seqlens is not None:
            o, cache = self._packed(q_BTHK, k_BTHK, v_BTHK, cache, positions.cu_seqlens.tolist(), phases.starts)
        elif cache is None and positions.valid is None:
            o, cache = self._attend(q_BTHK, k_BTHK, v_BTHK, causal=True), (k_BTHK, v_BTHK)
        else:
            o, cache = self._cached(q_BTHK, k_BTHK, v_BTHK, cache, positions, phases.starts)
        return self.out_proj(o.flatten(-2)), cache

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask_BTS: Tensor | None = None
    ) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # SDPA has heads before tokens
        mask = None if mask_BTS is None else mask_BTS[:, None]
        grouped = self.kv_heads != self.H
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return o.transpose(1, 2)

    def _cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        positions: Positions,
        starts: list[int],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Writes k and v to their slots, then attends to all slots up to each token's own."""
        B, T = k.shape[:2]
        if cache is None:
            cache = (torch.zeros_like(k), torch.zeros_like(v))
        keys, values = cache
        S = max(starts) + T
        aligned = min(starts) == max(starts)
        position_BT = positions.of_token.expand(B, T)
        if aligned and positions.valid is None:
            keys[:, starts[0] : S], values[:, starts[0] : S] = k, v
        else:
            # Padding must not be written: its positions may be those of real tokens, whose slots it would overwrite.
            written = torch.ones_like(position_BT, dtype=torch.bool) if positions.valid is None else positions.valid
            rows, columns = written.nonzero(as_tuple=True)
            slots = position_BT[rows, columns]
            keys[rows, slots], values[rows, slots] = k[rows, columns], v[rows, columns]
        mask_BTS = None  # needless where each row has one token, the last of all slots: SDPA's fast path takes no mask
        if not (aligned and T == 1):
            mask_BTS = torch.arange(S, device=k.device) <= position_BT[..., None]
        return self._attend(q, keys[:, :S], values[:, :S], mask_BTS=mask_BTS), cache

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor] | None, cu: list[int], starts: list[int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Sequence after sequence: on CPU, SDPA has no packed form, and one masked call would be quadratic in all of T.

        While training no cache is kept: padded to the longest sequence, it would be larger than the batch.
        """
        spans = list(zip(cu[:-1], cu[1:], starts, strict=True))
        if cache is None and not self.training:
            S = max(b - a + start for a, b, start in spans)
            cache = (k.new_zeros(len(spans), S, *k.shape[2:]), v.new_zeros(len(spans), S, *v.shape[2:]))
        out = []
        for n, (a, b, start) in enumerate(spans):
            if start == 0:  # no past: plain causal attention, SDPA's fast path
                out.append(self._attend(q[:, a:b], k[:, a:b], v[:, a:b], causal=True))
                if cache is not None:
                    cache[0][n, : b - a], cache[1][n, : b - a] = k[0, a:b], v[0, a:b]
                continue
            assert cache is not None  # a sequence that has a past comes with its cache
            here = positions_of(1, b - a, torch.tensor([start], device=k.device), None, None, k.device)
            one = (cache[0][n : n + 1], cache[1][n : n + 1])  # views: what `_cached` writes is in the cache returned
            out.append(self._cached(q[:, a:b], k[:, a:b], v[:, a:b], one, here, [start])[0])
        return torch.cat(out, 1), cache

    def reset_parameters(self) -> None:
        """Xavier with the gains of the retention layer, so that twins start alike."""
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)
