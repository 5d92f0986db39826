"""What a model remembers between calls: RetentionState of constant size, KVCache that grows, HybridState of both.

A state is passed to the model, and a new one comes back. The one passed in is used up, since caches and rings are
written in place: `clone()` it to go on from the same point twice. All three kinds have one protocol:

    position         int64 [N], tokens that each sequence has had (padding does not count)
    blocks           the number of blocks of the model that it belongs to
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
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.files import load_tensors, write_tensors
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.ops import Ring
from retentive.ops.ring import slots

FORMAT = "retentive-state-1"


@dataclass
class RetentionState:
    """The states of all retention layers: the same size after 10 tokens and after 10 million."""

    kind: ClassVar[str] = "retention"
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

    def select(self, rows: Tensor) -> "RetentionState":
        """The sequences `rows`, int64 `[n]`."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    @staticmethod
    def cat(states: Sequence["RetentionState"]) -> "RetentionState":
        """All sequences of `states`, in order."""
        by_layer = zip(*(s.tensors() for s in states), strict=True)
        return RetentionState([torch.cat(layer) for layer in by_layer], torch.cat([s.position for s in states]))

    def view(self, n: int) -> "RetentionState":
        """The first n sequences, in the same memory."""
        return self._map(lambda x: x[:n])

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

    def clone(self) -> "RetentionState":
        return self._map(torch.clone)

    def detach(self) -> "RetentionState":
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> "RetentionState":
        return self._map(lambda x: x.to(device))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Writes it as one safetensors file, with `metadata` beside the format's own."""
        _save(self, path, metadata)

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in a file."""
        return {f"layers.{i}": x for i, x in enumerate(self.tensors())}


@dataclass
class KVCache:
    """Keys and values of all attention layers. The token at position p lies in slot p; slots beyond are free."""

    kind: ClassVar[str] = "kv"
    keys: list[Tensor]
    """`[N,S,kv_heads,K]` of each layer; empty before the first token."""
    values: list[Tensor]
    position: Tensor
    """int64 `[N]`."""

    @staticmethod
    def empty(config: TransformerConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "KVCache":
        """The cache of `batch` sequences before their first token: no slots yet."""
        shape = (batch, 0, config.kv_heads, config.dim // config.heads)
        empty = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.layers)]
        return KVCache(empty[::2], empty[1::2], torch.zeros(batch, dtype=torch.int64, device=device))

    @staticmethod
    def of(pairs: Sequence[tuple[Tensor, Tensor] | None], position: Tensor) -> "KVCache":
        """The cache of (keys, values) layer by layer; empty where the layers kept none (packed, in training)."""
        kept = [pair for pair in pairs if pair is not None]
        return KVCache([keys for keys, _ in kept], [values for _, values in kept], position)

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer."""
        return self.keys[layer], self.values[layer]

    def settled(self) -> "KVCache":
        """Itself: it has no rings."""
        return self

    @property
    def blocks(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free slots included."""
        return sum(x.nbytes for x in (*self.keys, *self.values)) + self.position.nbytes

    def _map(self, f: Callable[[Tensor], Tensor]) -> "KVCache":
        return KVCache([f(x) for x in self.keys], [f(x) for x in self.values], f(self.position))

    def reserve(self, slots: int) -> "KVCache":
        """A cache with at least `slots` slots, itself if it has them.

        It grows by half or more, so that n tokens one by one copy O(n) slots in all.
        """
        if not self.keys or self.keys[0].shape[1] >= slots:
            return self
        have = self.keys[0].shape[1]

        def grow(x: Tensor) -> Tensor:  # zeros: a masked slot still enters SDPA's products, where a NaN would spread
            larger = x.new_zeros(x.shape[0], max(slots, have * 3 // 2), *x.shape[2:])
            larger[:, :have] = x
            return larger

        return KVCache([grow(x) for x in self.keys], [grow(x) for x in self.values], self.position)

    def select(self, rows: Tensor) -> "KVCache":
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    @staticmethod
    def cat(states: Sequence["KVCache"]) -> "KVCache":
        """All sequences of `states`, in order, each with as many slots as the longest."""
        slots = max((s.keys[0].shape[1] for s in states if s.keys), default=0)

        def join(layer: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, 0, 0, 0, slots - x.shape[1])) for x in layer])  # [N,S,kv_heads,K]: S

        keys = [join(layer) for layer in zip(*(s.keys for s in states), strict=True)]
        values = [join(layer) for layer in zip(*(s.values for s in states), strict=True)]
        return KVCache(keys, values, torch.cat([s.position for s in states]))

    def view(self, n: int) -> "KVCache":
        return self._map(lambda x: x[:n])

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "KVCache":
        """Itself: it is written in place as it is."""
        return self

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens of every sequence: their slots will be written anew."""
        if tokens > int(self.position.min()) or tokens < 0:
            raise ValueError(f"the cache holds {self.position.tolist()} tokens, cannot take back {tokens} of them")
        self.position -= tokens

    def put(self, row: int, other: "KVCache", source: int = 0) -> None:
        """Writes sequence `source` of `other` over the one at `row`, in place; `reserve` the slots for it before."""
        used = int(other.position[source])
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[row, :used] = theirs[source, :used]
        self.position[row] = used

    def clone(self) -> "KVCache":
        return self._map(torch.clone)

    def detach(self) -> "KVCache":
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> "KVCache":
        return self._map(lambda x: x.to(device))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        _save(self, path, metadata)

    def named(self) -> dict[str, Tensor]:
        """The slots in use, by their names in a file."""
        used = int(self.position.max()) if len(self.position) else 0
        tensors = {f"keys.{i}": x[:, :used].contiguous() for i, x in enumerate(self.keys)}
        return tensors | {f"values.{i}": x[:, :used].contiguous() for i, x in enumerate(self.values)}


@dataclass
class HybridState:
    """The states of the retention blocks and the cache of the attention blocks, at the same positions."""

    kind: ClassVar[str] = "hybrid"
    retention: RetentionState
    cache: KVCache

    def __post_init__(self):
        # One position tensor for both, since it is written in place; in a cache of its own, since the one passed in may
        # be that of another state too.
        self.cache = KVCache(self.cache.keys, self.cache.values, self.retention.position)

    @property
    def position(self) -> Tensor:
        return self.retention.position

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

    def select(self, rows: Tensor) -> "HybridState":
        return HybridState(self.retention.select(rows), self.cache.select(rows))

    @staticmethod
    def cat(states: Sequence["HybridState"]) -> "HybridState":
        retention = RetentionState.cat([s.retention for s in states])
        return HybridState(retention, KVCache.cat([s.cache for s in states]))

    def view(self, n: int) -> "HybridState":
        return HybridState(self.retention.view(n), self.cache.view(n))

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "HybridState":
        return HybridState(self.retention.for_decoding(dtype, rollback), self.cache)

    def rollback(self, tokens: int) -> None:
        # The position, which the cache shares, is moved by this: the cache's slots will be written anew.
        self.retention.rollback(tokens)

    def put(self, row: int, other: "HybridState", source: int = 0) -> None:
        self.cache.put(row, other.cache, source)
        self.retention.put(row, other.retention, source)

    def clone(self) -> "HybridState":
        return HybridState(self.retention.clone(), self.cache.clone())

    def detach(self) -> "HybridState":
        return HybridState(self.retention.detach(), self.cache.detach())

    def to(self, device: torch.device | str) -> "HybridState":
        return HybridState(self.retention.to(device), self.cache.to(device))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        _save(self, path, metadata)

    def named(self) -> dict[str, Tensor]:
        return self.retention.named() | self.cache.named()


State = RetentionState | KVCache | HybridState
for _kind in (RetentionState, KVCache, HybridState):
    pytree.register_dataclass(_kind, serialized_type_name=f"retentive.{_kind.__name__}")


def _save(state: State, path: str | Path, metadata: dict[str, str] | None) -> None:
    tensors = state.named() | {"position": state.position}
    write_tensors(Path(path), tensors, {**(metadata or {}), "format": FORMAT, "kind": state.kind})


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

    retention = RetentionState(numbered("layers"), tensors["position"])
    cache = KVCache(numbered("keys"), numbered("values"), tensors["position"])
    states: dict[str, State] = {"retention": retention, "kv": cache, "hybrid": HybridState(retention, cache)}
    if metadata.get("kind") not in states:
        raise ValueError(f"{path} holds a state of kind {metadata.get('kind')!r}, expected one of {', '.join(states)}")
    return states[metadata["kind"]]
