"""LoRA: a trained low-rank change of a frozen matrix (arXiv 2106.09685).

W + (alpha / rank) B A        [out, in]: A [rank, in] random, B [out, rank] zero, so it starts without any change
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapter of a model; in config.json, "adapter"."""

    base: str
    """Model folder that it changes, or hf:owner/name."""
    base_sha256: str
    """Hash of that model's weights."""
    rank: int
    """Rank: columns of B and rows of A."""
    alpha: float
    """Numerator of the scale: the change is multiplied by alpha / rank."""
    targets: tuple[str, ...]
    """Names of the changed matrices, such as q_proj or embed."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of an adapter must be above 0, got {self.alpha}")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


class LoRA(nn.Module):
    """Low-rank change of a layer's matrix. `weight` is the changed matrix, which a tied layer may use as well."""

    def __init__(self, layer: nn.Linear | nn.Embedding, adapter: Adapter):
        super().__init__()
        self.adapter, self.base = adapter, layer.weight
        rows, columns = layer.weight.shape
        self.lora_a = nn.Parameter(layer.weight.new_empty(adapter.rank, columns))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(rows, adapter.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # the default of a linear layer

    @property
    def weight(self) -> Tensor:
        """The changed matrix."""
        return self.base + self.lora_b @ self.lora_a * self.adapter.scale


class LoRALinear(LoRA):
    """A linear layer with a low-rank change, computed without forming the changed matrix."""

    def __init__(self, layer: nn.Linear, adapter: Adapter):
        super().__init__(layer, adapter)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.base, self.bias) + change * self.adapter.scale


class LoRAEmbedding(LoRA):
    """An embedding with a low-rank change."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.base) + F.embedding(ids, self.lora_b) @ self.lora_a * self.adapter.scale
