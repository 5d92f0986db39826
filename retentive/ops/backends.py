"""Which code can compute retention, what each can do, and the one that `auto` takes.

A backend is a row of BACKENDS: a name, a function that says why it cannot take a call (None when it can), and the
function itself. A backend named by the caller never falls back; only "auto" chooses.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops import blocked as blocked_module
from retentive.ops import reference


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


def exactly(device: torch.device) -> AbstractContextManager:
    """No autocast; devices that have none, such as meta, are left alone."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


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


def refuses_blocked(call: Call) -> str | None:
    if call.form == "recurrent":
        return "it computes chunks, not single tokens (retention_step and the reference backend do)"
    return None


def run_blocked(call: Call) -> tuple[Tensor, Tensor]:
    """`blocked.py`; the parallel form is one chunk as long as the sequence."""
    log_decay = call.log_decay
    if log_decay.ndim == 1 and log_decay.requires_grad:  # its backward knows per-token decays; autograd sums them up
        log_decay = log_decay.expand(call.q.shape[:3])
    return blocked_module.blocked(
        call.q, call.k, call.v, log_decay, call.state, call.cu_seqlens, call.scale, chunk_size(call)
    )


BACKENDS = {
    "blocked": Backend(refuses_blocked, run_blocked),
    "reference": Backend(lambda call: None, run_reference),
}


def choose(name: str, call: Call) -> Backend:
    """The named backend, or for "auto" the first of BACKENDS that takes the call.

    Raises:
        ValueError: an unknown name, or a named backend that cannot do this (with its reason).
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.refuses(call) is None)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].refuses(call)
    if reason:
        raise ValueError(f"backend {name!r} cannot do form={call.form!r}: {reason}")
    return BACKENDS[name]
