"""What a model remembers between calls: RetentionState of constant size, KVCache that grows, HybridState of both.

A KVCache with a window grows to that many tokens and no further: its slots are a ring, written over again and again.

A state is passed to the model, and a new one comes back. The one passed in is used up, since caches and rings are
written in place: `clone()` it to go on from the same point twice. All three kinds have one protocol:

    position         int64 [N], tokens that each sequence has had (padding does not count)
    blocks           the number of blocks of the model that it belongs to
    window           tokens that its cache keeps for each sequence; 0: all, or there is no cache
    nbytes           bytes its tensors hold
    select(rows)     the sequences `rows` (indices; repeated or reordered as for beam search)
    view(n)          the first n sequences, in the same memory
    put(row, other)  writes one sequence of another state over the one at `row`, in place
    for_decoding(dtype), reserve(slots)   a pool for `view` and `put`; room in it for so many tokens a sequence
    rollback(tokens)                      takes back the last tokens, in place
    settled()        plain tensors with all tokens in them, without rings; itself where it has none
    cat(states)      sequences of several states in one
    clone() to(device) detach()
    save(path)       one safetensors file;  load_state(path) reads it

All are pytree nodes, so that torch.export and torch.func see their tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.files import load_tensors
from retentive.models.cache import KVCache
from retentive.models.config import RetNetConfig
from retentive.models.sequences import FORMAT, Sequences
from retentive.ops import Ring
from retentive.ops.ring import slots


@dataclass
class RetentionState(Sequences):
    """The states of all retention layers: the same size after 10 tokens and after 10 million."""

    kind: ClassVar[str] = "retention"
    window: ClassVar[int] = 0  # type: ignore[misc]  # the same for all
    layers: Sequence[Tensor | Ring]
    """`[N,H,K,V]` of each layer, float32 (float64 in a float64 model); a Ring while tokens are decoded one by one."""
    position: Tensor
    """int64 `[N]`."""

    @staticmethod
    def empty(config: RetNetConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "RetentionState":
        """The state of `batch` sequences before their first token, for a model of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, config.heads, config.key_dim // config.heads, config.value_dim // config.heads)
        layers = [torch.zeros(shape, dtype=wide, device=device) for _ in range(config.layers)]
        return RetentionState(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def blocks(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.layers) + self.position.nbytes

    def _map(self, f: Callable[[Tensor], Tensor]) -> "RetentionState":
        # Sequences come first in every tensor, those of rings and the position too: one f serves for all.
        return RetentionState([x.map(f) if isinstance(x, Ring) else f(x) for x in self.layers], f(self.position))

    def tensors(self) -> list[Tensor]:
        """`[N,H,K,V]` of each layer, with the tokens of its ring in it."""
        return [x.to_state() if isinstance(x, Ring) else x for x in self.layers]

    def settled(self) -> "RetentionState":
        """The same without rings: smaller, and all tokens are in the state itself."""
        decoding = any(isinstance(x, Ring) for x in self.layers)
        return RetentionState(self.tensors(), self.position.clone()) if decoding else self

    @staticmethod
    def cat(states: Sequence["RetentionState"]) -> "RetentionState":
        """All sequences of `states`, in order."""
        by_layer = zip(*(s.tensors() for s in states), strict=True)
        return RetentionState([torch.cat(layer) for layer in by_layer], torch.cat([s.position for s in states]))

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "RetentionState":
        """The same with every layer a Ring for k and v of `dtype`, which decoding writes in place.

        At least the last `rollback` tokens decoded can be taken back.
        """
        # A ring of R slots holds the last R / 2 tokens at any time: see `ops/ring.py`.
        rings = [Ring.open(x, dtype, max(slots(*x.shape[2:]), 2 * rollback)) for x in self.tensors()]
        return RetentionState(rings, self.position)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens of every sequence, in place.

        Raises:
            ValueError: more than the rings hold, or there are no rings (`for_decoding` makes them).
        """
        rings = [x for x in self.layers if isinstance(x, Ring)]
        if tokens and len(rings) < len(self.layers):
            raise ValueError(f"cannot take back {tokens} tokens: they are in the state, decode with for_decoding()")
        for ring in rings:
            ring.rollback(tokens)
        self.position -= tokens

    def put(self, row: int, other: "RetentionState", source: int = 0) -> None:
        """Writes sequence `source` of `other` over the one at `row`, in place."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, Ring):
                mine.put(row, theirs, source)
            elif isinstance(theirs, Ring):
                mine[row] = theirs.map(lambda x: x[source : source + 1]).to_state()[0]
            else:
                mine[row] = theirs[source]
        self.position[row] = other.position[source]

    def reserve(self, slots: int) -> "RetentionState":
        """Itself: it has room for any number of tokens."""
        return self

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in a file."""
        return {f"layers.{i}": x for i, x in enumerate(self.tensors())}


@dataclass
class HybridState(Sequences):
    """The states of the retention blocks and the cache of the attention blocks, at the same positions."""

    kind: ClassVar[str] = "hybrid"
    retention: RetentionState
    cache: KVCache

    def __post_init__(self):
        # One position tensor for both, since it is written in place; in a cache of its own, since the one passed in may
        # be that of another state too.
        self.cache = replace(self.cache, position=self.retention.position)

    @property
    def position(self) -> Tensor:  # type: ignore[override]  # nobody sets it: it is written in place
        return self.retention.position

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.cache.window

    @property
    def blocks(self) -> int:
        return self.retention.blocks + self.cache.blocks

    @property
    def nbytes(self) -> int:
        return self.retention.nbytes + self.cache.nbytes - self.position.nbytes  # which both count

    def settled(self) -> "HybridState":
        """The same without rings."""
        retention = self.retention.settled()
        return self if retention is self.retention else HybridState(retention, self.cache)

    def reserve(self, slots: int) -> "HybridState":
        return HybridState(self.retention, self.cache.reserve(slots))

    def _map(self, f: Callable[[Tensor], Tensor]) -> "HybridState":
        return HybridState(self.retention._map(f), self.cache._map(f))

    @staticmethod
    def cat(states: Sequence["HybridState"]) -> "HybridState":
        retention = RetentionState.cat([s.retention for s in states])
        return HybridState(retention, KVCache.cat([s.cache for s in states]))

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "HybridState":
        return HybridState(self.retention.for_decoding(dtype, rollback), self.cache.for_decoding(dtype, rollback))

    def rollback(self, tokens: int) -> None:
        self.cache.check_rollback(tokens)  # before anything moves: one part may hold more tokens than the other
        # The position, which the cache shares, is moved by this: the cache's slots will be written anew.
        self.retention.rollback(tokens)

    def put(self, row: int, other: "HybridState", source: int = 0) -> None:
        self.cache.put(row, other.cache, source)
        self.retention.put(row, other.retention, source)

    def named(self) -> dict[str, Tensor]:
        return self.retention.named() | self.cache.named()


State = RetentionState | KVCache | HybridState
for _kind in (RetentionState, HybridState):
    pytree.register_dataclass(_kind, serialized_type_name=f"retentive.{_kind.__name__}")


def load_state(path: str | Path) -> State:
    """The state that `save` wrote to `path`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a state file, or one that is cut short or of a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no state file at {path}")
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no saved state (format {metadata.get('format')!r}, expected {FORMAT!r})")

    def numbered(name: str) -> list[Tensor]:
        # by their numbers, since a file has its tensors in the order of their names: layers.10 before layers.2
        return [tensors[f"{name}.{i}"] for i in range(sum(key.startswith(name + ".") for key in tensors))]

    window = metadata.get("window", "0")  # files from before there were windows say nothing of it
    if not (window.isascii() and window.isdigit()):
        raise ValueError(f"{path} holds a state with a window of {window!r}, expected a number of tokens")
    retention = RetentionState(numbered("layers"), tensors["position"])
    cache = KVCache(numbered("keys"), numbered("values"), tensors["position"], numbered("gates"), int(window))
    if cache.window and cache.keys:
        slots = min(int(cache.position.max()), cache.window)
        if cache.slots != slots:
            raise ValueError(f"{path} holds {cache.slots} slots, its tokens and window need {slots}: write it again")
    states: dict[str, State] = {"retention": retention, "kv": cache, "hybrid": HybridState(retention, cache)}
    if metadata.get("kind") not in states:
        raise ValueError(f"{path} holds a state of kind {metadata.get('kind')!r}, expected one of {', '.join(states)}")
    return states[metadata["kind"]]
