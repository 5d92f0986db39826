"""Retention in its three forms, with one signature and the same results: the definition, on one page.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

q, k [B,T,H,K]   v, o [B,T,H,V]   log_decay [H] or [B,T,H], <= 0   state S [B,H,K,V]

Source: Retentive Network, arXiv 2307.08621, equations 5 (parallel), 6 (recurrent) and 7 (chunkwise).
"""

import torch
from torch import Tensor


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Recurrent form, token by token: O(T) work, O(1) memory. This is the definition."""
    gamma_BTH = log_decay.exp().expand(q.shape[:3])
    o = []
    for t in range(q.shape[1]):
        state = gamma_BTH[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(o, 1), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Parallel form, all tokens at once: O(T^2). Attention with a fixed decay mask instead of the softmax."""
    since_BTH = log_decay.expand(q.shape[:3]).cumsum(1)  # log decay from before the first token to token t
    lag_BTSH = since_BTH[:, :, None] - since_BTH[:, None, :]
    future_TS = torch.ones(lag_BTSH.shape[1:3], dtype=torch.bool, device=q.device).triu(1)
    # masked before exp: exp of a large positive lag would be inf, and inf * 0 is nan
    decay_BTSH = lag_BTSH.masked_fill(future_TS[None, :, :, None], -torch.inf).exp()
    o = torch.einsum("bthk,bshk,btsh,bshv->bthv", q, k, decay_BTSH, v)
    o = o + torch.einsum("bthk,bhkv,bth->bthv", q, state, since_BTH.exp())
    to_end_BTH = (since_BTH[:, -1:] - since_BTH).exp()
    state = since_BTH[:, -1].exp()[..., None, None] * state
    return scale * o, state + torch.einsum("bthk,bth,bthv->bhkv", k, to_end_BTH, v)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Chunkwise form, parallel inside a chunk, recurrent between chunks: O(T C). The last chunk may be shorter."""
    o = []
    for t in range(0, q.shape[1], chunk_size):
        c = slice(t, t + chunk_size)
        decay = log_decay[:, c] if log_decay.ndim == 3 else log_decay
        o_c, state = parallel(q[:, c], k[:, c], v[:, c], decay, scale=scale, state=state)
        o.append(o_c)
    return torch.cat(o, 1), state


def bidirectional(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float) -> Tensor:
    """Retention over all pairs of tokens. A log decay belongs to the gap before its token, in either direction."""
    since_BTH = log_decay.expand(q.shape[:3]).cumsum(1)
    decay_BTSH = (since_BTH[:, :, None] - since_BTH[:, None, :]).abs().neg().exp()
    return scale * torch.einsum("bthk,bshk,btsh,bshv->bthv", q, k, decay_BTSH, v)
