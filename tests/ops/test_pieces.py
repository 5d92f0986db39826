"""A sequence in pieces equals the whole, in outputs, states and all gradients; the exchange between the pieces.

Threads stand for processes and exchange tensors through a list; `tests/train/test_parallel.py` uses real processes.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from retentive.ops import across, retention, using
from retentive.ops.pieces import Exchange

H, K, V = 3, 4, 6


class Group:
    """Threads that exchange tensors and count the numbers each sends."""

    def __init__(self, size: int):
        self.parts: list[list[Tensor]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=60)
        self.sent: list[list[int]] = [[] for _ in range(size)]
        self.events: list[list[str]] = [[] for _ in range(size)]

    def gather_of(self, rank: int):
        def gather(x: Tensor):
            self.sent[rank].append(x.numel())
            at = len(self.sent[rank]) - 1
            self.parts[rank].append(x)
            self.events[rank].append(f"send {at}")

            def wait() -> Tensor:
                self.events[rank].append(f"wait {at}")
                self.barrier.wait()  # all threads wait for the same exchange, in the same order
                return torch.stack([parts[at] for parts in self.parts])

            return wait

        return gather


def inputs(B: int, T: int, per_token: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, H, n, generator=g, dtype=torch.float64) for n in (K, K, V))
    decay = -torch.rand(*((B, T, H) if per_token else (H,)), generator=g, dtype=torch.float64) / 4
    return [x.requires_grad_() for x in (q, k, v, decay)]


def in_pieces(x: list[Tensor], ends: list[int], starts: list[int] | None, do: Tensor, backend: str):
    """Returns (o, gradients of x, the last piece's final state, the group); each thread computes one piece."""
    group = Group(len(ends) - 1)

    def piece(rank: int):
        begin, end = ends[rank], ends[rank + 1]
        q, k, v, decay = (y.detach()[:, begin:end] if y.ndim > 1 else y.detach() for y in x)
        q, k, v, decay = (y.clone().requires_grad_() for y in (q, k, v, decay))
        cu_seqlens, continues = None, torch.full((q.shape[0],), rank > 0)
        if starts is not None:
            inner = [s - begin for s in starts if begin < s < end]
            cu_seqlens = torch.tensor([0, *inner, end - begin])
            continues = torch.tensor([begin not in starts, *[False] * len(inner)])
        with across(group.gather_of(rank), rank, continues), using(backend=backend):
            o, state = retention(q, k, v, decay, cu_seqlens=cu_seqlens)
        o.backward(do[:, begin:end])
        return o.detach(), [y.grad for y in (q, k, v, decay)], state.detach()

    with ThreadPoolExecutor(len(ends) - 1) as pool:
        found = list(pool.map(piece, range(len(ends) - 1)))
    gradients = []
    for i, whole in enumerate(x):
        parts = [gradient[i] for _, gradient, _ in found]
        gradients.append(torch.cat(parts, 1) if whole.ndim > 1 else sum(parts))
    return torch.cat([o for o, _, _ in found], 1), gradients, found[-1][2], group


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
@pytest.mark.parametrize(
    ("B", "ends", "starts"),
    [
        (2, [0, 5, 10, 15, 20], None),
        (2, [0, 1, 12, 13], None),
        (1, [0, 7, 14, 20], [0, 3, 9, 17]),
        (1, [0, 7, 14, 20], [0, 7, 16]),
        (1, [0, 6, 7, 20], [0, 2]),
        (1, [0, 10, 20], [0, 10]),
    ],
    ids=["even", "uneven", "packed", "a-border-at-a-start", "one-sequence-through-all", "nothing-crosses"],
)
def test_pieces_are_the_whole(B, ends, starts, per_token, backend, same):
    x = inputs(B, ends[-1], per_token)
    do = torch.randn(B, ends[-1], H, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cu_seqlens = None if starts is None else torch.tensor([*starts, ends[-1]])
    with using(backend="reference"):
        o, state = retention(*x, cu_seqlens=cu_seqlens)
    o.backward(do)
    found, gradients, last, _ = in_pieces(x, ends, starts, do, backend)
    # sums in another order: float64 rounding of a few dozen terms
    same(found, o.detach(), 1e-12)
    same(gradients, [y.grad for y in x], 1e-12)
    same(last[-1:] if starts else last, state.detach()[-1:] if starts else state.detach(), 1e-12)


def test_what_is_exchanged_does_not_grow_with_the_length():
    for T in (40, 400):
        x = inputs(2, T, True)
        *_, group = in_pieces(x, [0, T // 4, T // 2, T], None, torch.ones(2, T, H, V, dtype=torch.float64), "blocked")
        # forward: states and one log decay per head; backward: gradients of states; one half of the heads first
        few, many = H // 2, H - H // 2
        assert group.sent == [[2 * few * (K * V + 1), 2 * many * (K * V + 1), 2 * many * K * V, 2 * few * K * V]] * 3


def test_half_of_the_heads_is_computed_while_the_others_travel():
    """The first exchange is waited for after the second has been sent, in both directions."""
    x = inputs(2, 12, True)
    *_, group = in_pieces(x, [0, 5, 12], None, torch.ones(2, 12, H, V, dtype=torch.float64), "blocked")
    forward, backward = ["send 0", "send 1", "wait 0", "wait 1"], ["send 2", "send 3", "wait 2", "wait 3"]
    assert group.events == [forward + backward] * 2


def test_nothing_of_an_exchange_is_kept():
    """The tensors of an exchange are part of autograd graphs: a reference cycle there is never freed."""
    x = inputs(1, 12, False)
    in_pieces(x, [0, 5, 12], None, torch.ones(1, 12, H, V, dtype=torch.float64), "blocked")
    gc.collect()
    assert not any(type(x) is Exchange for x in gc.get_objects())


def test_one_head_has_no_other_half(same):
    x = [y[..., :1, :].detach() for y in inputs(1, 12, False)[:3]] + [torch.tensor([-0.1], dtype=torch.float64)]
    x = [y.requires_grad_() for y in x]
    do = torch.ones(1, 12, 1, V, dtype=torch.float64)
    with using(backend="blocked"):
        o, _ = retention(*x)
    found, *_ = in_pieces(x, [0, 5, 12], None, do, "blocked")
    same(found, o.detach(), 1e-12)


def test_a_decay_of_nothing_lets_nothing_through(same):
    """With log gamma = -inf at a token neither the state nor a NaN passes, in values and gradients."""
    x = inputs(1, 12, True)
    with torch.no_grad():
        x[3][:, 5] = -torch.inf
    do = torch.ones(1, 12, H, V, dtype=torch.float64)
    with using(backend="blocked"):
        o, _ = retention(*x)
    o.backward(do)
    found, gradients, _, _ = in_pieces(x, [0, 4, 8, 12], None, do, "blocked")
    same(found, o.detach(), 1e-12)
    same(gradients[:3], [y.grad for y in x[:3]], 1e-12)


def test_outside_of_it_nothing_is_exchanged():
    x = inputs(1, 3, False)
    with (
        pytest.raises(RuntimeError, match="asked"),
        across(lambda x: (_ for _ in ()).throw(RuntimeError("asked")), 0, None),
    ):
        retention(*x)
    retention(*x)
