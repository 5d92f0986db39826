"""Retention in C: the chunkwise computation of `blocked.py`, one head at a time with its state in the CPU's cache.

The files of `c/` are compiled by the machine's compiler at first use and kept in the user's cache. If that fails,
`unavailable()` returns the reason and `auto` uses `blocked`. C is faster for two reasons: its vector code reaches twice
the speed of the BLAS behind torch.matmul on some CPUs, and only q, k, v and o go to memory.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from retentive.ops.blocked import check_borders, refuse_second_derivative
from retentive.ops.compiler import FLAGS, NotBuilt, Source, load
from retentive.ops.ring import Ring

FOLDER = Path(__file__).with_name("c")
UNITS = ("cpu.c", "rows.c", "windows.c")  # for this file, rows.py and windows.py
SOURCE = Source("cpu", tuple(FOLDER / name for name in UNITS), (FOLDER,), (*FLAGS, "-fopenmp"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (*DTYPES, torch.int8)
"""Dtypes of the state of a ring, numbered as `state_dtype` in c/step.c."""
GROUP = 4
"""Chunks per checkpoint, a state that the forward pass keeps for the backward pass."""


def struct(numbers: str, pointers: str, *, real: str = "") -> list[tuple[str, type]]:
    """Returns the fields of a C struct in order: numbers (int64), the field in `real` (double), pointers."""
    return [  # all 8 bytes wide, so that no compiler adds padding
        *((name, ctypes.c_int64) for name in numbers.split()),
        *((name, ctypes.c_double) for name in real.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class Call(ctypes.Structure):
    """struct Call of c/chunks.h."""

    _fields_ = struct(
        "N H K V C group dtype pair per_token threads q_stride k_stride v_stride do_stride",
        "begin first_checkpoint q k v dout log_decay state dstate checkpoints o dq dk dv final dlog_decay dinitial",
        real="scale",
    )


class Step(ctypes.Structure):
    """struct Step of c/step.c."""

    _fields_ = struct(
        "B H K V slots dtype state_dtype threads decay_stride",
        "q k v log_decay state ring_k ring_v o ring_decay written folded",
        real="scale",
    )


@functools.cache
def library() -> ctypes.CDLL | NotBuilt:
    """Returns the compiled library, or the reason why there is none. Tried once per process, even if it failed."""
    return load(SOURCE)


def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Returns the reason why the library cannot be used here, or not for inputs of `dtype`; None if it can."""
    if dtype not in DTYPES:
        return f"it computes in float32 at most, got {dtype}"
    built = library()
    if isinstance(built, NotBuilt):
        return str(built)
    return "its compiler has no float16" if dtype == torch.float16 and not built.has_half() else None


# Dynamo takes the result as a constant of the graph. torch.compiler.assume_constant_result does just this, but calling
# it would import the whole compiler
setattr(unavailable, "_dynamo_marked_constant", True)  # noqa: B010


def _chunks(cu_seqlens: Tensor | None, B: int, T: int, span: int) -> tuple[Tensor, Tensor, int]:
    """Returns each sequence's begin [N+1] and first checkpoint [N], int64, and the largest number of checkpoints."""
    if cu_seqlens is not None:
        check_borders(cu_seqlens, T)  # compiled graphs have not checked it, and C would write past the end
    begin = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    groups = -(-begin.diff() // span)
    # packed: each sequence has at most one group that is not full; the fake operator below must return the same number
    most = B * -(-T // span) if cu_seqlens is None else T // span + len(begin) - 1
    return begin, groups.cumsum(0) - groups, most


def rows_of(x: Tensor) -> Tensor:
    """Returns x [B,T,H,n] with [H,n] contiguous and a constant stride between all B * T tokens, copied if necessary."""
    B, T, H, n = x.shape
    if T == 1:  # the stride of a single token may be anything
        return x.clone(memory_format=torch.contiguous_format)
    even = x.stride(-1) == 1 and (H == 1 or x.stride(2) == n) and (B == 1 or x.stride(0) == T * x.stride(1))
    return x if even else x.contiguous()


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("retention found no memory for its work space")
    if code == 2:
        raise ValueError("log_decay must be at most 0 everywhere, got a larger one, or NaN for a head")


def _run(function: str, **fields) -> None:
    """Runs a function of cpu.c. `fields` keeps the tensors alive until it returns: `Call` holds only addresses."""
    call = Call(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in fields.items()})
    _check(getattr(library(), function)(ctypes.byref(call)))


def _common(q, k, v, log_decay, state, scale, chunk_size, begin, first) -> dict:
    _, _, H, K = q.shape
    return dict(
        N=len(begin) - 1, H=H, K=K, V=v.shape[-1], C=chunk_size, group=GROUP, scale=scale,
        dtype=DTYPES.index(q.dtype), pair=library().can_multiply_pairs() if q.dtype == torch.bfloat16 else 0,
        per_token=int(log_decay.ndim == 3), threads=torch.get_num_threads(), begin=begin, first_checkpoint=first,
        q=q, k=k, v=v, q_stride=q.stride(1), k_stride=k.stride(1), v_stride=v.stride(1),
        log_decay=log_decay.contiguous(), state=state.contiguous(),
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (o `[B,T,H,V]`, state `[N,H,K,V]`, checkpoints). Checkpoints are empty unless `keep`, for a backward."""
    B, T, H, K = q.shape
    begin, first, most = _chunks(cu_seqlens, B, T, chunk_size * GROUP)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    o = torch.empty(v.shape, dtype=v.dtype)
    final, checkpoints = torch.empty(state.shape), torch.empty(most if keep else 0, H, K, v.shape[-1])
    _run(
        "retention_forward", **_common(q, k, v, log_decay, state, scale, chunk_size, begin, first),
        o=o, final=final, checkpoints=checkpoints if keep else None,
    )  # fmt: skip
    return o, final, checkpoints


cpu = torch.library.custom_op("retentive::cpu", forward, mutates_args=())
"""`forward` as a torch operator, visible to autograd, compilers and tracers."""


@torch.library.custom_op("retentive::cpu_backward", mutates_args=())
def cpu_backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of q, k, v, log_decay and the initial state. For log_decay `[H]` the gradient is empty."""
    if not checkpoints.numel():
        raise ValueError("retentive::cpu kept no states for a backward pass: call it with keep=True")
    begin, first, _ = _chunks(cu_seqlens, q.shape[0], q.shape[1], chunk_size * GROUP)
    q, k, v, do = rows_of(q), rows_of(k), rows_of(v), rows_of(do)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dlog_decay = torch.empty(log_decay.shape if log_decay.ndim == 3 else 0)
    dinitial = torch.empty(state.shape)
    _run(
        "retention_backward", **_common(q, k, v, log_decay, state, scale, chunk_size, begin, first),
        dout=do, do_stride=do.stride(1), dstate=dstate.contiguous(), checkpoints=checkpoints,
        dq=dq, dk=dk, dv=dv, dlog_decay=dlog_decay, dinitial=dinitial,
    )  # fmt: skip
    return dq, dk, dv, dlog_decay, dinitial


@cpu.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, scale, chunk_size, keep):
    span, (B, T, H, K) = chunk_size * GROUP, q.shape
    most = B * -(-T // span) if cu_seqlens is None else T // span + cu_seqlens.shape[0] - 1
    checkpoints = state.new_empty(most if keep else 0, H, K, v.shape[-1])
    return v.new_empty(v.shape), state.new_empty(state.shape), checkpoints


@cpu_backward.register_fake
def _(do, dstate, q, k, v, log_decay, state, checkpoints, cu_seqlens, scale, chunk_size):
    dlog_decay = log_decay.new_empty(0 if log_decay.ndim == 1 else log_decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dlog_decay, state.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    *tensors, cu_seqlens, ctx.scale, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, do, dstate, _):
    dq, dk, dv, dlog_decay, dinitial = cpu_backward(do, dstate, *ctx.saved_tensors, ctx.scale, ctx.chunk_size)
    return dq, dk, dv, dlog_decay if ctx.needs_input_grad[3] else None, dinitial, None, None, None, None


cpu.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(cpu_backward)


class Plan:
    """A prepared decode step over one ring: everything that stays the same between tokens is set once.

    For small states, checks and pointers cost more than the step itself (docs/LOG.md). Between two tokens the other
    layers evict a plan from the CPU's caches, so it is small: `__slots__`, no dictionary. The addresses stay valid
    because a ring is frozen. Not thread-safe: threads would share `call`, and ctypes releases the GIL.
    """

    __slots__ = ("call", "decays", "dtype", "pointer", "qk", "scale", "step", "v")

    def __init__(self, ring: Ring):
        B, H, K, V = ring.shape
        self.qk, self.v, self.decays = (
            torch.Size((B, H, K)),
            torch.Size((B, H, V)),
            (torch.Size((H,)), torch.Size((B, H))),
        )
        self.dtype, self.scale = ring.k.dtype, K**-0.5
        self.step, self.call = library().retention_step, Step(
            B, H, K, V, ring.k.shape[2], DTYPES.index(self.dtype),
            STATE_DTYPES.index(ring.state.dtype),
            state=ring.state.data_ptr(), ring_k=ring.k.data_ptr(), ring_v=ring.v.data_ptr(),
            ring_decay=ring.log_decay.data_ptr(), written=ring.written.data_ptr(), folded=ring.folded.data_ptr(),
        )  # fmt: skip
        self.pointer = ctypes.byref(self.call)

    def fits(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> bool:
        """True if `run` can take the arguments as they are. Otherwise the slower path may still accept them."""
        dtype = self.dtype
        return (
            q.shape == self.qk and k.shape == self.qk and v.shape == self.v and log_decay.shape in self.decays
            and q.dtype is dtype and k.dtype is dtype and v.dtype is dtype and log_decay.dtype is torch.float32
            and q.is_cpu and k.is_cpu and v.is_cpu and log_decay.is_cpu
            and q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and log_decay.is_contiguous()
        )  # fmt: skip

    def run(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
        """Puts one token into the ring and returns its `o` `[B,H,V]`. All tensors contiguous on the CPU, see `fits`."""
        call, o = self.call, torch.empty_like(v)
        call.q, call.k, call.v, call.o = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr()
        call.log_decay, call.decay_stride = log_decay.data_ptr(), self.qk[1] if log_decay.ndim == 2 else 0
        call.scale, call.threads = scale, torch.get_num_threads()
        code = self.step(self.pointer)
        if code:
            _check(code)
        return o


def decode_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, ring: Ring) -> Tensor:
    """Decodes one token as `ring.decode_step` does, in one pass over the state.

    Raises:
        ValueError: a log decay is above 0 or NaN.
    """
    if ring.plan is None:
        object.__setattr__(ring, "plan", Plan(ring))  # a ring is frozen; the plan is a cache, not part of its value
    return ring.plan.run(q.contiguous(), k.contiguous(), v.contiguous(), log_decay.contiguous(), scale)
