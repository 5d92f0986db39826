"""RMSNorm: x / sqrt(mean(x^2) + eps), with or without a gain per feature.

Source: Zhang and Sennrich, arXiv 1910.07467. Used before each sublayer, and over V as the head norm of retention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalises the last dimension; computed in float32 or wider, returned in the dtype of x."""

    def __init__(self, width: int, *, eps: float, affine: bool = True):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """The same with a backward pass in half the memory traffic of the one that autograd derives (docs/LOG.md)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        y = x * scale
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        y = x * scale
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * y).flatten(0, -2).sum(0).to(weight.dtype)
            grad = grad.to(scale.dtype) * weight
        along = (grad * y).mean(-1, keepdim=True)  # what of the gradient only changes the length of x
        return y.mul_(along).neg_().add_(grad).mul_(scale).to(x.dtype), grad_weight, None
