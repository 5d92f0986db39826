"""Backends of retention: what each supports, and which one "auto" picks. Also for a decode step with a ring.

A backend is a row of BACKENDS: its name, a function that returns the reason why it cannot run a call (None if it can),
the function that runs it, and the device it was written for. A backend named by the caller never falls back.
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
    """A checked call of `retention`: all arguments set, `state` and `log_decay` in the state's dtype."""

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
    """Device type; None for any."""


def exactly(device: torch.device) -> AbstractContextManager:
    """Returns a context without autocast, which would round states to 16 bits. Does nothing on devices without it."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Dynamo of torch 2.9 cannot trace the call, so its result is a constant of the graph, as for cpu.unavailable
setattr(_autocasts, "_dynamo_marked_constant", True)  # noqa: B010


def chunk_size(call: Call) -> int:
    """Returns the default chunk length: short favours the C x C scores, long the K x V states."""
    if call.form == "parallel":
        return call.q.shape[1]
    return call.chunk_size or (64 if call.q.shape[-1] <= 64 else 128)


def run_reference(call: Call) -> tuple[Tensor, Tensor]:
    """Runs `reference.py` in the state's dtype, one packed sequence after the other."""
    form = "chunkwise" if call.form == "auto" else call.form
    extra = {"chunk_size": chunk_size(call)} if form == "chunkwise" else {}
    function = {"recurrent": reference.recurrent, "parallel": reference.parallel, "chunkwise": reference.chunkwise}[
        form
    ]

    def one(q, k, v, log_decay, state):
        q, k, v = (x.to(state.dtype) for x in (q, k, v))
        # reference.py accepts no -inf: differences of its sums would be NaN
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
    # optional and slow to import, so imported on GPUs only
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
    """Runs the C code of `cpu.py`. Keeps states for a backward pass only if there will be one."""
    tensors = (call.q, call.k, call.v, per_token(call), call.state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # an operator's first call imports Dynamo, one or two seconds that inference should not wait for
    run = cpu_module.cpu if keep or traced(call.q) else cpu_module.forward
    o, state, _ = run(*tensors, call.cu_seqlens, call.scale, chunk_size(call), keep)
    return o, state


def per_token(call: Call) -> Tensor:
    """Returns the log decay as the kernels need it, since they compute a gradient per token only.

    A learned `[H]` is expanded to `[B,T,H]`, and autograd sums the gradient over B and T.
    """
    learned = call.log_decay.ndim == 1 and call.log_decay.requires_grad
    return call.log_decay.expand(call.q.shape[:3]) if learned else call.log_decay


def refuses_blocked(call: Call) -> str | None:
    if call.form == "recurrent":
        return "it computes chunks, not single tokens (retention_step and the reference backend do)"
    return None


def run_blocked(call: Call) -> tuple[Tensor, Tensor]:
    """Runs `blocked.py`. The parallel form is one chunk as long as the sequence."""
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
    """Returns the named backend, or for "auto" the first of BACKENDS that can run the call.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run the call (with the reason).
    """
    if name == "auto":  # always finds one: the reference refuses nothing
        return next(BACKENDS[other] for other in BACKENDS if refuses(other, call) is None)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected auto, {', '.join(BACKENDS)}")
    reason = refuses(name, call)
    if reason:
        raise ValueError(f"backend {name!r} cannot do this: {reason}")
    return BACKENDS[name]


def refuses(name: str, call: Call) -> str | None:
    """Returns the reason why the backend cannot run the call; None if it can."""
    if name != "reference" and transformed():
        return "torch.func and forward-mode derivatives go through torch's operations, the reference backend, only"
    return BACKENDS[name].refuses(call)


def describe(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Describes in one line the backend that "auto" picks for q, k, v of `dtype` on `device`, and why no faster one.

    Examples: "cpu", or "blocked (cpu, which is faster: no C compiler found (looked for gcc, clang, cc))".
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
    """Puts one token into the ring and returns `o` `[B,H,V]`, by the fastest code for its device and dtype."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace C: use an opaque operator, which calls this at run time
        return decode_step_op(
            q, k, v, log_decay, scale, ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded
        )
    if q.device.type == "cpu" and cpu_module.unavailable(q.dtype) is None:
        return cpu_module.decode_step(q, k, v, log_decay, scale, ring)
    if q.is_cuda and find_spec("triton") is not None:
        from retentive.ops import triton as room

        fits = ring.state.dtype == torch.float32 and ring.k.shape[2] <= room.MAX_R
        if fits and room.refuses(q[:, None], v[:, None]) is None:
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
    """`decode_step` as one node of a compiled graph. The new Ring shares its tensors, it does not copy them."""
    return decode_step(q, k, v, log_decay, scale, Ring(state, ring_k, ring_v, ring_decay, written, folded))


@decode_step_op.register_fake
def _(q, k, v, log_decay, scale, state, ring_k, ring_v, ring_decay, written, folded):
    return v.new_empty(v.shape)
