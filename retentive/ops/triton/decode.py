"""Decode step for one token, in place: a ring of the latest tokens beside the state, folded into it every R / 2 tokens.

A state of 256 x 512 is half a megabyte per head, and moving it dominates decoding. It is therefore read once per token,
but written only once per F = R // 2 tokens. With g_j the log decays of the held tokens (those not yet in the state S,
oldest first, the new one last):

    o = scale * (exp(sum_j g_j) q S + sum_j exp(sum_{i>j} g_i) (q . k_j) v_j)
    if R are held:   S <- exp(sum_{j<F} g_j) S + sum_{j<F} exp(sum_{j<i<F} g_i) k_j v_j^T

The idea of a buffer beside the state is from power retention (github.com/m-a-n-i-f-e-s-t/retention).

Token t is in slot t % R. Tokens `folded` to `written` - 1 are held when the call begins; each row has its own counts.
Programs of one head run concurrently, so they take the new token from the arguments, never from its slot, and a second
kernel updates the counts after all have read them. No device synchronisation, no size that depends on device data, and
no allocation but o, so a CUDA graph can capture the call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.ops.triton.forward import FORGOTTEN
from retentive.ops.triton.tiles import step_tile

MAX_R = 128  # a ring is held in registers


@triton.jit(do_not_specialize=["scale"])
def token_step(
    q, k, v, log_decay, state, ring_k, ring_v, ring_decay, written, folded, o, scale, decay_of_row, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program per row, head and tile of V. j indexes held tokens, R is that side of a tile; the new one is last."""
    tiles: tl.constexpr = tl.cdiv(V, BV)
    F: tl.constexpr = R // 2
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = row // H, row % H
    row = row.to(tl.int64)
    now, first = tl.load(written + b), tl.load(folded + b)
    held = now - first + 1
    j = tl.arange(0, BR)
    is_old, is_new = j < held - 1, j == held - 1
    slot_R = row * R + (first + j) % R
    new_slot = row * R + now % R
    v_V = tile * BV + tl.arange(0, BV)
    mask_V = v_V < V

    g = tl.maximum(tl.load(log_decay + b * decay_of_row + h), FORGOTTEN)
    g_R = tl.where(is_new, g, tl.load(ring_decay + slot_R, mask=is_old, other=0.0))
    since_R = tl.cumsum(g_R)
    total = tl.sum(tl.where(j == BR - 1, since_R, 0.0))
    to_fold = tl.sum(tl.where(j == F - 1, since_R, 0.0))
    # a parallel sum of falling numbers may rise by a rounding error
    to_now_R = tl.exp(tl.minimum(total - since_R, 0.0))
    in_fold_R = tl.exp(tl.minimum(to_fold - since_R, 0.0))

    v_new_V = tl.load(v + row * V + v_V, mask=mask_V, other=0.0)
    v_RV = tl.load(ring_v + slot_R[:, None] * V + v_V[None, :], mask=is_old[:, None] & mask_V[None, :], other=0.0)
    v_RV = tl.where(is_new[:, None], v_new_V[None, :], v_RV).to(tl.float32)
    score_R = tl.zeros([BR], tl.float32)
    from_state_V = tl.zeros([BV], tl.float32)
    for begin in tl.static_range(0, K, BK):
        k_K = begin + tl.arange(0, BK)
        mask_K = k_K < K
        q_K = tl.load(q + row * K + k_K, mask=mask_K, other=0.0).to(tl.float32)
        at_KV, mask_KV = state + row * (K * V) + k_K[:, None] * V + v_V[None, :], mask_K[:, None] & mask_V[None, :]
        S_KV = tl.load(at_KV, mask=mask_KV, other=0.0)
        from_state_V += tl.sum(q_K[:, None] * S_KV, 0)
        k_new_K = tl.load(k + row * K + k_K, mask=mask_K, other=0.0)
        k_RK = tl.load(ring_k + slot_R[:, None] * K + k_K[None, :], mask=is_old[:, None] & mask_K[None, :], other=0.0)
        k_RK = tl.where(is_new[:, None], k_new_K[None, :], k_RK).to(tl.float32)
        score_R += tl.sum(q_K[None, :] * k_RK, 1)
        if tile == 0:  # k is the same in all tiles of a head
            tl.store(ring_k + new_slot * K + k_K, k_new_K, mask=mask_K)
        if held == R:  # folds the F oldest; the new token is not among them, so all are in their slots
            k_KR = tl.load(
                ring_k + slot_R[None, :] * K + k_K[:, None], mask=(j < F)[None, :] & mask_K[:, None], other=0.0
            )
            k_KR = k_KR.to(tl.float32) * in_fold_R[None, :]
            tl.store(at_KV, tl.dot(k_KR, v_RV, S_KV * tl.exp(to_fold), input_precision="ieee"), mask=mask_KV)
    o_V = tl.exp(total) * from_state_V + tl.sum((to_now_R * score_R)[:, None] * v_RV, 0)
    tl.store(o + row * V + v_V, (scale * o_V).to(o.dtype.element_ty), mask=mask_V)
    tl.store(ring_v + new_slot * V + v_V, v_new_V, mask=mask_V)
    if tile == 0:
        tl.store(ring_decay + new_slot, g)


@triton.jit
def count(written, folded, B, R: tl.constexpr, BLOCK: tl.constexpr):
    """Updates the counts after `token_step`: one more token, and R // 2 more folded in rows that hold R."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    now, first = tl.load(written + b, mask=b < B, other=0), tl.load(folded + b, mask=b < B, other=0)
    tl.store(written + b, now + 1, mask=b < B)
    tl.store(folded + b, tl.where(now - first + 1 == R, first + R // 2, first), mask=b < B)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_decay: Tensor,
    written: Tensor,
    folded: Tensor,
) -> Tensor:
    """Decodes one token and returns its o `[B,H,V]`; updates state, ring and counts in place.

    All tensors must be contiguous and on one GPU.

    Args:
        q, k: `[B,H,K]`.
        v: `[B,H,V]`, the same dtype.
        log_decay: `[H]` or `[B,H]`, float32.
        state: `[B,H,K,V]`, float32.
        ring_k, ring_v, ring_decay: `[B,H,R,K]`, `[B,H,R,V]` in the dtype of q, `[B,H,R]` in float32; R even. Slots
            without a token may hold any values.
        written, folded: `[B]`, int64: tokens so far, and how many of them are in the state; at most R - 1 apart.

    Raises:
        ValueError: a tensor is not contiguous, or R is odd or out of range.
    """
    tensors = (q, k, v, log_decay, state, ring_k, ring_v, ring_decay, written, folded)
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("the step works in place and needs contiguous tensors")
    B, H, R, K = ring_k.shape
    V = v.shape[-1]
    if R % 2 or not 2 <= R <= MAX_R:
        raise ValueError(f"the ring needs an even number of slots, 2 to {MAX_R}, got {R}")
    o = torch.empty_like(v)
    tile = step_tile(q).within(K, V)
    with torch.cuda.device_of(q):
        token_step[(B * H * triton.cdiv(V, tile.columns),)](
            q, k, v, log_decay, state, ring_k, ring_v, ring_decay, written, folded, o, scale,
            H if log_decay.ndim == 2 else 0, H,
            K=K, V=V, R=R, BR=max(16, triton.next_power_of_2(R)), BK=tile.rows, BV=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        # a separate kernel: its launch is the first point where all programs of the step have read the counts
        count[(triton.cdiv(B, 128),)](written, folded, B, R=R, BLOCK=128, num_warps=4)
    return o
