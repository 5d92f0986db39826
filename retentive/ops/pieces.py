"""Context parallelism: retention over sequences of which each of P processes holds a piece, in order.

A piece needs nothing of those before it but the state that enters it, which is linear in what they add:

    S_in(r) = S(r-1) + exp(L(r-1)) S_in(r-1)      S(r): piece r's own state, from a blank start;  L(r): its log decay
    o_i    += scale * exp(G_i) q_i S_in(r)        G_i: log decay from the piece's start up to token i

So one exchange of (S, L) a call is all, H (K V + 1) numbers from each process whatever the length, and one of H K V in
the backward pass. Pieces may have different lengths. Of packed sequences only a piece's first one can have begun in the
piece before, and only its last goes on in the next: L is -inf where these are not the same one. Source: LASP-2 (arXiv
2502.07563), here with decays. The sum replaces attention's ring of keys and values, which grows with the length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops.backends import Call, exactly

Gather = Callable[[Tensor], Tensor]
"""A tensor to those of all P processes, `[P, …]` in order; every process calls it at the same time."""


class Piece(NamedTuple):
    """Which piece the calls inside `across` are of."""

    gather: Gather
    rank: int
    continues: Tensor | None


_piece: ContextVar[Piece | None] = ContextVar("retentive.ops.across", default=None)


@contextmanager
def across(gather: Gather, rank: int, continues: Tensor | None) -> Iterator[None]:
    """Every `retention` call inside is of piece `rank` of sequences that several processes hold.

    It holds for this thread, and not in compiled graphs. A state that is given is that of the first piece's sequences;
    those of other pieces must be zeros. What comes back is the state after this piece.

    Args:
        gather: how processes exchange tensors; it must have no gradient of its own.
        continues: bool `[N]`, which of the call's sequences go on from the piece before; None for none.
    """
    token = _piece.set(Piece(gather, rank, continues))
    try:
        yield
    finally:
        _piece.reset(token)


def current() -> Piece | None:
    """What `across` says here. Compiled graphs take no notice: Dynamo can read no context variable."""
    return None if torch.compiler.is_compiling() else _piece.get()


def run(call: Call, piece: Piece, whole: Callable[[Call], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(o, state) of a piece; `whole` computes a call that is complete in itself."""
    o, state = whole(call)
    packed = call.cu_seqlens is not None
    # tokens of the sequences that another piece may hold a part of: of a packed row the first, else of all rows
    n = int(call.cu_seqlens[1]) if call.cu_seqlens is not None else call.q.shape[1]
    rows = 1 if packed else len(state)
    with exactly(call.q.device):
        if call.log_decay.ndim == 3:
            since_BTH = call.log_decay[:, :n].cumsum(1)
        else:
            since_BTH = torch.arange(1, n + 1, device=call.q.device)[None, :, None] * call.log_decay
        log_total_BH = since_BTH[:, -1].expand(rows, -1)
        goes_on = log_total_BH.new_zeros(rows) if piece.continues is None else piece.continues[:rows].to(state.dtype)
        only = not packed or len(state) == 1
        handed_BH = log_total_BH + (goes_on.log()[:, None] if only else -torch.inf)
        entering = Entering.apply(state[-rows:], handed_BH, piece.gather, piece.rank)
        entering = entering * goes_on[:, None, None, None]
        q_BTHK = call.scale * since_BTH.exp()[..., None] * call.q[:, :n].to(state.dtype)
        more = torch.einsum("bthk,bhkv->bthv", q_BTHK, entering).to(o.dtype)
        o = torch.cat((o[:, :n] + more, o[:, n:]), 1)
        first = state[:rows] + log_total_BH.exp()[..., None, None] * entering
        return o, torch.cat((first, state[rows:]))


class Entering(torch.autograd.Function):
    """The state that enters this piece, `[B,H,K,V]`, from the own states and log decays of all pieces."""

    @staticmethod
    def forward(ctx, state: Tensor, log_decay: Tensor, gather: Gather, rank: int) -> Tensor:
        sent = torch.cat((state.flatten(2), log_decay[..., None]), -1)
        found_PBHN = gather(sent.contiguous())
        factor_PBH = found_PBHN[..., -1].exp()
        entering = torch.zeros_like(state, memory_format=torch.contiguous_format)
        for own, factor in zip(found_PBHN[:rank, ..., :-1], factor_PBH, strict=False):
            entering = own.view_as(state) + factor[..., None, None] * entering
        ctx.save_for_backward(factor_PBH, entering)
        ctx.gather, ctx.rank = gather, rank
        return entering

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The same recursion from the other end; the gradient of what leaves this piece is all that it needs."""
        factor_PBH, entering = ctx.saved_tensors
        grad_PBHKV = ctx.gather(grad.contiguous())
        leaving = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        for r in range(len(grad_PBHKV) - 1, ctx.rank, -1):
            leaving = grad_PBHKV[r] + factor_PBH[r, ..., None, None] * leaving
        return leaving, factor_PBH[ctx.rank] * (entering * leaving).sum((-1, -2)), None, None
