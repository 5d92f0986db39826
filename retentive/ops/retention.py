"""The public operator: `retention` for any number of tokens, `retention_step` for one.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

This file holds the checks, the choice between chunks and single steps, and `using`, which overrides that choice. The
definition is in `reference.py`, the implementations are listed in `backends.py`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops import backends, pieces
from retentive.ops.backends import BACKENDS, Call, choose, exactly
from retentive.ops.blocked import check_borders
from retentive.ops.decay import check_values
from retentive.ops.ring import NARROW, Ring, stored_shape
from retentive.ops.transforms import transformed

FORMS = ("auto", "parallel", "recurrent", "chunkwise")


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | Ring | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | Ring]:
    """Returns outputs `o` and the state after the last token. `retention(A+B)` equals A, then B with A's state.

    Args:
        q, k: `[B,T,H,K]`, any floating dtype.
        v: `[B,T,H,V]`, the same dtype; V need not equal K.
        log_decay: `[H]`, or `[B,T,H]` for a decay per token; <= 0. Differentiable.
        scale: factor of q; K^-1/2 by default.
        state: initial state `[B,H,K,V]`; zeros by default. A `Ring` decodes in place, up to as many tokens as it has
            slots. If it cannot (more tokens, gradients, a chosen form or backend, another dtype), its state is used
            and a tensor is returned.
        form: "parallel" (one T x T product), "recurrent" (token by token), "chunkwise" (parallel inside chunks,
            recurrent between them), or "auto", which uses single steps for one token. All return the same numbers.
        chunk_size: tokens per chunk of the chunkwise form; by default chosen from K.
        backend: "triton" (NVIDIA GPUs), "cpu" (C, compiled at first use), "blocked" (vectorised torch, any device),
            "reference" (one page, any form), or "auto", the first that can run the call. A named backend that cannot
            run the call raises.
        cu_seqlens: `[N+1]` ascending integers from 0 to T, with B = 1: the borders of N sequences packed into one row.
            Each sequence has its own state.

    `using` sets form, chunk_size and backend of all calls that name none. Inside `pieces.across` the tokens are one
    piece of longer sequences.

    Returns:
        o `[B,T,H,V]` in the dtype of v; state `[B,H,K,V]` (`[N,H,K,V]` with cu_seqlens) in float32, float64 if q is
        float64; or the ring.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, an unknown form or backend, or a log decay that is
            above 0 or NaN (checked on CPUs only, where it needs no wait for a device).

    Source: arXiv 2307.08621, equations 5 to 7; per-token decays as in YOCO's gated retention, arXiv 2405.05254.
    """
    form, chunk_size, backend = _chosen(form, chunk_size, backend)
    single = form == backend == "auto" and cu_seqlens is None  # single steps are allowed
    piece = pieces.current()
    if isinstance(state, Ring):
        # updated in place: autograd and torch.func cannot follow it, and other pieces do not see it
        alone = piece is None and not torch.is_grad_enabled() and not transformed()
        if single and state.takes(q) and alone:
            return _decode(q, k, v, log_decay, scale, state), state
        state = state.to_state()
    log_decay = checked(q, k, v, log_decay)
    B, T, _, K = q.shape
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}, expected one of {', '.join(FORMS)}")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    state = _check_state(q, v, state, B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T))
    scale = K**-0.5 if scale is None else float(scale)
    if single and T == 1 and piece is None:
        decay = log_decay[:, 0] if log_decay.ndim == 3 else log_decay
        o, state = _one_token(q[:, 0], k[:, 0], v[:, 0], decay, scale, state)
        return o[:, None], state
    call = Call(q, k, v, log_decay, scale, state, form, chunk_size, cu_seqlens)
    if piece is not None:
        return pieces.run(call, piece, lambda call: choose(backend, call).run(call))
    return choose(backend, call).run(call)


class _Choices(NamedTuple):
    """Choices forced by `using`; None for those left open."""

    form: str | None = None
    chunk_size: int | None = None
    backend: str | None = None


_forced: ContextVar[_Choices | None] = ContextVar("retentive.ops.using", default=None)
_forced_in_graphs: _Choices | None = None
"""The forced choices for compiled graphs: Dynamo can guard a global, but cannot read a context variable."""
_entered: list[_Choices] = []
"""Open `using` blocks of all threads; compiled graphs follow the last one entered. Threads leave in any order, so this
is a list instead of one previous value."""
_entering = threading.Lock()


@contextmanager
def using(*, form: str | None = None, backend: str | None = None, chunk_size: int | None = None) -> Iterator[None]:
    """Forces form, backend or chunk length of every `retention` call in the block that names none itself.

        with using(form="recurrent", backend="reference"):
            logits, state = model(ids)

    It applies to this thread (or asyncio task), and in compiled graphs to the whole process. A nested block keeps the
    outer block's values for arguments it leaves out. A backend named here never falls back, as if the call named it.
    Attention is not affected, neither in a Transformer nor in the attention blocks of a hybrid.

    Raises:
        ValueError: an unknown form or backend, or a chunk length below 1.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"unknown form {form!r}, expected one of {', '.join(FORMS)}")
    if backend is not None and backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected auto, {', '.join(BACKENDS)}")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    outer = _forced.get() or _Choices()
    inner = _Choices(form or outer.form, chunk_size or outer.chunk_size, backend or outer.backend)
    token = _forced.set(inner)
    _force_in_graphs(inner, enter=True)
    try:
        yield
    finally:
        _forced.reset(token)
        _force_in_graphs(inner, enter=False)


def forced() -> bool:
    """True if a `using` block is open here."""
    return _forced.get() is not None


def _force_in_graphs(choices: _Choices, *, enter: bool) -> None:
    global _forced_in_graphs
    with _entering:  # threads enter and leave in any order
        # `is`, not `==`: another thread may force equal choices
        others = [each for each in _entered if each is not choices]
        _entered[:] = [*others, choices] if enter else others
        _forced_in_graphs = _entered[-1] if _entered else None


def _chosen(form: str, chunk_size: int | None, backend: str) -> tuple[str, int | None, str]:
    """Returns the arguments, with open ones ("auto" or None) replaced by those that `using` forces."""
    forced = _forced_in_graphs if torch.compiler.is_compiling() else _forced.get()
    if forced is None:
        return form, chunk_size, backend
    return (
        forced.form if form == "auto" and forced.form else form,
        forced.chunk_size if chunk_size is None else chunk_size,
        forced.backend if backend == "auto" and forced.backend else backend,
    )


def _decode(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None, ring: Ring) -> Tensor:
    """Decodes T tokens into the ring, one after the other; returns o `[B,T,H,V]`."""
    per_token = log_decay.ndim == 3
    if q.shape[1] == 1:  # by far the most frequent case: avoid every extra view and copy
        decay = log_decay.squeeze(1) if per_token else log_decay
        return retention_step(q.squeeze(1), k.squeeze(1), v.squeeze(1), decay, scale=scale, state=ring)[0].unsqueeze(1)
    # check everything before the first token is written: an error halfway would leave the ring changed
    checked(q, k, v, log_decay)
    _check_state(q, v, ring.state, q.shape[0], of_ring=True)
    outputs = []
    for t in range(q.shape[1]):
        decay = log_decay[:, t] if per_token else log_decay
        outputs.append(retention_step(q[:, t], k[:, t], v[:, t], decay, scale=scale, state=ring)[0])
    return torch.stack(outputs, 1)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | Ring | None = None,
) -> tuple[Tensor, Tensor | Ring]:
    """Recurrent form for one token, without time axis: returns `o` `[B,H,V]` and the state after the token.

    Args:
        q, k: `[B,H,K]`.
        v: `[B,H,V]`.
        log_decay: `[H]` or `[B,H]`.
        scale: as for `retention`.
        state: `[B,H,K,V]`; a new state is returned. A `Ring` is updated in place and returned itself, with half the
            memory traffic and without gradients.

    Raises:
        ValueError: as for `retention`, or gradients are needed and the state is a ring.
    """
    if not torch.compiler.is_compiling() and isinstance(state, Ring) and not torch.is_grad_enabled():
        plan = state.plan  # made and checked at the first token, so later tokens skip checks and look-ups
        if plan is not None and not transformed() and plan.fits(q, k, v, log_decay):
            return plan.run(q, k, v, log_decay, plan.scale if scale is None else scale), state
    _check_qkv(q, k, v, ndim=3)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if isinstance(state, Ring):
        learned = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_decay, state.state))
        if learned or transformed():
            raise ValueError("a ring is updated in place and has no gradients: use torch.no_grad(), or ring.to_state()")
        if state.k.dtype != k.dtype:
            raise ValueError(f"the ring was opened for {state.k.dtype}, got {k.dtype}")
        log_decay, _ = _check_decay(q, log_decay), _check_state(q, v, state.state, q.shape[0], of_ring=True)
        return backends.decode_step(q, k, v, log_decay, scale, state), state
    log_decay, state = _check_decay(q, log_decay), _check_state(q, v, state, q.shape[0])
    check_values(log_decay)
    return _one_token(q, k, v, log_decay, scale, state)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence in torch's operations: returns `o` `[B,H,V]` and a new state."""
    with exactly(q.device):  # autocast would multiply the float32 state in 16 bits
        q_BH1K, k_BHK1, v_BH1V = (scale * q.to(state.dtype))[:, :, None], k[..., None].to(state.dtype), v[:, :, None]
        state = torch.addcmul(log_decay.exp()[..., None, None] * state, k_BHK1, v_BH1V.to(state.dtype))
        o = torch.matmul(q_BH1K, state).squeeze(2)
        return o.to(v.dtype), state


def checked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Checks the inputs of retention; returns log_decay in float32 (float64 for float64 inputs).

    Raises:
        ValueError: as in `retention`, for these four arguments.
    """
    _check_qkv(q, k, v, ndim=4)
    B, T, H, K = q.shape
    if T == 0 or B == 0:
        raise ValueError(f"retention needs at least one row and one token, got q of shape {tuple(q.shape)}")
    if 0 in (H, K, v.shape[-1]):
        raise ValueError(f"retention needs heads and numbers in them, got q {tuple(q.shape)}, v {tuple(v.shape)}")
    log_decay = _check_decay(q, log_decay)
    check_values(log_decay)
    return log_decay


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


def _check_decay(q: Tensor, log_decay: Tensor) -> Tensor:
    """Checks log_decay against q; returns it in float32 (float64 for float64 inputs).

    Raises:
        ValueError: its shape, dtype or device does not fit q.
    """
    per_token = list(q.shape[:-1])
    if list(log_decay.shape) not in (per_token[-1:], per_token):
        raise ValueError(f"log_decay must be {per_token[-1:]} or {per_token}, got {list(log_decay.shape)}")
    if not log_decay.dtype.is_floating_point or log_decay.element_size() < 4:
        raise ValueError(f"log_decay must be float32 or float64, which keep gamma near 1 apart, got {log_decay.dtype}")
    if log_decay.device != q.device:
        raise ValueError(f"q is on {q.device}, but log_decay on {log_decay.device}")
    return log_decay.to(_wide(q))


def _check_state(q: Tensor, v: Tensor, state: Tensor | None, N: int, *, of_ring: bool = False) -> Tensor:
    """Checks the initial state or makes a zero state; float32 (float64 for float64 inputs), of a ring also NARROW.

    Raises:
        ValueError: its shape, dtype or device does not fit q and v.
    """
    expected: tuple[int, ...] = (N, q.shape[-2], q.shape[-1], v.shape[-1])
    if state is None:
        return q.new_zeros(expected, dtype=_wide(q))
    narrow = of_ring and state.dtype in NARROW
    if narrow:
        expected = stored_shape(expected, state.dtype)
    if tuple(state.shape) != expected or not (narrow or state.dtype == _wide(q)):
        raise ValueError(f"state must be {_wide(q)} {list(expected)}, got {state.dtype} {list(state.shape)}")
    if state.device != q.device:
        raise ValueError(f"q is on {q.device}, but state on {state.device}")
    return state


def _wide(q: Tensor) -> torch.dtype:
    """Returns the dtype of states and decays for inputs like q."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> int:
    """Checks cu_seqlens and returns N, the number of sequences. Values are checked on CPUs only, to not wait for a GPU.

    Raises:
        ValueError: the shape or dtype is wrong, B is above 1, or the values do not ascend from 0 to T.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N+1] int32 or int64, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"cu_seqlens packs all sequences into one row: B must be 1, got {B}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_borders(cu_seqlens, T)
    return len(cu_seqlens) - 1
