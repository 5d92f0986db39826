"""KVCache: keys and values of attention layers, which grow with the text, or with a window stay in a ring of slots."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.layers.attention import Layer
from retentive.models.config import TransformerConfig
from retentive.models.sequences import Sequences


@dataclass
class KVCache(Sequences):
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
            mine[row, used:] = 0  # a NaN of the row's last sequence would spread from a masked slot, see `reserve`
        self.position[row] = other.position[source]
        if self.oldest is not None and other.oldest is not None:
            self.oldest[row] = other.oldest[source]

    def named(self) -> dict[str, Tensor]:
        """The slots in use, by their names in a file: as many as there are tokens, or tokens of the window."""
        used = int(self.position.max()) if len(self.position) else 0
        cache = self._in_rings_of(min(used, self.window)) if self.window and self.keys else self
        parts = {"keys": cache.keys, "values": cache.values, "gates": cache.gates}
        return {f"{name}.{i}": x[:, :used].contiguous() for name, part in parts.items() for i, x in enumerate(part)}


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
