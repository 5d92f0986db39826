"""RMSNorm: x / sqrt(mean(x^2) + eps), with or without a gain per feature.

Source: Zhang and Sennrich, arXiv 1910.07467. Used before each sublayer, and over V as the head norm of retention.
"""

import torch
from torch import Tensor, nn

from retentive.ops.rows import add_convolved, add_norm, rms_norm


class RMSNorm(nn.Module):
    """`[..., width]` -> same shape, each row with root mean square 1. Computed in float32 or wider, in x's dtype.

    Args:
        before_products: products alone read the result. Under autocast it has the dtype in which they multiply, instead
            of a copy for each of them.
    """

    def __init__(self, width: int, *, eps: float, affine: bool = True, before_products: bool = False):
        super().__init__()
        self.width, self.eps, self.before_products = width, eps, before_products
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    @property
    def gain(self) -> Tensor | None:
        """The weight as operations read it; a subclass may share its gradient with other ranks."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain, self.eps, self._dtype(x))

    def branch(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (x + more, its norm): the residual stream, and the input of the next layer. One pass over memory."""
        return add_norm(x, more, self.gain, self.eps, self._dtype(x))

    def add_convolved(self, x: Tensor, weight: Tensor, since: Tensor | None) -> Tensor:
        """Returns x + `convolve`(norm(x), weight, since) of `retentive.ops.rows`. One pass over memory."""
        return add_convolved(x, self.gain, self.eps, self._dtype(x), weight, since)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Returns the dtype of the result."""
        device = x.device.type
        if not self.before_products or x.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
            return x.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
