"""Base of the layers that mix tokens: how a block calls them, x + mixer(norm(x))."""

from typing import Any

from torch import Tensor, nn

from retentive.layers.norm import RMSNorm
from retentive.layers.positions import Positions


class Mixer(nn.Module):
    """`mixer(x, memory, positions, phases)` -> `(out [B,T,D], memory)`."""

    def branch(
        self, x: Tensor, norm: RMSNorm, memory: Any, positions: Positions, phases: Any, *, drops: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Returns (x `[B,T,D]`, the mixer's output, memory). The output is None if x has it already.

        Args:
            drops: dropout follows, so the output must stay apart from x.
        """
        x, h = norm.branch(x)
        return x, *self(h, memory, positions, phases)
