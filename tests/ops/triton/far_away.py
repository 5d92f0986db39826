"""Script: the last 100 of 8.4 million packed tokens, whose offsets pass 2^31, must give the results they give alone.

Untouched memory is free, so the tensors may have 2^31 elements and more. Only programs of the last sequence run. With
32-bit offsets they would write to unmapped memory, which ends the process.
"""

import torch

from benchmarks.lab.interpreter import enable

enable()  # before Triton is imported

from triton.runtime import interpreter  # noqa: E402

from retentive.ops.triton import triton_retention, triton_retention_backward  # noqa: E402

K, V, C, LAST = 256, 16, 64, 100
T = 2**31 // K + 1000
NEW = 64  # programs of the last sequence are among the last 64, in the upper half


def last_ones(stop: int, *rest: int) -> range:
    """Replaces range for loops over a grid, which pass one bound; other calls are unchanged."""
    return range(stop, *rest) if rest else range(max(stop // 2, stop - NEW), stop)


def placed(x: torch.Tensor) -> torch.Tensor:
    """Returns x `[1,LAST,…]` at the end of a row of T tokens; the rest stays uninitialised."""
    row = torch.empty(1, T, *x.shape[2:], dtype=x.dtype)
    row[:, -LAST:] = x
    return row


def everything(q, k, v, log_decay, state, do, dstate, cu):
    arguments = (q, k, v, log_decay, state, cu, 0.3, C)
    return [*triton_retention(*arguments), *triton_retention_backward(do, dstate, *arguments)]


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, LAST, 1, n).bfloat16() for n in (K, K, V, V))
    log_decay = -torch.rand(1, LAST, 1)
    state, dstate = torch.randn(1, 1, K, V), torch.randn(1, 1, K, V)
    want = everything(q, k, v, log_decay, state, do, dstate, torch.tensor([0, LAST]))

    interpreter.range = last_ones
    far = [placed(x) for x in (q, k, v, log_decay)]
    two = [torch.cat((torch.zeros_like(x), x)) for x in (state, dstate)]
    assert far[0].numel() > 2**31
    got = everything(*far, two[0], placed(do), two[1], torch.tensor([0, T - LAST, T]))
    for a, b in zip(got, want, strict=True):
        last = a[1:] if len(a) == 2 else a[:, -LAST:]
        assert last.isfinite().all() and torch.equal(last, b)
