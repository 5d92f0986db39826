"""RetNet: embedding, blocks of retention and feed-forward, output. `transformer.py` is its twin, class for class.

Source: arXiv 2307.08621 equation 9, with the details of torchscale's current code (RMSNorm, gated feed-forward, no
biases) or, by config, of fla's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import FeedForward, MultiScaleRetention, Place, RMSNorm, locate
from retentive.layers.retention import Shared
from retentive.models.config import RetNetConfig
from retentive.models.state import RetentionState


class Block(nn.Module):
    """x + retention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.dropout = config.dropout
        self.retention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.retention = MultiScaleRetention(
            config.dim,
            heads=config.heads,
            kv_heads=config.kv_heads,
            key_dim=config.key_dim,
            value_dim=config.value_dim,
            decay=config.decay,
            rotary=config.rotary,
            score_norm=config.score_norm,
            head_norm=config.head_norm,
            head_norm_affine=config.head_norm_affine,
            gate=config.gate,
            eps=config.norm_eps,
        )
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, activation=config.activation, gated=config.ffn_gate)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        place: Place,
        shared: Shared,
        form: str,
        chunk_size: int | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        y, state = self.retention(self.retention_norm(x), state, place, shared, form, chunk_size, backend)
        x = x + F.dropout(y, self.dropout, self.training)
        x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x, state


class RetNet(nn.Module):
    """`model(ids) -> (logits, state)`, and `model(more_ids, state)` goes on from there."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.embed_norm = RMSNorm(config.dim, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchscale's choice: embedding and output N(0, 1/D), retention see there, feed-forward as nn.Linear does."""
        for matrix in (self.embed.weight, self.head.weight):
            nn.init.normal_(matrix, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.retention.reset_parameters()

    def init_state(self, batch: int) -> RetentionState:
        """The state before the first token, for `batch` sequences."""
        c, weight = self.config, self.embed.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch, c.heads, c.key_dim // c.heads, c.value_dim // c.heads)
        layers = [torch.zeros(shape, dtype=wide, device=weight.device) for _ in self.blocks]
        return RetentionState(layers, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def hidden(
        self,
        ids: Tensor | None,
        state: RetentionState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, RetentionState]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        x = self.embed(ids) if embeds is None else embeds
        if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(x.shape[:-1])}")
        if self.config.embed_scale:
            x = x * self.config.dim**0.5
        x = F.dropout(self.embed_norm(x), self.config.dropout, self.training)
        start = None if state is None else state.position
        place, position = locate(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)
        shared = self.blocks[0].retention.shared(place, x.dtype)
        layers = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            x, after = block(x, before, place, shared, form, chunk_size, backend)
            layers.append(after)
        return self.norm(x), RetentionState(layers, position)

    def forward(
        self,
        ids: Tensor | None,
        state: RetentionState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, RetentionState]:
        """Logits `[B,T,vocab]` and the state after the last token.

        Args:
            ids: int64 `[B,T]`.
            state: the state to go on from, of B sequences (N with cu_seqlens); from the beginning if not given.
            embeds: `[B,T,D]` in place of ids, for inputs that are no tokens.
            cu_seqlens: `[N+1]`, with B = 1: where the N sequences packed into the row begin and end.
            lengths: `[B]` valid tokens a row, padding right, or `[B,2]` begin and end of the valid tokens. Padding is
                exact: what it yields is meaningless, and nothing else depends on it.
            form, chunk_size, backend: as for `retentive.ops.retention`; every choice gives the same numbers.
        """
        x, state = self.hidden(
            ids,
            state,
            embeds=embeds,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            form=form,
            chunk_size=chunk_size,
            backend=backend,
        )
        return self.head(x), state
