"""Context parallelism: retention over sequences that P processes share, each holding one piece, in order.

A piece needs only the entering state from the pieces before it, and that state is linear in their contributions:

    S_in(r) = S(r-1) + exp(L(r-1)) S_in(r-1)      S(r): piece r's own state, from a blank start;  L(r): its log decay
    o_i    += scale * exp(G_i) q_i S_in(r)        G_i: log decay from the piece's start up to token i

So one exchange of (S, L) per call is enough: H (K V + 1) numbers from each process at any length, and H K V in the
backward pass. Pieces may differ in length. With packed sequences only a piece's first one may have begun in the piece
before, and only its last may continue in the next; L is -inf if these differ. Source: LASP-2 (arXiv 2502.07563), here
with decays. The sum replaces attention's ring of keys and values, which grows with the length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retentive.ops.backends import Call, exactly

Gather = Callable[[Tensor], Callable[[], Tensor]]
"""Sends a tensor and returns a function that waits for those of all P processes, `[P, …]` in order.

All processes send in the same order. A sent tensor must not change before the wait is over.
"""


def gather_over(group: dist.ProcessGroup) -> Gather:
    """Returns the function by which the processes of a group exchange tensors."""

    def gather(x: Tensor) -> Callable[[], Tensor]:
        found = x.new_empty(group.size(), *x.shape)
        work = dist.all_gather(list(found), x, group=group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return found

        return wait

    return gather


class Piece(NamedTuple):
    """The piece that `retention` calls inside `across` work on."""

    gather: Gather
    rank: int
    continues: Tensor | None


_piece: ContextVar[Piece | None] = ContextVar("retentive.ops.across", default=None)


@contextmanager
def across(gather: Gather, rank: int, continues: Tensor | None) -> Iterator[None]:
    """Makes every `retention` call in the block work on piece `rank` of sequences that several processes share.

    Applies to this thread, and not in compiled graphs. An initial state belongs to the first piece's sequences; for
    other pieces it must be zeros. Calls return the state after this piece.

    Args:
        gather: exchanges tensors between the processes; it must not be differentiable itself.
        continues: bool `[N]`, True for each sequence of the call that continues from the piece before; None for none.
    """
    token = _piece.set(Piece(gather, rank, continues))
    try:
        yield
    finally:
        _piece.reset(token)


def current() -> Piece | None:
    """Returns the piece set by `across`; None in compiled graphs, since Dynamo cannot read context variables."""
    return None if torch.compiler.is_compiling() else _piece.get()


def run(call: Call, piece: Piece, whole: Callable[[Call], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns (o, state) of a piece. `whole` computes a call that is complete in itself.

    Computes the heads in two halves, so that the exchange of the first overlaps with the computation of the second.
    """
    H = call.q.shape[2]
    halves = [slice(0, H // 2), slice(H // 2, H)] if H > 1 else [slice(0, 1)]
    begun = [_begin(_heads(call, half), piece, whole) for half in halves]
    found = [finish() for finish in begun]
    o, state = (torch.cat(parts, axis) for parts, axis in zip(zip(*found, strict=True), (2, 1), strict=True))
    return o, state


def _heads(call: Call, half: slice) -> Call:
    """Returns the call restricted to some of its heads."""
    q, k, v = (x[:, :, half].contiguous() for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v, log_decay=call.log_decay[..., half], state=call.state[:, half].contiguous())


def _begin(
    call: Call, piece: Piece, whole: Callable[[Call], tuple[Tensor, Tensor]]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Computes and sends a piece's contribution; returns a function that waits for the others and gives (o, state)."""
    o, state = whole(call)
    packed = call.cu_seqlens is not None
    # tokens of sequences shared with another piece: in a packed row those of the first sequence, else all
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
        exchange = Exchange(piece)
        sent = _Sent.apply(state[-rows:], handed_BH, exchange)

    def finish() -> tuple[Tensor, Tensor]:
        with exactly(call.q.device):
            entering = _Entering.apply(sent, exchange) * goes_on[:, None, None, None]
            q_BTHK = call.scale * since_BTH.exp()[..., None] * call.q[:, :n].to(state.dtype)
            more = torch.einsum("bthk,bhkv->bthv", q_BTHK, entering).to(o.dtype)
            first = state[:rows] + log_total_BH.exp()[..., None, None] * entering
            return torch.cat((o[:, :n] + more, o[:, n:]), 1), torch.cat((first, state[rows:]))

    return finish


class Exchange:
    """Tensors that one piece exchanges with the others: states in the forward pass, gradients in the backward pass."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.states: Callable[[], Tensor]
        self.gradients: Callable[[], Tensor]
        self.factor_PBH: Tensor
        self.entering: Tensor


class _Sent(torch.autograd.Function):
    """Sends a state and its log decay. Its backward receives the gradients of all pieces' entering states."""

    @staticmethod
    def forward(ctx, state: Tensor, log_decay: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.states = exchange.piece.gather(torch.cat((state.flatten(2), log_decay[..., None]), -1).contiguous())
        return torch.empty_like(state)  # its values are never read; it links `_Entering` to this node

    @staticmethod
    def backward(ctx, _):
        """Reverses the recursion of `_Entering`: needs only the gradient of the state that leaves this piece."""
        exchange = ctx.exchange
        grad_PBHKV, rank = exchange.gradients(), exchange.piece.rank
        leaving = torch.zeros_like(grad_PBHKV[0])
        for r in range(len(grad_PBHKV) - 1, rank, -1):
            leaving = grad_PBHKV[r] + exchange.factor_PBH[r, ..., None, None] * leaving
        return leaving, exchange.factor_PBH[rank] * (exchange.entering * leaving).sum((-1, -2)), None


class _Entering(torch.autograd.Function):
    """Computes the state that enters this piece, `[B,H,K,V]`, from all pieces' states. Backward sends its gradient."""

    @staticmethod
    def forward(ctx, sent: Tensor, exchange: Exchange) -> Tensor:
        found_PBHN = exchange.states()
        factor_PBH = found_PBHN[..., -1].exp()
        entering = torch.zeros_like(sent, memory_format=torch.contiguous_format)
        for own, factor in zip(found_PBHN[: exchange.piece.rank, ..., :-1], factor_PBH, strict=False):
            entering = own.view_as(sent) + factor[..., None, None] * entering
        # detached: a tensor with its graph would keep itself alive through `ctx`
        ctx.exchange, exchange.factor_PBH, exchange.entering = exchange, factor_PBH, entering.detach()
        return entering

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.exchange.gradients = ctx.exchange.piece.gather(grad.contiguous())
        return grad, None
