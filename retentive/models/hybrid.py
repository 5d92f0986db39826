"""Hybrid: a RetNet in which every n-th block is attention, which recalls what a state of constant size has forgotten.

Its blocks are those of `retnet.py` and of the twin in `transformer.py`, unchanged. Its memory grows, n times slower
than the Transformer's; with a window of attention it stays as it is from that many tokens on. Source: the hybrids of
Mamba-2 (arXiv 2405.21060, section 9.2.3) and Griffin (arXiv 2402.19427), one block of attention, in Griffin over a
window, to several that are recurrent.
"""

from typing import Any

from torch import Tensor, nn

from retentive.models import transformer
from retentive.models.config import HybridConfig, of_one_kind
from retentive.models.retnet import RetNet
from retentive.models.state import HybridState, KVCache, RetentionState


class Hybrid(RetNet):
    """`model(ids) -> (logits, state)`, then `model(more_ids, state)`; the state is a HybridState."""

    config: HybridConfig
    state_type = HybridState

    @property
    def window(self) -> int:
        return self.config.attention_window or 0

    def block(self, i: int) -> nn.Module:
        return transformer.Block(self.config.attention()) if self.config.attends(i) else super().block(i)

    def init_state(self, batch: int) -> HybridState:  # type: ignore[override]  # a state of its own kind
        """The state before the first token, for `batch` sequences."""
        retaining, attending = of_one_kind(self.config)
        where = (batch, self.dtype, self.device)
        return HybridState(RetentionState.empty(retaining, *where), KVCache.empty(attending, *where))

    def hidden(  # type: ignore[override]
        self,
        ids: Tensor | None,
        state: HybridState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, HybridState]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        x, positions = self.begin(ids, state, embeds, cu_seqlens, lengths)
        retention = self.blocks[0].phases(positions, x.dtype)  # never attention: attention_every is at least 2
        attention = self.blocks[self.config.attention_every - 1].phases(positions, x.dtype)
        cache = None if state is None else state.cache.reserve(max(attention.starts) + x.shape[1])
        layers: list[Any] = []
        pairs: list[Any] = []
        for i, block in enumerate(self.blocks):
            if self.config.attends(i):
                x, pair = block(x, None if cache is None else cache.of_layer(len(pairs)), positions, attention)
                pairs.append(pair)
            else:
                before = None if state is None else state.retention.layers[len(layers)]
                x, after = block(x, before, positions, retention)
                layers.append(after)
        retained = RetentionState(layers, positions.end)
        kept = KVCache.of(pairs, positions.end, self.window, None if cache is None else cache.oldest)
        return self.norm(x), HybridState(retained, kept)
