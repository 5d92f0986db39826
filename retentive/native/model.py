"""NativeModel: a model run by the C library, over the same states as torch."""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retentive.layers.quantized import Quantized
from retentive.models import LanguageModel, RetentionMemory, State
from retentive.models.memory import Memory
from retentive.models.model import checked_ids
from retentive.native import library as lib
from retentive.native.library import Heading, Reading, library
from retentive.native.threads import Threads
from retentive.native.weights import ROWS, Packed
from retentive.ops import Ring, forced
from retentive.ops.compiler import NotBuilt
from retentive.ops.cpu import DTYPES, STATE_DTYPES
from retentive.ops.ring import NARROW, stored_shape

ENGINES = ("auto", "native", "torch")
"""Engines that can run a model; auto is native if that can run the model."""
ACTIVATIONS = ("int16", "int8")
"""Integers that activations can become before a product with a matrix of integers."""
STEPS = 64
"""Maximum tokens that go through rings one by one; more are read in chunks."""
ROOM = 1 << 62
"""Room in tokens if no cache grows."""


def unfit(model: Any) -> str | None:
    """Reason why C cannot run the model on any machine; None if it can."""
    if model.config.library:
        return f"it runs models of this package, this is one of {model.config.library}"
    if model.device.type != "cpu":
        return f"it runs on the CPU, the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, the model is {str(model.dtype).removeprefix('torch.')}"
    return None


def refused(model: Any) -> str | None:
    """Reason why the library cannot run the model here; None if it can."""
    return unfit(model) or (str(library()) if isinstance(library(), NotBuilt) else None)


def with_engine(model: LanguageModel, engine: str = "auto", activations: str = "int16") -> LanguageModel:
    """The model, read by one of ENGINES; one that the native engine reads already is returned as it is.

    Args:
        activations: as for `NativeModel`.

    Raises:
        ValueError: the engine is unknown, or is "native" and cannot run the model; int8 activations of another engine,
            or of a model that the native engine reads already with int16.
        MemoryError: the engine is "native", and there is no memory for the packed weights.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}, expected one of {', '.join(ENGINES)}")
    if isinstance(model, NativeModel):
        if activations not in ("int16", model.activations):
            raise ValueError(f"this model has activations of {model.activations}: name the one that it was made from")
        return model
    if activations != "int16" and (engine == "torch" or refused(model)):
        why = refused(model) or "the engine is torch"
        raise ValueError(f"activations of {activations} need the native engine: {why}")
    if engine == "torch" or (engine == "auto" and refused(model)):
        return model
    try:
        return NativeModel(model, activations=activations)
    except MemoryError:
        if engine == "native" or activations != "int16":
            raise
        return model  # torch needs no packed copy of the weights


def native_here(*tensors: Tensor | None) -> bool:
    """True if a call may leave torch: without gradients, and with all tensors on the CPU."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(x is None or (isinstance(x, Tensor) and x.is_cpu) for x in tensors)  # torch refuses others
    )


class NativeHead(nn.Module):
    """The output matrix: float32 logits `[..., vocab]` from x `[..., D]`."""

    def __init__(self, head: nn.Module, packed: Packed, dtype: torch.dtype, threads: Threads):
        super().__init__()
        self._parameters = head._parameters  # the very dictionary: a parameter assigned to one is the other's too
        self._torch = (head, dtype)  # in a tuple, or its parameters would be registered once more
        self._packed, self._matrix, self._threads = packed, packed.struct.head, threads

    def forward(self, x: Tensor) -> Tensor:
        if not native_here(x) or not x.numel():  # x is empty if a chunk of a text predicts no token
            head, dtype = self._torch
            return head(x.to(dtype))
        rows, matrix = x.reshape(-1, x.shape[-1]).float().contiguous(), self._matrix
        logits = torch.empty(len(rows), -(-matrix.N // ROWS) * ROWS)
        low = DTYPES.index(self._torch[1])
        call = Heading(len(rows), low, head=ctypes.addressof(matrix), x=rows.data_ptr(), logits=logits.data_ptr())
        self._threads.call(library().native_head, call, len(rows), self._packed.head.refresh)
        return logits[:, : matrix.N].unflatten(0, x.shape[:-1])


class NativeModel(LanguageModel):
    """The same model with the same parameters: the library runs calls without gradients, torch all others.

    Both take and return the same states, so either continues where the other stopped. The library has a packed copy of
    the weights, and packs weights again that changed since the last call. It refuses a changed dtype.
    """

    own_threads = True

    def __init__(self, model: LanguageModel, *, threads: int | None = None, activations: str = "int16"):
        """
        Args:
            threads: maximum threads of a call; by default torch's number.
            activations: one of ACTIVATIONS. Of int8 products with integer weights take half of the time where the CPU
                has such instructions, which many sequences and prompts feel; docs/numbers.md has the loss.

        Raises:
            ValueError: the library cannot run this model, or is not available; activations are unknown, or the model
                has no weights of integers.
            MemoryError: no memory for the packed weights.
        """
        if reason := refused(model):
            raise ValueError(f"the native engine cannot run this model: {reason}")
        if activations not in ACTIVATIONS:
            raise ValueError(f"unknown activations {activations!r}, expected one of {', '.join(ACTIVATIONS)}")
        if activations != "int16" and not any(isinstance(m, Quantized) for m in model.modules()):
            raise ValueError(f"activations of {activations} need int8 or int4 weights, the model has none: quantise it")
        nn.Module.__init__(self)  # its parts are those of the model
        self.config, self.origin = model.config, model.origin
        for name, module in model.named_children():
            self.add_module(name, module)
        self.activations = activations
        self._packed = Packed(model, narrow=activations == "int8")
        self._threads = Threads(threads or torch.get_num_threads())
        self._kept: Places | None = None
        self._packed_dtype, self._attends = self.dtype, self.config.attends
        head: Any = NativeHead(model.head, self._packed, self.dtype, self._threads)
        self.head = head
        self.train(model.training)

    def __reduce_ex__(self, protocol):
        raise TypeError("a model of the native engine is not copied or pickled: do that with the one it was made from")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.dtype != self.dtype or not moved.is_cpu:
            raise ValueError(
                f"a model of the native engine stays {str(self.dtype).removeprefix('torch.')} on the CPU: convert the "
                "model it was made from, and call with_engine anew"
            )
        return super()._apply(fn, recurse)

    def hidden(
        self,
        ids: Tensor | None,
        state: State | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Same as `LanguageModel.hidden`, but float32 if the library computed it."""
        if lengths is not None or forced() or not native_here(ids, embeds, cu_seqlens):
            return super().hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths)
        if self.dtype != self._packed_dtype:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (self._packed_dtype, self.dtype))
            raise ValueError(f"the native engine has {was} weights, the model has {now} now: call with_engine anew")
        given, rows = self._given(ids, embeds)
        begin, tokens = _borders(given, cu_seqlens)
        state = self.init_state(len(begin) - 1) if state is None else state
        memories, places = self._memories(state, len(begin) - 1, tokens)
        x, position = torch.empty(given.numel(), self.config.dim), state.position.long().contiguous()
        low, struct = DTYPES.index(self._packed_dtype), ctypes.addressof(self._packed.struct)
        call = Reading(
            places.N, int(places.most > 0), low, model=struct, ids=given.data_ptr(), begin=begin.data_ptr(),
            position=position.data_ptr(), rows=None if rows is None else rows.data_ptr(), memory=places.address,
            x=x.data_ptr(),
        )  # fmt: skip
        self._threads.call(library().native_read, call, given.numel(), self._packed.body.refresh)
        return x.unflatten(0, given.shape), state.then(memories, position + tokens)

    def _given(self, ids: Tensor | None, embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(int64 `[B,T]`, rows `[B T, D]`): ids, or in place of each `~r` for row r of the embeddings."""
        if embeds is None:
            ids = checked_ids(ids, self.config.vocab_size)
            if ids.ndim != 2 or not ids.numel():
                raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(ids.shape)}")
            return ids.long().contiguous(), None
        if embeds.ndim != 3 or not embeds.numel() or embeds.shape[-1] != self.config.dim:
            raise ValueError(f"the model needs embeds [B,T,{self.config.dim}], got {list(embeds.shape)}")
        rows = embeds.reshape(-1, self.config.dim).float().contiguous()
        return ~torch.arange(len(rows)).view(embeds.shape[:2]), rows

    def _memories(self, state: State, N: int, tokens: int | Tensor) -> "tuple[Sequence[Any], Places]":
        """The memories to read tokens into, in place.

        A single token goes through rings, and so do a few tokens if the rings have room. More go through plain states
        in chunks. Caches take any number.

        Args:
            tokens: of each of the N sequences, or `[N]`.

        Raises:
            ValueError: the state does not fit the model or the N sequences.
        """
        T = tokens if isinstance(tokens, int) else STEPS + 1
        if tuple(state.position.shape) != (N,):
            raise ValueError(f"{N} sequences need a position each, got {list(state.position.shape)}")
        longest = int((state.position + tokens).max()) if self._attends else 0
        kept = self._kept  # read once: another thread may replace it
        if kept is not None and kept.N == N and kept.most >= T and longest <= kept.room and kept.are_of(state.memories):
            state.check_unused()
            return state.memories, kept  # usually the memories of the last token
        state = self.checked(state).placed(self.config.kinds)
        for block, memory in zip(self.blocks, state.memories, strict=True):
            _check_memory(block.mixer, memory, N, self.dtype)
        most = _most_steps(state.memories, self.dtype)
        if T == 1 and not most:
            state, most = state.for_decoding(self.dtype), 1
        elif most < T:
            state, most = State([_plain(m) for m in state.memories], state.position), 0
        memories = [_with_room(m, longest) for m in state.memories]
        places = Places(memories, N, most)
        self._kept = places if places.most else kept
        return memories, places


def _most_steps(memories: Sequence[Memory], dtype: torch.dtype) -> int:
    """Maximum tokens that can go through the rings one by one; 0 if any state has no ring of `dtype`."""
    rings: list[Any] = [m.value for m in memories if m.kind == "retention"]
    if not all(isinstance(x, Ring) and x.k.dtype == dtype for x in rings):
        return 0
    return min([STEPS, *(x.k.shape[2] for x in rings)])


def _borders(ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """(first token of each sequence and the end `[N+1]`, tokens of each)."""
    if cu_seqlens is None:
        return torch.arange(0, ids.numel() + 1, ids.shape[1]), ids.shape[1]
    begin = cu_seqlens.to(torch.int64).contiguous()
    tokens = begin.diff()
    if begin[0] != 0 or begin[-1] != ids.numel() or bool((tokens < 0).any()):
        raise ValueError(f"cu_seqlens must ascend from 0 to the {ids.numel()} tokens, got {begin.tolist()}")
    return begin, tokens


def _check_memory(mixer: Any, memory: Any, N: int, dtype: torch.dtype) -> None:
    """Raise ValueError for a memory past whose end the library would read or write."""
    parts: dict[str, tuple[Any, torch.dtype, tuple[int, ...]]]
    if memory.kind == "convolution":
        parts = {"rows": (memory.rows, torch.float32, (N, max(memory.rows.shape[1], mixer.reach), mixer.config.dim))}
    elif memory.kind == "retention":
        ring = isinstance(memory.value, Ring)
        inner = memory.value.state if ring else memory.value
        wanted = inner.dtype if ring and inner.dtype in NARROW else torch.float32
        parts = {"state": (inner, wanted, stored_shape((N, mixer.H, mixer.K, mixer.V), wanted))}
    else:
        cached = (N, memory.slots, mixer.kv_heads, mixer.K)
        parts = {"keys": (memory.keys, dtype, cached), "values": (memory.values, dtype, cached)}
        if memory.gates is not None:
            parts["gates"] = (memory.gates, torch.float32, (N, memory.slots, mixer.H))
        if (memory.gates is None) != (mixer.forget_proj is None):
            has = "no forget gates" if memory.gates is None else "forget gates"
            raise ValueError(f"the cache has {has}, unlike the model: another model's state?")
    for name, (x, wanted, shape) in parts.items():
        if tuple(x.shape) != shape or x.dtype != wanted or not x.is_cpu:
            asked = f"{str(wanted).removeprefix('torch.')} {list(shape)}"
            raise ValueError(f"{name} must be {asked}, got {x.dtype} {list(x.shape)}")


def _plain(memory: Memory) -> Memory:
    """Copy of a state without a ring; itself if it is a cache, or of a convolution."""
    if memory.kind != "retention":
        return memory
    value = memory.value
    return RetentionMemory((value.to_state() if isinstance(value, Ring) else value.clone()).contiguous())


def _with_room(memory: Memory, slots: int) -> Memory:
    """Contiguous memory with room for `slots` tokens, itself if it already is one; a state itself."""
    if memory.kind == "retention":
        return memory
    memory = memory.reserve(slots)
    return memory if all(x.is_contiguous() for x in memory.tensors()) else memory.map(Tensor.contiguous)


class Places:
    """Addresses of memories, collected once for all tokens that are read into the same memories."""

    def __init__(self, memories: Sequence[Memory], N: int, most: int):
        """
        Args:
            most: maximum tokens that go through rings one by one; 0 if states are plain and tokens go in chunks.
        """
        self.N, self.most, self.room = N, most, ROOM
        self._array = (lib.Memory * len(memories))(*map(self._place, memories))
        self.address = ctypes.addressof(self._array)
        # weak references, so that an unused pool can be freed; a ring at the same address is another object
        self._held = [weakref.ref(_holder(memory)) for memory in memories]

    def _place(self, memory: Memory) -> Any:
        if memory.kind == "retention":
            tensors = memory.tensors()
            slots = tensors[1].shape[2] if len(tensors) > 1 else 0
            kind = STATE_DTYPES.index(tensors[0].dtype)
            return lib.Memory(*(x.data_ptr() for x in tensors), slots=slots, state_dtype=kind)
        if memory.kind == "convolution":
            return lib.Memory(state=memory.rows.data_ptr(), slots=memory.rows.shape[1])
        if not memory.window or memory.slots < memory.window:
            self.room = min(self.room, memory.slots)
        gates = None if memory.gates is None else memory.gates.data_ptr()
        return lib.Memory(k=memory.keys.data_ptr(), v=memory.values.data_ptr(), decay=gates, slots=memory.slots)

    def are_of(self, memories: Sequence[Memory]) -> bool:
        """True if these are the same memory objects, in the same order."""
        same = (held() is _holder(memory) for held, memory in zip(self._held, memories, strict=False))
        return len(memories) == len(self._held) and all(same)


def _holder(memory: Memory) -> Any:
    """The ring, or the tensor of keys or rows: the same object as long as the addresses stay the same."""
    if memory.kind == "retention":
        return memory.value
    return memory.keys if memory.kind == "attention" else memory.rows
