"""Hybrid: a RetNet in which every n-th block attends, and so recalls what a state of constant size has let go.

Its blocks are those of `retnet.py` and of the twin in `transformer.py`, unchanged; so is the rest. Its memory grows, n
times slower than the Transformer's. Source: the hybrids of Mamba-2 (arXiv 2405.21060, section 9.2.3) and Griffin
(arXiv 2402.19427), one block of attention to several that are recurrent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import RMSNorm, locate
from retentive.models import retnet, transformer
from retentive.models.config import HybridConfig, twin
from retentive.models.state import HybridState, KVCache, RetentionState


class Hybrid(nn.Module):
    """`model(ids) -> (logits, state)`, and `model(more_ids, state)` goes on from there; the state is a HybridState."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.embed_norm = RMSNorm(config.dim, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        attention = twin(config)
        self.blocks = nn.ModuleList(
            transformer.Block(attention) if config.attends(i) else retnet.Block(config) for i in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As for RetNet and Transformer."""
        for matrix in (self.embed.weight, self.head.weight):
            nn.init.normal_(matrix, std=self.config.dim**-0.5)
        for block in self.blocks:
            (block.attention if isinstance(block, transformer.Block) else block.retention).reset_parameters()

    def init_state(self, batch: int) -> HybridState:
        """The state before the first token, for `batch` sequences."""
        c, weight = self.config, self.embed.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch, c.heads, c.key_dim // c.heads, c.value_dim // c.heads)
        attends = [c.attends(i) for i in range(c.layers)]
        states = [torch.zeros(shape, dtype=wide, device=weight.device) for a in attends if not a]
        empty = [weight.new_zeros(batch, 0, c.heads, c.dim // c.heads) for a in attends if a for _ in "kv"]
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return HybridState(RetentionState(states, position), KVCache(empty[::2], empty[1::2], position))

    def hidden(
        self,
        ids: Tensor | None,
        state: HybridState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, HybridState]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `RetNet`."""
        x = self.embed(ids) if embeds is None else embeds
        if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(x.shape[:-1])}")
        if self.config.embed_scale:
            x = x * self.config.dim**0.5
        x = F.dropout(self.embed_norm(x), self.config.dropout, self.training)
        start = None if state is None else state.position
        place, position = locate(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)
        starts = [0] * len(position) if start is None else start.tolist()
        cache = None if state is None else state.cache.reserve(max(starts) + x.shape[1])
        befores = None if state is None else iter(state.retention.layers)
        caches = None if cache is None else iter(zip(cache.keys, cache.values, strict=True))
        phases, shared = None, None  # of all blocks of a kind
        states, pairs = [], []
        for block in self.blocks:
            if isinstance(block, transformer.Block):
                phases = phases or block.attention.shared(place, x.dtype)
                x, pair = block(x, None if caches is None else next(caches), place, phases, starts)
                pairs.append(pair)
            else:
                shared = shared or block.retention.shared(place, x.dtype)
                before = None if befores is None else next(befores)
                x, after = block(x, before, place, shared, form, chunk_size, backend)
                states.append(after)
        pairs = [pair for pair in pairs if pair is not None]
        cache = KVCache([k for k, _ in pairs], [v for _, v in pairs], position)
        return self.norm(x), HybridState(RetentionState(states, position), cache)

    def forward(
        self,
        ids: Tensor | None,
        state: HybridState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        form: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, HybridState]:
        """Logits `[B,T,vocab]` and the state after the last token; arguments as for `RetNet`."""
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
