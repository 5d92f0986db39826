"""A linear layer with a low-rank change that is trained while the layer itself stays as it is (LoRA, arXiv 2106.09685).

y = x W^T + (alpha / rank) (x A^T) B^T        A [rank, in] random, B [out, rank] zero: at first nothing is changed
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a model; in config.json, "adapter"."""

    base: str
    """The model folder that it changes, or hf:owner/name."""
    base_sha256: str
    """Hash of that model's weights."""
    rank: int
    """Columns of B and rows of A."""
    alpha: float
    """The change is multiplied by alpha / rank."""
    targets: tuple[str, ...]
    """The linear layers that it changes, by their own names, such as q_proj."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of an adapter must be above 0, got {self.alpha}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """A linear layer, its parameters frozen and under their own names, with lora_a and lora_b beside them."""

    def __init__(self, layer: nn.Linear, adapter: Adapter):
        super().__init__()
        self.adapter = adapter
        self.weight, self.bias = layer.weight, layer.bias
        rows, columns = layer.weight.shape
        self.lora_a = nn.Parameter(layer.weight.new_empty(adapter.rank, columns))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(rows, adapter.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the layer itself would be

    def forward(self, x: Tensor) -> Tensor:
        return (
            F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.adapter.scale
        )
