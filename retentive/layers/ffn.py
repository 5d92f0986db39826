"""Feed-forward layer: down(act(gate(x)) * up(x)), SwiGLU for act = swish; without `up` the paper's plain one.

Source: Shazeer, arXiv 2002.05202. torchscale's RetNet calls the three matrices fc1 (gate), gate (up) and fc2 (down).
"""

from torch import Tensor, nn

from retentive.layers.config import FeedForwardConfig
from retentive.ops.rows import ACTIVATIONS, gated


class FeedForward(nn.Module):
    """`[..., D]` -> `[..., D]` through width F, without biases."""

    def __init__(self, D: int, config: FeedForwardConfig):
        super().__init__()
        self.config, width = config, config.width
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False) if config.gate else None
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        g, activation = self.gate_proj(x), self.config.activation
        y = ACTIVATIONS[activation](g) if self.up_proj is None else gated(g, self.up_proj(x), activation)
        return self.down_proj(y)
