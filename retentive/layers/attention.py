"""Softmax attention: rotary positions, grouped heads, a cache of keys and values.

A strong modern baseline, computed by PyTorch's scaled_dot_product_attention (SDPA), and by `ops.windows` where it can.
Source: Vaswani et al., arXiv 1706.03762; rotation as in Llama (`half`). With a window W, token i attends to tokens
i - W + 1 to i (arXiv 2004.05150), and to the first tokens if there are sinks (StreamingLLM, arXiv 2309.17453). Moving
sinks are seen by token i with a query turned as at position min(i, sinks + W - 1), so that their distance stops
growing. With a forget gate its score of token j is

    q_i k_j / sqrt(K) + log f_{j+1} + … + log f_i        log f_t = log sigmoid(x_t Wf + b) of each head

(the Forgetting Transformer, arXiv 2503.02130). The cache stores each token's own log f instead of their running sum.
Sums are taken backwards from the last token, so near keys have small ones, which is exact at any length.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers.config import AttentionConfig
from retentive.layers.mixer import Mixer
from retentive.layers.norm import RMSNorm
from retentive.layers.past import Layer, Span, cache_after, seen_before, spans_of, tokens_before
from retentive.layers.positions import Positions, positions_of
from retentive.layers.slots import positions_in, slot_of
from retentive.ops import decay as decays
from retentive.ops import rotary, windows
from retentive.ops.rows import gated, rotate

ROWS = 1024
"""Queries that attend in one call where each needs a mask, whose memory is ROWS times the keys."""


class Phases(NamedTuple):
    """Functions of the positions, computed once for all layers."""

    cos: Tensor  # [T, K/2] or [B, T, K/2]
    sin: Tensor
    starts: list[int]  # [N], position of each sequence's first token; Python integers, to slice the cache's slots
    q_scale: Tensor | None  # [T or 1, H] or [B, T, H], before SDPA's own scale; None: 1
    far: tuple[Tensor, Tensor] | None  # cos and sin of queries for moving sinks; None: the same as of all others


class Attention(Mixer):
    """`(x [B,T,D], cache)` -> `(out [B,T,D], cache)`; a cache is a `Layer` of S slots.

    The token at position p is in slot p. With a window the slots after the sinks are a ring (`slot_of`), and S is at
    least the sinks and the window, or the text's length. Without gradients a given cache is written in place and must
    have enough slots; with them another cache comes back (`past.py`).
    """

    kind = AttentionConfig.kind

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = c = config
        self.H, self.kv_heads, self.K = c.heads, c.kv_heads, c.head_dim
        self.window, self.sinks, self.slots = c.window or 0, c.sinks, c.slots
        self.q_proj = nn.Linear(c.dim, self.K * c.heads, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, self.K * c.kv_heads, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, self.K * c.kv_heads, bias=c.qkv_bias)
        self.q_norm = RMSNorm(self.K, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(self.K, eps=c.norm_eps) if c.qk_norm else None
        self.g_proj = nn.Linear(c.dim, self.K * c.heads, bias=False) if c.output_gate else None
        self.forget_proj = nn.Linear(c.dim, c.heads) if c.forget_gate else None
        self.out_proj = nn.Linear(self.K * c.heads, c.dim, bias=False)
        self.context: Any = None  # attends elsewhere: with other ranks' tokens (`train.parallel.context`), or in pages

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases:
        """Computes phases for these positions, once for all layers."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        starts = [0] * len(positions.end) if positions.start is None else positions.start.tolist()
        c = self.config
        cos, sin = rotary.phases(
            positions.of_token, self.K, c.rotary, base=c.rotary_base, scaling=c.rotary_scaling, dtype=wide
        )
        # The gates' sums enter SDPA's products unscaled, so q is scaled here, before it is rounded to its dtype.
        q_scale = cos.new_full((1, self.H), self.K**-0.5) if c.forget_gate else None
        if c.position_scale:
            longer = (positions.of_token.to(wide) + c.position_scale).log() / math.log(c.position_scale)
            q_scale = longer[..., None] * (1.0 if q_scale is None else q_scale)
            q_scale = q_scale.expand(*longer.shape, self.H)
        far = None
        if c.moving_sinks and int(positions.of_token.max()) >= self.slots:
            last = positions.of_token.clamp(max=self.slots - 1)  # its distance to the sinks is the largest
            far = rotary.phases(last, self.K, c.rotary, base=c.rotary_base, scaling=c.rotary_scaling, dtype=wide)
        return Phases(cos, sin, starts, q_scale, far)

    def forward(
        self, x: Tensor, cache: Layer | None, positions: Positions, phases: Phases
    ) -> tuple[Tensor, Layer | None]:
        y = self.q_proj(x)
        q_BTHK = self._feature(y, self.q_norm, phases, phases.q_scale)
        if phases.far is not None:  # a second query beside the first, for the sinks: see `_attend`
            cos, sin = phases.far
            far = self._feature(y, self.q_norm, phases._replace(cos=cos, sin=sin), phases.q_scale)
            q_BTHK = torch.cat((q_BTHK, far), -1)
        k_BTHK = self._feature(self.k_proj(x), self.k_norm, phases)
        v_BTHK = self.v_proj(x).unflatten(-1, (self.kv_heads, self.K))
        new: Layer = (k_BTHK, v_BTHK)
        if self.forget_proj is not None:
            gate_BTH = F.logsigmoid(self.forget_proj(x).to(phases.cos.dtype))
            new += (gate_BTH if positions.valid is None else gate_BTH * positions.valid[..., None],)
        if cache is not None:
            self._check(cache, new)
        if self.context is not None:
            o = self.context.attend(self, q_BTHK, new, spans_of(positions, phases.starts, x.shape[1]))
        elif cache is not None and torch.is_grad_enabled():
            o, cache = self._continued(q_BTHK, new, cache, spans_of(positions, phases.starts, x.shape[1]))
        elif positions.cu_seqlens is not None:
            o, cache = self._packed(q_BTHK, new, cache, positions.cu_seqlens, phases.starts)
        elif cache is None and positions.valid is None:
            o, cache = self._whole(q_BTHK, new), self._last(new)
        else:
            o, cache = self._cached(q_BTHK, new, cache, positions, phases.starts)
        o = o.flatten(-2)
        if self.g_proj is not None:
            o = gated(self.g_proj(x), o, "sigmoid")
        return self.out_proj(o), cache

    def _feature(self, y: Tensor, norm: RMSNorm | None, phases: Phases, scale: Tensor | None = None) -> Tensor:
        """Returns q or k `[B,T,heads,K]` from its projection: normalised if configured, rotated, scaled."""
        y = y.unflatten(-1, (-1, self.K))
        before = None if norm is None else (norm.gain, norm.eps)
        return rotate(y, phases.cos, phases.sin, self.config.rotary, scale, before)

    def _check(self, cache: Layer, new: Layer) -> None:
        want, got = list(new[0].shape[2:]), list(cache[0].shape[2:])
        if want != got:
            raise ValueError(f"the cache must be of kv_heads, K = {want}, got {got}: another model's state?")
        if len(cache) != len(new):
            has = ("no", "a")[self.config.forget_gate]
            raise ValueError(f"this model has {has} forget gate, and the cache is of one that differs in it")

    # attending

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fade_BSH: Tensor | None = None,
        *,
        causal: bool = False,
        mask_BTS: Tensor | None = None,
        sinks: int = 0,
    ) -> Tensor:
        """Calls SDPA for tensors with tokens before heads.

        Args:
            q: `[B,T,H,K]`, or `[B,T,H,2K]` with a second query of each token for the sinks, if they move.
            sinks: number of keys, the first ones, that are sinks.
            fade_BSH: added to all scores of a key: the sum of the log gates after it, up to one token common to all
                queries. Any token will do, since adding a constant to a query's scores does not change its softmax.
        """
        bias, scale = None if mask_BTS is None else mask_BTS[:, None], None
        if q.shape[-1] > self.K:  # each key has zeros where it meets the other query
            is_sink_S11 = (torch.arange(k.shape[1], device=k.device) < sinks)[:, None, None]
            k = torch.cat((k.masked_fill(is_sink_S11, 0), k.masked_fill(~is_sink_S11, 0)), -1)
            v, scale = F.pad(v, (0, self.K)), self.K**-0.5  # SDPA's fast paths need v as wide as k
        if fade_BSH is not None and q.shape[1] > 1:
            q, k, v = _with_columns(q, k, v, fade_BSH)
        elif fade_BSH is not None:  # one query: a bias is one row, while columns would copy all keys
            row_BHTS = fade_BSH.mT[:, :, None].to(q.dtype)
            bias, causal = row_BHTS if bias is None else row_BHTS.masked_fill(~bias, -torch.inf), False
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # SDPA expects heads before tokens
        grouped, scale = self.kv_heads != self.H, scale if fade_BSH is None else 1.0
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)[..., : self.K]

    def _whole(self, q: Tensor, new: Layer) -> Tensor:
        """Attends within a whole text from its first token: causal, limited by the window."""
        if self._compiled(q, new):
            return self._in_c(q, new)
        most, T = self.slots, q.shape[1]
        if not most or most >= T:  # the first so many tokens see all before them
            k, v, *gates = new
            return self._attend(q[..., : self.K], k, v, *map(_after, gates), causal=True)
        first = self._whole(q[:, :most], tuple(x[:, :most] for x in new))
        return torch.cat((first, self._banded(q[:, most:], new)), 1)

    def _compiled(self, q: Tensor, new: Layer) -> bool:
        """True if `_in_c` can attend within whole texts: it knows no sinks."""
        return not self.sinks and windows.compiled(q, *new[:2])

    def _in_c(self, q: Tensor, new: Layer, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attends within whole texts in C."""
        k, v, *gates = new
        gate, scale = (gates[0], 1.0) if gates else (None, self.K**-0.5)  # with a gate q is scaled, see `phases`
        return windows.attend(q, k, v, gate, self.window or q.shape[1], scale, cu_seqlens)

    def _banded(self, q: Tensor, laid: Layer, at_BL: Tensor | None = None) -> Tensor:
        """Attends with queries `[B,T,H,K]` to `laid` `[B,sinks+W+T,…]`: the sinks, the W tokens before the first query,
        the queries' own.

        Computed in blocks of W queries, each over the sinks and the 2 W tokens that they can see: linear in T.

        Args:
            at_BL: positions of `laid`, below 0 where there is none yet; None if the W tokens are there and no sinks.
        """
        W, s, (B, T) = self.window, self.sinks, q.shape[:2]
        N = -(-T // W)

        def blocks(x: Tensor, size: int) -> Tensor:  # [B, L, …] -> [B N, size, …], each W further
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, N * W - T))
            return x.unfold(1, size, W).movedim(-1, 2).flatten(0, 1)

        query, key = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
        mask = ((key > query) & (key <= query + W))[None]
        first = mask.new_ones(1, W, s)
        if at_BL is not None:  # a sink within the window is seen as a sink, once
            mask = mask & (blocks(at_BL[:, s:, None], 2 * W).mT >= s)
            first = torch.arange(s, device=q.device) <= blocks(at_BL[:, s + W :, None].clamp(min=0), W)
            if not s:  # a token always sees itself: padding rows, which see no sink, would be an empty softmax
                mask = mask | (key == query + W)
        k, v, *gates = (blocks(x[:, s:], 2 * W) for x in laid)
        if s:
            k, v = (torch.cat((x[:, :s].repeat_interleave(N, 0), y), 1) for x, y in zip(laid, (k, v), strict=True))
            mask = torch.cat((first, mask), -1)
        o = self._attend(blocks(q, W), k, v, *map(_after, gates), mask_BTS=mask, sinks=s)
        return o.unflatten(0, (B, N)).flatten(1, 2)[:, :T]

    def _cached(
        self, q: Tensor, new: Layer, cache: Layer | None, positions: Positions, starts: list[int]
    ) -> tuple[Tensor, Layer]:
        """Writes the new tokens to their slots, then attends to all slots that a token sees.

        Attends before writing if the new tokens would overwrite what the first of them sees.
        """
        (B, T), W, most = q.shape[:2], self.window, self.slots
        end = max(starts) + T
        if cache is None:
            cache = tuple(x.new_zeros(B, min(T, most or T), *x.shape[2:]) for x in new)
        S = cache[0].shape[1]
        if W and end > S and S - most + 1 < T:
            o = self._banded(q, *self._laid(new, cache, positions))
            self._write(new, cache, positions, starts)
            return o, cache
        self._write(new, cache, positions, starts)
        S = min(end, S)
        slot, mask_BTS = torch.arange(S, device=q.device), None
        at_BS = positions_in(S, self.sinks, positions.end[:, None]) if W else None
        # No mask if each row has one token that sees all slots: SDPA's fast path accepts none.
        if T > 1 or min(starts) != max(starts) or (W and most < S):
            p_BT1 = positions.of_token.expand(B, T)[..., None]
            if at_BS is None:
                mask_BTS = slot <= p_BT1
            else:  # always its own slot, since padding may see nothing else and an empty softmax is NaN
                at_B1S = at_BS[:, None]
                seen_BTS = (at_B1S > p_BT1 - W) | (at_B1S < self.sinks)
                mask_BTS = (at_B1S >= 0) & (at_B1S <= p_BT1) & seen_BTS | (slot == slot_of(p_BT1, S, self.sinks))
        k, v, *gates = (x[:, :S] for x in cache)
        fades = [_after_in_slots(gate_BSH, positions.end[:, None], at_BS) for gate_BSH in gates]
        return self._attend(q, k, v, *fades, mask_BTS=mask_BTS, sinks=self.sinks), cache

    def _continued(self, q: Tensor, new: Layer, cache: Layer, spans: list[Span]) -> tuple[Tensor, Layer]:
        """Attends to the cache and to new tokens, and returns another cache: gradients pass through both."""
        flat = q.flatten(0, 1)[None]
        new = tuple(x.flatten(0, 1)[None] for x in new)
        o = self.within(flat, new, spans, tokens_before(cache, spans, self.window, self.sinks))
        return o.unflatten(1, q.shape[:2])[0], cache_after(cache, new, spans, self.slots, self.sinks)

    def within(self, q: Tensor, new: Layer, spans: list[Span], past: dict[int, Layer]) -> Tensor:
        """Attends within each span `[1,T,…]`, and to the tokens `[1,P,…]` before those that have a past; else 0."""
        fresh = [span for n, span in enumerate(spans) if n not in past and span.end > span.begin]
        out, places = self._together(q, new, fresh)
        for n, tokens in past.items():
            a, b, start = spans[n]
            laid = tuple(torch.cat((x.to(y.dtype), y[:, a:b]), 1) for x, y in zip(tokens, new, strict=True))
            sinks = int((seen_before(start, self.window, self.sinks) < self.sinks).sum())
            sinks += min(max(self.sinks - start, 0), b - a)  # among its own
            out.append(self._masked(q[:, a:b], laid, sinks)[0])
            places.append(torch.arange(a, b, device=q.device))
        found = torch.cat(out)
        return found.new_zeros(q.shape[1], *found.shape[1:]).index_copy(0, torch.cat(places), found)[None]

    def _masked(self, q: Tensor, laid: Layer, sinks: int) -> Tensor:
        """Attends with queries `[B,T,H,K]` to `laid` `[B,P+T,…]`, P tokens before the first and their own.

        Args:
            sinks: how many of `laid`, the first ones, all later tokens see.
        """
        (T, P), W, out = (q.shape[1], laid[0].shape[1] - q.shape[1]), self.window, []
        for i in range(0, T, ROWS):
            j = min(i + ROWS, T)
            first = max(sinks, P + i - W + 1) if W else 0
            query = torch.arange(P + i, P + j, device=q.device)[:, None]
            key = torch.arange(first - sinks, P + j, device=q.device)
            key = torch.where(key < first, key - (first - sinks), key)
            mask_TS = (key <= query) & ((key > query - W) | (key < sinks)) if W else key <= query
            k, v, *gates = (x[:, first : P + j] if not sinks else x.index_select(1, key) for x in laid)
            out.append(self._attend(q[:, i:j], k, v, *map(_after, gates), mask_BTS=mask_TS[None], sinks=sinks))
        return torch.cat(out, 1)

    def _packed(
        self, q: Tensor, new: Layer, cache: Layer | None, cu_seqlens: Tensor, starts: list[int]
    ) -> tuple[Tensor, Layer | None]:
        """Attends sequence by sequence: on CPUs SDPA has no packed form, and one masked call is quadratic in all of T.

        No cache is kept in training unless one is given: padded to the longest sequence, it is larger than the batch.
        """
        if cache is None and self.training and self._compiled(q, new):
            return self._in_c(q, new, cu_seqlens), None
        cu = cu_seqlens.tolist()
        spans = list(zip(cu[:-1], cu[1:], starts, strict=True))
        if cache is None and self.training:
            return self.within(q, new, [Span(*each) for each in spans], {}), None
        if cache is None:
            S = max(b - a + start for a, b, start in spans)
            cache = tuple(x.new_zeros(len(spans), min(S, self.slots or S), *x.shape[2:]) for x in new)
        out = []
        for n, (a, b, start) in enumerate(spans):
            part = tuple(x[:, a:b] for x in new)
            here = positions_of(1, b - a, torch.tensor([start], device=q.device), None, None, q.device)
            # views, so that writes reach the returned cache
            one = None if cache is None else tuple(x[n : n + 1] for x in cache)
            if start == 0:  # no past: plain causal attention
                out.append(self._whole(q[:, a:b], part))
                if one is not None:
                    self._write(part, one, here, [0])
                continue
            assert one is not None  # a sequence with a past comes with its cache
            out.append(self._cached(q[:, a:b], part, one, here, [start])[0])
        return torch.cat(out, 1), cache

    def _together(self, q: Tensor, new: Layer, spans: list[Span]) -> tuple[list[Tensor], list[Tensor]]:
        """Attends within spans that have no past, those of similar length in one call, padded on the right.

        Returns outputs, and the places of their tokens in the row. Padding follows the real tokens and causal attention
        does not look ahead, so no mask is needed. At most half of a call is padding. A call per sequence takes much
        longer for hundreds of short ones.
        """
        alike: dict[int, list[tuple[int, int]]] = {}
        for a, b, _ in spans:
            alike.setdefault((b - a - 1).bit_length(), []).append((a, b - a))
        out, places = [], []
        for group in alike.values():
            begin_N1, count_N1 = torch.tensor(group, device=q.device).mT[..., None]
            column = torch.arange(int(count_N1.max()), device=q.device)
            real_NT = column < count_N1
            at = torch.where(real_NT, begin_N1 + column, begin_N1)
            q_NTHK, *laid = (x[0].index_select(0, at.flatten()).unflatten(0, at.shape) for x in (q, *new))
            out.append(self._whole(q_NTHK, tuple(laid))[real_NT])
            places.append(at[real_NT])
        return out, places

    # the slots of a cache

    def _last(self, new: Layer) -> Layer:
        """Returns the cache after a whole text: all its tokens, or the sinks, and the window's last ones as a ring."""
        W, s, T = self.window, self.sinks, new[0].shape[1]
        if not W or self.slots > T:
            return new
        # copied if just full, too: the next call writes to it, and a backward pass through this one reads these tokens
        return tuple(torch.cat((x[:, :s], x[:, -W:].roll((T - s) % W, 1)), 1) for x in new)

    def _write(self, new: Layer, cache: Layer, positions: Positions, starts: list[int]) -> None:
        """Writes the sinks and the last tokens of each row, as many as there are slots, to their slots."""
        (B, T), S, end = new[0].shape[:2], cache[0].shape[1], max(starts) + new[0].shape[1]
        if min(end, self.slots or end) > S:
            raise ValueError(f"the cache has {S} slots, {min(end, self.slots or end)} are needed: reserve them before")
        s = min(self.sinks, S)
        R = S - s
        if min(starts) == max(starts) and positions.valid is None:
            sinks = min(max(s - starts[0], 0), T)
            count = min(T - sinks, R)
            first = (end - s - count) % max(R, 1)
            straight = min(count, R - first)  # the rest goes to the ring's first slot onwards
            for slots, x in zip(cache, new, strict=True):
                if sinks:
                    slots[:, starts[0] : starts[0] + sinks] = x[:, :sinks]
                slots[:, s + first : s + first + straight] = x[:, T - count : T - count + straight]
                if straight < count:
                    slots[:, s : s + count - straight] = x[:, T - count + straight :]
            return
        position_BT = positions.of_token.expand(B, T)
        # Padding is not written: its positions may belong to real tokens, whose slots it would overwrite.
        written = torch.ones_like(position_BT, dtype=torch.bool) if positions.valid is None else positions.valid
        # Each slot is written once, since of two writes to one place either may win.
        kept = (position_BT >= positions.end[:, None] - R) | (position_BT < s)
        rows, columns = (written & kept).nonzero(as_tuple=True)
        at = slot_of(position_BT[rows, columns], S, s)
        for slots, x in zip(cache, new, strict=True):
            slots[rows, at] = x[rows, columns].to(slots.dtype)

    def _laid(self, new: Layer, cache: Layer, positions: Positions) -> tuple[Layer, Tensor]:
        """Returns (the sinks, the W tokens before each row's first, its own, `[B,sinks+W+T,…]`; their positions).

        Left padding is replaced by the tokens before it, so that position and place advance together along the row.
        """
        W, s, (B, T), S, device = self.window, self.sinks, new[0].shape[:2], cache[0].shape[1], new[0].device
        last_B1 = positions.of_token[..., -1:].expand(B, 1)  # locates the row, whatever its padding
        place = torch.arange(-s, W + T, device=device)
        at_BL = torch.where(place < 0, place + s, last_B1 - (W + T - 1) + place)
        start_B1 = at_BL.new_zeros(B, 1) if positions.start is None else positions.start[:, None]
        index = torch.where(at_BL < start_B1, slot_of(at_BL, S, s), S + at_BL - last_B1 + T - 1).clamp(0, S + T - 1)
        rows = torch.arange(B, device=device)[:, None]
        return tuple(torch.cat(pair, 1)[rows, index] for pair in zip(cache, new, strict=True)), at_BL

    def reset_parameters(self) -> None:
        """Initialises with Xavier and the gains of the retention layer, so that twins start alike.

        For the same reason a new forget gate has the decays of retention's heads, 1 - f from 1/32 to 1/512 (the
        Forgetting Transformer spreads its constant gates over the heads in this way). A bias of 0 would forget half at
        every token.
        """
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.forget_proj):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)
        if self.forget_proj is not None:
            log_kept = decays.log_decay("lm", self.H, dtype=torch.float64)
            with torch.no_grad():
                self.forget_proj.bias.copy_(decays.logit(log_kept))


def _after(gate_BSH: Tensor) -> Tensor:
    """Returns the sum of the log gates after each token, up to the last one."""
    return F.pad(gate_BSH.flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1))


def _after_in_slots(gate_BSH: Tensor, end_B1: Tensor, at_BS: Tensor | None) -> Tensor:
    """Computes `_after` for the slots of a cache whose last token is at position end - 1.

    Args:
        at_BS: position that each slot of a ring holds; None if slot p holds position p.
    """
    S = gate_BSH.shape[1]
    slot = torch.arange(S, device=gate_BSH.device)
    if at_BS is None:  # slots after the last token were rolled back, or belong to others
        return _after(gate_BSH.masked_fill((slot >= end_B1)[..., None], 0))
    # Slots of a ring that are older than its tokens, or empty, come first, so no token's sum includes them.
    oldest_first, back = (slot + end_B1) % S, (slot - end_B1) % S
    return _after(gate_BSH.take_along_dim(oldest_first[..., None], 1)).take_along_dim(back[..., None], 1)


def _with_columns(q: Tensor, k: Tensor, v: Tensor, fade_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Appends features to q, k and v so that q k includes `fade_BSH`: a bias without a T x S mask.

    A number that half precision cannot represent is split into three that it can: 24 bits, the precision of the float32
    in which SDPA sums their products with 1. v is padded to the same width, which SDPA's fast paths need.
    """
    parts = [fade_BSH.to(q.dtype)]
    rest = fade_BSH.detach()  # the gradient goes through the first part: it is the same for all
    for _ in range(0 if q.dtype == fade_BSH.dtype else 2):
        rest = rest - parts[-1].detach()
        parts.append(rest.to(q.dtype))
    columns = torch.stack(parts, -1)
    ones = q.new_ones(*q.shape[:-1], len(parts))
    return torch.cat((q, ones), -1), torch.cat((k.to(q.dtype), columns), -1), F.pad(v, (0, len(parts)))
