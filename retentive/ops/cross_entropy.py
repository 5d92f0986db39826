"""Chunked cross-entropy: -log softmax(x W^T)[target], a chunk of tokens at a time, so that all logits never exist.

With a vocabulary of 50,000, the float32 logits of 8192 tokens are 1.6 GB, and their gradient as much again. Here the
gradient of a chunk is computed right after its loss, while its logits are there, as in the fused linear cross-entropy
of Liger Kernel (arXiv 2410.10989).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retentive.ops.rows import softmax_loss
from retentive.ops.transforms import transformed

IGNORE = -100
"""The target of tokens that are not counted; torch's own value."""


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
        ctx.save_for_backward(dx, dw)  # complete but for the factor that comes from above
        return total

    @staticmethod
    @once_differentiable  # dx and dw are numbers by now, and depend on x and W no more
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad.to(dw.dtype), None, None, None


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 1024) -> Tensor:
    """Sum of the cross-entropy in nats over all targets that are not IGNORE: a scalar, float32 (float64 for float64).

    Args:
        x: hidden states `[..., D]`.
        weight: output matrix `[vocab, D]`; logits are x W^T, in the autocast dtype where autocast is on.
        targets: int64 `[...]`, IGNORE (-100) where none is wanted.
        chunk: tokens whose logits exist at a time; the result does not depend on it but for rounding.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, targets = x.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled() and not transformed():
        # without autocast: the dtypes are chosen by hand there, the weight cast once and not for every chunk
        with torch.autocast(device, enabled=False):
            return _CrossEntropy.apply(x, weight, targets, chunk, dtype)
    # without gradients nothing is kept from chunk to chunk, and F.linear follows autocast by itself
    return sum(  # type: ignore[return-value]
        F.cross_entropy(F.linear(a, weight).to(torch.promote_types(x.dtype, torch.float32)), b, reduction="sum")
        for a, b in zip(x.split(chunk), targets.split(chunk), strict=True)
    )
