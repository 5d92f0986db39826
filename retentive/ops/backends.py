"""The backends of retention, what each can do, and which one `auto` takes; the same for a decode step with a ring.

A backend is a row of BACKENDS: a name, a function that says why it cannot take a call (None when it can), the function
itself, and the device that it was written for. A backend named by the caller never falls back; only "auto" chooses.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops import blocked as blocked_module
from retentive.ops import cpu as cpu_module
from retentive.ops import reference
from retentive.ops import ring as ring_module
from retentive.ops.ring import Ring
from retentive.ops.transforms import traced, transformed


class Call(NamedTuple):
    """A checked call of `retention`: every argument given, `state` and `log_decay` in the state's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    state: Tensor
    form: str
    chunk_size: int | None
    cu_seqlens: Tensor | None


class Backend(NamedTuple):
    refuses: Callable[[Call], str | None]
    run: Callable[[Call], tuple[Tensor, Tensor]]
    device: str | None = None
    """The type of device; None for any."""


def exactly(device: torch.device) -> AbstractContextManager:
    """A context without autocast, which would round states to 16 bits; devices that know none (meta) are left alone."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Dynamo of torch 2.9 cannot trace the call: a constant of the graph, in the way that cpu.unavailable is one
setattr(_autocasts, "_dynamo_marked_constant", True)  # noqa: B010


def chunk_size(call: Call) -> int:
    """The chunk length where the caller names none: short for the C x C scores, long for the K x V states."""
    if call.form == "parallel":
        return call.q.shape[1]
    return call.chunk_size or (64 if call.q.shape[-1] <= 64 else 128)


def run_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The page of `reference.py`, in the state's dtype, one packed sequence after the other."""
    form = "chunkwise" if call.form == "auto" else call.form
    extra = {"chunk_size": chunk_size(call)} if form == "chunkwise" else {}
    function = {"recurrent": reference.recurrent, "parallel": reference.parallel, "chunkwise": reference.chunkwise}[
        form
    ]

    def one(q, k, v, log_decay, state):
        q, k, v = (x.to(state.dtype) for x in (q, k, v))
        # the page itself takes no -inf: differences of its sums would be NaN
        log_decay = log_decay.clamp(min=blocked_module.FORGOTTEN)
        return function(q, k, v, log_decay, scale=call.scale, state=state, **extra)

    with exactly(call.q.device):
        if call.cu_seqlens is None:
            o, state = one(call.q, call.k, call.v, call.log_decay, call.state)
            return o.to(call.v.dtype), state
        ends = call.cu_seqlens.tolist()
        parts = []
        for n, (a, b) in enumerate(pairwise(ends)):
            decay = call.log_decay[:, a:b] if call.log_decay.ndim == 3 else call.log_decay
            parts.append(one(call.q[:, a:b], call.k[:, a:b], call.v[:, a:b], decay, call.state[n : n + 1]))
        return torch.cat([o for o, _ in parts], 1).to(call.v.dtype), torch.cat([s for _, s in parts])


def refuses_triton(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the tensors are on {call.q.device}"
    if call.form in ("recurrent", "parallel"):
        return f"it computes the chunkwise form, not the {call.form} one"
    # optional and slow to import, so only where there is a GPU
    if find_spec("triton") is None:
        return "it needs an extra: pip install 'retentive[triton]'"
    from retentive.ops import triton as room

    sequences = 0 if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    return room.refuses(call.q, call.v, call.chunk_size, sequences)


def run_triton(call: Call) -> tuple[Tensor, Tensor]:
    from retentive.ops import triton as room

    C = call.chunk_size or room.chunk_size(call.q)
    return room.triton_retention(call.q, call.k, call.v, per_token(call), call.state, call.cu_seqlens, call.scale, C)


def refuses_cpu(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}"
    if call.form in ("recurrent", "parallel"):
        return f"it computes the chunkwise form, not the {call.form} one"
    if call.chunk_size is not None and (call.chunk_size % 32 or call.chunk_size > 512):
        return f"its chunks are of 32, 64, … 512 tokens, got {call.chunk_size}"
    return cpu_module.unavailable(call.q.dtype)


def run_cpu(call: Call) -> tuple[Tensor, Tensor]:
    """The C code of `cpu.py`, keeping states for a backward pass only where there will be one."""
    tensors = (call.q, call.k, call.v, per_token(call), call.state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # an operator's first call imports Dynamo, which takes a second or two: a model that answers does not wait for it
    run = cpu_module.cpu if keep or traced(call.q) else cpu_module.forward
    o, state, _ = run(*tensors, call.cu_seqlens, call.scale, chunk_size(call), keep)
    return o, state


def per_token(call: Call) -> Tensor:
    """The log decay as the kernels need it: they give a gradient per token only.

    One per head `[H]` that is learned is expanded to `[B,T,H]`, and autograd sums the gradient over B and T.
    """
    learned = call.log_decay.ndim == 1 and call.log_decay.requires_grad
    return call.log_decay.expand(call.q.shape[:3]) if learned else call.log_decay


def refuses_blocked(call: Call) -> str | None:
    if call.form == "recurrent":
        return "it computes chunks, not single tokens (retention_step and the reference backend do)"
    return None


def run_blocked(call: Call) -> tuple[Tensor, Tensor]:
    """`blocked.py`; the parallel form is one chunk as long as the sequence."""
    return blocked_module.blocked(
        call.q, call.k, call.v, per_token(call), call.state, call.cu_seqlens, call.scale, chunk_size(call)
    )


BACKENDS = {
    "triton": Backend(refuses_triton, run_triton, "cuda"),
    "cpu": Backend(refuses_cpu, run_cpu, "cpu"),
    "blocked": Backend(refuses_blocked, run_blocked),
    "reference": Backend(lambda call: None, run_reference),
}


def choose(name: str, call: Call) -> Backend:
    """The named backend, or for "auto" the first of BACKENDS that takes the call.

    Raises:
        ValueError: an unknown name, or a named backend that cannot do this (with its reason).
    """
    if name == "auto":  # there is always one: the reference refuses nothing
        return next(BACKENDS[other] for other in BACKENDS if refuses(other, call) is None)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected auto, {', '.join(BACKENDS)}")
    reason = refuses(name, call)
    if reason:
        raise ValueError(f"backend {name!r} cannot do this: {reason}")
    return BACKENDS[name]


def refuses(name: str, call: Call) -> str | None:
    """Why the backend cannot take the call; None where it can."""
    if name != "reference" and transformed():
        return "torch.func and forward-mode derivatives go through torch's operations, the reference backend, only"
    return BACKENDS[name].refuses(call)


def describe(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that "auto" takes on `device` for q, k and v of `dtype`, in a line, and why no faster one.

    For instance "cpu", or "blocked (cpu, which is faster: no C compiler found (looked for gcc, clang, cc))".
    """
    device = torch.device(device)
    q = torch.empty(1, 64, 1, 64, device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_decay, state = torch.zeros(1, device=device, dtype=wide), torch.zeros(1, 1, 64, 64, device=device, dtype=wide)
    call = Call(q, q, q, log_decay, 1.0, state, "auto", None, None)
    reasons = {name: refuses(name, call) for name in BACKENDS}
    taken = next(name for name, reason in reasons.items() if reason is None)
    for name, backend in BACKENDS.items():
        if backend.device == device.type and reasons[name]:
            return f"{taken} ({name}, which is faster: {reasons[name]})"
    return taken


def decode_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, ring: Ring) -> Tensor:
    """`o` `[B,H,V]` after one more token in the ring, by the fastest code there is for its device and dtype."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace C: an opaque operator, which calls this when the graph runs
        return decode_step_op(
            q, k, v, log_decay, scale, ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded
        )
    if q.device.type == "cpu" and cpu_module.unavailable(q.dtype) is None:
        return cpu_module.decode_step(q, k, v, log_decay, scale, ring)
    if q.is_cuda and find_spec("triton") is not None:
        from retentive.ops import triton as room

        if room.refuses(q[:, None], v[:, None]) is None and ring.k.shape[2] <= room.MAX_R:
            q, k, v, log_decay = q.contiguous(), k.contiguous(), v.contiguous(), log_decay.contiguous()
            parts = (ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded)
            return room.decode_step(q, k, v, log_decay, scale, *parts)
    with exactly(q.device):
        return ring_module.decode_step(q, k, v, log_decay, scale, ring)


@torch.library.custom_op(
    "retentive::decode_step", mutates_args=("state", "ring_k", "ring_v", "ring_decay", "written", "folded")
)
def decode_step_op(
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
    """`decode_step` as one node of a compiled graph; the new Ring is made of the same tensors, not of copies."""
    return decode_step(q, k, v, log_decay, scale, Ring(state, ring_k, ring_v, ring_decay, written, folded))


@decode_step_op.register_fake
def _(q, k, v, log_decay, scale, state, ring_k, ring_v, ring_decay, written, folded):
    return v.new_empty(v.shape)
