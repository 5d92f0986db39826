"""Gradients of q, k, v, the decays and the initial state: the kernels of `forward.py`, backward in time.

With S the recomputed states before the chunks, and dS the gradients of the states after them:

    dS = backward scan(q, do)     dq = read(do, v, k | S^T)
    dv = backward read(k, q, do | dS)     dk = backward read(v, do, q | dS^T)

Only the gradient of a per-token log decay needs a kernel of its own (`decay_gradient`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.ops.triton.forward import Chunks, chunks_of, decays, place_of, run_read, run_scan
from retentive.ops.triton.tiles import precision


@triton.jit(do_not_specialize=["T", "scale", "tokens"])
def decay_gradient(
    q, k, v, do, before, after, log_decay, q_share, k_share, out, cu, sequence, T, scale, tokens, H,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a per-token log decay, out [BT,H]; one program per slot and head.

    o_i contains exp(G_i) with q_i, and k_j comes with exp(-G_j). Inside a chunk dL/dG is therefore the row sums minus
    the column sums of score * dscore, one matrix, so that terms that cancel do so exactly. Added are the shares of the
    states: q_i . dq_i of the state before, -k_j . dk_j of the state after, and at the chunk's end <S, dS> of the state
    after. G is a running sum from the chunk's start, so its gradient is summed from the chunk's end: errors do not grow
    with T.
    """
    slot, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    token, left = place_of(slot, cu, sequence, T, C)
    if left <= 0:
        return
    i = tl.arange(0, C)
    head = token * H + h
    before += (slot * H + h) * (K * V)
    after += (slot * H + h) * (K * V)

    score_CC = tl.zeros([C, C], tl.float32)
    for begin in range(0, K, BK):
        k_K = begin + tl.arange(0, BK)
        at_CK, at_KC = (i * H)[:, None] * K + k_K[None, :], (i * H)[None, :] * K + k_K[:, None]
        q_CK = tl.load(q + head * K + at_CK, mask=(i < left)[:, None] & (k_K < K)[None, :], other=0.0)
        k_KC = tl.load(k + head * K + at_KC, mask=(i < left)[None, :] & (k_K < K)[:, None], other=0.0)
        score_CC = tl.dot(q_CK, k_KC, score_CC, input_precision=PRECISION)
    dscore_CC = tl.zeros([C, C], tl.float32)
    for begin in range(0, V, BV):
        v_V = begin + tl.arange(0, BV)
        at_CV, at_VC = (i * H)[:, None] * V + v_V[None, :], (i * H)[None, :] * V + v_V[:, None]
        do_CV = tl.load(do + head * V + at_CV, mask=(i < left)[:, None] & (v_V < V)[None, :], other=0.0)
        v_VC = tl.load(v + head * V + at_VC, mask=(i < left)[None, :] & (v_V < V)[:, None], other=0.0)
        dscore_CC = tl.dot(do_CV, v_VC, dscore_CC, input_precision=PRECISION)
    since_C, _, total = decays(log_decay, head, h, left, H, C, True)
    lag_CC = tl.minimum(since_C[:, None] - since_C[None, :], 0.0)
    decay_CC = tl.exp(tl.where(i[:, None] >= i[None, :], lag_CC, float("-inf")))
    product_CC = score_CC * dscore_CC * decay_CC * scale
    dG_C = tl.sum(product_CC, 1) - tl.sum(product_CC, 0)

    # <S, dS>, the gradient of the chunk's total decay
    kept_KV = tl.zeros([BK, BV], tl.float32)
    for begin_K in range(0, K, BK):
        for begin_V in range(0, V, BV):
            k_K, v_V = begin_K + tl.arange(0, BK), begin_V + tl.arange(0, BV)
            at_KV = k_K[:, None] * V + v_V[None, :]
            mask_KV = (k_K < K)[:, None] & (v_V < V)[None, :]
            S_KV = tl.load(before + at_KV, mask=mask_KV, other=0.0).to(tl.float32)
            kept_KV += S_KV * tl.load(after + at_KV, mask=mask_KV, other=0.0).to(tl.float32)
    at_end = tl.sum(kept_KV) * tl.exp(total)

    share_C = head + i * H  # [tiles of K, BT, H]
    for _ in tl.static_range(TILES):
        k_share_C = tl.load(k_share + share_C, mask=i < left, other=0.0)
        dG_C += tl.load(q_share + share_C, mask=i < left, other=0.0) - k_share_C
        at_end += tl.sum(k_share_C)
        share_C += tokens.to(tl.int64) * H
    tl.store(out + head + i * H, tl.cumsum(dG_C, reverse=True) + at_end, mask=i < left)


def run_decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    before: Tensor,
    after: Tensor,
    shares: tuple[Tensor, Tensor],
    at: Chunks,
) -> Tensor:
    """Launches `decay_gradient`; returns the gradient of the log decays, `[B,T,H]`."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    tile = at.tiles.decay.within(K, V)
    out = torch.empty_like(at.log_decay)
    decay_gradient[(at.slots * H,)](
        q, k, v, do, before, after, at.log_decay, *shares, out, at.cu, at.sequence, at.T, at.scale, B * T, H,
        C=at.C, K=K, V=V, BK=tile.rows, BV=tile.columns, TILES=shares[0].shape[0],
        PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def chunkwise_backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    C: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of q, k, v, log_decay and the initial state. For log_decay `[H]` the gradient is empty."""
    do, dstate, q, k, v, state = (x.contiguous() for x in (do, dstate, q, k, v, state))
    at = chunks_of(q, log_decay, cu_seqlens, scale, C)
    learned = log_decay.ndim == 3
    # states are recomputed instead of kept, so that training memory is that of q, k and v
    before, _ = run_scan(k, v, state, at, backward=False)
    after, dinitial = run_scan(q, do, dstate, at, backward=True)
    dv, _ = run_read(k, q, do, after, at, backward=True)
    dq, q_share = run_read(do, v, k, before, at, backward=False, transposed=True, own=q if learned else None)
    dk, k_share = run_read(v, do, q, after, at, backward=True, transposed=True, own=k if learned else None)
    dlog_decay = log_decay.new_empty(0)
    if q_share is not None and k_share is not None:
        dlog_decay = run_decay_gradient(q, k, v, do, before, after, (q_share, k_share), at)
    return dq, dk, dv, dlog_decay, dinitial
