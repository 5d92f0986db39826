"""What every model here offers to the rest of the package: `LanguageModel`, from tokens (or embeddings) and a state.

x, state = model.hidden(ids, state)      [B,T,D], what the output matrix is applied to
logits = model.head(x)                   [B,T,vocab]
logits, state = model(ids, state)        both
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retentive.layers import Positions, positions_of
from retentive.layers.quantized import Quantized
from retentive.models.state import State


class LanguageModel(nn.Module):
    """`model(ids) -> (logits, state)`, and `model(more_ids, state)` goes on from there.

    A subclass sets `config`, `embed`, `blocks` and `head`, and says what `hidden` and `init_state` are.
    """

    config: Any
    """A frozen dataclass that has at least vocab_size, dim, layers and tie_embeddings."""
    embed: nn.Embedding
    head: nn.Linear
    blocks: nn.ModuleList
    """Its blocks, first to last: they are compiled, recomputed or sharded one by one."""
    state_type: ClassVar[Any] = None
    """The class of its states; None for a model that keeps no state."""
    own_threads: ClassVar[bool] = False
    """Whether it decides by itself how many threads a call is worth."""

    @property
    def keeps_state(self) -> bool:
        """Whether it can go on from where it stopped; a model that cannot is trained and scored, not decoded."""
        return self.state_type is not None

    @property
    def window(self) -> int:
        """Tokens that its attention looks back on, the newest included; 0: all, or there is no attention."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where ids and embeddings go."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings and hidden states (where no autocast is on)."""
        embed: nn.Module = self.embed
        return embed.dtype if isinstance(embed, Quantized) else self.embed.weight.dtype

    def init_state(self, batch: int) -> State:
        """The state before the first token, for `batch` sequences."""
        raise NotImplementedError

    def hidden(
        self,
        ids: Tensor | None,
        state: Any = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """What the output matrix `head` is applied to, `[B,T,D]`, and the state; arguments as for `forward`."""
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor | None,
        state: Any = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits `[B,T,vocab]` and the state after the last token.

        The form, backend and chunk length of retention are chosen by the operator; `ops.using` forces them.

        Args:
            ids: int64 `[B,T]`.
            state: the state to go on from, of B sequences (N with cu_seqlens); None for the beginning. It may be
                written in place: use the one that comes back, or `clone()` it before.
            embeds: `[B,T,D]` instead of ids, for inputs that are not tokens.
            cu_seqlens: `[N+1]`, with B = 1: where the N sequences packed into the row begin, and where the last ends.
            lengths: `[B]` valid tokens a row, padding right, or `[B,2]` begin and end of the valid tokens. Padding is
                exact: its own logits are meaningless, and nothing else depends on it.

        Raises:
            ValueError: no token, shapes that do not fit, or another model's state.
        """
        x, state = self.hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths)
        return self.head(x), state

    def begin(
        self, ids: Tensor | None, state: Any, embeds: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Positions]:
        """Embedded tokens `[B,T,D]` and their positions; the first step of every `hidden`."""
        if state is not None:
            self._check(state)
        x = self.embed(ids) if embeds is None else embeds
        if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(x.shape[:-1])}")
        start = None if state is None else state.position
        return x, positions_of(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)

    def _check(self, state: Any) -> None:
        """Raises ValueError where the state is of another kind of model, another number of blocks or another window."""
        name, kind = type(self).__name__, self.state_type
        if kind is None or not isinstance(state, kind):
            wanted = "no state" if kind is None else f"a {kind.__name__}"
            raise ValueError(f"a {name} goes on from {wanted}, got a {type(state).__name__}: another model's state?")
        if state.blocks != len(self.blocks):
            raise ValueError(f"the state is of {state.blocks} blocks, this {name} has {len(self.blocks)}")
        if state.window != self.window:
            raise ValueError(f"the state is of attention_window {state.window}, this {name} has {self.window}")

    def reset_parameters(self) -> None:
        """torchscale's choice: embedding and output N(0, 1/D), mixing layers as they say, the rest as nn.Linear."""
        for matrix in (self.embed.weight, self.head.weight):  # tied, it is one matrix, drawn twice
            nn.init.normal_(matrix, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.reset_parameters()
