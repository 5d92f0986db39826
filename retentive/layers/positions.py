"""The positions of the tokens of a call: which number each has in its sequence, which are padding, what is packed.

Computed once a call from what the model was given (`lengths`, `cu_seqlens`, the state), and read by every layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Positions of B x T tokens. Padding is not written, does not decay and does not count, on whichever side it is."""

    of_token: Tensor
    """int64 `[T]` where all rows agree, else `[B,T]`: tokens of its sequence before this one (padding: any >= 0)."""
    valid: Tensor | None
    """bool `[B,T]`, False on padding; None where there is none."""
    cu_seqlens: Tensor | None
    """`[N+1]`, where the N sequences packed into one row begin, and where the last ends; None for one a row."""
    start: Tensor | None
    """int64 `[N]`, tokens that each sequence's state holds already; None for none."""
    end: Tensor
    """int64 `[N]`, the position after each sequence's last token."""


def positions_of(
    B: int, T: int, start: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Positions:
    """The positions of B x T tokens.

    Args:
        start: int64 `[N]`, tokens that each sequence's state holds already; None for none.
        lengths: `[B]` valid tokens of each row, padding on the right; or `[B,2]`, (begin, end) of the valid tokens,
            so that left padding is (T - n, T).
        cu_seqlens: `[N+1]`, with B = 1.

    Raises:
        ValueError: shapes or arguments that do not fit together; on the CPU also values that are out of range.
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
        # output_size: without it repeat_interleave would wait for the GPU to learn how many there are
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
    of_token = before[:, None] + (t - first[:, None]).clamp(min=0)  # left padding: 0 rather than below it
    return Positions(of_token, valid, None, start, before + last - first)


def can_be_checked(x: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a GPU, or breaking a graph that is being compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
