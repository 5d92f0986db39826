"""Quantised matrices: integers with a scale for each row and group of columns, in place of matrices of floats.

    w[n, k] = scale[n, k / group] * q[n, k]        q of 8 bits, or of 4 bits, two columns per byte, the first one low
    w[n, k] = scale[n, k / group] * (q[n, k] + 8) + minimum[n, k / group]             4 bits of a matrix with minimums

The second form is that of Q4_1 in GGUF files. Both kinds of matrices can be in one model.
They cannot be trained, but gradients pass through their products, to an adapter. This module converts them to floats
at every use, on any device; `retentive.native` multiplies the integers themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)


class Integers(NamedTuple):
    """A matrix, or rows of it, in integers."""

    q: Tensor
    """`[..., columns]` int8."""
    scale: Tensor
    """`[..., groups]` float16."""
    minimum: Tensor | None = None
    """`[..., groups]` float16; None: integers have a sign, and 0 stands for 0."""

    def floats(self, group: int) -> Tensor:
        """Returns the float32 numbers that they stand for."""

        def spread(x: Tensor) -> Tensor:
            return x.float().repeat_interleave(group, -1)[..., : self.q.shape[-1]]

        # multiplied in float32: rounding a scale to bfloat16 costs more than the integer's own error
        if self.minimum is None:
            return self.q.float() * spread(self.scale)
        return (self.q.float() + 8) * spread(self.scale) + spread(self.minimum)


class Quantized(nn.Module):
    """Base of the quantised linear layer and embedding."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, *, minimums: bool = False):
        """
        Args:
            bits: 8 or 4.
            group: columns per scale; the last group of a row may have fewer.
            dtype: dtype of its computation.
            minimums: with a minimum for each group, of 4 bits only.
        """
        super().__init__()
        self.rows, self.columns, self.bits, self.group, self.dtype = rows, columns, bits, group, dtype
        q = torch.empty(rows, columns, dtype=torch.int8) if bits == 8 else torch.empty(rows, -(-columns // 2)).byte()
        self.weight = nn.Parameter(q, requires_grad=False)
        scale = torch.empty(rows, -(-columns // group), dtype=torch.float16)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("minimum", nn.Parameter(torch.empty_like(scale), False) if minimums else None)

    def integers(self, at: Tensor | slice = ALL) -> Integers:
        """Returns rows by their numbers."""
        q, scale = self.weight[at], self.scale[at]
        if self.bits == 4:
            q = torch.stack((q << 4, q), -1).flatten(-2)[..., : self.columns].view(torch.int8) >> 4  # keeps the sign
        return Integers(q, scale, None if self.minimum is None else self.minimum[at])

    def floats(self, at: Tensor | slice = ALL) -> Tensor:
        """Returns rows by their numbers, as floats `[..., columns]`."""
        return self.integers(at).floats(self.group).to(self.dtype)

    def store(self, made: Integers) -> None:
        """Stores all rows, with minimums or without."""
        q = made.q
        if self.bits == 4:
            q = F.pad(q, (0, self.columns % 2)).view(torch.uint8)
            q = q[:, 0::2] & 15 | q[:, 1::2] << 4
        self.weight.data, self.scale.data = q.contiguous(), made.scale.to(torch.float16).contiguous()
        minimum = made.minimum
        self.minimum = None if minimum is None else nn.Parameter(minimum.to(torch.float16).contiguous(), False)

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
        self,
        rows: int,
        columns: int,
        bits: int,
        group: int,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        *,
        minimums: bool = False,
    ):
        super().__init__(rows, columns, bits, group, dtype, minimums=minimums)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(x, self)
            return y if bias is None else y + bias.to(y.dtype)
        return F.linear(x, self.floats().to(x.dtype), bias)


class _Product(torch.autograd.Function):
    """Product with a quantised matrix that keeps no floats for the backward pass, but converts the integers again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.floats().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [grad] = grads
        return (grad @ ctx.layer.floats().to(grad.dtype)).to(ctx.dtype), None


class QuantizedEmbedding(Quantized):
    """Quantised `nn.Embedding`."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.floats(ids)


def matrix(layer: nn.Module) -> Tensor:
    """Returns the matrix `[out, in]` of a linear layer or an embedding, quantised or not, as floats."""
    found: Any = layer
    return found.floats() if isinstance(layer, Quantized) else found.weight


def shape(layer: nn.Module) -> tuple[int, int]:
    """Returns (rows, columns) of the matrix of a linear layer or an embedding, quantised or not."""
    found: Any = layer
    return (found.rows, found.columns) if isinstance(layer, Quantized) else tuple(found.weight.shape)
