"""Causal softmax attention, to all tokens or a window, with an optional forget gate, on CPUs in C.

    s_ij = scale * q_i k_j + log f_{j+1} + … + log f_i      i - W < j <= i        o_i = sum_j softmax_j(s_i) v_j

`c/windows.c` computes it for packed sequences too, and windows in time linear in the length. PyTorch's SDPA has no
windows: with a mask it computes twice as many scores. For all tokens it is 2 to 3 times slower (docs/LOG.md).
`layers/attention.py` uses C where `compiled` says so, and SDPA otherwise: without a compiler, on other devices, in
float64, under torch.func, and in graphs that are traced or compiled.
"""

import ctypes

import torch
from torch import Tensor

from retentive.ops.cpu import DTYPES, library, rows_of, struct, unavailable
from retentive.ops.transforms import traced, transformed

CHUNK = 64
"""Queries of a block, and keys of a chunk."""


class Call(ctypes.Structure):
    """struct Call of c/windows.c."""

    _fields_ = struct(
        "N H G K W C dtype pair threads q_stride k_stride v_stride do_stride",
        "begin q k v dout log_f lse o dq dk dv dlog_f",
        real="scale",
    )


def compiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if `attend` can compute these."""
    if traced(q) or transformed() or not q.numel():
        return False
    return all(x.device.type == "cpu" and x.dtype == q.dtype for x in (q, k, v)) and unavailable(q.dtype) is None


def attend(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, window: int, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Returns o `[B,T,H,K]`, in the dtype of q: float32, bfloat16 or float16.

    Args:
        q: `[B,T,H,K]`.
        k, v: `[B,T,h,K]`, H a multiple of h. Heads h n to h n + n - 1 of q share head h.
        log_f: `[B,T,H]` float32, at most 0. None: nothing is forgotten.
        window: number of tokens that each sees, itself included.
        cu_seqlens: `[N+1]`, borders of sequences packed into one row. None: each row is one.

    Raises:
        ValueError: cu_seqlens does not ascend from 0 to T.
        MemoryError: there is no memory for the work space of a thread.
    """
    B, T = q.shape[:2]
    begin = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    if begin[0] != 0 or begin[-1] != B * T or bool((begin.diff() < 0).any()):  # C would write past the end
        raise ValueError(f"cu_seqlens must ascend from 0 to T = {T}, got {begin.tolist()[:8]}…")
    log_f = None if log_f is None else log_f.flatten(0, 1).t().float().contiguous()
    return _Attend.apply(q, k, v, log_f, begin, min(window, T), scale)


class _Attend(torch.autograd.Function):
    """`attend`, with log_f `[H, B T]` and each sequence's first token `[N+1]`."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, begin: Tensor, window: int, scale: float
    ) -> Tensor:
        B, T, H, _ = q.shape
        q, k, v = rows_of(q), rows_of(k), rows_of(v)
        # log of the sum of exp(s) of each row, for the backward pass
        lse = torch.empty(H, B * T, dtype=torch.float32) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(q, k, v, log_f, begin, lse)
        ctx.window, ctx.scale, o = window, scale, torch.empty(q.shape, dtype=q.dtype)
        _run(q, k, v, window, scale, log_f=log_f, begin=begin, lse=lse, o=o)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor):
        q, k, v, log_f, begin, lse = ctx.saved_tensors
        do, (dq, dk, dv) = rows_of(do), (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        dlog_f = torch.zeros_like(log_f) if ctx.needs_input_grad[3] else None
        _run(
            q, k, v, ctx.window, ctx.scale, do.stride(1),
            log_f=log_f, begin=begin, lse=lse, dout=do, dq=dq, dk=dk, dv=dv, dlog_f=dlog_f,
        )  # fmt: skip
        return dq, dk, dv, dlog_f, None, None, None


def _run(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, do_stride: int = 0, **tensors: Tensor | None
) -> None:
    """Runs windows.c, backward if `dout` is among the tensors."""
    (H, K), h, begin = q.shape[2:], k.shape[2], tensors["begin"]
    assert begin is not None
    call = Call(
        len(begin) - 1, h, H // h, K, window, CHUNK, DTYPES.index(q.dtype),
        library().can_multiply_pairs() if q.dtype == torch.bfloat16 else 0, torch.get_num_threads(),
        q.stride(1), k.stride(1), v.stride(1), do_stride, scale, q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
    )  # fmt: skip
    if library().windows(ctypes.byref(call)):
        raise MemoryError("attention to a window found no memory for its work space")
