"""Quantised matrices: integers with a scale for each row and group of columns, in place of matrices of floats.

    w[n, k] = scale[n, k / group] * q[n, k]        q of 8 bits, or of 4 bits, two columns per byte, the first one low

They cannot be trained. This module converts them to floats at every use, on any device; `retentive.native` multiplies
the integers themselves.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dequantized(q: Tensor, scale: Tensor, group: int) -> Tensor:
    """Returns the float32 numbers that integers `[..., columns]` and scales `[..., groups]` stand for."""
    # multiplied in float32: rounding a scale to bfloat16 costs more than the integer's own error
    return q.float() * scale.float().repeat_interleave(group, -1)[..., : q.shape[-1]]


class Quantized(nn.Module):
    """Base of the quantised linear layer and embedding."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype):
        """
        Args:
            bits: 8 or 4.
            group: columns per scale; the last group of a row may have fewer.
            dtype: dtype of its computation.
        """
        super().__init__()
        self.rows, self.columns, self.bits, self.group, self.dtype = rows, columns, bits, group, dtype
        q = torch.empty(rows, columns, dtype=torch.int8) if bits == 8 else torch.empty(rows, -(-columns // 2)).byte()
        self.weight = nn.Parameter(q, requires_grad=False)
        scale = torch.empty(rows, -(-columns // group), dtype=torch.float16)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def floats(self, q: Tensor, scale: Tensor) -> Tensor:
        """Returns rows as floats `[..., columns]`, from their stored integers and their scales."""
        if self.bits == 4:
            q = torch.stack((q << 4, q), -1).flatten(-2)[..., : self.columns].view(torch.int8) >> 4  # keeps the sign
        return dequantized(q, scale, self.group).to(self.dtype)

    def store(self, q: Tensor, scale: Tensor) -> None:
        """Stores integers `[rows, columns]` and scales `[rows, groups]`."""
        if self.bits == 4:
            q = F.pad(q, (0, self.columns % 2)).view(torch.uint8)
            q = q[:, 0::2] & 15 | q[:, 1::2] << 4
        self.weight.data, self.scale.data = q.contiguous(), scale.to(torch.float16).contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # a scale keeps its dtype when the model is cast: bfloat16's 8 bits would lose 3 of its bits
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        self.dtype = moved.dtype
        for name, x in self._parameters.items():
            if x is not None:
                x.data = fn(x.data) if name == "bias" else x.data.to(moved.device)
        return self


class QuantizedLinear(Quantized):
    """Quantised `nn.Linear`; the bias stays in floats."""

    def __init__(
        self, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, bias: nn.Parameter | None = None
    ):
        super().__init__(rows, columns, bits, group, dtype)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.floats(self.weight, self.scale).to(x.dtype), bias)


class QuantizedEmbedding(Quantized):
    """Quantised `nn.Embedding`."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.floats(self.weight[ids], self.scale[ids])
