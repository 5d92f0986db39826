"""`Decoder`: the interface of a model to the engine, and `TorchDecoder`, its implementation with torch.

    read(ids, cu_seqlens, states, encoded) -> states     prompts, several in one packed call
    score(ids, cu_seqlens, states) -> (logits, states)   the same, for prompts whose log probabilities are requested
    decode(ids, pool) -> logits                          one token for each of the first rows of a pool, in place
    encode(kind, rows) -> embeddings                     pictures and sound, for `read`

All work on the same states in the same memory (`models/state.py`), so another implementation, such as one in C, can
take over between two calls. Neither side knows text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.infer.generate import step_threads
from retentive.infer.graphs import Graphs
from retentive.models import LanguageModel
from retentive.models.encoders import Config, encoders_of, inserted
from retentive.models.state import State

STATES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
"""Dtypes that states of retention may have while decoding, by the names of options; None: their own, float32."""


class Decoder(Protocol):
    """A model as the engine sees it. All ids are int64 on the CPU, all logits float32 on the CPU."""

    vocab_size: int
    encoders: Mapping[str, Config]
    """Configs of the model's encoders by kind; empty for a model that reads text only."""

    def init_state(self) -> State:
        """Blank state of one sequence."""

    def adopt(self, state: State) -> State:
        """The state on this decoder's device; itself if it is there already."""

    def pool(self, slots: int) -> State:
        """Blank state of `slots` sequences to decode in place; it has `put`, and `reserve` for growing caches."""

    def encode(self, kind: str, rows: Tensor) -> Tensor:
        """Encode a kind's rows `[n, features]`, whole pictures, to embeddings `[n, D]` on the decoder's device."""

    def read(
        self, ids: Tensor, cu_seqlens: Tensor, states: Sequence[State], encoded: Mapping[str, Tensor] | None = None
    ) -> list[State]:
        """Read each sequence's ids; returns the states after them.

        Args:
            ids: `[T]`, the ids of all sequences, concatenated.
            cu_seqlens: `[N+1]`, first index of each sequence, from 0, and the end of the last.
            states: N states of one sequence each; consumed.
            encoded: per kind the embeddings `[n, D]` of all its placeholders among the ids, in order; None or empty
                for text only.
        """

    def score(self, ids: Tensor, cu_seqlens: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Same as `read`, but returns (logits `[T, vocab]` after each of the ids, states)."""

    def decode(self, ids: Tensor, pool: State) -> Tensor:
        """Decode ids `[n]`, one for each of the pool's first n sequences, in place; returns logits `[n, vocab]`.

        The caller has reserved room for them in the pool.
        """


class TorchDecoder:
    """`Decoder` of any model of this package."""

    def __init__(self, model: LanguageModel, state_dtype: torch.dtype | None = None):
        """
        Args:
            state_dtype: dtype of the states of retention in a pool; None: float32.
        """
        self.model, self.vocab_size, self.state_dtype = model.eval(), model.config.vocab_size, state_dtype
        self.encoders: Mapping[str, Config] = {kind: encoder.config for kind, encoder in encoders_of(model).items()}
        # A view of the pool is tens of tensor views and costs as much as a small model's layer. So the last one is
        # kept as long as the pool and the number of rows stay the same.
        self._view: tuple[Any, int, Any] = (None, 0, None)  # pool, rows, view
        self._graphs = Graphs(model, state_dtype)

    def init_state(self) -> State:
        return self.model.init_state(1)

    def adopt(self, state: State) -> State:
        return state.to(self.model.device)

    def pool(self, slots: int) -> State:
        return self.model.init_state(slots).for_decoding(self.model.dtype, state_dtype=self.state_dtype)

    def encode(self, kind: str, rows: Tensor) -> Tensor:
        return encoders_of(self.model)[kind](rows.to(self.model.device))

    def read(
        self, ids: Tensor, cu_seqlens: Tensor, states: Sequence[State], encoded: Mapping[str, Tensor] | None = None
    ) -> list[State]:
        return self._hidden(ids, cu_seqlens, states, encoded)[1]

    def score(self, ids: Tensor, cu_seqlens: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        x, states = self._hidden(ids, cu_seqlens, states)
        return self.model.head(x).float().cpu(), states

    def _hidden(
        self, ids: Tensor, cu_seqlens: Tensor, states: Sequence[State], encoded: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, list[State]]:
        """(hidden `[T,D]`, states) of sequences packed into one row; a single one is not packed, to save copies."""
        ids = ids[None].to(self.model.device)
        embeds = inserted(self.model, ids, encoded) if encoded else None
        if len(states) == 1:
            x, state = self.model.hidden(ids, states[0], embeds=embeds)
            return x[0], [state]
        cu_seqlens = cu_seqlens.to(self.model.device)
        x, state = self.model.hidden(ids, State.cat(states), embeds=embeds, cu_seqlens=cu_seqlens)
        return x[0], [state.select(torch.tensor([n])) for n in range(len(states))]

    def decode(self, ids: Tensor, pool: Any) -> Tensor:
        if recorded := self._graphs.step(pool, len(ids)):
            try:
                return recorded.run(ids.to(self.model.device)).cpu()
            except BaseException:
                self._graphs.forget()  # as below: the pool's memory can be freed
                raise
        n, kept = len(ids), self._view
        self._view = (None, 0, None)  # so that after an error the pool's memory can be freed
        # `is`: a pool that grew is a new object, and old views point into memory that is no longer written
        view = kept[2] if kept[0] is pool and kept[1] == n else pool.view(n)
        with step_threads(self.model, n, view):
            x, state = self.model.hidden(ids[:, None].to(self.model.device), view)
            pool.position[:n] = state.position  # the only part of a state that is not written in place
            logits = self.model.head(x[:, -1]).float().cpu()
        self._view = (pool, n, State(view.memories, view.position))  # `view` itself is used up
        return logits
