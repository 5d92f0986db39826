"""LoRA: a trained low-rank change of a frozen matrix (arXiv 2106.09685), also of a quantised one (arXiv 2305.14314).

W + (alpha / rank) B A        [out, in]: A [rank, in] random, B [out, rank] zero, so it starts without any change
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers.quantized import Quantized, matrix, shape


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

    def __init__(self, layer: nn.Module, adapter: Adapter):
        """
        Args:
            layer: linear layer or embedding, quantised or not.
        """
        super().__init__()
        self.adapter, self.layer = adapter, layer
        rows, columns = shape(layer)
        like: Any = layer.scale.to(layer.dtype) if isinstance(layer, Quantized) else layer.weight
        self.lora_a = nn.Parameter(like.new_empty(adapter.rank, columns))
        self.lora_b = nn.Parameter(like.new_zeros(rows, adapter.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # the default of a linear layer

    @property
    def weight(self) -> Tensor:
        """The changed matrix."""
        return matrix(self.layer) + self.lora_b @ self.lora_a * self.adapter.scale


class LoRALinear(LoRA):
    """A linear layer with a low-rank change, computed without forming the changed matrix."""

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return self.layer(x) + change * self.adapter.scale


class LoRAEmbedding(LoRA):
    """An embedding with a low-rank change."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(ids) + F.embedding(ids, self.lora_b) @ self.lora_a * self.adapter.scale
