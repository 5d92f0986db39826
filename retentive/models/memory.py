"""Memory of one block: RetentionMemory of constant size, AttentionMemory that grows or stays in a ring of slots,
ConvolutionMemory of the last few tokens.

`State` (state.py) holds one memory per block, and the positions that they share. All kinds have the same methods.
`position` is int64 `[N]`, the number of tokens in each sequence:

    kind, window, sinks    of its mixer; maximum slots of a cache, 0: unlimited, or no cache; how many of them keep the
                           first tokens
    nbytes                 bytes of its tensors
    shapes                 shapes of its tensors, without the number of slots, and the window
    empty(config, batch, dtype, device), first(mixer, layer)    before any token; from what the layer first returned
    layer                  what its layer reads and returns
    filled(layer)          with what its layer returned; itself if that was written in place
    map(f)                 applies f to every tensor; the first dimension of all is the sequences
    reserve(slots)         makes room for that many tokens per sequence; returns itself if it has it
    put(row, other, source, position)            overwrites one sequence with another, in place
    for_decoding(dtype, rollback, position, state_dtype)    for decoding in place, with `rollback` tokens that can be
                           taken back; the dtype of states of retention, None: their own
    check_rollback(tokens, position), rollback(tokens)
    settled()              plain tensors that include all tokens
    cat(memories, positions)
    named(position)        tensors by their names in a file;  read(tensors, window, position, sinks)
    writes_into(other)     True if it is `other` after tokens were written in place
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.layers.config import AttentionConfig, ConvolutionConfig, RetentionConfig
from retentive.layers.past import Layer
from retentive.layers.slots import positions_in, slot_of
from retentive.ops import Ring
from retentive.ops.ring import slots as ring_slots


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of states and gates in a model of `dtype`: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class RetentionMemory:
    """State of a retention layer, of the same size after 10 tokens and after 10 million."""

    kind: ClassVar[str] = RetentionConfig.kind
    window: ClassVar[int] = 0
    sinks: ClassVar[int] = 0
    value: Tensor | Ring
    """`[N,H,K,V]`, float32 (float64 in a float64 model); a Ring while decoding token by token."""

    @staticmethod
    def empty(config: RetentionConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "RetentionMemory":
        """Returns the state of `batch` sequences before their first token, for a model of `dtype`."""
        return RetentionMemory(torch.zeros(batch, *config.head_shape, dtype=_wide(dtype), device=device))

    @staticmethod
    def first(mixer: Any, layer: Tensor | Ring) -> "RetentionMemory":
        """Returns the memory of a layer that read the first tokens."""
        return RetentionMemory(layer)

    @property
    def layer(self) -> Tensor | Ring:
        return self.value

    def filled(self, layer: Tensor | Ring) -> "RetentionMemory":
        return RetentionMemory(layer)

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.value.shape)]

    def tensor(self) -> Tensor:
        """Returns `[N,H,K,V]`, including the tokens in the ring."""
        return self.value.to_state() if isinstance(self.value, Ring) else self.value

    def tensors(self) -> list[Tensor]:
        """Returns all its tensors."""
        return list(self.value.tensors().values()) if isinstance(self.value, Ring) else [self.value]

    def map(self, f: Callable[[Tensor], Tensor]) -> "RetentionMemory":
        return RetentionMemory(self.value.map(f) if isinstance(self.value, Ring) else f(self.value))

    def settled(self) -> "RetentionMemory":
        return RetentionMemory(self.tensor()) if isinstance(self.value, Ring) else self

    def reserve(self, slots: int) -> "RetentionMemory":
        return self

    @staticmethod
    def cat(memories: Sequence["RetentionMemory"], positions: Sequence[Tensor]) -> "RetentionMemory":
        return RetentionMemory(torch.cat([m.tensor() for m in memories]))

    def for_decoding(
        self, dtype: torch.dtype, rollback: int, position: Tensor, state_dtype: torch.dtype | None = None
    ) -> "RetentionMemory":
        # A ring of R slots always holds the last R / 2 tokens: see `ops/ring.py`.
        state = self.tensor()
        slots = max(ring_slots(*state.shape[2:]), 2 * rollback)
        return RetentionMemory(Ring.open(state, dtype, slots, state_dtype))

    def check_rollback(self, tokens: int, position: Tensor) -> None:
        """Raises ValueError if `tokens` tokens cannot be taken back."""
        if tokens and not isinstance(self.value, Ring):
            raise ValueError(f"cannot take back {tokens} tokens: they are in the state, decode with for_decoding()")

    def rollback(self, tokens: int) -> None:
        if isinstance(self.value, Ring):
            self.value.rollback(tokens)

    def put(self, row: int, other: "RetentionMemory", source: int, position: Tensor) -> None:
        mine, theirs = self.value, other.value
        if isinstance(mine, Ring):
            mine.put(row, theirs, source)
        elif isinstance(theirs, Ring):
            mine[row] = theirs.map(lambda x: x[source : source + 1]).to_state()[0]
        else:
            mine[row] = theirs[source]

    def named(self, position: Tensor) -> dict[str, Tensor]:
        return {"state": self.tensor()}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], window: int, position: Tensor, sinks: int = 0) -> "RetentionMemory":
        return RetentionMemory(tensors["state"])

    def writes_into(self, other: "Memory") -> bool:
        """True if its tensors are those of `other`, and tokens are written into them in place."""
        if not (isinstance(self.value, Ring) and isinstance(other, RetentionMemory)):
            return False
        return self.value is other.value or self.value.state is other.value  # a ring folds into the state it is over


@dataclass
class AttentionMemory:
    """Keys and values of an attention layer. The token at position p is in slot p; slots beyond are free.

    With a window the slots after the sinks are a ring (`layers/slots.py`). S grows with the text up to both. A
    larger S holds more tokens than are attended to, so that these can be taken back.
    """

    kind: ClassVar[str] = AttentionConfig.kind
    keys: Tensor
    """`[N,S,kv_heads,K]`."""
    values: Tensor
    """`[N,S,kv_heads,K]`."""
    gates: Tensor | None = None
    """`[N,S,H]`, each token's log forget gate, float32 (float64 in a float64 model); None without forget gates."""
    window: int = 0
    """Number of tokens that a token attends to, itself and the sinks included; 0: all."""
    oldest: Tensor | None = None
    """int64 `[N]`, with a window: tokens before this position, the sinks excepted, are lost, even after a rollback."""
    sinks: int = 0
    """First tokens of a text, which stay in the first slots."""

    def __post_init__(self):
        if self.window and self.oldest is None:
            self.oldest = torch.zeros(self.keys.shape[0], dtype=torch.int64, device=self.keys.device)

    @staticmethod
    def empty(config: AttentionConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "AttentionMemory":
        """Returns the cache of `batch` sequences before their first token, without slots."""
        keys, values = (
            torch.zeros(batch, 0, config.kv_heads, config.head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        gates = torch.zeros(batch, 0, config.heads, dtype=_wide(dtype), device=device) if config.forget_gate else None
        return AttentionMemory(keys, values, gates, config.slots, sinks=config.sinks)

    @staticmethod
    def first(mixer: Any, layer: Layer) -> "AttentionMemory":
        """Returns the memory of a layer that read the first tokens."""
        keys, values, *gates = layer
        return AttentionMemory(keys, values, gates[0] if gates else None, mixer.slots, sinks=mixer.sinks)

    @property
    def layer(self) -> Layer:
        """(keys, values), and the gates if any: the cache in the layer's form."""
        return (self.keys, self.values) if self.gates is None else (self.keys, self.values, self.gates)

    def filled(self, layer: Layer) -> "AttentionMemory":
        """Returns a memory with this window and another cache, in the layer's form; itself if the cache is its own."""
        keys, values, *gates = layer
        if keys is self.keys:
            return self
        return AttentionMemory(keys, values, gates[0] if gates else None, self.window, self.oldest, self.sinks)

    @property
    def slots(self) -> int:
        """Number of slots S per sequence."""
        return self.keys.shape[1]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.window, self.sinks, x.shape[0], *x.shape[2:]) for x in self.layer]

    def tensors(self) -> list[Tensor]:
        """Returns all its tensors."""
        return [*self.layer, *(() if self.oldest is None else (self.oldest,))]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def _slots(self, f: Callable[[Tensor], Tensor]) -> "AttentionMemory":
        """Returns the same sequences with other slots; f is applied to each tensor with slots."""
        return self.filled(tuple(f(x) for x in self.layer))

    def map(self, f: Callable[[Tensor], Tensor]) -> "AttentionMemory":
        return replace(self._slots(f), oldest=None if self.oldest is None else f(self.oldest))

    def settled(self) -> "AttentionMemory":
        return self

    def reserve(self, slots: int) -> "AttentionMemory":
        """Grows by at least half, so that n tokens one by one copy O(n) slots in all; with a window at most to it."""
        have = self.slots
        if self.window:
            slots = min(slots, max(self.window, have))
        if have >= slots:
            return self
        size = max(slots, have * 3 // 2)
        if self.window:
            size = min(size, self.window)

        def grow(x: Tensor) -> Tensor:  # zeros: masked slots still enter SDPA's products, where a NaN would spread
            larger = x.new_zeros(x.shape[0], size, *x.shape[2:])
            larger[:, :have] = x
            return larger

        return self._slots(grow)

    def _first_held(self, position: Tensor) -> Tensor:
        """Returns int64 `[N]`, with a window: the first position after the sinks whose token is still in its slot."""
        assert self.oldest is not None
        begin = torch.where(position > self.slots, position - (self.slots - self.sinks), 0)  # of the ring
        return torch.maximum(self.oldest, begin)

    def _in_rings_of(self, slots: int, position: Tensor) -> "AttentionMemory":
        """Returns a memory with another number of slots, for a window: the last tokens that fit, each in its own slot.

        Free slots hold zeros, see `reserve`.
        """
        have = self.slots
        if have == slots:
            return self
        at = positions_in(slots, self.sinks, position[:, None])
        first = self._first_held(position)
        lost = (at < 0) | ((at < first[:, None]) & (at >= self.sinks))
        rows, old = torch.arange(len(at), device=at.device)[:, None], slot_of(at.clamp(min=0), have, self.sinks)

        def lay(x: Tensor) -> Tensor:
            if not have:
                return x.new_zeros(x.shape[0], slots, *x.shape[2:])
            return x[rows, old].masked_fill_(lost.view(*lost.shape, *(1,) * (x.ndim - 2)), 0)

        return replace(self._slots(lay), oldest=first)

    @staticmethod
    def cat(memories: Sequence["AttentionMemory"], positions: Sequence[Tensor]) -> "AttentionMemory":
        """Joins sequences; each gets as many slots as the longest has."""
        slots = max(m.slots for m in memories)

        def longer(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0) * (x.ndim - 2) + (0, slots - x.shape[1]))

        memories = [
            m._in_rings_of(slots, position) if m.window else m._slots(longer)
            for m, position in zip(memories, positions, strict=True)
        ]
        joined = memories[0].filled(tuple(map(torch.cat, zip(*(m.layer for m in memories), strict=True))))
        oldest = [m.oldest for m in memories if m.oldest is not None]
        return replace(joined, oldest=torch.cat(oldest) if oldest else None)

    def for_decoding(
        self, dtype: torch.dtype, rollback: int, position: Tensor, state_dtype: torch.dtype | None = None
    ) -> "AttentionMemory":
        """Returns itself, since it is written in place; with a window, a ring that keeps `rollback` more tokens."""
        if not self.window or self.slots >= self.window + rollback:
            return self
        return self._in_rings_of(self.window + rollback, position)

    def check_rollback(self, tokens: int, position: Tensor) -> None:
        """Raises ValueError if `tokens` tokens cannot be taken back: with a window, more than `for_decoding` kept."""
        if tokens > int(position.min()) or tokens < 0:
            raise ValueError(f"the cache holds {position.tolist()} tokens, cannot take back {tokens} of them")
        if self.oldest is None:
            return
        self.oldest.copy_(self._first_held(position))  # before the position moves, since it stays lost
        window = self.window - self.sinks
        if bool(((position - tokens - window).clamp(min=0) < self.oldest).any()):
            raise ValueError(
                f"cannot take back {tokens} tokens: the window of {window} before them is no longer in the cache, "
                f"decode with for_decoding(dtype, rollback={tokens})"
            )

    def rollback(self, tokens: int) -> None:
        """Does nothing: the slots of these tokens will be overwritten."""

    def put(self, row: int, other: "AttentionMemory", source: int, position: Tensor) -> None:
        """Overwrites a sequence; `reserve` the slots for it before."""
        used = int(position[source])
        if self.oldest is not None:
            if min(used, self.window) > self.slots:
                raise ValueError(f"the cache has {self.slots} slots, the sequence {used} tokens: reserve them before")
            one = other.map(lambda x: x[source : source + 1])
            other = one._in_rings_of(self.slots, position[source : source + 1])
            used, source = self.slots, 0
        for mine, theirs in zip(self.layer, other.layer, strict=True):
            mine[row, :used] = theirs[source, :used]
            mine[row, used:] = 0  # a NaN of the row's old sequence would spread from a masked slot, see `reserve`
        if self.oldest is not None and other.oldest is not None:
            self.oldest[row] = other.oldest[source]

    def named(self, position: Tensor) -> dict[str, Tensor]:
        """Returns the slots in use: as many as there are tokens, or tokens of the window."""
        used = int(position.max()) if len(position) else 0
        memory = self._in_rings_of(min(used, self.window), position) if self.window else self
        names = ("keys", "values", "gates")
        return {name: x[:, :used].contiguous() for name, x in zip(names, memory.layer, strict=False)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], window: int, position: Tensor, sinks: int = 0) -> "AttentionMemory":
        """Reads what `named` wrote.

        Raises:
            ValueError: the number of slots does not match the tokens or the window.
        """
        found = AttentionMemory(tensors["keys"], tensors["values"], tensors.get("gates"), window, sinks=sinks)
        needed = min(int(position.max()) if len(position) else 0, window)
        if window and found.slots != needed:
            raise ValueError(f"{found.slots} slots, its tokens and window need {needed}: write it again")
        return found

    def writes_into(self, other: "Memory") -> bool:
        """True if its tensors are those of `other`, and tokens are written into them in place."""
        return isinstance(other, AttentionMemory) and self.keys is other.keys


@dataclass
class ConvolutionMemory:
    """The last tokens that a convolution has read, newest last."""

    kind: ClassVar[str] = ConvolutionConfig.kind
    window: ClassVar[int] = 0
    sinks: ClassVar[int] = 0
    rows: Tensor
    """`[N,S,D]`, float32 (float64 in a float64 model); zeros before a sequence's first token."""
    reach: int
    """Tokens before its own that a token is mixed with; S is larger if some can be taken back."""
    oldest: Tensor
    """int64 `[N]`: tokens before this position are lost."""

    @staticmethod
    def empty(config: ConvolutionConfig, batch: int, dtype: torch.dtype, device: torch.device) -> "ConvolutionMemory":
        """Returns the memory of `batch` sequences before their first token, for a model of `dtype`."""
        rows = torch.zeros(batch, config.taps - 1, config.dim, dtype=_wide(dtype), device=device)
        return ConvolutionMemory(rows, config.taps - 1, torch.zeros(batch, dtype=torch.int64, device=device))

    @staticmethod
    def first(mixer: Any, layer: Tensor) -> "ConvolutionMemory":
        """Returns the memory of a layer that read the first tokens."""
        return ConvolutionMemory(layer, mixer.reach, torch.zeros(len(layer), dtype=torch.int64, device=layer.device))

    @property
    def layer(self) -> Tensor:
        return self.rows

    def filled(self, layer: Tensor) -> "ConvolutionMemory":
        return self if layer is self.rows else replace(self, rows=layer)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.reach, self.rows.shape[0], self.rows.shape[2])]

    def tensors(self) -> list[Tensor]:
        """Returns all its tensors."""
        return [self.rows, self.oldest]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.oldest.nbytes

    def map(self, f: Callable[[Tensor], Tensor]) -> "ConvolutionMemory":
        return ConvolutionMemory(f(self.rows), self.reach, f(self.oldest))

    def settled(self) -> "ConvolutionMemory":
        return self

    def reserve(self, slots: int) -> "ConvolutionMemory":
        return self

    def _of_size(self, size: int, position: Tensor) -> "ConvolutionMemory":
        """Returns a memory of the last `size` tokens; those that it does not have are zeros, and lost."""
        have = self.rows.shape[1]
        if have == size:
            return self
        rows = self.rows[:, have - size :] if size < have else F.pad(self.rows, (0, 0, size - have, 0))
        return replace(self, rows=rows.contiguous(), oldest=torch.maximum(self.oldest, position - have))

    @staticmethod
    def cat(memories: Sequence["ConvolutionMemory"], positions: Sequence[Tensor]) -> "ConvolutionMemory":
        size = max(m.rows.shape[1] for m in memories)
        alike = [m._of_size(size, position) for m, position in zip(memories, positions, strict=True)]
        rows, oldest = torch.cat([m.rows for m in alike]), torch.cat([m.oldest for m in alike])
        return ConvolutionMemory(rows, memories[0].reach, oldest)

    def for_decoding(
        self, dtype: torch.dtype, rollback: int, position: Tensor, state_dtype: torch.dtype | None = None
    ) -> "ConvolutionMemory":
        return self._of_size(max(self.rows.shape[1], self.reach + rollback), position)

    def check_rollback(self, tokens: int, position: Tensor) -> None:
        """Raises ValueError if `tokens` tokens cannot be taken back: more than `for_decoding` kept."""
        if tokens > int(position.min()) or tokens < 0:
            raise ValueError(f"the memory is of {position.tolist()} tokens, cannot take back {tokens} of them")
        self.oldest.copy_(torch.maximum(self.oldest, position - self.rows.shape[1]))
        if bool(((position - tokens - self.reach).clamp(min=0) < self.oldest).any()):
            raise ValueError(
                f"cannot take back {tokens} tokens: the {self.reach} before them are no longer in the memory, decode "
                f"with for_decoding(dtype, rollback={tokens})"
            )

    def rollback(self, tokens: int) -> None:
        self.rows.copy_(F.pad(self.rows, (0, 0, tokens, 0))[:, : self.rows.shape[1]])

    def put(self, row: int, other: "ConvolutionMemory", source: int, position: Tensor) -> None:
        one = other.map(lambda x: x[source : source + 1])
        one = one._of_size(self.rows.shape[1], position[source : source + 1])
        self.rows[row], self.oldest[row] = one.rows[0], one.oldest[0]

    def named(self, position: Tensor) -> dict[str, Tensor]:
        return {"rows": self.rows[:, self.rows.shape[1] - self.reach :].contiguous()}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], window: int, position: Tensor, sinks: int = 0) -> "ConvolutionMemory":
        rows = tensors["rows"]
        return ConvolutionMemory(rows, rows.shape[1], (position - rows.shape[1]).clamp(min=0))

    def writes_into(self, other: "Memory") -> bool:
        """True if its tensors are those of `other`, and tokens are written into them in place."""
        return isinstance(other, ConvolutionMemory) and self.rows is other.rows


Memory = RetentionMemory | AttentionMemory | ConvolutionMemory
MEMORIES: dict[str, type[Memory]] = {m.kind: m for m in (RetentionMemory, AttentionMemory, ConvolutionMemory)}
"""Memory of each kind of mixer."""

pytree.register_dataclass(RetentionMemory, serialized_type_name="retentive.RetentionMemory")
pytree.register_pytree_node(  # not as a dataclass, since `reach` is a constant
    ConvolutionMemory,
    lambda memory: (memory.tensors(), memory.reach),
    lambda parts, reach: ConvolutionMemory(reach=reach, **dict(zip(("rows", "oldest"), parts, strict=True))),
    serialized_type_name="retentive.ConvolutionMemory",
    flatten_with_keys_fn=lambda memory: (
        [(pytree.GetAttrKey("rows"), memory.rows), (pytree.GetAttrKey("oldest"), memory.oldest)],
        memory.reach,
    ),
)


def _parts(memory: AttentionMemory) -> dict[str, Tensor]:
    """Returns its tensors by field name, without those that are None."""
    names = ("keys", "values", "gates", "oldest")
    return {name: getattr(memory, name) for name in names if getattr(memory, name) is not None}


pytree.register_pytree_node(  # not as a dataclass, whose fields are all data: the window is a constant
    AttentionMemory,
    lambda memory: (list(_parts(memory).values()), (memory.window, memory.sinks, tuple(_parts(memory)))),
    lambda parts, about: AttentionMemory(window=about[0], sinks=about[1], **dict(zip(about[2], parts, strict=True))),
    serialized_type_name="retentive.AttentionMemory",
    to_dumpable_context=lambda about: [*about[:2], list(about[2])],
    from_dumpable_context=lambda about: (*about[:2], tuple(about[2])),
    flatten_with_keys_fn=lambda memory: (
        [(pytree.GetAttrKey(name), x) for name, x in _parts(memory).items()],
        (memory.window, memory.sinks, tuple(_parts(memory))),
    ),
)
