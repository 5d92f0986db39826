"""NativeRetNet: a RetNet whose tokens the library reads, over the states that torch would read them with."""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retentive.models import LanguageModel, RetentionMemory, State
from retentive.models.model import checked_ids
from retentive.native.library import Heading, Matrix, Reading, Rings, library
from retentive.native.threads import Threads
from retentive.native.weights import ROWS, Packed
from retentive.ops import Ring, forced
from retentive.ops.compiler import NotBuilt
from retentive.ops.cpu import DTYPES

ENGINES = ("auto", "native", "torch")
"""What may read tokens: auto is native where that can run the model."""
STEPS = 64
"""Tokens at most that go through rings one by one; more are read in chunks."""


def unfit(model: Any) -> str | None:
    """Why C cannot read with such a model, on whatever machine; None if it can."""
    if model.config.library:
        return f"it runs models of this package, this is one of {model.config.library}"
    try:
        model.config.all_retention("it")
    except ValueError as error:
        return str(error)
    if model.device.type != "cpu":
        return f"it runs on the CPU, the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, the model is {str(model.dtype).removeprefix('torch.')}"
    return None


def refused(model: Any) -> str | None:
    """Why the library cannot read with this model here; None if it can."""
    return unfit(model) or (str(library()) if isinstance(library(), NotBuilt) else None)


def with_engine(model: LanguageModel, engine: str = "auto") -> LanguageModel:
    """The model, read by one of ENGINES.

    Raises:
        ValueError: an unknown engine, or native was asked for and cannot run the model.
        MemoryError: no memory for the packed weights, and native was asked for.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}, expected one of {', '.join(ENGINES)}")
    if engine == "torch" or (engine == "auto" and refused(model)):
        return model
    try:
        return NativeRetNet(model)
    except MemoryError:
        if engine == "native":
            raise
        return model  # whose weights are there already


def native_here(*tensors: Tensor | None) -> bool:
    """Whether a call may leave torch: nobody asks for gradients, and all is on the CPU."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(x is None or x.is_cpu for x in tensors)
    )


class NativeHead(nn.Module):
    """The output matrix: float32 logits `[..., vocab]` from x `[..., D]`."""

    def __init__(self, head: nn.Module, matrix: Matrix, dtype: torch.dtype, threads: Threads):
        super().__init__()
        for name, parameter in head.named_parameters():
            self.register_parameter(name, parameter)
        self._torch = (head, dtype)  # in a tuple, or its parameters would be registered once more
        self._matrix, self._threads = matrix, threads

    def forward(self, x: Tensor) -> Tensor:
        if not native_here(x) or not x.numel():  # of nothing: where a chunk of a text predicts no token
            head, dtype = self._torch
            return head(x.to(dtype))
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        logits = torch.empty(len(rows), -(-self._matrix.N // ROWS) * ROWS)
        low = DTYPES.index(self._torch[1])
        call = Heading(len(rows), low, head=ctypes.addressof(self._matrix), x=rows.data_ptr(), logits=logits.data_ptr())
        self._threads.call(library().native_head, call, len(rows))
        return logits[:, : self._matrix.N].unflatten(0, x.shape[:-1])


class NativeRetNet(LanguageModel):
    """The same model, with the same parameters: what needs no gradients is read by the library, the rest by torch.

    States are those of any RetNet, so that either can go on where the other stopped. The library has a packed copy of
    the weights: later changes of the parameters do not reach it, and another dtype of them is refused.
    """

    own_threads = True

    def __init__(self, model: LanguageModel, *, threads: int | None = None):
        """
        Args:
            threads: the most that a call uses; by default torch's number.

        Raises:
            ValueError: the library cannot run such a model, or there is none.
            MemoryError: no memory for the packed weights.
        """
        if reason := refused(model):
            raise ValueError(f"the native engine cannot run this model: {reason}")
        nn.Module.__init__(self)  # its parts are those of the model
        self.config = model.config
        for name, module in model.named_children():
            self.add_module(name, module)
        self._packed = Packed(model)
        self._threads = Threads(threads or torch.get_num_threads())
        self._kept: Places | None = None
        self._packed_dtype = self.dtype
        head: Any = NativeHead(model.head, self._packed.struct.head, self.dtype, self._threads)
        self.head = head
        self.train(model.training)

    def __reduce_ex__(self, protocol):
        raise TypeError("a model of the native engine is not copied or pickled: do that with the one it was made from")

    def hidden(
        self,
        ids: Tensor | None,
        state: State | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As every model's, but float32 where the library has computed it."""
        if embeds is not None or lengths is not None or ids is None or forced() or not native_here(ids, cu_seqlens):
            return super().hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths)
        if self.dtype != self._packed_dtype:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (self._packed_dtype, self.dtype))
            raise ValueError(f"the native engine has {was} weights, the model has {now} now: call with_engine anew")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(ids.shape)}")
        checked_ids(ids, self.config.vocab_size)
        begin, tokens = self._borders(ids, cu_seqlens)
        state = self.init_state(len(begin) - 1) if state is None else state
        memories, places = self._memories(state, len(begin) - 1, ids.shape[1] if cu_seqlens is None else 0)
        x = self._read(ids.long().contiguous(), begin, state.position, places)
        return x.unflatten(0, ids.shape), state.then(memories, state.position + tokens)

    def _borders(self, ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Where the sequences begin and end `[N+1]`, and how many tokens each has."""
        if cu_seqlens is None:
            return torch.arange(0, ids.numel() + 1, ids.shape[1]), ids.shape[1]
        begin = cu_seqlens.to(torch.int64).contiguous()
        tokens = begin.diff()
        if begin[0] != 0 or begin[-1] != ids.numel() or bool((tokens < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {ids.numel()} tokens, got {begin.tolist()}")
        return begin, tokens

    def _memories(self, state: State, N: int, T: int) -> "tuple[Sequence[Any], Places]":
        """The memories to read tokens into, in place; T tokens for each sequence, 0 for different numbers of them.

        Single tokens go through rings, and a few where there are rings with room for them; more in chunks through plain
        states.

        Raises:
            ValueError: the state does not fit the model or the N sequences.
        """
        if tuple(state.position.shape) != (N,):
            raise ValueError(f"{N} sequences need a position each, got {list(state.position.shape)}")
        kept = self._kept  # looked at once: another thread may put its own there
        if 0 < T <= STEPS and kept is not None and kept.N == N and kept.slots >= T and kept.are_of(state.memories):
            state.check_unused()
            return state.memories, kept  # the rings that the last token went into, as a rule
        memories: Any = self.checked(state).memories
        self._check_shapes(memories, N)
        rings = [m.value for m in memories if isinstance(m.value, Ring) and m.value.k.dtype == self.dtype]
        ready = len(rings) == len(memories)
        if T == 1 or (ready and 0 < T <= min(STEPS, rings[0].k.shape[2])):
            memories = memories if ready else state.for_decoding(self.dtype).memories
            self._kept = kept = Places(memories)
            return memories, kept
        plain = [m.tensor() if isinstance(m.value, Ring) else m.value.clone() for m in memories]
        memories = [RetentionMemory(x.contiguous()) for x in plain]
        return memories, Places(memories)

    def _check_shapes(self, memories: Sequence[Any], N: int) -> None:
        """Raises ValueError for states that the library would read or write past the end of."""
        wanted = (N, *self._packed.state)
        for memory in memories:
            inner = memory.value.state if isinstance(memory.value, Ring) else memory.value
            if tuple(inner.shape) != wanted or inner.dtype != torch.float32 or not inner.is_cpu:
                raise ValueError(f"state must be float32 {list(wanted)}, got {inner.dtype} {list(inner.shape)}")

    def _read(self, ids: Tensor, begin: Tensor, position: Tensor, places: "Places") -> Tensor:
        """x `[tokens, D]` after tokens that go into the states, in place."""
        x, position = torch.empty(ids.numel(), self.config.dim), position.long().contiguous()
        call = Reading(
            len(begin) - 1, places.slots, DTYPES.index(self._packed_dtype), model=ctypes.addressof(self._packed.struct),
            ids=ids.data_ptr(), begin=begin.data_ptr(), position=position.data_ptr(), rings=places.address,
            x=x.data_ptr(),
        )  # fmt: skip
        self._threads.call(library().native_read, call, ids.numel())
        return x


class Places:
    """The addresses of states or rings, written down once for all tokens that go into the same ones."""

    def __init__(self, memories: Sequence[Any]):
        values = [m.value for m in memories]
        # weak: a pool that nobody else holds can go, and a ring that comes in its place is another one
        self._rings = [weakref.ref(x) for x in values if isinstance(x, Ring)]
        self.N = values[0].k.shape[0] if self._rings else 0
        self.slots = values[0].k.shape[2] if self._rings else 0
        tensors = [x.tensors().values() if isinstance(x, Ring) else [x] for x in values]
        self._array = (Rings * len(tensors))(*(Rings(*(t.data_ptr() for t in layer)) for layer in tensors))
        self.address = ctypes.addressof(self._array)

    def are_of(self, memories: Sequence[Any]) -> bool:
        """True if these are the very rings."""
        same = (a() is m.value for a, m in zip(self._rings, memories, strict=False))
        return len(memories) == len(self._rings) and all(same)
