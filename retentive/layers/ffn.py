"""Feed-forward layer: down(act(gate(x)) * up(x)), SwiGLU with act = swish; without `up`, the paper's plain one.

Source: Shazeer, arXiv 2002.05202. torchscale's RetNet calls the three matrices fc1 (gate), gate (up) and fc2 (down).
"""

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"swish": F.silu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """`[..., D]` -> `[..., D]` through width F, no biases."""

    def __init__(self, D: int, width: int, *, activation: str = "swish", gated: bool = True):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False) if gated else None
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.gate_proj(x))
        return self.down_proj(y if self.up_proj is None else y * self.up_proj(x))
