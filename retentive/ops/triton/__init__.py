"""Retention on NVIDIA GPUs in Triton: the interface for `backends.py`.

`triton_retention` and its backward pass are custom operators with the arguments of `blocked`. `refuses` returns why a
call cannot run, `chunk_size` the best chunk length, `decode_step` decodes one token (see `decode.py`). Triton is an
optional dependency, so import this package only when needed.
"""

import torch
import triton
from torch import Tensor

from retentive.ops.blocked import join_passes
from retentive.ops.triton import tiles
from retentive.ops.triton.backward import chunkwise_backward
from retentive.ops.triton.decode import MAX_R, decode_step
from retentive.ops.triton.forward import chunkwise

__all__ = [
    "MAX_R",
    "chunk_size",
    "decode_step",
    "refuses",
    "refuses_shapes",
    "triton_retention",
    "triton_retention_backward",
]

MAX_K, MAX_V = 256, 512
SHORTEST = 16  # rows of the smallest tile that tensor cores accept
MAX_INT = 2**31 - 1


def chunk_size(q: Tensor) -> int:
    """Returns the chunk length of the tile table for tensors like q: the default, and the longest it accepts."""
    return tiles.tiles_for(q).chunk


def refuses(q: Tensor, v: Tensor, chunk_size: int | None = None, sequences: int = 0) -> str | None:
    """Returns why q `[B,T,H,K]` and v `[B,T,H,V]`, with `sequences` packed into them, cannot run; None if they can."""
    if not q.is_cuda or torch.version.hip:
        return f"it needs an NVIDIA GPU, and the tensors are on {q.device}"
    if tiles.device_family(q.get_device()) is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"it has no tiles for compute capability {major}.{minor}"
    return refuses_shapes(q, v, chunk_size, sequences)


def refuses_shapes(q: Tensor, v: Tensor, chunk_size: int | None = None, sequences: int = 0) -> str | None:
    """Returns why q and v cannot run on any supported GPU; None if they can."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 and float16, not {q.dtype}"
    if K > MAX_K or V > MAX_V:
        return f"its heads have K up to {MAX_K} and V up to {MAX_V}, not {K} and {V}"
    if q.element_size() == 2 and (K % 2 or V % 2):
        return f"16-bit heads need even K and V, got {K} and {V}"  # copies of single 16-bit elements were faulty
    longest = tiles.tiles_for(q).chunk
    C = longest if chunk_size is None else chunk_size
    if not SHORTEST <= C <= longest or C & (C - 1):
        return f"chunk_size must be a power of two from {SHORTEST} to {longest} here, got {C}"
    row = tiles.tiles_for(q, C)
    slots, widest = B * triton.cdiv(T, C) + sequences, triton.cdiv(max(K, V), min(row.read.columns, max(K, V)))
    # a grid has at most 2^31 - 1 programs, and offsets inside a tile are int32
    programs = H * max(slots * widest, max(B, sequences) * row.scan.within(K, V).needed(K, V))
    if programs > MAX_INT or B * T > MAX_INT or C * H * max(K, V) > MAX_INT:
        return f"B {B}, T {T} and H {H} are more than its grids and tiles can count"
    return None


@torch.library.custom_op("retentive::triton", mutates_args=())
def triton_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns (o `[B,T,H,V]`, state `[N,H,K,V]`). Arguments as for `blocked`."""
    with torch.cuda.device_of(q):  # Triton launches on the current device, which may differ from q's
        return chunkwise(q, k, v, log_decay, state, cu_seqlens, scale, chunk_size)


@torch.library.custom_op("retentive::triton_backward", mutates_args=())
def triton_retention_backward(
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
    with torch.cuda.device_of(q):
        return chunkwise_backward(do, dstate, q, k, v, log_decay, state, cu_seqlens, scale, chunk_size)


join_passes(triton_retention, triton_retention_backward)
