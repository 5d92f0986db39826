"""Chunked cross-entropy: -log softmax(x W^T)[target], one chunk of tokens at a time.

The logits never exist all at once. With a vocabulary of 50,000, the float32 logits of 8192 tokens take 1.6 GB, and
their gradient as much again. The gradient of a chunk is computed right after its loss, while its logits exist, as in
the fused linear cross-entropy of Liger Kernel (arXiv 2410.10989).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retentive.ops.rows import softmax_loss
from retentive.ops.transforms import transformed

IGNORE = -100
"""Target of tokens that do not count; torch's own value."""


class _CrossEntropy(torch.autograd.Function):
    """Sum over the targets of -log softmax(x W^T)[target]; see `cross_entropy`."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight: Tensor, target_T: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        w = weight.to(dtype)
        total = x_TD.new_zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32))
        dx, dw = torch.empty_like(x_TD), torch.zeros_like(weight)
        for t in range(0, len(x_TD), chunk):
            x, target = x_TD[t : t + chunk].to(dtype), target_T[t : t + chunk]
            loss, p = softmax_loss(x @ w.T, target, IGNORE)  # p: the gradient of the logits
            total += loss.sum()
            dx[t : t + chunk] = p @ w
            dw += p.T @ x
        ctx.save_for_backward(dx, dw)  # complete except for the incoming gradient, a factor
        return total

    @staticmethod
    @once_differentiable  # dx and dw are plain numbers that no longer depend on x and W
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad.to(dw.dtype), None, None, None


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 1024) -> Tensor:
    """Returns the sum of the cross-entropy in nats over all targets except IGNORE: a scalar, float32 or float64.

    Args:
        x: hidden states `[..., D]`.
        weight: output matrix `[vocab, D]`. Logits are x W^T, in the autocast dtype if autocast is on.
        targets: int64 `[...]`, IGNORE (-100) for tokens that do not count.
        chunk: number of tokens whose logits exist at a time. It changes the result by rounding only.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, targets = x.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled() and not transformed():
        # autocast off: the dtype is chosen by hand, so that the weight is cast once and not in every chunk
        with torch.autocast(device, enabled=False):
            return _CrossEntropy.apply(x, weight, targets, chunk, dtype)
    # without gradients nothing is kept between chunks, and F.linear follows autocast by itself
    return sum(  # type: ignore[return-value]
        F.cross_entropy(F.linear(a, weight).to(torch.promote_types(x.dtype, torch.float32)), b, reduction="sum")
        for a, b in zip(x.split(chunk), targets.split(chunk), strict=True)
    )
