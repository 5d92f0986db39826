"""RMSNorm: x / sqrt(mean(x^2) + eps), with or without a gain per feature.

Source: Zhang and Sennrich, arXiv 1910.07467. Used before each sublayer, and over V as the head norm of retention.
"""

import torch
from torch import Tensor, nn

from retentive.ops.rows import rms_norm


class RMSNorm(nn.Module):
    """`[..., width]` -> same shape, each row with root mean square 1. Computed in float32 or wider, in x's dtype."""

    def __init__(self, width: int, *, eps: float, affine: bool = True):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
