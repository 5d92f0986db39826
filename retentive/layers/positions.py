"""Positions of a call's tokens: their numbers in the sequence, padding, packing.

Computed once per call from the model's inputs (`lengths`, `cu_seqlens`, the state), and read by every layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Positions of B x T tokens. Padding on either side is not written, does not decay and does not count."""

    of_token: Tensor
    """int64 `[T]` if all rows agree, else `[B,T]`: number of tokens before this one (for padding any >= 0)."""
    valid: Tensor | None
    """bool `[B,T]`, False on padding; None without padding."""
    cu_seqlens: Tensor | None
    """`[N+1]`, borders of N sequences packed into one row; None for one sequence per row."""
    start: Tensor | None
    """int64 `[N]`, number of tokens already in each sequence's state; None for none."""
    end: Tensor
    """int64 `[N]`, position after each sequence's last token."""


def positions_of(
    B: int, T: int, start: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Positions:
    """Computes the positions of B x T tokens.

    Args:
        start: int64 `[N]`, number of tokens already in each sequence's state; None for none.
        lengths: `[B]` valid tokens of each row with padding on the right, or `[B,2]`, (begin, end) of the valid
            tokens; left padding is (T - n, T).
        cu_seqlens: `[N+1]`, with B = 1.

    Raises:
        ValueError: shapes or arguments do not fit together; on CPUs also if values are out of range.
    """
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if start is not None and len(start) != N:
        raise ValueError(f"the state holds {len(start)} sequences, the call has {N}")
    t = torch.arange(T, device=device)
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("cu_seqlens and lengths exclude each other: packed sequences have no padding")
        if B != 1:
            raise ValueError(f"cu_seqlens packs all sequences into one row, got {B} rows")
        cu = cu_seqlens.to(device=device, dtype=torch.int64)
        count = cu.diff()
        if can_be_checked(cu) and not (cu[0] == 0 and cu[-1] == T and bool((count > 0).all())):
            raise ValueError(f"cu_seqlens must ascend from 0 to T = {T}, got {cu.tolist()[:8]}…")
        before = torch.zeros_like(count) if start is None else start
        # output_size: without it repeat_interleave would wait for the GPU to know the sum
        of_token = t - (cu[:-1] - before).repeat_interleave(count, output_size=T)
        return Positions(of_token[None], None, cu_seqlens, start, before + count)
    if lengths is None:
        end = torch.full((B,), T, device=device) if start is None else start + T
        return Positions(t if start is None else start[:, None] + t, None, None, start, end)
    lengths = lengths.to(device=device, dtype=torch.int64)
    if lengths.shape == (B,):
        first, last = torch.zeros_like(lengths), lengths
    elif lengths.shape == (B, 2):
        first, last = lengths.unbind(1)
    else:
        raise ValueError(f"lengths must be [{B}] or [{B}, 2], one row's valid tokens each, got {list(lengths.shape)}")
    if can_be_checked(lengths) and not bool(((first >= 0) & (first <= last) & (last <= T)).all()):
        raise ValueError(f"lengths must lie within the {T} tokens of a row, got {lengths.tolist()}")
    valid = (t >= first[:, None]) & (t < last[:, None])
    before = torch.zeros_like(first) if start is None else start
    of_token = before[:, None] + (t - first[:, None]).clamp(min=0)  # left padding gets 0 instead of negatives
    return Positions(of_token, valid, None, start, before + last - first)


def can_be_checked(x: Tensor) -> bool:
    """True if a tensor's values can be read without waiting for a GPU or breaking a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
