"""The public operator: `retention` for many tokens, `retention_step` for one.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

One docstring, the checks, the choice of a backend. The idea itself is in `reference.py`.
"""

import torch
from torch import Tensor

from retentive.ops import backends
from retentive.ops.backends import Call, choose, exactly
from retentive.ops.blocked import check_borders
from retentive.ops.decay import check_values
from retentive.ops.step import Ring

FORMS = ("auto", "parallel", "recurrent", "chunkwise")


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `o` and the state after the last token; `retention(A+B)` equals A, then B with A's state.

    Args:
        q, k: `[B,T,H,K]`, any floating dtype.
        v: `[B,T,H,V]`, the same dtype; V need not be K.
        log_decay: `[H]`, or `[B,T,H]` for a decay per token; <= 0. Its gradient is computed where asked for.
        scale: factor of q; K^-1/2 if not given.
        state: `[B,H,K,V]`, the state to go on from; zeros if not given.
        form: "parallel" (one T x T product), "recurrent" (token by token), "chunkwise" (parallel inside chunks,
            recurrent between them), or "auto". They return the same numbers.
        chunk_size: tokens in a chunk of the chunkwise form; by default chosen from K.
        backend: "triton" (NVIDIA GPUs), "cpu" (compiled at first use), "blocked" (vectorised torch, any device),
            "reference" (one page, any form), or "auto", the first of them that can. One that is named and cannot do the
            job raises.
        cu_seqlens: `[N+1]` integers from 0 to T, ascending: with B = 1, where the N sequences packed into the row begin
            and end. Each has its own state.

    Returns:
        o `[B,T,H,V]` in the dtype of v; state `[B,H,K,V]` (`[N,H,K,V]` with cu_seqlens), float32, or float64 if q is.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, an unknown form or backend, a log decay above 0 or
            NaN (looked for on the CPU only, where it costs no wait for a device).

    Source: arXiv 2307.08621, equations 5 to 7; per-token decays as in YOCO's gated retention, arXiv 2405.05254.
    """
    _check_qkv(q, k, v, ndim=4)
    B, T, H, K = q.shape
    if T == 0 or B == 0:
        raise ValueError(f"retention needs at least one row and one token, got q of shape {tuple(q.shape)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}, expected one of {', '.join(FORMS)}")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    N = B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T)
    log_decay, state = _check_decay_and_state(q, v, log_decay, (B, T, H), state, N)
    scale = K**-0.5 if scale is None else float(scale)
    check_values(log_decay)
    call = Call(q, k, v, log_decay, scale, state, form, chunk_size, cu_seqlens)
    return choose(backend, call).run(call)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | Ring | None = None,
) -> tuple[Tensor, Tensor | Ring]:
    """The recurrent form for one token: `o` `[B,H,V]` and the state after it.

    Args:
        q, k: `[B,H,K]`.
        v: `[B,H,V]`.
        log_decay: `[H]` or `[B,H]`.
        scale: as for `retention`.
        state: `[B,H,K,V]`, and a new one comes back; or a `Ring`, which is updated in place and comes back itself: half
            the memory traffic, no gradients.

    Raises:
        ValueError: as for `retention`; a ring where gradients are asked for.
    """
    if not torch.compiler.is_compiling() and isinstance(state, Ring) and not torch.is_grad_enabled():
        plan = state.plan  # the next token of many: checks and choices were made for the first
        if plan is not None and plan.fits(q, k, v, log_decay):
            return plan.run(q, k, v, log_decay, plan.scale if scale is None else scale), state
    _check_qkv(q, k, v, ndim=3)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if isinstance(state, Ring):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_decay, state.state)):
            raise ValueError("a ring is updated in place and has no gradients: use torch.no_grad(), or ring.to_state()")
        if state.k.dtype != k.dtype:
            raise ValueError(f"the ring was opened for {state.k.dtype}, got {k.dtype}")
        log_decay, _ = _check_decay_and_state(q, v, log_decay, q.shape[:2], state.state, q.shape[0])
        return backends.step(q, k, v, log_decay, scale, state), state
    log_decay, state = _check_decay_and_state(q, v, log_decay, q.shape[:2], state, q.shape[0])
    check_values(log_decay)
    with exactly(q.device):
        q_BH1K, k_BHK1, v_BH1V = (scale * q.to(state.dtype))[:, :, None], k[..., None].to(state.dtype), v[:, :, None]
        state = torch.addcmul(log_decay.exp()[..., None, None] * state, k_BHK1, v_BH1V.to(state.dtype))
        o = torch.matmul(q_BH1K, state).squeeze(2)
        return o.to(v.dtype), state


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, *, ndim: int) -> None:
    if q.ndim != ndim or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        letters = "[B,T,H," if ndim == 4 else "[B,H,"
        raise ValueError(
            f"retention needs q and k {letters}K] and v {letters}V], "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_decay_and_state(
    q: Tensor, v: Tensor, log_decay: Tensor, per_token: tuple[int, ...], state: Tensor | None, N: int
) -> tuple[Tensor, Tensor]:
    """log_decay and state in the state's dtype, a state of zeros where none is given."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if tuple(log_decay.shape) not in (per_token[-1:], tuple(per_token)):
        raise ValueError(f"log_decay must be {list(per_token[-1:])} or {list(per_token)}, got {list(log_decay.shape)}")
    if not log_decay.dtype.is_floating_point or log_decay.element_size() < 4:
        raise ValueError(f"log_decay must be float32 or float64, which keep gamma near 1 apart, got {log_decay.dtype}")
    expected = (N, q.shape[-2], q.shape[-1], v.shape[-1])
    if state is None:
        state = q.new_zeros(expected, dtype=wide)
    elif tuple(state.shape) != expected or state.dtype != wide:
        raise ValueError(f"state must be {wide} {list(expected)}, got {state.dtype} {list(state.shape)}")
    if log_decay.device != q.device or state.device != q.device:
        raise ValueError(f"q is on {q.device}, but log_decay on {log_decay.device} and state on {state.device}")
    return log_decay.to(wide), state


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> int:
    """N, the number of sequences. The values are looked at only where that costs no wait for a device."""
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N+1] int32 or int64, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"cu_seqlens packs all sequences into one row: B must be 1, got {B}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_borders(cu_seqlens, T)
    return len(cu_seqlens) - 1
