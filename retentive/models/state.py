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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.files import load_tensors, write_tensors
from retentive.layers.attention import Layer
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.ops import Ring
from retentive.ops.ring import slots

FORMAT = "retentive-state-1"


@dataclass
class RetentionState:
    """The states of all retention layers: the same size after 10 tokens and after 10 million."""

    kind: ClassVar[str] = "retention"
    window: ClassVar[int] = 0
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
    """Keys and values of all attention layers. The token at position p lies in slot p; slots beyond are free.

    With a window W the S slots are a ring, in which it lies in slot p mod S. S grows with the text up to W; a larger S
    holds more tokens than are attended to, so that as many can be taken back.
    """

    kind: ClassVar[str] = "kv"
    keys: list[Tensor]
    """`[N,S,kv_heads,K]` of each layer; empty before the first token."""
    values: list[Tensor]
    position: Tensor
    """int64 `[N]`."""
    gates: list[Tensor] = field(default_factory=list)
    """`[N,S,H]` of each layer, every token's log forget gate, float32 (float64 in a float64 model); or none at all."""
    window: int = 0
    """Tokens that a token attends to, itself included; 0: all before it."""
    oldest: Tensor | None = None
    """int64 `[N]`, with a window: tokens before this position are lost, even where the position was rolled back."""

    def __post_init__(self):
        if self.window and self.oldest is None:
            self.oldest = torch.zeros_like(self.position)

    @staticmethod
    def empty(config: TransformerConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "KVCache":
        """The cache of `batch` sequences before their first token: no slots yet."""
        shape = (batch, 0, config.kv_heads, config.dim // config.heads)
        empty = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.layers)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = config.layers if config.forget_gate else 0
        return KVCache(
            empty[::2],
            empty[1::2],
            torch.zeros(batch, dtype=torch.int64, device=device),
            [torch.zeros(batch, 0, config.heads, dtype=wide, device=device) for _ in range(gates)],
            config.attention_window or 0,
        )

    @staticmethod
    def of(layers: Sequence[Layer | None], position: Tensor, window: int, oldest: Tensor | None) -> "KVCache":
        """The cache of what the layers return; empty where they kept none (packed, in training)."""
        kept = [layer for layer in layers if layer is not None]
        keys, values, *gates = [list(x) for x in zip(*kept, strict=True)] or ([], [])
        return KVCache(keys, values, position, gates[0] if gates else [], window, oldest)

    def of_layer(self, layer: int) -> Layer:
        """(keys, values) of a layer, and its gates where there are any."""
        return (self.keys[layer], self.values[layer], *(self.gates[layer : layer + 1]))

    def settled(self) -> "KVCache":
        """Itself: all tokens are in it as they are."""
        return self

    @property
    def blocks(self) -> int:
        return len(self.keys)

    @property
    def slots(self) -> int:
        """S, of each sequence in each layer."""
        return self.keys[0].shape[1] if self.keys else 0

    def tensors(self) -> list[Tensor]:
        """All that have slots."""
        return [*self.keys, *self.values, *self.gates]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free slots included."""
        return sum(x.nbytes for x in self.tensors()) + sum(
            x.nbytes for x in (self.position, self.oldest) if x is not None
        )

    def _slots(self, f: Callable[[Tensor], Tensor]) -> "KVCache":
        """The same sequences with other slots; f is of a tensor that has slots."""
        keys, values, gates = ([f(x) for x in part] for part in (self.keys, self.values, self.gates))
        return replace(self, keys=keys, values=values, gates=gates)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "KVCache":
        oldest = None if self.oldest is None else f(self.oldest)
        return replace(self._slots(f), position=f(self.position), oldest=oldest)

    def reserve(self, slots: int) -> "KVCache":
        """A cache with at least `slots` slots, or a window of them; itself if it has them.

        It grows by half or more, so that n tokens one by one copy O(n) slots in all.
        """
        have = self.slots
        if self.window:
            slots = min(slots, max(self.window, have))
        if not self.keys or have >= slots:
            return self
        size = max(slots, have * 3 // 2)
        if self.window:
            size = min(size, self.window)

        def grow(x: Tensor) -> Tensor:  # zeros: a masked slot still enters SDPA's products, where a NaN would spread
            larger = x.new_zeros(x.shape[0], size, *x.shape[2:])
            larger[:, :have] = x
            return larger

        return self._slots(grow)

    def _first_held(self) -> Tensor:
        """int64 `[N]`, with a window: the first position whose token is still in its slot."""
        assert self.oldest is not None
        return torch.maximum(self.oldest, self.position - self.slots)

    def _in_rings_of(self, slots: int) -> "KVCache":
        """The same with so many slots, for a window: as many of the last tokens as there is room for, each in its own.

        What free slots hold is zero, see `reserve`.
        """
        have = self.slots
        if have == slots:
            return self
        last = self.position[:, None] - 1
        at = last - (last - torch.arange(slots, device=last.device)) % max(slots, 1)  # the position of each new slot
        first = self._first_held()
        lost, rows = at < first[:, None], torch.arange(len(last), device=last.device)[:, None]

        def lay(x: Tensor) -> Tensor:
            if not have:
                return x.new_zeros(x.shape[0], slots, *x.shape[2:])
            return x[rows, at % have].masked_fill_(lost.view(*lost.shape, *(1,) * (x.ndim - 2)), 0)

        return replace(self._slots(lay), oldest=first)

    def select(self, rows: Tensor) -> "KVCache":
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    @staticmethod
    def cat(states: Sequence["KVCache"]) -> "KVCache":
        """All sequences of `states`, in order, each with as many slots as the longest."""
        slots = max(s.slots for s in states)

        def longer(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0) * (x.ndim - 2) + (0, slots - x.shape[1]))

        states = [s._in_rings_of(slots) if s.window else s._slots(longer) for s in states]
        joined = [
            [torch.cat(layer) for layer in zip(*part, strict=True)]
            for part in zip(*((s.keys, s.values, s.gates) for s in states), strict=True)
        ]
        oldest = [s.oldest for s in states if s.oldest is not None]
        return KVCache(
            joined[0],
            joined[1],
            torch.cat([s.position for s in states]),
            joined[2],
            states[0].window,
            torch.cat(oldest) if oldest else None,
        )

    def view(self, n: int) -> "KVCache":
        return self._map(lambda x: x[:n])

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "KVCache":
        """Itself: it is written in place as it is. With a window, a ring that keeps `rollback` tokens more."""
        if not self.window or self.slots >= self.window + rollback:
            return self
        return self._in_rings_of(self.window + rollback)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens of every sequence: their slots will be written anew.

        Raises:
            ValueError: more than there are; with a window, more than `for_decoding` was told to keep.
        """
        self.check_rollback(tokens)
        self.position -= tokens

    def check_rollback(self, tokens: int) -> None:
        """Raises ValueError if `tokens` tokens cannot be taken back."""
        if tokens > int(self.position.min()) or tokens < 0:
            raise ValueError(f"the cache holds {self.position.tolist()} tokens, cannot take back {tokens} of them")
        if self.oldest is None:
            return
        self.oldest.copy_(self._first_held())  # noted before the position moves: it stays lost
        if bool(((self.position - tokens - self.window).clamp(min=0) < self.oldest).any()):
            raise ValueError(
                f"cannot take back {tokens} tokens: the window of {self.window} before them is no longer in the cache, "
                f"decode with for_decoding(dtype, rollback={tokens})"
            )

    def put(self, row: int, other: "KVCache", source: int = 0) -> None:
        """Writes sequence `source` of `other` over the one at `row`, in place; `reserve` the slots for it before."""
        used = int(other.position[source])
        if self.oldest is not None:
            if min(used, self.window) > self.slots:
                raise ValueError(f"the cache has {self.slots} slots, the sequence {used} tokens: reserve them before")
            other = other.select(torch.tensor([source]))._in_rings_of(self.slots)
            used, source = self.slots, 0
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[row, :used] = theirs[source, :used]
        self.position[row] = other.position[source]
        if self.oldest is not None and other.oldest is not None:
            self.oldest[row] = other.oldest[source]

    def clone(self) -> "KVCache":
        return self._map(torch.clone)

    def detach(self) -> "KVCache":
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> "KVCache":
        return self._map(lambda x: x.to(device))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        _save(self, path, metadata)

    def named(self) -> dict[str, Tensor]:
        """The slots in use, by their names in a file: as many as there are tokens, or tokens of the window."""
        used = int(self.position.max()) if len(self.position) else 0
        cache = self._in_rings_of(min(used, self.window)) if self.window and self.keys else self
        parts = {"keys": cache.keys, "values": cache.values, "gates": cache.gates}
        return {f"{name}.{i}": x[:, :used].contiguous() for name, part in parts.items() for i, x in enumerate(part)}


@dataclass
class HybridState:
    """The states of the retention blocks and the cache of the attention blocks, at the same positions."""

    kind: ClassVar[str] = "hybrid"
    retention: RetentionState
    cache: KVCache

    def __post_init__(self):
        # One position tensor for both, since it is written in place; in a cache of its own, since the one passed in may
        # be that of another state too.
        self.cache = replace(self.cache, position=self.retention.position)

    @property
    def position(self) -> Tensor:
        return self.retention.position

    @property
    def window(self) -> int:
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

    def select(self, rows: Tensor) -> "HybridState":
        return HybridState(self.retention.select(rows), self.cache.select(rows))

    @staticmethod
    def cat(states: Sequence["HybridState"]) -> "HybridState":
        retention = RetentionState.cat([s.retention for s in states])
        return HybridState(retention, KVCache.cat([s.cache for s in states]))

    def view(self, n: int) -> "HybridState":
        return HybridState(self.retention.view(n), self.cache.view(n))

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0) -> "HybridState":
        return HybridState(self.retention.for_decoding(dtype, rollback), self.cache.for_decoding(dtype, rollback))

    def rollback(self, tokens: int) -> None:
        self.cache.check_rollback(tokens)  # before anything moves: one part may hold more tokens than the other
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
for _kind in (RetentionState, HybridState):
    pytree.register_dataclass(_kind, serialized_type_name=f"retentive.{_kind.__name__}")


def _children(cache: KVCache) -> list[tuple[str, Any]]:
    names = ("keys", "values", "position", "gates", "oldest")
    return [(name, getattr(cache, name)) for name in names if getattr(cache, name) is not None]


def _restored(children: Iterable[Any], window: int) -> KVCache:
    keys, values, position, gates, *oldest = children
    return KVCache(keys, values, position, gates, window, *oldest)


pytree.register_pytree_node(  # not as a dataclass, whose every field would be data: the window is a constant
    KVCache,
    lambda cache: ([child for _, child in _children(cache)], cache.window),
    _restored,
    serialized_type_name="retentive.KVCache",
    flatten_with_keys_fn=lambda cache: (
        [(pytree.GetAttrKey(name), child) for name, child in _children(cache)],
        cache.window,
    ),
)


def _save(state: State, path: str | Path, metadata: dict[str, str] | None) -> None:
    tensors = state.named() | {"position": state.position}
    window = {"window": str(state.window)} if state.window else {}
    write_tensors(Path(path), tensors, {**(metadata or {}), "format": FORMAT, "kind": state.kind, **window})


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
