"""Bidirectional retention, for inputs known as a whole: the causal operator in both directions, minus the diagonal.

    o_n = scale * sum_m exp(log_decay summed over (min(n, m), max(n, m)]) (q_n k_m) v_m        m before and after n

A token's log decay belongs to the gap before it, in either direction, so the mask is symmetric. The cost is linear in
T. Inputs no longer than a chunk, such as a side of a picture, are one product of all pairs, whatever `using` forces.
Over a grid, such as a picture's, the mask decays with the Manhattan distance: first along rows, then along columns
(RMT, arXiv 2309.11523, without its softmax).
"""

from collections.abc import Callable

from torch import Tensor

from retentive.ops.backends import exactly
from retentive.ops.blocked import FORGOTTEN
from retentive.ops.retention import checked, retention

SHORT = 64
"""Number of tokens up to which all pairs cost less than two passes with states."""


def bidirectional(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float | None = None) -> Tensor:
    """Returns `[B,T,H,V]`: each token's output from all tokens.

    Args:
        q, k: `[B,T,H,K]`.
        v: `[B,T,H,V]`.
        log_decay: `[H]`, or `[B,T,H]` for the gap before each token. The first token's value has no effect.
        scale: factor of q; K^-1/2 by default.

    Raises:
        ValueError: the shapes do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] <= SHORT:
        return _all_pairs(q, k, v, checked(q, k, v, log_decay), scale)
    before, _ = retention(q, k, v, log_decay, scale=scale)
    # read from the end, the gap after a token is the gap before it
    gaps = log_decay if log_decay.ndim == 1 else log_decay.roll(-1, 1).flip(1)
    after, _ = retention(q.flip(1), k.flip(1), v.flip(1), gaps, scale=scale)
    own = scale * (q * k).sum(-1, keepdim=True) * v  # counted in both directions
    return before + after.flip(1) - own.to(before.dtype)


def _all_pairs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """Computes it by the definition: scores of every token with every other, as inside a chunk."""
    with exactly(q.device):
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(1, q.shape[1], -1)
        since_BHT = log_decay.clamp(min=FORGOTTEN).cumsum(1).mT
        lag_BHTS = (since_BHT[..., :, None] - since_BHT[..., None, :]).abs()
        q_BHTK, k_BHSK, v_BHSV = (x.transpose(1, 2) for x in (q, k, v))
        score_BHTS = q_BHTK @ k_BHSK.mT * (scale * (-lag_BHTS).exp()).to(q.dtype)
        return (score_BHTS @ v_BHSV).transpose(1, 2)


def over_grid(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, rotated: Callable[[Tensor, int], Tensor] = lambda x, axis: x
) -> Tensor:
    """Returns `[B,*G,H,V]`: bidirectional retention along each axis of a grid G in turn, the last axis first.

    Args:
        q, k: `[B,*G,H,K]`.
        v: `[B,*G,H,V]`. The output along one axis is v of the next.
        log_decay: `[H]`, or `[B,*G,H]` for the gap before each token, the same along every axis.
        rotated: (q or k in rows `[N,T,H,K]` along an axis, that axis' number in G) -> the same, rotated by position.
    """
    grid = q.ndim - 3
    for axis in reversed(range(grid)):
        # the axis moves next to the heads; all other axes become rows of a batch
        q_NTHK, k_NTHK, v_NTHV = (x.movedim(1 + axis, grid) for x in (q, k, v))
        shape = v_NTHV.shape
        q_NTHK, k_NTHK, v_NTHV = (x.reshape(-1, *x.shape[grid:]) for x in (q_NTHK, k_NTHK, v_NTHV))
        gaps = log_decay
        if log_decay.ndim > 1:
            gaps = log_decay.movedim(1 + axis, grid).reshape(-1, *q_NTHK.shape[1:3])
        o_NTHV = bidirectional(rotated(q_NTHK, axis), rotated(k_NTHK, axis), v_NTHV, gaps)
        v = o_NTHV.reshape(shape).movedim(grid, 1 + axis)
    return v
