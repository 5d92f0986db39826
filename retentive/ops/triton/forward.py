"""Kernels of chunkwise retention (equation 7): `scan` and `read`, for both directions of time, and the decays.

With G_i the log decay from a chunk's start to its token i, G_C that of the whole chunk, and D_ij = exp(G_i - G_j):

    scan      before = S       S <- exp(G_C) S + sum_j w_j x_j y_j^T
    read      out_i = w_i x_i S + scale * sum_j D_ij (x_i . y_j) z_j

    forward in time       scan(k, v)      w_j = exp(G_C - G_j)     read: j <= i, w_i = scale * exp(G_i)
    backward in time      scan(q, do)     w_j = scale * exp(G_j)   read: j >= i, w_i = exp(G_C - G_i), D_ji for D_ij

    o = read(q, k, v | S)    dq = read(do, v, k | S^T)    dk = backward read(v, do, q | dS^T)    dv = (k, q, do | dS)

The backward pass is the forward pass with other arguments: S are the states before the chunks, dS the gradients of the
states after them. Two consequences matter on a GPU. No product of two products is transposed, which Triton has
miscompiled for Hopper. A program holds two accumulators only, so K = 256 and V = 512 fit in registers.

Rows are laid end to end: a token is its index in B * T, a chunk its slot. Sequence n of length L has the slots first_n
to first_n + ceil(L / C) - 1, where first_n = n * ceil(T / C) for rows and start_n // C + n for packed sequences. These
slots do not overlap, some stay empty, and the host never has to ask the device for the sequences' lengths.

Letters: C tokens of a chunk, H heads, K and V the sides of a state, I the summed side, O the output side. A name ends
in the sides of its tile (x_CI). A program's offsets are int64, since tokens times heads times K soon pass 2^31. Offsets
inside its tiles are int32, which saves registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.ops import blocked
from retentive.ops.triton.tiles import Tiles, precision, tiles_for

FORGOTTEN = tl.constexpr(blocked.FORGOTTEN)


@triton.jit
def sequence_of(n, cu, T, C: tl.constexpr):
    """Returns first token, length and first slot of sequence n: row n, or a part of one row cut by cu [N+1]."""
    if cu is None:
        start = n.to(tl.int64) * T
        length = T
        first = n.to(tl.int64) * tl.cdiv(T, C)
    else:
        start = tl.load(cu + n)
        length = (tl.load(cu + n + 1) - start).to(tl.int32)
        first = start // C + n
    return start, length, first


@triton.jit
def place_of(slot, cu, sequence, T, C: tl.constexpr):
    """Returns a slot's first token and its sequence's remaining tokens from there, <= 0 if the slot is empty."""
    if cu is None:
        n = slot // tl.cdiv(T, C)
    else:
        n = tl.load(sequence + slot)
    start, length, first = sequence_of(n, cu, T, C)
    skipped = (slot - first) * C
    return start + skipped, (length - skipped).to(tl.int32)


@triton.jit
def decays(log_decay, head, h, left, H, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Returns G_i, G_C - G_i and G_C of a chunk. Tokens beyond `left` have log decay 0."""
    i = tl.arange(0, C)
    if PER_TOKEN:
        g_C = tl.load(log_decay + head + i * H, mask=i < left, other=0.0)
        since_C = tl.cumsum(tl.maximum(g_C, FORGOTTEN))
        total = tl.sum(tl.where(i == C - 1, since_C, 0.0))
    else:
        g = tl.maximum(tl.load(log_decay + h), FORGOTTEN)
        since_C = g * (i + 1)
        total = g * tl.minimum(left, C)
    # a parallel sum of falling numbers may rise by a rounding error, and past the end it falls further
    return since_C, tl.minimum(total - since_C, 0.0), total


@triton.jit(do_not_specialize=["T", "scale"])  # avoids recompiling for T = 1 or multiples of 16
def scan(
    x, y, log_decay, initial, before, final, cu, T, scale, H,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_TOKEN: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes states: x [BT,H,K], y [BT,H,V] -> before each chunk [slots,H,K,V], at the end [N,H,K,V].

    One program per sequence, head and tile of the state, which it carries in float32 from chunk to chunk.
    """
    tiles_V: tl.constexpr = tl.cdiv(V, BV)
    tiles: tl.constexpr = tl.cdiv(K, BK) * tiles_V
    tile, nh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    n, h = nh // H, nh % H
    start, length, first = sequence_of(n, cu, T, C)
    i = tl.arange(0, C)
    k_K = tile // tiles_V * BK + tl.arange(0, BK)
    v_V = tile % tiles_V * BV + tl.arange(0, BV)
    at_KC, at_CV = (i * H)[None, :] * K + k_K[:, None], (i * H)[:, None] * V + v_V[None, :]
    at_KV = k_K[:, None] * V + v_V[None, :]
    mask_KV = (k_K[:, None] < K) & (v_V[None, :] < V)
    S_KV = tl.load(initial + nh.to(tl.int64) * (K * V) + at_KV, mask=mask_KV, other=0.0)
    chunks = tl.cdiv(length, C)  # the only loop over time: all else is parallel in T
    for step in range(0, chunks):
        if BACKWARD:
            chunk = chunks - 1 - step
        else:
            chunk = step
        tl.store(before + ((first + chunk) * H + h) * (K * V) + at_KV, S_KV.to(before.dtype.element_ty), mask=mask_KV)
        left = length - chunk * C
        head = (start + chunk * C) * H + h  # index of the chunk's first token in [BT,H]
        x_KC = tl.load(x + head * K + at_KC, mask=(i < left)[None, :] & (k_K < K)[:, None], other=0.0)
        y_CV = tl.load(y + head * V + at_CV, mask=(i < left)[:, None] & (v_V < V)[None, :], other=0.0)
        since_C, to_end_C, total = decays(log_decay, head, h, left, H, C, PER_TOKEN)
        if BACKWARD:
            w_C = scale * tl.exp(since_C)
        else:
            w_C = tl.exp(to_end_C)
        x_KC = (x_KC.to(tl.float32) * w_C[None, :]).to(x.dtype.element_ty)
        S_KV = tl.dot(x_KC, y_CV, S_KV * tl.exp(total), input_precision=PRECISION)
    tl.store(final + nh.to(tl.int64) * (K * V) + at_KV, S_KV, mask=mask_KV)


@triton.jit(do_not_specialize=["T", "scale", "tokens"])
def read(
    x, y, z, states, log_decay, out, own, share, cu, sequence, T, scale, tokens, H,
    C: tl.constexpr, I: tl.constexpr, O: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    PER_TOKEN: tl.constexpr, BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes outputs from a chunk's state and its tokens: x, y [BT,H,I], z [BT,H,O] -> out [BT,H,O].

    One program per slot, head and tile of O. States are [slots,H,I,O], or [slots,H,O,I] if TRANSPOSED. Given `own`
    [BT,H,O], writes to `share` [tiles,BT,H] each token's dot product of `own` with its output from the state.
    """
    tiles: tl.constexpr = tl.cdiv(O, BO)
    tile, mh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    slot, h = (mh // H).to(tl.int64), mh % H
    token, left = place_of(slot, cu, sequence, T, C)
    if left <= 0:  # an empty slot
        return
    i = tl.arange(0, C)
    head = token * H + h
    o_O = tile * BO + tl.arange(0, BO)
    at_CO = (i * H)[:, None] * O + o_O[None, :]
    mask_CO = (i < left)[:, None] & (o_O < O)[None, :]
    states += (slot * H + h) * (I * O)

    from_state_CO = tl.zeros([C, BO], tl.float32)
    score_CC = tl.zeros([C, C], tl.float32)
    for begin in range(0, I, BI):
        i_I = begin + tl.arange(0, BI)
        at_CI, at_IC = (i * H)[:, None] * I + i_I[None, :], (i * H)[None, :] * I + i_I[:, None]
        x_CI = tl.load(x + head * I + at_CI, mask=(i < left)[:, None] & (i_I < I)[None, :], other=0.0)
        y_IC = tl.load(y + head * I + at_IC, mask=(i < left)[None, :] & (i_I < I)[:, None], other=0.0)
        if TRANSPOSED:
            at_IO = o_O[None, :] * I + i_I[:, None]
        else:
            at_IO = i_I[:, None] * O + o_O[None, :]
        state_IO = tl.load(states + at_IO, mask=(i_I < I)[:, None] & (o_O < O)[None, :], other=0.0)
        from_state_CO = tl.dot(x_CI, state_IO, from_state_CO, input_precision=PRECISION)
        score_CC = tl.dot(x_CI, y_IC, score_CC, input_precision=PRECISION)

    since_C, to_end_C, _ = decays(log_decay, head, h, left, H, C, PER_TOKEN)
    if BACKWARD:
        w_C = tl.exp(to_end_C)
        lag_CC = since_C[None, :] - since_C[:, None]
        seen_CC = i[None, :] >= i[:, None]
    else:
        w_C = scale * tl.exp(since_C)
        lag_CC = since_C[:, None] - since_C[None, :]
        seen_CC = i[:, None] >= i[None, :]
    decay_CC = tl.exp(tl.where(seen_CC, tl.minimum(lag_CC, 0.0), float("-inf")))
    score_CC = (score_CC * (scale * decay_CC)).to(z.dtype.element_ty)
    from_state_CO = from_state_CO * w_C[:, None]
    # every tile of O writes its own share and the caller sums them: no atomics, so the result is deterministic
    if own is not None:
        own_CO = tl.load(own + head * O + at_CO, mask=mask_CO, other=0.0)
        share_C = tl.sum(own_CO.to(tl.float32) * from_state_CO, 1)
        tl.store(share + tile.to(tl.int64) * tokens * H + head + i * H, share_C, mask=i < left)
    z_CO = tl.load(z + head * O + at_CO, mask=mask_CO, other=0.0)
    out_CO = tl.dot(score_CC, z_CO, from_state_CO, input_precision=PRECISION)
    tl.store(out + head * O + at_CO, out_CO.to(out.dtype.element_ty), mask=mask_CO)


class Chunks(NamedTuple):
    """Values shared by all launches of one call: layout of tokens in slots, decays, the tile table's row."""

    tiles: Tiles
    C: int
    log_decay: Tensor
    scale: float
    rows: int  # N: rows or packed sequences
    T: int  # tokens per row
    slots: int
    cu: Tensor | None
    sequence: Tensor | None  # sequence of each slot, for packed sequences


def chunks_of(q: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, scale: float, C: int) -> Chunks:
    """Lays out the tokens of q `[B,T,H,K]` in chunks of C, without waiting for the device."""
    B, T = q.shape[:2]
    tiles, log_decay = tiles_for(q, C), log_decay.contiguous()
    if cu_seqlens is None:
        return Chunks(tiles, C, log_decay, scale, B, T, B * triton.cdiv(T, C), None, None)
    cu = cu_seqlens.to(device=q.device, dtype=torch.int64)
    N = len(cu) - 1
    slots = T // C + N  # upper bound for any cut into sequences: the exact number is on the device
    first_N = cu[:-1] // C + torch.arange(N, device=q.device)
    sequence = torch.searchsorted(first_N, torch.arange(slots, device=q.device), right=True) - 1
    return Chunks(tiles, C, log_decay, scale, N, T, slots, cu, sequence)


def run_scan(x: Tensor, y: Tensor, initial: Tensor, at: Chunks, *, backward: bool) -> tuple[Tensor, Tensor]:
    """Returns states before the chunks [slots,H,K,V] in x's dtype and final ones in float32, or their gradients."""
    H, K, V = initial.shape[1:]
    tile = at.tiles.scan.within(K, V)
    before, final = x.new_empty(at.slots, H, K, V), torch.empty_like(initial)
    scan[(at.rows * H * tile.needed(K, V),)](
        x, y, at.log_decay, initial, before, final, at.cu, at.T, at.scale, H,
        C=at.C, K=K, V=V, BK=tile.rows, BV=tile.columns, PER_TOKEN=at.log_decay.ndim == 3, BACKWARD=backward,
        PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return before, final


def run_read(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    states: Tensor,
    at: Chunks,
    *,
    backward: bool,
    transposed: bool = False,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launches `read`; returns its output, shaped like z, and the shares [tiles,BT,H] if `own` is given."""
    B, T, H, I = x.shape
    O = z.shape[-1]
    tile = at.tiles.read.within(I, O)
    tiles = triton.cdiv(O, tile.columns)
    out = torch.empty_like(z)
    share = None if own is None else at.log_decay.new_empty(tiles, B * T, H)
    read[(at.slots * H * tiles,)](
        x, y, z, states, at.log_decay, out, own, share, at.cu, at.sequence, at.T, at.scale, B * T, H,
        C=at.C, I=I, O=O, BI=tile.rows, BO=tile.columns, PER_TOKEN=at.log_decay.ndim == 3, BACKWARD=backward,
        TRANSPOSED=transposed, PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, share


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None, scale: float, C: int
) -> tuple[Tensor, Tensor]:
    """Returns o `[B,T,H,V]` in the dtype of v, and the states after the last tokens, float32 `[N,H,K,V]`."""
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    at = chunks_of(q, log_decay, cu_seqlens, scale, C)
    before, final = run_scan(k, v, state, at, backward=False)
    o, _ = run_read(q, k, v, before, at, backward=False)
    return o, final
