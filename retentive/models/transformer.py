"""Transformer: embedding, blocks of attention and feed-forward, output. The twin of `retnet.py`, class for class.

A strong baseline of the same interface, so that a comparison changes retention against attention and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import Attention, FeedForward, Positions, RMSNorm
from retentive.layers.attention import Layer, Phases
from retentive.models.base import LanguageModel
from retentive.models.config import TransformerConfig
from retentive.models.state import KVCache


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases:
        """What depends on positions alone; one block computes it for all."""
        return self.attention.phases(positions, dtype)

    def forward(
        self, x: Tensor, cache: Layer | None, positions: Positions, phases: Phases
    ) -> tuple[Tensor, Layer | None]:
        y, cache = self.attention(self.attention_norm(x), cache, positions, phases)
        x = x + F.dropout(y, self.dropout, self.training)
        x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x, cache

    def reset_parameters(self) -> None:
        self.attention.reset_parameters()


class Transformer(LanguageModel):
    """`model(ids) -> (logits, state)`, then `model(more_ids, state)`; the state is a KVCache.

    With cu_seqlens in training mode the state that comes back has no keys and values (see `Attention`).
    """

    config: TransformerConfig
    state_type = KVCache

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    @property
    def window(self) -> int:
        return self.config.attention_window or 0

    def init_state(self, batch: int) -> KVCache:
        """The state before the first token, for `batch` sequences: no slots yet."""
        return KVCache.empty(self.config, batch, self.dtype, self.device)

    def hidden(
        self,
        ids: Tensor | None,
        state: KVCache | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        x, positions = self.begin(ids, state, embeds, cu_seqlens, lengths)
        x = F.dropout(x, self.config.dropout, self.training)
        phases = self.blocks[0].phases(positions, x.dtype)
        # Room for all new tokens before any block writes: a block cannot make its cache larger, only fill it.
        cache = None if state is None else state.reserve(max(phases.starts) + x.shape[1])
        layers = []
        for i, block in enumerate(self.blocks):
            x, layer = block(x, None if cache is None else cache.of_layer(i), positions, phases)
            layers.append(layer)
        oldest = None if cache is None else cache.oldest
        return self.norm(x), KVCache.of(layers, positions.end, self.window, oldest)
