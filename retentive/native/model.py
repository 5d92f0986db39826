"""NativeRetNet: a RetNet whose tokens the library reads, over the states that torch would read them with."""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retentive.models import LanguageModel, RetentionState, RetNet, RetNetConfig
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
    if type(model.config) is not RetNetConfig:
        return f"it runs RetNets, this is a {type(model.config).__name__.removesuffix('Config')}"
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
        return NativeRetNet(model)  # type: ignore[arg-type]  # it refuses what is no RetNet
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


class NativeRetNet(RetNet):
    """The same model, with the same parameters: what needs no gradients is read by the library, the rest by torch.

    States are those of any RetNet, so that either can go on where the other stopped. The library has a packed copy of
    the weights: later changes of the parameters do not reach it, and another dtype of them is refused.
    """

    own_threads = True

    def __init__(self, model: RetNet, *, threads: int | None = None):
        """
        Args:
            threads: the most that a call uses; by default torch's number.

        Raises:
            ValueError: the library cannot run such a model, or there is none.
            MemoryError: no memory for the packed weights.
        """
        if reason := refused(model):
            raise ValueError(f"the native engine cannot run this model: {reason}")
        LanguageModel.__init__(self)
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
        state: RetentionState | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState]:
        """As RetNet's, but float32 where the library has computed it."""
        if embeds is not None or lengths is not None or ids is None or forced() or not native_here(ids, cu_seqlens):
            return super().hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths)
        if self.dtype != self._packed_dtype:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (self._packed_dtype, self.dtype))
            raise ValueError(f"the native engine has {was} weights, the model has {now} now: call with_engine anew")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token ids must be int64 or int32, got {str(ids.dtype).removeprefix('torch.')}")
        begin, tokens = self._borders(ids, cu_seqlens)
        state = self.init_state(len(begin) - 1) if state is None else state
        layers, places = self._layers(state, len(begin) - 1, ids.shape[1] if cu_seqlens is None else 0)
        x = self._read(ids.long().contiguous(), begin, state.position, places)
        return x.unflatten(0, ids.shape), RetentionState(layers, state.position + tokens)

    def _borders(self, ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Where the sequences begin and end `[N+1]`, and how many tokens each has; raises for what is out of range."""
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            bad = next(i for i in ids.flatten().tolist() if not 0 <= i < self.config.vocab_size)
            raise IndexError(f"token ids must be from 0 to {self.config.vocab_size - 1}, got {bad}")
        if cu_seqlens is None:
            return torch.arange(0, ids.numel() + 1, ids.shape[1]), ids.shape[1]
        begin = cu_seqlens.to(torch.int64).contiguous()
        tokens = begin.diff()
        if begin[0] != 0 or begin[-1] != ids.numel() or bool((tokens < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {ids.numel()} tokens, got {begin.tolist()}")
        return begin, tokens

    def _layers(self, state: RetentionState, N: int, T: int) -> "tuple[Sequence[Tensor | Ring], Places]":
        """The layers' states to read tokens into, in place; T tokens for each, 0 for different numbers of them.

        Single tokens go through rings, and a few where there are rings with room for them; more in chunks through plain
        states.

        Raises:
            ValueError: the state does not fit the model or the N sequences.
        """
        if tuple(state.position.shape) != (N,):
            raise ValueError(f"{N} sequences need a position each, got {list(state.position.shape)}")
        kept = self._kept  # looked at once: another thread may put its own there
        if 0 < T <= STEPS and kept is not None and kept.N == N and kept.are_of(state.layers) and kept.slots >= T:
            return state.layers, kept  # the rings that the last token went into, as a rule
        self._check(state)
        self._check_shapes(state, N)
        ready = all(isinstance(x, Ring) and x.k.dtype == self.dtype for x in state.layers)
        if T == 1 or (T <= STEPS and ready and 0 < T <= state.layers[0].k.shape[2]):
            layers = state.layers if ready else state.for_decoding(self.dtype).layers
            self._kept = kept = Places(layers)
            return layers, kept
        layers = [x.to_state() if isinstance(x, Ring) else x.clone() for x in state.layers]
        layers = [x.contiguous() for x in layers]
        return layers, Places(layers)

    def _check_shapes(self, state: RetentionState, N: int) -> None:
        """Raises ValueError for states that the library would read or write past the end of."""
        wanted = (N, *self._packed.state)
        for x in state.layers:
            inner = x.state if isinstance(x, Ring) else x
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
    """The addresses of layers' states or rings, written down once for all tokens that go into the same ones."""

    def __init__(self, layers: Sequence[Any]):
        # weak: a pool that nobody else holds can go, and a ring that comes in its place is another one
        self._rings = [weakref.ref(x) for x in layers if isinstance(x, Ring)]
        self.N = layers[0].k.shape[0] if self._rings else 0
        self.slots = layers[0].k.shape[2] if self._rings else 0
        tensors = [x.tensors().values() if isinstance(x, Ring) else [x] for x in layers]
        self._array = (Rings * len(tensors))(*(Rings(*(t.data_ptr() for t in layer)) for layer in tensors))
        self.address = ctypes.addressof(self._array)

    def are_of(self, layers: Sequence[Any]) -> bool:
        """Whether these are the very rings."""
        return len(layers) == len(self._rings) and all(a() is b for a, b in zip(self._rings, layers, strict=True))
