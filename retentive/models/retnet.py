"""RetNet: embedding, blocks of retention and feed-forward, output. `transformer.py` is its twin, class for class.

Source: arXiv 2307.08621 equation 9, with the details of torchscale's current code (RMSNorm, gated feed-forward, no
biases) or, by config, of fla's.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import FeedForward, MultiScaleRetention, Positions, RMSNorm
from retentive.layers.retention import Phases
from retentive.models.base import LanguageModel
from retentive.models.config import RetNetConfig
from retentive.models.state import RetentionState
from retentive.ops import Ring


class Block(nn.Module):
    """x + retention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.dropout = config.dropout
        self.retention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.retention = MultiScaleRetention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, activation=config.activation, gated=config.ffn_gate)

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases:
        """What depends on positions alone; one block computes it for all."""
        return self.retention.phases(positions, dtype)

    def forward(
        self, x: Tensor, state: Tensor | Ring | None, positions: Positions, phases: Phases
    ) -> tuple[Tensor, Tensor | Ring]:
        y, state = self.retention(self.retention_norm(x), state, positions, phases)
        x = x + F.dropout(y, self.dropout, self.training)
        x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x, state

    def reset_parameters(self) -> None:
        self.retention.reset_parameters()


class RetNet(LanguageModel):
    """`model(ids) -> (logits, state)`, then `model(more_ids, state)`; the state is a RetentionState."""

    config: RetNetConfig
    state_type: ClassVar[Any] = RetentionState

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.embed_norm = RMSNorm(config.dim, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(self.block(i) for i in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:  # one parameter of two names, updated and saved once
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def block(self, i: int) -> nn.Module:
        """The block of index i, freshly made; a hybrid has two kinds."""
        return Block(self.config)

    def init_state(self, batch: int) -> RetentionState:
        """The state before the first token, for `batch` sequences."""
        return RetentionState.empty(self.config, batch, self.dtype, self.device)

    def begin(self, *inputs: Any) -> tuple[Tensor, Positions]:
        """As for every model; then scaled and normalised as the config says, with dropout."""
        x, positions = super().begin(*inputs)
        if self.config.embed_scale:
            x = x * self.config.dim**0.5
        return F.dropout(self.embed_norm(x), self.config.dropout, self.training), positions

    def hidden(
        self,
        ids: Tensor | None,
        state: RetentionState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        x, positions = self.begin(ids, state, embeds, cu_seqlens, lengths)
        phases = self.blocks[0].phases(positions, x.dtype)
        layers = []
        for i, block in enumerate(self.blocks):
            x, layer = block(x, None if state is None else state.layers[i], positions, phases)
            layers.append(layer)
        return self.norm(x), RetentionState(layers, positions.end)
