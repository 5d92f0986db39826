"""Chunkwise retention (equation 7) on whole tensors: all chunks at once, then one scan over the chunks.

    inside a chunk    o_i = sum_{j<=i} exp(G_i - G_j) (q_i k_j) v_j          G_i = log decay from the chunk's start
    from the past     o_i += exp(G_i) q_i S                                  S = state at the chunk's start
    chunk to chunk    S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j v_j^T

The backward pass keeps q, k, v and recomputes the rest, so training memory is linear in T. A chunk's scores exist only
while they are used. States, decays and their sums are float32 (float64 for float64 inputs).

Tokens are laid out as M chunks of C; no chunk crosses a sequence. A chunk that is not full is padded with tokens that
write nothing (k = 0) and do not decay (log decay 0), so its state is exactly that of its true length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORGOTTEN = -100.0
"""Lower bound of log decays: e^-100 is negligible, and differences of sums of -inf would be NaN."""


class Layout(NamedTuple):
    """Mapping of tokens to chunks, and the order in which chunks pass on their states."""

    B: int
    T: int
    C: int
    length_M: Tensor | None  # tokens of each chunk; None if all are full
    token_MC: Tensor | None  # packed sequences: index of each token in the flattened batch, B * T for padding
    order: list[tuple]  # per step of the scan: (its chunks, their sequences), indices into M and N


def layout(B: int, T: int, C: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
    """Lays out the chunks of B rows of T tokens, or of the sequences that cu_seqlens [N+1] cuts one row into.

    With cu_seqlens on a GPU this waits for the device, since the number of chunks is a shape.
    """
    if cu_seqlens is None:
        C = min(C, T)
        per_row = -(-T // C)
        order: list[tuple] = [(slice(n, None, per_row), slice(None)) for n in range(per_row)]
        length_M = None
        if T % C:
            length_M = torch.full((per_row,), C, device=device)
            length_M[-1] = T % C
            length_M = length_M.repeat(B)
        return Layout(B, T, C, length_M, None, order)
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    lengths = cu_seqlens[1:].to(device=device, dtype=torch.int64) - starts
    C = min(C, int(lengths.max()))
    chunks = -(-lengths // C)
    sequence_M = torch.repeat_interleave(torch.arange(len(lengths), device=device), chunks)
    first_N = chunks.cumsum(0) - chunks
    # rank: number of a chunk within its sequence; padding gets index T, one past the last token
    rank_M = torch.arange(len(sequence_M), device=device) - first_N[sequence_M]
    length_M = (lengths[sequence_M] - rank_M * C).clamp(max=C)
    offset_C = torch.arange(C, device=device)
    token_MC = starts[sequence_M, None] + rank_M[:, None] * C + offset_C
    token_MC = token_MC.masked_fill(offset_C >= length_M[:, None], T)
    order = []
    for n in range(int(chunks.max())):
        rows = (chunks > n).nonzero().squeeze(1)
        order.append((first_N[rows] + n, rows))
    return Layout(1, T, C, length_M, token_MC, order)


def to_chunks(x: Tensor, at: Layout) -> Tensor:
    """Rearranges [B, T, H, ...] to [M, H, C, ...], contiguous, with zeros for padding."""
    if at.token_MC is None:
        tail = -at.T % at.C
        if tail:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, tail))
        x = x.reshape(-1, at.C, *x.shape[2:])
    else:
        x = x.flatten(0, 1)
        # a row of zeros at index T, which padding reads
        x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))[at.token_MC]
    return x.transpose(1, 2).contiguous()


def from_chunks(x_MHC: Tensor, at: Layout) -> Tensor:
    """Rearranges [M, H, C, ...] to [B, T, H, ...], contiguous: the inverse of to_chunks."""
    x = x_MHC.transpose(1, 2)
    if at.token_MC is None:
        x = x.reshape(at.B, -1, *x.shape[2:])[:, : at.T]
        return x.contiguous()
    out = x.new_empty(at.T + 1, *x.shape[2:])
    out[at.token_MC] = x  # row T collects the padding and is cut off
    return out[: at.T].unsqueeze(0).contiguous()


class Decays(NamedTuple):
    """The four decay factors of a chunk. The leading size is 1 if they are the same for all chunks."""

    inside_MHCC: Tensor  # exp(G_i - G_j) for i >= j, else 0
    start_MHC1: Tensor  # exp(G_i)
    end_MHC1: Tensor  # exp(G_C - G_j)
    total_MH11: Tensor  # exp(G_C)


def decays(log_decay: Tensor, at: Layout) -> Decays:
    """Computes decay factors from log decays `[H]` or `[B,T,H]`. Exponents are differences of falling sums, so <= 0."""
    C, device = at.C, log_decay.device
    log_decay = log_decay.clamp(min=FORGOTTEN)
    position = torch.arange(C, device=device)
    if log_decay.ndim == 1:
        since_MHC = log_decay[None, :, None] * (position + 1)
        whole_MH1 = since_MHC[..., -1:]
        end_MHC = since_MHC.flip(-1) - log_decay[:, None]  # (C - 1 - j) log_decay
        if at.length_M is not None:
            whole_MH1 = log_decay[None, :, None] * at.length_M[:, None, None]
            rest_MC = (at.length_M[:, None] - 1 - position).clamp(min=0)
            end_MHC = log_decay[None, :, None] * rest_MC[:, None, :]
        lag_MHCC = log_decay[None, :, None, None] * (position[:, None] - position)
    else:
        since_MHC = to_chunks(log_decay, at).cumsum(-1)
        whole_MH1 = since_MHC[..., -1:]
        end_MHC = whole_MH1 - since_MHC
        lag_MHCC = since_MHC[..., :, None] - since_MHC[..., None, :]
    future_CC = position[:, None] < position
    inside_MHCC = lag_MHCC.masked_fill(future_CC, -torch.inf).exp_()
    return Decays(inside_MHCC, since_MHC.exp()[..., None], end_MHC.exp()[..., None], whole_MH1.exp()[..., None])


def scan(local_MHKV: Tensor, total_MH11: Tensor, state_NHKV: Tensor, order: list[tuple]) -> tuple[Tensor, Tensor]:
    """Returns the state before each chunk `[M,H,K,V]`, in the dtype of `local`, and after each sequence's last chunk.

    Computes state' = total * state + local, along `order`. With the order reversed it is its own backward pass.
    """
    before_MHKV = torch.empty_like(local_MHKV)
    state_NHKV = state_NHKV.clone(memory_format=torch.contiguous_format)  # updated in place; keeps the caller's intact
    varies = total_MH11.shape[0] > 1
    for chunks, rows in order:
        state = state_NHKV[rows]  # a view for slices, a copy for indices, so it is written back below
        before_MHKV[chunks] = state.to(local_MHKV.dtype)
        state_NHKV[rows] = state.mul_(total_MH11[chunks] if varies else total_MH11).add_(local_MHKV[chunks])
    return before_MHKV, state_NHKV


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies [M,H,x,y] by [M,H,y,z] as one batch of products."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_mm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes c += a @ b in place. c must be contiguous: `flatten` would copy anything else, and lose the sum."""
    c.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return c


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, at: Layout, scale: float
) -> tuple[Tensor, ...]:
    """Computes the inputs of both passes: q, k, v in chunks, decay factors, states before each chunk and at the end."""
    q_MHCK, k_MHCK, v_MHCV = (to_chunks(x, at) for x in (q, k, v))
    inside, start, end, total = decays(log_decay, at)
    # factors of k and q stay float32 until their product is rounded; those of the scores are rounded like the scores
    local_MHKV = _mm((k_MHCK * end).to(k.dtype).mT, v_MHCV)
    before_MHKV, state = scan(local_MHKV, total, state, at.order)
    return q_MHCK, k_MHCK, v_MHCV, (inside * scale).to(q.dtype), start * scale, end, total, before_MHKV, state


@torch.library.custom_op("retentive::blocked", mutates_args=())
def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns (o `[B,T,H,V]`, state `[N,H,K,V]`). Arguments as for `retention`, checked by it, all given."""
    with torch.autocast(q.device.type, enabled=False):
        at = layout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
        q_MHCK, k_MHCK, v_MHCV, inside, start, _, _, before_MHKV, state = _prepare(q, k, v, log_decay, state, at, scale)
        score_MHCC = _mm(q_MHCK, k_MHCK.mT).mul_(inside)
        o_MHCV = _mm(score_MHCC, v_MHCV)
        _add_mm(o_MHCV, (q_MHCK * start).to(q.dtype), before_MHKV)
        return from_chunks(o_MHCV, at), state


@torch.library.custom_op("retentive::blocked_backward", mutates_args=())
def blocked_backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of q, k, v, log_decay and the initial state. For log_decay `[H]` the gradient is empty."""
    with torch.autocast(q.device.type, enabled=False):
        at = layout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
        q_MHCK, k_MHCK, v_MHCV, inside, start, end, total, before_MHKV, _ = _prepare(
            q, k, v, log_decay, state, at, scale
        )
        do_MHCV = to_chunks(do, at)
        score_MHCC = _mm(q_MHCK, k_MHCK.mT).mul_(inside)
        dscore_MHCC = _mm(do_MHCV, v_MHCV.mT)
        # the score already includes the decay, so this comes before dscore is multiplied by `inside`
        if log_decay.ndim == 3:
            product_MHCC = score_MHCC.to(log_decay.dtype) * dscore_MHCC
            dG_MHC = product_MHCC.sum(-1) - product_MHCC.sum(-2)
        dscore_MHCC.mul_(inside)
        dlocal_MHKV = _mm((q_MHCK * start).to(q.dtype).mT, do_MHCV)
        after_MHKV, dinitial = scan(
            dlocal_MHKV, total, dstate, at.order[::-1]
        )  # gradient of the state after each chunk

        dv_MHCV = _mm(score_MHCC.mT, do_MHCV)
        _add_mm(dv_MHCV, (k_MHCK * end).to(k.dtype), after_MHKV)
        dq_MHCK = _mm(do_MHCV, before_MHKV.mT).mul_(start)
        dk_MHCK = _mm(v_MHCV, after_MHKV.mT).mul_(end)
        dlog_decay = log_decay.new_empty(0)
        # dq and dk hold the states' shares only, as _decay_gradient needs them; the scores' shares are added after it
        if log_decay.ndim == 3:
            kept_MH = (before_MHKV.to(log_decay.dtype) * after_MHKV).sum((-1, -2)) * total[..., 0, 0]
            dlog_decay = _decay_gradient(dG_MHC, q_MHCK, dq_MHCK, k_MHCK, dk_MHCK, kept_MH, at)
        _add_mm(dq_MHCK, dscore_MHCC, k_MHCK)
        _add_mm(dk_MHCK, dscore_MHCC.mT, q_MHCK)
        dq, dk, dv = (from_chunks(x, at) for x in (dq_MHCK, dk_MHCK, dv_MHCV))
        return dq, dk, dv, dlog_decay, dinitial


def _decay_gradient(
    dG_MHC: Tensor, q_MHCK: Tensor, dq_MHCK: Tensor, k_MHCK: Tensor, dk_MHCK: Tensor, kept_MH: Tensor, at: Layout
) -> Tensor:
    """Returns the gradient of a per-token log decay, `[B,T,H]`, from dL/dG inside chunks and the states' shares.

    o_i contains exp(G_i) with q_i, and k_j comes with exp(-G_j). Inside a chunk dL/dG is therefore the row sums minus
    the column sums of score * dscore. Both use the same rounded numbers, so terms that cancel do so exactly. Added are
    q_i . dq_i for the state before the chunk, -k_j . dk_j for the state after it, and at the chunk's end <S, dL/dS> of
    that state. G is a running sum from the chunk's start, so its gradient is summed from the chunk's end: errors do not
    grow with T.
    """
    wide = dG_MHC.dtype
    k_dk_MHC = (k_MHCK.to(wide) * dk_MHCK).sum(-1)
    dG_MHC += (q_MHCK.to(wide) * dq_MHCK).sum(-1) - k_dk_MHC
    dG_MHC[..., -1] += kept_MH + k_dk_MHC.sum(-1)
    return from_chunks(dG_MHC.flip(-1).cumsum(-1).flip(-1), at)


def check_borders(cu_seqlens: Tensor, T: int) -> None:
    """Checks that cu_seqlens ascends from 0 to T: packed sequences lie end to end and none is empty.

    Raises:
        ValueError: it does not.
    """
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or not bool((cu_seqlens.diff() > 0).all()):
        raise ValueError(f"cu_seqlens must ascend from 0 to T = {T}, got {cu_seqlens.tolist()[:8]}…")


def refuse_second_derivative(backward) -> None:
    """Makes differentiating the custom op `backward` raise a RuntimeError that names the alternative."""

    def refuse(ctx, *gradients):
        raise RuntimeError(
            "retention has no second derivative here (create_graph=True): use backend='reference', which has one"
        )

    backward.register_autograd(refuse)


def join_passes(forward, backward) -> None:
    """Registers shapes and autograd of two custom ops that take the arguments of `blocked` and `blocked_backward`."""

    def shapes(q, k, v, log_decay, state, cu_seqlens, scale, chunk_size):
        return v.new_empty(v.shape), state.new_empty(state.shape)

    def backward_shapes(do, dstate, q, k, v, log_decay, state, cu_seqlens, scale, chunk_size):
        dlog_decay = log_decay.new_empty(0 if log_decay.ndim == 1 else log_decay.shape)
        return *(x.new_empty(x.shape) for x in (q, k, v)), dlog_decay, state.new_empty(state.shape)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, do, dstate):
        dq, dk, dv, dlog_decay, dinitial = backward(do, dstate, *ctx.saved_tensors, ctx.scale, ctx.chunk_size)
        return dq, dk, dv, dlog_decay if ctx.needs_input_grad[3] else None, dinitial, None, None, None

    forward.register_fake(shapes)
    backward.register_fake(backward_shapes)
    forward.register_autograd(gradients, setup_context=setup_context)
    refuse_second_derivative(backward)


join_passes(blocked, blocked_backward)
