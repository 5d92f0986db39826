"""Transformer: embedding, blocks of attention and feed-forward, output. The twin of `retnet.py`, class for class.

A strong baseline of the same interface, so that a comparison changes retention against attention and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import Attention, FeedForward, Place, RMSNorm, locate
from retentive.layers.attention import Shared
from retentive.models.config import TransformerConfig
from retentive.models.state import KVCache


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, heads=config.heads, kv_heads=config.kv_heads)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        place: Place,
        shared: Shared,
        starts: list[int],
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        y, cache = self.attention(self.attention_norm(x), cache, place, shared, starts)
        x = x + F.dropout(y, self.dropout, self.training)
        x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x, cache


class Transformer(nn.Module):
    """`model(ids) -> (logits, state)`, and `model(more_ids, state)` goes on from there; the state is a KVCache."""

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

    def reset_parameters(self) -> None:
        """As for RetNet: embedding and output N(0, 1/D), attention see there, feed-forward as nn.Linear does."""
        for matrix in (self.embed.weight, self.head.weight):
            nn.init.normal_(matrix, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.attention.reset_parameters()

    def init_state(self, batch: int) -> KVCache:
        """The state before the first token, for `batch` sequences: no slots yet."""
        c, weight = self.config, self.embed.weight
        empty = [weight.new_zeros(batch, 0, c.kv_heads, c.dim // c.heads) for _ in range(2 * c.layers)]
        return KVCache(empty[::2], empty[1::2], torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def hidden(
        self,
        ids: Tensor | None,
        state: KVCache | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
    ) -> tuple[Tensor, KVCache]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        if form != "auto":
            raise ValueError(f"attention has one form only, got form={form!r}: leave it at auto")
        x = self.embed(ids) if embeds is None else embeds
        if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(x.shape[:-1])}")
        x = F.dropout(x, self.config.dropout, self.training)
        start = None if state is None else state.position
        place, position = locate(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)
        starts = [0] * len(position) if start is None else start.tolist()
        if state is not None:
            state = state.reserve(max(starts) + x.shape[1])
        shared = self.blocks[0].attention.shared(place, x.dtype)
        caches = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else (state.keys[i], state.values[i])
            x, after = block(x, before, place, shared, starts)
            caches.append(after)
        caches = [c for c in caches if c is not None]
        return self.norm(x), KVCache([k for k, _ in caches], [v for _, v in caches], position)

    def forward(
        self,
        ids: Tensor | None,
        state: KVCache | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
    ) -> tuple[Tensor, KVCache]:
        """Logits `[B,T,vocab]` and the state after the last token; arguments as for `RetNet`, `form` only "auto".

        With cu_seqlens in training mode the state comes back without keys and values (see `Attention`).
        """
        x, state = self.hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths, form=form)
        return self.head(x), state
