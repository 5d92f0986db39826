"""Rivals of `bench retention`: our operator with its chosen backend and in plain torch, and other implementations.

    retentive    retention(..., backend="auto")                       q, k [B,T,H,K], v [B,T,H,V]
    blocked      retention(..., backend="blocked")                    the same
    torchscale   its chunkwise algorithm, microsoft/torchscale        q, k [B,H,T,K], v [B,T,H V]
    sdpa         causal attention of torch, as many heads and numbers [B,H,T,(K+V)/2]
    fla          chunk_retention of fla-org/flash-linear-attention    as ours; NVIDIA GPUs only

Each gets tensors in the layout that it is fastest with, and the decays of the paper: torchscale and fla have no others.
"""

import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lab.roofline import Work
from retentive.ops import backends, retention
from retentive.ops.decay import log_decay

OURS = {"retentive": "auto", "blocked": "blocked"}
"""Our own rivals, and the `backend` of each."""
OTHERS = ("torchscale", "sdpa", "fla")
CHUNKS = (64, 128, 256, 512)
"""Chunk lengths to try with torchscale."""


@dataclass(frozen=True)
class Rival:
    """A function of q, k, v for one Work."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of q, k, v and o."""
    flops: Callable[[Work], int]
    """FLOPs of forward and backward passes for any length, to estimate the time of a long pass."""
    backend: str
    """The code that computes it, for the table."""
    chunk: int | None = None


def missing(rival: str, device: torch.device) -> str | None:
    """Reason why the rival cannot run here, or None."""
    if rival == "fla" and device.type != "cuda":
        return "needs a GPU"
    package = {"torchscale": "torchscale", "fla": "fla"}.get(rival)
    return None if package is None or importlib.util.find_spec(package) else "not installed"


def version(rival: str) -> str:
    """Version of the rival's package; "?" if it is not installed as a package."""
    try:
        return importlib.metadata.version({"sdpa": "torch", "fla": "flash-linear-attention"}.get(rival, rival))
    except importlib.metadata.PackageNotFoundError:
        return "?"


def make(name: str, work: Work, chunk: int | None = None) -> Rival:
    """The rival of that name for `work`; `chunk` is torchscale's."""
    B, H, K, V, T, device = work.B, work.H, work.K, work.V, work.T, torch.device(work.device)
    tokens_first = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, V))
    if name in OURS:
        backend, C = taken(work, OURS[name])
        decays = log_decay("paper", H, device=device)
        return Rival(
            lambda q, k, v: retention(q, k, v, decays, backend=OURS[name])[0],
            tokens_first, lambda w: w.flops(C, backward=True), backend, C,
        )  # fmt: skip
    if name == "torchscale":
        if chunk is None:
            raise ValueError("torchscale needs the length of its chunks")
        shapes = ((B, H, T, K), (B, H, T, K), (B, T, H * V), (B, T // chunk, chunk, H, V))
        return Rival(
            torchscale(work, chunk), shapes, lambda w: w.flops(chunk, backward=True), "torchscale, chunkwise", chunk
        )
    # heads of (K + V) / 2, so that it reads and writes as many numbers as retention
    if name == "sdpa":
        return Rival(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            ((B, H, T, work.attention_dim),) * 4, lambda w: w.attention_flops(backward=True), "torch attention",
        )  # fmt: skip
    # imported here: only machines with an NVIDIA GPU have it
    from fla.ops.retention import chunk_retention

    # older versions expect [B,H,T,n] unless head_first is false; newer ones have no such argument
    layout = {"head_first": False} if "head_first" in inspect.signature(chunk_retention).parameters else {}
    return Rival(
        lambda q, k, v: chunk_retention(q, k, v, **layout)[0],
        tokens_first, lambda w: w.flops(64, backward=True), "chunk_retention of fla", None,
    )  # fmt: skip


def taken(work: Work, name: str) -> tuple[str, int]:
    """(backend, chunk length) that `backend=name` resolves to for this work."""
    q, v = (torch.empty(1, 1, work.H, n, dtype=work.torch_dtype, device=work.device) for n in (work.K, work.V))
    # the choice looks at shapes, dtypes and devices only: expanded and meta tensors have those and take no memory
    q, v = (x.expand(work.B, work.T, *x.shape[2:]) for x in (q, v))
    state = torch.empty(work.B, work.H, work.K, work.V, device="meta")
    call = backends.Call(q, q, v, log_decay("paper", work.H, device=q.device), 1.0, state, "auto", None, None)
    chosen = backends.choose(name, call)
    found = next(name for name, backend in backends.BACKENDS.items() if backend is chosen)
    # Triton's chunk is its own, and lies beside its kernels
    if found == "triton":
        from retentive.ops import triton

        return found, min(triton.chunk_size(q), work.T)
    return found, min(backends.chunk_size(call), work.T)


def torchscale(work: Work, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torchscale's chunkwise algorithm: (q, k, v) -> o `[B,T/C,C,H,V]`, each row divided by a positive number.

    The method is called without its layer: it needs three numbers of `self`, and the decays come from a formula.
    """
    from torchscale.component.multiscale_retention import MultiScaleRetention

    layer = SimpleNamespace(num_heads=work.H, key_dim=work.K, head_dim=work.V)
    decays = torchscale_decays(work.H, chunk, work.torch_dtype, torch.device(work.device))
    return lambda q, k, v: MultiScaleRetention.chunk_recurrent_forward(layer, q, k, v, decays)


def torchscale_decays(
    H: int, C: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays that torchscale's RetNetRelPos gives to its chunkwise algorithm. For a head's gamma and i, j < C:

    inside a chunk   gamma^(i-j) / sqrt(r_i)         r_i = 1 + gamma + … + gamma^i, the row's sum
    chunk to chunk   gamma^C
    of a query       gamma^(i+1) r_C / sqrt(r_i)     r_C the last row's
    of a value       gamma^(C-1-j) / r_C
    """
    log_H = log_decay("paper", H, dtype=torch.float64)
    i = torch.arange(C, dtype=torch.float64)
    future = i[:, None] < i
    powers_HCC = (log_H[:, None, None] * (i[:, None] - i)).masked_fill(future, -math.inf).exp()
    row_HC1 = powers_HCC.sum(-1, keepdim=True)
    last_H11 = row_HC1[:, -1:]
    inside = powers_HCC / row_HC1.sqrt()
    across = (log_H * C).exp()[:, None, None]
    query = (log_H[:, None] * (i + 1)).exp()[..., None] * last_H11 / row_HC1.sqrt()
    value = powers_HCC[:, -1, :, None] / last_H11
    inside, across, query, value = (x.to(device=device, dtype=dtype) for x in (inside, across, query, value))
    return inside, across, query, value
